"""Pictures of the work: a page that traces an answer, training curves, the README's figure.

python visualize.py --readme_figure docs/frames_and_masks.png
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crop_tool import (
    CALL_CLOSE,
    CALL_OPEN,
    Box,
    CropContract,
    Frame,
    ToolCall,
    cut_crop,
    format_box,
    image_token_count,
    resolve_box,
    show_image,
)
from response_format import ParsedResponse

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

# Dark enough for white numbers on them; calls take them in turn.
CALL_COLORS = ("#c2410c", "#1d4ed8", "#047857", "#a21caf", "#854d0e", "#0e7490")
OUTCOME_NOTES = {
    "exact": "",
    "clamped": "partly outside the image, cut at its border",
    "grown": "too small, grown around its centre",
    "malformed": "not four plain numbers in brackets, nothing was shown",
    "inverted": "x2 must be over x1 and y2 over y1, nothing was shown",
    "outside": "wholly outside the image, nothing was shown",
    "extreme_ratio": "the region is too long and thin, nothing was shown",
    "over_limit": "after the last crop allowed, nothing was shown",
    "parsed": "not carried out",
}
MAX_EMBEDDED_SIDE = 1600  # pixels; larger pictures are shrunk for the page
MAX_PNG_AREA = 512 * 512  # larger ones are embedded as JPEG


# ----------------------------------------------------------------------------------------------- traces


@dataclass(frozen=True)
class Trace:
    """All that a page needs to show one answer.

    image: the original. crops: one a call, as the model saw it; None where nothing was shown.
    expected, is_correct: the annotated answer and whether it was met; without `is_correct` the two answers
        are compared regardless of case and spaces.
    reference_boxes: annotated regions in original pixels.
    """

    question: str
    response: ParsedResponse
    image: Image
    crops: tuple[Image | None, ...]
    expected: str | None = None
    title: str = "An answer, traced"
    reference_boxes: tuple[Box, ...] = ()
    is_correct: bool | None = None

    def __post_init__(self) -> None:
        calls = len(self.response.tool_calls)
        if len(self.crops) != calls:
            raise ValueError(
                f"{len(self.crops)} crops were given for {calls} calls: give one a call, None where nothing was shown"
            )

    @property
    def verdict(self) -> bool | None:
        """Whether the answer is right; None where nothing was expected."""
        if self.is_correct is not None or self.expected is None:
            return self.is_correct
        given, expected = (" ".join(text.casefold().split()) for text in (self.response.answer_content, self.expected))
        return given == expected


@dataclass(frozen=True)
class TraceStep:
    """A stretch of the response and the call that ends it; the last stretch has none."""

    text: str
    number: int = 0
    call: ToolCall | None = None
    crop: Image | None = None


def trace_steps(trace: Trace, begin: int = 0, end: int | None = None) -> list[TraceStep]:
    """The response from offset `begin` to `end`, cut after each of its calls; space at its end is dropped."""
    text = trace.response.text
    end = len(text) if end is None else end
    steps, position = [], begin
    for number, (call, crop) in enumerate(zip(trace.response.tool_calls, trace.crops, strict=True), start=1):
        if begin <= call.start < end:
            steps.append(TraceStep(text[position : call.start], number, call, crop))
            position = _call_end(call, text)
    return [*steps, TraceStep(text[position:end].rstrip())]


def _call_end(call: ToolCall, text: str) -> int:
    """Offset behind the call's closing tag; a call that was never opened begins at that tag."""
    body = call.start + len(CALL_OPEN) + len(call.text) if text.startswith(CALL_OPEN, call.start) else call.start
    return body + len(CALL_CLOSE)


def _reasoning_end(response: ParsedResponse) -> int:
    """Where the answer begins; a call that holds `<answer>` inside belongs to the reasoning as a whole."""
    before = [_call_end(call, response.text) for call in response.tool_calls if call.start < response.answer_start]
    return max([response.answer_start, *before])


