"""TRL's trainers as this project needs them; only this file and resuming.py touch private methods of the libraries.

TRL is pinned to 1.16; tests/test_trainers.py pins what is relied on.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # `rollout_func` is pinned with TRL; the notice helps no user

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import GRPOTrainer, SFTTrainer
from trl.trainer.utils import RepeatSampler, split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from config import SettingsError
from conversation import IMAGE_PAD, IMAGE_TOKENS, Example, check_image_tokens
from crop_tool import resolve_box
from data_check import as_example
from decoding import Decoder
from generation import CropEngine, Rollout, SamplingParams
from judge import Claim, Judge
from measures import rollout_figures
from packing import Packer, accept_segments
from patience import OutageError, shared_outage
from response_format import parse_response
from resuming import Resumable, Row
from rewards import Reference
from rollout_pages import ScoredRollout
from row_index import SoundRows
from scoring import KeptFeatures, accept_features, group_rows, image_spans, kept_features, pack_rows
from sft_data import FAULTS, ROWS, length_buckets
from sharding import check_rollouts_possible, gather_head_with_the_model, whole_weights, zero_stage
from vision_tower import speed_up
from vllm_generation import VLLMEngine

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image
    from transformers import PreTrainedModel

Engine = CropEngine | VLLMEngine
LOGGED = ("prompt", "completion", "advantages")  # what TRL keeps of the last rollouts for `log_completions`


class CropSFTTrainer(Resumable, SFTTrainer):
    """SFT on batches of our collator, each of rows of about the same length.

    padding_free: put the rows of a batch behind each other instead of padding them (packing.py).
    """

    def __init__(self, *args: Any, padding_free: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Divide by the trained tokens of all processes and micro-batches, which TRL's loss does once it is told them.
        # Qwen2.5-VL says that its own forward cannot, so tokens of a short micro-batch would weigh more than others.
        self.model_accepts_loss_kwargs = True
        if self.is_fsdp_enabled:
            gather_head_with_the_model(self.model)
        self._batch_rows: list[Row] = []
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if padding_free and self.label_smoother is not None:
            raise SettingsError("label smoothing needs the padded logits: leave --padding_free off, or the smoothing")
        self._packer = Packer(base) if padding_free else None

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        # Rows of like length on all processes: none waits for another.
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self._order = SeededOrder(size, length_buckets(train_dataset or self.train_dataset), self.args.seed)
        return self._order

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return SeededOrder(self.args.eval_batch_size, length_buckets(eval_dataset), seed)

    def progress(self) -> dict[str, Any]:
        return super().progress() | {"tokens": self._total_train_tokens}

    def restore(self, progress: dict[str, Any]) -> None:
        super().restore(progress)
        self._total_train_tokens = progress["tokens"]

    def rows_of_batch(self) -> list[Row]:
        return self._batch_rows

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        drawn = inputs.pop(FAULTS, (len(inputs["labels"]), []))
        try:
            self._count_faults("train" if self.model.training else "eval", *drawn)
        except OutageError as outage:  # met by this process alone
            self.stop_reason = str(outage)
        return super()._prepare_inputs(inputs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._batch_rows = inputs.pop(ROWS, [])
        if self._packer is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        tokens = self._total_train_tokens + self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum()
        result = super().compute_loss(model, self._packer(inputs), *args, **kwargs)
        if self.model.training:  # TRL counts one token for a batch without mask
            self._total_train_tokens = tokens.item()
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return result


class SeededOrder(LengthGroupedSampler):
    """Draws the order of an epoch from seed and epoch alone: the same on every process, and after a resume.

    transformers draws it from torch's global generator, which stands elsewhere on each process after, say, dropout on
    a CPU: from the second epoch on rows would be seen twice, or not at all.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class SeededGroups(RepeatSampler):
    """As TRL's sampler, but the order of an epoch comes from seed and epoch alone: the same after a resume."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class CropGRPOTrainer(Resumable, GRPOTrainer):
    """R-GRPO: rollouts come from our engine, and each row is scored with its main image and its crops.

    Inserted crop tokens carry no loss (`env_mask`, born in the engine). Reward functions get `rollout` and
    `reference`, one each a row. Overridden of TRL: `_generate`, whose last two results are the images of each row;
    `_generate_and_score_completions`, which gets the rows of the batch; `_prepare_inputs`, which keeps groups
    together; and `_get_per_token_logps_and_entropies`, which computes a prompt once for its rows. A frozen vision
    tower sees an image once a step: its features take the place of the pixels in every later pass.

    vLLM's log-probs differ a little from the trainer's. TRL's own correction for that
    (`vllm_importance_sampling_correction`) works here as well, and TRL calls `sync_weights` before each rollout.

    rows: makes sound rows of those that are drawn. on_rollouts: called with this trainer, the steps that train on the
        rollouts, and those of this process.
    """

    def __init__(
        self,
        *args: Any,
        engine: Engine,
        sampling: SamplingParams,
        rows: SoundRows,
        judge: Judge | None = None,
        on_rollouts: Callable[[CropGRPOTrainer, range, list[ScoredRollout]], None] | None = None,
        **kwargs: Any,
    ):
        self.engine, self.sampling, self.judge = engine, sampling, judge
        self.rows, self.on_rollouts = rows, on_rollouts
        self._batch_rows: list[dict[str, Any]] = []
        self._batch_rollouts: list[Rollout] = []
        self._batch_references: list[Reference] = []
        self._batch_keys: list[Row] = []
        super().__init__(*args, rollout_func=self._roll_out, **kwargs)
        self.data_collator = rows.announce  # called for a batch while the one before it is trained on
        if isinstance(engine, VLLMEngine):  # as an argument, `use_vllm` would start a vLLM of TRL's own
            self.use_vllm, self.vllm_generation, self._last_loaded_step = True, engine, -1
            engine.gathered = partial(whole_weights, self)
        check_rollouts_possible(self)
        if isinstance(engine, CropEngine) and (self.is_fsdp_enabled or zero_stage(self) == 3):
            engine.decoder.cuda_graphs = False  # weights that are gathered for a rollout lie elsewhere each time
        if self.is_fsdp_enabled:
            gather_head_with_the_model(self.model)
        base = self.accelerator.unwrap_model(self.model)
        base = base.get_base_model() if isinstance(base, PeftModel) else base
        self.keeps_features = not any(value.requires_grad for value in base.model.visual.parameters())
        # Only sdpa takes masks of our own.
        self.shares_prompts = base.config.get_text_config()._attn_implementation == "sdpa"
        self._decoder = Decoder(base, engine.renderer)
        self._image_processor = self.processing_class.image_processor
        if self.ref_model is not None:  # which TRL has loaded by itself
            speed_up(self.accelerator.unwrap_model(self.ref_model))
        for model in (base, self.ref_model):
            if model is not None:
                model = self.accelerator.unwrap_model(model)
                accept_features(model)
                if self.shares_prompts:
                    accept_segments(model)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        given = super()._get_train_sampler(dataset)
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        self._order = SeededGroups(**{name: getattr(given, name) for name in names})
        return self._order

    def progress(self) -> dict[str, Any]:
        own = {"micro_batches": self._step, "rows": self._batch_keys}
        if self._step % (self.args.steps_per_generation * self.num_iterations):  # rollouts wait for their step
            own["buffer"] = self._buffered_inputs
        if self.args.log_completions:
            own["logs"] = {name: list(self._logs[name]) for name in LOGGED}
            own["logs"]["rewards"] = {name: list(values) for name, values in self._logs["rewards"].items()}
        return super().progress() | own

    def restore(self, progress: dict[str, Any]) -> None:
        super().restore(progress)
        self._step, self._batch_keys = progress["micro_batches"], progress["rows"]
        self._buffered_inputs = progress.get("buffer")
        logs = progress.get("logs", {})
        for name, values in logs.pop("rewards", {}).items():
            self._logs["rewards"][name].extend(values)
        for name, values in logs.items():
            self._logs[name].extend(values)

    def rows_of_batch(self) -> list[Row]:
        parts = self.args.steps_per_generation
        size, place = len(self._batch_keys) // parts, (self._step - 1) % parts  # TRL has counted it already
        return self._batch_keys[place * size : (place + 1) * size]

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.keep_border()

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            self._batch_rows = self._sound(inputs)
            if self.model.training:
                self._batch_keys = [(row["line"], row["entry"]) for row in self._batch_rows]
            output = super()._generate_and_score_completions(self._batch_rows)
        except OutageError as outage:
            self.stop_before_this_step(str(outage))
        finally:
            self.processing_class.image_processor = self._image_processor
        # TRL drops the pixels of a whole batch, without a word, where one row's tokens and features differ.
        if "pixel_values" not in output:
            raise RuntimeError("TRL dropped the images of a batch: image tokens and features did not match")
        if self.on_rollouts is not None and self.model.training:
            self._hand_over(output["advantages"])
        return output

    def _sound(self, drawn: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows to work on, with the `prompt` that TRL logs; a dict each, since it writes reward columns into them.

        `drawn`: rows of the training data, G of each group, of which some may be on other processes.
        """
        with shared_outage():
            rows, faults = self.rows(drawn)
        if not self.rows.is_checked:
            own = [[(row["line"], row["entry"]) for row in part] for part in (drawn, rows)]
            pairs = set(gather_object(list(zip(*own, strict=True))))
            keys = {key for key, _ in pairs}
            if len(keys) < len(pairs):  # a group of two prompts
                raise OutageError("an image of the rows drawn can be read by some of the processes alone")
            named = {(fault["line"], fault["entry"]): fault for fault in gather_object(faults)}
            with shared_outage():
                self._count_faults("train", len(keys | set(named)), list(named.values()))
        return [row | {"prompt": [{"role": "user", "content": row["question"]}]} for row in rows]

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """As TRL's, but rows are not shuffled into micro-batches: those of a group stay together, beside one prompt."""
        steps = self.args.steps_per_generation
        if not self.model.training or steps == 1:
            return super()._prepare_inputs(generation_batch)
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = split_pixel_values_by_grid(self._generate_and_score_completions(generation_batch))
            self._buffered_inputs = [unsplit_pixel_values_by_grid(part) for part in split_tensor_dict(batch, steps)]
        return self._buffered_inputs[self._step % steps]

    def _generate(self, prompts: list) -> tuple:
        self.tools = []  # truthy, TRL would render its own tools into the prompt
        *head, _, _ = super()._generate(prompts)
        images = [list(rollout.images) for rollout in self._batch_rollouts]
        self.tools = [self._roll_out]  # truthy, TRL takes the images of the whole row for scoring
        if self.keeps_features:
            # Made whole once: the processes have different numbers of images, and of passes over them.
            with whole_weights(self) if self.use_vllm else nullcontext():
                features = kept_features(self._batch_rollouts, self._encode)
            self.processing_class.image_processor = KeptFeatures(self._image_processor, features)
        return (*head, images, images)

    def _encode(self, images: list[Image.Image]) -> list[torch.Tensor]:
        """Features of the images of rollouts that came without them, as vLLM's do."""
        with torch.no_grad(), self.accelerator.autocast():
            return self._decoder.encode(images)

    def _get_per_token_logps_and_entropies(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        num_images: list[int] | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        if not self.shares_prompts:
            images = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw, "num_images": num_images}
            images["mm_token_type_ids"] = mm_token_type_ids
            # The model counts images by what it sees, so a row that is masked out must be seen up to its last image.
            leads_to_image = mm_token_type_ids.flip(1).cummax(1).values.flip(1)[:, -logits_to_keep:]
            completion_mask = attention_mask[:, -logits_to_keep:] | leads_to_image
            mask = torch.cat([attention_mask[:, :-logits_to_keep], completion_mask], dim=1)
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, mask, logits_to_keep, batch_size, **images, **others
            )
        ids = self.engine.renderer.ids
        tokens = image_grid_thw.prod(-1) // self._image_processor.merge_size**2
        spans = image_spans(input_ids, attention_mask, logits_to_keep, tokens.tolist(), num_images, ids[IMAGE_PAD])
        pixels = pixel_values.split(image_grid_thw.prod(-1).tolist())
        unscored = torch.tensor([ids[token] for token in IMAGE_TOKENS], device=input_ids.device)
        size = batch_size or len(input_ids)
        results = []
        for start in range(0, len(input_ids), size):
            chunk = slice(start, start + size)
            rows, mask, chunk_spans = input_ids[chunk], attention_mask[chunk], spans[chunk]
            positions = self._positions(rows, mask, image_grid_thw, chunk_spans)
            groups = group_rows(rows, mask, logits_to_keep, chunk_spans, pixels)
            packed = pack_rows(rows, mask, positions, logits_to_keep, chunk_spans, unscored, groups)
            with self.accelerator.autocast():
                output = model(
                    input_ids=packed.input_ids,
                    position_ids=packed.position_ids,
                    segments=packed.segments,
                    pixel_values=torch.cat([pixels[image] for image in packed.images]),
                    image_grid_thw=image_grid_thw[packed.images],
                    labels=packed.labels,
                    fused_lm_head=True,
                )
            results.append((packed.unpack(output.log_probs), packed.unpack(output.entropy)))
        logps, entropies = (None if parts[0] is None else torch.cat(parts) for parts in zip(*results, strict=True))
        return logps, entropies, None

    def _positions(
        self, ids: torch.Tensor, mask: torch.Tensor, grids: torch.Tensor, spans: Sequence[tuple[int, int, int]]
    ) -> torch.Tensor:
        """M-RoPE positions (3, rows, seq)."""
        used = [image for first, _, end in spans for image in range(first, end)]
        pads = ((ids == self.engine.renderer.ids[IMAGE_PAD]) & mask.bool()).int()
        positions, _ = self._decoder.base.model.get_rope_index(
            ids, mm_token_type_ids=pads, image_grid_thw=grids[used], attention_mask=mask
        )
        return positions

    def _roll_out(self, prompts: list, trainer: GRPOTrainer) -> dict[str, list]:
        """TRL's rollout function, on the rows of this process; each distinct example is encoded once."""
        started = time.perf_counter()
        places: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, row in enumerate(self._batch_rows):
            places[row["line"], row["entry"]].append(place)
        examples = [as_example(self._batch_rows[group[0]]) for group in places.values()]
        with shared_outage():
            images = [self._images(example) for example in examples]
        prompts = [
            self.engine.renderer.prompt(example.question, original, shown)
            for example, (original, shown) in zip(examples, images, strict=True)
        ]
        # In the precision in which the rollouts will be scored.
        with shared_outage(), self.weights_for_rollouts(), self.accelerator.autocast():
            counts = [len(group) for group in places.values()]
            rollouts = iter(self.engine.generate(prompts, self.sampling, counts, keep_features=self.keeps_features))
        found: dict[int, tuple[Rollout, Reference]] = {}
        for example, (original, _), group in zip(examples, images, places.values(), strict=True):
            reference = self._reference(example, original.size)
            found |= {place: (next(rollouts), reference) for place in group}
        pairs = [found[place] for place in range(len(self._batch_rows))]
        if self.judge is not None:
            with shared_outage():
                pairs = self._judged(pairs)
        self._batch_rollouts = [rollout for rollout, _ in pairs]
        self._batch_references = [reference for _, reference in pairs]
        self._check(self._batch_rollouts)
        self._log_rollouts(pairs, time.perf_counter() - started)
        return {
            "prompt_ids": [rollout.prompt_ids for rollout, _ in pairs],
            "completion_ids": [rollout.completion_ids for rollout, _ in pairs],
            "logprobs": [rollout.logprobs for rollout, _ in pairs],
            "env_mask": [rollout.sampled_mask for rollout, _ in pairs],
            "rollout": [rollout for rollout, _ in pairs],
            "reference": [reference for _, reference in pairs],
        }

    def weights_for_rollouts(self) -> AbstractContextManager:
        """Whole weights, where our engine decodes with them; vLLM has its own."""
        return nullcontext() if self.use_vllm else whole_weights(self)

    def _images(self, example: Example) -> tuple[Image.Image, Image.Image]:
        """Original and shown."""
        try:
            return self.rows.images(example.image_path)
        except ValueError as error:  # it was sound when the data were checked
            raise OutageError(f"{example.name}: {error}") from None

    def _reference(self, example: Example, size: tuple[int, int]) -> Reference:
        smallest = self.engine.renderer.contract.min_crop_side
        regions = [resolve_box(box, size, smallest)[1] for box in example.boxes]
        boxes = tuple(region for region in regions if region is not None)
        return Reference(example.answer, boxes, size, example.question)

    def _judged(self, pairs: list[tuple[Rollout, Reference]]) -> list[tuple[Rollout, Reference]]:
        """The pairs with the judge's verdicts; every part of the reward that asks for accuracy reads them."""
        answers = [parse_response(rollout.text, rollout.tool_calls).answer_content for rollout, _ in pairs]
        claims = [
            Claim(reference.question, reference.answer, answer)
            for (_, reference), answer in zip(pairs, answers, strict=True)
        ]
        before = self.judge.fallbacks
        verdicts = self.judge.accuracies(claims)
        self._log_metric("judge/fallback", (self.judge.fallbacks - before) / len(pairs))
        return [
            (rollout, replace(reference, verdict=verdict))
            for (rollout, reference), verdict in zip(pairs, verdicts, strict=True)
        ]

    def _check(self, rollouts: Sequence[Rollout]) -> None:
        for row, rollout in zip(self._batch_rows, rollouts, strict=True):
            ids = rollout.prompt_ids + rollout.completion_ids
            check_image_tokens(ids, rollout.images, self.engine.renderer, as_example(row).name)

    def _log_rollouts(self, pairs: Sequence[tuple[Rollout, Reference]], seconds: float) -> None:
        """Figures of the rollouts; TRL averages them over processes and logging steps."""
        parsed = [(parse_response(rollout.text, rollout.tool_calls), reference) for rollout, reference in pairs]
        sampled = sum(sum(rollout.sampled_mask) for rollout, _ in pairs)
        figures = {"rollout/tokens_per_second": sampled / seconds, "rollout/seconds": seconds}
        for name, value in (rollout_figures(parsed) | figures).items():
            self._log_metric(name, value)

    def _hand_over(self, advantages: torch.Tensor) -> None:
        """Give `on_rollouts` the rollouts of this process, what they earned, and the steps that train on them."""
        micro_batches = self.args.steps_per_generation * self.num_iterations
        first = self.state.global_step + 1
        steps = range(first, first + max(1, micro_batches // self.args.gradient_accumulation_steps))
        begin = self.args.process_index * len(self._batch_rows)  # TRL's logs hold the rows of all processes
        scored = []
        for place, row in enumerate(self._batch_rows):
            parts = {name: self._logs["rewards"][name][begin + place] for name in self.reward_func_names}
            weighted = zip(self.reward_weights.tolist(), parts.values(), strict=True)
            reward = sum(weight * value for weight, value in weighted if value == value)  # nan: not scored
            pair = self._batch_references[place], self._batch_rollouts[place]
            scored.append(ScoredRollout(as_example(row), *pair, parts, reward, advantages[place].item()))
        self.on_rollouts(self, steps, scored)
