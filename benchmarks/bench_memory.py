"""The memory model against measured peaks of one update: forward, backward, optimizer, over two micro-batches.

    python benchmarks/bench_memory.py --shape 7b --json memory.json

Measured is what lives in tensors, counted at every operation of the real code. On a CPU the tensors are fake (shapes
and types, no numbers), so 3B and 7B need neither their memory nor their time; on a GPU the allocator is asked instead.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import trl.trainer.utils
from common import arguments, build_model, build_renderer
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from trl.trainer.utils import add_fused_lm_head

import memory_model
from architecture import Architecture
from config import ModelConfig, SFTStageConfig
from memory_model import Run, state_bytes, update_bytes
from model_utils import lora_config

NARROW_TILE = 64  # vocabulary columns: TRL's head has temporaries on a CPU that its GPU kernel has not


class PeakBytes(TorchDispatchMode):
    """Bytes of the storages that live, `now` and at the `peak`."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.seen = WeakIdKeyDictionary()
        self.now = self.peak = 0
        for tensor in known:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            size = self.seen[storage] = storage.nbytes()
            weakref.finalize(storage, self._free, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._add, output)
        return output


class Allocator:
    """The same figures from a GPU's allocator."""

    def __init__(self, *known: torch.Tensor) -> None:
        torch.cuda.reset_peak_memory_stats()

    now = property(lambda self: torch.cuda.memory_allocated())

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    @peak.setter
    def peak(self, value: int) -> None:
        torch.cuda.reset_peak_memory_stats()

    def __enter__(self) -> Allocator:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def measure(shape: str, run: Run, tokens: int, fake: bool, device: str = "cpu") -> tuple[Architecture, dict[str, int]]:
    """Bytes of updates of `run.batch_size` rows of `tokens`: kept between steps, kept for backward, and at the peak."""
    gc.collect()  # a model with TRL's head is in a cycle: the one before would still be there
    renderer = build_renderer()
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
        dtype = torch.bfloat16 if run.base_bytes == 2 else torch.float32
        model = build_model(shape, renderer, device, dtype)
        architecture = Architecture.from_config(model.config.to_dict())
        model.model.visual.requires_grad_(False)
        add_fused_lm_head(model)
        model = _prepared(model, run, fake)
        ids = torch.full((run.batch_size, tokens), 5, device=device)
        inputs = {"input_ids": ids, "labels": ids, "position_ids": torch.zeros(3, *ids.shape, device=device).long()}
        # A mask, as padded rows and packs have one.
        mask = torch.ones(run.batch_size, 1, tokens, tokens, dtype=torch.bool, device=device).tril()
        inputs["attention_mask"] = {"full_attention": mask}
        trained = [value for value in model.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=not fake)
        counter = PeakBytes if device == "cpu" else Allocator
        with counter(*model.parameters(), *model.buffers(), *_tensors(inputs)) as counted:
            _step(model, optimizer, inputs, run, device, counted, 1)  # the optimizer makes its state
            gc.collect()
            given = sum(value.nbytes for value in _tensors(inputs))
            between, counted.peak = counted.now - given, counted.now
            kept = _step(model, optimizer, inputs, run, device, counted, 2)
            found = {"between steps": between, "kept for backward": kept, "peak": counted.peak - given}
    return architecture, found


def _tensors(inputs: dict[str, Any]) -> Iterator[torch.Tensor]:
    for value in inputs.values():
        yield from value.values() if isinstance(value, dict) else [value]


def _prepared(model: Any, run: Run, fake: bool) -> Any:
    """With its adapter and its checkpoints, as the trainers set them."""
    base = model
    base.train()
    if run.method != "full":
        config = lora_config(
            LoraConfig, ModelConfig(), SFTStageConfig(use_lora=True, lora_r=run.lora_r, lora_dropout=run.lora_dropout)
        )
        # A fake weight cannot be moved, and need not be.
        stays = mock.patch.object(torch.nn.Module, "to", lambda self, *_, **__: self)
        with stays if fake else contextlib.nullcontext():
            model = get_peft_model(base, config)
    if run.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.model.visual.get_input_embeddings = lambda: None
        if run.method != "full":
            base.enable_input_require_grads()
    return model


def _step(
    model: Any, optimizer: Any, inputs: dict[str, Any], run: Run, device: str, counted: Any, micro_batches: int
) -> int:
    """One optimizer step; returns the bytes that its first forward pass left for the backward pass."""
    before = kept = counted.now
    for number in range(micro_batches):
        with torch.autocast(device, torch.bfloat16, enabled=run.half):
            loss = -model(**inputs, fused_lm_head=True).log_probs.sum()
        if number == 0:
            kept = counted.now - before
        loss.backward()
        del loss
    optimizer.step()
    optimizer.zero_grad()
    return kept


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1150, help="of a row")
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch")
    args = parser.parse_args()
    fake = args.device == "cpu"
    if fake:
        memory_model.HEAD_TILE = (memory_model.HEAD_TILE[0], NARROW_TILE)
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = NARROW_TILE
    cases = {
        "LoRA": Run(lora_dropout=0.0),
        "LoRA, no checkpoints": Run(lora_dropout=0.0, gradient_checkpointing=False),
        "full, bfloat16": Run(method="full", half_weights=True),
        "full, float32": Run(method="full"),
    }
    rows, ratios = [], []
    for name, run in cases.items():
        run = replace(run, batch_size=args.rows)
        try:
            model, found = measure(args.shape, run, args.tokens, fake, args.device)
        except torch.OutOfMemoryError:
            print(f"{name}: does not fit on this GPU", flush=True)
            continue
        parts = state_bytes(model, run) | update_bytes(model, run, 0.0, args.rows, args.tokens, args.rows * args.tokens)
        modelled = sum(parts.values())
        ratios.append(modelled / found["peak"])
        gib = {"measured GiB": found["peak"] / 2**30, "modelled GiB": modelled / 2**30}
        rows.append({"case": name} | gib | {"modelled / measured": ratios[-1]})
        print(rows[-1], flush=True)
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    print(f"\nmemory model ({args.shape}, {args.device}): worst ratio {worst:.3f}")
    if args.json:
        found = {"ratio": worst, "rows": rows, **vars(args)}
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
