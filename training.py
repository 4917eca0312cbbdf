"""What both stages share around TRL's trainers: arguments, where to go on from, the end of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_pt_utils import get_model_param_count

from architecture import Architecture
from checkpoints import (
    StoppedError,
    checkpoints_in,
    checksum,
    claimed,
    full_disk_reported,
    newest_whole,
    remove_leftovers,
    set_aside,
)
from config import SETTINGS_FILE, SettingsError, StageConfig, TrainingSettings, is_main_process
from memory_model import is_out_of_memory, out_of_memory_message, run_of
from model_utils import LoadedModel, save_final_model, weights_digest
from resuming import StopInOrder
from sharding import zero_stage
from traces import write_whole
from trackers import check_trackers
from visualize import plot_training_curves

LOG_FILE, ORIGIN_FILE = "training_log.json", "started_from.json"
CURVES_FILE = "training_curves.png"
SHARED_ARGUMENTS = (
    *("output_dir", "learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("weight_decay", "lr_scheduler_type", "bf16", "fp16", "gradient_checkpointing"),
    *("logging_steps", "save_total_limit", "seed"),
)


def common_arguments(config: StageConfig) -> dict[str, Any]:
    """Settings of ours that are arguments of TRL's trainers, by TRL's names."""
    values = {name: getattr(config, name) for name in SHARED_ARGUMENTS}
    # transformers 5 has one field for both: below 1 it is the share of the steps.
    values["warmup_steps"] = config.warmup_ratio
    values["save_steps"] = 0.1 if config.save_steps is None else config.save_steps
    values["report_to"] = "none"
    values["logging_first_step"] = True
    values["dataloader_pin_memory"] = torch.cuda.is_available()
    return values


class Throughput(TrainerCallback):
    """Adds `tokens_per_second` (of all processes, evaluations and saving left out) and `peak_memory_gib` to the log.

    Peak memory is what torch held of this process's GPU, or on a CPU the most that was resident since the start.
    """

    def __init__(self) -> None:
        self.seconds, self.tokens, self.since = 0.0, None, time.perf_counter()

    def _restart(self, *args: Any, **kwargs: Any) -> None:
        self.since = time.perf_counter()

    on_train_begin = on_evaluate = on_save = _restart

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.seconds -= logs.get("watch/seconds", 0.0)  # the fixed questions of R-GRPO are no training
        tokens = logs.get("num_tokens")  # TRL's count since the start; absent after an evaluation
        if tokens is None:
            return
        figures = {"peak_memory_gib": round(peak_memory() / 2**30, 3)}
        if self.tokens is not None and self.seconds:  # a resumed run's first count holds what came before
            figures["tokens_per_second"] = round((tokens - self.tokens) / self.seconds, 1)
        self.tokens, self.seconds = tokens, 0.0
        logs |= figures
        state.log_history[-1] |= figures


def peak_memory() -> int:
    """Bytes: the most that torch held of the GPU; without one, the most that this process had resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# Settings that may change between an interrupted run and its resumption.
FREE_SETTINGS = {"num_train_epochs", "logging_steps", "save_total_limit", "eval_steps", "resume"} | {
    *("judge_cache", "judge_timeout", "judge_retries", "judge_concurrency", "judge_reply_tokens"),
    *("judge_max_requests", "judge_max_tokens", "judge_patience", "vllm_patience"),
    *("judge_url", "vllm_server", "vllm_sync_dir"),  # a server that died may come back elsewhere
}
FREE_SETTINGS |= {"early_stopping_patience", "max_steps", "disable_tqdm", "report_to"}
FREE_SETTINGS |= {"watch_every", "watch_samples", "keep_rollouts_every"}


def begin(title: str, settings: TrainingSettings, stage: str) -> Path | None:
    """Announce a stage and check what does not need a model; the final model where the stage is finished already."""
    config = getattr(settings, stage)
    if is_main_process():
        print(f"\n=== {title} ===", flush=True)
    _check_precision(config)
    for later in (settings.sft, settings.grpo):
        if later is not None:
            check_trackers(later.trl.get("report_to"))
    if stage == "sft" and settings.grpo is not None:
        with claimed(settings.grpo.output_dir):  # that it can be is better known now than after stage 1
            pass
    if config.resume:
        check_origin(settings, stage)
    log = Path(config.output_dir, LOG_FILE)
    final = Path(config.output_dir, "final_model")
    if not (config.resume and log.is_file() and final.is_dir()):
        return None
    if json.loads(log.read_text(encoding="utf-8"))["settings"] != _stage_settings(settings, stage):
        return None
    if is_main_process():
        print(f"{final} was made with the same settings: nothing to do (--resume false trains it anew)")
    return final