def trace_fragment(trace: Trace) -> str:
    """One answer as an HTML fragment with its own style, for notebooks (`_repr_html_`)."""
    return _template().render(page=False, sections=[_section(trace)])


def trace_html(*traces: Trace) -> str:
    """A self-contained page: each trace (the turns of a conversation) a section."""
    if not traces:
        raise ValueError("no trace was given: a page shows at least one")
    return _template().render(page=True, title=traces[0].title, sections=[_section(trace) for trace in traces])


def save_trace(path: str | Path, traces: Sequence[Trace]) -> None:
    """Write the page of one or several traces."""
    # A lone surrogate from a broken token cannot be encoded; the browser shows its reference as a blank.
    _write_whole(path, trace_html(*traces).encode("utf-8", "xmlcharrefreplace"))


def _write_whole(path: str | Path, data: bytes) -> None:
    """Write under another name first, so that a reader never meets half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------- a trace's data as HTML


def _section(trace: Trace) -> dict[str, Any]:
    """What the template reads of a trace."""
    response, (width, height) = trace.response, trace.image.size
    border = _reasoning_end(response)
    last = trace_steps(trace, border)
    closed = response.text[border:].partition("</answer>")[2]
    return {
        "trace": trace,
        "answer": response.answer_content,
        "picture": _data_uri(trace.image),
        # Small pictures are enlarged, tall ones kept from filling several screens.
        "display_width": round(min(max(width, 360), 640, 640 * width / height)),
        "boxes": [_overlay(box, width, height) for box in trace.reference_boxes],
        "calls": [
            _overlay(call.box, width, height, number)
            for number, call in enumerate(response.tool_calls, start=1)
            if call.box is not None
        ],
        "reasoning": [_step_data(step) for step in trace_steps(trace, 0, border)],
        "after": [_step_data(step) for step in last] if len(last) > 1 or closed.strip() else [],
    }


def _step_data(step: TraceStep) -> dict[str, Any]:
    pieces = re.split(r"(</?(?:think|answer)>)", step.text)  # text and tags in turn
    data: dict[str, Any] = {"pieces": pieces, "call": None, "crop": None}
    if step.call is not None:
        data |= {"call": step.call, "number": step.number, "color": _color(step.number)}
        data["note"] = OUTCOME_NOTES[step.call.outcome]
    if step.crop is not None:
        width, height = step.crop.size
        data |= {"crop": _data_uri(step.crop), "crop_size": f"{width} × {height}"}
        data["crop_width"] = round(min(max(width, 140), 420, 320 * width / height))
    return data


def _color(number: int) -> str:
    return CALL_COLORS[(number - 1) % len(CALL_COLORS)]


def _overlay(box: Box, width: int, height: int, number: int = 0) -> dict[str, float | str]:
    """A box and the tag with its number, in the pixels of the image that they are drawn over."""
    tag_height = max(width, height) / 22
    tag_width = tag_height * (0.45 + 0.6 * len(str(number)))
    above = box.y1 - tag_height
    return {
        "x": box.x1,
        "y": box.y1,
        "width": box.width,
        "height": box.height,
        "number": number,
        "color": _color(number),
        "tag_x": min(max(0.0, box.x1), width - tag_width),
        "tag_y": above if above >= 0 else box.y1,
        "tag_width": tag_width,
        "tag_height": tag_height,
    }


def _data_uri(image: Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((MAX_EMBEDDED_SIDE, MAX_EMBEDDED_SIDE))
    kind = "PNG" if image.width * image.height <= MAX_PNG_AREA else "JPEG"
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


STYLE = """
.crop-trace { --ink:#1b1f24; --soft:#59636e; --paper:#fff; --card:#f6f8fa; --line:#d1d9e0; --bad:#b42318;
  --bad-paper:#fef0ee; --good:#1a7f37; color:var(--ink); background:var(--paper); max-width:46rem; margin:0 auto;
  padding:1rem; font:16px/1.6 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap:anywhere; }
