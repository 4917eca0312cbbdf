"""Scoring with a shared prompt and kept features gives what one plain forward of each row gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from trl.trainer.utils import add_fused_lm_head

from conversation import IMAGE_PAD, IMAGE_TOKENS
from generation import CropEngine, SamplingParams
from packing import accept_segments
from scoring import KeptFeatures, accept_features, group_rows, image_spans, kept_features, pack_rows

SIZES = [(448, 448), (600, 300)]
CALL = "<tool_call>[{x}, 3, 40, {y}]</tool_call>"


@pytest.fixture
def batch(trainable_model, renderer):
    """Nine rollouts of three prompts, with zero to two crops, padded as TRL pads them.

    The first and the last prompt ask the same of two pictures: their token ids are the same.
    """
    images = [Image.effect_noise(size, 90).convert("RGB") for size in (*SIZES, SIZES[0])]
    questions = ["What is here?", "What is in the second picture?", "What is here?"]
    prompts = [renderer.prompt(question, image) for question, image in zip(questions, images, strict=True)]
    assert prompts[0].ids == prompts[2].ids
    scripts = [renderer.text_ids(CALL.format(x=row, y=30 + row) * (row % 3)) for row in range(9)]
    engine = CropEngine(trainable_model, renderer)
    rollouts = engine.generate(prompts, SamplingParams(50, seed=3), [4, 2, 3], forced=scripts, keep_features=True)
    assert sorted(len(rollout.images) for rollout in rollouts) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    start = max(len(rollout.prompt_ids) for rollout in rollouts)
    completion = max(len(rollout.completion_ids) for rollout in rollouts)
    ids = torch.full((9, start + completion), renderer.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, rollout in enumerate(rollouts):
        written = slice(start - len(rollout.prompt_ids), start + len(rollout.completion_ids))
        ids[row, written] = torch.tensor(rollout.prompt_ids + rollout.completion_ids)
        mask[row, written] = 1
    return rollouts, ids, mask, completion


def pixels_of(renderer, images):
    return dict(renderer.processor.image_processor(images=list(images), return_tensors="pt"))


def tokens_of(grids: torch.Tensor) -> list[int]:
    return (grids.prod(-1) // 4).tolist()


def packed_scores(model, renderer, batch, most_rows=9, pixels=None):
    """Log-probs and entropies (rows, completion) by way of groups of at most `most_rows` rows behind a prompt."""
    accept_segments(model)
    rollouts, ids, mask, completion = batch
    pixels = pixels or pixels_of(renderer, [image for rollout in rollouts for image in rollout.images])
    pad, grids = renderer.ids[IMAGE_PAD], pixels["image_grid_thw"]
    counts = [len(rollout.images) for rollout in rollouts]
    spans = image_spans(ids, mask, completion, tokens_of(grids), counts, pad)
    positions, _ = model.model.get_rope_index(
        ids, mm_token_type_ids=(ids == pad).int(), image_grid_thw=grids, attention_mask=mask
    )
    unscored = torch.tensor([renderer.ids[token] for token in IMAGE_TOKENS])
    patches = pixels["pixel_values"].split(grids.prod(-1).tolist())
    groups = group_rows(ids, mask, completion, spans, patches)
    groups = [group[at : at + most_rows] for group in groups for at in range(0, len(group), most_rows)]
    packed = pack_rows(ids, mask, positions, completion, spans, unscored, groups)
    output = model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        segments=packed.segments,
        pixel_values=torch.cat([patches[image] for image in packed.images]),
        image_grid_thw=grids[packed.images],
        labels=packed.labels,
        fused_lm_head=True,
    )
    return packed, packed.unpack(output.log_probs), packed.unpack(output.entropy)


def plain_scores(model, renderer, rollout):
    """Log-probs and entropies of a rollout's completion by one plain forward of the whole row."""
    pixels = pixels_of(renderer, rollout.images)
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    pads = (ids == renderer.ids[IMAGE_PAD]).int()
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=pads, **pixels)
    logits = output.logits[0, len(rollout.prompt_ids) - 1 : -1]
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("most_rows", [1, 2, 9])
def test_a_shared_prompt_scores_each_token_as_a_plain_forward_of_its_row(trainable_model, renderer, batch, most_rows):
    add_fused_lm_head(trainable_model, outputs=("log_probs", "entropy"))
    packed, logprobs, entropies = packed_scores(trainable_model, renderer, batch, most_rows)
    groups = {1: [1] * 9, 2: [2, 2, 2, 1, 2], 9: [4, 3, 2]}[most_rows]
    assert [len(masks) for _, masks in packed.segments] == groups
    lengths = [len(rollout.completion_ids) + 1 for rollout in batch[0]]
    assert packed.input_ids.shape == (1, sum(lengths) + sum(shared for shared, _ in packed.segments))
    for row, rollout in enumerate(batch[0]):
        expected, entropy = plain_scores(trainable_model, renderer, rollout)
        length = len(rollout.completion_ids)
        own = torch.tensor(rollout.sampled_mask).bool()
        assert torch.allclose(logprobs[row, :length][own], expected[own], atol=1e-4)
        assert torch.allclose(entropies[row, :length][own], entropy[own], atol=1e-4)
        assert torch.allclose(logprobs[row, :length][own], torch.tensor(rollout.logprobs)[own], atol=1e-4)
        assert not logprobs[row, length:].any()