def origin(settings: TrainingSettings, stage: str) -> dict[str, Any]:
    """What a run began from, beside its settings: the model it trains, by its weights, and its data."""
    start, data = _start(settings, stage), settings.data.train_data
    return {"model": [start, weights_digest(start)], "data": [data, checksum(data)]}


def _start(settings: TrainingSettings, stage: str) -> str:
    return getattr(getattr(settings, stage), "sft_checkpoint", None) or settings.model.model_name


def check_origin(settings: TrainingSettings, stage: str) -> None:
    """Say where the data have changed since the run in the output folder began.

    Raises:
        SettingsError: where the model that it began from has other weights now, as after another SFT.
    """
    output = Path(getattr(settings, stage).output_dir)
    if not (output / ORIGIN_FILE).is_file() or not (checkpoints_in(output) or (output / "final_model").is_dir()):
        return
    before, start = json.loads((output / ORIGIN_FILE).read_text(encoding="utf-8")), _start(settings, stage)
    if before["model"][0] == start and before["model"][1] != weights_digest(start):
        raise SettingsError(
            f"{start} has other weights now than when the run in {output} began from it: give another output folder, "
            f"or --{stage}_resume false to start anew"
        )
    if is_main_process():  # the whole file is read
        (data, known), now = before["data"], settings.data.train_data
        if data == now and known != checksum(now):
            print(f"WARNING: {data} has changed since the run in {output} began")


def _check_precision(config: StageConfig) -> None:
    on_gpu = torch.cuda.is_available()
    if (config.bf16 or config.fp16) and not on_gpu and not config.trl.get("use_cpu"):
        given = "bf16" if config.bf16 else "fp16"
        raise SettingsError(f"{given} was given, but there is no GPU here: leave --{given} out")


def _stage_settings(settings: TrainingSettings, stage: str) -> dict[str, Any]:
    """All that shaped a stage's result, as it reads back from JSON."""
    values = dataclasses.asdict(settings)
    return json.loads(json.dumps({name: values[name] for name in ("model", "data", stage)}))


def check_resumable(checkpoint: str, settings: TrainingSettings, stage: str) -> None:
    """A checkpoint of another run must not be gone on from in silence.

    Raises:
        SettingsError: naming the settings that differ.
    """
    path = Path(checkpoint, SETTINGS_FILE)
    if not path.is_file():
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    differing = []
    for name, values in _stage_settings(settings, stage).items():
        flat, before = _flat(values), _flat(saved.get(name) or {})
        keys = sorted((flat.keys() | before.keys()) - FREE_SETTINGS)
        differing += [
            f"{key} ({before.get(key)} -> {flat.get(key)})" for key in keys if flat.get(key) != before.get(key)
        ]
    if differing:
        raise SettingsError(
            f"{checkpoint} is of a run with other settings: {', '.join(differing)}. Give another output folder, or "
            "--resume false to start anew."
        )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "trl"} | values.get("trl", {})


def train(trainer: Trainer, settings: TrainingSettings, stage: str) -> None:
    """Train, from the newest checkpoint in the output folder where there is one and `resume` is on; else anew."""
    config = getattr(settings, stage)
    model, output = trainer.model, Path(config.output_dir)
    total, trained = get_model_param_count(model), get_model_param_count(model, trainable_only=True)
    kinds = [part._attn_implementation for part in (model.config.get_text_config(), model.config.vision_config)]
    attention, vision = ("sdpa" if "sdpa" in kind else kind for kind in kinds)  # of packing.py and vision_tower.py too
    attention += " attention" if vision == attention else f" attention, {vision} in the vision tower"
    say = print if is_main_process() else (lambda *_: None)
    say(f"{trained:,} of {total:,} parameters train; {attention}; device {trainer.args.device}")
    trainer.add_callback(Throughput())
    if is_main_process():
        remove_leftovers(output)
        if not config.resume:
            _set_earlier_run_aside(output)
    checkpoint = find_checkpoint(output, say) if config.resume else None
    if checkpoint is None and is_main_process():
        with full_disk_reported(output, ORIGIN_FILE):
            write_whole(output / ORIGIN_FILE, (json.dumps(origin(settings, stage)) + "\n").encode())
    stop = StopInOrder(trainer)
    trainer.add_callback(stop)
    try:
        with stop.listening():
            _train_from(checkpoint, trainer, settings, stage, say)
            if stop.received:  # after the last step
                stop.stop(config.output_dir)
    except StoppedError as stopped:
        if config.resume:
            raise
        raise StoppedError(f"{stopped} (to go on, leave --resume false out)", stopped.exit_code) from None


