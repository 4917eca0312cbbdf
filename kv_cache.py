"""Keys and values of a batch whose rows have lengths of their own: preallocated slots, no pads, no holes.

`RaggedCache` is handed to the language model's own forward as `past_key_values`; `grouped_attention` makes that
forward read the slots without a copy per query head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache, PreTrainedModel

GROUPED_ATTENTION = "ragged_cache"
# Attention reads so many slots more than the longest row at most; the same shapes for so many steps. A GPU hardly
# notices masked slots, and gets the more steps out of a recording.
READ_BLOCK = {"cpu": 64, "cuda": 256}


@dataclass(frozen=True)
class _Write:
    """Where the next forward's keys and values go, and what its queries read.

    rows, slots: (n, 1) and (n, width), the places written.
    source: (n,) row of the forward whose tokens are written there; None where row i of it goes to place i.
    read: number of slots that are read back from each row; 0: the forward sees its own tokens alone.
    all_rows: whether row i of the forward is row i of the cache, so that a view is read and nothing is copied.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    source: torch.Tensor | None
    read: int
    all_rows: bool


class RaggedCache(Cache):
    """Per layer, keys and values of shape (rows, kv_heads, capacity, head_dim).

    A row's tokens lie in its first slots, in order. Pads of a chunk, and the tokens of rows that have nothing to
    feed, are written to the last slot, which no row ever uses. Before each forward say where it goes: `begin_prefill`
    or `begin_chunk`. Memory is taken when the first forward writes.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(layers=[])
        self.device = device
        self.rows = self.capacity = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._write: _Write | None = None

    def resize(self, keep: list[int], rows: int, capacity: int) -> None:
        """Keep the rows `keep`, in that order, in a cache of `rows` rows of `capacity` slots."""
        assert len(keep) <= rows
        index = torch.tensor(keep, dtype=torch.long, device=self.device)
        slots = min(capacity, self.capacity)
        for layers in (self.keys, self.values):
            for number, old in enumerate(layers):
                # Zeros: what is masked must still be finite.
                new = old.new_zeros((rows, old.shape[1], capacity, old.shape[3]))
                new[: len(keep), :, :slots] = old[index.to(old.device), :, :slots]
                layers[number] = new
        self.rows, self.capacity = rows, capacity

    def copy_prefix(self, source: int, targets: list[int], length: int) -> None:
        """Give the rows `targets` the first `length` slots of the row `source`."""
        index = torch.tensor(targets, device=self.device)
        for layer in (*self.keys, *self.values):
            layer[index.to(layer.device), :, :length] = layer[source, :, :length].clone()

    def begin_prefill(self, source: list[int], targets: list[int], counts: torch.Tensor, width: int) -> None:
        """The next forward encodes right-padded prompts of `width` by themselves, with plain causal attention.

        The first `counts[i]` tokens of its row `source[i]` are written into the row `targets[i]`, from its first slot.
        """
        origin, rows = torch.tensor([source, targets], device=self.device)
        step = torch.arange(width, device=self.device)
        slots = torch.where(step < counts.to(self.device)[:, None], step, self.capacity - 1)
        self._write = _Write(rows[:, None], slots, origin, 0, all_rows=False)

    def read_length(self, used: int) -> int:
        """How many slots of each row to read where `used` of them are in use at most."""
        assert used < self.capacity, "the last slot is nobody's"
        block = READ_BLOCK.get(self.device.type, 256)
        return min(-(-used // block) * block, self.capacity)

    def begin_chunk(
        self, rows: torch.Tensor | None, lengths: torch.Tensor, counts: torch.Tensor, width: int, read: int
    ) -> torch.Tensor:
        """The next forward feeds right-padded chunks of `width` behind what the rows hold.

        rows: (n,) rows of the cache that are fed, in this order; None: all of them.
        lengths, counts: (n,) tokens that each row holds, and of its chunk (0: the row feeds nothing).
        read: an upper bound of the slots in use afterwards, by `read_length`.

        Returns the attention mask (n, 1, width, slots read), True where a query sees a slot.
        """
        step = torch.arange(width, device=self.device)
        place = lengths[:, None] + step  # (n, width)
        slots = torch.where(step < counts[:, None], place, self.capacity - 1)
        every = torch.arange(self.rows, device=self.device) if rows is None else rows
        self._write = _Write(every[:, None], slots, None, read, all_rows=rows is None)
        return (torch.arange(read, device=self.device) <= place[:, :, None])[:, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model's attention: write what is new, return all that the queries may see."""
        # Under autocast rotary embedding gives float32 keys, which attention rounds to the values' type anyway.
        key_states = key_states.to(value_states.dtype)
        return self._put(self.keys, key_states, layer_idx), self._put(self.values, value_states, layer_idx)

    def _put(self, layers: list[torch.Tensor], states: torch.Tensor, number: int) -> torch.Tensor:
        write = self._write
        if number == len(layers):
            layers.append(states.new_zeros((self.rows, states.shape[1], self.capacity, states.shape[3])))
        layer, device = layers[number], states.device
        source = states if write.source is None else states[write.source.to(device)]
        layer[write.rows.to(device), :, write.slots.to(device)] = source.transpose(1, 2)
        if write.read == 0:
            return states
        read = layer[:, :, : write.read]
        return read if write.all_rows else read[write.rows[:, 0].to(device)]


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with fewer key than query heads, without a copy of keys and values for each query head.

    query: (rows, heads, width, dim); key, value: (rows, kv_heads, slots, dim); mask: (rows, 1, width, slots), or None
    for plain causal attention. The query heads that share a key head become rows of one longer query.
    """
    rows, heads, width, dim = query.shape
    if attention_mask is None:
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    else:
        group = heads // key.shape[1]
        folded = query.reshape(rows, key.shape[1], group * width, dim)
        mask = attention_mask if width == 1 else attention_mask.repeat(1, 1, group, 1)
        output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
        output = output.reshape(rows, heads, width, dim)
    return output.transpose(1, 2), None


@contextmanager
def attention_over_slots(language_model: PreTrainedModel) -> Iterator[None]:
    """Let the language model use `grouped_attention`; its own attention comes back at the end, also after an error."""
    AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
    config = language_model.config
    own = config._attn_implementation
    config._attn_implementation = GROUPED_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = own
