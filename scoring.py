"""What makes scoring rollouts cheap: a prompt shared by a group is computed once, and images are not encoded again.

Both leave the log-probs as they are: tests/test_scoring.py holds them against one plain forward of each row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel

    from rollouts import Rollout

IMAGES_PER_PASS = 32  # of the vision tower, so that its activations stay small

# ------------------------------------------------------------------------------------------ kept vision features


class KeptFeatures:
    """Stands in for the image processor: gives the kept features of images where their pixels would go.

    features: by `id` of the image, (tokens, hidden). They are laid out as rows of a patch each, (patches, hidden /
    patches per token), so that whatever is cut by `image_grid_thw` stays right.
    """

    def __init__(self, processor: Any, features: dict[int, torch.Tensor]) -> None:
        self.patch_size, self.merge_size = processor.patch_size, processor.merge_size
        self.features = features

    def __call__(self, images: Sequence[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
        grids = [[1, image.height // self.patch_size, image.width // self.patch_size] for image in images]
        tokens = [self.features[id(image)] for image in images]
        per_token = self.merge_size**2
        packed = torch.cat([kept.reshape(len(kept) * per_token, -1) for kept in tokens])
        return {"pixel_values": packed, "image_grid_thw": torch.tensor(grids)}


def kept_features(
    rollouts: Sequence[Rollout], encode: Callable[[list[Image.Image]], list[torch.Tensor]]
) -> dict[int, torch.Tensor]:
    """By `id` of each shown image its features: the rollout's own, or made by `encode` where it has none."""
    found, missing = {}, {}
    for rollout in rollouts:
        if rollout.features:
            found |= {id(image): kept for image, kept in zip(rollout.images, rollout.features, strict=True)}
        else:
            missing |= {id(image): image for image in rollout.images}
    images = list(missing.values())
    for start in range(0, len(images), IMAGES_PER_PASS):
        part = images[start : start + IMAGES_PER_PASS]
        found |= {id(image): kept for image, kept in zip(part, encode(part), strict=True)}
    return found


def accept_features(model: PreTrainedModel) -> None:
    """Let `model` (Qwen2.5-VL) take kept features in place of pixels, and then leave its vision tower alone."""
    model.model.get_image_features = MethodType(_image_features, model.model)


