"""What the readers and writers of `data_formats.py` share: parts of a row checked, boxes mapped, images kept."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from box_frames import frame_extent
from config import ConversionConfig
from conversation import load_image, refuse_reserved, resolve_image_path
from crop_tool import Box, CropContract, resolve_box, split_annotations
from response_format import parse_response
from traces import write_whole

if TYPE_CHECKING:
    from PIL.Image import Image

Row = dict[str, Any]
QWEN_FACTOR, QWEN_MIN_PIXELS = 28, 3136  # of Qwen2.5-VL's image processor
CALL_WORD = "region"  # stands in a call that came without words
_ANY_TAG = re.compile(r"</?(?:think|answer)>")
_CALL_WORDS = re.compile(r"[{<]\s*Crop\b([^\[\]{}<>]*)\[")

# What a row can lose; said with the number of rows.
NO_REASONING = "came without reasoning: for R-GRPO, not for SFT"
CALLS_ALONE = "came with calls alone, without words of reasoning"
TAGS = "had think or answer tags that were completed"
REASONING = "lost their reasoning"
WORDS = "lost the words of their calls"
CALLS = "lost their calls"
SPLIT = "had several questions, which became rows of their own"
ENTRY_KEYS = "lost further keys of their QnA entries"
ROW_KEYS = "lost further keys"


@dataclass
class Conversion:
    """What a reader and a writer know besides the row: settings, and the list of what the row at hand loses."""

    config: ConversionConfig
    columns: dict[str, str] = field(default_factory=dict)  # hub: our name -> the set's column
    source_folder: Path | None = None  # hub: a local set's own folder, whose images may be read
    index: int = 0  # of the row, from 0
    lost: set[str] = field(default_factory=set)

    def entry(self, question: str, response: str) -> Row:
        return {"Q": question, self.config.answer_key: response}

    def size(self, path: str) -> tuple[int, int]:
        return image_size(path, self.config.image_folder)

    def original_box(self, box: Box, path: str, frame: str) -> Box:
        """A box of the source, written in `frame`, in original pixels to two decimals."""
        if frame != "original":
            size = self.size(path)
            is_qwen = frame == "qwen"
            extent = (
                qwen_size(size, self.config.box_max_pixels) if is_qwen else frame_extent(frame, size, CropContract())
            )
            box = box.scaled(size[0] / extent[0], size[1] / extent[1])
        return rounded(box)


# -------------------------------------------------------------------------------------------- parts of a row


def get(row: Any, key: str, kind: type) -> Any:
    """`row[key]`, of the type `kind` and not empty; raises ValueError where it is not that."""
    value = row.get(key) if isinstance(row, Mapping) else None
    if not isinstance(value, kind) or not value:
        raise ValueError(f"missing key {key!r}: it must be a non-empty {kind.__name__}")
    return value


def others(row: Mapping[str, Any], *known: str) -> Row:
    """The further keys of a row that is read; they go along wherever a format has room for them."""
    return {key: value for key, value in row.items() if key not in (*known, "image_path", "QnA")}


def further(row: Row, conversion: Conversion, *taken: str) -> Row:
    """The further keys of our row that can be written beside the format's own, which are `taken`."""
    if any(key in row for key in taken):
        conversion.lost.add(ROW_KEYS)
    return others(row, *taken)


def check_row(row: Row, conversion: Conversion) -> Row:
    """Our row itself, if it has the shape that every writer relies on; raises ValueError otherwise."""
    get(row, "image_path", str)
    for entry in get(row, "QnA", list):
        question, response = get(entry, "Q", str), get(entry, conversion.config.answer_key, str)
        refuse_reserved(question, "the question")
        refuse_reserved(response, "the answer")
        split_annotations(response)  # raises
    return row


def entries(row: Row, conversion: Conversion) -> list[tuple[str, str]]:
    """Questions and responses of our row; notes the keys that no format has room for."""
    key = conversion.config.answer_key
    if any(set(entry) - {"Q", key} for entry in row["QnA"]):
        conversion.lost.add(ENTRY_KEYS)
    return [(entry["Q"], entry[key]) for entry in row["QnA"]]


def single_entries(row: Row, conversion: Conversion) -> list[tuple[str, str]]:
    """`entries`, for a format with one question a row."""
    found = entries(row, conversion)
    if len(found) > 1:
        conversion.lost.add(SPLIT)
    return found


# ----------------------------------------------------------------------------------------------- responses


