"""Nothing lost: a run that is killed, stopped or cut short goes on as if it had not been, and says what was kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_trainers import LORA, grpo_trainer, length_part, settings_for, sft_trainer
from transformers import TrainerCallback

import checkpoints
from checkpoints import (
    MANIFEST_FILE,
    StoppedError,
    checkpoints_in,
    claimed,
    fault_of,
    full_disk_reported,
    newest_whole,
    put_in_place,
    remove_leftovers,
)
from config import SettingsError
from crop_tool import CropContract
from resuming import StopInOrder
from training import ORIGIN_FILE, begin, exit_with_message, find_checkpoint, finish, train

ROOT = Path(__file__).parent.parent
# What a clock or the machine says, not the run.
TIMED = {"tokens_per_second", "peak_memory_gib", "step_time", "rollout/seconds", "rollout/tokens_per_second"}
TIMED |= {"watch/seconds", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    """Ends the run after `step`, once what is saved there is saved."""

    def __init__(self, step: int, act=None) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            if self.act is None:
                raise Killed
            self.act()


def build(stage: str, base: Path, data: Path, folder: Path, flags: dict):
    settings = settings_for(stage, base, data, folder, **flags)
    if stage == "sft":
        return settings, sft_trainer(settings)[1]
    return settings, grpo_trainer(settings, (length_part(),))[1]


def run(stage: str, base: Path, data: Path, folder: Path, flags: dict, kill_at: int | None = None):
    """Train; returns the trainer, killed before step `kill_at + 1` where that is given."""
    settings, trainer = build(stage, base, data, folder, flags)
    if kill_at is not None:
        trainer.add_callback(KillAt(kill_at))
        with pytest.raises(Killed):
            train(trainer, settings, stage)
        return trainer
    if checkpoints_in(folder):
        torch.manual_seed(12345)  # what is resumed must not live on the seed that a run starts from
    train(trainer, settings, stage)
    return trainer


def figures(trainer) -> list[dict]:
    """The log without what a clock said."""
    return [
        {name: value for name, value in item.items() if name not in TIMED}
        for item in trainer.state.log_history
        if "train_runtime" not in item
    ]


def assert_same_run(first, second) -> None:
    assert len(figures(first)) == len(figures(second))
    for one, other in zip(figures(first), figures(second), strict=True):
        assert repr(sorted(one.items())) == repr(sorted(other.items()))  # nan equals nan
    weights = dict(first.model.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in second.model.named_parameters())
    states = [trainer.optimizer.state_dict()["state"] for trainer in (first, second)]
    assert states[0].keys() == states[1].keys() and states[0]
    for key, state in states[0].items():
        assert all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][name])) for name, value in state.items()
        )
    assert first.lr_scheduler.state_dict() == second.lr_scheduler.state_dict()


SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.2}
CASES = {
    # Across an epoch's border (36 rows, 5 steps an epoch), inside a log interval, with dropout and validation.
    "sft": ("sft", {**LORA, **SCHEDULE, "max_steps": 8, "gradient_accumulation_steps": 2, "logging_steps": 4,
                    "save_steps": 2, "eval_steps": 2, "val_data": True}, 7),
    # Inside a generation cycle of 2 x 2 micro-batches, inside a log interval.
    "grpo-cycle": ("grpo", {**SCHEDULE, "max_steps": 7, "gradient_accumulation_steps": 1, "steps_per_generation": 2,
                            "num_iterations": 2, "save_steps": 1, "logging_steps": 3, "beta": 0.1,
                            "log_completions": "true"}, 5),
    # As that, under watch: measured at the step of the last checkpoint, which was saved before that.
    "grpo-watched": ("grpo", {"max_steps": 7, "gradient_accumulation_steps": 1, "steps_per_generation": 2,
                              "num_iterations": 2, "save_steps": 1, "logging_steps": 3, "beta": 0, "watch_every": 2,
                              "watch_samples": 5, "keep_rollouts_every": 2}, 4),
    # In the second epoch, whose order must not be that of the first: 4 prompts an epoch are drawn in 2 steps.
    "grpo-epochs": ("grpo", {**LORA, "max_steps": 5, "save_steps": 1, "logging_steps": 1, "first_rows": 4}, 3),
}  # fmt: skip
# Killed at the border of an epoch, with workers that live on.
WORKERS = {**LORA, "max_steps": 6, "batch_size": 12, "save_steps": 3, "logging_steps": 2, "eval_steps": 3,
           "dataloader_num_workers": 1, "dataloader_persistent_workers": "true", "val_data": True}  # fmt: skip


def prepared(flags: dict, data: Path, folder: Path) -> dict:
    flags = dict(flags)
    if flags.pop("val_data", None):
        flags["val_data"] = f"{data}/val.jsonl"
    count = flags.pop("first_rows", None)
    if count is not None:
        rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
        rows = [{**row, "QnA": row["QnA"][:1]} for row in rows[:count]]
        file = folder / "few.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags["train_data"] = str(file)
    return flags


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_is_the_run_that_was_not_interrupted(base_folder, data_folder, tmp_path, case):
    stage, flags, kill_at = CASES[case]
    flags = prepared(flags, data_folder, tmp_path)
    whole = run(stage, base_folder, data_folder, tmp_path / "whole", flags)
    run(stage, base_folder, data_folder, tmp_path / "cut", flags, kill_at)
    assert_same_run(whole, run(stage, base_folder, data_folder, tmp_path / "cut", flags))
    if "keep_rollouts_every" in flags:
        steps = [item["step"] for item in whole.state.log_history if "watch/crop_gain" in item]
        assert steps == [0, 2, 4, 6, 7]
        pages = {path.name: path.read_bytes() for path in (tmp_path / "whole/rollouts").iterdir()}
        assert pages == {path.name: path.read_bytes() for path in (tmp_path / "cut/rollouts").iterdir()}
        assert sorted(name for name in pages if "html" in name) == ["step_000001.html", "step_000006.html"]


def in_a_process(plan: dict, folder: Path) -> int:
    """Run this file with `plan`; returns the exit code."""
    file = folder / "plan.json"
    file.write_text(json.dumps(plan))
    command = [sys.executable, __file__, str(file)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=600).returncode


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sft-workers", "grpo-cycle"])
def test_a_run_that_is_killed_by_the_system_goes_on_bit_for_bit(base_folder, data_folder, tmp_path, case):
    stage, flags, kill_at = CASES.get(case, ("sft", WORKERS, 3))
    flags = prepared(flags, data_folder, tmp_path)
    shared = {"stage": stage, "base": str(base_folder), "data": str(data_folder), "flags": flags}
    codes = []
    for name, kill in (("whole", None), ("cut", kill_at), ("cut", None)):
        codes.append(in_a_process({**shared, "folder": str(tmp_path / name), "kill_at": kill}, tmp_path))
    assert codes == [0, -signal.SIGKILL, 0]
    last = [checkpoints_in(tmp_path / name)[0] for name in ("whole", "cut")]
    assert last[0].name == last[1].name
    for file in last[0].glob("*.safetensors"):
        assert file.read_bytes() == (last[1] / file.name).read_bytes()
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in last]
    untimed = [[{k: v for k, v in item.items() if k not in TIMED} for item in log] for log in logs]
    assert json.dumps(untimed[0]) == json.dumps(untimed[1])


# ------------------------------------------------------------------------------------- whole or not there


def checkpoint_of(folder: Path, step: int) -> Path:
    """A checkpoint of a few small files."""
    filled = folder / ".saving"
    (filled / "global_step").mkdir(parents=True)
    (filled / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (filled / "global_step/optimizer.pt").write_bytes(b"state")
    put_in_place(filled, folder / f"checkpoint-{step}")
    return folder / f"checkpoint-{step}"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_an_output_folder_has_one_run_at_a_time(tmp_path):
    hold = "import sys; from checkpoints import claimed\nwith claimed(sys.argv[1]): print(flush=True); sys.stdin.read()"
    folder = tmp_path / "new/run"
    with subprocess.Popen(
        [sys.executable, "-c", hold, folder], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(SettingsError, match="where another run is at work: wait for its end"), claimed(folder):
            pass
        other.kill()
    with claimed(folder):  # what a killed run leaves is in nobody's way
        pass
    assert not list(folder.iterdir())


def test_an_output_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(SettingsError, match=r"output_dir is .*, which cannot be written to \("), claimed(folder):
            pass


def test_a_checkpoint_is_put_in_place_with_a_manifest_and_nothing_is_left_beside_it(tmp_path):
    checkpoint = checkpoint_of(tmp_path, 10)
    assert fault_of(checkpoint) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert {"model.safetensors", "global_step/optimizer.pt"} == set(
        json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
    )


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda folder: flip(folder / "model.safetensors"), "model.safetensors: changed since it was saved"),
        (lambda folder: os.truncate(folder / "model.safetensors", 100), "model.safetensors has 100 bytes instead of"),
        (lambda folder: (folder / "global_step/optimizer.pt").unlink(), "global_step/optimizer.pt is missing"),
        (lambda folder: (folder / MANIFEST_FILE).unlink(), f"no {MANIFEST_FILE}"),
        (lambda folder: (folder / MANIFEST_FILE).write_text("{"), f"{MANIFEST_FILE} cannot be read"),
    ],
    ids=["bit", "truncated", "missing", "no-manifest", "bad-manifest"],
)
def test_a_broken_checkpoint_is_skipped_with_its_fault_for_the_one_before(tmp_path, harm, fault):
    whole, broken = checkpoint_of(tmp_path, 9), checkpoint_of(tmp_path, 10)
    harm(broken)
    said = []
    assert newest_whole(tmp_path, said.append) == whole
    assert len(said) == 1 and said[0].startswith(f"skipped {broken}") and fault in said[0]
    assert checkpoints_in(tmp_path) == [whole], "a stop would name the broken one as saved"


def test_a_checkpoint_whose_replacement_was_killed_between_two_names_comes_back(tmp_path):
    checkpoint = checkpoint_of(tmp_path, 10)
    checkpoint.rename(tmp_path / ".checkpoint-10.old")
    (tmp_path / ".checkpoint-10.partial").mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"] and fault_of(checkpoint) is None
    (tmp_path / ".checkpoint-10.old").mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"] and fault_of(checkpoint) is None


def test_a_run_whose_checkpoints_are_all_broken_is_not_begun_anew_in_silence(tmp_path):
    flip(checkpoint_of(tmp_path, 1) / "model.safetensors")
    with pytest.raises(SettingsError, match=r"no checkpoint in .* is whole: --resume false starts anew"):
        find_checkpoint(tmp_path, print)


def test_a_run_begun_anew_is_not_mixed_up_with_the_one_before_it(base_folder, data_folder, tmp_path, capsys):
    """Stopped before it reaches the earlier run's steps, it goes on from its own checkpoint, up to a final model."""
    flags = {"max_steps": 3, "save_steps": 1}
    settings = settings_for("sft", base_folder, data_folder, tmp_path, **flags)
    loaded, trainer = sft_trainer(settings)
    train(trainer, settings, "sft")
    finish(trainer, loaded, settings, "sft", str(tmp_path))
    settings, trainer = build("sft", base_folder, data_folder, tmp_path, flags | {"resume": False})
    trainer.add_callback(KillAt(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(StoppedError, match=r"checkpoint-2 is saved.*leave --resume false out"):
        train(trainer, settings, "sft")
    assert "checkpoint-3, " in capsys.readouterr().out
    settings, trainer = build("sft", base_folder, data_folder, tmp_path, flags)
    assert begin("stage", settings, "sft") is None, "the final model is the earlier run's"
    assert find_checkpoint(tmp_path, print) == str(tmp_path / "checkpoint-2")


def test_faults_in_saving_leave_the_earlier_checkpoint_and_the_run_goes_on_from_it(
    base_folder, data_folder, tmp_path, capsys
):
    """A full disk, then a flipped bit, then a signal, in one run; it ends as one that met none of them."""
    flags = {"max_steps": 3, "save_steps": 1}
    whole = run("sft", base_folder, data_folder, tmp_path / "whole", flags)
    folder = tmp_path / "cut"
    settings, trainer = build("sft", base_folder, data_folder, folder, flags)
    companions = trainer._companions

    def fill_the_disk(target: str) -> None:
        companions(target)
        if trainer.state.global_step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer._companions = fill_the_disk
    with pytest.raises(StoppedError, match=r"no space was left .* checkpoint-2 was saved; .*checkpoint-1 was kept"):
        train(trainer, settings, "sft")
    assert [path.name for path in folder.iterdir() if "checkpoint" in path.name or path.name[0] == "."] == [
        "checkpoint-1"
    ]
    assert (folder / "checkpoint-1/crop_contract.json").is_file()

    settings, trainer = build("sft", base_folder, data_folder, folder, flags)
    trainer.add_callback(KillAt(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match=r"stopped by SIGTERM; .*checkpoint-2 is saved") as stopped:
        train(trainer, settings, "sft")
    assert stopped.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) == before

    flip(folder / "checkpoint-2/model.safetensors")
    capsys.readouterr()
    resumed = run("sft", base_folder, data_folder, folder, flags)
    printed = capsys.readouterr().out
    assert "checkpoint-2, which is broken: model.safetensors: changed" in printed
    assert f"resuming from {folder / 'checkpoint-1'}" in printed
    assert_same_run(whole, resumed)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of so many MiB, and gives its folder; called again it makes that disk larger."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def size(mebibytes: int) -> Path:
        options = f"{'remount,' if folder.is_mount() else ''}size={mebibytes}m"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk of its own size can be mounted here: {done.stderr.strip()}")
        return folder

    yield size
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ORIGIN_FILE)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount here")
@pytest.mark.parametrize("mebibytes", [11, 15])
def test_a_disk_that_is_really_full_keeps_the_checkpoint_before_and_room_is_all_it_needs(
    base_folder, data_folder, tmp_path, small_disk, mebibytes
):
    """A checkpoint takes 9 MiB, 4 of them weights: of the second one these do not fit, or the optimizer's state."""
    flags = {"max_steps": 3, "save_steps": 1, "save_total_limit": 1}
    whole = run("sft", base_folder, data_folder, tmp_path / "whole", flags)
    folder = small_disk(mebibytes) / "run"
    settings, trainer = build("sft", base_folder, data_folder, folder, flags)
    with pytest.raises(StoppedError, match=r"no space was left .* checkpoint-2 was saved; .*checkpoint-1 was kept"):
        train(trainer, settings, "sft")
    assert left_in(folder) == ["checkpoint-1"]
    assert fault_of(folder / "checkpoint-1") is None
    used = sum(file.stat().st_size for file in folder.rglob("*"))
    assert shutil.disk_usage(folder).used < used + 2**19, "what was half written is gone"
    small_disk(64)
    assert_same_run(whole, run("sft", base_folder, data_folder, folder, flags))


def test_a_disk_too_full_for_the_final_model_keeps_the_last_checkpoint(base_folder, data_folder, tmp_path, small_disk):
    folder = small_disk(11) / "run"
    settings = settings_for("sft", base_folder, data_folder, folder, max_steps=1, save_steps=1)
    loaded, trainer = sft_trainer(settings)
    train(trainer, settings, "sft")
    with pytest.raises(StoppedError, match=r"while final_model was saved; .*checkpoint-1 was kept"):
        finish(trainer, loaded, settings, "sft", str(folder))
    assert left_in(folder) == ["checkpoint-1"]
    small_disk(64)
    loaded, trainer = sft_trainer(settings)
    train(trainer, settings, "sft")
    assert finish(trainer, loaded, settings, "sft", str(folder)).is_dir()


def test_a_disk_that_fills_up_under_the_log_leaves_no_half_of_it(base_folder, data_folder, tmp_path, monkeypatch):
    """Half a log would end every further run of the same command."""
    settings, trainer = build("sft", base_folder, data_folder, tmp_path, {"max_steps": 1})
    train(trainer, settings, "sft")
    loaded = SimpleNamespace(processor=trainer.processing_class, contract=CropContract())
    write = Path.write_bytes

    def fill_the_disk(path: Path, data: bytes | str, **_) -> None:
        if "training_log" not in path.name:
            return write(path, data.encode() if isinstance(data, str) else data)
        write(path, data[:40].encode() if isinstance(data, str) else data[:40])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", fill_the_disk)
        patched.setattr(Path, "write_text", fill_the_disk)
        with pytest.raises(StoppedError, match=r"no space was left .* final_model was saved; .*checkpoint-1 was"):
            finish(trainer, loaded, settings, "sft", str(tmp_path))
    assert not [path for path in tmp_path.iterdir() if "training_log" in path.name]
    assert begin("SFT", settings, "sft") is None
    finish(trainer, loaded, settings, "sft", str(tmp_path))
    assert begin("SFT", settings, "sft") == tmp_path / "final_model"


def test_torchs_own_error_on_a_full_disk_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    for error in (
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):
        with pytest.raises(StoppedError, match="there is no checkpoint yet"), full_disk_reported(tmp_path, "x"):
            raise error
    with pytest.raises(ValueError, match="another"), full_disk_reported(tmp_path, "x"):
        raise ValueError("another")


def test_a_second_signal_quits_at_once_and_the_commands_exit_code_says_which(capsys):
    stop = StopInOrder(SimpleNamespace(stop_reason=""))
    with pytest.raises(SystemExit) as ended, exit_with_message("train_sft.py"), stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher passes the terminal's Ctrl-C on: counted once
        stop.since -= 2
        os.kill(os.getpid(), signal.SIGINT)
    assert ended.value.code == 130
    assert "train_sft.py: SIGINT again: quit at once" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ not a number


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_loss_that_is_no_number_stops_before_the_weights_change_and_names_the_rows(
    base_folder, data_folder, tmp_path, stage
):
    flags = {"max_steps": 3, "save_steps": 1, "gradient_accumulation_steps": 2}
    settings, trainer = build(stage, base_folder, data_folder, tmp_path, flags)
    compute, rows, saved = trainer.compute_loss, [], {}

    def spoil(*args, **kwargs):
        loss = compute(*args, **kwargs)
        micro_batches.append(1)
        if len(micro_batches) == 4:  # the second of step 2
            saved.update({name: value.clone() for name, value in trainer.model.named_parameters()})
            return loss * float("nan")
        return loss

    micro_batches: list[int] = []
    trainer.compute_loss = spoil
    step = trainer.training_step

    def watch(*args, **kwargs):
        result = step(*args, **kwargs)
        rows.append(trainer.rows_of_batch())
        return result

    trainer.training_step = watch
    with pytest.raises(StoppedError, match=r"step 2: loss .*nan.* the last good step is 1, .*checkpoint-1"):
        train(trainer, settings, stage)
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.named_parameters())
    record = json.loads((tmp_path / "not_finite_step_2_process_0.json").read_text())
    assert record["last_good_step"] == 1 and record["losses"][1] == "nan"
    assert [(row["line"], row["entry"]) for row in record["rows"]] == rows[3]
    assert len(rows[3]) == settings_batch(trainer) and rows[3] != rows[2]
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-1"]
    assert fault_of(tmp_path / "checkpoint-1") is None


def settings_batch(trainer) -> int:
    return trainer.args.per_device_train_batch_size


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text())
    settings, trainer = build(
        plan["stage"], Path(plan["base"]), Path(plan["data"]), Path(plan["folder"]), plan["flags"]
    )
    if plan["kill_at"] is not None:
        trainer.add_callback(KillAt(plan["kill_at"], lambda: os.kill(os.getpid(), signal.SIGKILL)))
    train(trainer, settings, plan["stage"])
