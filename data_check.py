"""JSONL rows -> checked examples. Training and `data_utils.py --check` both go through it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from config import DataConfig, SettingsError, is_main_process, require_apart
from conversation import Example, Renderer, load_image, refuse_reserved
from crop_tool import Box, CropContract, Frame, resolve_box, shown_image_size
from response_format import parse_response

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

MAX_LINE_BYTES = 32 * 1024 * 1024
PART_BYTES = 4 * 1024 * 1024  # what one process is worth starting for
# Files whose rules decide about a row: a kept check is made anew when one of them changes.
RULES = ("data_check.py", "conversation.py", "crop_tool.py", "response_format.py")


@dataclass(frozen=True)
class Checked:
    """One QnA entry of a file after the check; `fault` is "" where there is none."""

    line: int
    entry: int
    image_path: str
    question: str
    response: str
    calls: int
    length: int
    fault: str
    offset: int = 0  # where the line begins, bytes
    width: int = 0  # of the image, original pixels; 0 where it could not be read
    height: int = 0

    @property
    def example(self) -> Example:
        return Example(self.line, self.entry, self.image_path, self.question, self.response)


@dataclass
class Checker:
    """Holds every rule that a data row must keep; training and `--check` both go through it."""

    data: DataConfig
    contract: CropContract
    renderer: Renderer | None = None  # None: token lengths are estimated from the text's length
    load: Callable[[str], Image.Image] | None = None  # original image of a row's path; None: it is read here

    def rows(self, ranges: Iterable[tuple[int, int, int]]) -> Iterator[Checked]:
        """The checked entries of the file's byte ranges `(start, end, first line number)`."""
        for start, end, line in ranges:
            with open(self.data.train_data, "rb") as file:
                file.seek(start)
                while (offset := file.tell()) < end and (raw := next_line(file)):
                    if raw.strip():
                        for checked in self.row(line, raw):
                            yield replace(checked, offset=offset)
                    line += 1

    def row(self, line: int, raw: bytes) -> Iterator[Checked]:
        opened = self._open(line, raw)
        if isinstance(opened, Checked):
            yield opened
            return
        path, entries, image = opened
        for number, entry in enumerate(entries):
            yield self._entry(line, number, path, entry, image.size)

    def draw(self, line: int, entry: int, offset: int) -> tuple[Checked, Image.Image | None]:
        """One entry of the line that begins at `offset`, checked, and its image where that can be read."""
        opened = self._open(line, self._line(offset))
        if isinstance(opened, Checked):
            return replace(opened, offset=offset), None
        path, entries, image = opened
        return replace(self._entry(line, entry, path, entries[entry], image.size), offset=offset), image

    def image_path(self, offset: int) -> str | None:
        """The image of the line that begins at `offset`; None where the line is none of a row."""
        try:
            return self._parse(self._line(offset))[0]
        except ValueError:
            return None

    def _line(self, offset: int) -> bytes:
        with open(self.data.train_data, "rb") as file:
            file.seek(offset)
            return next_line(file)

    def _open(self, line: int, raw: bytes) -> Checked | tuple[str, list[Any], Image.Image]:
        """A line's image path, entries and image; or what is wrong with the line as a whole."""
        path = ""
        try:
            path, entries = self._parse(raw)
            return path, entries, self._image(path)
        except ValueError as error:
            return Checked(line, 0, path, "", "", 0, 0, str(error))

    def _parse(self, raw: bytes) -> tuple[str, list[Any]]:
        row = parse_line(raw)
        for key, kind in (("image_path", str), ("QnA", list)):
            if not isinstance(row.get(key), kind) or not row[key]:
                raise ValueError(
                    f"missing key {key!r}: it must be {'non-empty text' if kind is str else 'a non-empty list'}"
                )
        refuse_surrogates(row["image_path"], "image_path")
        return row["image_path"], row["QnA"]

    def _image(self, path: str) -> Image.Image:
        """The image as it is used, all of it decoded."""
        try:
            image = self.load(path) if self.load else load_image(path, self.data.image_base_path)
        except (OSError, RuntimeError) as error:  # a URL or data URI that gives no image; a link to itself
            raise ValueError(f"unreadable image {path:.80}: {type(error).__name__}") from None
        shown_image_size(*image.size, self.contract)  # raises for a strip that no grid can hold
        return image

    def _entry(self, line: int, number: int, path: str, entry: Any, size: tuple[int, int]) -> Checked:
        empty = Checked(line, number, path, "", "", 0, 0, "", width=size[0], height=size[1])
        if not isinstance(entry, dict):
            return replace(empty, fault=f"missing key 'Q': a QnA entry must be an object, this is {entry!r:.40}")
        for key in ("Q", self.data.answer_key):
            if not isinstance(entry.get(key), str) or not entry[key].strip():
                return replace(empty, fault=f"missing key {key!r}: it must be non-empty text")
            try:
                refuse_surrogates(entry[key], key)
            except ValueError as error:
                return replace(empty, fault=str(error))
        checked = replace(empty, question=entry["Q"], response=entry[self.data.answer_key])
        try:
            calls = self._check_text(checked.example, size)
            length = self._length(checked.example, size)
        except ValueError as error:
            return replace(checked, fault=str(error))
        checked = replace(checked, calls=calls, length=length)
        if length > self.data.max_length and self.data.overlong == "skip":
            return replace(checked, fault=f"too long: {length} tokens, max_length is {self.data.max_length}")
        return checked

    def _check_text(self, example: Example, size: tuple[int, int]) -> int:
        refuse_reserved(example.question, "the question")
        refuse_reserved(example.response, "the answer")
        boxes = example.boxes
        for tag in ("think", "answer"):
            if example.response.count(f"<{tag}>") != 1 or example.response.count(f"</{tag}>") != 1:
                raise ValueError(f"missing tags: the answer needs one <{tag}>…</{tag}>")
        parsed = parse_response(example.response, ())
        if not parsed.is_well_formed:
            raise ValueError("missing tags: the answer must be <think>…</think> and then <answer>…</answer>")
        if not parsed.answer_content.strip():
            raise ValueError("empty answer: nothing stands between <answer> and </answer>")
        for box in boxes:
            self._check_box(box, size)
        return len(boxes)

    def _check_box(self, box: Box, size: tuple[int, int]) -> None:
        numbers = "[" + ", ".join(f"{value:g}" for value in box.as_list()) + "]"
        frame = Frame.of(size, self.contract)
        outcome, region = resolve_box(box, size, self.contract.min_crop_side)
        if region is not None:  # the model's rounded numbers decide which region is cut
            written = frame.to_original(frame.to_model(box))
            outcome, region = resolve_box(written, size, self.contract.min_crop_side)
        reasons = {
            "inverted": f"inverted box {numbers}: x2 must be over x1, and y2 over y1",
            "outside": f"outside box {numbers}: the image is {size[0]} x {size[1]}",
            "extreme_ratio": f"extreme box {numbers}: one side is over 200 times the other",
        }
        if region is None:
            raise ValueError(reasons[outcome])
        if min(box.width, box.height) < self.data.min_box_side:
            raise ValueError(
                f"tiny box {numbers}: {box.width:g} x {box.height:g} px, min_box_side is {self.data.min_box_side}"
            )

    def _length(self, example: Example, size: tuple[int, int]) -> int:
        if self.renderer is not None:
            return self.renderer.length(example, size)
        return Renderer.length(_TextEstimate(self.contract), example, size)  # type: ignore[arg-type]


