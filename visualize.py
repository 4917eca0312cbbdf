"""Pictures of the work: training curves, and the README's figure of masks and frames.

python visualize.py --readme_figure docs/frames_and_masks.png
"""

from __future__ import annotations

import argparse
import io
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crop_tool import (
    Box,
    CropContract,
    Frame,
    cut_crop,
    format_box,
    image_token_count,
    resolve_box,
    show_image,
)
from rewards import CALL_FAULTS
from traces import Trace, call_color, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image


# ----------------------------------------------------------------------------------------------- curves

# (title, axis label, names of the metrics); a metric is drawn in the first panel that names it.
Panel = tuple[str, str, tuple[str, ...]]
PANELS: dict[str, tuple[Panel, ...]] = {
    "sft": (
        ("Loss", "cross-entropy", ("loss", "eval_loss")),
        ("Token accuracy", "share right", ("mean_token_accuracy", "eval_mean_token_accuracy")),
        ("Learning rate", "", ("learning_rate",)),
    ),
    "grpo": (
        ("Reward", "mean over rollouts", ("reward", "eval_reward")),
        ("Parts of the reward", "mean over rollouts", ("rewards/*/mean",)),
        ("Distance to the SFT model", "KL", ("kl",)),
        ("Entropy", "nats a token", ("entropy",)),
        ("Crop gain on the fixed questions", "accuracy", ("watch/crop_gain*",)),
        ("Accuracy on the fixed questions", "accuracy", ("watch/accuracy*",)),
        ("Groups without variance", "share of groups", ("frac_reward_zero_std",)),
        ("Crops per rollout", "crops", ("crops/per_rollout",)),
        ("Calls gone wrong", "share of calls", tuple(f"crops/{fault}" for fault in CALL_FAULTS)),
        ("Rollouts without a call", "share of rollouts", ("crops/no_call",)),
        ("Overlap with annotations", "IoU", ("crops/iou*",)),
        ("Other crop metrics", "", ("crops/*",)),
        ("Completion length", "tokens", ("completions/mean_length",)),
        ("Answer length", "characters", ("answer/characters",)),
        ("Rollout speed", "sampled tokens a second", ("rollout/tokens_per_second",)),
    ),
}
STAGE_TITLES = {"sft": "Stage 1: SFT", "grpo": "Stage 2: R-GRPO"}
CURVE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#595959", "#7a5195")
COLUMNS = 3
SMOOTHED_FROM = 40  # points; shorter curves are drawn as they are


