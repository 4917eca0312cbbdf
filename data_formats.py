"""Rows of other projects' data files <-> rows of ours. Files and the command: `convert_data.py`.

Our row: `{"image_path": …, "QnA": [{"Q": …, "A3": …}]}`; boxes in pixels of the original image. Where each format was
read, and in which frame its boxes are:

- `vlir` (VLM-R3, github.com/justgogorunrun/VLM-R3): `image_path`, `question`, `response_list`, `img_crop_list`, read in
  qwen_vl_finetune/qwenvl/data/data_qwen.py. Text and crops alternate; a box is `{"bbox_2d": [x1, y1, x2, y2]}` at the
  end of a text, in pixels of the image as Qwen2.5-VL's own processor sizes it (src/model/r3_vllm.py maps them back;
  sft_7b.sh gives 3,136 to 1,605,632 pixels). They are mapped to original pixels and back.
- `visual_cot` (Visual-CoT, github.com/deepcs233/Visual-CoT): `viscot_363k.json` as written by
  tools/convert_data_to_llava_format.py. The box stands twice: behind `###` in original pixels, and as the first answer,
  in shares of the image padded to a square with the image in its middle. The first is read where it is there.
- `llava` (github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md) and ShareGPT: `image` or `images`, and
  `conversations` of `from` and `value`. `messages` (github.com/hiyouga/LLaMA-Factory, data/README.md): `messages` of
  `role` and `content`, and `images`. Each is read as either. Our answers are carried as they are, calls as text.
- `deepeyes` (github.com/Visual-Agent/DeepEyes, verl/utils/dataset/rl_dataset.py): parquet with `prompt`, `images`
  (bytes), `reward_model.ground_truth` and `extra_info`; a question and its answer, no boxes and no reasoning.
- `hub`: a set that `datasets.load_dataset` reads, by a map of its columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import SettingsError
from conversation import resolve_image_path
from crop_tool import Box, Frame, format_box, parse_box, split_annotations
from format_parts import (
    CALLS,
    ROW_KEYS,
    Conversion,
    Row,
    answer_of,
    as_box,
    box_text,
    call_text,
    entries,
    further,
    get,
    note_lost_reasoning,
    note_lost_words,
    others,
    plain_answer,
    qwen_size,
    response_of,
    rounded,
    save_crop,
    single_entries,
    take_image,
    with_tags,
)
from response_format import parse_response

IMAGE_MARK = "<image>"
# The question's fixed second half, by which Visual-CoT's own loader cuts it.
BOX_REQUEST = " Please provide the bounding box coordinate of the region that can help you answer the question better."
_BOX_REQUEST = re.compile(
    r"\s*Please (?:think step by step and )?provide the bounding box coordinate of the region\b.*", re.DOTALL
)
_TOOL_REQUEST = re.compile(r"\s*Think first, call \*\*image_zoom_in_tool\*\*.*", re.DOTALL)  # ends DeepEyes' questions
_BOX_JSON = re.compile(r'(?:```json\s*)?(\{[^{}]*"bbox_2d"[^{}]*\})(?:\s*```)?')

# What a row can lose beyond the list of `format_parts`.
TURNS = "had several turns: each became a question of its own, which does not see the ones before"
JOINED = "had several questions, which became turns of one conversation"
SYSTEM = "lost their system prompt"
UNITED = "had several boxes, of which their common bounding box is kept"
BESIDE_BOX = "lost words beside their box or crop"
CLAMPED = "had a box beyond the image, which was clamped"


# -------------------------------------------------------------------------------------------------- ours


def read_ours(row: Row, conversion: Conversion) -> Row:
    return row


def write_ours(row: Row, conversion: Conversion) -> list[Row]:
    return [row]


# ------------------------------------------------------------------------------------------- VLIR (VLM-R3)


_VLIR_KEYS = ("image_path", "question", "response_list", "img_crop_list")


def read_vlir(row: Row, conversion: Conversion) -> Row:
    path, question = get(row, "image_path", str), get(row, "question", str)
    parts = get(row, "response_list", list)
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("response_list must be a list of text")
    text = "".join(parts)
    if split_annotations(text) != [text]:
        raise ValueError("response_list holds calls of our own form besides bbox_2d")
    crops, count = row.get("img_crop_list"), 0

    def call(match: re.Match[str]) -> str:
        nonlocal count
        count += 1
        try:
            box = as_box(json.loads(match.group(1)).get("bbox_2d"))
        except (json.JSONDecodeError, RecursionError):
            raise ValueError(f"malformed box {match.group(1)[:60]!r}: it is not JSON") from None
        return call_text(conversion.original_box(box, path, conversion.config.box_frame or "qwen"))

    text = _BOX_JSON.sub(call, text)
    if "bbox_2d" in text:
        raise ValueError("malformed box: bbox_2d stands outside of a JSON object")
    if isinstance(crops, list) and len(crops) != count:
        raise ValueError(f"response_list has {count} boxes, but img_crop_list has {len(crops)} crops")
    entry = conversion.entry(question, with_tags(text, conversion))
    return {"image_path": path, "QnA": [entry], **others(row, *_VLIR_KEYS)}


def write_vlir(row: Row, conversion: Conversion) -> list[Row]:
    path, made = row["image_path"], []
    beside = further(row, conversion, *_VLIR_KEYS[1:])
    for question, response in single_entries(row, conversion):
        note_lost_words(response, conversion)
        texts, crops = [], []
        parts = split_annotations(response)
        for text, box in zip(parts[0::2], [*parts[1::2], None], strict=True):
            if "bbox_2d" in text:
                raise ValueError("the answer holds bbox_2d as text")
            if box is not None:
                size = conversion.size(path)
                frame = Frame("resized", size, qwen_size(size, conversion.config.box_max_pixels))
                text += f'{{"bbox_2d": {format_box(frame.to_model(box))}}}'
                crops.append(save_crop(box, path, conversion))
            texts.append(text)
        values = (path, question, texts, crops)
        made.append(dict(zip(_VLIR_KEYS, values, strict=True)) | beside)
    return made


# ---------------------------------------------------------------------------------------------- Visual-CoT


def read_visual_cot(row: Row, conversion: Conversion) -> Row:
    images = row.get("image")
    images = [images] if isinstance(images, str) else get(row, "image", list)
    if not all(isinstance(image, str) for image in images) or len(images) > 2:
        raise ValueError("image must be a path, or a path and the same with its box: path###[x1, y1, x2, y2]")
    path, turns = images[0], chat_turns(row, conversion)
    if len(turns) != 2 * len(images):
        raise ValueError(
            f"conversations has {len(turns)} turns, but a row with {len(images)} images has {2 * len(images)}"
        )
    question, boxes = _BOX_REQUEST.sub("", turns[0]), []
    if len(images) == 2:
        boxes = [visual_cot_box(images[1], turns[1], path, conversion)]
        if parse_box(turns[1]) is None or turns[2].strip():
            conversion.lost.add(BESIDE_BOX)
    entry = conversion.entry(question, response_of(boxes, plain_answer(turns[-1]), conversion))
    return {"image_path": path, "QnA": [entry], **others(row, "image", "conversations")}


def visual_cot_box(image: str, answer: str, path: str, conversion: Conversion) -> Box:
    """Original pixels: those behind `###`; else the first answer, whose shares are of the image padded to a square."""
    box = parse_box(image.partition("###")[2])
    if box is not None and sum(box.as_list()) >= 5:  # below that Visual-CoT's loader takes them for shares as well
        return box
    shares = parse_box(answer)
    if shares is None:
        raise ValueError(f"no box: neither {image[-60:]!r} nor the first answer {answer[:60]!r} holds one")
    side, left, top = square(conversion.size(path))
    padded = shares.scaled(side, side)
    return rounded(Box(padded.x1 - left, padded.y1 - top, padded.x2 - left, padded.y2 - top))


def square(size: tuple[int, int]) -> tuple[int, int, int]:
    """Side of the square an image is padded to, and where its left and top border then lie."""
    side = max(size)
    return side, (side - size[0]) // 2, (side - size[1]) // 2


def write_visual_cot(row: Row, conversion: Conversion) -> list[Row]:
    path, made = row["image_path"], []
    beside = further(row, conversion, "image", "conversations")
    for question, response in single_entries(row, conversion):
        answer = answer_of(response)
        refuse_marks(question, answer)
        note_lost_reasoning(response, conversion)
        note_lost_words(response, conversion)
        boxes = [part for part in split_annotations(response) if isinstance(part, Box)]
        image: str | list[str] = path
        said = [question, answer]
        if boxes:
            size = conversion.size(path)
            box = rounded(union_inside(boxes, size, conversion))
            side, left, top = square(size)
            shares = [(value + shift) / side for value, shift in zip(box.as_list(), (left, top) * 2, strict=True)]
            said = [
                question + BOX_REQUEST,
                "[" + ", ".join(f"{share:.3f}" for share in shares) + "]",
                IMAGE_MARK,
                answer,
            ]
            image = [path, f"{path}###{box_text(box)}"]
        made.append({"image": image, "conversations": conversation(said), **beside})
    return made


def union_inside(boxes: list[Box], size: tuple[int, int], conversion: Conversion) -> Box:
    """The boxes' common bounding box, as Visual-CoT itself does, inside the image: its format has no minus sign."""
    if len(boxes) > 1:
        conversion.lost.add(UNITED)
    whole = Box(
        min(box.x1 for box in boxes),
        min(box.y1 for box in boxes),
        max(box.x2 for box in boxes),
        max(box.y2 for box in boxes),
    )
    inside = Box(max(0, whole.x1), max(0, whole.y1), min(size[0], whole.x2), min(size[1], whole.y2))
    if inside.width <= 0 or inside.height <= 0:
        raise ValueError(f"inverted or outside box {box_text(whole)}: the image is {size[0]} x {size[1]}")
    if inside != whole:
        conversion.lost.add(CLAMPED)
    return inside


