"""A region of an image: text <-> box <-> pixels (grammar, frames, clamp, crop, resize rules).

Three frames exist. *Original* pixels are those of the image file: annotations, crops and public results use
them. The *shown* image is what the processor delivers to the model. The *model frame* is the one in which the
model reads and writes boxes; `CropContract.coordinate_space` declares it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

CONTRACT_FILE = "crop_contract.json"
COORDINATE_SPACES = ("resized", "original", "normalized_1000")
MAX_ASPECT_RATIO = 200  # Qwen's smart_resize refuses longer strips
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"

SYSTEM_PROMPTS = {
    "resized": "in pixels of the image as you see it",
    "original": "in pixels of the original image",
    "normalized_1000": "in thousandths of the image's width and height",
}

# Plain decimals only: no exponents, no unicode digits, no nan; the lengths bound what float() is given.
_NUMBER = r"[+-]?[0-9]{1,7}(?:\.[0-9]{1,20})?"
_BOX = re.compile(r"\s*\[\s*" + r"\s*,\s*".join([f"({_NUMBER})"] * 4) + r"\s*\]\s*")
# A call runs from the last opening tag before a closing one, which is also how the engine reads tokens.
CALL_PATTERN = re.compile(rf"{CALL_OPEN}((?:(?!{CALL_OPEN}).)*?){CALL_CLOSE}", re.DOTALL)
# An annotation ends at the first bracket of its own kind, so that one broken call cannot swallow the next.
_ANNOTATION = re.compile(r"\{\s*Crop\b([^{}]*)\}|<\s*Crop\b([^<>]*)>")
# What looks like the start of a call; every match that is not part of a whole call is a malformed one.
_CALL_START = re.compile(r"[{<]\s*Crop\b|</?tool_call>")


@dataclass(frozen=True)
class Box:
    """Corners `(x1, y1)` and `(x2, y2)`, x to the right and y down; the frame is named where it is used."""

    x1: float
    y1: float
    x2: float
    y2: float

    def as_list(self) -> list[float]:
        return [self.x1, self.y1, self.x2, self.y2]

    @property
    def width(self) -> float:
        return self.x2 - self.x1

    @property
    def height(self) -> float:
        return self.y2 - self.y1

    @property
    def area(self) -> float:
        return max(0.0, self.width) * max(0.0, self.height)

    def iou(self, other: Box) -> float:
        """Intersection over union with `other` (same frame), 0 to 1."""
        width = min(self.x2, other.x2) - max(self.x1, other.x1)
        height = min(self.y2, other.y2) - max(self.y1, other.y1)
        shared = max(0.0, width) * max(0.0, height)
        union = self.area + other.area - shared
        return shared / union if union > 0 else 0.0

    def scaled(self, x: float, y: float) -> Box:
        return Box(self.x1 * x, self.y1 * y, self.x2 * x, self.y2 * y)


@dataclass(frozen=True)
class ToolCall:
    """One crop call of a response.

    text: what stands between the tags, as written.
    start: offset of the call in the response's text (crop blocks left out).
    outcome: `exact`, `clamped`, `grown` (the region exists), `malformed`, `inverted`, `outside`,
        `extreme_ratio` (it does not), `over_limit` (it exists, but `max_crops` was reached), or `parsed`
        (numbers read, not yet held against an image).
    box: the region in pixels of the ORIGINAL image, None where there is none.
    """

    text: str
    start: int
    outcome: str
    box: Box | None = None

    @property
    def is_valid(self) -> bool:
        return self.outcome in ("exact", "clamped", "grown", "over_limit")

    @property
    def is_executed(self) -> bool:
        """True where a crop was cut and shown to the model."""
        return self.outcome in ("exact", "clamped", "grown")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "box": self.box and self.box.as_list()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ToolCall:
        return cls(**{**values, "box": Box(*values["box"]) if values["box"] else None})


@dataclass(frozen=True)
class CropContract:
    """What training and inference must agree on; saved beside the weights as `crop_contract.json`."""

    coordinate_space: str = "resized"
    image_shorter_side: int = 448
    crop_shorter_side: int = 448
    max_pixels: int = 1280 * 28 * 28
    factor: int = 28  # patch_size * merge_size: one image token stands for factor x factor shown pixels
    min_crop_side: int = 28  # original pixels
    system_prompt: str = ""

    def __post_init__(self) -> None:
        if self.coordinate_space not in COORDINATE_SPACES:
            raise ValueError(
                f"coordinate_space is {self.coordinate_space!r}, but it must be one of {', '.join(COORDINATE_SPACES)}"
            )
        for name in ("image_shorter_side", "crop_shorter_side", "factor", "min_crop_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be at least 1 pixel")
        if self.max_pixels < self.factor**2:
            raise ValueError(
                f"max_pixels is {self.max_pixels}, but one image token alone takes {self.factor**2} pixels"
            )

    def system_text(self) -> str:
        """The system prompt: the given one, or the default that explains the call and names the frame."""
        if self.system_prompt:
            return self.system_prompt
        return (
            "Think step by step inside <think></think>, then answer inside <answer></answer>. While you think you "
            f"can look closer: write {CALL_OPEN}[x1, y1, x2, y2]{CALL_CLOSE} with the left, top, right and bottom "
            f"of a region, {SYSTEM_PROMPTS[self.coordinate_space]}, and that region of the image is shown to you "
            "right after."
        )

    def save(self, folder: str | Path) -> None:
        Path(folder, CONTRACT_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> CropContract | None:
        """The contract saved in `folder`, or None where there is none (a model that was not trained here)."""
        path = Path(folder, CONTRACT_FILE)
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): copy or download it anew") from None
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"{path} has unknown keys {sorted(unknown)}: it was written by another version")
        return cls(**values)

    def with_settings(self, given: dict[str, object], source: str) -> CropContract:
        """This contract, asserting that settings which the user gave do not contradict the one of `source`."""
        for name, value in given.items():
            if value != getattr(self, name):
                raise ValueError(
                    f"{name}={value!r} was given, but {source} was trained with {name}={getattr(self, name)!r}. "
                    f"Leave the setting out, or start from a model without {CONTRACT_FILE}."
                )
        return self


# ---------------------------------------------------------------------------------------------- grammar


def parse_box(text: str) -> Box | None:
    """`[x1, y1, x2, y2]` -> Box in the frame of the writer; None for anything else. Never raises on text."""
    match = _BOX.fullmatch(text)
    return Box(*map(float, match.groups())) if match else None


def format_box(box: Box) -> str:
    """The call's text for a box whose numbers are whole."""
    return "[" + ", ".join(str(int(value)) for value in box.as_list()) + "]"


