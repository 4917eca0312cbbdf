"""JSONL rows -> checked examples; the data check.

python data_utils.py --check data/train.jsonl --image_base_path data/images
python data_utils.py --check data/train.jsonl --html sheet.html
python data_utils.py --check data/train.jsonl --show 12 --model_name Qwen/Qwen2.5-VL-7B-Instruct
python data_utils.py --check data/train.jsonl --convert_boxes data/train_pixels.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from box_frames import FRAMES, FrameGuess, convert_file, detect_frame
from config import DataConfig, SettingsError, convert, is_main_process, own_fields, placeholder
from conversation import Example, Renderer, cut_to_length, load_image, refuse_reserved
from crop_tool import Box, CropContract, Frame, resolve_box, shown_image_size, split_annotations
from data_sheet import choose_rows, sheet_html
from response_format import parse_response
from token_view import as_html, as_text
from traces import write_whole

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

MAX_LINE_BYTES = 32 * 1024 * 1024
PART_BYTES = 4 * 1024 * 1024  # what one process is worth starting for
FRAME_ROWS = 20_000  # entries whose boxes tell the frame; of a longer file they are spread over it
# Files whose rules decide about a row: a kept check is made anew when one of them changes.
RULES = ("data_utils.py", "conversation.py", "crop_tool.py", "response_format.py")


# -------------------------------------------------------------------------------------------- data check


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

    def rows(self, ranges: Iterable[tuple[int, int, int]]) -> Iterator[Checked]:
        """The checked entries of the file's byte ranges `(start, end, first line number)`."""
        for start, end, line in ranges:
            with open(self.data.train_data, "rb") as file:
                file.seek(start)
                while (offset := file.tell()) < end:
                    raw = file.readline()
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
        with open(self.data.train_data, "rb") as file:
            file.seek(offset)
            raw = file.readline()
        opened = self._open(line, raw)
        if isinstance(opened, Checked):
            return replace(opened, offset=offset), None
        path, entries, image = opened
        return replace(self._entry(line, entry, path, entries[entry], image.size), offset=offset), image

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
                raise ValueError(f"missing key {key!r}: it must be a non-empty {kind.__name__}")
        refuse_surrogates(row["image_path"], "image_path")
        return row["image_path"], row["QnA"]

    def _image(self, path: str) -> Image.Image:
        """The image as it is used, all of it decoded."""
        try:
            image = load_image(path, self.data.image_base_path)
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
        if not parse_response(example.response, ()).is_well_formed:
            raise ValueError("missing tags: the answer must be <think>…</think> and then <answer>…</answer>")
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
        raise ValueError(f"bad JSON: the line is {len(raw):,} bytes long (at most {MAX_LINE_BYTES:,})")
    try:
        row = json.loads(raw.decode("utf-8-sig").rstrip())
    except json.JSONDecodeError as error:  # its own text counts lines inside the row
        raise ValueError(f"bad JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"bad JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"bad JSON: a row must be an object, this is {type(row).__name__}")
    return row


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
            file.readline()
            ranges.append((start, file.tell()))
            start = file.tell()
    return ranges


def byte_ranges(path: str, parts: int) -> list[tuple[int, int, int]]:
    """`cut_at_lines`, with the number of each range's first line."""
    ranges, line = [], 1
    with open(path, "rb") as file:
        for start, end in cut_at_lines(path, parts):
            ranges.append((start, end, line))
            file.seek(start)
            for at in range(start, end, PART_BYTES):
                line += file.read(min(PART_BYTES, end - at)).count(b"\n")
    return ranges


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
    return datasets.Dataset.from_generator(
        _generate,
        features=datasets.Features({name: datasets.Value(kind) for name, kind in features.items()}),
        gen_kwargs={"ranges": byte_ranges(path, processes), "checker": checker},
        num_proc=processes if processes > 1 else None,
        fingerprint=fingerprint,
    )


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
        for number, raw in enumerate(file):
            if start >= end:
                return
            if not raw.isspace():
                yield number, start, raw
            start += len(raw)


def _generate(ranges: list[tuple[int, int, int]], checker: Checker) -> Iterator[dict[str, Any]]:
    for checked in checker.rows(ranges):
        yield dict(vars(checked))


def load_examples(path: str, data: DataConfig, renderer: Renderer, bad_rows_file: str) -> Dataset:
    """The sound examples of a file; faulty ones are counted, named by line and written to `bad_rows_file`.

    Raises:
        SettingsError: where no example is sound.
    """
    data = replace(data, train_data=path)
    if data.data_check == "lazy" and is_main_process():
        print(f"{path} is checked as a whole: only SFT's training data can be checked row by row when drawn")
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
        raise SettingsError(f"{path} has no sound example: run data_utils.py --check {path} to see why")
    if is_main_process():
        print(f"{path}: {len(sound)} examples")
    return sound


def describe_faults(faults: list[dict[str, Any]], most: int) -> list[str]:
    lines = [f"  line {row['line']}, QnA[{row['entry']}]: {row['fault']}" for row in faults[:most]]
    return lines + ([f"  … and {len(faults) - most} more"] if len(faults) > most else [])


