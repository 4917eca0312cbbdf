"""Questions to evaluate on: this project's JSONL, or V*Bench, HR-Bench, TextVQA, ScienceQA as they are distributed.

What is read, and nothing is downloaded:

- JSONL: `image_path`, `QnA: [{"Q", "A3"}]`; a `category` of the row or the entry where there is one.
- V*Bench (huggingface.co/datasets/craigwu/vstar_bench): `direct_attributes/` and `relative_position/`, images with a
  JSON file each, and `test_questions.jsonl`, whose order of options is taken where that file is present.
- HR-Bench (huggingface.co/datasets/DreamMr/HR-Bench): `hr_bench_4k.tsv`, `hr_bench_8k.tsv`, or both in one folder.
- TextVQA (textvqa.org): `TextVQA_0.5.1_val.json` (or `_train`) and `train_images/`.
- ScienceQA (github.com/lupantech/ScienceQA): `problems.json`, `pid_splits.json`, `images/<split>/<id>/`; questions with
  an image.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import SettingsError, require
from conversation import Example, load_image
from crop_tool import Box

if TYPE_CHECKING:
    from PIL.Image import Image

LETTERS = "ABCDEFGHIJ"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
VSTAR_FOLDERS = ("direct_attributes", "relative_position")
HR_FILES = {"HR-Bench 4K": "hr_bench_4k.tsv", "HR-Bench 8K": "hr_bench_8k.tsv"}
HR_COLUMNS = ("index", "question", "answer", "category", "cycle_category", "image")
TEXTVQA_FILES = ("TextVQA_0.5.1_val.json", "TextVQA_0.5.1_train.json")
TEXTVQA_IMAGES = ("train_images", "train_val_images/train_images", "images/train_images", "images")


@dataclass(frozen=True)
class Question:
    """One question with its picture.

    name: unique in its set, and the same each time the set is read.
    text: as it is asked, options included.
    answers: the expected answer; TextVQA's are those of ten people, and an answer counts as far as they agree with it.
    load: gives the original image; raises ValueError where it cannot be read.
    boxes: annotated regions in ORIGINAL pixels; may be empty.
    group: questions of one group are one draw of the confidence interval (HR-Bench asks each four times).
    """

    name: str
    text: str
    answers: tuple[str, ...]
    load: Callable[[], Image] = field(repr=False, compare=False)
    boxes: tuple[Box, ...] = ()
    category: str = ""
    group: str = ""


@dataclass(frozen=True)
class QuestionSet:
    """What a path holds. faults: what was left out, and why, one line each."""

    kind: str
    questions: tuple[Question, ...]
    faults: tuple[str, ...] = ()

    def digest(self) -> str:
        """Changes with anything that is asked or expected (not with pixels)."""
        parts = [(item.name, item.text, item.answers, [box.as_list() for box in item.boxes]) for item in self.questions]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def limited(self, limit: int) -> QuestionSet:
        """So many questions, drawn evenly from the whole set; 0: all."""
        total = len(self.questions)
        if not 0 < limit < total:
            return self
        chosen = tuple(self.questions[place * total // limit] for place in range(limit))
        return QuestionSet(self.kind, chosen, self.faults)


def read_questions(
    path: str | Path, image_base: str | Path | None = None, answer_key: str = "A3", split: str = "test"
) -> QuestionSet:
    """The questions of a JSONL file, of an HR-Bench TSV, or of a benchmark's folder.

    Raises:
        SettingsError: where there is nothing to read, or nothing that is known.
    """
    path = Path(path)
    require(path.exists(), f"data is {path}, but there is no such file or folder")
    if path.is_file():
        if path.suffix == ".tsv":
            return _hr_bench([path])
        require(path.suffix == ".jsonl", f"data is {path}, but a file must be a .jsonl, or HR-Bench's .tsv")
        return _jsonl(path, image_base or path.parent, answer_key)
    if any((path / name).is_dir() for name in VSTAR_FOLDERS):
        return _vstar(path)
    if tables := [path / name for name in HR_FILES.values() if (path / name).is_file()]:
        return _hr_bench(tables)
    if table := next((path / name for name in TEXTVQA_FILES if (path / name).is_file()), None):
        return _textvqa(table)
    for folder in (path, path / "data/scienceqa", path / "scienceqa"):
        if (folder / "problems.json").is_file():
            return _science_qa(folder, split)
    raise SettingsError(
        f"data is the folder {path}, which holds none of: {', '.join(VSTAR_FOLDERS)} (V*Bench), "
        f"{', '.join(HR_FILES.values())} (HR-Bench), {TEXTVQA_FILES[0]} (TextVQA), problems.json (ScienceQA)"
    )


def _gather(kind: str, made: Iterable[Question | str]) -> QuestionSet:
    items = list(made)
    questions = tuple(item for item in items if isinstance(item, Question))
    faults = tuple(item for item in items if isinstance(item, str))
    require(bool(questions), f"{kind}: no question could be read: {'; '.join(faults[:3]) or 'there is none'}")
    return QuestionSet(kind, questions, faults)


def _from_file(path: Path, base: Path) -> Callable[[], Image]:
    return lambda: load_image(path.relative_to(base), base)


def _with_options(question: str, options: Iterable[str]) -> str:
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, "Answer with the letter of the right option."])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read as JSON: {error}") from None


# ------------------------------------------------------------------------------------------------ our JSONL


def _jsonl(path: Path, base: str | Path, answer_key: str) -> QuestionSet:
    def rows() -> Iterator[Question | str]:
        with open(path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                if raw.strip():
                    yield from _jsonl_row(line, raw, base, answer_key)

    return _gather("JSONL", rows())


def _jsonl_row(line: int, raw: bytes, base: str | Path, answer_key: str) -> Iterator[Question | str]:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
        image_path, entries = row["image_path"], row["QnA"]
        if not isinstance(entries, list):
            raise ValueError(f"'QnA' must be a list, this is {entries!r:.40}")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        yield f"line {line}: {type(error).__name__}: {error}"
        return
    for number, entry in enumerate(entries):
        try:
            if not isinstance(entry, dict):
                raise ValueError(f"a QnA entry must be an object, this is {entry!r:.40}")
            for key in ("Q", answer_key):
                if entry[key] is None or not str(entry[key]).strip():
                    raise ValueError(f"{key!r} is empty")
            str(entry["Q"]).encode()  # raises for half a surrogate pair, which has no tokens
            example = Example(line, number, str(image_path), str(entry["Q"]), str(entry[answer_key]))
            if "<answer>" not in example.response and "<think>" in example.response:
                raise ValueError("there is no <answer> in it")
            question = question_of(example, base, str(entry.get("category", row.get("category", ""))))
        except (ValueError, TypeError, LookupError) as error:
            yield f"line {line}, QnA[{number}]: {type(error).__name__}: {error}"
            continue
        yield question


def question_of(example: Example, base: str | Path, category: str = "") -> Question:
    """The question of an example of this project's JSONL.

    Raises:
        ValueError: for an annotation that cannot be read.
    """
    answer = example.answer or example.response.strip()  # a set for evaluation may hold bare answers

    def load() -> Image:
        return load_image(example.image_path, base)

    return Question(example.name, example.question, (answer,), load, example.boxes, category, example.name)


# ------------------------------------------------------------------------------------------------- V*Bench


def _vstar(folder: Path) -> QuestionSet:
    """The right option stands first in the JSON files; without the official order they are shuffled, by name."""
    official = {}
    if (folder / "test_questions.jsonl").is_file():
        lines = (folder / "test_questions.jsonl").read_text(encoding="utf-8-sig").splitlines()
        official = {row["image"]: row for row in map(json.loads, filter(str.strip, lines))}
    images = [
        image
        for name in VSTAR_FOLDERS
        for image in sorted((folder / name).glob("*"))
        if image.suffix.lower() in IMAGE_SUFFIXES
    ]
    return _gather("V*Bench", (_vstar_question(image, folder, official) for image in images))


def _vstar_question(image: Path, folder: Path, official: dict[str, Any]) -> Question | str:
    name = image.relative_to(folder).as_posix()
    try:
        notes = json.loads(image.with_suffix(".json").read_text(encoding="utf-8"))
        options = [str(option) for option in notes["options"]]
        right = options[0]
        boxes = tuple(Box(x, y, x + width, y + height) for x, y, width, height in notes["bbox"])
        if name in official:
            letter = official[name]["label"]
            text = official[name]["text"]
        else:
            random.Random(name).shuffle(options)
            letter, text = LETTERS[options.index(right)], _with_options(str(notes["question"]), options)
    except (OSError, ValueError, TypeError, LookupError) as error:
        return f"{name}: {type(error).__name__}: {error}"
    return Question(name, text, (f"{letter}. {right}",), _from_file(image, folder), boxes, image.parent.name, name)


# ------------------------------------------------------------------------------------------------ HR-Bench


def _hr_bench(tables: list[Path]) -> QuestionSet:
    kinds = {name: kind for kind, name in HR_FILES.items()}
    kind = kinds.get(tables[0].name, "HR-Bench") if len(tables) == 1 else "HR-Bench"
    several = len(tables) > 1
    return _gather(kind, (item for table in tables for item in _hr_questions(table, several)))


def _hr_questions(table: Path, several: bool) -> Iterator[Question | str]:
    """Images stay in the file (2 to 5 GB of base64): a question keeps the place of its row."""
    for place, row in _tsv_rows(table):
        missing = [name for name in HR_COLUMNS if row.get(name) is None]
        require(not missing, f"{table} has no column {', '.join(missing)}: it is no HR-Bench table, or it is cut off")
        options = [row[letter] for letter in LETTERS if row.get(letter)]
        letter = row["answer"].strip()
        name = f"{table.stem}:{row['index']}"
        if letter not in LETTERS[: len(options)]:
            yield f"{name}: the answer is {letter!r}, but there are {len(options)} options"
            continue
        answer = f"{letter}. {row[letter]}"
        picture = hashlib.sha256(row["image"].encode()).hexdigest()[:16]
        category = f"{table.stem}/{row['category']}" if several else row["category"]

        def load(place: int = place, name: str = name) -> Image:
            return _hr_image(table, place, name)

        yield Question(name, _with_options(row["question"], options), (answer,), load, (), category, picture)


def _tsv_rows(table: Path, start: int = 0) -> Iterator[tuple[int, dict[str, str]]]:
    """Byte offset and columns of each row from byte `start` on (0: behind the header)."""
    csv.field_size_limit(2**31 - 1)
    with open(table, "rb") as file:

        def lines() -> Iterator[str]:
            while raw := file.readline():
                yield raw.decode("utf-8-sig")

        reader = csv.reader(lines(), delimiter="\t")
        header = next(reader, [])
        if start:
            file.seek(start)
        while True:
            place = file.tell()
            row = next(reader, None)
            if row is None:
                return
            yield place, dict(zip(header, row, strict=False))


def _hr_image(table: Path, place: int, name: str) -> Image:
    from PIL import Image, UnidentifiedImageError

    _, row = next(_tsv_rows(table, place))
    try:
        with Image.open(io.BytesIO(base64.b64decode(row["image"], validate=True))) as image:
            return load_image(image)
    except (binascii.Error, OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"unreadable image of {name}: {error}") from None


# ------------------------------------------------------------------------------------- TextVQA, ScienceQA


def _textvqa(table: Path) -> QuestionSet:
    folder = next((table.parent / name for name in TEXTVQA_IMAGES if (table.parent / name).is_dir()), None)
    require(
        folder is not None, f"there is no folder {TEXTVQA_IMAGES[0]} beside {table}: unpack train_val_images.zip there"
    )

    def question(item: dict[str, Any]) -> Question | str:
        try:
            name, answers = str(item["question_id"]), tuple(str(answer) for answer in item["answers"])
            text = f"{item['question']}\nAnswer with a word or a short phrase."
            image = folder / f"{item['image_id']}.jpg"
        except (TypeError, LookupError) as error:
            return f"a question of {table.name}: {type(error).__name__}: {error}"
        return Question(name, text, answers, _from_file(image, folder), (), "", name)

    return _gather("TextVQA", map(question, _read_json(table)["data"]))


def _science_qa(folder: Path, split: str) -> QuestionSet:
    problems, splits = _read_json(folder / "problems.json"), _read_json(folder / "pid_splits.json")
    require(split in splits, f"split is {split!r}, but ScienceQA has: {', '.join(splits)}")
    base = folder / "images" if (folder / "images").is_dir() else folder
    asked = [number for number in splits[split] if problems[number]["image"]]

    def question(number: str) -> Question | str:
        problem = problems[number]
        try:
            options = [str(choice) for choice in problem["choices"]]
            answer = f"{LETTERS[problem['answer']]}. {options[problem['answer']]}"
            hint = str(problem.get("hint") or "").strip()
            text = _with_options(f"{hint}\n{problem['question']}".strip(), options)
            image = base / problem["split"] / number / problem["image"]
        except (TypeError, LookupError) as error:
            return f"problem {number}: {type(error).__name__}: {error}"
        return Question(number, text, (answer,), _from_file(image, base), (), str(problem.get("subject", "")), number)

    found = _gather(f"ScienceQA {split}", map(question, asked))
    without = len(splits[split]) - len(asked)
    note = (f"{without} questions without an image were left out",) if without else ()
    return QuestionSet(found.kind, found.questions, found.faults + note)
