"""A running `vllm serve`: what is asked of it, what comes back, and what is done when it goes away."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import SettingsError
from patience import DEFAULT_PATIENCE, Patience

if TYPE_CHECKING:
    import torch
    from PIL import Image

TIMEOUT = 3600  # seconds that a server may take to answer one request


@dataclass(frozen=True)
class Request:
    """What vLLM is to go on from. ids: with one pad an image, which vLLM expands; length: with all of its pads."""

    ids: list[int]
    images: tuple[Image.Image, ...]
    length: int
    sampling: dict[str, Any]


@dataclass(frozen=True)
class Completion:
    """What came back. `prompt_logprobs`: one for each prompt token but the first, where they were asked for."""

    ids: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    prompt_length: int


Answer = Callable[[Completion], Request | None]


class _NoAnswer(Exception):
    """A request that the server did not answer, for reasons that may pass."""


class VLLMServer:
    """A running `vllm serve`, by its address. Any number of processes may use it.

    Its log-probs are those at temperature 1. Weights go through a folder that both sides see. Where it does not answer
    it is waited for. One that comes back has the weights that it was started with, so it reads the present ones first,
    which lie in the folder until the process ends, and what it answered meanwhile is asked again.
    """

    is_shared = True

    def __init__(
        self,
        url: str,
        rows: int,
        folder: str | Path | None = None,
        patience: float = DEFAULT_PATIENCE,
    ) -> None:
        """url: like `http://localhost:8000`. rows: requests at a time. folder: for `load`. patience: seconds."""
        import requests

        self.url, self.rows = url.rstrip("/"), rows
        # Of its own: two runs with a server each may name the same folder. Absolute: the server runs elsewhere.
        self.folder = None if folder is None else Path(folder, re.sub(r"\W+", "_", self.url)).absolute()
        self.remover: weakref.finalize | None = None
        self.session = requests.Session()
        self.session.mount(self.url, requests.adapters.HTTPAdapter(pool_maxsize=rows))
        self.patience, self.lock, self.outages = Patience(f"the vLLM server at {url}", patience), threading.Lock(), 0
        try:
            served = self._served()
        except (_NoAnswer, LookupError, TypeError) as error:
            raise SettingsError(f"there is no vLLM server at {url} ({error}): start one with `vllm serve`") from None
        self.name, self.max_length = served["id"], served["max_model_len"]

    def _served(self) -> dict[str, Any]:
        return self._request("GET", "/v1/models", timeout=30)["data"][0]

    def run(self, requests: Sequence[Request], answers: Sequence[Answer], temperature: float) -> None:
        pictures: dict[int, str] = {}

        def complete(request: Request | None, answer: Answer) -> None:
            while request is not None:
                request = answer(self._lasting(partial(self._complete, request, pictures)))

        with ThreadPoolExecutor(self.rows) as pool:
            list(pool.map(complete, requests, answers))

    def _complete(self, request: Request, pictures: dict[int, str]) -> Completion:
        parts = [{"type": "image_url", "url": _data_uri(image, pictures)} for image in request.images]
        reply = self._post(
            "/inference/v1/generate",
            {
                "model": self.name,
                "token_ids": request.ids,
                "content_parts": parts,
                "sampling_params": request.sampling,
                "return_token_ids": True,
            },
        )
        choice = reply["choices"][0]
        return Completion(
            ids=choice["token_ids"],
            logprobs=[entry["logprob"] for entry in choice["logprobs"]["content"]],
            prompt_logprobs=[
                values[str(token)]["logprob"]
                for token, values in zip(
                    reply["prompt_token_ids"][1:], (reply["prompt_logprobs"] or [])[1:], strict=False
                )
            ],
            prompt_length=len(reply["prompt_token_ids"]),
        )

    def load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Bring it weights; with several processes one does, for all."""
        from safetensors.torch import save_file

        if self.folder is None:
            raise SettingsError("weights cannot be brought to a server without a folder that both sides see")
        if self.remover is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.remover = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights}
        save_file(tensors, self.folder / "new.safetensors")
        os.replace(self.folder / "new.safetensors", self.folder / "model.safetensors")
        self._lasting(self._read)

    def _read(self) -> None:
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}})
        for cache in ("prefix", "encoder"):
            self._post(f"/reset_{cache}_cache", {})

    def _lasting(self, ask: Callable[[], Any]) -> Any:
        """What `ask` gets, however often the server goes away and comes back.

        Raises:
            OutageError: where it stays away for longer than our patience.
        """
        while True:
            outages = self.outages
            try:
                reply = ask()
            except _NoAnswer as error:
                self._wait(str(error), outages)
                continue
            if outages == self.outages:
                if not self.lock.locked():  # else it was asked before the outage that others wait for
                    self.patience.answered()
                return reply

    def _wait(self, reason: str, outages: int) -> None:
        """Until the server is there and has our weights; threads that met the same outage wait for the first."""
        with self.lock:
            if outages < self.outages:
                return
            while True:
                self.patience.failed(reason)
                try:
                    self._served()
                    if self.folder is not None:
                        self._read()
                except _NoAnswer as error:
                    reason = str(error)
                else:
                    self.outages += 1
                    return

    def _post(self, path: str, values: dict[str, Any]) -> Any:
        return self._request("POST", path, json=values, timeout=(30, TIMEOUT))

    def _request(self, method: str, path: str, **values: Any) -> Any:
        import requests

        try:
            reply = self.session.request(method, self.url + path, **values)
            content = reply.json() if reply.ok and reply.content else None
        except requests.RequestException as error:  # no JSON among them: a proxy's page
            raise _NoAnswer(type(error).__name__) from None
        if reply.status_code in (403, 404):
            raise SettingsError(
                f"the vLLM server at {self.url} refuses {path}: start it with --enable-scale-out and, to bring it new "
                "weights, with VLLM_SERVER_DEV_MODE=1 in its environment"
            )
        if reply.status_code >= 500 or reply.status_code == 429:  # its engine died, or a proxy stands before nothing
            raise _NoAnswer(f"HTTP {reply.status_code} on {path}: {reply.text[:200]}")
        if not reply.ok:
            raise RuntimeError(f"the vLLM server answered {reply.status_code} on {path}: {reply.text[:500]}")
        return content


def _data_uri(image: Image.Image, known: dict[int, str]) -> str:
    """The image as a lossless data URI, encoded once."""
    if id(image) not in known:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        known[id(image)] = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return known[id(image)]
