"""The outer shape of an answer, on text that a model may write: anything."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crop_tool import Box, ToolCall, parse_box
from response_format import find_calls, parse_response

fuzz = settings(max_examples=200, deadline=None, derandomize=True)

FRAGMENTS = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<tool_call>",
    "</tool_call>",
    "[1, 2, 30, 40]",
    "[",
    "1e308",
]
FRAGMENTS += ["NaN", "١٢٣", "<", ">", "</", "\n", " ", "yes", "\ud800", "\x00"]
model_text = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=25).map("".join) | st.text()

GOOD = "<think>\nI look <tool_call>[1, 2, 30, 40]</tool_call> here.\n</think>\n\n<answer> a dog </answer>"


def test_a_response_is_taken_apart():
    response = parse_response(GOOD)
    assert response.think_content == "I look <tool_call>[1, 2, 30, 40]</tool_call> here."
    assert response.answer_content == "a dog"
    assert response.tool_calls == (ToolCall("[1, 2, 30, 40]", GOOD.index("<tool_call>"), "parsed"),)
    assert response.answer_start == GOOD.index("<answer>")
    assert response.text == GOOD
    assert response.is_well_formed


def test_the_engines_own_calls_are_kept():
    calls = (ToolCall("[1, 2, 30, 40]", 15, "exact", Box(1, 2, 30, 40)),)
    assert parse_response(GOOD, calls).tool_calls == calls
    assert parse_response(GOOD, ()).tool_calls == ()
    assert parse_response(GOOD, list(calls)).tool_calls == calls


@pytest.mark.parametrize(
    ("text", "think", "answer"),
    [
        ("", "", ""),
        ("a dog", "", ""),
        ("<think>cut off", "cut off", ""),
        ("<think>one<answer>two", "one", "two"),
        ("<answer>two</answer>", "", "two"),
        ("<answer>a</answer><answer>b</answer>", "", "a"),
        ("</think><answer></answer>", "", ""),
        ("<think>\n\n</think><answer>\n</answer>", "", ""),
    ],
)
def test_broken_responses_give_what_they_have(text, think, answer):
    response = parse_response(text)
    assert (response.think_content, response.answer_content) == (think, answer)
    assert not response.is_well_formed or text.startswith("<think>\n\n")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<think>a</think>",
        "<answer>b</answer>",
        "<think>a</think><answer>b",
        "<think>a<answer>b</answer></think>",
        "<answer>b</answer><think>a</think>",
        "<think>a</think> so <answer>b</answer>",
        "<think>a</think><answer>b</answer> done",
        "hm <think>a</think><answer>b</answer>",
        "<think>a</think><think>a</think><answer>b</answer>",
        "<think>a</think><answer>b</answer><answer>c</answer>",
        "<think>a</think></think><answer>b</answer>",
        "</think>a<think><answer>b</answer>",
        "<think>a<think>b</think><answer>c</answer>",
        "<think>a</think><answer>b<answer>c</answer>",
        "<think>a<answer></think>b</answer>",
    ],
)
def test_shapes_that_are_not_well_formed(text):
    assert not parse_response(text).is_well_formed


@pytest.mark.parametrize("text", ["<think></think><answer></answer>", "\n<think>a\n</think>\n\n<answer>b</answer>\n "])
def test_space_around_the_parts_does_not_count(text):
    assert parse_response(text).is_well_formed


def test_answer_start_is_the_end_of_a_text_without_answer():
    assert parse_response("<think>a").answer_start == len("<think>a")
    assert parse_response("x<answer>a<answer>").answer_start == 1


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("none", []),
        ("<tool_call>[1, 2, 3, 4]", []),
        ("[1, 2, 3, 4]</tool_call>", []),
        ("</tool_call><tool_call>", []),
        ("<tool_call></tool_call>", [("", 0, "malformed")]),
        ("<tool_call>[1, 2, 3]</tool_call>", [("[1, 2, 3]", 0, "malformed")]),
        ("<tool_call>[1, 2, 3, 1e308]</tool_call>", [("[1, 2, 3, 1e308]", 0, "malformed")]),
        # A call begins at the last opening tag, where the engine's tokens begin it.
        ("<tool_call><tool_call>[1, 2, 3, 4]</tool_call></tool_call>", [("[1, 2, 3, 4]", 11, "parsed")]),
        ("<tool_call>\n[1, 2,\n3, 4]\n</tool_call>", [("\n[1, 2,\n3, 4]\n", 0, "parsed")]),
        (
            "a<tool_call>x</tool_call><tool_call>[1, 2, 3, 4]</tool_call>",
            [("x", 1, "malformed"), ("[1, 2, 3, 4]", 25, "parsed")],
        ),
    ],
)
def test_find_calls(text, calls):
    assert find_calls(text) == tuple(ToolCall(*call) for call in calls)


@fuzz
@given(model_text)
def test_nothing_raises_on_model_text(text):
    response = parse_response(text)
    assert response.text == text
    assert response.think_content in text and response.answer_content in text
    assert 0 <= response.answer_start <= len(text)
    assert response.is_well_formed in (True, False)
    for call in response.tool_calls:
        assert text[call.start :].startswith(f"<tool_call>{call.text}</tool_call>")
        assert (call.outcome == "parsed") == (parse_box(call.text) is not None)
        assert call.box is None and not call.is_valid


LONG_TEXTS = {
    "noise": "".join(map(chr, random.Random(0).choices(range(1, 0x3000), k=10_000))),
    "nested": "<tool_call>" * 1000 + "[1, 2, 3, 4]" + "</tool_call>" * 1000,
    "never closed": "<tool_call>[1, 2, 3, " * 1000,
    "many": "<tool_call>[1, 2, 3, 4]</tool_call>" * 1000,
    "thoughts": "<think>" * 2000,
    "answers": "<think><answer>" * 1000,
    "spaces": "<tool_call>" + " " * 10_000 + "[1, 2," + " " * 10_000 + "</tool_call>",
}


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_long_texts_take_no_time(name):
    started = time.perf_counter()
    response = parse_response(LONG_TEXTS[name])
    assert not response.is_well_formed
    assert time.perf_counter() - started < 1  # quadratic work on 20,000 characters takes many seconds
    assert len(response.tool_calls) == {"nested": 1, "many": 1000, "spaces": 1}.get(name, 0)
