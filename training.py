"""What both stages share around TRL's trainers: arguments, resume, checkpoints' companions, the end of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from config import SettingsError, StageConfig, TrainingSettings
from model_utils import LoadedModel, save_companions, save_final_model
from visualize import plot_training_curves

# transformers 5.23 renames the field; the new name does not exist in 5.17, on which this also runs.
warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")

LOG_FILE = "training_log.json"
CURVES_FILE = "training_curves.png"
SHARED_ARGUMENTS = (
    *("output_dir", "learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("weight_decay", "lr_scheduler_type", "bf16", "fp16", "gradient_checkpointing"),
    *("logging_steps", "save_steps", "save_total_limit", "seed"),
)


def common_arguments(config: StageConfig) -> dict[str, Any]:
    """Settings of ours that are arguments of TRL's trainers, by TRL's names."""
    values = {name: getattr(config, name) for name in SHARED_ARGUMENTS}
    # transformers 5 has one field for both: below 1 it is the share of the steps.
    values["warmup_steps"] = config.warmup_ratio
    values["report_to"] = "none"
    values["logging_first_step"] = True
    values["dataloader_pin_memory"] = torch.cuda.is_available()
    return values


class CheckpointCompanions(TrainerCallback):
    """Puts crop contract and settings beside the weights of every checkpoint."""

    def __init__(self, loaded: LoadedModel, settings: TrainingSettings) -> None:
        self.loaded, self.settings = loaded, settings

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            save_companions(folder, self.loaded.processor, self.loaded.contract, self.settings)


def announce(title: str, settings: TrainingSettings) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"\n=== {title} ===\n{settings.table()}", flush=True)


def train(trainer: Trainer, config: StageConfig) -> None:
    """Train, from the newest checkpoint in the output folder where there is one and `resume` is on."""
    model, output = trainer.model, Path(config.output_dir)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in counts), sum(n for n, grad in counts if grad)
    attention = model.config._attn_implementation
    print(f"{trained:,} of {total:,} parameters train; {attention} attention; device {trainer.args.device}")
    checkpoint = get_last_checkpoint(str(output)) if config.resume and output.is_dir() else None
    if checkpoint is not None:
        print(f"resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)


def finish(trainer: Trainer, loaded: LoadedModel, settings: TrainingSettings, stage: str, output_dir: str) -> Path:
    """Save final model, log and curves; returns the folder of the final model."""
    folder = Path(output_dir, "final_model")
    save_final_model(trainer, loaded, settings, folder)
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        log = {"settings": dataclasses.asdict(settings), "history": history}
        Path(output_dir, LOG_FILE).write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
        plot_training_curves({stage: history}, Path(output_dir, CURVES_FILE))
        print(f"saved {folder}, {LOG_FILE} and {CURVES_FILE} in {output_dir}", flush=True)
    return folder


def release_memory() -> None:
    """Free what the finished stage held on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def exit_with_message(command: str) -> Iterator[None]:
    """A setting or data that cannot be used ends the command with its message, without a traceback."""
    try:
        yield
    except SettingsError as error:
        print(f"{command}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