def write_bad_rows(path: str, lines: set[int], output: str) -> None:
    if os.path.exists(output) and os.path.samefile(path, output):
        raise SettingsError(f"bad_rows_file is {output}, the data file itself: give another name")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "rb") as source, open(output, "wb") as target:
        for number, raw in enumerate(source, start=1):
            if number in lines:
                target.write(raw if raw.endswith(b"\n") else raw + b"\n")


def as_example(row: dict[str, Any]) -> Example:
    return Example(row["line"], row["entry"], row["image_path"], row["question"], row["response"])


# ----------------------------------------------------------------------------------------------- command


def report(table: Dataset, estimated: bool) -> str:
    """The check's figures as text."""
    columns = {name: list(table[name]) for name in ("line", "calls", "length", "fault")}
    sound = [index for index, fault in enumerate(columns["fault"]) if not fault]
    calls = [columns["calls"][index] for index in sound]
    lengths = sorted(columns["length"][index] for index in sound)
    lines = [
        f"rows          {len(set(columns['line'])):>8}",
        f"entries       {len(table):>8}   sound {len(sound)}, faulty {len(table) - len(sound)}",
        f"calls         {sum(calls):>8}",
    ]
    if sound:
        shares = ", ".join(f"{n}: {calls.count(n)}" for n in sorted(set(calls)))
        lines.append(f"crops a row   {statistics.mean(calls):>8.2f}   ({shares})")
        at = {share: lengths[min(len(lengths) - 1, int(share * len(lengths)))] for share in (0.5, 0.95)}
        note = "   (text estimated; give --model_name for exact figures)" if estimated else ""
        lines.append(f"token lengths {at[0.5]:>8}   median, {at[0.95]} 95th percentile, {lengths[-1]} longest{note}")
    return "\n".join(lines)


def boxes_as_written(table: Dataset) -> Iterator[tuple[Box, tuple[int, int]]]:
    """The annotated boxes of a checked file, faulty rows too, each with its image's (width, height)."""
    step = math.ceil(len(table) / FRAME_ROWS) or 1
    for row in table.select_columns(["response", "width", "height"]).select(range(0, len(table), step)):
        try:
            parts = split_annotations(row["response"])
        except ValueError:
            continue
        yield from ((part, (row["width"], row["height"])) for part in parts if isinstance(part, Box) and row["width"])


def convert_boxes(table: Dataset, data: DataConfig, contract: CropContract, guess: FrameGuess, target: str) -> None:
    """Write the checked file to `target` with its boxes in original pixels, and say what was done.

    Raises:
        SettingsError: where `target` is the file itself, or the frame is not clear enough to convert from.
    """
    source = data.train_data
    if os.path.exists(target) and os.path.samefile(source, target):
        raise SettingsError(f"convert_boxes is {target}, the data file itself: give another name")
    if guess.verdict == "ambiguous":
        raise SettingsError(f"the frame of {source} is {guess.describe()}: name it with --from_frame")
    if guess.frame == "original":
        raise SettingsError(f"{source} is in {guess.describe()} already: nothing to convert")
    sizes = {row["line"]: (row["width"], row["height"]) for row in table.select_columns(["line", "width", "height"])}
    sizes = {line: size for line, size in sizes.items() if size[0]}
    done = convert_file(source, target, guess.frame, sizes, data.answer_key, contract)
    print(f"{target}: {done.boxes} boxes converted from {FRAMES[guess.frame]} to original pixels")
    if done.left:
        print(f"{len(done.left)} left as they were:\n" + "\n".join(f"  {left}" for left in done.left[:10]))


def write_sheet(table: Dataset, data: DataConfig, guess: FrameGuess, output: str) -> None:
    """Write the contact sheet of a checked file."""
    faults = list(table["fault"])
    rows = [table[index] for index in choose_rows(faults)]

    def load(path: str) -> Image.Image:
        return load_image(path, data.image_base_path)

    page = sheet_html(f"{data.train_data}, checked", rows, faults, load, guess.describe())
    write_whole(output, page.encode("utf-8", "xmlcharrefreplace"))
    print(f"{output}: {len(rows)} of {len(faults)} entries")


def load_renderer(data: DataConfig, model_name: str) -> Renderer:
    from model_utils import load_processor

    return Renderer(*load_processor(model_name, data.contract_settings()))


