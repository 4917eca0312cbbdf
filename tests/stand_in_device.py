"""A device beside the CPU, for machines that have none: its tensors hold the CPU's values and say `standin:0`.

What a GPU refuses is an error here, too: an operation on tensors of both devices. So code that leaves a tensor behind
on the CPU is found without a GPU.

    ACCELERATE_TORCH_DEVICE=standin:0 python tests/stand_in_device.py PLAN.json
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "standin:0"
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")  # by the CPU's indices, too


class OnDevice(torch.Tensor):
    """A tensor of the device; `held` is where its values are."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        self = cls._make_wrapper_subclass(cls, held.size(), device=torch.device(DEVICE), **layout)
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return carry_out(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self) -> str:
        return f"{self.held!r} on {DEVICE}"


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return carry_out(function, args, kwargs or {})


class Constructors(TorchFunctionMode):
    """What torch makes of Python's numbers and lists goes to the device by a copy, not below all modes."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and is_device(kwargs.get("device")):
            del kwargs["device"]
            return function(*tree_map(_listed, args), **kwargs).to(DEVICE)
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], OnDevice):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(_as_index(part) for part in index), *args[2:])
        return function(*args, **kwargs)


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, OnDevice) else value


def _as_index(part: Any) -> Any:
    if not isinstance(part, list):
        return part
    return (torch.tensor(part) if part else torch.empty(0, dtype=torch.long)).to(DEVICE)


def is_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == "standin"


def carry_out(function: Any, args: tuple, kwargs: dict) -> Any:
    """The operation on the CPU's values; where it ran on the device, so are its results."""
    name = function._schema.name
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    ours = [value for value in tensors if isinstance(value, OnDevice)]
    if name not in ("aten::_to_copy", "aten::copy_"):
        bound = [args[0], *args[2:]] if name in INDEXED else tensors
        others = [value for value in tree_flatten(bound)[0] if isinstance(value, torch.Tensor)]
        others = [value for value in others if not isinstance(value, OnDevice) and value.dim()]
        if ours and others:
            raise RuntimeError(f"{name}: tensors of {DEVICE} and of the CPU, {[tuple(o.shape) for o in others]}")
    target = kwargs.get("device")
    lands = is_device(target) if target is not None else bool(ours)
    if name == "aten::copy_":
        lands = isinstance(args[0], OnDevice)
    if is_device(target):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    with _disable_current_modes():
        held_args, held_kwargs = tree_map(lambda value: getattr(value, "held", value), (args, kwargs))
        results = function(*held_args, **held_kwargs)
    known = {id(value.held): value for value in ours}

    def placed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, OnDevice) or not lands:
            return value
        return known.get(id(value)) if id(value) in known else OnDevice(value)

    return tree_map(placed, results)


@contextlib.contextmanager
def stand_in_device() -> Iterator[None]:
    """The device exists, for all of the process; its tensors are made in the block."""
    _setup_privateuseone_for_python_backend("standin")
    with Constructors(), Operations():
        yield


def refuses_a_mix() -> bool:
    try:
        torch.ones(3, device=DEVICE) + torch.ones(3)
    except RuntimeError as error:
        return "of the CPU" in str(error)
    return False


def main(plan_file: str) -> None:
    from test_devices import rollouts, trained

    plan = json.loads(Path(plan_file).read_text())
    base, data, folder = (Path(plan[name]) for name in ("base", "data", "folder"))
    with stand_in_device():
        results = {"refuses_a_mix": refuses_a_mix(), "rollouts": rollouts(base, data, DEVICE)}
        for name, (stage, flags) in plan["cases"].items():
            results[name] = trained(stage, base, data, folder / name, DEVICE, flags)
    (folder / "device.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