@media (prefers-color-scheme: dark) { .crop-trace { --ink:#e6edf3; --soft:#9aa4af; --paper:#0d1117; --card:#161b22;
  --line:#30363d; --bad:#ff8f85; --bad-paper:#3a1512; --good:#57c46f; } }
.crop-trace * { box-sizing:border-box; }
.crop-trace h2 { font-size:1.15rem; line-height:1.3; margin:0 0 .6rem; color:var(--ink); }
.crop-trace h3 { font-size:.8rem; font-weight:600; margin:1.4rem 0 .3rem; color:var(--soft); }
.crop-trace .question, .crop-trace .answer { margin:0; white-space:pre-wrap; font-size:1.1rem; }
.crop-trace .picture { position:relative; max-width:100%; line-height:0; }
.crop-trace .picture img, .crop-trace .picture svg { width:100%; height:auto; border-radius:6px; }
.crop-trace .picture svg { position:absolute; inset:0; height:100%; overflow:visible; }
.crop-trace .picture rect { fill:none; vector-effect:non-scaling-stroke; }
.crop-trace .halo { stroke:#000; stroke-opacity:.55; stroke-width:5; }
.crop-trace .box { stroke-width:2.5; }
.crop-trace .reference { stroke:#fff; stroke-width:2; stroke-dasharray:6 4; }
.crop-trace .picture text { fill:#fff; font-weight:700; font-family:system-ui, sans-serif; text-anchor:middle;
  dominant-baseline:central; }
.crop-trace .small { color:var(--soft); font-size:.85rem; line-height:1.45; margin:.3rem 0 0; }
.crop-trace .flow { background:var(--card); border:1px solid var(--line); border-radius:8px; padding:.8rem 1rem; }
.crop-trace .text { white-space:pre-wrap; }
.crop-trace .tag { color:var(--soft); font:.85em ui-monospace, Menlo, Consolas, monospace; }
.crop-trace .chip { display:inline; border:1px solid var(--line); border-radius:6px; background:var(--paper);
  padding:.1rem .45rem .1rem 0; box-decoration-break:clone; -webkit-box-decoration-break:clone; }
.crop-trace .chip b { color:#fff; padding:.1rem .45rem; border-radius:5px 0 0 5px; margin-right:.35rem; }
.crop-trace .chip code { font:.85em ui-monospace, Menlo, Consolas, monospace; color:var(--ink); background:none;
  white-space:pre-wrap; }
.crop-trace .chip i { color:var(--soft); font-size:.85em; }
.crop-trace .chip.bad { border-color:var(--bad); background:var(--bad-paper); }
.crop-trace .chip.bad i { color:var(--bad); }
.crop-trace figure { margin:.6rem 0 .8rem; }
.crop-trace figure img { max-width:100%; height:auto; border-radius:6px; display:block; border:3px solid; }
.crop-trace .right { color:var(--good); font-weight:600; } .crop-trace .wrong { color:var(--bad); font-weight:600; }
"""

PAGE_STYLE = """
:root { color-scheme: light dark; } body { margin:0; background:#fff; }
@media (prefers-color-scheme: dark) { body { background:#0d1117; } }
.crop-trace + .crop-trace { border-top:1px solid var(--line); margin-top:1.5rem; padding-top:1.5rem; }
"""

TEMPLATE = """
{%- macro rect(box, class, color='') -%}
<rect class="{{ class }}" x="{{ box.x }}" y="{{ box.y }}" width="{{ box.width }}" height="{{ box.height }}"
{#- #}{% if color %} style="stroke:{{ color }}"{% endif %}/>
{%- endmacro -%}
{%- macro flow(steps) -%}
<div class="flow">
{%- for step in steps -%}
<span class="text">
{%- for piece in step.pieces -%}
{%- if loop.index is even -%}<span class="tag">{{ piece }}</span>{%- else -%}{{ piece }}{%- endif -%}
{%- endfor -%}
</span>
{%- if step.call -%}
<span class="chip{{ '' if step.call.is_executed or step.call.outcome == 'parsed' else ' bad' }}">
{#- -#}<b style="background:{{ step.color }}">{{ step.number }}</b><code>{{ step.call.text }}</code> {# -#}
<i>{{ step.call.outcome }}{{ ': ' ~ step.note if step.note }}</i></span>
{%- endif -%}
{%- if step.crop -%}
<figure><img src="{{ step.crop }}" alt="crop {{ step.number }}" style="width:{{ step.crop_width }}px;
{#- #} border-color:{{ step.color }}">
<figcaption class="small">Crop {{ step.number }}, as the model saw it: {{ step.crop_size }}
{%- if step.call.box %}, cut from {{ step.call.box.as_list() | map('round') | map('int') | list }} of the original
{%- endif %}</figcaption></figure>
{%- endif -%}
{%- endfor -%}
</div>
{%- endmacro -%}
{%- if page -%}
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title><style>{{ page_style }}</style>
{%- endif %}<style>{{ style }}</style>{% if page %}</head><body>{% endif %}
{% for section in sections %}{% set trace = section.trace -%}
<section class="crop-trace">
<h2>{{ trace.title }}</h2>
<div class="picture" style="width:{{ section.display_width }}px">
<img src="{{ section.picture }}" alt="the image" width="{{ trace.image.width }}" height="{{ trace.image.height }}">
<svg viewBox="0 0 {{ trace.image.width }} {{ trace.image.height }}" role="img" aria-label="regions of the calls">
{%- for box in section.boxes %}{{ rect(box, 'halo') }}{{ rect(box, 'reference') }}{% endfor -%}
{%- for box in section.calls %}{{ rect(box, 'halo') }}{{ rect(box, 'box', box.color) }}
{#- -#}<rect x="{{ box.tag_x }}" y="{{ box.tag_y }}" width="{{ box.tag_width }}" height="{{ box.tag_height }}"
{#- #} style="fill:{{ box.color }}"/><text x="{{ box.tag_x + box.tag_width / 2 }}"
{#- #} y="{{ box.tag_y + box.tag_height / 2 }}" font-size="{{ box.tag_height * 0.8 }}">{{ box.number }}</text>
{%- endfor -%}
</svg></div>
<p class="small">{{ trace.image.width }} × {{ trace.image.height }} pixels
{%- if section.boxes %}; dashed: annotated regions{% endif %}</p>
<h3>Question</h3><p class="question">{{ trace.question }}</p>
<h3>Response</h3>{{ flow(section.reasoning) }}
<h3>Answer</h3>
<p class="answer">{{ section.answer }}
{%- if not section.answer %}<span class="small">none was written</span>{% endif %}
{%- if trace.verdict is true %} <span class="right">✓ right</span>
{%- elif trace.verdict is false %} <span class="wrong">✗ wrong</span>{% endif %}</p>
{%- if trace.expected is not none %}<p class="small">Expected: {{ trace.expected }}</p>{% endif %}
{%- if section.after %}<h3>In and after the answer</h3>{{ flow(section.after) }}{% endif %}
</section>
{% endfor -%}
{%- if page %}</body></html>{% endif %}
"""


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.globals |= {"style": Markup(STYLE), "page_style": Markup(PAGE_STYLE)}
    return environment.from_string(TEMPLATE)


# ----------------------------------------------------------------------------------------------- curves

CALL_FAULTS = ("invalid", "repeated", "whole_image", "after_answer")
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
        ("Crops per rollout", "crops", ("crops/per_rollout",)),
        ("Calls gone wrong", "share of calls", tuple(f"crops/{fault}" for fault in CALL_FAULTS)),
        ("Rollouts without a call", "share of rollouts", ("crops/no_call",)),
        ("Overlap with annotations", "IoU", ("crops/iou*",)),
        ("Other crop metrics", "", ("crops/*",)),
        ("Completion length", "tokens", ("completions/mean_length",)),
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
    _write_whole(path, buffer.getvalue())


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
