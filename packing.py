"""Padding-free batches: the rows of a batch one behind the other in one sequence, each attending to itself alone.

No position is spent on padding, attention does no work for pairs that do not see each other, and in SFT the
language-model head scores the labelled positions only. Rollouts may follow a prompt that they share (scoring.py).
Equal to the padded batch up to rounding (tests/test_packing.py, tests/test_scoring.py).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from config import SettingsError
from conversation import IGNORED

SEGMENTED_SDPA = "segmented_sdpa"


def segmented_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, tokens, head size), as key and value but for their number of heads
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segments: list[tuple[int, list[torch.Tensor]]] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment; without `segments` plain sdpa.

    segments: of each its number of tokens, and the masks of the branches that follow it: (tokens of the branch, tokens
    of the segment and the branch), True where a query sees a key. A branch sees its segment and itself.

    One mask over the whole sequence would cost the square of its length, and rule out the fastest kernels.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = [length for segment, masks in segments for length in (segment, *map(len, masks))]
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = []
    for _, masks in segments:
        own_query, *seen = next(parts)
        outputs.append(sdpa_attention_forward(module, own_query, *seen, None, **kwargs)[0])
        for mask in masks:
            own_query, *own = next(parts)
            both = [torch.cat(states, dim=2) for states in zip(seen, own, strict=True)]
            outputs.append(sdpa_attention_forward(module, own_query, *both, mask[None, None], **kwargs)[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(SEGMENTED_SDPA, segmented_sdpa)
AttentionMaskInterface.register(SEGMENTED_SDPA, sdpa_mask)


def accept_segments(model: PreTrainedModel) -> None:
    """Let the language model of a Qwen2.5-VL that uses sdpa take `segments` as well."""
    model.config.get_text_config()._attn_implementation = SEGMENTED_SDPA


class Packer:
    """Turns the collator's padded batches into packed ones for a Qwen2.5-VL (not wrapped by PEFT).

    The model keeps taking ordinary inputs too.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.vlm = model.model
        text = self.vlm.language_model.config
        if text.use_sliding_window:
            raise SettingsError("padding_free was given, but the model uses sliding windows: leave --padding_free off")
        self.flash = text._attn_implementation.startswith("flash_attention")
        if not self.flash:
            accept_segments(model)
        self.vlm.register_forward_hook(_keep_scored, with_kwargs=True)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The same rows as one sequence (1, tokens); `shift_labels` (1, scored) for the `scored` positions."""
        batch = dict(batch)
        ids, mask, labels = (batch.pop(name) for name in ("input_ids", "attention_mask", "labels"))
        positions, _ = self.vlm.get_rope_index(
            ids, batch.pop("mm_token_type_ids"), batch["image_grid_thw"], attention_mask=mask
        )  # (3, rows, seq)
        kept, lengths = mask.bool(), mask.sum(1).tolist()
        following = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)[kept]
        scored = (following != IGNORED).nonzero().flatten()
        if len(scored) == 0:  # the loss must hang on the model for its backward pass
            scored = scored.new_zeros(1)
        positions = positions[:, kept]
        if self.flash:  # finds the segments by where the text positions restart
            text = torch.cat([torch.arange(length, device=ids.device) for length in lengths])
            positions = torch.cat([text[None], positions])
        else:
            batch["segments"] = [(length, []) for length in lengths]
        return batch | {
            "input_ids": ids[kept][None],
            "position_ids": positions[:, None],
            "labels": labels[kept][None],
            "shift_labels": following[scored][None],
            "scored": scored,
        }


def _keep_scored(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Hand on the hidden states of the scored positions alone: what follows is the language-model head."""
    if "scored" in kwargs:
        output.last_hidden_state = output.last_hidden_state[:, kwargs["scored"]]
    return output
