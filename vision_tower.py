"""Where transformers' vision tower is slow on a GPU, the same work in fewer and larger operations."""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WINDOWED_SDPA = "windowed_flash_sdpa"  # only a name with "flash" in it gets all windows at once
Windows = tuple["torch.Tensor", "torch.Tensor", list[tuple[int, int]]]


def speed_up(model: PreTrainedModel) -> None:
    """Give the vision tower of a Qwen2.5-VL that uses sdpa its windows at once, and keep the model from cuDNN.

    transformers hands the windows of 8 x 8 patches to sdpa one by one: some forty calls an image and layer, which on a
    GPU cost more than what they compute, and a wait for the GPU in each layer.

    cuDNN's attention, which sdpa takes before the flash kernels on Hopper and Blackwell, builds a plan for every shape
    that it meets, in up to a second; hardly two of our rows have one shape. Its convolution has taken 50,000 times as
    long for the patch embedding as the matrix product that this is takes (transformers, issue 45750).
    """
    import torch
    from transformers import AttentionInterface

    AttentionInterface.register(WINDOWED_SDPA, windowed_sdpa)
    visual = model.model.visual
    if visual.config._attn_implementation == "sdpa":
        visual.config._attn_implementation = WINDOWED_SDPA
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)
        visual.patch_embed.proj.forward = MethodType(_embed, visual.patch_embed.proj)


def _embed(convolution: torch.nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    import torch

    flat = torch.nn.functional.linear(patches.flatten(1), convolution.weight.flatten(1), convolution.bias)
    return flat[:, :, None, None, None]


def windowed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, patches, head size), as key and value
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    cu_seq_lens_q: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each window to itself, all windows of one length at once; returns (1, patches, heads, head size).

    cu_seq_lens_q: where the windows begin, and where the last one ends.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    order, back, groups = _windows(cu_seq_lens_q)
    sizes = [count * length for count, length in groups]
    parts = [states[0].index_select(1, order).split(sizes, dim=1) for states in (query, key, value)]
    outputs = []
    for group, states in zip(groups, zip(*parts, strict=True), strict=True):
        windows = [part.unflatten(1, group).transpose(0, 1) for part in states]
        output, _ = sdpa_attention_forward(module, *windows, None, dropout=dropout, scaling=scaling, is_causal=False)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).index_select(0, back)[None], None


@cache
def _known() -> Any:
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


def _windows(cu_seqlens: torch.Tensor) -> Windows:
    """The patches in the order of the lengths of their windows, the way back, and of each length how many it has.

    Made once for all layers: they get the same tensor.
    """
    import numpy as np
    import torch

    if cu_seqlens not in _known():
        ends = np.array(cu_seqlens.tolist())
        lengths = np.diff(ends)
        kinds, counts = np.unique(lengths, return_counts=True)
        by_length = np.argsort(lengths, kind="stable")
        order = np.concatenate([np.arange(ends[window], ends[window + 1]) for window in by_length])
        groups = list(zip(counts.tolist(), kinds.tolist(), strict=True))
        places = [torch.from_numpy(order), torch.from_numpy(np.argsort(order))]
        _known()[cu_seqlens] = (*(index.to(cu_seqlens.device) for index in places), groups)
    return _known()[cu_seqlens]
