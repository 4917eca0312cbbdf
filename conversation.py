"""The one writer of the conversation: text, images and calls <-> token ids, labels and model inputs.

SFT, rollouts, scoring and inference all get their tokens from `Renderer`.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import EpsImagePlugin, Image, ImageFile, ImageOps

from crop_tool import (
    CALL_CLOSE,
    CALL_OPEN,
    Box,
    CropContract,
    Frame,
    ToolCall,
    format_box,
    image_token_count,
    resolve_box,
    run_call,
    show_image,
    shown_crop_size,
    split_annotations,
)
from response_format import parse_response

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2_5_VLProcessor

IMAGE_PAD, VISION_START, VISION_END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
VIDEO_PAD, END_OF_TURN = "<|video_pad|>", "<|im_end|>"
# Text of the data or a user that would be read as these tokens would break the image bookkeeping.
RESERVED_TOKENS = (IMAGE_PAD, VISION_START, VISION_END, VIDEO_PAD, "<|im_start|>", END_OF_TURN)
IMAGE_TOKENS = (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END)  # the model never writes one of these
IGNORED = -100  # label of a token without loss
# Of an image behind a URL: seconds of silence, seconds in which it must have come, and the most bytes.
URL_TIMEOUT, URL_SECONDS, URL_BYTES = 30, 300, 64 * 1024 * 1024
# A truncated image is an error, never a picture with a grey lower half.
ImageFile.LOAD_TRUNCATED_IMAGES = False
EpsImagePlugin.gs_binary = False  # PostScript is a program: Pillow would have Ghostscript run it


# ------------------------------------------------------------------------------------------------ images


def load_image(source: str | Path | Image.Image, base: str | Path | None = None) -> Image.Image:
    """An image as RGB in its original pixels, upright, alpha over white.

    source: a PIL image, a data URI, a URL, or a path, relative to `base` if given.

    Raises:
        ValueError: for a path that leaves `base`, a missing file, or one that cannot be decoded whole.
    """
    if isinstance(source, Image.Image):
        return _as_rgb(source)
    if not isinstance(source, str | Path):
        raise ValueError(
            f"the image is a {type(source).__name__}, but it must be a PIL image, a path, a URL or a data URI"
        )
    text = str(source)
    is_path = not text.startswith(("http://", "https://", "data:image"))
    path = resolve_image_path(text, base) if is_path else None
    try:
        with _open(path if is_path else text) as image:
            return _as_rgb(image)
    except FileNotFoundError:
        raise ValueError(f"missing image {text}") from None
    except MemoryError:
        raise
    except Exception as error:  # whatever broken bytes lead a decoder into
        is_data = text.startswith("data:")  # which may have megabytes
        named = getattr(error, "strerror", None) or str(error).partition("\n")[0]  # the former without the path
        reason = type(error).__name__ if is_data else named or type(error).__name__
        shown = f"{text:.80}" if is_data or len(text) > 1000 else text
        raise ValueError(f"unreadable image {shown}: {reason}") from None


def _open(source: Path | str) -> Image.Image:
    """The image at a path, at a URL or in a data URI, in its original size; more than 179 megapixels are refused."""
    if isinstance(source, Path):
        if source.exists() and not (source.is_file() or source.is_dir()):  # reading a pipe would wait for ever
            raise ValueError("it is no file")
        return Image.open(source)
    if source.startswith("data:image"):
        return Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))
    return Image.open(io.BytesIO(_fetched(source)))


def _fetched(url: str) -> bytes:
    """What is behind a URL. A host that stalls, trickles, or sends without end, must not hold a training run."""
    import httpx2

    content, end = bytearray(), time.monotonic() + URL_SECONDS
    with httpx2.stream("GET", url, follow_redirects=True, timeout=URL_TIMEOUT) as reply:
        reply.raise_for_status()
        for piece in reply.iter_bytes():
            content += piece
            if len(content) > URL_BYTES:
                raise ValueError(f"more than {URL_BYTES:,} bytes")
            if time.monotonic() > end:
                raise ValueError(f"not complete after {URL_SECONDS} s")
    return bytes(content)


def resolve_image_path(path: str, base: str | Path | None) -> Path:
    """`path` inside `base`, symbolic links followed; without a base any path is allowed.

    Raises:
        ValueError: for a path that leaves the base folder.
    """
    if base is None:
        return Path(path)
    if "\0" in path:
        raise ValueError(f"image path {path!r} holds a null character")
    root = Path(base).resolve()
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root):
        raise ValueError(f"image path {path} leaves the base folder {base}")
    return resolved


def _as_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F"):
        raise ValueError("its values have 32 bits, whose range is not known: save it with 8 or 16")
    if upright.mode.startswith("I;16"):
        return _of_16_bits(upright)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return upright.convert("RGB")


def _of_16_bits(grey: Image.Image) -> Image.Image:
    """Scaled to 8 bits; Pillow would clip at 255, all white."""
    import numpy as np

    values = np.asarray(grey.convert("I"))
    shown = Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in grey.info:
        shown.paste("white", mask=Image.fromarray(values == grey.info["transparency"]))
    return shown


# ---------------------------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class Example:
    """One QnA entry of a data file. `line` counts from 1, `entry` from 0; boxes are in ORIGINAL pixels."""

    line: int
    entry: int
    image_path: str
    question: str
    response: str  # annotated: {Crop … [x1, y1, x2, y2]}

    @property
    def name(self) -> str:
        return f"line {self.line}, QnA[{self.entry}]"

    @property
    def answer(self) -> str:
        return parse_response(self.response, ()).answer_content

    @property
    def boxes(self) -> tuple[Box, ...]:
        return tuple(part for part in split_annotations(self.response) if isinstance(part, Box))


@dataclass(frozen=True)
class EncodedExample:
    """Token ids and labels (equal lengths, `IGNORED` where no loss is taken) and the shown images in order."""

    input_ids: list[int]
    labels: list[int]
    images: tuple[Image.Image, ...]
    name: str = ""


@dataclass(frozen=True)
class Prompt:
    """What the engine goes on from.

    ids: tokens up to where the model begins to write.
    images: shown images, one for each image block in `ids`, in order.
    original: the original image, from which crops are cut.
    """

    ids: list[int]
    images: tuple[Image.Image, ...]
    original: Image.Image


class Renderer:
    """Writes the conversation as tokens, following the chat template and the crop contract."""

    def __init__(self, processor: Qwen2_5_VLProcessor, contract: CropContract) -> None:
        self.processor, self.contract, self.tokenizer = processor, contract, processor.tokenizer
        self.ids = {
            token: self.tokenizer.convert_tokens_to_ids(token) for token in (CALL_OPEN, CALL_CLOSE, *RESERVED_TOKENS)
        }

    def text_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def image_block(self, size: tuple[int, int]) -> list[int]:
        """The tokens of one shown image of `size` (width, height): start, pads, end."""
        pads = image_token_count(*size, self.contract)
        return [self.ids[VISION_START], *[self.ids[IMAGE_PAD]] * pads, self.ids[VISION_END]]

    def messages(self, question: str) -> list[dict[str, Any]]:
        """The chat messages of a first question: system text, then the image and the question."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return [
            {"role": "system", "content": self.contract.system_text()},
            {"role": "user", "content": content},
        ]

    def _with_image_blocks(self, text: str, sizes: Sequence[tuple[int, int]]) -> list[int]:
        pieces = text.split(VISION_START + IMAGE_PAD + VISION_END)
        assert len(pieces) == len(sizes) + 1, f"{len(sizes)} images, but {len(pieces) - 1} places for them"
        ids = self.text_ids(pieces[0])
        for size, piece in zip(sizes, pieces[1:], strict=True):
            ids += self.image_block(size) + self.text_ids(piece)
        return ids

    def prompt(self, question: str, original: Image.Image, shown: Image.Image | None = None) -> Prompt:
        """System text, image and question, up to where the assistant begins.

        shown: `show_image` of the original, where that is at hand.

        Raises:
            ValueError: for a question that contains one of the reserved tokens.
        """
        refuse_reserved(question, "the question")
        shown = shown or show_image(original, self.contract)
        text = self.processor.apply_chat_template(self.messages(question), add_generation_prompt=True, tokenize=False)
        return Prompt(self._with_image_blocks(text, [shown.size]), (shown,), original)

    def follow_up(self, prompt: Prompt, completion_ids: list[int], images: Sequence, question: str) -> Prompt:
        """The prompt of a further question, after a finished answer: nothing written before is encoded again.

        images: all shown images so far, those of `prompt` and the crops of the answer.
        """
        refuse_reserved(question, "the question")
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        # The template puts a default system turn in front of a conversation that has none.
        turn = text[text.index("<|im_start|>user") :]
        done = list(completion_ids)
        if done and done[-1] in (self.ids[END_OF_TURN], self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            done.pop()
        done.append(self.ids[END_OF_TURN])
        return Prompt(prompt.ids + done + self.text_ids("\n" + turn), tuple(images), prompt.original)

    def encode(self, example: Example, original: Image.Image) -> EncodedExample:
        """An annotated example as SFT sees it: loss on the model's own text only.

        Raises:
            ValueError: for a response with a malformed call, or one whose region is not in the image.
        """
        prompt = self.prompt(example.question, original)
        ids, labels, images = list(prompt.ids), [IGNORED] * len(prompt.ids), list(prompt.images)

        def write(new: list[int], own: bool) -> None:
            ids.extend(new)
            labels.extend(new if own else [IGNORED] * len(new))

        frame = Frame.of(original.size, self.contract)
        pending = ""
        for part in split_annotations(example.response.strip()):
            if isinstance(part, str):
                pending += part
                continue
            written = format_box(frame.to_model(part))
            call, crop = run_call(ToolCall(written, 0, "parsed"), original, self.contract)
            # The annotation is held against the image too: written in whole numbers, no box is empty or outside.
            outcome, region = resolve_box(part, original.size, self.contract.min_crop_side)
            if region is None or crop is None:
                reason = outcome if region is None else call.outcome
                raise ValueError(f"{reason} box {part.as_list()} in an image of {original.width} x {original.height}")
            write(self.text_ids(pending + CALL_OPEN + written + CALL_CLOSE), own=True)
            write(self.image_block(crop.size), own=False)
            images.append(crop)
            pending = ""
        write([*self.text_ids(pending), self.ids[END_OF_TURN]], own=True)
        return EncodedExample(ids, labels, tuple(images), example.name)

    def length(self, example: Example, size: tuple[int, int]) -> int:
        """Tokens of the encoded example, from the image's original size alone (no pixels needed)."""
        frame = Frame.of(size, self.contract)
        text = example.question + self.contract.system_text()
        total = image_token_count(*frame.shown, self.contract) + 24  # the template's own tokens, at most
        for part in split_annotations(example.response.strip()):
            if isinstance(part, str):
                text += part
                continue
            written = frame.to_model(part)  # its rounded numbers decide which region is cut
            outcome, region = resolve_box(frame.to_original(written), size, self.contract.min_crop_side)
            if region is None:
                raise ValueError(f"{outcome} box {part.as_list()} in an image of {size[0]} x {size[1]}")
            crop = shown_crop_size(int(region.width), int(region.height), self.contract)
            text += CALL_OPEN + format_box(written) + CALL_CLOSE
            total += image_token_count(*crop, self.contract) + 2
        return total + len(self.text_ids(text))


def refuse_reserved(text: str, what: str) -> None:
    for token in RESERVED_TOKENS:
        if token in text:
            raise ValueError(f"{what} contains the reserved token {token}: remove it")


def cut_to_length(encoded: EncodedExample, renderer: Renderer, max_length: int) -> EncodedExample:
    """Cut the end off: text at a token, never inside a crop block; blocks that go take their images along.

    Raises:
        ValueError: where not even the prompt and one token of the response fit.
    """
    if len(encoded.input_ids) <= max_length:
        return encoded
    first = next(index for index, label in enumerate(encoded.labels) if label != IGNORED)
    end, inside = 0, False
    for index, token in enumerate(encoded.input_ids[:max_length]):
        inside = token == renderer.ids[VISION_START] or (inside and token != renderer.ids[VISION_END])
        if not inside:
            end = index + 1
    if end <= first:
        raise ValueError(f"too long: the prompt alone takes {first} of max_length={max_length} tokens")
    kept = encoded.input_ids[:end].count(renderer.ids[VISION_START])
    return replace(
        encoded, input_ids=encoded.input_ids[:end], labels=encoded.labels[:end], images=encoded.images[:kept]
    )


# ------------------------------------------------------------------------------------------ model inputs


def check_image_tokens(ids: Sequence[int], images: Sequence[Image.Image], renderer: Renderer, name: str) -> None:
    """Image tokens and image features must agree in every row.

    Raises:
        ValueError: naming the row.
    """
    pads = sum(token == renderer.ids[IMAGE_PAD] for token in ids)
    features = sum(image_token_count(*image.size, renderer.contract) for image in images)
    if pads != features:
        raise ValueError(f"{name}: {pads} image tokens, but {len(images)} images with {features} features")


def model_inputs(rows: Sequence[EncodedExample], renderer: Renderer) -> dict[str, torch.Tensor]:
    """Right-padded batch: input_ids, attention_mask, mm_token_type_ids, labels (rows, seq); pixels and grids."""
    import torch

    for row in rows:
        check_image_tokens(row.input_ids, row.images, renderer, row.name)
    width = max(len(row.input_ids) for row in rows)
    pad = renderer.tokenizer.pad_token_id
    ids = torch.tensor([row.input_ids + [pad] * (width - len(row.input_ids)) for row in rows])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows])
    labels = torch.tensor([row.labels + [IGNORED] * (width - len(row.labels)) for row in rows])
    pixels = renderer.processor.image_processor(
        images=[image for row in rows for image in row.images], return_tensors="pt"
    )
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == renderer.ids[IMAGE_PAD]).int(),
        "labels": labels,
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
    }
