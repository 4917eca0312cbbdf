"""Training curves and the README's figure."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import visualize
from visualize import plot_training_curves

ROOT = Path(visualize.__file__).parent


# ----------------------------------------------------------------------------------------------- curves

SFT_LOG = [{"step": step, "loss": 2 / (1 + step), "learning_rate": 1e-5, "epoch": 0.1} for step in range(60)]
EVAL_LOG = [{"step": 30, "eval_loss": 1.0}, {"step": 60, "train_runtime": 1.0, "note": "text"}]
GRPO_LOG = [
    {"step": step, "reward": 1.0, "rewards/accuracy/mean": 0.5, "kl": 0.1, "crops/per_rollout": 1, "crops/new": 2}
    for step in range(3)
]


def drawn_panels(history, path, monkeypatch) -> dict[str, int]:
    """Title -> number of named curves of each panel that was drawn."""
    figures = []
    monkeypatch.setattr(visualize, "_save_png", lambda figure, *_: figures.append(figure))
    plot_training_curves(history, path)
    return {axes.get_title(): len(axes.get_legend_handles_labels()[1]) for axes in figures[0].get_axes()}


def test_curves_have_one_panel_for_what_was_logged_and_none_that_is_empty(tmp_path, monkeypatch):
    panels = drawn_panels({"sft": SFT_LOG + EVAL_LOG, "grpo": GRPO_LOG}, tmp_path / "c.png", monkeypatch)
    assert panels == {
        "Loss": 2,
        "Learning rate": 1,
        "Reward": 1,
        "Parts of the reward": 1,
        "Distance to the SFT model": 1,
        "Crops per rollout": 1,
        "Other crop metrics": 1,
    }


@pytest.mark.parametrize("history", [{"sft": SFT_LOG}, {"grpo": GRPO_LOG, "sft": []}])
def test_one_stage_alone_is_drawn(history, tmp_path, monkeypatch):
    assert len(drawn_panels(history, tmp_path / "c.png", monkeypatch)) >= 2


@pytest.mark.parametrize("history", [{}, {"sft": [], "grpo": []}, {"sft": [{"step": 1, "train_runtime": 2.0}]}])
def test_nothing_logged_still_gives_a_picture(history, tmp_path):
    plot_training_curves(history, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").format == "PNG"


def test_more_panels_make_a_larger_png_and_pyplot_is_left_alone(tmp_path):
    code = (
        "import sys, visualize as v\n"
        "log = [{'step': i, 'loss': float('nan') if i == 3 else 1.0, 'learning_rate': 1e-5} for i in range(50)]\n"
        "v.plot_training_curves({'sft': log}, sys.argv[1])\n"
        "log = [{'step': i, 'reward': 1.0, 'kl': 0.1, 'entropy': 1.0, 'crops/iou': 0.4} for i in range(5)]\n"
        "v.plot_training_curves({'sft': log, 'grpo': log}, sys.argv[2])\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    paths = [tmp_path / "deep" / name for name in ("one.png", "two.png")]
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, cwd=ROOT)
    one, two = (Image.open(path) for path in paths)
    assert one.width == two.width and two.height > one.height


def test_mistyped_stage_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"stages \['rl'\], but it may have sft, grpo"):
        plot_training_curves({"rl": GRPO_LOG}, tmp_path / "c.png")


def test_smoothing_keeps_a_straight_line_straight():
    line = [float(value) for value in range(50)]
    assert visualize._running_mean(line, 4) == line


# ------------------------------------------------------------------------------------- the README's figure


def test_readme_figure_is_drawn_small_enough_to_ship(tmp_path):
    visualize.main(["--readme_figure", str(tmp_path / "figure.png")])
    assert Image.open(tmp_path / "figure.png").width > 1000
    assert (tmp_path / "figure.png").stat().st_size < 300_000
    assert (ROOT / "docs/frames_and_masks.png").stat().st_size < 300_000


def test_import_is_fast_and_brings_no_heavy_package():
    code = "import sys, visualize; sys.exit(bool({'torch', 'matplotlib', 'jinja2', 'PIL'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
