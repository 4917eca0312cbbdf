"""The outer shape of an answer: `<think>…</think> <answer>…</answer>` and the tool calls inside.

Nothing here raises on model text, whatever it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from crop_tool import CALL_PATTERN, ToolCall, parse_box

_THINK = re.compile(r"<think>(.*?)(?:</think>|(?=<answer>)|\Z)", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True)
class ParsedResponse:
    """A response in its parts.

    think_content, answer_content: text inside the tags, stripped; "" where the tag is missing.
    tool_calls: in reading order. From the engine they carry outcomes and boxes in ORIGINAL pixels; from text
        alone their outcome is `parsed` or `malformed`.
    text: the whole response as the model wrote it (without image tokens).
    """

    think_content: str
    answer_content: str
    tool_calls: tuple[ToolCall, ...]
    text: str

    @property
    def answer_start(self) -> int:
        """Offset of `<answer>` in the text; the text's length where there is none."""
        position = self.text.find("<answer>")
        return position if position >= 0 else len(self.text)

    @property
    def is_well_formed(self) -> bool:
        """One think part, then one answer part, each tag once, and nothing but space around them."""
        if any(self.text.count(tag) != 1 for tag in TAGS):
            return False
        positions = [self.text.find(tag) for tag in TAGS]
        between = self.text[positions[1] + len("</think>") : positions[2]]
        outside = self.text[: positions[0]] + self.text[positions[3] + len("</answer>") :]
        return positions == sorted(positions) and not between.strip() and not outside.strip()


def parse_response(text: str, tool_calls: tuple[ToolCall, ...] | None = None) -> ParsedResponse:
    """Split a response. `tool_calls` are the engine's own where it ran; else they are found in the text."""
    think, answer = _THINK.search(text), _ANSWER.search(text)
    if tool_calls is None:
        tool_calls = find_calls(text)
    return ParsedResponse(
        think_content=think.group(1).strip() if think else "",
        answer_content=answer.group(1).strip() if answer else "",
        tool_calls=tuple(tool_calls),
        text=text,
    )


def find_calls(text: str) -> tuple[ToolCall, ...]:
    """The calls written in a text, not held against an image."""
    return tuple(
        ToolCall(match.group(1), match.start(), "parsed" if parse_box(match.group(1)) else "malformed")
        for match in CALL_PATTERN.finditer(text)
    )
