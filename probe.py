"""Two real steps of a stage at falling batch sizes, on the longest rows and rollouts: the largest size that fits.

Opened by `configure_training.py --probe`. Each trial is a process of its own, which leaves nothing behind.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import parse_training
from config import SettingsError, TrainingSettings, use_one_gpu
from memory_model import is_out_of_memory

if TYPE_CHECKING:
    from transformers import Trainer

    from generation import CropEngine
    from vllm_generation import VLLMEngine

GIB = 2**30
MARK = "probe: "  # what stands before the result, among all that a trial prints


@dataclass(frozen=True)
class Trial:
    """Two steps at one batch size. peak_bytes: of the GPU, or of the process beyond its start on a CPU."""

    batch_size: int
    fits: bool
    peak_bytes: int = 0
    seconds: float = 0.0  # of the second step
    tokens_per_second: float = 0.0  # in the second step, prompts and images among them


def largest_batch(stage: str, flags: Callable[[int], list[str]], most: int, limit: float) -> Trial:
    """The trial that fits, of `most` sequences a device or fewer, halved each time.

    flags: of a training command at a batch size. limit: GB that a trial may take.

    Raises:
        SettingsError: where not even one sequence fits, or where a trial fails for another reason.
    """
    size = most
    while size:
        print(f"probing {stage} at batch size {size}", end=" ", flush=True)
        trial = _in_own_process(stage, flags(size), size, limit)
        print(
            f"- fits: {trial.peak_bytes / GIB:.2f} GB, {trial.tokens_per_second:,.0f} tokens a second"
            if trial.fits
            else "- out of memory",
            flush=True,
        )
        if trial.fits:
            return trial
        size //= 2
    raise SettingsError(f"two steps of {stage} do not fit in {limit:g} GB even with one sequence a device")


def _in_own_process(stage: str, flags: list[str], size: int, limit: float) -> Trial:
    command = [sys.executable, __file__, stage, str(int(limit * GIB)), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode in (-9, -6, 137):  # the system's own killer, or an allocation that failed below torch
        return Trial(size, fits=False)
    if done.returncode or not found:
        raise SettingsError(f"the trial failed, not for memory:\n{(done.stderr or done.stdout)[-2000:]}")
    return Trial(**json.loads(found[-1].removeprefix(MARK)))


# ------------------------------------------------------------------------------------------ in the trial


def run_trial(stage: str, limit: int, flags: list[str]) -> Trial:
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:  # as a CPU trains
        flags = [*(flag for flag in flags if flag != "--bf16"), "--use_cpu"]
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--output_dir", folder, "--max_steps", "2", "--save_strategy", "no", "--logging_steps", "1"]
        fixed += ["--resume", "false", "--disable_tqdm", "true"]
        fixed += ["--watch_every", "0", "--keep_rollouts_every", "0"] if stage == "grpo" else []
        settings = parse_training([*flags, *fixed], "", (stage,))
        return _two_steps(stage, settings, limit, on_gpu)


def _two_steps(stage: str, settings: TrainingSettings, limit: int, on_gpu: bool) -> Trial:
    import torch

    import train_grpo
    import train_sft
    import trainers  # noqa: F401 - what the libraries take is not the trial's
    from model_utils import load_for_training

    config = getattr(settings, stage)
    start = getattr(config, "sft_checkpoint", None) or settings.model.model_name
    build = {"sft": train_sft.build_trainer, "grpo": train_grpo.build_trainer}[stage]
    size, before = config.per_device_train_batch_size, _limit_memory(limit, on_gpu)
    try:
        trainer = build(load_for_training(settings.model, settings.data, config, start), settings)
        _keep_longest(trainer)
        if stage == "grpo":
            write_to_the_end(trainer.engine)
        seconds = _timed(trainer)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Trial(size, fits=False)
    tokens = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    peak = torch.cuda.max_memory_reserved() if on_gpu else _resident_peak() - before
    return Trial(size, True, peak, seconds, (tokens[-1] - tokens[-2]) / seconds)


def _limit_memory(limit: int, on_gpu: bool) -> int:
    """Let the process take `limit` bytes more than it has; returns what it has."""
    import torch

    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        return 0
    data_pages = int(Path("/proc/self/statm").read_text().split()[5])
    most = data_pages * os.sysconf("SC_PAGE_SIZE") + limit
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    return _resident_peak()


def _resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _keep_longest(trainer: Trainer) -> None:
    """What fits for the longest rows fits for all."""
    rows = trainer.train_dataset
    steps = 2 * trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    lengths = rows["length"][:]  # a list: single ones are slow to read from the table
    order = sorted(range(len(rows)), key=lambda row: -lengths[row])
    trainer.train_dataset = rows.select(order[:steps])


def write_to_the_end(engine: CropEngine | VLLMEngine) -> None:
    """What fits for rollouts of `max_completion_length` fits for all: no rollout of the engine ends by itself."""
    ends = list(engine.writer.stop_ids)
    engine.writer.suppressed += ends
    if hasattr(engine, "decoder"):
        engine.decoder.suppressed[ends] = True


def _timed(trainer: Trainer) -> float:
    """Train; seconds of the last step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        started = 0.0

        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            self.seconds = time.perf_counter() - self.started

    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="One trial of configure_training.py --probe.", allow_abbrev=False)
    parser.add_argument("stage", choices=["sft", "grpo"])
    parser.add_argument("limit", type=int, help="bytes that the trial may take; flags of a training command follow")
    args, flags = parser.parse_known_args()
    use_one_gpu()
    print(MARK + json.dumps(asdict(run_trial(args.stage, args.limit, flags))), flush=True)


if __name__ == "__main__":
    main()
