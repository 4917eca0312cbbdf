"""Rows side by side on the live KV cache: the queue, the places of the batch, prefill, crops, one step.

A prompt is prefilled once and copied to all of its rollouts; rows that finish give their place to the next in the
queue; a row whose crop is cut gets its tokens behind what it has, in a forward of its own.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from PIL import Image

from conversation import IMAGE_PAD, Renderer
from crop_tool import CALL_CLOSE
from kv_cache import RaggedCache
from rollouts import Response, SamplingParams
from sampling import choose, draw_uniforms
from step_graphs import CudaRecorder, Recorder, StepGraphs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows that wait for a crop are served together: at once when half of the running rows wait, or after so many steps.
CROP_PATIENCE = 8
# With an empty queue the batch is made smaller when so large a share of its rows has finished.
COMPACT_SHARE = 0.25
# Rows get their slots in blocks of so many, because growing copies the cache.
SLOT_BLOCK = 256
# Prompts and crops go through the model in groups of so many tokens at most, or one by one where they are longer.
FORWARD_TOKENS = 8192


@dataclass(eq=False)
class Row(Response):
    """A response as the batch decodes it."""

    owner: int = 0  # the prompt's place in the caller's order
    uniforms: list[float] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)
    waited: int = 0
    length: int = 0  # tokens in the cache
    position: int = 0  # M-RoPE position of the next token

    @property
    def runs(self) -> bool:
        return not self.finish_reason and self.crop is None

    @property
    def context(self) -> list[int]:
        """What a prefill feeds: everything but a `</tool_call>` that will go in with its crop."""
        return self.prompt.ids + self.ids[: len(self.ids) - (self.crop is not None)]


class Decoder:
    """The model as decoding calls it: features of images, hidden states of chunks, logits, M-RoPE positions."""

    def __init__(self, base: PreTrainedModel, renderer: Renderer, suppressed: Sequence[int] = ()) -> None:
        """suppressed: ids that are never sampled."""
        self.base, self.renderer = base, renderer
        self.cuda_graphs = False
        self.image_pad, self.call_close = renderer.ids[IMAGE_PAD], renderer.ids[CALL_CLOSE]
        self.suppressed = torch.zeros(base.config.get_text_config().vocab_size, dtype=torch.bool)
        self.suppressed[list(suppressed)] = True
        self._crop_positions: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}

    def recorder(self) -> Recorder | None:
        """What records decode steps, where that is wanted and the model is on one GPU."""
        device, devices = self.base.device, set((getattr(self.base, "hf_device_map", None) or {}).values())
        return CudaRecorder() if self.cuda_graphs and device.type == "cuda" and len(devices) < 2 else None

    def encode(self, images: Sequence[Image.Image]) -> list[torch.Tensor]:
        """The features of each shown image, (tokens, hidden)."""
        pixels = self.renderer.processor.image_processor(images=list(images), return_tensors="pt")
        device = self.base.device
        output = self.base.model.get_image_features(
            pixels["pixel_values"].to(device), pixels["image_grid_thw"].to(device)
        )
        return list(output.pooler_output)

    def forward(
        self,
        cache: RaggedCache,
        ids: torch.Tensor,
        features: Sequence[torch.Tensor],
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hidden states (rows, width, hidden) of the chunk `ids` (rows, width).

        features: of the images in the chunk, in order; positions: (3, rows, width), given, never inferred.
        """
        device = self.base.device
        embeddings = self.base.get_input_embeddings()(ids.to(device))
        if features:
            places = (ids == self.image_pad).flatten().nonzero().squeeze(1).to(device)
            embeddings.view(-1, embeddings.shape[-1]).index_copy_(0, places, torch.cat(features).to(embeddings.dtype))
        output = self.base.model.language_model(
            inputs_embeds=embeddings,
            position_ids=positions.to(device),
            attention_mask={"full_attention": mask},
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) in float32, from hidden states (rows, hidden)."""
        return self.base.lm_head(hidden).float()

    def positions(
        self, ids: torch.Tensor, counts: torch.Tensor, images: Sequence[Image.Image]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """M-RoPE positions (3, rows, width) of right-padded `ids` from 0, and each row's next position (rows,)."""
        patch = self.renderer.processor.image_processor.patch_size
        grids = torch.tensor([[1, image.height // patch, image.width // patch] for image in images])
        positions, deltas = self.base.model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == self.image_pad).int(),
            image_grid_thw=grids if images else None,
            attention_mask=(torch.arange(ids.shape[1]) < counts[:, None]).long(),
        )
        return positions, counts + deltas.squeeze(1)

    def crop_positions(self, crop: Image.Image) -> tuple[torch.Tensor, int]:
        """Positions (3, chunk) of `</tool_call>` and a crop block, from 0, and how far the row moves on."""
        if crop.size not in self._crop_positions:
            ids = torch.tensor([[self.call_close, *self.renderer.image_block(crop.size)]])
            positions, advance = self.positions(ids, torch.tensor([ids.shape[1]]), [crop])
            self._crop_positions[crop.size] = positions[:, 0], int(advance)
        return self._crop_positions[crop.size]


@dataclass(frozen=True)
class Limits:
    """`batch_size` rows at most; `max_batch_tokens` cache slots over all rows at most, 0: no bound."""

    batch_size: int = 64
    max_batch_tokens: int = 0

    def allow(self, count: int, slots: int) -> bool:
        """Whether `count` rows of `slots` slots fit."""
        return self.max_batch_tokens == 0 or count * slots <= self.max_batch_tokens


@dataclass(frozen=True)
class _Prefilled:
    """What the rollouts of a prompt begin with."""

    logits: torch.Tensor  # (vocabulary,)
    position: int
    features: list[torch.Tensor]


class Batch:
    """One call of `generate`: the queue, the places of the batch, their cache and their next logits.

    A finished row keeps its place until another takes it. Every place begins with its row's prompt, from which
    further rollouts of the prompt copy it.
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: Sequence[Row],
        params: SamplingParams,
        take: Callable[[Row, int, float], None],
        limits: Limits,
        on_finish: Callable[[int], None] | None = None,
        keep_features: bool = False,
    ) -> None:
        """take: called with a row, the token that was chosen for it, and its log-prob."""
        self.decoder, self.params, self.take, self.limits = decoder, params, take, limits
        self.on_finish, self.keep_features = on_finish, keep_features
        self.device = decoder.base.device
        self.suppressed = decoder.suppressed.to(self.device)
        self.queue = deque(rows)
        self.to_begin = Counter(row.owner for row in rows)
        self.prefilled: dict[int, _Prefilled] = {}  # of prompts with rollouts still to begin
        self.encoded: dict[int, tuple[Image.Image, torch.Tensor]] = {}  # by id; the image is held, so ids stay unique
        self.rows: list[Row] = []
        self.cache = RaggedCache(self.device)
        self.graphs = StepGraphs(decoder.recorder())
        self.logits = torch.zeros(0, len(self.suppressed), device=self.device)  # (places, vocabulary)

    def step(self) -> bool:
        """Write the next token of every row that runs; False where no row is left to go on."""
        self._admit()
        if not self._live():
            return False
        self._sample()
        self._make_room()
        self._feed_tokens()
        self._feed_crops()
        return True

    def _live(self) -> list[Row]:
        return [row for row in self.rows if not row.finish_reason]

    # ------------------------------------------------------------------------------------------- places

    def _needs(self, row: Row) -> int:
        """Slots for the row until its next token."""
        crop = len(self.decoder.renderer.image_block(row.crop.size)) if row.crop is not None else 0
        return slots_needed(len(row.prompt.ids) + len(row.ids) + crop)

    def _reshape(self, keep: list[Row], count: int, slots: int) -> None:
        """Give the batch `count` places of at least `slots` slots, `keep` in the first ones."""
        capacity = -(-slots // SLOT_BLOCK) * SLOT_BLOCK
        if self.limits.max_batch_tokens:
            capacity = min(capacity, self.limits.max_batch_tokens // count)
        places = [self.rows.index(row) for row in keep]
        self.graphs.clear()
        self.cache.resize(places, count, capacity)
        logits = self.logits.new_zeros((count, self.logits.shape[1]))
        logits[: len(places)] = self.logits[places]
        self.rows, self.logits = list(keep), logits

    def _make_room(self) -> None:
        """Slots for the next step: grow, send the youngest rows back to the queue, or drop the finished ones."""
        live = self._live()
        if not live:
            return
        slots = max(map(self._needs, live))
        idle = len(self.rows) - len(live)
        if slots > self.cache.capacity:
            keep = self.rows if self.limits.allow(len(self.rows), slots) else live
            while not self.limits.allow(len(keep), slots):
                youngest = max(keep, key=lambda row: row.index)
                keep = [row for row in keep if row is not youngest]
                self.queue.appendleft(youngest)
                slots = max(map(self._needs, keep))
            self._reshape(keep, len(keep), slots)
        elif not self.queue and idle >= COMPACT_SHARE * len(self.rows):
            self._reshape(live, len(live), slots)

    def _admit(self) -> None:
        """Let the queue take the free places, as far as the slots reach."""
        live = self._live()
        chosen = self._next_rows(live)
        if not chosen:
            return
        count, slots = max(len(self.rows), len(live) + len(chosen)), max(map(self._needs, live + chosen))
        if count > len(self.rows) or slots > self.cache.capacity:
            keep = self.rows
            if not self.limits.allow(count, slots):
                keep, count = live, len(live) + len(chosen)
            self._reshape(keep, count, slots)
        donors = {row.owner: place for place, row in enumerate(self.rows)}
        free = [place for place, row in enumerate(self.rows) if row.finish_reason]
        free += range(len(self.rows), count)
        self.rows += chosen[: count - len(self.rows)]  # as many as there are new places; who sits where comes next
        groups: dict[int | Row, list[int]] = {}  # a new rollout shares its prompt, one that comes back has its own text
        for place, row in zip(free, chosen, strict=False):
            self.rows[place] = row
            groups.setdefault(row if row.ids else row.owner, []).append(place)
        to_prefill = []
        for key, places in groups.items():
            if key in self.prefilled and key in donors:
                self.cache.copy_prefix(donors[key], places, len(self.rows[places[0]].prompt.ids))
                self._begin(places, self.prefilled[key])
            else:
                to_prefill.append(places)
        for part in in_groups(to_prefill, [len(self.rows[places[0]].context) for places in to_prefill]):
            self._prefill(part)

    def _next_rows(self, live: list[Row]) -> list[Row]:
        """Rows from the head of the queue, no more than leave each row a block of slots to grow."""
        chosen: list[Row] = []
        slots = max(map(self._needs, live), default=0)
        while self.queue and len(live) + len(chosen) < self.limits.batch_size:
            slots = max(slots, self._needs(self.queue[0]))
            if (live or chosen) and not self.limits.allow(len(live) + len(chosen) + 1, slots + SLOT_BLOCK):
                break
            chosen.append(self.queue.popleft())
        return chosen

    # ------------------------------------------------------------------------------------------- prefill

    def _prefill(self, groups: list[list[int]]) -> None:
        """Encode one context a group of places, and write it into all places of the group."""
        firsts = [self.rows[places[0]] for places in groups]
        ids, counts = padded([row.context for row in firsts])
        images = [image for row in firsts for image in row.images]
        features = self._encode(images)
        positions, following = self.decoder.positions(ids, counts, images)
        source = [number for number, places in enumerate(groups) for _ in places]
        self.cache.begin_prefill(source, [place for places in groups for place in places], counts[source], ids.shape[1])
        hidden = self.decoder.forward(self.cache, ids, features, positions, None)
        logits = self.decoder.logits(hidden[torch.arange(len(groups)), counts - 1])
        remaining = iter(features)
        for places, row, own, position in zip(groups, firsts, logits, following.tolist(), strict=True):
            self._begin(places, _Prefilled(own, position, [next(remaining) for _ in row.images]))

    def _encode(self, images: list[Image.Image]) -> list[torch.Tensor]:
        """Features of the images; one and the same image is encoded once, also for prompts that follow soon."""
        new = {id(image): image for image in images if id(image) not in self.encoded}
        if new:
            features = self.decoder.encode(list(new.values()))
            self.encoded |= {key: pair for key, pair in zip(new, zip(new.values(), features, strict=True), strict=True)}
        found = [self.encoded[id(image)][1] for image in images]
        for key in list(self.encoded)[: -self.limits.batch_size]:
            del self.encoded[key]
        return found

    def _begin(self, places: list[int], prefilled: _Prefilled) -> None:
        """Set the rows at `places` behind what their slots now hold."""
        self.logits[places] = prefilled.logits
        for row in (self.rows[place] for place in places):
            row.length, row.position = len(row.context), prefilled.position
            if self.keep_features:
                row.features = list(prefilled.features)
            if not row.ids:
                row.uniforms = draw_uniforms(self.params.seed, row.index, row.budget)
                self.to_begin[row.owner] -= 1
        if not row.ids:
            self.prefilled[row.owner] = prefilled
        if not self.to_begin[row.owner]:
            self.prefilled.pop(row.owner, None)

    # ------------------------------------------------------------------------------------------- one step

    def _sample(self) -> None:
        """Choose the next token of every running row and write it into the row's book."""
        if not any(row.runs for row in self.rows):
            return
        uniforms = [row.uniforms[row.sampled] if row.runs else 0.0 for row in self.rows]
        forced = [row.forced[row.sampled] if row.sampled < len(row.forced) else -1 for row in self.rows]
        tokens, logprobs = choose(self.logits, self.params, self.suppressed, uniforms, forced)
        finished = 0
        for row, token, logprob in zip(self.rows, tokens, logprobs, strict=True):
            if row.runs:
                self.take(row, token, logprob)
                if row.finish_reason:
                    finished, row.uniforms = finished + 1, []
        if self.on_finish and finished:
            self.on_finish(finished)

    def _feed_tokens(self) -> None:
        """Feed every running row the token that it wrote; the others' places go along without effect."""
        running = [row for row in self.rows if row.runs]
        if not running:
            return
        table = [(row.ids[-1], row.length, row.position, row.runs) for row in self.rows]
        read = self.cache.read_length(max(row.length for row in running) + 1)
        step = partial(self._step, read=read)
        self.logits = self.graphs.run(step, (len(self.rows), read), torch.tensor(table).to(self.device))
        for row in running:
            row.length += 1
            row.position += 1

    def _step(self, table: torch.Tensor, read: int) -> torch.Tensor:
        """Logits behind one more token a row; `table`: (rows, 4) its id, the row's length, its position, does it run.

        It may be recorded: nothing but tensors may depend on the table, and no tensor may be read on the way.
        """
        ids, lengths, positions, counts = table.unbind(1)
        mask = self.cache.begin_chunk(None, lengths, counts, 1, read)
        hidden = self.decoder.forward(self.cache, ids[:, None], [], positions[None, :, None].expand(3, -1, 1), mask)
        return self.decoder.logits(hidden[:, -1])

    def _feed_crops(self) -> None:
        """Show the waiting rows their crops, when it is time for them."""
        waiting = [place for place, row in enumerate(self.rows) if row.crop is not None]
        live = len(self._live())
        if waiting and (2 * len(waiting) >= live or any(self.rows[p].waited >= CROP_PATIENCE for p in waiting)):
            blocks = [self.decoder.renderer.image_block(self.rows[place].crop.size) for place in waiting]
            pairs = list(zip(waiting, blocks, strict=True))
            for part in in_groups(pairs, [len(block) + 1 for block in blocks]):
                self._feed_blocks(*map(list, zip(*part, strict=True)))
        for place in waiting:
            self.rows[place].waited += 1

    def _feed_blocks(self, places: list[int], blocks: list[list[int]]) -> None:
        """One chunk a row: the `</tool_call>` that it wrote, and the block of its crop."""
        rows = [self.rows[place] for place in places]
        features = self.decoder.encode([row.crop for row in rows])
        ids, counts = padded([[self.decoder.call_close, *block] for block in blocks])
        positions = torch.zeros((3, *ids.shape), dtype=torch.long)
        advances = []
        for number, row in enumerate(rows):
            own, advance = self.decoder.crop_positions(row.crop)
            positions[:, number, : own.shape[1]] = own + row.position
            advances.append(advance)
        lengths = torch.tensor([row.length for row in rows])
        where, fed = torch.tensor(places, device=self.device), counts.to(self.device)
        read = self.cache.read_length(int((lengths + counts).max()))
        mask = self.cache.begin_chunk(where, lengths.to(self.device), fed, ids.shape[1], read)
        hidden = self.decoder.forward(self.cache, ids, features, positions, mask)
        self.logits[where] = self.decoder.logits(hidden[torch.arange(len(rows), device=self.device), fed - 1])
        for row, block, advance, kept in zip(rows, blocks, advances, features, strict=True):
            row.show(block)
            row.waited = 0
            row.length += len(block) + 1
            row.position += advance
            if self.keep_features:
                row.features.append(kept)


def slots_needed(tokens: int) -> int:
    """Slots of a row that holds `tokens`, until its next token: that one, and the cache's spare slot."""
    return tokens + 2


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids (rows, width), and the number of each row's own (rows,)."""
    counts = torch.tensor([len(row) for row in rows])
    ids = torch.zeros((len(rows), int(counts.max())), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    return ids, counts


def in_groups(items: list, widths: Sequence[int]) -> Iterator[list]:
    """The items in order, in groups that, padded to their widest, are at most `FORWARD_TOKENS` wide together."""
    group, widest = [], 0
    for item, width in zip(items, widths, strict=True):
        widest = max(widest, width)
        if group and (len(group) + 1) * widest > FORWARD_TOKENS:
            yield group
            group, widest = [], width
        group.append(item)
    if group:
        yield group