def _set_earlier_run_aside(output: Path) -> None:
    """Else a run that was begun anew and stopped would go on from a checkpoint of the one before it, or pass for it."""
    earlier = [*checkpoints_in(output), *output.glob(LOG_FILE)]
    for path in earlier:
        set_aside(path)
    if earlier:
        print(f"--resume false: {', '.join(path.name for path in earlier)} in {output} are now *.unused", flush=True)


def _train_from(
    checkpoint: str | None, trainer: Trainer, settings: TrainingSettings, stage: str, say: Callable[..., None]
) -> None:
    if checkpoint is None:
        with explained_out_of_memory(settings, stage, trainer.model, trainer):
            trainer.train()
        return
    check_resumable(checkpoint, settings, stage)
    state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
    if 0 < trainer.args.max_steps <= state.global_step:  # transformers would train one step more
        say(f"{checkpoint} is the end of the run: nothing is left to train")
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = state
        return
    say(f"resuming from {checkpoint}")
    with explained_out_of_memory(settings, stage, trainer.model, trainer):
        trainer.train(resume_from_checkpoint=checkpoint)


@contextlib.contextmanager
def explained_out_of_memory(
    settings: TrainingSettings, stage: str, model: PreTrainedModel | PeftModel, trainer: Trainer | None = None
) -> Iterator[None]:
    """Out of memory ends a run with the settings that would help most, not with a traceback.

    trainer: None while it is being made, which brings the model to the GPU.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sharding, longest = "ddp", None
        if trainer is not None:
            sharding = {2: "zero2", 3: "zero3"}.get(zero_stage(trainer), "fsdp2" if trainer.is_fsdp_enabled else "ddp")
            longest = max(trainer.train_dataset["length"])
        run = run_of(settings, stage, int(os.environ.get("WORLD_SIZE", "1")), sharding, longest)
        if isinstance(model, PeftModel):  # also one that was trained before, whatever `use_lora` says
            method = "qlora" if settings.model.load_in_4bit else "lora"
            run = dataclasses.replace(run, method=method, lora_r=model.peft_config["default"].r, half_weights=False)
        architecture = Architecture.from_config(model.config.to_dict())
        raise SettingsError(out_of_memory_message(architecture, run, stage, torch.cuda.is_available())) from None


def find_checkpoint(output: Path, say: Callable[[str], Any]) -> str | None:
    """The newest whole checkpoint, the same on all processes; None where there is none at all.

    Raises:
        SettingsError: where every checkpoint is broken, or where processes see different ones: they would start at
            different steps, and wait for each other for ever.
    """
    there = checkpoints_in(output)
    found = gather_object([there[0].name if there else None])
    if len(set(found)) > 1:
        raise SettingsError(
            f"the processes see different checkpoints ({', '.join(map(str, found))}): output_dir must be on a disk "
            "that all machines share"
        )
    chosen = [newest_whole(output, say) if is_main_process() else None]
    broadcast_object_list(chosen)
    if there and chosen[0] is None:
        raise SettingsError(f"no checkpoint in {output} is whole: --resume false starts anew, and replaces them")
    return chosen[0] and str(chosen[0])


def finish(trainer: Trainer, loaded: LoadedModel, settings: TrainingSettings, stage: str, output_dir: str) -> Path:
    """Save final model, log and curves; returns the folder of the final model."""
    folder = Path(output_dir, "final_model")
    with full_disk_reported(output_dir, "final_model"):
        save_final_model(trainer, loaded, settings, folder)
        if trainer.is_world_process_zero():
            history = trainer.state.log_history
            log = {"settings": _stage_settings(settings, stage), "history": history}
            write_whole(Path(output_dir, LOG_FILE), (json.dumps(log, indent=2) + "\n").encode())
            plot_training_curves({stage: history}, Path(output_dir, CURVES_FILE))
    if trainer.is_world_process_zero():
        print(f"saved {folder}, {LOG_FILE} and {CURVES_FILE} in {output_dir}", flush=True)
    return folder


def release_memory() -> None:
    """Free what the finished stage held on the device."""
    # Else transformers would cut the next stage's model up as it loads, and save it under names that are not the hub's.
    unset_hf_deepspeed_config()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def exit_with_message(command: str) -> Iterator[None]:
    """A setting or data that cannot be used, or a stop in good order, ends the command with its message alone."""
    try:
        yield
    except StoppedError as stopped:
        print(f"{command}: {stopped}", file=sys.stderr)
        raise SystemExit(stopped.exit_code) from None
    except KeyboardInterrupt:
        print(f"{command}: stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None
    except SettingsError as error:
        print(f"{command}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