def show_example(data: DataConfig, model_name: str | None, which: str, html: str | None) -> int:
    """Show the example `which` ("line" or "line:entry") as SFT trains on it, in the terminal or as a page.

    Raises:
        SettingsError: where there is no such example, or it is faulty.
    """
    if model_name is None:
        raise SettingsError("--show needs the tokens of a model: give --model_name")
    number, _, entry = which.partition(":")
    if not (number.isdecimal() and (entry or "0").isdecimal() and int(number) > 0):
        raise SettingsError(f"--show is {which!r}, but it must be a line from 1, or line:entry")
    line, entry = int(number), int(entry or 0)
    with open(data.train_data, "rb") as file:
        offset = sum(len(raw) for _, raw in zip(range(line - 1), file, strict=False))
        raw = file.readline()
    renderer = load_renderer(data, model_name)
    checker = Checker(data, renderer.contract, renderer)
    if not raw.strip():
        raise SettingsError(f"--show is {which}, but {data.train_data} has no such line")
    entries = list(checker.row(line, raw))
    if entry >= len(entries):
        raise SettingsError(f"--show is {which}, but line {line} has {len(entries)} QnA entries, counted from 0")
    checked, image = checker.draw(line, entry, offset)
    if checked.fault:
        raise SettingsError(f"{checked.example.name} is faulty and not trained on: {checked.fault}")
    encoded = cut_to_length(renderer.encode(checked.example, image), renderer, data.max_length)
    if html is not None:
        write_whole(html, as_html(encoded, renderer).encode("utf-8", "xmlcharrefreplace"))
        print(html)
    else:
        print(as_text(encoded, renderer, colours=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Check a training file: every row, call, box and image. Exits 1 where anything is faulty.",
        allow_abbrev=False,
    )
    parser.add_argument("--check", required=True, metavar="FILE", help="JSONL file to check")
    parser.add_argument("--model_name", metavar="MODEL", help="model whose tokenizer counts the text tokens")
    for item in (
        "image_base_path",
        "answer_key",
        "max_length",
        "min_box_side",
        "num_proc",
        "coordinate_space",
    ):
        parser.add_argument(
            f"--{item}", metavar=placeholder(own_fields(DataConfig)[item]), default=argparse.SUPPRESS, help=_help(item)
        )
    parser.add_argument("--bad_rows_file", metavar="FILE", help="where faulty rows are written [FILE.bad_rows.jsonl]")
    looks = parser.add_argument_group("to see the data")
    looks.add_argument("--html", metavar="FILE", help="write a page: a contact sheet, or with --show that example")
    looks.add_argument(
        "--show",
        metavar="N",
        help="one example as the model gets it, token by token: line N, or N:K for its QnA[K]; needs --model_name",
    )
    frames = parser.add_argument_group("boxes that are not in original pixels")
    frames.add_argument(
        "--convert_boxes", metavar="OUT", help="write the file to OUT with its boxes in original pixels"
    )
    frames.add_argument("--from_frame", choices=sorted(FRAMES), help="frame they are in [what their statistics say]")
    options = vars(parser.parse_args(argv))
    names = ("check", "model_name", "bad_rows_file", "convert_boxes", "from_frame", "html", "show")
    own = {name: options.pop(name) for name in names}
    hints = own_fields(DataConfig)
    try:
        path = own["check"]
        data = DataConfig(train_data=path, **{k: convert(k, v, hints[k]) for k, v in options.items()})
        if not Path(path).is_file():
            raise SettingsError(f"{path}: there is no such file")
        if own["from_frame"] and not own["convert_boxes"]:
            raise SettingsError("--from_frame was given without --convert_boxes: name the file to write")
        if own["show"] is not None:
            return show_example(data, own["model_name"], own["show"], own["html"])
        bad_rows = own["bad_rows_file"] or f"{path}.bad_rows.jsonl"
        return run_check(data, own["model_name"], bad_rows, own["convert_boxes"], own["from_frame"], own["html"])
    except SettingsError as error:
        parser.exit(2, f"data_utils.py: {error}\n")


def _help(name: str) -> str:
    item = DataConfig.__dataclass_fields__[name]
    return item.metadata["help"] + (f" [{item.default}]" if item.default is not None else "")


def run_check(
    data: DataConfig,
    model_name: str | None,
    bad_rows: str,
    converted: str | None = None,
    from_frame: str | None = None,
    html: str | None = None,
) -> int:
    """Print the check of `data.train_data`; 1 where a row is faulty, else 0.

    converted: file to write with the boxes in original pixels. from_frame: the frame they are in, told from their
        statistics where it is not given. html: contact sheet to write.
    """
    renderer = load_renderer(data, model_name) if model_name is not None else None
    contract = renderer.contract if renderer is not None else CropContract(**data.contract_settings())
    table = check_file(data, contract, renderer)
    guess = detect_frame(boxes_as_written(table), contract)
    print(report(table, estimated=renderer is None))
    print(f"boxes in      {guess.describe()}")
    if guess.is_foreign:
        print(
            f"WARNING: boxes must be in pixels of the original image, but these are in {FRAMES[guess.frame]}: "
            "--convert_boxes OUT.jsonl writes a converted file"
        )
    if html is not None:
        write_sheet(table, data, guess, html)
    if converted is not None:
        named = guess if from_frame is None else replace(guess, frame=from_frame, probability=1.0)
        convert_boxes(table, data, contract, named, converted)
    faults = [row for row in table.select_columns(["line", "entry", "fault"]) if row["fault"]]
    if not faults:
        print("no faults")
        return 0
    write_bad_rows(data.train_data, {row["line"] for row in faults}, bad_rows)
    print(f"\n{len(faults)} faults; their rows are in {bad_rows}")
    print("\n".join(describe_faults(faults, most=len(faults))))
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
