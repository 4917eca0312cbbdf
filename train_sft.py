"""Stage 1: supervised fine-tuning on annotated rationales, on TRL's SFTTrainer.

    python train_sft.py --train_data data/train.jsonl --val_data data/val.jsonl --image_base_path data/images --bf16

What differs from TRL's own vision training: our collator (crop pads and prompt carry no loss; TRL's would train on
them), the crops in the assistant's turn, batches of examples of like length, without padding on a GPU, and rows of long
files that are checked as they are drawn.
"""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import parse_training
from config import SettingsError, SFTStageConfig, TrainingSettings, is_main_process, use_one_gpu

if TYPE_CHECKING:
    from transformers import TrainerCallback
    from trl import SFTConfig

    from model_utils import LoadedModel
    from trainers import CropSFTTrainer


WORKERS, PREFETCHED = 4, 4  # of a training on a GPU, and batches that each holds ready
ROW_BYTES = 2**24  # pixels of a row, as the model takes them


def default_workers(batch_size: int) -> int:
    """Images are read and resized ahead of the step. On a CPU the workers would take its cores.

    Their batches lie in shared memory, of which a container has 64 MB unless it is told otherwise.
    """
    import torch

    if not torch.cuda.is_available():
        return 0
    shared, needed = Path("/dev/shm"), WORKERS * PREFETCHED * batch_size * ROW_BYTES
    if not shared.is_dir() or shutil.disk_usage(shared).free >= needed:
        return WORKERS
    if is_main_process():
        needs = f"workers need {needed / 2**30:.1f} GB of /dev/shm (docker run --shm-size)"
        print(f"images are read between the steps: {needs}")
    return 0


def sft_arguments(config: SFTStageConfig, has_validation: bool) -> SFTConfig:
    """TRL's arguments for the stage; a field given by name in the stage's settings wins over what is set here."""
    from trl import SFTConfig

    from training import common_arguments

    values = common_arguments(config)
    values |= {
        "max_length": None,  # length is checked, and cut at segment borders, by our own data code
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "train_sampling_strategy": "group_by_length",
        "length_column_name": "length",
        "per_device_eval_batch_size": config.per_device_train_batch_size,
    }
    if has_validation:
        # The best checkpoint must have been evaluated, so either setting alone decides both.
        given = [steps for steps in (config.eval_steps, config.save_steps) if steps is not None] or [0.1]
        values |= {
            "eval_strategy": "steps",
            "eval_steps": given[0],
            "save_steps": given[-1],
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    values |= config.trl
    if "dataloader_num_workers" not in values:
        values["dataloader_num_workers"] = default_workers(values["per_device_train_batch_size"])
    if values["dataloader_num_workers"]:
        values = {"dataloader_persistent_workers": True, "dataloader_prefetch_factor": PREFETCHED} | values
    try:
        return SFTConfig(**values)
    except ValueError as error:
        raise SettingsError(f"TRL refuses the settings of the SFT stage: {error}") from None


def build_trainer(
    loaded: LoadedModel, settings: TrainingSettings, callbacks: list[TrainerCallback] | None = None
) -> CropSFTTrainer:
    """The trainer of stage 1 on the examples of `settings.data`."""
    import torch
    from transformers import EarlyStoppingCallback

    from conversation import Renderer
    from data_check import load_examples
    from model_utils import save_companions
    from row_index import FaultLog, load_training_rows
    from sft_data import ExampleEncoder, SFTCollator
    from trainers import CropSFTTrainer

    config, data = settings.sft, settings.data
    renderer = Renderer(loaded.processor, loaded.contract)
    bad_rows = data.bad_rows_file or f"{config.output_dir}/bad_rows.jsonl"
    train = load_training_rows(data, renderer, bad_rows)
    fault_logs = {"train": FaultLog(data.train_data, bad_rows)}
    validation = None
    if data.val_data is not None:
        bad_rows = f"{config.output_dir}/bad_rows_val.jsonl"
        validation = load_examples(data.val_data, data, renderer, bad_rows)
        fault_logs["eval"] = FaultLog(data.val_data, bad_rows)
    can_pack = loaded.model.config.get_text_config()._attn_implementation != "eager"
    default_packing = torch.cuda.is_available() and can_pack and not config.trl.get("label_smoothing_factor")
    callbacks = [*(callbacks or [])]
    if config.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
    return CropSFTTrainer(
        model=loaded.model,
        args=sft_arguments(config, validation is not None),
        data_collator=SFTCollator(ExampleEncoder(renderer, data)),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=loaded.processor,
        callbacks=callbacks,
        companions=partial(save_companions, processor=loaded.processor, contract=loaded.contract, settings=settings),
        fault_logs=fault_logs,
        padding_free=default_packing if config.padding_free is None else config.padding_free,
    )


def run_sft(settings: TrainingSettings) -> Path:
    """Train stage 1; returns the folder of the final model."""
    from checkpoints import claimed
    from model_utils import load_for_training
    from training import begin, explained_out_of_memory, finish, train

    config = settings.sft
    with claimed(config.output_dir):
        final = begin("stage 1: SFT", settings, "sft")
        if final is not None:
            return final
        loaded = load_for_training(settings.model, settings.data, config, settings.model.model_name)
        with explained_out_of_memory(settings, "sft", loaded.model):
            trainer = build_trainer(loaded, settings)
        train(trainer, settings, "sft")
        return finish(trainer, loaded, settings, "sft", config.output_dir)


def main(argv: list[str] | None = None) -> None:
    use_one_gpu()
    settings = parse_training(argv, (__doc__ or "").split("\n")[0], stages=("sft",))
    settings.show()
    from training import exit_with_message

    with exit_with_message("train_sft.py"):
        run_sft(settings)


if __name__ == "__main__":
    main(sys.argv[1:])
