"""The probe: real steps in processes of their own, and what it takes for the largest batch size.

python -m pytest tests/test_probe.py
"""

import pytest
from test_trainers import grpo_trainer, settings_for

import configure_training
import probe
from config import SettingsError


@pytest.fixture
def flags(base_folder, data_folder):
    def of(batch_size):
        data = ["--train_data", f"{data_folder}/train.jsonl", "--image_base_path", str(data_folder)]
        stage = ["--num_generations", "2", "--max_completion_length", "16"]
        common = ["--model_name", str(base_folder), *data, "--min_box_side", "1", "--gradient_accumulation_steps", "1"]
        return [*common, *(stage if of.stage == "grpo" else []), "--batch_size", str(batch_size)]

    of.stage = "sft"
    return of


def test_the_batch_is_halved_until_two_real_steps_fit_in_the_limit(flags, capsys):
    """12 rows of some 200 tokens without checkpoints take about 100 MB, a quarter of them a quarter."""
    found = probe.largest_batch("sft", lambda size: [*flags(size), "--gradient_checkpointing", "false"], 36, 0.15)
    tried = [line.split()[5] for line in capsys.readouterr().out.splitlines()]
    assert found.fits and 1 <= found.batch_size < 36
    assert tried == [str(36 // 2**step) for step in range(len(tried))] and tried[-1] == str(found.batch_size)
    assert found.tokens_per_second > 0


def test_two_steps_of_grpo_roll_out_and_train(flags):
    flags.stage = "grpo"
    found = probe.largest_batch("grpo", flags, 4, 8)
    assert (found.batch_size, found.fits) == (4, True)
    assert found.tokens_per_second > 0


def test_probed_rollouts_are_as_long_as_any_can_be(base_folder, data_folder, tmp_path):
    settings = settings_for("grpo", base_folder, data_folder, tmp_path, max_completion_length=256, max_crops=0)
    _, trainer = grpo_trainer(settings)

    def ends() -> set[str]:
        trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
        return {rollout.finish_reason for rollout in trainer._batch_rollouts}

    assert "stop" in ends()
    probe.write_to_the_end(trainer.engine)
    assert ends() == {"length"}


def test_a_trial_that_fails_for_another_reason_is_not_taken_for_out_of_memory(flags):
    with pytest.raises(SettingsError, match=r"the trial failed, not for memory:(.|\n)*there is no such file"):
        probe.largest_batch("sft", lambda size: [*flags(size), "--train_data", "none.jsonl"], 4, 8)


def test_nothing_that_fits_is_said_with_the_limit(flags, monkeypatch):
    monkeypatch.setattr(probe, "_in_own_process", lambda *_: probe.Trial(1, fits=False))
    with pytest.raises(SettingsError, match=r"two steps of sft do not fit in 0\.5 GB even with one sequence a device"):
        probe.largest_batch("sft", flags, 8, 0.5)


def test_the_recommendation_takes_the_probed_batch_and_its_throughput(
    base_folder, data_folder, tmp_path, monkeypatch, capsys
):
    """The trial is real; its throughput gives the hours."""
    given = ["--data", f"{data_folder}/train.jsonl", "--image_base_path", str(data_folder), "--gpu_memory", "16"]
    given += ["--model_name", str(base_folder), "--probe", "sft", "--batch_size", "2"]
    in_own_process = probe._in_own_process

    def smaller_boxes(stage, flags, size, limit):
        flags = [flag for flag in flags if flag not in ("--bf16",)]
        return in_own_process(stage, [*flags, "--min_box_side", "1"], size, limit)

    monkeypatch.setattr(probe, "_in_own_process", smaller_boxes)
    configure_training.main(given)
    out = capsys.readouterr().out
    assert "probing sft at batch size 2 - fits" in out
    assert "the largest of 1 to 2 at which two steps of sft fit here" in out
    assert "SFT: 0.0 hours at the measured throughput" in out


def test_a_probe_of_sharded_weights_on_one_gpu_is_refused(capsys):
    given = ["--dataset_size", "200000", "--gpu_memory", "80", "--num_gpus", "8", "--probe", "sft"]
    with pytest.raises(SystemExit):
        configure_training.main(given)
    assert "--probe runs on one GPU, but fsdp2 cuts the weights up over 8" in capsys.readouterr().err