def plot_training_curves(history: dict[str, list[dict[str, Any]]], path: str | Path) -> None:
    """Draw the log of each stage (`{"sft": trainer.state.log_history, "grpo": …}`) into one PNG.

    A panel whose metrics were not logged is left out.
    """
    unknown = set(history) - set(PANELS)
    if unknown:
        raise ValueError(f"history has stages {sorted(unknown)}, but it may have {', '.join(PANELS)}")
    panels = {stage: _filled_panels(stage, history.get(stage, [])) for stage in PANELS}
    stages = [stage for stage in PANELS if panels[stage]]
    rows = [-(-len(panels[stage]) // COLUMNS) for stage in stages]
    figure = _new_figure(4.3 * COLUMNS, max(1, sum(rows)) * 2.9 + 0.4 * len(stages))
    if not stages:
        figure.text(0.5, 0.5, "No metrics were logged", ha="center", va="center")
    else:
        parts = figure.subfigures(len(stages), 1, height_ratios=rows, squeeze=False)[:, 0]
        for part, stage, count in zip(parts, stages, rows, strict=True):
            part.suptitle(STAGE_TITLES[stage], x=0.01, ha="left", fontweight="bold")
            for index, ((title, label, _), curves) in enumerate(panels[stage], start=1):
                axes = part.add_subplot(count, COLUMNS, index)
                _draw_curves(axes, curves)
                axes.set_title(title, fontsize=10)
                axes.set_xlabel("step")
                axes.set_ylabel(label)
    _save_png(figure, path)


Curve = tuple[list[float], list[float]]


def _filled_panels(stage: str, items: list[dict[str, Any]]) -> list[tuple[Panel, dict[str, Curve]]]:
    """The stage's panels that have something to show, with the curves (name -> steps, values) of each."""
    curves: dict[str, Curve] = {}
    for item in items:
        for name, value in item.items():
            if "step" in item and isinstance(value, int | float):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(item["step"])
                values.append(value)
    panels = []
    for panel in PANELS[stage]:
        names = [name for pattern in panel[2] for name in curves if fnmatch(name, pattern)]
        if names:
            panels.append((panel, {name: curves.pop(name) for name in names}))
    return panels


def _draw_curves(axes: Axes, curves: dict[str, Curve]) -> None:
    for index, (name, (steps, values)) in enumerate(curves.items()):
        color = CURVE_COLORS[index % len(CURVE_COLORS)]
        is_rough = len(values) >= SMOOTHED_FROM and not name.startswith("eval_")
        marker = "o" if name.startswith("eval_") or len(values) == 1 else None
        axes.plot(steps, values, color=color, linewidth=1.4, marker=marker, markersize=4, alpha=0.25 if is_rough else 1)
        if is_rough:
            axes.plot(steps, _running_mean(values, len(values) // 15), color=color, linewidth=1.8)
        axes.plot([], [], color=color, marker=marker, markersize=4, label=_short_name(name))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(fontsize=8, frameon=False)


def _running_mean(values: list[float], reach: int) -> list[float]:
    """Each value's mean with up to `reach` neighbours on both sides."""
    last = len(values) - 1
    reaches = [min(reach, index, last - index) for index in range(len(values))]  # even, or the ends would bend
    windows = [values[index - near : index + near + 1] for index, near in enumerate(reaches)]
    return [sum(window) / len(window) for window in windows]


def _short_name(metric: str) -> str:
    """rewards/accuracy/mean -> accuracy, eval_loss -> validation, loss -> training."""
    if metric.startswith("eval_"):
        return "validation"
    name = metric.removesuffix("/mean").rpartition("/")[2]
    return "training" if "/" not in metric else name.replace("_", " ")


def _new_figure(width: float, height: float) -> Figure:
    """A figure of its own, without pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _save_png(figure: Figure, path: str | Path, dpi: int = 110) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_whole(path, buffer.getvalue())


# ------------------------------------------------------------------------------------- one answer as a picture


def draw_answer(trace: Trace, height: int = 384) -> Image:
    """One picture of an answer, for where a page cannot be shown: the image with the numbered boxes of its calls, the
    annotated ones in white, and beside it each crop as the model saw it."""
    from PIL import Image, ImageDraw, ImageFont

    font, gap = ImageFont.load_default(size=18), 8

    def scale_of(image: Image.Image) -> float:
        return min(height / image.height, 4 * height / image.width)  # a crop may be a strip

    def scaled(image: Image.Image) -> Image.Image:
        scale = scale_of(image)
        return image.convert("RGB").resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))

    main, scale = scaled(trace.image), scale_of(trace.image)
    draw = ImageDraw.Draw(main)
    calls = [(number, call) for number, call in enumerate(trace.response.tool_calls, start=1) if call.box is not None]
    boxes = [(box, "white", "") for box in trace.reference_boxes]
    for box, color, number in boxes + [(call.box, call_color(number), str(number)) for number, call in calls]:
        left, top, right, bottom = (value * scale for value in box.as_list())
        draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), outline="black", width=1)
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=color, width=3)
        if number:
            draw.rectangle((left, top, left + 10 + 10 * len(number), top + 22), fill=color)
            draw.text((left + 5, top + 1), number, fill="white", font=font)
    pieces = [main]
    for number, crop in enumerate(trace.crops, start=1):
        if crop is not None:
            piece = scaled(crop)
            ImageDraw.Draw(piece).rectangle(
                (0, 0, piece.width - 1, piece.height - 1), outline=call_color(number), width=4
            )
            pieces.append(piece)
    sheet = Image.new("RGB", (sum(piece.width + gap for piece in pieces) - gap, height), "white")
    left = 0
    for piece in pieces:
        sheet.paste(piece, (left, 0))
        left += piece.width + gap
    return sheet


# ------------------------------------------------------------------------------------- the README's figure

EXAMPLE_SIZE = (1280, 720)
EXAMPLE_BOX = Box(806, 188, 968, 302)
CHARACTER = 0.0795  # inches, of the figure's monospace font
CELL_COLORS = {"prompt": "#dfe3e8", "image": "#a9cdf2", "sampled": "#aee0ad", "crop": "#fac98c"}
CELL_MEANINGS = {
    "prompt": "prompt text",
    "image": "the image's tokens",
    "sampled": "sampled by the model, carries loss",
    "crop": "the crop's tokens, inserted",
}
FRAME_NOTES = {
    "original": "pixels of the image file:\nannotations, crops, public results",
    "resized": "the default: pixels as the model\nsees it (one token a grid cell)",
    "normalized_1000": "thousandths of width and height",
}


def response_figure(path: str | Path) -> None:
    """Draw which tokens carry loss, and one box in the three frames; every number is computed."""
    contract = CropContract()
    shown = Frame.of(EXAMPLE_SIZE, contract).shown
    scene = _example_scene()
    _, region = resolve_box(EXAMPLE_BOX, EXAMPLE_SIZE, contract.min_crop_side)
    crop = cut_crop(scene, region, contract)
    call = format_box(Frame.of(EXAMPLE_SIZE, contract).to_model(EXAMPLE_BOX))
    image_tokens, crop_tokens = (image_token_count(*size, contract) for size in (shown, crop.size))

    figure = _new_figure(9.2, 6.5)
    figure.set_layout_engine("none")
    canvas = figure.add_axes((0, 0, 1, 1), xlim=(0, 9.2), ylim=(0, 6.5))  # in inches
    canvas.axis("off")
    _draw_cells(canvas, _example_cells(image_tokens, crop_tokens, call))
    canvas.text(0.3, 2.58, "One box, three frames", fontsize=12, fontweight="bold")
    for left, space in zip((0.55, 3.05, 5.55), FRAME_NOTES, strict=True):
        picture = show_image(scene, contract) if space == "resized" else scene
        _draw_frame(figure, picture, Frame(space, EXAMPLE_SIZE, shown), left, contract.factor)
    axes = figure.add_axes((7.9 / 9.2, 1.03 / 6.5, 1.0 / 9.2, 0.68 / 6.5), xticks=[], yticks=[])
    axes.imshow(crop)
    axes.spines[:].set(edgecolor=CELL_COLORS["crop"], linewidth=3)
    axes.set_title("the crop", fontsize=9, fontweight="bold")
    size = f"{int(region.width)} × {int(region.height)}, shown\nas {crop.width} × {crop.height}:"
    axes.set_xlabel(f"{size}\n{crop_tokens} image tokens", fontsize=8)
    _save_png(figure, path, dpi=160)


def _example_scene() -> Image:
    """A street with a shop sign that is too small to read once the picture is shrunk."""
    from PIL import Image, ImageDraw, ImageFont

    scene = Image.new("RGB", EXAMPLE_SIZE, "#cfe3f2")
    draw = ImageDraw.Draw(scene)
    draw.rectangle((0, 600, 1280, 720), fill="#8d9299")
    draw.rectangle((90, 250, 470, 600), fill="#c9b79c")
    draw.rectangle((560, 90, 1160, 600), fill="#b5654a")
    for left, top in ((150, 310), (320, 310), (620, 140), (1010, 140), (620, 380), (1010, 380)):
        draw.rectangle((left, top, left + 95, top + 130), fill="#e8f1f7", outline="#5c4033", width=6)
    draw.rectangle((815, 350, 955, 600), fill="#4a3325")
    x1, y1, x2, y2 = EXAMPLE_BOX.as_list()
    draw.rectangle((x1 + 8, y1 + 8, x2 - 8, y2 - 8), fill="#fdf6e3", outline="#1b1f24", width=4)
    font = ImageFont.load_default(size=46)
    draw.text(((x1 + x2) / 2, (y1 + y2) / 2), "OPEN", fill="#a31515", font=font, anchor="mm")
    return scene


def _example_cells(image_tokens: int, crop_tokens: int, call: str) -> list[list[tuple[str, str]]]:
    """The example sequence in the lines of the picture; a cell is (text, kind)."""

    def cells(kind: str, *texts: str) -> list[tuple[str, str]]:
        return [(text, kind) for text in texts]

    def block(kind: str, tokens: int) -> list[tuple[str, str]]:
        return cells(kind, "<|vision_start|>", f"<|image_pad|> × {tokens}", "<|vision_end|>")

    return [
        cells("prompt", "<|im_start|>", "system …", "<|im_end|>", "<|im_start|>", "user"),
        block("image", image_tokens) + cells("prompt", "What does the sign say?", "<|im_end|>"),
        cells("prompt", "<|im_start|>", "assistant")
        + cells("sampled", "<think>", "I", "look", "at", "the", "sign", ".", "<tool_call>"),
        cells("sampled", call, "</tool_call>") + block("crop", crop_tokens),
        cells("sampled", "It", "says", "OPEN", ".", "</think>", "<answer>", "OPEN", "</answer>", "<|im_end|>"),
    ]


def _draw_cells(canvas: Axes, lines: list[list[tuple[str, str]]]) -> None:
    """Lines of token cells with a legend; under each cell what it counts in the loss."""
    canvas.text(0.3, 6.17, "One sequence and its loss mask: 1 where the model sampled", fontsize=12, fontweight="bold")
    x = 0.3
    for kind, meaning in CELL_MEANINGS.items():
        _draw_cell(canvas, x, 5.76, 0.26, "", kind)
        canvas.text(x + 0.34, 5.885, meaning, fontsize=9, va="center")
        x += 0.68 + 0.068 * len(meaning)
    for row, line in enumerate(lines):
        x, y = 0.3, 5.25 - 0.53 * row
        for text, kind in line:
            width = len(text) * CHARACTER + 0.13
            _draw_cell(canvas, x, y, width, text, kind)
            loss, color = ("1", "#1a7f37") if kind == "sampled" else ("0", "#6e7781")
            canvas.text(x + width / 2, y - 0.1, loss, ha="center", va="center", fontsize=8, color=color)
            x += width + 0.05


def _draw_cell(canvas: Axes, x: float, y: float, width: float, text: str, kind: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = {"boxstyle": "round,pad=0,rounding_size=0.05", "linewidth": 0, "facecolor": CELL_COLORS[kind]}
    canvas.add_patch(FancyBboxPatch((x, y), width, 0.26, **style))
    canvas.text(x + width / 2, y + 0.125, text, ha="center", va="center", family="DejaVu Sans Mono", fontsize=9.5)


def _draw_frame(figure: Figure, picture: Image, frame: Frame, left: float, factor: int) -> None:
    """The picture with the axes of one frame, and the box in its numbers."""
    from matplotlib.patches import Rectangle

    width, height = frame.extent
    axes = figure.add_axes((left / 9.2, 0.78 / 6.5, 2.05 / 9.2, 1.17 / 6.5))
    axes.imshow(picture, extent=(0, width, height, 0), aspect="auto")
    box = EXAMPLE_BOX if frame.coordinate_space == "original" else frame.to_model(EXAMPLE_BOX)
    axes.add_patch(Rectangle((box.x1, box.y1), box.width, box.height, fill=False, edgecolor="black", linewidth=4))
    axes.add_patch(Rectangle((box.x1, box.y1), box.width, box.height, fill=False, edgecolor="#ffd000", linewidth=2))
    if frame.coordinate_space == "resized":
        axes.set_xticks(range(0, width, factor), minor=True)
        axes.set_yticks(range(0, height, factor), minor=True)
        axes.grid(which="minor", color="white", alpha=0.45, linewidth=0.5)
        axes.tick_params(which="minor", length=0)
        axes.spines[:].set(edgecolor=CELL_COLORS["image"], linewidth=3)
    axes.set_xticks([0, box.x1, box.x2, width])
    axes.set_yticks([0, box.y1, box.y2, height])
    axes.tick_params(labelsize=7, length=2)
    axes.set_title(f"{frame.coordinate_space}\n{format_box(box)}", fontsize=9, fontweight="bold")
    axes.set_xlabel(FRAME_NOTES[frame.coordinate_space], fontsize=8)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the README's figure of frames and masks.")
    parser.add_argument("--readme_figure", type=Path, required=True, metavar="PNG", help="where to write it")
    response_figure(parser.parse_args(argv).readme_figure)


if __name__ == "__main__":
    main()
