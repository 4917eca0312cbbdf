"""Data files of other projects -> our JSONL, and back.

    python convert_data.py --from vlir data/vlir.json --to jsonl data/train.jsonl --image_folder data/images
    python convert_data.py --from jsonl data/train.jsonl --to visual_cot data/viscot.json --image_folder data/images
    python convert_data.py --from hub owner/name --split train --to jsonl data/train.jsonl \\
        --columns image=img,question=prompt,answer=solution,boxes=bbox

data_formats.py says what each format is, and where it was read. JSONL and parquet are streamed, a JSON array is read as
a whole. The output appears whole or not at all; a row that cannot be converted is left out and named with its reason.
No code of a set is ever run: neither pickles nor `trust_remote_code` are used.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from command_line import CommandParser, add_flags
from config import ConversionConfig, SettingsError, build, require, require_file
from data_check import parse_line
from data_formats import FORMATS, parse_columns
from format_parts import Conversion, Row, check_row

SHOWN = 10  # rows left out that are named on the screen; all of them are in the file beside the output
ROWS_AT_ONCE = 64  # of a parquet file, whose rows hold images
HUB_SETTINGS = ("columns", "split", "subset", "box_form")
FILE_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv"}


@dataclass(frozen=True)
class Source:
    """items: name, content (a line's bytes, or a row), and how far it brings the progress bar, whose end is `total`."""

    items: Iterable[tuple[str, Any, int]]
    total: int | None
    unit: str


@dataclass(frozen=True)
class Report:
    """What was done. lost: text of `format_parts` -> rows. faults: the first of the rows left out, with reasons."""

    target: str
    read: int
    written: int
    skipped: int
    lost: dict[str, int]
    faults: tuple[str, ...]


# ------------------------------------------------------------------------------------------------- reading


def open_source(kind: str, path: str, config: ConversionConfig) -> Source:
    """The rows of a file or set; raises SettingsError where there is none."""
    if kind == "hub":
        return Source(hub_rows(path, config), None, " rows")
    require_file("--from", path)
    require(os.path.getsize(path) > 0, f"{path} is empty")
    if FORMATS[kind].suffixes == (".parquet",):
        return parquet_source(path)
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        return Source(lines(path), os.path.getsize(path), "B")
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path} cannot be read as JSON: {error}") from None
    return Source(((f"row {place}", row, 1) for place, row in enumerate(rows)), len(rows), " rows")


def lines(path: str) -> Iterator[tuple[str, bytes, int]]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.isspace():
                yield f"line {number}", raw, len(raw)


def parquet_source(path: str) -> Source:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise SettingsError(f"{path} cannot be read as parquet: {error}") from None

    def rows() -> Iterator[tuple[str, Row, int]]:
        place = 0
        for batch in file.iter_batches(ROWS_AT_ONCE):
            for row in batch.to_pylist():
                yield f"row {place}", row, 1
                place += 1

    return Source(rows(), file.metadata.num_rows, " rows")


def hub_rows(name: str, config: ConversionConfig) -> Iterator[tuple[str, Row, int]]:
    """Rows of a set on the hub, or of a local folder or file, one at a time; images stay encoded."""
    import datasets

    split = config.split or "train"
    is_saved = Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file()  # by `save_to_disk`
    require(
        config.subset is None or not (is_saved or Path(name).is_file()),
        f"subset is {config.subset!r}, but {name} is one set alone: leave it out",
    )
    try:
        if is_saved:
            saved = datasets.load_from_disk(name)
            table = (saved[split] if isinstance(saved, dict) else saved).to_iterable_dataset()
        elif Path(name).is_file():
            require(Path(name).suffix in FILE_KINDS, f"{name}: a local file is one of {', '.join(FILE_KINDS)}")
            table = datasets.load_dataset(FILE_KINDS[Path(name).suffix], data_files=name, split=split, streaming=True)
        else:
            table = datasets.load_dataset(name, config.subset, split=split, streaming=True)
    except SettingsError:
        raise
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        raise SettingsError(f"{name} (split {split}) cannot be read by datasets.load_dataset: {error}") from None
    for place, row in enumerate(table.decode(False)):
        yield f"row {place}", row, 1


