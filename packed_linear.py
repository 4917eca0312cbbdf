"""Linear layers on a CPU with weights laid out for few rows, as decoding needs them.

torch multiplies float32 matrices with MKL, for which 8 rows take four times as long as one, and which leaves AVX-512
unused on AMD's CPUs. oneDNN, which torch carries too, takes a weight in an order of its own: 8 rows then cost little
more than one. These are the operations that `torch.compile` uses when it freezes a model; packing costs one copy of
the weights, in time and in memory.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import psutil
import torch

LEAST_NUMBERS = 1 << 18  # of a weight; for smaller ones the call costs more than it saves
MEMORY_SHARE = 0.5  # of the free memory that packed weights may take


class PackedLinears:
    """The large linear layers of a model, packed; empty where that cannot be done or would take too much memory.

    The weights must not change while this is used. rows: how many are multiplied side by side, mostly.
    """

    def __init__(self, model: torch.nn.Module, rows: int) -> None:
        usable = _has_onednn() and not torch.is_autocast_enabled("cpu")  # which oneDNN's operation would bypass
        layers = [module for module in model.modules() if _can_be_packed(module)] if usable else []
        if 4 * sum(layer.weight.numel() for layer in layers) > MEMORY_SHARE * psutil.virtual_memory().available:
            layers = []
        pack = torch.ops.mkldnn._reorder_linear_weight if layers else None
        self.packed = [(layer, pack(layer.weight.detach(), rows)) for layer in layers]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the layers multiply with their packed weights; without gradients."""
        try:
            for layer, weight in self.packed:
                layer.forward = partial(_linear, weight=weight, bias=layer.bias)
            yield
        finally:
            for layer, _ in self.packed:
                layer.__dict__.pop("forward", None)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")


def _can_be_packed(module: torch.nn.Module) -> bool:
    if type(module) is not torch.nn.Linear or "forward" in module.__dict__:  # another has put its own there
        return False
    weight = module.weight
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and type(weight.data) is torch.Tensor
    return plain and weight.numel() >= LEAST_NUMBERS


def _linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