def plain_answer(value: Any) -> str:
    """An answer given as text or a number."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise ValueError(f"the answer is {value!r:.60}: it must be text or a number")
    return str(value).strip()


def answer_of(text: str) -> str:
    """The content of the answer tags; a text without tags is the answer itself."""
    answer = parse_response(text, ()).answer_content if _ANY_TAG.search(text) else text.strip()
    if not answer:
        raise ValueError("missing tags: there is no <answer>…</answer>, or nothing in it")
    return answer


def response_of(boxes: Iterable[Box], answer: str, conversion: Conversion) -> str:
    """A response of ours from boxes (original pixels) and an answer."""
    if _ANY_TAG.search(answer):
        raise ValueError("the answer holds think or answer tags")
    calls = "".join(call_text(box) + "\n" for box in boxes)
    conversion.lost.add(CALLS_ALONE if calls else NO_REASONING)
    return f"<think>\n{calls}</think>\n\n<answer>{answer.strip()}</answer>"


def with_tags(text: str, conversion: Conversion) -> str:
    """A response in think and answer tags: as it is, with a missing think tag added, or bare text as the answer."""
    if parse_response(text, ()).is_well_formed:
        return text
    if not _ANY_TAG.search(text):
        if len(split_annotations(text)) > 1:
            raise ValueError(
                "missing tags: there are calls, but no <think>…</think> and <answer>…</answer> around them"
            )
        return response_of((), plain_answer(text), conversion)
    head, opened, tail = text.partition("<answer>")
    answer, closed, rest = tail.partition("</answer>")
    thoughts = head.strip().removeprefix("<think>").removesuffix("</think>")
    if not (opened and closed) or rest.strip() or _ANY_TAG.search(thoughts + answer):
        raise ValueError("missing tags: the answer must be <think>…</think> and then <answer>…</answer>")
    conversion.lost.add(TAGS if thoughts.strip() else NO_REASONING)
    return f"<think>{thoughts}</think>\n\n<answer>{answer}</answer>"


def note_lost_reasoning(response: str, conversion: Conversion) -> None:
    """For a format without reasoning: notes where there was some besides calls."""
    thoughts = parse_response(response, ()).think_content
    if any(isinstance(part, str) and part.strip() for part in split_annotations(thoughts)):
        conversion.lost.add(REASONING)


def note_lost_words(response: str, conversion: Conversion) -> None:
    if any(words.strip() not in ("", CALL_WORD) for words in _CALL_WORDS.findall(response)):
        conversion.lost.add(WORDS)


# --------------------------------------------------------------------------------------------------- boxes


def as_box(value: Any) -> Box:
    """Four finite numbers -> Box; raises ValueError for anything else."""
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        raise ValueError(f"malformed box {value!r:.60}: expected [x1, y1, x2, y2]")
    if not all(isinstance(part, (int, float)) and not isinstance(part, bool) for part in value):
        raise ValueError(f"malformed box {value!r:.60}: expected four numbers")
    if not all(abs(part) < 1e6 for part in value):  # NaN too
        raise ValueError(f"malformed box {value!r:.60}: its numbers are not finite, or too large")
    return Box(*map(float, value))


def rounded(box: Box) -> Box:
    return Box(*(round(value, 2) for value in box.as_list()))


def box_text(box: Box) -> str:
    return "[" + ", ".join(f"{value:.10g}" for value in box.as_list()) + "]"


def call_text(box: Box) -> str:
    return f"{{Crop {CALL_WORD} {box_text(box)}}}"


def qwen_size(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """(width, height) of an image as Qwen2.5-VL's processor delivers it: multiples of 28, at least 3,136 pixels."""
    from qwen_vl_utils.vision_process import smart_resize

    height, width = smart_resize(size[1], size[0], QWEN_FACTOR, QWEN_MIN_PIXELS, max_pixels)
    return width, height


# ------------------------------------------------------------------------------------------------ images


@lru_cache(maxsize=4096)
def image_size(path: str, folder: str) -> tuple[int, int]:
    """(width, height) of an image as `load_image` gives it, upright, from its header alone.

    Raises:
        ValueError: for a path that leaves the folder, or a file that is no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(resolve_image_path(path, folder)) as image:
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # EXIF orientation: it lies on its side
            return image.size[::-1] if turned else image.size
    except FileNotFoundError:
        raise ValueError(f"missing image {path} in {folder}") from None
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"unreadable image {path}: {error}") from None


def save_image(data: bytes, folder: str | Path) -> str:
    """Write an image file that came as bytes, named by its content; the name, relative to `folder`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = str(image.format).lower()
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"unreadable image of {len(data):,} bytes: {type(error).__name__}") from None
    name = f"{hashlib.sha256(data).hexdigest()[:32]}.{'jpg' if kind == 'jpeg' else kind}"
    if not Path(folder, name).is_file():
        write_whole(Path(folder, name), data)
    return name


def take_image(value: Any, conversion: Conversion) -> str:
    """The image path of our row for a path, an image's bytes, or a set's `{bytes, path}`; or for a list of one of them.

    A path beside bytes is never followed; one without bytes only inside a local set's own folder.
    """
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"{len(value)} images: a row here has exactly one")
        value = value[0]
    folder = conversion.config.image_folder
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if data is None and isinstance(path, str) and conversion.source_folder is not None:
            inside = resolve_image_path(path, conversion.source_folder)
            if not inside.is_file():
                raise ValueError(f"missing image {path}")
            data = inside.read_bytes()
        value = data
    if isinstance(value, bytes):
        return save_image(value, folder)
    if isinstance(value, str) and value:
        return value
    raise ValueError("the image must be a path, or an image's bytes")


@lru_cache(maxsize=1)
def last_image(path: str, folder: str) -> Image:
    """`load_image`, decoded once for the crops of a row, which follow each other."""
    return load_image(path, folder)


def save_crop(box: Box, path: str, conversion: Conversion) -> str:
    """Cut a region (original pixels) and write it beside the images; its path, relative to the image folder."""
    folder = conversion.config.image_folder
    image = last_image(path, folder)
    outcome, region = resolve_box(box, image.size, CropContract().min_crop_side)
    if region is None:
        raise ValueError(f"{outcome} box {box_text(box)}: the image is {image.size[0]} x {image.size[1]}")
    buffer = io.BytesIO()
    image.crop(tuple(int(value) for value in region.as_list())).save(buffer, "PNG")
    return f"crops/{save_image(buffer.getvalue(), Path(folder, 'crops'))}"