def parse_line(raw: bytes) -> dict[str, Any]:
    """A line of JSONL; raises ValueError for anything but an object."""
    if len(raw) > MAX_LINE_BYTES:
        raise ValueError(f"bad JSON: the line is longer than {MAX_LINE_BYTES:,} bytes")
    try:
        row = json.loads(raw.decode("utf-8-sig").rstrip(), object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:  # its own text counts lines inside the row
        raise ValueError(f"bad JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"bad JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"bad JSON: a row must be an object, this is {type(row).__name__}")
    return row


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # Python would keep the last, and drop the others in silence
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return found


def refuse_surrogates(text: str, key: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"bad JSON: {key!r} holds half a surrogate pair at character {error.start}") from None


@dataclass(frozen=True)
class _TextEstimate:
    """Stands in for a tokenizer where there is none: about four characters a token."""

    contract: CropContract

    def text_ids(self, text: str) -> range:
        return range(math.ceil(len(text) / 4))


def cut_at_lines(path: str, parts: int) -> list[tuple[int, int]]:
    """At most `parts` byte ranges `(start, end)` of a file, each of whole lines and about as long as the others."""
    size = os.path.getsize(path)
    ranges, start = [], 0
    with open(path, "rb") as file:
        while start < size:
            file.seek(min(start + math.ceil(size / parts), size) - 1)
            next_line(file)
            ranges.append((start, file.tell()))
            start = file.tell()
    return ranges


def byte_ranges(path: str, parts: int) -> list[tuple[int, int, int]]:
    """`cut_at_lines`, with the number of each range's first line."""
    ranges, line = [], 1
    with open(path, "rb") as file:
        for start, end in cut_at_lines(path, parts):
            ranges.append((start, end, line))
            line += count_lines(file, start, end)
    return ranges


def count_lines(file: BinaryIO, start: int, end: int) -> int:
    """The line ends between two places of a file."""
    file.seek(start)
    return sum(file.read(min(PART_BYTES, end - at)).count(b"\n") for at in range(start, end, PART_BYTES))


def next_line(file: BinaryIO) -> bytes:
    """The next line, b"" at the end; of one that is too long to be a row no more than shows it, for memory's sake."""
    line = rest = file.readline(MAX_LINE_BYTES + 1)
    while rest and not rest.endswith(b"\n"):
        rest = file.readline(PART_BYTES)
    return line


def copy_line(source: BinaryIO, target: BinaryIO) -> None:
    """Copy the next line, however long, with a line end."""
    while piece := source.readline(PART_BYTES):
        target.write(piece)
        if piece.endswith(b"\n"):
            return
    target.write(b"\n")


def process_count(data: DataConfig) -> int:
    """How many processes are worth starting for the file; torchrun's processes on one machine share its cores."""
    worth = math.ceil(os.path.getsize(data.train_data) / PART_BYTES)
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(worth, 8, cores)) if data.num_proc is None else data.num_proc


