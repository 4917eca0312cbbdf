"""The sizes of a Qwen2.5-VL, from its config.json: what it has in parameters.

No torch: planning a run takes milliseconds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import SettingsError, require


@dataclass(frozen=True)
class Architecture:
    """The sizes of a Qwen2.5-VL, by the names of its config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool = False
    vision_depth: int = 32
    vision_hidden_size: int = 1280
    vision_intermediate_size: int = 3420
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Architecture:
        """From a model's config as a dict, nested (`text_config`) or flat as the hub's."""
        text, vision = config.get("text_config") or config, config["vision_config"]
        own = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        return cls(
            **{name: text[name] for name in (*own, "intermediate_size", "vocab_size")},
            tie_word_embeddings=config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
            vision_depth=vision["depth"],
            vision_hidden_size=vision["hidden_size"],
            vision_intermediate_size=vision["intermediate_size"],
            patch_size=vision.get("patch_size", 14),
            spatial_merge_size=vision.get("spatial_merge_size", 2),
            temporal_patch_size=vision.get("temporal_patch_size", 2),
        )

    @classmethod
    def find(cls, name: str) -> Architecture:
        """Of a built-in model by its hub name, or of any config.json by path (the file, or its folder).

        Raises:
            SettingsError: for a name that is neither.
        """
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
        path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
        known = ", ".join(ARCHITECTURES)
        require(path.is_file(), f"model_name is {name}: no such file or folder. Built in are {known}")
        try:
            return cls.from_config(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise SettingsError(f"{path} is not the config.json of a Qwen2.5-VL model: {error!r}") from None

    @property
    def kv_size(self) -> int:
        return self.hidden_size // self.num_attention_heads * self.num_key_value_heads

    @property
    def layer_linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the linear layers of one decoder layer."""
        hidden, mlp, kv = self.hidden_size, self.intermediate_size, self.kv_size
        return (
            (hidden, hidden),
            (hidden, kv),
            (hidden, kv),
            (hidden, hidden),
            (hidden, mlp),
            (hidden, mlp),
            (mlp, hidden),
        )

    @property
    def layer_parameters(self) -> int:
        biases_and_norms = 3 * self.hidden_size + 2 * self.kv_size
        return sum(inner * outer for inner, outer in self.layer_linears) + biases_and_norms

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def language_parameters(self) -> int:
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_hidden_layers * self.layer_parameters + tables * self.embedding_parameters + self.hidden_size

    @property
    def vision_parameters(self) -> int:
        hidden, mlp = self.vision_hidden_size, self.vision_intermediate_size
        merged = hidden * self.spatial_merge_size**2
        block = 4 * hidden**2 + 4 * hidden + 3 * hidden * mlp + 2 * mlp + hidden + 2 * hidden
        merger = merged**2 + merged + merged * self.hidden_size + self.hidden_size + hidden
        return self.vision_depth * block + merger + self.patch_values * hidden

    @property
    def patch_values(self) -> int:
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def parameters(self) -> int:
        return self.language_parameters + self.vision_parameters

    def lora_parameters(self, rank: int) -> int:
        return self.num_hidden_layers * rank * sum(inner + outer for inner, outer in self.layer_linears)


ARCHITECTURES = {
    "Qwen/Qwen2.5-VL-3B-Instruct": Architecture(2048, 36, 16, 2, 11008, 151936, tie_word_embeddings=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": Architecture(3584, 28, 28, 4, 18944, 152064),
    "Qwen/Qwen2.5-VL-32B-Instruct": Architecture(5120, 64, 40, 8, 27648, 152064, vision_intermediate_size=3456),
    "Qwen/Qwen2.5-VL-72B-Instruct": Architecture(8192, 80, 64, 8, 29568, 152064, vision_intermediate_size=3456),
}
