"""The crop loop as it is written around `model.generate`: everything is prefilled again after each crop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from common import Prompt, Renderer
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from conversation import EncodedExample, model_inputs
from crop_tool import ToolCall, run_call


class Forced(LogitsProcessor):
    """Leaves one token possible: the next of each row's script; keeps the log-probs that the model gave to them."""

    def __init__(self, scripts: Sequence[Sequence[int]], start: int, keep: bool) -> None:
        self.scripts, self.start, self.keep = scripts, start, keep
        self.logprobs: list[list[float]] = [[] for _ in scripts]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.start
        tokens = [script[step] if step < len(script) else 0 for script in self.scripts]
        places = torch.tensor(tokens, device=scores.device)[:, None]
        if self.keep:
            given = scores.float().log_softmax(-1).gather(1, places).squeeze(1).tolist()
            for row, value in enumerate(given):
                self.logprobs[row].append(value)
        return torch.full_like(scores, -torch.inf).scatter(1, places, 0.0)


@dataclass
class Response:
    """One row on its way."""

    prompt: Prompt
    script: list[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)

    @property
    def completion_ids(self) -> list[int]:
        return self.ids

    def next_segment(self, close: int) -> list[int]:
        """Tokens up to the next call, or to the end."""
        end = self.script.index(close) + 1 if close in self.script else len(self.script)
        return self.script[:end]


def generate(
    model: PreTrainedModel,
    renderer: Renderer,
    prompts: Sequence[Prompt],
    scripts: Sequence,
    keep_logprobs: bool = False,
) -> list[Response]:
    """All rows side by side, `model.generate` up to each row's next crop call, then all again with the crops."""
    rows = [Response(p, list(s), images=list(p.images)) for p, s in zip(prompts, scripts, strict=True)]
    while running := [row for row in rows if row.script]:
        _segment(model, renderer, running, keep_logprobs)
    return rows


def _segment(model: PreTrainedModel, renderer: Renderer, rows: list[Response], keep_logprobs: bool) -> None:
    close, end = renderer.ids["</tool_call>"], renderer.ids["<|im_end|>"]
    segments = [row.next_segment(close) for row in rows]
    contexts = [row.prompt.ids + row.ids for row in rows]
    width = max(map(len, contexts))
    encoded = [EncodedExample(ids, ids, tuple(row.images)) for ids, row in zip(contexts, rows, strict=True)]
    inputs = model_inputs(encoded, renderer)
    inputs.pop("labels")
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):  # generate wants its pads on the left
        inputs[name] = torch.stack(
            [row.roll(width - len(ids)) for row, ids in zip(inputs[name], contexts, strict=True)]
        )
    forced = Forced(segments, width, keep_logprobs)
    output = model.generate(
        **{name: value.to(model.device) for name, value in inputs.items()},
        max_new_tokens=max(map(len, segments)),
        do_sample=True,
        top_k=0,
        eos_token_id=[close, end],
        logits_processor=LogitsProcessorList([forced]),
    )
    for number, (row, segment) in enumerate(zip(rows, segments, strict=True)):
        written = output[number, width : width + len(segment)].tolist()
        row.ids += written
        row.logprobs += forced.logprobs[number][: len(segment)]
        row.script = row.script[len(segment) :]
        if written[-1] == close:
            body = renderer.tokenizer.decode(written[_last(written, renderer) + 1 : -1])
            _, crop = run_call(ToolCall(body, 0, "parsed"), row.prompt.original, renderer.contract)
            row.ids += (block := renderer.image_block(crop.size))
            row.logprobs += [0.0] * len(block) if keep_logprobs else []
            row.images.append(crop)


def _last(ids: list[int], renderer: Renderer) -> int:
    opening = renderer.ids["<tool_call>"]
    return len(ids) - 1 - ids[::-1].index(opening)


def check_equal(rollouts: Sequence, others: Sequence, device: str) -> None:
    """The engine's rollouts are those of another side: same ids, same images, same log-probs of the forced tokens.

    Raises:
        AssertionError: naming the row.
    """
    tolerance = 1e-3 if device == "cpu" else 0.2  # bfloat16 on a GPU
    for number, (ours, theirs) in enumerate(zip(rollouts, others, strict=True)):
        assert ours.completion_ids == theirs.completion_ids, f"row {number}: the ids differ"
        assert [i.tobytes() for i in ours.images] == [i.tobytes() for i in theirs.images], (
            f"row {number}: images differ"
        )
        own = [abs(a - b) for a, b, m in zip(ours.logprobs, theirs.logprobs, ours.sampled_mask, strict=True) if m]
        assert max(own) < tolerance, f"row {number}: log-probs differ by {max(own):.2g}"