# ------------------------------------------------------------------------------------------------- writing


@contextmanager
def aside(path: str | Path) -> Iterator[Path]:
    """Another name beside `path`, which gets its own name when the block ends well and is removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def json_writer(path: Path, as_array: bool) -> Iterator[Callable[[list[bytes]], None]]:
    """Writes encoded rows, one a line; as an array they are separated by commas."""
    with open(path, "wb") as file:
        count = 0

        def write(rows: list[bytes]) -> None:
            nonlocal count
            for row in rows:
                file.write((b"[\n" if not count else b",\n") + row if as_array else row + b"\n")
                count += 1

        yield write
        if as_array:
            file.write(b"\n]\n")


def encode_json(rows: list[Row]) -> list[bytes]:
    return [json.dumps(row, ensure_ascii=False, allow_nan=False).encode() for row in rows]


@contextmanager
def parquet_writer(path: Path) -> Iterator[Callable[[list[Any]], None]]:
    """Writes the record batches of `encode_deepeyes`, gathered to row groups."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetWriter(path, deepeyes_schema()) as file:
        waiting: list[Any] = []

        def write(batches: list[Any]) -> None:
            waiting.extend(batches)
            if len(waiting) >= ROWS_AT_ONCE:
                file.write_table(pyarrow.Table.from_batches(waiting))
                waiting.clear()

        yield write
        if waiting:
            file.write_table(pyarrow.Table.from_batches(waiting))


def encode_deepeyes(rows: list[Row]) -> list[Any]:
    import pyarrow

    return [pyarrow.RecordBatch.from_pylist(rows, schema=deepeyes_schema())]


def deepeyes_schema() -> Any:
    import pyarrow as pa

    def texts(*names: str) -> pa.DataType:
        return pa.struct([(name, pa.string()) for name in names])

    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(texts("content", "role"))),
            ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
            ("ability", pa.string()),
            ("env_name", pa.string()),
            ("reward_model", texts("ground_truth", "style")),
            ("extra_info", texts("answer", "index", "question", "split")),
        ]
    )


# ------------------------------------------------------------------------------------------------ converting


def convert(source: tuple[str, str], target: tuple[str, str], config: ConversionConfig) -> Report:
    """Convert a file; `source` and `target` are a format of `FORMATS` and a path each.

    Raises:
        SettingsError: for what cannot be read at all, with nothing written.
    """
    from tqdm.auto import tqdm

    (kind, origin), (goal, path) = source, target
    check_target(source, target)
    reader, writer = FORMATS[kind].read, FORMATS[goal].write
    as_parquet = Path(path).suffix == ".parquet"
    encode = encode_deepeyes if as_parquet else encode_json
    columns = parse_columns(config.columns) if kind == "hub" else {}
    folder = Path(origin) if kind == "hub" and Path(origin).exists() else None
    shared = Conversion(config, columns, folder.parent if folder and folder.is_file() else folder)
    rows = open_source(kind, origin, config)
    read, written, faults, lost, skipped = 0, 0, [], Counter(), 0
    notes = Path(f"{path}.skipped.txt")
    with (
        aside(notes) as notes_aside,
        aside(path) as output,
        open(notes_aside, "w", encoding="utf-8", errors="replace") as left_out,
        parquet_writer(output) if as_parquet else json_writer(output, Path(path).suffix == ".json") as write,
        tqdm(total=rows.total, unit=rows.unit, unit_scale=True, desc=f"{kind} -> {goal}") as bar,
    ):
        for index, (name, item, step) in enumerate(rows.items):
            read += 1
            conversion = replace(shared, index=index, lost=set())
            try:
                row = parse_line(item) if isinstance(item, bytes) else item
                if not isinstance(row, dict):
                    raise ValueError(f"a row must be an object, this is {type(row).__name__}")
                made = encode(writer(check_row(reader(row, conversion), conversion), conversion))
            except SettingsError:
                raise
            except ValueError as error:
                skipped += 1
                fault = f"{name}: {error}"
                left_out.write(fault.replace("\n", " ") + "\n")
                faults += [fault] * (len(faults) < SHOWN)
            else:
                write(made)
                written += sum(len(part) for part in made) if as_parquet else len(made)
                lost.update(conversion.lost)
            bar.update(step)
        if not written:
            raise SettingsError("\n  ".join([f"no row of {origin} could be read as {kind}", *faults[:3]]))
    if not skipped:
        notes.unlink()
    return Report(path, read, written, skipped, dict(lost), tuple(faults))


