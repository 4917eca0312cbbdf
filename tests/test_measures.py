"""Figures of answers: each against a hand-made case, the interval against what it promises."""

from __future__ import annotations

import doctest
import json
import math
import random

import pytest
from judge_server import knowing
from PIL import Image

import measures
from benchmark_data import Question
from config import JudgeConfig
from crop_tool import Box, CropContract, ToolCall
from judge import Judge
from measures import (
    Answer,
    agreement,
    as_text,
    by_category,
    crop_gain,
    interval,
    measure,
    rollout_figures,
    summarize,
)
from rewards import Reference

CONTRACT = CropContract()


def question(name: str, *answers: str, **fields) -> Question:
    return Question(
        name, f"{name}?", answers or ("cat",), lambda: Image.new("RGB", (400, 300)), **{"group": name, **fields}
    )


def answer(name: str, said: str, calls: tuple[ToolCall, ...] = (), **fields) -> Answer:
    text = (
        f"<think>look{''.join(f'<tool_call>{call.text}</tool_call>' for call in calls)}</think><answer>{said}</answer>"
    )
    values = {"crops": "real", "sample": 0, "finish_reason": "stop", "tokens": 20, "crop_tokens": 5, "seconds": 0.5}
    return Answer(name=name, text=text, calls=calls, image_size=(400, 300), **(values | fields))


def call(outcome: str = "exact", box: Box | None = None) -> ToolCall:
    return ToolCall("[0, 0, 100, 100]", 11, outcome, box)


def measured(questions: list[Question], answers: list[Answer]):
    return measure({item.name: item for item in questions}, answers, CONTRACT)


def test_examples_in_the_docstrings():
    assert doctest.testmod(measures).failed == 0


def test_each_figure_of_a_few_answers():
    questions = [question("a", boxes=(Box(0, 0, 100, 100),), category="x"), question("b", category="y")]
    answers = [
        answer("a", "cat", (call(box=Box(0, 0, 100, 50)), call("malformed")), seconds=1.5),
        answer("b", "dog", tokens=40, finish_reason="length", crop_tokens=0),
    ]
    items = measured(questions, answers)
    figures = summarize(items)
    assert (figures["questions"], figures["answers"], figures["accuracy"], figures["format"]) == (2, 2, 0.5, 1.0)
    assert figures["iou"] == 0.5, "only questions with a box count"
    assert (figures["valid_calls"], figures["crops"], figures["no_call"]) == (0.5, 0.5, 0.5)
    assert (figures["tokens"], figures["crop_tokens"], figures["cut_off"], figures["seconds"]) == (30, 2.5, 0.5, 1.0)
    parts = by_category(items)
    assert {name: (part["accuracy"], part["iou"], part["valid_calls"]) for name, part in parts.items()} == {
        "x": (1.0, 0.5, 0.5),
        "y": (0.0, None, None),
    }
    assert by_category(items[:1]) == {}, "one category is the whole"
    assert summarize([])["accuracy"] is None


def test_a_small_annotation_is_met_by_the_call_that_it_can_be():
    items = measured(
        [question("a", boxes=(Box(100, 100, 110, 110),))], [answer("a", "cat", (call("grown", Box(91, 91, 119, 119)),))]
    )
    assert items[0].figures["iou"] == 1.0


def test_people_are_agreed_with_one_left_out_at_a_time():
    ten = ["stop"] * 4 + ["halt"] * 3 + ["a stop"] + ["go"] * 2
    assert agreement("stop", ten) == 1.0
    assert agreement("Halt!", ten) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert agreement("go", ten) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert agreement("run", ten) == 0.0
    items = measured([question("a", *ten)], [answer("a", "halt")])
    assert items[0].figures["accuracy"] == pytest.approx(0.9)


def test_a_judge_decides_free_form_answers_and_leaves_the_people_theirs(serve, tmp_path):
    server = serve(knowing)
    judge = Judge(JudgeConfig(server.url, "m", judge_cache=str(tmp_path / "cache")))
    questions = {name: question(name, *answers) for name, answers in {"a": ["sofa"], "b": ["sofa"] * 10}.items()}
    items = measure(questions, [answer("a", "couch"), answer("b", "couch")], CONTRACT, judge)
    assert [item.figures["accuracy"] for item in items] == [1.0, 0.0]
    assert json.loads(server.seen[0][2]["messages"][1]["content"])["question"] == "a?"
    assert len(server.seen) == 1


