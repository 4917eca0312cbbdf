"""What a trainer saves beyond TRL's own checkpoint, so that a run that was killed goes on as if it had not been.

Neither transformers nor TRL saves: the loss and figures of a log interval that has not ended, TRL's count of
micro-batches, rollouts that wait for their step, or the epoch's order. Here they are, and every checkpoint is written
aside and put in place whole (checkpoints.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from checkpoints import STAGING, StoppedError, checkpoints_in, full_disk_reported, put_in_place
from patience import Patience
from row_index import FaultLog

_OWN_REASON = 1  # beside the numbers of the signals that are listened to
Row = tuple[int, int]  # line of the data file, and place in its QnA


class Resumable:
    """For a trainer of TRL: exact, whole checkpoints, and a stop before a step that is not a number.

    companions: writes into the folder of a checkpoint what has to lie beside the weights.
    fault_logs: for "train" and "eval" what counts and names faulty rows that are found when they are drawn.

    Full weights are loaded by the names under which transformers saved them: `save_pretrained` writes Qwen2.5-VL in the
    hub's layout (`visual.…`), but `Trainer` reads the file back as it is and skips, with no more than a warning, every
    name that it does not know. Adapters and sharded training have their own ways, which work.
    """

    def __init__(
        self,
        *args: Any,
        companions: Callable[[str], None] | None = None,
        fault_logs: dict[str, FaultLog] | None = None,
        **kwargs: Any,
    ) -> None:
        self._companions, self.fault_logs = companions, fault_logs or {}
        self._staging: str | None = None
        self._resumed_from: str | None = None
        self._order: Any = None  # the sampler of the training data
        self._losses: list[tuple[torch.Tensor, list[Row]]] = []  # of the micro-batches of this step
        self.stop_reason = ""  # why the run is to stop at the end of this step, where it is
        self._at_border: dict[str, Any] | None = None  # what changes within a step, as it was at its beginning
        super().__init__(*args, **kwargs)
        self.add_callback(_AtBorders(self))
        # TRL rounds adapters on 4-bit weights to bfloat16, where updates of a learning rate of 1e-5 round away.
        if isinstance(self.model, PeftModel) and getattr(self.model, "is_loaded_in_4bit", False):
            for name, parameter in self.model.named_parameters():
                if ".lora_" in name:  # TRL's reference adapter as well
                    parameter.data = parameter.data.float()

    # ---------------------------------------------------------------------------------------------- save

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: TRL's knows nothing of this training. A merge writes one (model_card.py)."""

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any, progress: dict[str, Any] | None = None) -> None:
        output, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        staging, folder = output / STAGING, output / name
        is_main, wait = self.is_world_process_zero(), self.accelerator.wait_for_everyone
        self._staging = str(staging)
        try:
            with full_disk_reported(output, name):
                if is_main:
                    shutil.rmtree(staging, ignore_errors=True)
                wait()
                super()._save_checkpoint(model, trial)
                torch.save(progress or self.progress(), self._progress_file(staging / name))
                best = self.state.best_model_checkpoint
                if best is not None and Path(best).parent == staging:
                    self.state.best_model_checkpoint = str(folder)
                wait()
                if is_main:
                    self.state.save_to_json(str(staging / name / "trainer_state.json"))
                    if self._companions is not None:
                        self._companions(str(staging / name))
                    put_in_place(staging / name, folder)
                    staging.rmdir()
                wait()
        finally:
            self._staging = None
        if is_main:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(output), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def _progress_file(self, folder: str | Path) -> Path:
        return Path(folder, f"progress_{self.args.process_index}.pt")

    def progress(self) -> dict[str, Any]:
        """What this process must know besides weights, optimizer, schedule and random numbers; plain values only."""
        return {
            "loss": self._tr_loss.clone(),
            "last_logged": self._globalstep_last_logged,
            "metrics": {
                mode: {name: list(value) for name, value in values.items()} for mode, values in self._metrics.items()
            },
            "faults": {mode: (log.drawn, log.skipped, sorted(log.known)) for mode, log in self.fault_logs.items()},
        }

    # ------------------------------------------------------------------------- stop in the middle of a step

    def keep_border(self) -> None:
        """To be called at the end of each step of which the next may be given up by `stop_before_this_step`."""
        self._at_border = {
            "progress": self.progress(),
            "tokens": self.state.num_input_tokens_seen,
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }

    def stop_before_this_step(self, reason: str) -> NoReturn:
        """Save the state at the end of the step before, from which a resumed run takes this one anew, and stop.

        To be called on every process before the optimizer's step: weights and optimizer are still those of that end.

        Raises:
            StoppedError: always.
        """
        step, output, border = self.state.global_step, Path(self.args.output_dir), self._at_border
        if border is not None and not (output / f"checkpoint-{step}").is_dir():
            self.state.num_input_tokens_seen = border["tokens"]
            random.setstate(border["python"])
            np.random.set_state(border["numpy"])
            torch.set_rng_state(border["torch"])
            if border["cuda"] is not None:
                torch.cuda.set_rng_state(border["cuda"])
            self._save_checkpoint(self.model, None, border["progress"])
        kept = checkpoints_in(output)
        rest = f"{kept[0]} is saved: the same command goes on from it" if kept else "no step was taken: start again"
        raise StoppedError(f"{reason}. Stopped before step {step + 1}; {rest}")

    # -------------------------------------------------------------------------------------------- resume

    def restore(self, progress: dict[str, Any]) -> None:
        """Take up what `progress` left; called when the loop has reset its own figures."""
        self._tr_loss += progress["loss"].to(self._tr_loss.device)
        self._total_loss_scalar -= progress["loss"].item()  # the summary at the end is of this run's steps
        self._globalstep_last_logged = progress["last_logged"]
        for mode, values in progress["metrics"].items():
            self._metrics[mode].update(values)
        for mode, (drawn, skipped, known) in progress["faults"].items():
            log = self.fault_logs[mode]
            log.drawn, log.skipped, log.known = drawn, skipped, set(known)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._resumed_from = checkpoint
        super()._load_optimizer_and_scheduler(checkpoint)

    def _take_up_progress(self) -> None:
        if self._resumed_from is None:
            return
        file = self._progress_file(self._resumed_from)
        if file.is_file():
            device = "cpu" if self.args.device.type == "cpu" else self.args.device  # torch knows no place `cpu:0`
            self.restore(torch.load(file, map_location=device, weights_only=True))
        else:
            print(f"{file} is not there (another number of processes?): what follows is not exactly the same run")
        self._resumed_from = None

    def _loads_plain_weights(self) -> bool:
        return not (isinstance(self.model, PeftModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _load_plain_weights(self, folder: str) -> None:
        saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._loads_plain_weights():
            self._load_plain_weights(resume_from_checkpoint)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if isinstance(self.model, PeftModel) and Path(resume_from_checkpoint, "adapter_model.safetensors").is_file():
            # Where a reference adapter lies in a folder beside it, transformers before 5.23 loads that one alone.
            self.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
            self.model.set_adapter("default")

    def _load_best_model(self) -> None:
        if self._loads_plain_weights():
            self._load_plain_weights(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    # ------------------------------------------------------------------------------------ random numbers

    def get_train_dataloader(self) -> DataLoader:
        return self._with_own_seeds(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        return self._with_own_seeds(super().get_eval_dataloader(*args, **kwargs))

    def _with_own_seeds(self, loader: DataLoader) -> DataLoader:
        """Workers that live on take their seed once; from torch's generator a resumed run would take it once more."""
        if self.args.dataloader_persistent_workers and self.args.dataloader_num_workers:
            drawn = getattr(loader, "base_dataloader", loader)  # accelerate's loader wraps the one that draws
            drawn.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    # ------------------------------------------------------------------------------------------ faulty rows

    def _count_faults(self, mode: str, drawn: int, faults: list[dict[str, Any]]) -> None:
        """Of so many drawn rows, `faults` were left out."""
        log = self.fault_logs[mode]
        log.add(drawn, faults)
        if log.skipped:
            self._metrics[mode]["faulty_rows"] = [log.skipped]

    # -------------------------------------------------------------------------------------- not a number

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._losses.append((loss.detach(), self.rows_of_batch()))
        return loss

    def rows_of_batch(self) -> list[Row]:
        """The rows of the micro-batch that was trained on last, on this process."""
        raise NotImplementedError

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        losses = torch.stack([loss for loss, _ in self._losses]).tolist()
        rows = [rows for _, rows in self._losses]
        self._losses.clear()
        value = norm.item() if isinstance(norm, torch.Tensor) else norm
        # In float16 an infinite norm is usual: the scaler skips the step.
        checked = losses if value is None or self.args.fp16 else [*losses, value]
        if not all(abs(number) < float("inf") for number in checked):
            self._stop_before_the_step(losses, value, rows)
        return norm

    def _stop_before_the_step(self, losses: list[float], norm: float | None, rows: list[list[Row]]) -> None:
        step, output = self.state.global_step, Path(self.args.output_dir)
        bad = [part for loss, part in zip(losses, rows, strict=True) if not abs(loss) < float("inf")]
        # The gradients of all are added up: where no loss of this process is at fault, any row may be.
        named = [{"line": line, "entry": entry} for part in bad or rows for line, entry in part]
        file = output / f"not_finite_step_{step + 1}_process_{self.args.process_index}.json"
        record = {"step": step + 1, "last_good_step": step, "losses": [str(loss) for loss in losses]}
        record |= {"grad_norm": str(norm), "rows": named}
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        kept = checkpoints_in(output)
        newest = f"the newest checkpoint {kept[0]}" if kept else "there is no checkpoint"
        raise StoppedError(
            f"step {step + 1}: loss {', '.join(map(str, losses))}, gradient norm {norm}: not a finite number. Stopped "
            f"before the weights changed; the last good step is {step}, {newest}. {file} names the rows: look at them "
            "(data_utils.py --check), or lower the learning rate"
        )


class _AtBorders(TrainerCallback):
    """Calls a trainer's own hooks where the loop has set up its state."""

    def __init__(self, trainer: Resumable) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._losses.clear()
        self.trainer._take_up_progress()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # accelerate does not reach the sampler through the batches that it skips after a resume on several processes.
        if hasattr(self.trainer._order, "set_epoch"):
            self.trainer._order.set_epoch(int(state.epoch))


class StopInOrder(TrainerCallback):
    """On a signal, or for a reason of the trainer's own: save at the end of the step, on all processes, then stop.

    The signals are SIGTERM and that of Ctrl-C; a second one quits at once.
    """

    def __init__(self, trainer: Resumable) -> None:
        self.trainer = trainer
        self.received: int | None = None
        self.since = 0.0
        self.saving = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals of this process for the time of the block; workers that are forked in it ignore them."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may
            return
        self.process = os.getpid()
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            Patience.process_stops = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:
            return
        name = signal.Signals(number).name
        if self.received is None:
            self.received, self.since = number, time.monotonic()
            Patience.process_stops = True
            # print may be what was interrupted
            os.write(2, f"\n{name}: saving at the end of this step, then stopping; once more quits at once\n".encode())
        elif time.monotonic() - self.since > 1:  # a launcher passes on what the terminal has sent already
            raise StoppedError(f"{name} again: quit at once, without saving", 128 + number)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wanted = self.received or (_OWN_REASON if self.trainer.stop_reason else 0)
        if args.world_size > 1:
            flag = torch.tensor(wanted, device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            wanted = int(flag)
        if wanted:
            self.received, self.saving, control.should_save = wanted, True, True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.saving:
            self.stop(args.output_dir)

    def stop(self, output_dir: str) -> None:
        kept = checkpoints_in(output_dir)
        rest = f"{kept[0]} is saved: the same command goes on from it" if kept else "nothing was saved"
        if self.received == _OWN_REASON:
            raise StoppedError(f"{self.trainer.stop_reason or 'stopped by another process'}; {rest}")
        raise StoppedError(f"stopped by {signal.Signals(self.received).name}; {rest}", 128 + self.received)
