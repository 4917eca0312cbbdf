"""SFT's batches: rows encoded, faulty ones left out and named, and what a row is grouped by."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from config import DataConfig
from conversation import IGNORED, EncodedExample, Example, Renderer, cut_to_length, load_image, model_inputs
from data_check import Checker, as_example

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from PIL import Image

FAULTS = "faults"  # key of a batch: how many rows were drawn, and what was wrong with those that were left out
ROWS = "rows"  # key of a batch: (line, entry) of each row that was drawn
# Batches of like length waste little on padding. Sorting by the exact length, though, fills a batch with near copies
# (the same words, the same number of digits), and learning stalls: within a bucket the order is random.
BUCKET_TOKENS = 64


def length_buckets(rows: Dataset) -> list[int]:
    """By row, what the sampler groups by. A plain list: it asks for the single lengths again and again."""
    return [length // BUCKET_TOKENS for length in rows["length"][:]]


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
