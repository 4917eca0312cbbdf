"""One process of a group: runs the scenarios that it is told and writes what it saw.

Started by tests/test_distributed.py: torch.distributed.run --nproc_per_node 2 tests/two_processes.py PLAN.json
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

import scoring
import train_grpo
import train_sft
from checkpoints import StoppedError
from command_line import resolve_training
from config import SettingsError
from data_check import Checker
from model_utils import load_for_training
from patience import OutageError
from rewards import RewardPart
from training import finish, release_memory, train

RANK = int(os.environ.get("RANK", "0"))
SHARED = {
    **{"max_steps": 2, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "warmup_ratio": 0},
    **{"gradient_accumulation_steps": 1, "gradient_checkpointing": "false", "logging_steps": 1, "disable_tqdm": True},
    **{"save_strategy": "no", "use_cpu": True},
}
LORA = {"use_lora": "true", "lora_r": 8, "lora_dropout": 0.3}
MOST_TOKENS = 48


def allow_fsdp_on_a_cpu() -> None:
    """accelerate turns a group of GPU processes into FSDP, but not one of CPU processes; all that follows works."""
    plain_init = AcceleratorState.__init__

    def init(self, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def allow_zero_on_a_cpu() -> None:
    """The same for DeepSpeed, which takes a CPU for a device of its own."""
    SHARED.pop("use_cpu")
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def variety(response: Any, reference: Any) -> float:
    """A reward that differs between the rollouts of any group."""
    return zlib.crc32(response.text.encode()) % 1000 / 1000


class Group:
    """What the scenarios share: where the model and the data are, and where results go."""

    def __init__(self, base: str, data: str, folder: str) -> None:
        self.base, self.data, self.folder = base, data, Path(folder)

    def settings(self, stage: str, name: str, **flags: Any) -> Any:
        paths = {"model_name": self.base, "train_data": f"{self.data}/train.jsonl", "image_base_path": self.data}
        group = {"num_generations": 4, "beta": 0.1, "max_completion_length": MOST_TOKENS}
        group |= {"watch_every": 0, "keep_rollouts_every": 0}
        output = {"output_dir": str(self.folder / name)}
        if "use_cpu" in SHARED and torch.distributed.is_torchelastic_launched():
            output["ddp_backend"] = "gloo"
        paths |= group if stage == "grpo" else {}
        return resolve_training({**SHARED, **paths, **output, "batch_size": 4, **flags}, (stage,))

    def sft_trainer(self, settings: Any) -> tuple[Any, Any]:
        loaded = load_for_training(settings.model, settings.data, settings.sft, settings.model.model_name)
        return loaded, train_sft.build_trainer(loaded, settings)

    def grpo_trainer(self, settings: Any) -> tuple[Any, Any]:
        loaded = load_for_training(settings.model, settings.data, settings.grpo, settings.model.model_name)
        return loaded, train_grpo.build_trainer(loaded, settings, (RewardPart("variety", variety),))

    # -------------------------------------------------------------------------------------------- scenarios

    def data_check(self) -> dict[str, Any]:
        """All processes open a file that nobody has checked; one of its rows is faulty."""
        seen: list[int] = []
        row = Checker.row

        def count(self, line: int, raw: bytes):
            seen.append(line)
            return row(self, line, raw)

        Checker.row = count
        settings = self.settings("sft", "data_check", train_data=f"{self.folder}/fresh.jsonl")
        _, trainer = self.sft_trainer(settings)
        return {"checked": len(seen), "lines": sorted(set(trainer.train_dataset["line"]))}

    def sft(self, batch_size: int = 4, name: str = "sft", **flags: Any) -> dict[str, Any]:
        """Full weights, rows in the file's order."""
        flags = {"train_sampling_strategy": "sequential", "batch_size": batch_size, **flags}
        settings = self.settings("sft", name, **flags)
        loaded, trainer = self.sft_trainer(settings)
        train(trainer, settings, "sft")
        finish(trainer, loaded, settings, "sft", settings.sft.output_dir)
        return {**steps(trainer), **weights(trainer)}

    def order(self) -> dict[str, Any]:
        """Three epochs; dropout takes different amounts of random numbers on each process."""
        settings = self.settings("sft", "order", **LORA, max_steps=-1, num_epochs=3, logging_steps=100)
        _, trainer = self.sft_trainer(settings)
        collate, seen = trainer.data_collator, []
        trainer.data_collator = lambda rows: seen.extend((row["line"], row["entry"]) for row in rows) or collate(rows)
        train(trainer, settings, "sft")
        return {"seen": seen}

    def grpo(self, batch_size: int = 4, name: str = "grpo", **flags: Any) -> dict[str, Any]:
        """The first half of the rows calls crops and ends soon, the second never calls and is cut."""
        settings = self.settings("grpo", name, batch_size=batch_size, **flags)
        loaded, trainer = self.grpo_trainer(settings)
        first = RANK * batch_size
        with scripted(trainer, first), watched(trainer) as differences:
            train(trainer, settings, "grpo")
        finish(trainer, loaded, settings, "grpo", settings.grpo.output_dir)
        return {
            **steps(trainer),
            **weights(trainer),
            "differences": differences,
            "images": [len(rollout.images) for rollout in trainer._batch_rollouts],
            "finish": [rollout.finish_reason for rollout in trainer._batch_rollouts],
        }

    def cut(self, batch_size: int = 4) -> dict[str, Any]:
        """As `grpo`, but what was cut carries no loss: nothing of the second half does."""
        return self.grpo(batch_size, name="cut", mask_truncated_completions=True)

    def lora(self, batch_size: int = 4) -> dict[str, Any]:
        return self.grpo(batch_size, name="lora", **LORA)

    def group(self) -> dict[str, Any]:
        """One prompt's rollouts on all processes, freely sampled; under watch, with a question for one process more."""
        watch = {"watch_every": 1, "watch_samples": 3, "keep_rollouts_every": 1}
        settings = self.settings("grpo", "group", num_generations=8, max_steps=1, steps_per_generation=1, **watch)
        _, trainer = self.grpo_trainer(settings)
        train(trainer, settings, "grpo")
        rows = {(row["line"], row["entry"]) for row in trainer._batch_rows}
        return {
            "rows": sorted(rows),
            "texts": [rollout.text for rollout in trainer._batch_rollouts],
            "watched": [item for item in trainer.state.log_history if "watch/crop_gain" in item],
        }

    def stand_in(self) -> dict[str, Any]:
        """A group on both processes whose row, drawn from a file that nobody has checked, is faulty."""
        flags = {"num_generations": 8, "max_steps": 4, "steps_per_generation": 1, "data_check": "lazy"}
        settings = self.settings("grpo", "stand_in", train_data=f"{self.folder}/half_faulty.jsonl", **flags)
        _, trainer = self.grpo_trainer(settings)
        seen, sound = [], trainer._sound

        def keep(drawn: list[dict[str, Any]]) -> list[dict[str, Any]]:
            rows = sound(drawn)
            seen.append([row["line"] for row in rows])
            return rows

        trainer._sound = keep
        train(trainer, settings, "grpo")
        log = trainer.fault_logs["train"]
        return {"rows": seen, "known": sorted(log.known), "drawn": log.drawn, "skipped": log.skipped}

    def blind(self) -> dict[str, Any]:
        """The same without a fault, but for a moment one of the processes cannot read its images."""
        flags = {"num_generations": 8, "max_steps": 4, "steps_per_generation": 1, "data_check": "lazy"}
        settings = self.settings("grpo", "blind", save_strategy="steps", save_steps=100, **flags)
        _, trainer = self.grpo_trainer(settings)
        draw, seen = trainer.rows.checker.draw, []

        def miss(*place: int) -> Any:
            checked, image = draw(*place)
            if RANK == 1 and trainer.state.global_step == 1 and not seen:
                seen.append(place)
                return replace(checked, fault="missing image"), None
            return checked, image

        trainer.rows.checker.draw = miss
        try:
            train(trainer, settings, "grpo")
        except StoppedError as stopped:
            return {"stopped": str(stopped)}
        return {"stopped": ""}

    def served(self) -> dict[str, Any]:
        """Rollouts from a server that both processes ask, with all weights trained and with an adapter."""
        server = {"rollout_backend": "vllm", "vllm_server": (self.folder / "server").read_text()}
        server["vllm_importance_sampling_correction"] = "false"  # its log-probs are invented
        scoring.IMAGES_PER_PASS = 1 + 3 * RANK  # as where one process has many more crops: other numbers of passes
        found = {}
        for name, flags in (("whole", {}), ("adapter", LORA)):
            settings = self.settings("grpo", f"served_{name}", steps_per_generation=1, **server, **flags)
            _, trainer = self.grpo_trainer(settings)
            train(trainer, settings, "grpo")
            found[name] = {**steps(trainer), "texts": [rollout.text for rollout in trainer._batch_rollouts]}
        return found

    def resume(self) -> dict[str, Any]:
        """Three steps, once at a stretch and once in two runs."""
        shared = {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
        straight = self.sft(name="straight", max_steps=3, **shared)
        self.sft(name="resume", max_steps=2, **shared)
        return {"straight": straight["loss"], "resumed": self.sft(name="resume", max_steps=3, **shared)["loss"]}

    def outage(self) -> dict[str, Any]:
        """Three steps at a stretch, and in two runs between which the second process alone missed an image."""

        def run(name: str, misses: bool = False) -> dict[str, Any]:
            settings = self.settings("grpo", name, max_steps=3, save_strategy="steps", save_steps=100)
            _, trainer = self.grpo_trainer(settings)
            load = trainer._images

            def image(example: Any) -> Any:
                if misses and RANK == 1 and trainer.state.global_step == 1:
                    raise OutageError(f"{example.name}: missing image")
                return load(example)

            trainer._images = image
            try:
                train(trainer, settings, "grpo")
            except StoppedError as stopped:
                return {"stopped": str(stopped)}
            return {**steps(trainer), **weights(trainer)}

        return {"straight": run("straight"), "cut": run("outage", misses=True), "resumed": run("outage")}

    def faults(self) -> dict[str, Any]:
        """SFT in which nearly all rows of the second process are faulty at the second step."""
        settings = self.settings("sft", "faults", max_steps=4, save_strategy="steps", save_steps=100)
        _, trainer = self.sft_trainer(settings)
        count = trainer._count_faults

        def counted(*args: Any) -> None:
            count(*args)
            if RANK == 1 and trainer.state.global_step == 1:
                raise OutageError("faulty rows")

        trainer._count_faults = counted
        try:
            train(trainer, settings, "sft")
        except StoppedError as stopped:
            return {"stopped": str(stopped)}
        return {"stopped": ""}

    def unshared_disk(self) -> dict[str, Any]:
        """Only the first process finds a checkpoint."""
        settings = self.settings("sft", f"disk_{RANK}", save_strategy="steps", save_steps=1)
        _, trainer = self.sft_trainer(settings)
        if RANK == 0:
            (self.folder / "disk_0/checkpoint-1").mkdir(parents=True)
        try:
            train(trainer, settings, "sft")
        except SettingsError as error:
            return {"error": str(error)}
        return {"error": ""}


@contextmanager
def scripted(trainer: Any, first: int):
    """The rollouts of every step are written beforehand; `first` is the number of this process's first row."""
    generate, renderer = trainer.engine.generate, trainer.engine.renderer

    def texts(row: int) -> str:
        if row < 4:
            calls = [f"<tool_call>[{row}, {3 + call}, 40, {20 + row}]</tool_call>" for call in range(1 + row % 2)]
            return "".join(calls) + "<|im_end|>"
        return f"rising {row} " * MOST_TOKENS

    def forced(prompts, sampling, counts, **kwargs):
        ids = [renderer.text_ids(texts(first + row))[:MOST_TOKENS] for row in range(sum(counts))]
        return generate(prompts, sampling, counts, forced=ids, **kwargs)

    trainer.engine.generate = forced
    yield
    trainer.engine.generate = generate


@contextmanager
def watched(trainer: Any):
    """Collects the largest difference, per step, between the rollout's log-probs and the trainer's."""
    produce, differences = trainer._generate_and_score_completions, []

    def compare(inputs):
        output = produce(inputs)
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        images = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
        with torch.no_grad():
            logps, *_ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, output["completion_ids"].shape[1], **{name: output[name] for name in images}
            )
        own = torch.zeros_like(logps)  # 1 where the model sampled the token and the token carries loss
        for row, rollout in enumerate(trainer._batch_rollouts):
            own[row, : len(rollout.sampled_mask)] = torch.tensor(rollout.sampled_mask, dtype=own.dtype)
        own *= output["completion_mask"]
        differences.append(float(((logps - output["sampling_per_token_logps"]) * own).abs().max()))
        return output

    trainer._generate_and_score_completions = compare
    yield differences
    trainer._generate_and_score_completions = produce


def steps(trainer: Any) -> dict[str, Any]:
    history = [item for item in trainer.state.log_history if "loss" in item]
    return {name: [item[name] for item in history] for name in ("loss", "grad_norm")}


def weights(trainer: Any) -> dict[str, Any]:
    """A checksum of each of this process's weights, gathered where they are sharded."""
    values = [value.detach() for value in trainer.model.parameters()]
    values = [value.full_tensor() if isinstance(value, DTensor) else value for value in values]
    return {"weights": [float(value.double().sum()) for value in values]}


def main(plan_file: str) -> None:
    plan = json.loads(Path(plan_file).read_text())
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_a_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        allow_zero_on_a_cpu()
    group = Group(plan["base"], plan["data"], plan["folder"])
    for name in plan["scenarios"]:
        release_memory()
        result = getattr(group, name)()
        (group.folder / f"{name}.{RANK}.json").write_text(json.dumps(result))
    # A process that ends while the other still works may abort in gloo's threads.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
