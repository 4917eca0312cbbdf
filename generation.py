"""Sample, stop at `</tool_call>`, crop, insert the crop's tokens, and go on, on the live KV cache.

One engine for inference, evaluation and rollouts. Each distinct prompt is prefilled once, each image encoded once;
crops are appended to the cache; nothing that was sampled is decoded and encoded again. Rows that finish give their
place to the next in the queue, so that a long answer does not hold up the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from config import SettingsError
from conversation import Prompt, Renderer, check_image_tokens
from decoding import Batch, Decoder, Limits, Row, slots_needed
from kv_cache import attention_over_slots
from packed_linear import PackedLinears
from rollouts import Response, Rollout, RolloutWriter, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CropEngine:
    """Generates with crops. `model` may be a PeftModel; it is put in eval mode for the time of a call.

    batch_size: rows decoded side by side, at most.
    max_batch_tokens: bound of the KV cache in tokens, rows times the slots of each; 0: none. Where the rows outgrow it,
        the youngest go back to the queue, to be prefilled again later. A crop that would not fit a row that had the
        whole cache for itself is `over_limit`.
    cuda_graphs: on a GPU, record decode steps and replay them.

    While it generates, the model's attention and linear layers are its own: one thread at a time may use the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        renderer: Renderer,
        batch_size: int = 64,
        max_batch_tokens: int = 0,
        cuda_graphs: bool = True,
    ) -> None:
        self.model, self.renderer, self.tokenizer = model, renderer, renderer.tokenizer
        self.batch_size, self.limits = batch_size, Limits(batch_size, max_batch_tokens)
        self.base = model.get_base_model() if hasattr(model, "peft_config") else model
        self.writer = RolloutWriter(renderer, self.base.config, self.base.generation_config, self._fits)
        self.decoder = Decoder(self.base, renderer, self.writer.suppressed)
        self.decoder.cuda_graphs = cuda_graphs

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        counts: int | Sequence[int] = 1,
        forced: Sequence[Sequence[int]] | None = None,
        on_finish: Callable[[int], None] | None = None,
        keep_features: bool = False,
        numbers: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """`counts` rollouts of each prompt (a number for all, or one each), in order, prompt by prompt.

        forced: per rollout, tokens to take in place of sampled ones, as long as they last (for tests, scoring and
            benchmarks).
        on_finish: called with the number of rollouts that just finished (for a progress bar).
        keep_features: fill `Rollout.features`.
        numbers: per rollout, the number from which, with the seed, its random numbers follow [its place in the order];
            so questions that are asked in several calls can be answered as in one.

        Raises:
            ValueError: for a prompt whose images do not fit its tokens.
            SettingsError: for a prompt that does not fit `max_batch_tokens` with what may be written after it.
        """
        counts = [counts] * len(prompts) if isinstance(counts, int) else list(counts)
        owners = [number for number, count in enumerate(counts) for _ in range(count)]
        numbers = range(len(owners)) if numbers is None else numbers
        rows = [
            Row(prompts[owner], sampling.max_new_tokens, forced[place] if forced else (), number, owner=owner)
            for place, (owner, number) in enumerate(zip(owners, numbers, strict=True))
        ]
        batch = self._batch(prompts, rows, sampling, on_finish, keep_features)
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), attention_over_slots(self.base.model.language_model), self._packed(len(rows)).used():
                while batch.step():
                    pass
        finally:
            self.model.train(was_training)
        return [self.writer.rollout(row, row.features) for row in rows]

    def stream(self, prompt: Prompt, sampling: SamplingParams, forced: Sequence[int] = ()) -> Iterator[Response]:
        """One response to one prompt, given out after each token with its crop: one and the same object, which grows.

        `writer.rollout` makes of the last one what `generate` returns. A stream that is closed, or dropped, frees its
        cache; in between the model may be used for other things. It is left in eval mode.

        Raises:
            ValueError, SettingsError: as `generate`.
        """
        row = Row(prompt, sampling.max_new_tokens, forced)
        batch, packed = self._batch([prompt], [row], sampling), self._packed(1)
        self.model.eval()
        goes_on = True
        while goes_on:
            # Not held while the caller has the response: the model's attention, and the thread's gradients, are his.
            with torch.no_grad(), attention_over_slots(self.base.model.language_model), packed.used():
                goes_on = batch.step()
            if goes_on:
                yield row

    def _batch(
        self,
        prompts: Sequence[Prompt],
        rows: Sequence[Row],
        sampling: SamplingParams,
        on_finish: Callable[[int], None] | None = None,
        keep_features: bool = False,
    ) -> Batch:
        for number, prompt in enumerate(prompts):
            check_image_tokens(prompt.ids, prompt.images, self.renderer, f"prompt {number}")
            self._check_fits(prompt, number, sampling)
        if sampling.seed is None:
            sampling = replace(sampling, seed=int(torch.randint(2**62, ())))
        take = partial(self.writer.take, sampling=sampling)
        return Batch(self.decoder, rows, sampling, take, self.limits, on_finish, keep_features)

    def _packed(self, rows: int) -> PackedLinears:
        return PackedLinears(self.base, min(rows, self.limits.batch_size))

    def _check_fits(self, prompt: Prompt, number: int, sampling: SamplingParams) -> None:
        needed = slots_needed(len(prompt.ids) + sampling.max_new_tokens)
        if not self.limits.allow(1, needed):
            raise SettingsError(
                f"max_batch_tokens is {self.limits.max_batch_tokens}, but prompt {number} has {len(prompt.ids)} tokens "
                f"and may write {sampling.max_new_tokens} more: raise it to {needed} or more, or lower the token budget"
            )

    def _fits(self, tokens: int) -> bool:
        return self.limits.allow(1, slots_needed(tokens))
