"""SFT's rows: drawn from a checked table or from the index of a long file, encoded, batched; faults named.

A file of millions of rows is not read before training. Its index says where each entry is, a row is checked when it is
drawn, by the rules of the data check, and a faulty one is left out of its batch, counted, and named by its line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import DataConfig, SettingsError, is_main_process
from conversation import IGNORED, EncodedExample, Example, Renderer, cut_to_length, load_image, model_inputs
from data_check import (
    MAX_LINE_BYTES,
    Checker,
    as_example,
    copy_line,
    count_lines,
    describe_faults,
    lines_of,
    load_examples,
    over_parts,
    refuse_changed,
)

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from PIL import Image

FULL_CHECK_ROWS = 10_000  # data_check=auto: longer files are checked row by row as they are drawn
PROBED_ROWS = 32
MOST_FAULTY = 0.5  # share of drawn rows over which the file or a setting, not a row, is taken to be wrong
CROP_TOKENS = 128  # of a crop that was not measured: half of the largest square one
FAULTS = "faults"  # key of a batch: how many rows were drawn, and what was wrong with those that were left out
ROWS = "rows"  # key of a batch: (line, entry) of each row that was drawn
# Batches of like length waste little on padding. Sorting by the exact length, though, fills a batch with near copies
# (the same words, the same number of digits), and learning stalls: within a bucket the order is random.
BUCKET_TOKENS = 64


# -------------------------------------------------------------------------------------------------- rows


def load_training_rows(path: str, data: DataConfig, renderer: Renderer, bad_rows_file: str) -> Dataset:
    """The rows that SFT draws from: sound examples, or the index of a file whose rows are checked when drawn.

    Raises:
        SettingsError: where no row is sound, or over half of a few looked at are faulty.
    """
    data = replace(data, train_data=path)
    if is_lazy(data):
        return index_examples(data, renderer, bad_rows_file)
    return load_examples(path, data, renderer, bad_rows_file)


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
        entries = json.loads(raw.decode("utf-8-sig"))["QnA"] if len(raw) <= MAX_LINE_BYTES else []
    except (ValueError, LookupError, TypeError, RecursionError):
        return []
    return entries if isinstance(entries, list) else []


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


def length_buckets(rows: Dataset) -> list[int]:
    """By row, what the sampler groups by. A plain list: it asks for the single lengths again and again."""
    return [length // BUCKET_TOKENS for length in rows["length"][:]]


# ----------------------------------------------------------------------------------------------- batches


@dataclass
class ExampleEncoder:
    """Example -> EncodedExample, keeping the prepared ones in memory up to `cache_bytes`."""

    renderer: Renderer
    data: DataConfig
    cache_bytes: int = 256 * 1024 * 1024
    _kept: OrderedDict[Example, EncodedExample] = field(default_factory=OrderedDict)
    _size: int = 0

    def __call__(self, example: Example) -> EncodedExample:
        if example in self._kept:
            self._kept.move_to_end(example)
            return self._kept[example]
        encoded = self.encode(example, load_image(example.image_path, self.data.image_base_path))
        self._kept[example] = encoded
        self._size += _bytes(encoded)
        while self._size > self.cache_bytes:
            self._size -= _bytes(self._kept.popitem(last=False)[1])
        return encoded

    def encode(self, example: Example, image: Image.Image) -> EncodedExample:
        return cut_to_length(self.renderer.encode(example, image), self.renderer, self.data.max_length)


def _bytes(encoded: EncodedExample) -> int:
    pixels = sum(image.width * image.height * 3 for image in encoded.images)
    return pixels + 16 * len(encoded.input_ids)


@dataclass
class SFTCollator:
    """Rows of the examples' table, or of the index of a file that is checked row by row -> model inputs.

    `ROWS` says which rows they are. A row that turns out to be faulty is left out; the batch is smaller, and says under
    `FAULTS` which row it was. A batch of faulty rows alone is one blank picture without loss: every process keeps in
    step.
    """

    encoder: ExampleEncoder

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        encoded, faults = [], []
        for row in rows:
            found = self._encode(row)
            (encoded if isinstance(found, EncodedExample) else faults).append(found)
        batch = model_inputs(encoded or [self._blank], self.encoder.renderer)
        keys = [(row["line"], row["entry"]) for row in rows]
        return batch | {ROWS: keys} | ({FAULTS: (len(rows), faults)} if faults else {})

    def _encode(self, row: dict[str, Any]) -> EncodedExample | dict[str, Any]:
        """The encoded row, or what is wrong with it."""
        fault = {name: row[name] for name in ("line", "entry", "offset")}
        try:
            if "response" in row:  # checked before; its image may have gone since
                return self.encoder(as_example(row))
            checked, image = self._checker.draw(*fault.values())
            if not checked.fault:
                return self.encoder.encode(checked.example, image)
            return fault | {"entry": checked.entry, "fault": checked.fault}
        except ValueError as error:
            return fault | {"fault": str(error)}

    @cached_property
    def _checker(self) -> Checker:
        return Checker(self.encoder.data, self.encoder.renderer.contract, self.encoder.renderer)

    @cached_property
    def _blank(self) -> EncodedExample:
        from PIL import Image

        prompt = self.encoder.renderer.prompt("", Image.new("RGB", (56, 56)))
        return EncodedExample(prompt.ids, [IGNORED] * len(prompt.ids), prompt.images, "blank")


# ------------------------------------------------------------------------------------------------ faults


class FaultLog:
    """Counts the rows that were drawn, names each faulty one once, and writes its line to `bad_rows_file`.

    Every process of a distributed run keeps its own: the rows that it draws are no other's.
    """

    def __init__(self, path: str, bad_rows_file: str, most_named: int = 100) -> None:
        self.path, self.bad_rows_file, self.most_named = path, bad_rows_file, most_named
        self._state = self._file_state()
        self.drawn = self.skipped = 0
        self.known: set[tuple[int, int, str]] = set()
        if os.path.exists(bad_rows_file) and os.path.samefile(path, bad_rows_file):
            raise SettingsError(f"bad_rows_file is {bad_rows_file}, the data file itself: give another name")

    def add(self, drawn: int, faults: list[dict[str, Any]]) -> None:
        """Take down `faults` (line, entry, offset, fault) among so many drawn rows.

        Raises:
            SettingsError: where over half of a hundred or more drawn rows were faulty, or the file was changed.
        """
        if self._file_state() != self._state:
            raise SettingsError(f"{self.path} was changed while it is trained on: start again, or put it back")
        self.drawn += drawn
        self.skipped += len(faults)
        for row in faults:
            key = (row["line"], row["entry"], row["fault"])
            if key in self.known:
                continue
            self.known.add(key)
            if len(self.known) <= self.most_named:
                print(f"{self.path}: skipped {describe_faults([row], most=1)[0].strip()}", flush=True)
            self._keep(row["offset"])
        if self.drawn >= 100 and self.skipped > MOST_FAULTY * self.drawn:
            raise SettingsError(
                f"{self.skipped} of {self.drawn} rows drawn from {self.path} were faulty: run data_utils.py --check "
                f"{self.path} to see all"
            )

    def _file_state(self) -> tuple[int, int]:
        about = os.stat(self.path)
        return about.st_size, about.st_mtime_ns

    def _keep(self, offset: int) -> None:
        Path(self.bad_rows_file).parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "rb") as source, open(self.bad_rows_file, "ab") as target:
            source.seek(offset)
            copy_line(source, target)