# ----------------------------------------------------------------- conversations: LLaVA, ShareGPT, messages


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def chat_turns(row: Row, conversion: Conversion) -> list[str]:
    """Texts of user and assistant in turn, without image marks."""
    said = get(row, "conversations" if "conversations" in row else "messages", list)
    turns: list[tuple[str, str]] = []
    for turn in said:
        role = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(f"a turn of {role!r}: only human or user, gpt or assistant, and system are read")
        turns.append((_ROLES[role], turn_text(turn.get("value", turn.get("content")))))
    if turns and turns[0][0] == "system":
        conversion.lost.add(SYSTEM)
        turns = turns[1:]
    if [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2) or not turns:
        raise ValueError("the turns must be question and answer, again and again")
    return [text for _, text in turns]


def turn_text(content: Any) -> str:
    """A turn's text; of a list of parts, that of its text parts."""
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        content = "".join(str(part.get("text", "")) for part in content if part.get("type") == "text")
    if not isinstance(content, str):
        raise ValueError(f"a turn's text is {type(content).__name__}")
    return re.sub(rf"\n?{IMAGE_MARK}\n?", "", content)


def read_chat(row: Row, conversion: Conversion) -> Row:
    images = row.get("image", row.get("images"))
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or len(images) != 1 or not isinstance(images[0], str):
        raise ValueError(f"{len(images) if isinstance(images, list) else 'no'} images: a row here has exactly one path")
    turns = chat_turns(row, conversion)
    if len(turns) > 2:
        conversion.lost.add(TURNS)
    pairs = [
        conversion.entry(question, with_tags(answer, conversion))
        for question, answer in zip(turns[0::2], turns[1::2], strict=True)
    ]
    return {"image_path": images[0], "QnA": pairs, **others(row, "image", "images", "conversations", "messages")}


