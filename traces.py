"""A page that shows one answer: the image, the numbered boxes, each crop where it entered, the answer."""

from __future__ import annotations

import base64
import errno
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crop_tool import CALL_CLOSE, CALL_OPEN, Box, ToolCall
from response_format import ParsedResponse

if TYPE_CHECKING:
    from jinja2 import Environment, Template
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


def reasoning_steps(trace: Trace) -> list[TraceStep]:
    """What stands before the answer."""
    return trace_steps(trace, 0, _reasoning_end(trace.response))


def steps_after(trace: Trace) -> list[TraceStep]:
    """The answer and what stands behind it, where that is more than the answer; else nothing."""
    border = _reasoning_end(trace.response)
    steps = trace_steps(trace, border)
    closed = trace.response.text[border:].partition("</answer>")[2]
    return steps if len(steps) > 1 or closed.strip() else []


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
    write_whole(path, trace_html(*traces).encode("utf-8", "xmlcharrefreplace"))


def write_whole(path: str | Path, data: bytes) -> None:
    """Write under another name first, so that a reader never meets half a file."""
    path = Path(path)
    if path.is_dir():  # as `replace` would say, but by the other name
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
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
    return {**response_data(trace), "picture": picture_data(trace)}


def response_data(trace: Trace) -> dict[str, Any]:
    """What the template reads of a trace but its picture: steps for `flow`, the answer, boxes of the calls."""
    return {
        "trace": trace,
        "answer": trace.response.answer_content,
        "reasoning": [step_data(step) for step in reasoning_steps(trace)],
        "after": [step_data(step) for step in steps_after(trace)],
        "calls": _call_overlays(trace),
    }


def _call_overlays(trace: Trace) -> list[dict[str, float | str]]:
    numbered = enumerate(trace.response.tool_calls, start=1)
    return [overlay(call.box, *trace.image.size, number) for number, call in numbered if call.box is not None]


def picture_data(trace: Trace) -> dict[str, Any]:
    """What the macro `picture` of picture.html reads."""
    width, height = trace.image.size
    return {
        "data": data_uri(trace.image),
        "width": width,
        "height": height,
        # Small pictures are enlarged, tall ones kept from filling several screens.
        "display_width": round(min(max(width, 360), 640, 640 * width / height)),
        "boxes": [overlay(box, width, height) for box in trace.reference_boxes],
        "calls": _call_overlays(trace),
    }


def step_data(step: TraceStep) -> dict[str, Any]:
    """What the macro `stretch` of flow.html reads."""
    pieces = re.split(r"(</?(?:think|answer|tool_call)>)", step.text)  # text and tags in turn
    data: dict[str, Any] = {"pieces": pieces, "call": None, "crop": None}
    if step.call is not None:
        data |= {"call": step.call, "number": step.number, "color": call_color(step.number)}
        data["note"] = OUTCOME_NOTES[step.call.outcome]
    if step.crop is not None:
        width, height = step.crop.size
        data |= {"crop": data_uri(step.crop), "crop_size": f"{width} × {height}"}
        data["crop_width"] = round(min(max(width, 140), 420, 320 * width / height))
    return data


def call_color(number: int) -> str:
    return CALL_COLORS[(number - 1) % len(CALL_COLORS)]


def overlay(box: Box, width: int, height: int, number: int = 0) -> dict[str, float | str]:
    """A box and the tag with its number, in the pixels of the image that they are drawn over."""
    tag_height = max(width, height) / 22
    tag_width = tag_height * (0.45 + 0.6 * len(str(number)))
    left, top = min(box.x1, box.x2), min(box.y1, box.y2)  # an inverted box is drawn as well
    above = top - tag_height
    return {
        "x": left,
        "y": top,
        "width": abs(box.width),
        "height": abs(box.height),
        "number": number,
        "color": call_color(number),
        "tag_x": min(max(0.0, left), width - tag_width),
        "tag_y": above if above >= 0 else top,
        "tag_width": tag_width,
        "tag_height": tag_height,
    }