def over_parts(function: Callable, data: DataConfig, *arguments: Any) -> list[Any]:
    """`function(start, end, *arguments)` of each part of the file, in order, on several processes where that pays."""
    ranges = cut_at_lines(data.train_data, math.ceil(os.path.getsize(data.train_data) / (4 * PART_BYTES)) or 1)
    count = min(process_count(data), len(ranges))
    if count <= 1:
        return [function(start, end, *arguments) for start, end in ranges]
    with ProcessPoolExecutor(count) as pool:
        futures = [pool.submit(function, start, end, *arguments) for start, end in ranges]
        return [future.result() for future in futures]


def check_file(data: DataConfig, contract: CropContract, renderer: Renderer | None = None) -> Dataset:
    """Every QnA entry of `data.train_data`, checked, as a memory-mapped table with the columns of `Checked`.

    The table is kept on disk and used again while the file, its images and the settings are the same.

    Raises:
        SettingsError: where the file is empty, or was changed while it was read.
    """
    import datasets
    from datasets.fingerprint import Hasher

    path = data.train_data
    about = os.stat(path)
    checker = Checker(data, contract, renderer)
    rules = [Path(__file__).with_name(name).read_bytes() for name in RULES]
    vocabulary = renderer.tokenizer.backend_tokenizer.to_str() if renderer is not None else None
    fingerprint = Hasher.hash(
        [
            *(os.path.abspath(path), about.st_size, about.st_mtime_ns, images_state(checker)),
            *(
                repr(replace(data, bad_rows_file=None, val_data=None, num_proc=None, data_check="auto")),
                repr(contract),
                vocabulary,
                rules,
            ),
        ]
    )
    if os.path.getsize(path) == 0:
        raise SettingsError(f"{path} is empty")
    features = {"line": "int64", "entry": "int32", "calls": "int32", "length": "int32", "offset": "int64"}
    features |= {"width": "int32", "height": "int32"}
    features |= dict.fromkeys(("image_path", "question", "response", "fault"), "string")
    processes = process_count(data)
    table = datasets.Dataset.from_generator(
        _generate,
        features=datasets.Features({name: datasets.Value(kind) for name, kind in features.items()}),
        gen_kwargs={"ranges": byte_ranges(path, processes), "checker": checker},
        num_proc=processes if processes > 1 else None,
        fingerprint=fingerprint,
        split=datasets.NamedSplit("checked"),  # the name that its progress bar shows
    )
    refuse_changed(path, about)
    return table


