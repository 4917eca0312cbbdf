"""The long run: thousands of rollouts without a growing process, and ten thousand texts that no model should write."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import statistics
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_security import Skeleton
from test_trainers import grpo_trainer, length_part, script_calls, settings_for
from transformers import TrainerCallback

from crop_tool import COORDINATE_SPACES, CropContract, run_call, split_annotations
from measures import Answer
from response_format import find_calls, parse_response
from rewards import PRESETS, Reference, call_statistics, reward_parts, score, total
from rollouts import Rollout
from traces import Trace, trace_html
from training import train

pytestmark = pytest.mark.slow
FUZZED = 10_000
ROLLOUTS, A_STEP, WARM_UP = 2_000, 40, 12  # steps of warm-up: every length and every cache has been seen


def resident() -> float:
    """MiB that this process holds, without what malloc keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.resident, self.rollouts, self.started = [], [], time.monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.resident.append(resident())
        self.rollouts.append(sum(isinstance(item, Rollout) for item in gc.get_objects()))


def test_two_thousand_rollouts_do_not_make_the_process_grow(base_folder, data_folder, tmp_path, capsys):
    """With crops, a reference model, logged completions, and checkpoints on the way."""
    steps = ROLLOUTS // A_STEP
    flags = {"max_steps": steps, "gradient_accumulation_steps": A_STEP // 8, "beta": 0.04, "learning_rate": 1e-4}
    flags |= {"log_completions": "true", "save_steps": 5, "save_total_limit": 2, "num_train_epochs": 100}
    config = settings_for("grpo", base_folder, data_folder, tmp_path, **flags)
    _, trainer = grpo_trainer(config, (*reward_parts("balanced", 1.0, 1.0), length_part()))
    script_calls(trainer)
    watch = Watch()
    trainer.add_callback(watch)
    train(trainer, config, "grpo")
    assert len(watch.resident) == steps
    before = statistics.median(watch.resident[WARM_UP : WARM_UP + 6])
    after = statistics.median(watch.resident[-6:])
    with capsys.disabled():
        print(
            f"\n{ROLLOUTS} rollouts in {time.monotonic() - watch.started:.0f} s: {watch.resident[0]:.0f} MiB after a "
            f"step, {before:.0f} after warm-up, {after:.0f} at the end ({after / before - 1:+.1%}), most "
            f"{max(watch.resident):.0f}; {watch.rollouts[-1]} rollouts alive"
        )
    assert after <= 1.05 * before
    assert max(watch.rollouts) <= 2 * A_STEP, "rollouts of steps before the last are kept alive"


PIECES = [
    *("<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>", "<|im_end|>", "<|image_pad|>"),
    *("<tool_call>[0, 0, 30, 30]</tool_call>", "<tool_call>[5, 5, 1]</tool_call>", "[1e999, -1, nan, inf]", "[", "]"),
    *("<tool_call>[0.5, 0.5, 1000, 1000]</tool_call>", "9" * 400, "1e-400", "-0", "0x10", "１２", "٣", "1_000", ", "),
    *("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style>", "<!--", "{{ 7*7 }}", "{%", "&#0;"),
    *("\ud800", "\x00", "\x1b[2J", "\u202e", "\ufeff", "\r\n", "\n" * 40, "𝟙", "é" * 50, "a" * 3000),
    *("yes", "red", "A", "3 dogs", "{Crop it [1, 2, 30, 40]}", "__import__('os')", "%s%n", "../../etc/passwd"),
]
calls = st.sampled_from(PIECES).map(lambda piece: f"<tool_call>{piece}</tool_call>")
boxes = st.lists(st.integers(-5, 400) | st.floats(), min_size=3, max_size=5).map(
    lambda box: f"<tool_call>{box}</tool_call>"
)
model_text = st.lists(st.sampled_from(PIECES) | calls | boxes | st.text(max_size=6), max_size=16).map("".join)
PICTURES = [Image.new("RGB", size, "red") for size in ((64, 48), (1, 150), (333, 29))]


@settings(
    max_examples=FUZZED,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    text=model_text, expected=model_text, picture=st.sampled_from(PICTURES), space=st.sampled_from(COORDINATE_SPACES)
)
def fuzz(text, expected, picture, space):
    contract = CropContract(coordinate_space=space)
    done = [run_call(call, picture, contract) for call in find_calls(text)]
    response = parse_response(text, tuple(call for call, _ in done))
    for call, crop in done:
        assert (crop is not None) == call.is_executed
        assert crop is None or min(crop.size) >= contract.factor
    reference = Reference(expected, (), picture.size, expected)
    for parts in PRESETS.values():
        assert -1 <= total(score(response, reference, parts), parts) <= 3
    call_statistics(response, reference)
    for written in (text, expected):
        with contextlib.suppress(ValueError):
            split_annotations(written)
    encodable = text.encode("utf-8", "replace").decode()
    answer = Answer("q", "real", 0, encodable, response.tool_calls, "stop", 1, 0, 0.1, picture.size)
    assert Answer.from_json(json.loads(json.dumps(answer.to_json()))).text == encodable
    page = trace_html(Trace(expected, response, picture, tuple(crop for _, crop in done), expected, title=text))
    page.encode("utf-8", "xmlcharrefreplace")
    tags = [part for part in Skeleton(page).parts if isinstance(part, tuple) and isinstance(part[1], list)]
    assert {tag for tag, _ in tags} <= TAGS
    assert not any(name.startswith("on") for _, names in tags for name in names)
    COUNTED.append(len(done))


TAGS = set(
    [
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "section",
        "h2",
        "h3",
        "div",
        "img",
        "svg",
        "rect",
        "text",
        "p",
        "span",
        "b",
        "code",
        "i",
        "figure",
    ]
)
TAGS |= {"br", "figcaption"}
COUNTED: list[int] = []


def test_ten_thousand_texts_pass_through_parser_crops_rewards_and_page(capsys):
    started = time.monotonic()
    fuzz()
    with capsys.disabled():
        print(f"\n{len(COUNTED)} texts with {sum(COUNTED)} calls in {time.monotonic() - started:.0f} s")
    assert len(COUNTED) >= FUZZED and sum(COUNTED) > FUZZED