def test_gradients_behind_a_shared_prompt_equal_those_of_plain_forwards(trainable_model, renderer, batch):
    add_fused_lm_head(trainable_model, outputs=("log_probs", "entropy"))
    weights = dict(trainable_model.model.language_model.named_parameters())
    packed_scores(trainable_model, renderer, batch)[1].sum().backward()
    packed = {name: value.grad.clone() for name, value in weights.items()}
    trainable_model.zero_grad()
    for rollout in batch[0]:
        (plain_scores(trainable_model, renderer, rollout)[0] * torch.tensor(rollout.sampled_mask)).sum().backward()
    for name, value in weights.items():
        scale = value.grad.abs().max().clamp(min=1e-6)
        assert (packed[name] - value.grad).abs().max() / scale < 1e-3, name


def test_kept_features_score_exactly_as_pixels_do_and_leave_the_tower_alone(trainable_model, renderer, batch):
    add_fused_lm_head(trainable_model, outputs=("log_probs", "entropy"))
    accept_features(trainable_model)
    images = [image for rollout in batch[0] for image in rollout.images]
    pixels = pixels_of(renderer, images)
    passes = []
    handle = trainable_model.model.visual.register_forward_hook(lambda *_: passes.append(1))
    with_pixels = packed_scores(trainable_model, renderer, batch, pixels=pixels)[1]
    engine = CropEngine(trainable_model, renderer)
    features = kept_features(batch[0], None)  # nothing is to be encoded: the rollouts bring all
    server = KeptFeatures(renderer.processor.image_processor, features)
    without = [replace(rollout, features=()) for rollout in batch[0]]
    with torch.no_grad():
        encoded = kept_features(without, engine.decoder.encode)
    passes.clear()
    assert encoded.keys() == features.keys()
    assert all(torch.allclose(encoded[key], features[key], atol=1e-5) for key in features)
    served = server(images=images, return_tensors="pt")
    assert torch.equal(served["image_grid_thw"], pixels["image_grid_thw"])
    assert len(served["pixel_values"]) == len(pixels["pixel_values"]), "a row a patch, as TRL cuts them"
    with_features = packed_scores(trainable_model, renderer, batch, pixels=served)[1]
    handle.remove()
    assert not passes, "the tower ran again"
    assert torch.allclose(with_features, with_pixels, atol=1e-5)


def test_a_row_that_is_masked_out_leaves_the_others_right(renderer, batch):
    """`mask_truncated_completions` zeroes a row's mask; its crops must not shift the images of the next rows."""
    rollouts, ids, mask, completion = batch
    masked = mask.clone()
    row = next(number for number, rollout in enumerate(rollouts) if len(rollout.images) == 3)
    masked[row, -completion:] = 0
    pixels = pixels_of(renderer, [image for rollout in rollouts for image in rollout.images])
    counts = [len(rollout.images) for rollout in rollouts]
    spans = image_spans(ids, masked, completion, tokens_of(pixels["image_grid_thw"]), counts, renderer.ids[IMAGE_PAD])
    assert spans[row][1] == spans[row][2]
    first = [sum(counts[:number]) for number in range(9)]
    assert [span[0] for span in spans] == first
    others = [number for number in range(9) if number != row]
    assert [spans[number][2] for number in others] == [first[number] + counts[number] for number in others]