def split_annotations(text: str) -> list[str | Box]:
    """Cut an annotated answer at its calls: text and boxes (as annotated) in reading order.

    A call is `{Crop <free words> [x1, y1, x2, y2]}`, the same in angle brackets, or
    `<tool_call>[x1, y1, x2, y2]</tool_call>`.

    Raises:
        ValueError: naming the first call that is malformed.
    """
    matches = sorted([*_ANNOTATION.finditer(text), *CALL_PATTERN.finditer(text)], key=lambda match: match.start())
    segments: list[str | Box] = []
    position = 0
    for match in matches:
        body = next(group for group in match.groups() if group is not None)
        bracket = 0 if match.re is CALL_PATTERN else body.find("[")
        box = parse_box(body[bracket:]) if bracket >= 0 else None
        if match.start() < position or box is None:
            raise ValueError(f"malformed call {_excerpt(match.group())}: expected [x1, y1, x2, y2]")
        segments += [text[position : match.start()], box]
        position = match.end()
    segments.append(text[position:])
    for segment in segments:
        if isinstance(segment, str) and (stray := _CALL_START.search(segment)):
            raise ValueError(f"malformed call {_excerpt(segment[stray.start() :])}: it is never closed")
    return segments


def convert_crop_annotations(text: str, to_model_frame: Callable[[Box], Box] | None = None) -> str:
    """Each annotated call as `<tool_call>[…]</tool_call>`; without `to_model_frame` the numbers stay as written.

    >>> convert_crop_annotations("a {Crop dog 1 [0.00, 141.43, 79.23, 480.00]} b")
    'a <tool_call>[0.00, 141.43, 79.23, 480.00]</tool_call> b'
    """
    if to_model_frame is None:
        split_annotations(text)  # the same errors as below
        return _ANNOTATION.sub(lambda match: CALL_OPEN + match.group()[match.group().find("[") : -1] + CALL_CLOSE, text)
    return "".join(
        part if isinstance(part, str) else CALL_OPEN + format_box(to_model_frame(part)) + CALL_CLOSE
        for part in split_annotations(text)
    )


