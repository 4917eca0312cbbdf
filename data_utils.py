"""The data check: figures, faults, frames, a contact sheet, one example as the model gets it.

python data_utils.py --check data/train.jsonl --image_base_path data/images
python data_utils.py --check data/train.jsonl --html sheet.html
python data_utils.py --check data/train.jsonl --show 12 --model_name Qwen/Qwen2.5-VL-7B-Instruct
python data_utils.py --check data/train.jsonl --convert_boxes data/train_pixels.jsonl
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from box_frames import FRAMES, FrameGuess, convert_file, detect_frame
from command_line import CommandParser
from config import DataConfig, SettingsError, convert, own_fields, placeholder, require, require_apart, require_file
from conversation import Renderer, cut_to_length, load_image
from crop_tool import Box, CropContract, convert_crop_annotations, split_annotations
from data_check import Checker, check_file, describe_faults, next_line, write_bad_rows
from data_sheet import choose_rows, sheet_html
from token_view import as_html, as_text
from traces import write_whole

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

FRAME_ROWS = 20_000  # entries whose boxes tell the frame; of a longer file they are spread over it

__all__ = ["convert_crop_annotations", "run_check"]  # what programs import from here


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


def convert_boxes(
    table: Dataset, data: DataConfig, contract: CropContract, guess: FrameGuess, target: str, told: str
) -> None:
    """Write the checked file to `target` with its boxes in original pixels, and say what was done.

    told: what says which frame they are in, for the message.

    Raises:
        SettingsError: where there are no boxes, or where their frame is original pixels or not clear enough.
    """
    source = data.train_data
    if guess.verdict == "ambiguous":
        require(guess.boxes > 0, f"{source} has no boxes: nothing to convert")
        raise SettingsError(f"the frame of {source} is {guess.describe()}: name it with --from_frame")
    if guess.frame == "original":
        raise SettingsError(f"{source} is in original pixels already, as {told}: nothing to convert")
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
        for _ in range(line - 1):
            next_line(file)
        offset, raw = file.tell(), next_line(file)
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
    parser = CommandParser(
        description="Check a training file: every row, call, box and image. Exits 1 where anything is faulty.",
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
        require_file("check", path)
        for name in ("html", "convert_boxes", "bad_rows_file"):
            require_apart(name, own[name], path, "the data file")
        if not Path(data.image_base_path).is_dir():
            raise SettingsError(
                f"image_base_path is {data.image_base_path}, but there is no such folder: give the one that the "
                "image_path of each row starts from"
            )
        if own["from_frame"] and not own["convert_boxes"]:
            raise SettingsError("--from_frame was given without --convert_boxes: name the file to write")
        if own["show"] is not None:
            return show_example(data, own["model_name"], own["show"], own["html"])
        bad_rows = own["bad_rows_file"] or f"{path}.bad_rows.jsonl"
        return run_check(data, own["model_name"], bad_rows, own["convert_boxes"], own["from_frame"], own["html"])
    except (SettingsError, OSError) as error:  # the latter: a full disk, a page that cannot be written there
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
    faults = [row for row in table.select_columns(["line", "entry", "fault"]) if row["fault"]]
    if faults:
        print("\n".join(describe_faults(faults, most=len(faults))) + "\n")  # first, so that the figures stay in sight
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
        told = "--from_frame says" if from_frame else "their statistics say"
        convert_boxes(table, data, contract, named, converted, told)
    if not faults:
        print("no faults")
        return 0
    write_bad_rows(data.train_data, {row["line"] for row in faults}, bad_rows)
    print(f"{len(faults)} faults; their rows are in {bad_rows}")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