def test_an_answer_survives_its_json():
    before = answer("a", "\u4f60 <b>", (call(box=Box(0, 0, 9.5, 9)), call("malformed")))
    assert Answer.from_json(json.loads(json.dumps(before.to_json()))) == before


# -------------------------------------------------------------------------------------------------- interval


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Questions of their own difficulty, four answers each: drawing questions holds, drawing answers does not."""
    dice = random.Random(7)
    held = {"by question": 0, "by answer": 0}
    trials = 200
    for _ in range(trials):
        values, groups = [], []
        for number in range(60):
            chance = dice.choice([0.05, 0.95])  # 0.5 on average
            values += [float(dice.random() < chance) for _ in range(4)]
            groups += [str(number)] * 4
        for name, own in (("by question", groups), ("by answer", [str(n) for n in range(len(values))])):
            low, high = interval(values, own)
            held[name] += low <= 0.5 <= high
    assert 0.90 <= held["by question"] / trials <= 0.99
    assert held["by answer"] / trials < 0.80


def test_the_interval_agrees_with_the_normal_one_and_never_moves():
    dice = random.Random(1)
    values = [float(dice.random() < 0.3) for _ in range(800)]
    low, high = interval(values, [str(n) for n in range(800)])
    mean = sum(values) / 800
    width = 1.96 * math.sqrt(mean * (1 - mean) / 800)
    assert (low, high) == (pytest.approx(mean - width, abs=0.005), pytest.approx(mean + width, abs=0.005))
    assert interval(values, [str(n) for n in range(800)]) == (low, high)
    assert interval([1.0, 0.0], ["a", "a"]) is None


def test_the_crop_gain_is_paired_by_question():
    questions = [question(name) for name in "abcd"]
    real = measured(questions, [answer(name, "cat", sample=k) for name in "abc" for k in range(2)])
    said = {"a": ("dog", "cat"), "b": ("cat", "cat"), "d": ("cat", "cat")}
    blank = measured(
        questions,
        [answer(name, text, sample=k, crops="blank") for name, own in said.items() for k, text in enumerate(own)],
    )
    gain = crop_gain(real, blank)
    assert (gain["questions"], gain["gain"]) == (2, 0.25), "c and d were not asked both ways"
    assert gain["gain_ci"] == (0.0, 0.5)
    assert crop_gain(real, [])["gain"] is None


def test_the_paired_interval_is_narrower_than_the_two_apart():
    dice = random.Random(3)
    easy = {str(n): dice.random() < 0.5 for n in range(200)}
    questions = [question(name) for name in easy]
    real = measured(questions, [answer(name, "cat" if right else "dog") for name, right in easy.items()])
    lost = {name: right and dice.random() < 0.9 for name, right in easy.items()}
    blank = measured(
        questions, [answer(name, "cat" if right else "dog", crops="blank") for name, right in lost.items()]
    )
    low, high = crop_gain(real, blank)["gain_ci"]
    assert 0 < low < high
    apart = [summarize(side)["accuracy_ci"] for side in (real, blank)]
    assert apart[0][0] < apart[1][1], "apart the intervals overlap"


def test_columns_are_aligned():
    assert as_text([["a", "long"], ["longer", "1"]]) == "a       long\nlonger     1"


def test_figures_of_rollouts_are_shares_of_calls_and_means_of_rollouts():
    """Six calls of three rollouts, counted by hand."""
    reference = Reference("cat", (Box(0, 0, 100, 100),), (400, 300))
    whole, small = Box(0, 0, 400, 300), Box(0, 0, 100, 100)
    looked = answer("a", "cat", (call(box=small), call(box=small), call(box=whole)))
    failed = answer("b", "a long answer", (call("malformed"), call("inverted"), call("over_limit", small)))
    silent = answer("c", "")
    pairs = [(item.response, reference) for item in (looked, failed, silent)]
    assert rollout_figures(pairs) == pytest.approx(
        {
            "crops/invalid": 2 / 6,
            "crops/repeated": 1 / 6,
            "crops/whole_image": 1 / 6,
            "crops/after_answer": 0.0,
            "crops/per_rollout": 3 / 3,
            "crops/no_call": 1 / 3,
            "crops/iou": (1.0 + 0.0 + 0.0) / 3,
            "answer/characters": (3 + 13 + 0) / 3,
        }
    )


def test_rollouts_without_calls_or_annotations_have_no_share_of_them():
    pairs = [(answer("c", "cat").response, Reference("cat", (), (400, 300)))]
    assert rollout_figures(pairs) == {"crops/per_rollout": 0.0, "crops/no_call": 1.0, "answer/characters": 3.0}
