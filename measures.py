"""Answers -> figures: accuracy with a confidence interval, format, calls, crops, tokens, and the crop gain."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from answer_rules import answer_accuracy
from benchmark_data import Question
from crop_tool import Box, CropContract, ToolCall, resolve_box
from judge import Claim, Judge
from response_format import ParsedResponse, parse_response
from rewards import CALL_FAULTS, Reference, accuracy_reward, call_statistics, format_reward

RESAMPLES, LEVEL = 2000, 0.95
AGREEING = 3  # so many people of TextVQA's ten make an answer fully right


@dataclass(frozen=True)
class Answer:
    """One answer as it was given; all that the figures and the page need, and JSON.

    crops: what calls were answered with, as in `SamplingParams.crops`. sample: number of the answer to its question.
    calls: as the engine ran them, boxes in ORIGINAL pixels. tokens: sampled; crop_tokens: inserted.
    seconds: wall time of the batch over its answers; with batch_size 1 the answer's latency.
    """

    name: str
    crops: str
    sample: int
    text: str
    calls: tuple[ToolCall, ...]
    finish_reason: str
    tokens: int
    crop_tokens: int
    seconds: float
    image_size: tuple[int, int]

    @property
    def key(self) -> tuple[str, str, int]:
        return self.crops, self.name, self.sample

    @property
    def response(self) -> ParsedResponse:
        return parse_response(self.text, self.calls)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "calls": [call.to_json() for call in self.calls]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Answer:
        calls = tuple(ToolCall.from_json(call) for call in values["calls"])
        return cls(**{**values, "calls": calls, "image_size": tuple(values["image_size"])})


@dataclass(frozen=True)
class Measured:
    """An answer, its question, and the figures of `measure`."""

    question: Question
    answer: Answer
    figures: dict[str, float]


def reference_boxes(question: Question, size: tuple[int, int], contract: CropContract) -> tuple[Box, ...]:
    """The annotated regions as a call for them would be cut."""
    regions = (resolve_box(box, size, contract.min_crop_side)[1] for box in question.boxes)
    return tuple(region for region in regions if region is not None)


def agreement(answer: str, answers: Sequence[str]) -> float:
    """VQA accuracy: how far people agree with an answer, 0 to 1.

    The mean over each person left out in turn of min(1, people of the rest who gave this answer / 3). Whether two
    answers are the same is decided by `answer_accuracy`.

    >>> agreement("stop", ["stop"] * 2 + ["halt"] * 8)
    0.6
    """
    same = [answer_accuracy(answer, other) == 1.0 for other in answers]
    shares = [min(1.0, (sum(same) - one) / AGREEING) for one in same]
    return round(sum(shares) / len(shares), 10)


def measure(
    questions: dict[str, Question], answers: Sequence[Answer], contract: CropContract, judge: Judge | None = None
) -> list[Measured]:
    """Each answer's figures; a judge decides where there is one, and the question has one expected answer."""
    references = []
    for answer in answers:
        question = questions[answer.name]
        boxes = reference_boxes(question, answer.image_size, contract)
        references.append(Reference(question.answers[0], boxes, answer.image_size, question.text))
    if judge is not None:
        single = [place for place, answer in enumerate(answers) if len(questions[answer.name].answers) == 1]
        claims = [
            Claim(references[at].question, references[at].answer, answers[at].response.answer_content) for at in single
        ]
        for place, verdict in zip(single, judge.accuracies(claims), strict=True):
            references[place] = replace(references[place], verdict=verdict)
    return [
        Measured(questions[answer.name], answer, _figures(questions[answer.name], answer, reference))
        for answer, reference in zip(answers, references, strict=True)
    ]


def _figures(question: Question, answer: Answer, reference: Reference) -> dict[str, float]:
    response = answer.response
    people = len(question.answers) > 1
    accuracy = agreement(response.answer_content, question.answers) if people else accuracy_reward(response, reference)
    calls = call_statistics(response, reference)
    return {
        "accuracy": accuracy,
        "format": format_reward(response, reference),
        "iou": calls["iou"],
        "calls": calls["calls"],
        "valid": float(sum(call.is_valid for call in answer.calls)),
        "crops": calls["executed"],
        "no_call": calls["no_call"],
        "tokens": float(answer.tokens),
        "crop_tokens": float(answer.crop_tokens),
        "cut_off": float(answer.finish_reason == "length"),
        "seconds": answer.seconds,
    }


# --------------------------------------------------------------------------------------------- rollouts


def rollout_figures(pairs: Sequence[tuple[ParsedResponse, Reference]]) -> dict[str, float]:
    """What training watches of its rollouts; what cannot be said of these is left out.

    crops/invalid, repeated, whole_image, after_answer: shares of the calls. crops/per_rollout: crops shown.
    crops/no_call: share of the rollouts without a call. crops/iou: matched IoU of those with annotated boxes.
    answer/characters: mean length of the answers.
    """
    columns: dict[str, list[float]] = defaultdict(list)
    for response, reference in pairs:
        for name, value in call_statistics(response, reference).items():
            columns[name].append(value)
    calls = sum(columns["calls"])
    figures = {f"crops/{name}": sum(columns[name]) / calls for name in CALL_FAULTS} if calls else {}
    known = [value for value in columns["iou"] if not math.isnan(value)]
    figures |= {"crops/iou": _mean(known)} if known else {}
    return figures | {
        "crops/per_rollout": _mean(columns["executed"]),
        "crops/no_call": _mean(columns["no_call"]),
        "answer/characters": _mean([len(response.answer_content) for response, _ in pairs]),
    }


