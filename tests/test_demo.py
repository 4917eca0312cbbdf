"""The demo, small: it runs the ordinary commands on its own files and writes what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import demo

ROOT = Path(demo.__file__).parent
SMALL = replace(
    demo.QUICK,
    pictures=40,
    warm_up_steps=3,
    probe_steps=100,
    sft_steps=4,
    grpo_steps=1,
    test_pictures=6,
    sampled_answers=1,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo.run_demo(folder, SMALL, seed=0)


def test_metrics_have_the_figures_of_both_stages(world):
    folder, metrics = world
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    figures = {"accuracy", "sampled_accuracy", "accuracy_blank_crops", "accuracy_no_crops", "mean_iou", "questions"}
    assert set(metrics["sft"]) == set(metrics["grpo"]) == figures
    assert metrics["sft"]["questions"] == 18
    assert set(metrics["seconds"]) == {"set_up", "sft", "grpo", "evaluation"}


def test_it_leaves_models_curves_traces_and_data_in_the_readmes_format(world):
    folder, _ = world
    for stage in ("sft", "grpo"):
        assert (folder / stage / "final_model" / "model.safetensors").is_file()
        assert (folder / stage / "final_model" / "crop_contract.json").is_file()
    assert (folder / "training_curves.png").stat().st_size > 10_000
    assert len(list((folder / "traces").glob("answer_*.html"))) == 5
    row = json.loads((folder / "data/train.jsonl").read_text().splitlines()[0])
    assert (folder / "data" / row["image_path"]).is_file()
    assert "{Crop " in row["QnA"][0]["A3"]


def test_table_shows_both_stages(world):
    text = demo.table(world[1])
    assert "after SFT" in text
    assert "after R-GRPO" in text
    assert "18 held-out questions" in text


def test_the_data_it_writes_passes_the_data_check(world):
    folder, _ = world
    command = ["data_utils.py", "--check", f"{folder}/data/train.jsonl", "--image_base_path", f"{folder}/data"]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no faults" in result.stdout


def test_every_example_of_example_usage_runs_on_it(world):
    folder, _ = world
    result = subprocess.run(
        [sys.executable, "example_usage.py", "--demo", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for words in ("expected", "first: ", "no faults", "trained", "rewards/brevity/mean"):
        assert words in result.stdout


def test_same_seed_same_figures(world, tmp_path):
    _, metrics = world
    again = demo.run_demo(tmp_path / "again", SMALL, seed=0)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in metrics.items() if k != "seconds"}
