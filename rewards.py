"""A finished response and its boxes -> numbers; nothing here knows a model or a token.

A part of a reward is any function `(response, reference) -> float`; a preset is a tuple of weighted parts, each
logged by itself. The examples below share these two (the crop shows the right half of the bird):

>>> from response_format import parse_response
>>> calls = (ToolCall("[50, 0, 100, 100]", 8, "exact", Box(50, 0, 100, 100)),)
>>> text = "<think>\\n<tool_call>[50, 0, 100, 100]</tool_call>I see a bird.\\n</think>\\n<answer>a bird</answer>"
>>> response = parse_response(text, calls)
>>> reference = Reference("bird", (Box(0, 0, 100, 100),), image_size=(400, 300))

Your own reward works like the built-in ones:

>>> def brief(response, reference):
...     return float(len(response.answer_content) < 20)
>>> scores = score(response, reference, (RewardPart("accuracy", accuracy_reward), RewardPart("brief", brief, 0.5)))
>>> scores
{'accuracy': 1.0, 'brief': 1.0}
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from answer_rules import answer_accuracy
from crop_tool import CALL_PATTERN, Box, ToolCall
from response_format import ParsedResponse

CORRECT_AT = 0.8  # where a paper says "the answer is right": exact kinds give 1 or 0, a slip of the pen is forgiven
REPEATED_IOU, WHOLE_IMAGE_SHARE = 0.9, 0.9
CALL_FAULTS = ("invalid", "repeated", "whole_image", "after_answer")  # of `call_statistics`, those to watch


@dataclass(frozen=True)
class Reference:
    """What a response is held against.

    answer: the expected answer.
    boxes: annotated regions in pixels of the ORIGINAL image, as `crop_tool.resolve_box` makes them (a raw
        annotation smaller than a crop can be would keep the right call from an IoU of 1); may be empty.
    image_size: (width, height) of the original image.
    question: what was asked; only a judge reads it.
    verdict: the accuracy that a judge gave to the response, 0 to 1; None: the rules decide.
    """

    answer: str
    boxes: tuple[Box, ...]
    image_size: tuple[int, int]
    question: str = ""
    verdict: float | None = None


@dataclass(frozen=True)
class RewardPart:
    """One summand of a reward: `weight * function(response, reference)`, logged under `name`."""

    name: str
    function: Callable[[ParsedResponse, Reference], float]
    weight: float = 1.0


# ---------------------------------------------------------------------------------------- parts: the answer


def accuracy_reward(response: ParsedResponse, reference: Reference) -> float:
    """Accuracy of the answer, 0 to 1: a judge's verdict where there is one, else by rules; see `answer_accuracy`.

    >>> accuracy_reward(response, reference)
    1.0
    """
    if reference.verdict is not None:
        return reference.verdict
    return answer_accuracy(response.answer_content, reference.answer)


def correctness_reward(response: ParsedResponse, reference: Reference) -> float:
    """1 for a right answer, else 0 (the accuracy of VLM-R3 and DeepEyes, who ask a judge): accuracy >= 0.8.

    >>> correctness_reward(response, reference)
    1.0
    """
    return float(accuracy_reward(response, reference) >= CORRECT_AT)


def format_reward(response: ParsedResponse, reference: Reference) -> float:
    """1 for one non-empty think part and then one non-empty answer part, else 0 (VLM-R3, section R-GRPO).

    >>> format_reward(response, reference), format_reward(parse_response("a bird"), reference)
    (1.0, 0.0)
    """
    return float(response.is_well_formed and bool(response.think_content) and bool(response.answer_content))


def format_penalty(response: ParsedResponse, reference: Reference) -> float:
    """0 for the right format, -1 for a broken one (DeepEyes).

    >>> format_penalty(response, reference), format_penalty(parse_response("a bird"), reference)
    (0.0, -1.0)
    """
    return format_reward(response, reference) - 1.0


def length_reward(response: ParsedResponse, reference: Reference) -> float:
    """Characters of reasoning without the calls, 0 to 1 at 250 (VLM-R3: 0.001 for each, up to 0.25).

    >>> length_reward(response, reference)  # "I see a bird."
    0.052
    """
    characters = sum(len(segment.strip()) for segment in _segments(response.think_content))
    return min(1.0, characters / 250)


def segment_length_reward(response: ParsedResponse, reference: Reference) -> float:
    """Characters of the shortest stretch of reasoning, 0 to 1 at 10 (VLM-R3's code: 0.01 for each, up to 0.10).

    Stretches are what calls leave before the answer; an empty one between two calls is passed over, one at
    either end is not.

    >>> segment_length_reward(response, reference)  # it opens with a call
    0.0
    """
    reasoning = re.sub(r"</?think>", "", response.text[: response.answer_start])
    first, *middle = (len(" ".join(segment.split())) for segment in _segments(reasoning))
    inner, last = middle[:-1], middle[-1:]
    return min(1.0, min([first, *filter(None, inner), *last]) / 10)


def _segments(text: str) -> list[str]:
    return CALL_PATTERN.split(text)[::2]  # every second item is the inside of a call


# ---------------------------------------------------------------------------------------- parts: the region


def region_validity_reward(response: ParsedResponse, reference: Reference) -> float:
    """Share of the calls whose region exists, 0 to 1; 0 without calls.

    >>> region_validity_reward(response, reference)
    1.0
    """
    calls = response.tool_calls
    return sum(call.is_valid for call in calls) / len(calls) if calls else 0.0


def grounding_reward(response: ParsedResponse, reference: Reference) -> float:
    """Overlap of the calls with the annotated boxes, 0 to 1: total IoU of the best one-to-one matching,
    divided by the number of calls or of boxes, whichever is larger.

    Only crops that were shown before the answer can match, but every call counts in the divisor. So of several
    guesses that are equally good, one is worth as much as all together, and any useless call costs. Without
    annotated boxes it is 0 for every response.

    >>> grounding_reward(response, reference)
    0.5
    """
    if not response.tool_calls or not reference.boxes:
        return 0.0
    return _matched_iou(response, reference) / max(len(response.tool_calls), len(reference.boxes))


def crop_use_reward(response: ParsedResponse, reference: Reference) -> float:
    """Share of useful calls, 0 to 1; 0 without calls, and a useless one can only lower it.

    Useless are calls without a crop, after the answer began, of the whole image (90% of its area), and those
    that repeat an earlier crop (IoU of 0.9).

    >>> crop_use_reward(response, reference)
    1.0
    """
    verdicts = _verdicts(response, reference)
    return verdicts.count("useful") / len(verdicts) if verdicts else 0.0


def region_if_correct_reward(response: ParsedResponse, reference: Reference) -> float:
    """1 if a call is valid and the answer right, else 0 (VLM-R3: 0.5 for each valid box up to 0.5, times [acc = 1]).

    >>> region_if_correct_reward(response, reference)
    1.0
    """
    return float(any(call.is_valid for call in response.tool_calls)) * correctness_reward(response, reference)


def parsed_region_if_correct_reward(response: ParsedResponse, reference: Reference) -> float:
    """1 if there are calls, all of them parse, and the answer is right, else 0 (VLM-R3's code; bounds unchecked).

    >>> parsed_region_if_correct_reward(response, reference)
    1.0
    """
    calls = response.tool_calls
    parsed = bool(calls) and all(call.outcome != "malformed" for call in calls)
    return float(parsed) * correctness_reward(response, reference)


def crop_if_correct_reward(response: ParsedResponse, reference: Reference) -> float:
    """1 if a crop was shown before the answer and the answer is right, else 0 (DeepEyes).

    >>> crop_if_correct_reward(response, reference)
    1.0
    """
    return float(bool(_crops_before_answer(response))) * correctness_reward(response, reference)


def call_statistics(response: ParsedResponse, reference: Reference) -> dict[str, float]:
    """Counts to watch in training, for one response; mean over responses tells how often the tool is abused.

    calls: all; executed: crops shown; then each call that is not useful under the first reason that applies:
    invalid (no region, or never held against an image), over_limit, after_answer, whole_image, repeated.
    no_call: 1 without calls. iou: matched IoU per annotated box (surplus calls cost nothing here), nan without.

    >>> call_statistics(response, reference)["iou"]
    0.5
    """
    counts = Counter(_verdicts(response, reference))
    boxes = len(reference.boxes)
    return {
        "calls": float(len(response.tool_calls)),
        "executed": float(sum(call.is_executed for call in response.tool_calls)),
        **{name: float(counts[name]) for name in ("invalid", "over_limit", "after_answer", "whole_image", "repeated")},
        "no_call": float(not response.tool_calls),
        "iou": _matched_iou(response, reference) / boxes if boxes else math.nan,
    }


def _crops_before_answer(response: ParsedResponse) -> list[Box]:
    return [call.box for call in response.tool_calls if call.is_executed and call.start < response.answer_start]


def _verdicts(response: ParsedResponse, reference: Reference) -> list[str]:
    """For each call `useful`, or the first reason why it is not."""
    earlier: list[Box] = []
    verdicts = []
    for call in response.tool_calls:
        verdicts.append(_verdict(call, earlier, response.answer_start, reference.image_size))
        if verdicts[-1] == "useful":
            earlier.append(call.box)
    return verdicts


def _verdict(call: ToolCall, earlier: list[Box], answer_start: int, image_size: tuple[int, int]) -> str:
    if not call.is_executed:
        return "over_limit" if call.is_valid else "invalid"
    if call.start >= answer_start:
        return "after_answer"
    if call.box.area >= WHOLE_IMAGE_SHARE * image_size[0] * image_size[1]:
        return "whole_image"
    return "repeated" if any(call.box.iou(box) >= REPEATED_IOU for box in earlier) else "useful"


def _matched_iou(response: ParsedResponse, reference: Reference) -> float:
    rows, columns = sorted((_crops_before_answer(response), reference.boxes), key=len)
    return _largest_assignment([[row.iou(column) for column in columns] for row in rows])


def _largest_assignment(gains: list[list[float]]) -> float:
    """Largest sum of gains with each row and each column used at most once, for no more rows than columns.

    The Hungarian method: rows are placed one by one, each along the cheapest path of re-placements, where prices
    keep every reduced cost at zero or above. Exact, rows^2 * columns steps.
    """
    columns = len(gains[0]) if gains else 0
    row_price, column_price = [max(row) for row in gains], [0.0] * columns
    owner: list[int | None] = [None] * columns
    for start in range(len(gains)):
        distance, came_from = [math.inf] * columns, [start] * columns
        parent: list[int | None] = [None] * columns
        settled: dict[int, float] = {}
        row, reached, last = start, 0.0, None
        while row is not None:
            for column in range(columns):
                cost = reached + row_price[row] + column_price[column] - gains[row][column]
                if column not in settled and cost < distance[column]:
                    distance[column], came_from[column], parent[column] = cost, row, last
            last = min((column for column in range(columns) if column not in settled), key=distance.__getitem__)
            reached = settled[last] = distance[last]
            row = owner[last]
        row_price[start] -= reached
        for column, when in settled.items():
            if owner[column] is not None:
                row_price[owner[column]] -= reached - when
            column_price[column] += reached - when
        while last is not None:
            owner[last], last = came_from[last], parent[last]
    return sum(gains[row][column] for column, row in enumerate(owner) if row is not None)


# ------------------------------------------------------------------------------------------------ presets


def _balanced(global_weight: float, region_weight: float) -> tuple[RewardPart, ...]:
    return (
        RewardPart("accuracy", accuracy_reward, global_weight),
        RewardPart("format", format_reward, 0.2 * global_weight),
        RewardPart("grounding", grounding_reward, region_weight),
        RewardPart("crop_use", crop_use_reward, 0.1 * region_weight),
    )


# Each part lies in 0 to 1 (DeepEyes' format in -1 to 0), so the weights are the sizes that the papers give.
PRESETS: dict[str, tuple[RewardPart, ...]] = {
    "balanced": _balanced(1.0, 1.0),
    # VLM-R3, arXiv 2505.16192: r_acc + r_format + r_length + r_region * [r_acc = 1]
    "vlm_r3_paper": (
        RewardPart("accuracy", correctness_reward, 1.0),
        RewardPart("format", format_reward, 1.0),
        RewardPart("length", length_reward, 0.25),
        RewardPart("region", region_if_correct_reward, 0.5),
    ),
    # Its released code, which asks of the format only that the response ends with an answer.
    "vlm_r3_code": (
        RewardPart("accuracy", correctness_reward, 1.0),
        RewardPart("format", format_reward, 0.5),
        RewardPart("length", segment_length_reward, 0.10),
        RewardPart("region", parsed_region_if_correct_reward, 0.5),
    ),
    # DeepEyes, arXiv 2505.14362: 0.8 acc + 0.2 format + 1.2 [tool used and acc]
    "deepeyes": (
        RewardPart("accuracy", correctness_reward, 0.8),
        RewardPart("format", format_penalty, 0.2),
        RewardPart("crop_use", crop_if_correct_reward, 1.2),
    ),
}


def reward_parts(
    preset: str = "balanced", global_weight: float = 1.0, region_weight: float = 1.0
) -> tuple[RewardPart, ...]:
    """The parts of a preset; the weights scale the global (answer, format) and regional part of `balanced`.

    >>> [(part.name, part.weight) for part in reward_parts("balanced", region_weight=2.0)]
    [('accuracy', 1.0), ('format', 0.2), ('grounding', 2.0), ('crop_use', 0.2)]

    Raises:
        ValueError: for an unknown preset, or weights for a preset that has its paper's own.
    """
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no reward preset {preset!r}; did you mean {near!r}? All: {', '.join(PRESETS)}")
    if preset == "balanced":
        return _balanced(global_weight, region_weight)
    if (global_weight, region_weight) != (1.0, 1.0):
        raise ValueError(
            f"the reward preset {preset!r} has its paper's weights, so global_weight={global_weight} and "
            f"region_weight={region_weight} would not be read: leave them at 1.0, or use 'balanced'"
        )
    return PRESETS[preset]


def score(response: ParsedResponse, reference: Reference, parts: tuple[RewardPart, ...]) -> dict[str, float]:
    """Each part's unweighted value by its name.

    >>> score(response, reference, reward_parts("balanced"))
    {'accuracy': 1.0, 'format': 1.0, 'grounding': 0.5, 'crop_use': 1.0}
    """
    return {part.name: float(part.function(response, reference)) for part in parts}


def total(scores: dict[str, float], parts: tuple[RewardPart, ...]) -> float:
    """The reward: the weighted sum of `score`'s values.

    >>> parts = reward_parts("balanced")
    >>> round(total(score(response, reference, parts), parts), 3)
    1.8
    """
    return sum(part.weight * scores[part.name] for part in parts)
