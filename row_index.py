"""The rows of a data file as training draws them: all checked before, or each when it is drawn.

A file of millions of rows is not read before training. Its index says where each entry is, a row is checked when it is
drawn, by the rules of the data check, and a faulty one is counted and named by its line.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import ChainMap, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from config import DataConfig, SettingsError, is_main_process
from conversation import Renderer, load_image, show_image
from crop_tool import CropContract
from data_check import (
    MAX_LINE_BYTES,
    Checker,
    copy_line,
    count_lines,
    describe_faults,
    lines_of,
    load_examples,
    over_parts,
    refuse_changed,
)
from patience import OutageError

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

FULL_CHECK_ROWS = 10_000  # data_check=auto: longer files are checked row by row as they are drawn
PROBED_ROWS = 32
MOST_IN_A_ROW = 100  # faulty rows drawn behind each other
RECENT = 100  # drawn rows
MOST_FAULTY = 0.5  # share of them over which the file, a disk or a setting, not a row, is taken to be wrong
THREADS = 4  # that read images
CROP_TOKENS = 128  # of a crop that was not measured: half of the largest square one


def load_training_rows(data: DataConfig, renderer: Renderer, bad_rows_file: str) -> Dataset:
    """The rows that training draws from: sound examples, or the index of a file whose rows are checked when drawn.

    Raises:
        SettingsError: where no row is sound, or over half of a few looked at are faulty.
    """
    if is_lazy(data):
        return index_examples(data, renderer, bad_rows_file)
    return load_examples(data.train_data, data, renderer, bad_rows_file)


def is_lazy(data: DataConfig) -> bool:
    """Whether the rows of `data.train_data` are checked when they are drawn."""
    if data.data_check != "auto":
        return data.data_check == "lazy"
    with open(data.train_data, "rb") as file:
        return sum(1 for _ in islice(file, FULL_CHECK_ROWS + 1)) > FULL_CHECK_ROWS


def index_examples(data: DataConfig, renderer: Renderer, bad_rows_file: str) -> Dataset:
    """Where each QnA entry of a long file is: line, entry, offset of the line and estimated length, 24 bytes each.

    Nothing but the entries' number is looked at, save for a few rows over the whole file.

    Raises:
        SettingsError: where over half of those few are faulty.
    """
    import datasets
    import numpy as np
    import pyarrow

    path = data.train_data
    about = os.stat(path)
    parts = over_parts(_index_part, data, path, data.answer_key)
    first = np.cumsum([1, *(lines for lines, _ in parts)])
    line, entry, offset, length = np.concatenate([part for _, part in parts], axis=1) if parts else np.zeros((4, 0))
    line = line + np.repeat(first[:-1], [part.shape[1] for _, part in parts])
    if len(line) == 0:
        raise SettingsError(f"{path} is empty")
    columns = {"line": line, "entry": entry.astype("int32"), "offset": offset, "length": length.astype("int32")}
    refuse_changed(path, about)
    table = datasets.Dataset(
        datasets.table.InMemoryTable(pyarrow.table(columns)),
        fingerprint=hashlib.sha256(f"{os.path.abspath(path)} {about}".encode()).hexdigest()[:32],
    )
    _probe(table, Checker(data, renderer.contract, renderer), bad_rows_file)
    return table


def _index_part(start: int, end: int, path: str, answer_key: str) -> tuple[int, Any]:
    """The number of lines of a byte range, and (4, entries): line from 0, entry, offset, estimated length."""
    import numpy as np

    found: list[int] = []
    for number, offset, raw in lines_of(path, start, end):
        lengths = [_rough_length(entry, answer_key) for entry in _entries(raw)]
        for entry, length in enumerate(lengths or [0]):  # a faulty line is drawn, too, and named then
            found += (number, entry, offset, length)
    with open(path, "rb") as file:
        lines = count_lines(file, start, end)
    return lines, np.array(found, dtype=np.int64).reshape(-1, 4).T


def _entries(raw: bytes) -> list[Any]:
    try:
        entries = _parsed(raw)["QnA"] if len(raw) <= MAX_LINE_BYTES else []
    except (ValueError, LookupError, TypeError, RecursionError):
        return []
    return entries if isinstance(entries, list) else []


def _parsed(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)  # four times as fast as json
    except orjson.JSONDecodeError:  # a byte order mark, NaN, half a surrogate pair
        return json.loads(raw.decode("utf-8-sig"))


def _rough_length(entry: Any, answer_key: str) -> int:
    """Tokens of an entry, to batch like with like; the main image, about the same for all, is left out."""
    texts = [entry.get("Q"), entry.get(answer_key)] if isinstance(entry, dict) else []
    return sum(len(text) // 4 + CROP_TOKENS * text.count("Crop") for text in texts if isinstance(text, str))


def _probe(table: Dataset, checker: Checker, bad_rows_file: str) -> None:
    """Look at a few rows over the whole file, so that a wrong folder or key is seen at the start."""
    count = min(PROBED_ROWS, len(table))
    rows = [table[number * len(table) // count] for number in range(count)]
    checked = [checker.draw(row["line"], row["entry"], row["offset"])[0] for row in rows]
    faulty = [item for item in checked if item.fault]
    named = [vars(item) for item in dict.fromkeys(faulty)]  # a faulty line is told once, not for each of its entries
    path = checker.data.train_data
    if is_main_process():
        print(f"{path}: {len(table)} examples, each checked when it is drawn; faulty rows go to {bad_rows_file}")
        if faulty:
            print(f"of {len(rows)} looked at now, {len(faulty)} are faulty and will be skipped:")
            print("\n".join(describe_faults(named, most=10)))
    if len(faulty) > MOST_FAULTY * len(rows):
        raise SettingsError(
            f"{len(faulty)} of {len(rows)} rows of {path} are faulty, the first: {describe_faults(named, most=1)[0]}. "
            f"Run data_utils.py --check {path} to see all"
        )


# ------------------------------------------------------------------------------------------------- draw


class ImagesAhead:
    """The original and the shown image behind a path; read in threads, ahead of the step, where it was announced.

    Pillow decodes and resizes without Python's lock. Kept are the images of the last two announcements: of the batch
    that is worked on, and of the next.
    """

    def __init__(self, base: str, contract: CropContract) -> None:
        self.base, self.contract = base, contract
        self._announced: deque[dict[str, Future]] = deque(maxlen=2)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(THREADS, "images ahead")

    def announce(self, paths: Iterable[str]) -> None:
        batch = dict.fromkeys(paths)
        if self._announced and self._announced[-1].keys() == batch.keys():  # the same rollouts, for a further step
            return
        known = ChainMap(*self._announced)
        self._announced.append({path: known.get(path) or self._threads.submit(self._read, path) for path in batch})

    def original(self, path: str) -> Image.Image:
        return self(path)[0]

    def __call__(self, path: str) -> tuple[Image.Image, Image.Image]:
        """Raises as `load_image` and `show_image` do."""
        found = ChainMap(*self._announced).get(path)
        return found.result() if found else self._read(path)

    def _read(self, path: str) -> tuple[Image.Image, Image.Image]:
        original = load_image(path, self.base)
        return original, show_image(original, self.contract)


class SoundRows:
    """Rows as drawn -> checked rows; for a faulty one a sound row from anywhere in the file.

    R-GRPO cannot leave a row out, since a group would be without rollouts. Every process that draws the row takes the
    same one for it. Not a neighbour: faulty rows come in blocks, as where one of many folders is missing.
    """

    def __init__(self, table: Dataset, checker: Checker) -> None:
        """table: what `load_training_rows` gives."""
        self.table = table
        self.images = ImagesAhead(checker.data.image_base_path, checker.contract)
        self.checker = replace(checker, load=self.images.original)
        self.is_checked = "response" in table.column_names

    def announce(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Begin to read the images of rows that come next; returns the rows, since it collates a loader's batches."""
        from torch.utils.data import get_worker_info

        if get_worker_info() is None:  # from a worker the images would not reach the trainer
            offsets = dict.fromkeys(row["offset"] for row in rows)
            paths = [row["image_path"] for row in rows] if self.is_checked else map(self.checker.image_path, offsets)
            self.images.announce(path for path in paths if path is not None)
        return rows

    def __call__(self, rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """A row for each of `rows`, with the columns of `Checked`; and what was wrong with those that were passed over.

        Raises:
            OutageError: where many rows drawn behind each other are faulty.
        """
        if self.is_checked:
            return [dict(row) for row in rows], []
        found: dict[tuple[int, int], dict[str, Any]] = {}
        faults: list[dict[str, Any]] = []
        for row in rows:
            key = row["line"], row["entry"]
            if key not in found:
                found[key] = self._sound(row, faults)
        return [dict(found[row["line"], row["entry"]]) for row in rows], faults

    def _sound(self, row: dict[str, Any], faults: list[dict[str, Any]]) -> dict[str, Any]:
        dice = random.Random(f"{row['line']} {row['entry']}")
        for _ in range(MOST_IN_A_ROW):
            checked = self.checker.draw(row["line"], row["entry"], row["offset"])[0]
            if not checked.fault:
                return dict(vars(checked))
            faults.append(vars(checked))
            row = self.table[dice.randrange(len(self.table))]
        path = self.checker.data.train_data
        raise OutageError(f"{MOST_IN_A_ROW} rows drawn from {path} were all faulty, {_last(faults, path)}")


# ------------------------------------------------------------------------------------------------ faults


class FaultLog:
    """Counts the rows that were drawn, names each faulty one once, and writes its line to `bad_rows_file`.

    Every process of a distributed run keeps its own.

    names: False where another process, which draws the same rows, names and writes them.
    """

    def __init__(self, path: str, bad_rows_file: str, most_named: int = 100, names: bool = True) -> None:
        self.path, self.bad_rows_file, self.most_named, self.names = path, bad_rows_file, most_named, names
        self._state = self._file_state()
        self._recent: deque[tuple[int, int]] = deque()  # drawn and faulty rows of the last batches
        self.drawn = self.skipped = 0
        self.known: set[tuple[int, int, str]] = set()
        if os.path.exists(bad_rows_file) and os.path.samefile(path, bad_rows_file):
            raise SettingsError(f"bad_rows_file is {bad_rows_file}, the data file itself: give another name")

    def add(self, drawn: int, faults: list[dict[str, Any]]) -> None:
        """Take down `faults` (line, entry, offset, fault) among so many drawn rows.

        Raises:
            OutageError: where over half of the last hundred drawn rows were faulty, or the file was changed.
        """
        if self._file_state() != self._state:
            raise OutageError(f"{self.path} was changed while it is trained on: put back what it was")
        self.drawn += drawn
        self.skipped += len(faults)
        for row in faults:
            key = (row["line"], row["entry"], row["fault"])
            if key in self.known:
                continue
            self.known.add(key)
            if not self.names:
                continue
            if len(self.known) <= self.most_named:
                print(f"{self.path}: skipped {describe_faults([row], most=1)[0].strip()}", flush=True)
            self._keep(row["offset"])
        self._recent.append((drawn, len(faults)))
        count, faulty = map(sum, zip(*self._recent, strict=True))
        while count - self._recent[0][0] >= RECENT:
            oldest = self._recent.popleft()
            count, faulty = count - oldest[0], faulty - oldest[1]
        if count >= RECENT and faulty > MOST_FAULTY * count:
            reason = f"{faulty} of the last {count} rows drawn from {self.path} were faulty"
            raise OutageError(f"{reason}, {_last(faults, self.path)}")

    def _file_state(self) -> tuple[int, int]:
        about = os.stat(self.path)
        return about.st_size, about.st_mtime_ns

    def _keep(self, offset: int) -> None:
        Path(self.bad_rows_file).parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "rb") as source, open(self.bad_rows_file, "ab") as target:
            source.seek(offset)
            copy_line(source, target)


def _last(faults: list[dict[str, Any]], path: str) -> str:
    fault = describe_faults(faults[-1:], most=1)[0].strip()
    return f"the last: {fault} (are the images there? data_utils.py --check {path} tells)"