def rewrite_boxes(text: str, change: Callable[[Box], Box]) -> str:
    """An annotated answer with the numbers of each call changed; every other character stays as written.

    Raises:
        ValueError: naming the first call that is malformed.
    """
    split_annotations(text)  # raises

    def numbers(match: re.Match[str]) -> str:
        call = match.group()
        begin, end = call.index("["), call.rindex("]") + 1
        box = change(parse_box(call[begin:end]))
        return call[:begin] + "[" + ", ".join(f"{value:.10g}" for value in box.as_list()) + "]" + call[end:]

    return CALL_PATTERN.sub(numbers, _ANNOTATION.sub(numbers, text))


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


# ------------------------------------------------------------------------------------------------ sizes


def refuse_strip(width: int, height: int) -> None:
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"the image is {width} x {height}: its aspect ratio is over {MAX_ASPECT_RATIO}")


def smart_resize(width: int, height: int, factor: int, max_pixels: int) -> tuple[int, int]:
    """Qwen2-VL's choice of the multiple of `factor` for each side, within `max_pixels`; (width, height).

    Raises:
        ValueError: for a strip longer than 200 times its width.
    """
    refuse_strip(width, height)
    new_width, new_height = (max(factor, round(side / factor) * factor) for side in (width, height))
    if new_width * new_height > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        new_width, new_height = (max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height))
    return new_width, new_height


def shown_image_size(width: int, height: int, contract: CropContract) -> tuple[int, int]:
    """Size of the main image as the model sees it: shorter side to `image_shorter_side`, up or down."""
    scale = contract.image_shorter_side / min(width, height)
    return _fit(width, height, scale, contract)


def shown_crop_size(width: int, height: int, contract: CropContract) -> tuple[int, int]:
    """Size of a crop as the model sees it: never enlarged, except to one image token a side."""
    scale = min(1.0, contract.crop_shorter_side / min(width, height))
    return _fit(width, height, scale, contract)


def _fit(width: int, height: int, scale: float, contract: CropContract) -> tuple[int, int]:
    refuse_strip(width, height)  # by the sides that the user knows
    sides = max(1, round(width * scale)), max(1, round(height * scale))
    fitted = smart_resize(*sides, contract.factor, contract.max_pixels)
    # Rounding can lengthen a strip beyond what the processor, which looks at it again, accepts.
    return min(fitted[0], MAX_ASPECT_RATIO * fitted[1]), min(fitted[1], MAX_ASPECT_RATIO * fitted[0])