def _image_features(self: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs: Any) -> Any:
    vision = self.config.vision_config
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    if pixel_values.shape[-1] == patch:
        return type(self).get_image_features(self, pixel_values, image_grid_thw, **kwargs)
    per_token = vision.spatial_merge_size**2
    features = pixel_values.reshape(len(pixel_values) // per_token, -1)
    return BaseModelOutputWithPooling(pooler_output=features.split((image_grid_thw.prod(-1) // per_token).tolist()))


# ----------------------------------------------------------------------------------------------- shared prompt


@dataclass(frozen=True)
class PackedRows:
    """Rows of a batch in one sequence, those that share a prompt behind it.

    Each group is `prompt without its last token, then for each of its rows: that last token, the completion`. A token
    sees its own row and the prompt before it; positions are those it has in its own row.

    input_ids, labels: (1, tokens); labels are -100 but for tokens to score. position_ids: (3, 1, tokens).
    segments: what a token sees (see packing.segmented_sdpa): a segment a prompt, a branch a row.
    images: the images that the sequence needs, as indices into the batch's.
    source: (rows, completion) where each completion token lies in the sequence; `is_scored` says which count.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    segments: list[tuple[int, list[torch.Tensor]]]
    images: list[int]
    source: torch.Tensor
    is_scored: torch.Tensor

    def unpack(self, values: torch.Tensor | None) -> torch.Tensor | None:
        """What the model says of each token but the first (1, tokens - 1) -> (rows, completion); else 0."""
        if values is None:
            return None
        every = torch.nn.functional.pad(values, (1, 0))
        return every.flatten()[self.source].masked_fill(~self.is_scored, 0.0)


def pack_rows(
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    completion: int,
    image_spans: Sequence[tuple[int, int, int]],
    unscored: torch.Tensor,
    groups: Sequence[Sequence[int]],
) -> PackedRows:
    """Write the rows of each group, which share a prompt, behind it.

    ids, mask: (rows, seq): prompts left-padded, completions right-padded in the last `completion` columns.
    positions: M-RoPE positions (3, rows, seq).
    image_spans: of each row: its first image, the first behind those of its prompt, and the first behind its last.
    unscored: token ids that are never scored (image tokens, which no model samples).
    groups: the rows that share a prompt (see `group_rows`).
    """
    rows, seq = ids.shape
    start, device = seq - completion, ids.device
    prompts, completions = mask[:, :start].sum(1).tolist(), mask[:, start:].sum(1).tolist()
    columns: list[torch.Tensor] = []  # places in the flattened rows
    segments, images = [], []
    source = torch.zeros(rows, completion, dtype=torch.long)
    at = 0
    for group in groups:
        first, shared = group[0], prompts[group[0]] - 1
        columns.append(torch.arange(start - 1 - shared, start - 1) + first * seq)
        at += shared
        masks = []
        for row in group:
            length = completions[row] + 1
            columns.append(torch.arange(start - 1, start - 1 + length) + row * seq)
            source[row, : length - 1] = torch.arange(at + 1, at + length)
            masks.append(torch.ones(length, shared + length, dtype=torch.bool, device=device).tril(shared))
            at += length
        segments.append((shared, masks))
        images += range(image_spans[first][0], image_spans[first][1])
        images += [image for row in group for image in range(image_spans[row][1], image_spans[row][2])]
    column, source = torch.cat(columns).to(device), source.to(device)
    is_scored = mask[:, start:].bool() & ~torch.isin(ids[:, start:], unscored)
    packed = ids.flatten()[column]
    labels = torch.full_like(packed, -100)
    labels[source[is_scored]] = ids[:, start:][is_scored]
    return PackedRows(
        input_ids=packed[None],
        labels=labels[None],
        position_ids=positions.flatten(1)[:, None, column],
        segments=segments,
        images=images,
        source=source,
        is_scored=is_scored,
    )


def group_rows(
    ids: torch.Tensor,
    mask: torch.Tensor,
    completion: int,
    image_spans: Sequence[tuple[int, int, int]],
    pixels: Sequence[torch.Tensor],
) -> list[list[int]]:
    """Rows with the same prompt, text and images, in order.

    Two pictures may well be asked the same question: then the token ids are equal, and the prompts are not.
    pixels: of each image, its pixel values or kept features.
    """
    starts, seq = (mask.shape[1] - completion - mask[:, :-completion].sum(1)).tolist(), mask.shape[1]
    groups: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)
    for row, text in enumerate(ids[:, : seq - completion].tolist()):
        seen = [pixels[image] for image in range(*image_spans[row][:2])]
        for group in groups[tuple(text[starts[row] :])]:
            others = [pixels[image] for image in range(*image_spans[group[0]][:2])]
            if all(one is other or torch.equal(one, other) for one, other in zip(seen, others, strict=True)):
                group.append(row)
                break
        else:
            groups[tuple(text[starts[row] :])].append([row])
    return [group for same_text in groups.values() for group in same_text]


def image_spans(
    ids: torch.Tensor,
    mask: torch.Tensor,
    completion: int,
    tokens: Sequence[int],
    num_images: Sequence[int],
    image_pad: int,
) -> list[tuple[int, int, int]]:
    """Of each row: its first image, the first behind those of its prompt, and the first behind the last it uses.

    A row whose completion is masked out (too long, with `mask_truncated_completions`) uses the prompt's alone.
    tokens: of each image, in the order of the rows.
    """
    pads = (ids == image_pad) & mask.bool()
    in_prompt, in_row = pads[:, :-completion].sum(1).tolist(), pads.sum(1).tolist()
    spans, first = [], 0
    for row, count in enumerate(num_images):
        ends, seen = [], 0
        for goal in (in_prompt[row], in_row[row]):
            at = ends[-1] if ends else first
            while seen < goal and at < first + count:
                seen += tokens[at]
                at += 1
            ends.append(at)
        spans.append((first, *ends))
        first += count
    return spans