def refuse_marks(*texts: str) -> None:
    if any(IMAGE_MARK in text for text in texts):
        raise ValueError(f"the text holds {IMAGE_MARK}, which stands for a picture in this format")


def chat_texts(row: Row, conversion: Conversion) -> list[str]:
    said = entries(row, conversion)
    if len(said) > 1:
        conversion.lost.add(JOINED)
    texts = [text for pair in said for text in pair]
    refuse_marks(*texts)
    return texts


def conversation(texts: list[str]) -> list[Row]:
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    turns[0]["value"] = f"{IMAGE_MARK}\n{turns[0]['value']}"
    return turns


def write_llava(row: Row, conversion: Conversion) -> list[Row]:
    beside = further(row, conversion, "image", "conversations")
    said = conversation(chat_texts(row, conversion))
    return [{"id": str(conversion.index), "image": row["image_path"], "conversations": said, **beside}]


def write_messages(row: Row, conversion: Conversion) -> list[Row]:
    turns = conversation(chat_texts(row, conversion))
    said = [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
    return [{"messages": said, "images": [row["image_path"]], **further(row, conversion, "messages", "images")}]


# ------------------------------------------------------------------------------------------------ DeepEyes


def read_deepeyes(row: Row, conversion: Conversion) -> Row:
    about, question = row.get("extra_info"), None
    if isinstance(about, Mapping) and isinstance(about.get("question"), str):
        question = about["question"]
    if not question:
        asked = [turn.get("content") for turn in get(row, "prompt", list) if get(turn, "role", str) == "user"]
        if len(asked) != 1:
            raise ValueError(f"prompt has {len(asked)} questions: a row here has one")
        question = turn_text(asked[0])
    question = _TOOL_REQUEST.sub("", turn_text(question)).strip()
    truth = get(row, "reward_model", dict).get("ground_truth")
    response = with_tags(plain_answer(truth), conversion)
    path = take_image(get(row, "images", list), conversion)
    labels = {key: row[key] for key in ("data_source", "ability") if isinstance(row.get(key), str)}
    return {"image_path": path, "QnA": [conversion.entry(question, response)], **labels}


def write_deepeyes(row: Row, conversion: Conversion) -> list[Row]:
    path = row["image_path"]
    conversion.size(path)  # raises where it is no image
    image = {"bytes": resolve_image_path(path, conversion.config.image_folder).read_bytes(), "path": Path(path).name}
    made = []
    if others(row, "data_source", "ability"):
        conversion.lost.add(ROW_KEYS)
    for question, response in single_entries(row, conversion):
        answer = answer_of(response)
        refuse_marks(question, answer)
        note_lost_reasoning(response, conversion)
        if any(isinstance(part, Box) for part in split_annotations(response)):
            conversion.lost.add(CALLS)
        place = str(conversion.index)
        made.append(
            {
                "data_source": str(row.get("data_source", "vl_agent")),
                "prompt": [
                    {"role": "system", "content": "You are a helpful assistant."},
                    {"role": "user", "content": f"{IMAGE_MARK}\n{question}"},
                ],
                "images": [image],
                "ability": str(row.get("ability", "visual_search")),
                "env_name": "visual_toolbox_v2",
                "reward_model": {"ground_truth": answer, "style": "model"},
                "extra_info": {"answer": answer, "index": place, "question": question, "split": "train"},
            }
        )
    return made


# ------------------------------------------------------------------------------------------- hub sets


HUB_COLUMNS = {"image": "image", "question": "question", "answer": "answer"}  # where --columns does not say otherwise


def parse_columns(text: str | None) -> dict[str, str]:
    """`image=img,question=prompt` -> our names and the set's columns, defaults included.

    Raises:
        SettingsError: for what is no such list, or a name that is not ours.
    """
    columns = dict(HUB_COLUMNS)
    for pair in filter(None, (text or "").split(",")):
        name, equals, column = (part.strip() for part in pair.partition("="))
        if not equals or not column or name not in (*HUB_COLUMNS, "boxes"):
            raise SettingsError(
                f"columns has {pair!r}, but it is a list like image=img,question=prompt,answer=solution,boxes=bbox"
            )
        columns[name] = column
    return columns


def read_hub(row: Row, conversion: Conversion) -> Row:
    missing = [column for column in conversion.columns.values() if column not in row]
    if missing:
        raise SettingsError(
            f"the set has no column {', '.join(missing)}, but {', '.join(row)}: name them with --columns, "
            "as in image=img,question=prompt"
        )
    cells = {name: row[column] for name, column in conversion.columns.items()}
    if not isinstance(cells["question"], str):
        raise ValueError(f"the question is {cells['question']!r:.60}: it must be text")
    answer, boxes = plain_answer(cells["answer"]), box_list(cells.get("boxes"), conversion.config.box_form)
    path = take_image(cells["image"], conversion)
    boxes = [conversion.original_box(box, path, conversion.config.box_frame or "original") for box in boxes]
    if boxes and parse_response(answer, ()).think_content:
        raise ValueError("there are boxes and an answer with reasoning: where in it they belong is not known")
    response = response_of(boxes, answer_of(answer), conversion) if boxes else with_tags(answer, conversion)
    return {"image_path": path, "QnA": [conversion.entry(turn_text(cells["question"]), response)]}


def box_list(value: Any, form: str) -> list[Box]:
    """One box or several, as lists of numbers or as their JSON text; none where there is nothing."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "null")
        except (json.JSONDecodeError, RecursionError):
            raise ValueError(f"malformed box {value!r:.60}: it is not JSON") from None
    if value is None or value == []:
        return []
    boxes = [as_box(item) for item in (value if isinstance(value, list) and isinstance(value[0], list) else [value])]
    return [Box(box.x1, box.y1, box.x1 + box.x2, box.y1 + box.y2) for box in boxes] if form == "xywh" else boxes


# ------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Format:
    """read: a row of the format -> our row. write: our row -> rows of the format; both raise ValueError for a row that
    cannot be. bounds: what the format carries and cannot carry, in a sentence. suffixes: of its files."""

    read: Callable[[Row, Conversion], Row]
    write: Callable[[Row, Conversion], list[Row]] | None
    suffixes: tuple[str, ...]
    bounds: str


_JSON = (".json", ".jsonl")
FORMATS = {
    "jsonl": Format(read_ours, write_ours, (".jsonl",), "reasoning with calls, several questions an image"),
    "vlir": Format(
        read_vlir,
        write_vlir,
        _JSON,
        "reasoning with boxes and crops; not the words of a call; one question a row; boxes in whole pixels of the "
        "image as Qwen's processor sizes it",
    ),
    "visual_cot": Format(
        read_visual_cot, write_visual_cot, _JSON, "one box a row and the answer; no reasoning; one question a row"
    ),
    "llava": Format(read_chat, write_llava, _JSON, "all the text; calls are plain text: its readers cut no crops"),
    "messages": Format(
        read_chat, write_messages, _JSON, "all the text; calls are plain text: its readers cut no crops"
    ),
    "deepeyes": Format(
        read_deepeyes,
        write_deepeyes,
        (".parquet",),
        "image, question and answer; no reasoning and no boxes; one question a row; the description of its tool, which "
        "DeepEyes keeps in each row's system prompt, is not written",
    ),
    "hub": Format(read_hub, None, (), "the mapped columns alone; boxes without reasoning"),
}