def image_token_count(width: int, height: int, contract: CropContract) -> int:
    """Image tokens of a shown image of that size."""
    return (width // contract.factor) * (height // contract.factor)


# ----------------------------------------------------------------------------------------------- frames


@dataclass(frozen=True)
class Frame:
    """Maps boxes of one image between original pixels and the model frame.

    original: (width, height) of the image file; shown: (width, height) of the final grid the model sees.
    """

    coordinate_space: str
    original: tuple[int, int]
    shown: tuple[int, int]

    @classmethod
    def of(cls, original: tuple[int, int], contract: CropContract) -> Frame:
        return cls(contract.coordinate_space, original, shown_image_size(*original, contract))

    @property
    def extent(self) -> tuple[int, int]:
        """Width and height of the image in the model frame."""
        frames = {"resized": self.shown, "original": self.original, "normalized_1000": (1000, 1000)}
        return frames[self.coordinate_space]

    def to_original(self, box: Box) -> Box:
        return box.scaled(self.original[0] / self.extent[0], self.original[1] / self.extent[1])

    def to_model(self, box: Box) -> Box:
        """Original pixels -> whole numbers of the model frame, inside it and never empty."""
        scaled = box.scaled(self.extent[0] / self.original[0], self.extent[1] / self.original[1])
        x1, x2 = _whole_span(scaled.x1, scaled.x2, self.extent[0])
        y1, y2 = _whole_span(scaled.y1, scaled.y2, self.extent[1])
        return Box(x1, y1, x2, y2)


def _whole_span(low: float, high: float, extent: int) -> tuple[int, int]:
    first = min(max(0, round(low)), extent - 1)
    return first, max(first + 1, min(round(high), extent))


# ------------------------------------------------------------------------------------------- box policy


def resolve_box(box: Box, size: tuple[int, int], min_side: int) -> tuple[str, Box | None]:
    """Hold a box (original pixels) against an image of `size` (width, height): (outcome, region).

    Inverted, wholly outside and over-long boxes are invalid; a box partly outside is clamped; one smaller
    than `min_side` is grown around its centre and shifted inside. The region has whole corners.
    """
    width, height = size
    is_finite = all(map(math.isfinite, box.as_list()))
    if not (is_finite and box.x2 > box.x1 and box.y2 > box.y1):
        return "inverted", None
    if box.x2 <= 0 or box.y2 <= 0 or box.x1 >= width or box.y1 >= height:
        return "outside", None
    clamped = Box(
        max(0, math.floor(box.x1)),
        max(0, math.floor(box.y1)),
        min(width, math.ceil(box.x2)),
        min(height, math.ceil(box.y2)),
    )
    # Less than a pixel beyond the border is rounding, not a region that leaves the image.
    outcome = "exact" if min(box.x1, box.y1, width - box.x2, height - box.y2) > -1 else "clamped"
    x1, x2 = _grow(clamped.x1, clamped.x2, min_side, width)
    y1, y2 = _grow(clamped.y1, clamped.y2, min_side, height)
    region = Box(x1, y1, x2, y2)
    if max(region.width, region.height) > MAX_ASPECT_RATIO * min(region.width, region.height):
        return "extreme_ratio", None
    return ("grown" if region != clamped else outcome), region


def _grow(low: float, high: float, min_side: int, extent: int) -> tuple[int, int]:
    side = min(max(int(high - low), min_side), extent)
    first = int(low) if side == int(high - low) else math.floor((low + high - side) / 2)
    first = min(max(0, first), extent - side)
    return first, first + side


def placed_region(region: Box, size: tuple[int, int], x: float, y: float) -> Box:
    """A region of the same width and height elsewhere in an image of `size`; x, y in [0, 1) say where."""
    left = math.floor(x * (size[0] - region.width + 1))
    top = math.floor(y * (size[1] - region.height + 1))
    return Box(left, top, left + region.width, top + region.height)


# ----------------------------------------------------------------------------------------------- pixels


def show_image(image: Image, contract: CropContract) -> Image:
    """The main image as the model sees it. Its size is final: the processor's own resize does nothing more."""
    return _resize(image, shown_image_size(*image.size, contract))


def cut_crop(image: Image, region: Box, contract: CropContract) -> Image:
    """A resolved region (original pixels) of the original image, as the model sees it."""
    crop = image.crop(tuple(int(value) for value in region.as_list()))
    return _resize(crop, shown_crop_size(*crop.size, contract))


def _resize(image: Image, size: tuple[int, int]) -> Image:
    from PIL.Image import Resampling

    return image if image.size == size else image.resize(size, Resampling.BICUBIC)


def run_call(call: ToolCall, image: Image, contract: CropContract) -> tuple[ToolCall, Image | None]:
    """Carry out a call on the original image: the call with its outcome and region, and the crop or None.

    This is the only way from a call's text to pixels; SFT data and the engine both take it.
    """
    written = parse_box(call.text)
    if written is None:
        return replace(call, outcome="malformed", box=None), None
    original_box = Frame.of(image.size, contract).to_original(written)
    outcome, region = resolve_box(original_box, image.size, contract.min_crop_side)
    call = replace(call, outcome=outcome, box=region)
    return call, (cut_crop(image, region, contract) if region is not None else None)