def refuse_changed(path: str, before: os.stat_result) -> None:
    now = os.stat(path)
    if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise SettingsError(f"{path} was changed while it was read: start again when it is complete")


def images_state(checker: Checker) -> str:
    """Changes when an image of the file is added, replaced or removed; looks at names, sizes and times only."""
    paths = set().union(*over_parts(_image_paths, checker.data, replace(checker, renderer=None)))
    state = hashlib.sha256()
    for path in sorted(paths):
        try:
            about = os.stat(os.path.join(checker.data.image_base_path, path))
        except (OSError, ValueError):
            state.update(b"missing")
        else:
            state.update(f"{about.st_size} {about.st_mtime_ns}".encode())
    return state.hexdigest()


def _image_paths(start: int, end: int, checker: Checker) -> set[str]:
    paths = set()
    for _, _, raw in lines_of(checker.data.train_data, start, end):
        try:
            paths.add(checker._parse(raw)[0])
        except ValueError:
            continue
    return paths


def lines_of(path: str, start: int, end: int) -> Iterator[tuple[int, int, bytes]]:
    """The lines of a byte range that hold anything: `(number within the range from 0, offset, line)`."""
    with open(path, "rb") as file:
        file.seek(start)
        number = 0
        while (offset := file.tell()) < end and (raw := next_line(file)):
            if not raw.isspace():
                yield number, offset, raw
            number += 1


def _generate(ranges: list[tuple[int, int, int]], checker: Checker) -> Iterator[dict[str, Any]]:
    for checked in checker.rows(ranges):
        yield dict(vars(checked))


def load_examples(path: str, data: DataConfig, renderer: Renderer, bad_rows_file: str) -> Dataset:
    """The sound examples of a file; faulty ones are counted, named by line and written to `bad_rows_file`.

    Raises:
        SettingsError: where no example is sound.
    """
    data = replace(data, train_data=path)
    table = check_file(data, renderer.contract, renderer)
    faults = [row for row in table.select_columns(["line", "entry", "fault"]) if row["fault"]]
    sound = table
    if faults:
        sound = table.select([index for index, fault in enumerate(table["fault"]) if not fault])
        if is_main_process():
            write_bad_rows(path, {row["line"] for row in faults}, bad_rows_file)
            print(f"{path}: {len(faults)} of {len(table)} entries are faulty and skipped; rows in {bad_rows_file}")
            print("\n".join(describe_faults(faults, most=10)))
    if len(sound) == 0:
        check = ["data_utils.py", "--check", path, "--image_base_path", data.image_base_path]
        raise SettingsError(f"{path} has no sound example: python {shlex.join(check)} says why")
    if is_main_process():
        print(f"{path}: {len(sound)} examples")
    return sound


def describe_faults(faults: list[dict[str, Any]], most: int) -> list[str]:
    lines = [f"  line {row['line']}, QnA[{row['entry']}]: {row['fault']}" for row in faults[:most]]
    return lines + ([f"  … and {len(faults) - most} more"] if len(faults) > most else [])


def write_bad_rows(path: str, lines: set[int], output: str) -> None:
    require_apart("bad_rows_file", output, path, "the data file")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "rb") as source, open(output, "wb") as target:
        for number in range(1, max(lines, default=0) + 1):
            if number in lines:
                copy_line(source, target)
            else:
                next_line(source)


def as_example(row: dict[str, Any]) -> Example:
    return Example(row["line"], row["entry"], row["image_path"], row["question"], row["response"])
