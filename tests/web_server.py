"""A running web page on a tiny model whose answers are what a test says."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import web_demo
from config import WebConfig
from inference import QwenVLInference

SCRIPT = (
    "<think>\nThe red square <tool_call>[10, 10, 30, 40]</tool_call> shows & tells, "
    "<tool_call>[9, 9, 1, 1]</tool_call>\n<b>no</b></think>\n\n<answer>rising</answer><|im_end|>"
)


@dataclass
class Served:
    url: str
    inference: QwenVLInference
    script: str = SCRIPT
    pause: float = 0.0  # seconds between two tokens
    steps: int = 0  # of decoding, so far

    def stream(self, prompt: Any, sampling: Any) -> Iterator[Any]:
        """The engine's own stream, led by the script."""
        engine = self.inference.engine
        ids = self.inference.renderer.text_ids(self.script)
        for response in type(engine).stream(engine, prompt, replace(sampling, max_new_tokens=len(ids)), ids):
            self.steps += 1
            time.sleep(self.pause)
            yield response


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(model: str, **settings: Any) -> Iterator[Served]:
    config = WebConfig(model, **{"port": free_port(), "questions_per_minute": 1000, **settings})
    inference = QwenVLInference(config)
    with web_demo.served(inference, config) as url:
        served = Served(url, inference)
        inference.engine.stream = served.stream
        yield served
