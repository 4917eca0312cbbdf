"""Trackers get the figures and the pictures of kept rollouts, for real; one that is not installed is named at once."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from test_trainers import grpo_trainer, length_part, script_calls, settings_for

import trackers
import train_grpo
from config import SettingsError
from crop_tool import Box, ToolCall
from response_format import parse_response
from traces import CALL_COLORS, Trace
from trackers import check_trackers
from training import train
from visualize import draw_answer

SHOWN = [[group, which] for group in (1, 2) for which in ("best", "worst")]
WATCHED = {"max_steps": 2, "watch_every": 1, "watch_samples": 2, "keep_rollouts_every": 2, "beta": 0}


def run(base, data, folder, **flags):
    settings = settings_for("grpo", base, data, folder, **WATCHED, **flags)
    _, trainer = grpo_trainer(settings, (length_part(),))
    script_calls(trainer)
    train(trainer, settings, "grpo")
    return trainer


def test_tensorboard_has_figures_pictures_and_texts(base_folder, data_folder, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is in requirements-dev.txt")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = run(base_folder, data_folder, tmp_path, report_to="tensorboard")
    folder = next((tmp_path / "runs").iterdir())
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/watch/crop_gain", "train/crops/no_call", "train/answer/characters"} <= set(tags["scalars"])
    assert [item.step for item in events.Scalars("train/watch/crop_gain")] == [0, 1, 2]
    assert tags["images"] == [f"rollouts/group {group} {which}" for group, which in SHOWN]
    pictures = events.Images("rollouts/group 1 best")
    assert [item.step for item in pictures] == [1, 2]
    assert pictures[1].height == 384 and pictures[1].width > 384, "the image and a crop beside it"
    text = events.Tensors("rollouts/group 1 best/text_summary")[1].tensor_proto.string_val[0].decode()
    best = max(
        trainer._batch_rollouts[:4], key=lambda item: length_part().function(parse_response(item.text, ()), None)
    )
    assert "    <tool_call>" in text and best.text.split("</tool_call>")[0].strip() in text


def test_wandb_gets_the_figures_and_the_table_of_pictures(base_folder, data_folder, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="an optional package")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run(base_folder, data_folder, tmp_path, report_to="wandb")
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert {"train/watch/crop_gain", "train/crops/no_call", "rollouts", "rollouts/group 2 worst"} <= set(summary)
    media = next((tmp_path / "wandb").glob("offline-run-*")) / "files/media"
    tables = [json.loads(path.read_text()) for path in media.rglob("rollouts*.table.json")]
    assert [tuple(table["columns"]) for table in tables] == [trackers.COLUMNS] * 2
    assert [[row[:2] for row in table["data"]] for table in tables] == [SHOWN] * 2
    assert sum(1 for _ in media.rglob("*.png")) == 8


def test_trackio_gets_the_figures_and_the_table_of_pictures(base_folder, data_folder, tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="an optional package")
    logged, log = [], trackio.log
    monkeypatch.setattr(trackio, "log", lambda values, **others: logged.append(values) or log(values, **others))
    run(base_folder, data_folder, tmp_path, report_to="trackio")
    assert [values["train/global_step"] for values in logged if "train/watch/crop_gain" in values] == [0, 1, 2]
    tables = [values for values in logged if "rollouts" in values]
    assert [values["train/global_step"] for values in tables] == [1, 2]
    for values in tables:
        assert [[row["group"], row["rollout"]] for row in values["rollouts"].data] == SHOWN
        assert {f"rollouts/group {group} {which}" for group, which in SHOWN} <= set(values)
    pictures = Path(os.environ["TRACKIO_DIR"]).rglob("*.png")
    assert len(list(pictures)) == 8


def test_a_tracker_that_is_not_installed_ends_the_command_before_anything_is_loaded(
    base_folder, data_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="report_to is tensorbord, but tensorbord is no tracker: give tensorboard,"):
        check_trackers("tensorbord")
    with pytest.raises(SettingsError, match="report_to is wandb, trackio, but wandb, trackio is not installed: pip"):
        check_trackers(["wandb", "trackio"])
    check_trackers("none")
    check_trackers(None)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "trackio", None)  # as python sees a package that is not there
    settings = settings_for("grpo", base_folder, data_folder, tmp_path, report_to=json.dumps(["trackio"]))
    settings.grpo.trl["report_to"] = ["trackio"]
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="pip install trackio"):
        train_grpo.run_grpo(settings)
    assert "Loading weights" not in capsys.readouterr().err


def test_the_picture_of_an_answer_has_its_boxes_and_crops_side_by_side():
    calls = (ToolCall("x", 0, "malformed"), ToolCall("[0, 0, 50, 50]", 20, "exact", Box(20, 20, 60, 60)))
    response = parse_response("a" * 60, calls)
    trace = Trace("?", response, Image.new("RGB", (200, 100), "black"), (None, Image.new("RGB", (56, 28), "white")))
    picture = draw_answer(trace, 200)
    assert picture.size == (400 + 8 + 400, 200)
    color = tuple(int(CALL_COLORS[1][at : at + 2], 16) for at in (1, 3, 5))
    assert picture.getpixel((120, 60)) == color, "the right edge of the second call's box"
    assert picture.getpixel((300, 100)) == (0, 0, 0)
    assert picture.getpixel((600, 100)) == (255, 255, 255)
    assert picture.getpixel((409, 100)) == color, "the frame of the second call's crop"
    strip = replace(trace, crops=(None, Image.new("RGB", (5600, 28), "white")))
    assert draw_answer(strip, 200).size == (400 + 8 + 800, 200)