def data_uri(image: Image, largest_side: int = MAX_EMBEDDED_SIDE, png_area: int = MAX_PNG_AREA) -> str:
    """The image, shrunk to `largest_side` pixels, as it stands in a self-contained page; JPEG over `png_area`."""
    image = image.convert("RGB")
    image.thumbnail((largest_side, largest_side))
    kind = "PNG" if image.width * image.height <= png_area else "JPEG"
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
.crop-trace .flow { display:flow-root; } .crop-trace .flow br { clear:both; }
.crop-trace figure { float:left; clear:both; width:min-content; min-width:13rem; max-width:60%;
  margin:.4rem 1rem .6rem 0; }
@media (max-width: 36rem) { .crop-trace figure { float:none; max-width:100%; } }
.crop-trace figure img { max-width:100%; height:auto; border-radius:6px; display:block; border:3px solid; }
.crop-trace .right { color:var(--good); font-weight:600; } .crop-trace .wrong { color:var(--bad); font-weight:600; }
"""

PAGE_STYLE = """
:root { color-scheme: light dark; } body { margin:0; background:#fff; }
@media (prefers-color-scheme: dark) { body { background:#0d1117; } }
.crop-trace + .crop-trace { border-top:1px solid var(--line); margin-top:1.5rem; padding-top:1.5rem; }
"""

PICTURE = """
{%- macro rect(box, class, color='') -%}
<rect class="{{ class }}" x="{{ box.x }}" y="{{ box.y }}" width="{{ box.width }}" height="{{ box.height }}"
{#- #}{% if color %} style="stroke:{{ color }}"{% endif %}/>
{%- endmacro -%}
{%- macro numbered(boxes) -%}
{%- for box in boxes %}{{ rect(box, 'halo') }}{{ rect(box, 'box', box.color) }}
{#- -#}<rect x="{{ box.tag_x }}" y="{{ box.tag_y }}" width="{{ box.tag_width }}" height="{{ box.tag_height }}"
{#- #} style="fill:{{ box.color }}"/><text x="{{ box.tag_x + box.tag_width / 2 }}"
{#- #} y="{{ box.tag_y + box.tag_height / 2 }}" font-size="{{ box.tag_height * 0.8 }}">{{ box.number }}</text>
{%- endfor -%}
{%- endmacro -%}
{%- macro picture(it) -%}
<div class="picture" style="width:{{ it.display_width }}px">
<img src="{{ it.data }}" alt="the image" width="{{ it.width }}" height="{{ it.height }}">
<svg viewBox="0 0 {{ it.width }} {{ it.height }}" role="img" aria-label="regions of the calls">
{%- for box in it.boxes %}{{ rect(box, 'halo') }}{{ rect(box, 'reference') }}{% endfor -%}
{{ numbered(it.calls) }}</svg></div>
{%- endmacro -%}
"""

FLOW = """
{%- macro stretch(step) -%}
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
<br><figure><img src="{{ step.crop }}" alt="crop {{ step.number }}" style="width:{{ step.crop_width }}px;
{#- #} border-color:{{ step.color }}">
<figcaption class="small">Crop {{ step.number }}, as the model saw it: {{ step.crop_size }}
{%- if step.call.box %}, cut from {{ step.call.box.as_list() | map('round') | map('int') | list }} of the original
{%- endif %}</figcaption></figure>
{%- endif -%}
{%- endmacro -%}
{%- macro flow(steps) -%}
<div class="flow">{% for step in steps %}{{ stretch(step) }}{% endfor %}</div>
{%- endmacro -%}
"""

TEMPLATE = """
{%- from "picture.html" import picture -%}
{%- from "flow.html" import flow -%}
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
{{ picture(section.picture) }}
<p class="small">{{ trace.image.width }} × {{ trace.image.height }} pixels
{%- if section.picture.boxes %}; dashed: annotated regions{% endif %}</p>
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
def html_environment() -> Environment:
    """Where all pages are made: every text is escaped; `style` and `page_style` are those of the traces."""
    from jinja2 import DictLoader, Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=DictLoader({"picture.html": PICTURE, "flow.html": FLOW, "trace.html": TEMPLATE}),
    )
    environment.globals |= {"style": Markup(STYLE), "page_style": Markup(PAGE_STYLE)}
    return environment


def _template() -> Template:
    return html_environment().get_template("trace.html")