def check_target(source: tuple[str, str], target: tuple[str, str]) -> None:
    """Refuse what cannot be written, before anything is read."""
    (_, origin), (goal, path) = source, target
    format_ = FORMATS[goal]
    require(format_.write is not None, f"--to {goal}: sets of the hub are read, not written")
    require(
        Path(path).suffix in format_.suffixes,
        f"--to {goal} {path}: the name of such a file ends in {' or '.join(format_.suffixes)}",
    )
    same = os.path.exists(path) and os.path.exists(origin) and os.path.samefile(origin, path)
    require(not same, f"--to {goal} {path} is the source itself: give another name")


def describe(report: Report, source: tuple[str, str], target: tuple[str, str], image_folder: str) -> str:
    (kind, _), (goal, _) = source, target
    said = [f"{report.target}: {report.written} rows from {report.read}, {report.skipped} left out"]
    said += [f"{name} carries {FORMATS[name].bounds}" for name in dict.fromkeys((kind, goal)) if name != "jsonl"]
    if report.lost:
        said += ["of the rows read,"]
        said += [f"  {count:>8}  {text}" for text, count in sorted(report.lost.items(), key=lambda item: -item[1])]
    if report.skipped:
        said += [f"left out, all of them in {report.target}.skipped.txt:", *(f"  {fault}" for fault in report.faults)]
        said += [f"  … and {report.skipped - SHOWN} more"] if report.skipped > SHOWN else []
    if goal == "jsonl":
        check = ["data_utils.py", "--check", report.target, "--image_base_path", image_folder]
        said += [f"check it: python {shlex.join(check)}"]
    return "\n".join(said)


# ------------------------------------------------------------------------------------------------ command


def _parser() -> CommandParser:
    parser = CommandParser(description=(__doc__ or "").split("\n")[0])
    readable, writable = ", ".join(FORMATS), ", ".join(name for name in FORMATS if FORMATS[name].write)
    parser.add_argument(
        "--from",
        dest="source",
        nargs=2,
        required=True,
        metavar=("FORMAT", "FILE"),
        help=f"one of {readable}; hub: owner/name, or a local folder or file that datasets.load_dataset reads",
    )
    parser.add_argument(
        "--to",
        dest="target",
        nargs=2,
        required=True,
        metavar=("FORMAT", "FILE"),
        help=f"one of {writable}; a .json file becomes an array, a .jsonl file has a row a line",
    )
    add_flags(parser, ConversionConfig, "conversion")
    return parser


def read_flags(options: dict[str, Any]) -> tuple[tuple[str, str], tuple[str, str], ConversionConfig]:
    """Source, target and settings; raises SettingsError for a setting that nobody would read."""
    source, target = tuple(options.pop("source")), tuple(options.pop("target"))
    for flag, (kind, _) in (("--from", source), ("--to", target)):
        require(kind in FORMATS, f"{flag} is {kind!r}, but it must be one of {', '.join(FORMATS)}")
    config = build(ConversionConfig, options)
    kinds = {source[0], target[0]}
    unread = [name for name in HUB_SETTINGS if name in options and source[0] != "hub"]
    unread += ["box_frame"] if "box_frame" in options and source[0] not in ("hub", "vlir") else []
    unread += ["box_max_pixels"] if "box_max_pixels" in options and not kinds & {"hub", "vlir"} else []
    require(not unread, f"{', '.join(unread)} was given, but --from {source[0]} --to {target[0]} does not read it")
    return source, target, config


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    try:
        source, target, config = read_flags(vars(parser.parse_args(argv)))
        report = convert(source, target, config)
    except (ValueError, OSError) as error:
        parser.exit(2, f"convert_data.py: {error}\n")
    print(describe(report, source, target, config.image_folder))


if __name__ == "__main__":
    main(sys.argv[1:])