# ------------------------------------------------------------------------------------------------- sums


def interval(values: Sequence[float], groups: Sequence[str]) -> tuple[float, float] | None:
    """95% confidence interval of the mean of `values`: percentile bootstrap over whole groups.

    Answers to one question are not independent, so questions are drawn, not answers. None with a single group.
    """
    import numpy as np

    places: dict[str, int] = {}
    which = [places.setdefault(group, len(places)) for group in groups]
    if len(places) < 2:
        return None
    sums = np.bincount(which, weights=values)
    counts = np.bincount(which)
    dice = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES):
        drawn = dice.integers(len(places), size=len(places))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def accuracy_interval(values: Sequence[float], groups: Sequence[str]) -> tuple[float, float] | None:
    """95% interval of an accuracy. Where every answer is right, or none is, no resample differs: the exact binomial
    bound (Clopper and Pearson) for that many questions stands in.

    >>> accuracy_interval([1.0] * 20, [str(n) for n in range(20)])
    (0.8316, 1.0)
    """
    bound = round(((1 - LEVEL) / 2) ** (1 / max(1, len(set(groups)))), 4)
    if values and min(values) == 1.0:
        return bound, 1.0
    if values and max(values) == 0.0:
        return 0.0, round(1 - bound, 4)
    return interval(values, groups)


def summarize(measured: Sequence[Measured]) -> dict[str, Any]:
    """The figures of many answers; None where there is nothing to average.

    accuracy: mean over all answers, Avg@k with k answers a question; accuracy_ci: its interval. valid_calls: share of
    the calls whose region exists. iou: matched IoU per annotated box, of the questions that have one. crops, tokens,
    crop_tokens, seconds: means per answer. format, no_call, cut_off: shares of the answers.
    """
    columns: dict[str, list[float]] = defaultdict(list)
    for item in measured:
        for name, value in item.figures.items():
            columns[name].append(value)
    groups = [item.question.group for item in measured]
    known = [value for value in columns["iou"] if not math.isnan(value)]
    calls = sum(columns["calls"])
    return {
        "questions": len({item.question.name for item in measured}),
        "answers": len(measured),
        "accuracy": _mean(columns["accuracy"]),
        "accuracy_ci": accuracy_interval(columns["accuracy"], groups),
        "format": _mean(columns["format"]),
        "valid_calls": sum(columns["valid"]) / calls if calls else None,
        "iou": _mean(known),
        **{name: _mean(columns[name]) for name in ("crops", "no_call", "tokens", "crop_tokens", "cut_off", "seconds")},
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def by_category(
    measured: Sequence[Measured], summary: Callable[[Sequence[Measured]], dict[str, Any]] = summarize
) -> dict[str, dict[str, Any]]:
    """The same figures for each category; empty where there are fewer than two."""
    parts: dict[str, list[Measured]] = defaultdict(list)
    for item in measured:
        parts[item.question.category or "(none)"].append(item)
    return {name: summary(parts[name]) for name in sorted(parts)} if len(parts) > 1 else {}


def crop_gain(real: Sequence[Measured], ablated: Sequence[Measured]) -> dict[str, Any]:
    """What the crops are worth: accuracy with the real ones minus accuracy with `ablated`, over the same questions.

    The interval is of the paired differences, question by question, so it is narrower than those of the two apart.
    """
    means = []
    for side in (real, ablated):
        values: dict[str, list[float]] = defaultdict(list)
        for item in side:
            values[item.question.name].append(item.figures["accuracy"])
        means.append({name: sum(own) / len(own) for name, own in values.items()})
    groups = {item.question.name: item.question.group for item in real}
    shared = [name for name in means[0] if name in means[1]]
    differences = [means[0][name] - means[1][name] for name in shared]
    return {
        "questions": len(shared),
        "gain": _mean(differences),
        "gain_ci": interval(differences, [groups[name] for name in shared]) if shared else None,
    }


# ------------------------------------------------------------------------------------------------ tables

COLUMNS = {
    "format": "format",
    "valid_calls": "valid calls",
    "iou": "IoU",
    "crops": "crops",
    "tokens": "tokens",
    "seconds": "s/answer",
}


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """Figures of every kind of crops, each with its categories, as text; the first row is the header."""
    rows = [["crops shown", "questions", "accuracy", "95%", *COLUMNS.values()]]
    for crops, figures in results["crops"].items():
        rows.append(_row(crops, figures["all"]))
        rows += [_row(f"  {name}", part) for name, part in figures["categories"].items()]
    return rows


def _row(name: str, figures: dict[str, Any]) -> list[str]:
    digits = {"crops": 2, "tokens": 0, "seconds": 3, "iou": 2}
    cells = [_number(figures[key], digits.get(key, 3)) for key in COLUMNS]
    return [name, str(figures["questions"]), _number(figures["accuracy"]), _interval(figures["accuracy_ci"]), *cells]


def gain_rows(results: dict[str, Any]) -> list[list[str]]:
    """The crop gain against each ablation, as text."""
    rows = []
    for crops, figures in results["crop_gain"].items():
        for name, part in {"": figures["all"], **figures["categories"]}.items():
            label = f"  {name}" if name else f"crop gain over {crops}"
            rows.append([label, _number(part["gain"], 3, "+"), _interval(part["gain_ci"])])
    return rows


def _number(value: float | None, digits: int = 3, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def _interval(bounds: tuple[float, float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns, the first one to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
