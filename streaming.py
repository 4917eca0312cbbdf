"""A response in the making, told as it comes: pieces of text and the results of calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crop_tool import CALL_CLOSE, CALL_OPEN, ToolCall
from response_format import TAGS

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

    from rollouts import Response

WHOLE = (CALL_OPEN, CALL_CLOSE, *TAGS)  # no piece ends inside one of these
BROKEN = "\ufffd"  # what bytes that are no character are decoded to, also those of one that is not complete yet


@dataclass(frozen=True)
class TextPiece:
    """The next stretch of what the model writes. All pieces of a response together are its text."""

    text: str


@dataclass(frozen=True)
class CallResult:
    """What came of the call that the text before it ends with. `number` counts calls from 1.

    call: with its box in pixels of the ORIGINAL image. crop: as the model sees it; None where nothing was shown.
    """

    number: int
    call: ToolCall
    crop: Image | None


class ResponseReader:
    """Tells what is new in a response that grows."""

    def __init__(self, response: Response, tokenizer: PreTrainedTokenizerBase, call_close: int) -> None:
        """call_close: the id of `</tool_call>`."""
        self.response, self.tokenizer, self.call_close = response, tokenizer, call_close
        self.read, self.calls, self.crops = 0, 0, 0  # how many ids, calls and crops were told
        self.undecoded: list[int] = []  # sampled ids whose bytes end inside a character
        self.held = ""  # text that may be the beginning of a tag

    def news(self) -> Iterator[TextPiece | CallResult]:
        """What was written since the last time; with the response's end, all that was held back."""
        response = self.response
        end = len(response.ids) - (response.finish_reason == "stop")  # the end-of-turn token is no text
        for at in range(self.read, end):
            if response.mask[at]:
                self.undecoded.append(response.ids[at])
                if response.ids[at] == self.call_close:
                    yield from self._piece(whole=True)
                    yield self._call_result()
        self.read = end
        yield from self._piece(whole=bool(response.finish_reason))

    def _piece(self, whole: bool) -> Iterator[TextPiece]:
        """The text that can be told: all of it, or without what may be half a character or half a tag."""
        text = self.tokenizer.decode(self.undecoded, skip_special_tokens=False)
        if whole or not text.endswith(BROKEN):
            text, self.held, self.undecoded = self.held + text, "", []
            cut = len(text) if whole else len(text) - _half_tag(text)
            self.held = text[cut:]
            if cut:
                yield TextPiece(text[:cut])

    def _call_result(self) -> CallResult:
        call, crop = self.response.calls[self.calls], None
        self.calls += 1
        if call.is_executed:
            crop = self.response.crops[self.crops]
            self.crops += 1
        return CallResult(self.calls, call, crop)


def _half_tag(text: str) -> int:
    """How many characters at the end of the text begin a tag without ending it."""
    start = text.rfind("<")
    begun = text[start:] if start >= 0 else ""
    return len(begun) if any(tag.startswith(begun) and tag != begun for tag in WHOLE) else 0
