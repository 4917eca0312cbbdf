"""R-GRPO under watch: warnings that come once, a crop gain that is right and touches nothing, rollouts as they were."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_trainers import grpo_trainer, length_part, script_calls, settings_for
from transformers import TrainerCallback

import watching
from config import SettingsError, build_stage
from measures import Answer
from rewards import RewardPart
from training import train
from watching import ALARMS, LEAST, WINDOW, Alarms, CropGain, fixed_questions, gain_figures

# ---------------------------------------------------------------------------------------------- warnings


def fed(*values: float, figure: str) -> list[int]:
    """The numbers of the log lines that gave a warning."""
    alarms = Alarms()
    return [number for number, value in enumerate(values) if alarms.feed({figure: value})]


@pytest.mark.parametrize("alarm", ALARMS, ids=lambda alarm: alarm.figure)
def test_each_alarm_speaks_once_past_its_limit_and_again_only_after_a_recovery(alarm):
    span = alarm.limit - alarm.recovered
    bad, between, good = alarm.limit + span, alarm.recovered + span / 2, alarm.recovered - span
    first = [40.0] * WINDOW if alarm.grows else []
    scale = 40.0 if alarm.grows else 1.0

    def lines(*values: float) -> list[float]:
        return [*first, *(value * scale for value in values for _ in range(WINDOW))]

    start = len(first)
    assert fed(*lines(bad, bad), figure=alarm.figure) == [start + LEAST - 1]
    assert fed(*lines(good, between), figure=alarm.figure) == []
    assert fed(*lines(bad, between, bad), figure=alarm.figure) == [start + LEAST - 1]
    twice = fed(*lines(bad, good, bad), figure=alarm.figure)
    assert len(twice) == 2 and twice[1] >= start + 2 * WINDOW


def test_one_bad_line_is_no_warning_and_missing_figures_are_passed_over():
    assert fed(1.0, figure="crops/invalid") == []
    assert fed(0.0, 0.0, 0.0, 1.0, 0.0, figure="crops/invalid") == []
    alarms = Alarms()
    assert not any(alarms.feed({"loss": 1.0, "crops/invalid": None}) for _ in range(5))


def test_short_answers_may_double():
    assert fed(*[3.0] * WINDOW, *[9.0] * WINDOW, figure="answer/characters") == []


def test_a_resumed_run_does_not_repeat_what_was_said():
    said = []
    alarms = Alarms(said.append)
    history = [{"crops/no_call": 1.0, "step": step} for step in range(1, 6)]
    state = SimpleNamespace(log_history=history, is_world_process_zero=True, global_step=6)
    alarms.on_train_begin(None, state, None)
    alarms.on_log(None, state, None, {"crops/no_call": 1.0})
    assert said == []
    quiet = SimpleNamespace(log_history=[], is_world_process_zero=False, global_step=6)
    other = Alarms(said.append)
    for _ in range(5):
        other.on_log(None, quiet, None, {"crops/no_call": 1.0})
    assert said == []


def test_a_run_whose_rollouts_go_wrong_says_so_in_the_console(base_folder, data_folder, tmp_path, capsys):
    """The random model calls next to nothing, and never ends; the reward is the same for all."""
    settings = settings_for("grpo", base_folder, data_folder, tmp_path, max_steps=5, beta=0)
    _, trainer = grpo_trainer(settings, (RewardPart("same", lambda response, reference: 1.0),))
    train(trainer, settings, "grpo")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    for words in (
        "of the rollouts call no crop: the model no longer looks (crops/no_call, limit 80%, mean of the last 3 values)",
        "WARNING at step 3: 100% of the groups have equal rewards",
        "of the rollouts are cut off before they end (completions/clipped_ratio, limit 50%",
    ):
        assert sum(words in line for line in warnings) == 1, words
    assert all("What may help:" in line for line in warnings)


def test_calls_after_the_answer_are_noticed_in_a_real_run(base_folder, data_folder, tmp_path, capsys):
    settings = settings_for("grpo", base_folder, data_folder, tmp_path, max_steps=3, beta=0)
    _, trainer = grpo_trainer(settings, (length_part(),))
    generate, renderer = trainer.engine.generate, trainer.engine.renderer
    text = "<think>so</think><answer>a bird<tool_call>[5, 5, 40, 40]</tool_call></answer><|im_end|>"

    def scripted(prompts, sampling, counts, **others):
        return generate(prompts, sampling, counts, forced=[renderer.text_ids(text)] * sum(counts), **others)

    trainer.engine.generate, trainer.sampling = scripted, replace(trainer.sampling, max_new_tokens=80)
    train(trainer, settings, "grpo")
    assert "100% of the calls come after the answer began" in capsys.readouterr().out
    logged = trainer.state.log_history[0]
    assert logged["crops/after_answer"] == 1.0 and logged["crops/no_call"] == 0.0
    assert logged["answer/characters"] == len("a bird<tool_call>[5, 5, 40, 40]</tool_call>")


# --------------------------------------------------------------------------------------------- crop gain


def test_gain_is_accuracy_with_real_crops_over_grey_ones(base_folder, data_folder, tmp_path, contract):
    settings = settings_for("grpo", base_folder, data_folder, tmp_path, val_data=f"{data_folder}/val.jsonl")
    config = replace(settings.grpo, watch_samples=4)
    questions = fixed_questions(config, settings.data, None)
    assert len(questions) == 4

    def answer(question, crops: str, is_right: bool) -> Answer:
        text = f"<think>so</think><answer>{question.answers[0] if is_right else 'none of them'}</answer>"
        return Answer(question.name, crops, 0, text, (), "stop", 5, 0, 0.1, question.load().size)

    right = {"real": (True, True, True, False), "blank": (True, False, False, False)}
    answers = [answer(*item) for crops in right for item in zip(questions, [crops] * 4, right[crops], strict=True)]
    figures = gain_figures(questions, answers, contract, None)
    assert figures["watch/questions"] == 4
    assert figures["watch/accuracy"] == 0.75 and figures["watch/accuracy_blank"] == 0.25
    assert figures["watch/crop_gain"] == 0.5
    assert 0.0 <= figures["watch/crop_gain_low"] <= 0.5 <= figures["watch/crop_gain_high"] <= 1.0
    assert gain_figures(questions, [], contract, None) == {}


def test_fixed_questions_come_evenly_from_the_training_data_without_validation_data(base_folder, data_folder, tmp_path):
    settings = settings_for("grpo", base_folder, data_folder, tmp_path, watch_every=1, watch_samples=6)
    data = replace(settings.data, val_data=None)
    _, trainer = grpo_trainer(replace(settings, data=data), (length_part(),))
    questions = fixed_questions(settings.grpo, data, trainer.rows)
    rows = trainer.train_dataset
    assert [question.text for question in questions] == [rows[place]["question"] for place in range(0, 36, 6)]
    assert questions == fixed_questions(settings.grpo, data, trainer.rows)


def test_watching_changes_nothing_of_the_training(base_folder, data_folder, tmp_path):
    """Sampled rollouts, weights and losses are those of a run without it, bit for bit; its lines come beside."""
    runs = []
    for name, flags in {
        "plain": {},
        "watched": {"watch_every": 2, "watch_samples": 5, "keep_rollouts_every": 1},
    }.items():
        settings = settings_for("grpo", base_folder, data_folder, tmp_path / name, max_steps=3, **flags)
        _, trainer = grpo_trainer(settings, (length_part(),))
        train(trainer, settings, "grpo")
        runs.append(trainer)
    plain, watched = runs
    weights = dict(plain.model.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in watched.model.named_parameters())
    lines = [[item for item in run.state.log_history if "loss" in item] for run in runs]
    assert [item["step"] for item in lines[1]] == [1, 2, 3]
    timed = ("tokens_per_second", "peak_memory_gib", "step_time", "rollout/seconds", "rollout/tokens_per_second")
    untimed = [[{k: v for k, v in item.items() if k not in timed} for item in run] for run in lines]
    assert repr(untimed[0]) == repr(untimed[1])
    measured = [item for item in watched.state.log_history if "watch/crop_gain" in item]
    assert [item["step"] for item in measured] == [0, 2, 3]
    assert all(item["watch/seconds"] > 0 for item in measured)
    assert not (tmp_path / "plain/rollouts").exists()
    assert len(list((tmp_path / "watched/rollouts").glob("*.html"))) == 3


def test_the_trainings_speed_leaves_the_fixed_questions_out(base_folder, data_folder, tmp_path):
    settings = settings_for("grpo", base_folder, data_folder, tmp_path, max_steps=3, watch_every=1, watch_samples=2)
    _, trainer = grpo_trainer(settings, (length_part(),))
    watch = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, CropGain))
    figures, pause, times = watching.gain_figures, 1.0, []

    def dawdle(*given):
        time.sleep(pause)
        return figures(*given)

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter())

    trainer.add_callback(Clock())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching, "gain_figures", dawdle)
        train(trainer, settings, "grpo")
    assert watch.every == 1
    lines = [item for item in trainer.state.log_history if "loss" in item]
    assert len(lines) == len(times) == 3 and all("tokens_per_second" in line for line in lines[1:])
    for (before, line), (start, end) in zip(pairwise(lines), pairwise(times), strict=True):
        said = (line["num_tokens"] - before["num_tokens"]) / line["tokens_per_second"]
        assert said < end - start - 0.8 * pause


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"watch_every": -1}, "watch_every is -1, but it must be at least 0"),
        ({"watch_samples": 0}, "watch_samples is 0, but it must be at least 1"),
        ({"keep_rollouts_every": -5}, "keep_rollouts_every is -5"),
        ({"judge_url": "http://localhost:1/v1"}, "give both, or none"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, message):
    with pytest.raises(SettingsError, match=message):
        build_stage("grpo", given)


def test_validation_data_that_hold_no_question_end_the_run_at_the_start(base_folder, data_folder, tmp_path):
    empty = tmp_path / "val.jsonl"
    empty.write_text("{}\n")
    settings = settings_for("grpo", base_folder, data_folder, tmp_path, val_data=str(empty), watch_every=1)
    with pytest.raises(SettingsError, match="no question could be read"):
        grpo_trainer(settings, (length_part(),))


def test_script_calls_leave_no_figure_undefined(base_folder, data_folder, tmp_path):
    settings = settings_for("grpo", base_folder, data_folder, tmp_path, max_steps=1, beta=0)
    _, trainer = grpo_trainer(settings, (length_part(),))
    script_calls(trainer)
    train(trainer, settings, "grpo")
    logged = trainer.state.log_history[0]
    names = ("invalid", "repeated", "whole_image", "after_answer", "no_call", "per_rollout", "iou")
    assert all(math.isfinite(logged[f"crops/{name}"]) for name in names)


def test_the_page_has_each_alarm_with_its_limit():
    """Figure, direction and number, as they stand in the table."""
    page = (Path(watching.__file__).parent / "docs/watching.md").read_text(encoding="utf-8")
    for alarm in ALARMS:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{alarm.figure}` |"))
        direction = "over" if alarm.limit > alarm.recovered else "under"
        limit = f"{alarm.limit:.0f} times" if alarm.grows else f"{alarm.limit:.0%}"
        assert f"| {direction} {limit}" in row
