"""A contact sheet of a data file: boxes on thumbnails beside question and answer, faulty rows first, filters."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from crop_tool import Box, split_annotations
from traces import call_color, data_uri, html_environment, overlay

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_SHOWN = 400  # entries; about 15 kB each
MOST_FAULTY = 300  # of them, so that sound ones are seen as well
THUMBNAIL_SIDE = 360  # pixels


def choose_rows(faults: Sequence[str], most: int = MOST_SHOWN) -> list[int]:
    """Which entries of a file are shown: faulty ones first, then sound ones; what is too much is spread over the file.

    faults: the reason of each entry, "" where it is sound.
    """
    faulty = [index for index, fault in enumerate(faults) if fault]
    sound = [index for index, fault in enumerate(faults) if not fault]
    first = _spread(faulty, max(most - len(sound), most * MOST_FAULTY // MOST_SHOWN))
    return first + _spread(sound, most - len(first))


def _spread(items: list[int], count: int) -> list[int]:
    if len(items) <= count:
        return items
    return [items[number * len(items) // count] for number in range(count)]


def fault_kind(fault: str) -> str:
    """`tiny box [1, 2, 3, 4]: …` -> `tiny box`."""
    return " ".join(fault.split()[:2]).rstrip(":")


def sheet_html(
    title: str,
    rows: Sequence[dict[str, Any]],
    faults: Sequence[str],
    load: Callable[[str], Image],
    frame: str,
) -> str:
    """A self-contained page.

    rows: those of `choose_rows`, with the columns of `data_check.Checked`. faults: the reason of every entry of the
        file. load: image path -> image in original pixels, ValueError where it cannot be read. frame: of the boxes.
    """
    script = SCRIPT.strip()
    counts = Counter(fault_kind(fault) for fault in faults if fault)
    template = html_environment().from_string(TEMPLATE)
    return template.render(
        title=title,
        rows=[_row(row, load) for row in rows],
        entries=len(faults),
        faulty=sum(map(bool, faults)),
        kinds=counts.most_common(),
        frame=frame,
        script=_trusted(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _trusted(script: str) -> str:
    """Our own script, the only text of the page that is not escaped."""
    from markupsafe import Markup

    return Markup(script)


def _row(row: dict[str, Any], load: Callable[[str], Image]) -> dict[str, Any]:
    data = dict(row) | {"kind": fault_kind(row["fault"]), "picture": None, "boxes": []}
    try:
        parts = split_annotations(row["response"])
    except ValueError:
        parts = [row["response"]]
    numbers = iter(range(1, len(parts) + 1))
    data["parts"] = [
        {"text": part, "number": 0}
        if isinstance(part, str)
        else {"text": str(part.as_list()), "number": (number := next(numbers)), "color": call_color(number)}
        for part in parts
    ]
    try:
        image = load(row["image_path"])
    except ValueError:
        return data
    width, height = image.size
    boxes = [part for part in parts if isinstance(part, Box)]
    data |= {"picture": data_uri(image, THUMBNAIL_SIDE, png_area=0), "width": width, "height": height}
    data["boxes"] = [overlay(box, width, height, number) for number, box in enumerate(boxes, start=1)]
    return data


SCRIPT = """
const cards = [...document.querySelectorAll(".card")];
const [words, kind, calls, shown] = ["words", "kind", "calls", "shown"].map((id) => document.getElementById(id));
function filter() {
  const sought = words.value.toLowerCase(), least = Number(calls.value);
  let count = 0;
  for (const card of cards) {
    const fits = (kind.value === "" || (kind.value === "any" ? card.dataset.kind !== "" : card.dataset.kind ===
      (kind.value === "none" ? "" : kind.value.slice(1)))) && Number(card.dataset.calls) >= least &&
      card.textContent.toLowerCase().includes(sought);
    card.hidden = !fits;
    count += fits;
  }
  shown.textContent = count;
}
for (const control of [words, kind, calls]) control.addEventListener("input", filter);
filter();
"""

TEMPLATE = """{%- from "picture.html" import rect, numbered -%}
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{{ script_hash }}'">
<title>{{ title }}</title><style>{{ page_style }}{{ style }}
.crop-trace.sheet { max-width:100rem; }
.sheet .bar { position:sticky; top:0; z-index:1; background:var(--paper); padding:.6rem 0; display:flex; gap:.8rem;
  flex-wrap:wrap; align-items:center; }
.sheet .cards { display:grid; grid-template-columns:repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap:1rem;
  align-items:start; }
.sheet .card { background:var(--card); border:1px solid var(--line); border-radius:8px; padding:.8rem;
  content-visibility:auto; contain-intrinsic-size:auto 30rem; }
.sheet .card.bad { border-color:var(--bad); } .sheet .card[hidden] { display:none; }
.sheet .fault { color:var(--bad); font-weight:600; margin:0 0 .5rem; }
.sheet .picture { overflow:hidden; } .sheet .picture svg { overflow:hidden; }
.sheet .answer { font-size:.9rem; max-height:14rem; overflow:auto; } .sheet .question { font-size:1rem; }
.sheet .number { color:#fff; border-radius:4px; padding:0 .35em; }
</style></head><body><section class="crop-trace sheet">
<h2>{{ title }}</h2>
<p class="small">{{ rows | length }} of {{ entries }} entries are on this page, {{ faulty }} of the file are faulty.
{%- if rows | length < entries %} It is a sample, spread over the file: faulty ones first, then sound ones.{% endif %}
 Boxes: {{ frame }}.</p>
<div class="bar">
<input id="words" type="search" placeholder="words, line number, file" aria-label="words">
<select id="kind" aria-label="faults"><option value="">all entries</option><option value="none">sound</option>
<option value="any">faulty</option>
{%- for name, count in kinds %}<option value="={{ name }}">{{ name }} ({{ count }} in the file)</option>{% endfor -%}
</select>
<label class="small">calls, at least <input id="calls" type="number" min="0" value="0"></label>
<span class="small"><b id="shown">{{ rows | length }}</b> shown</span></div>
<div class="cards">
{%- for row in rows %}
<article class="card{{ ' bad' if row.fault }}" data-kind="{{ row.kind }}"
{#- #} data-calls="{{ row.boxes | length }}">
{%- if row.fault %}<p class="fault">{{ row.fault }}</p>{% endif %}
{%- if row.picture %}<div class="picture"><img src="{{ row.picture }}" alt="" loading="lazy" width="{{ row.width }}"
 height="{{ row.height }}"><svg viewBox="0 0 {{ row.width }} {{ row.height }}">{{ numbered(row.boxes) }}</svg></div>
{%- endif %}
<p class="small">line {{ row.line }}, QnA[{{ row.entry }}]{% if row.image_path %} · {{ row.image_path }}{% endif %}
{%- if row.picture %} · {{ row.width }} × {{ row.height }}{% endif %}</p>
{%- if row.question %}
<h3>Question</h3><p class="question">{{ row.question }}</p>
{%- endif %}
{%- if row.response %}
<h3>Answer</h3><p class="answer">
{%- for part in row.parts -%}
{%- if part.number -%}<b class="number" style="background:{{ part.color }}">{{ part.number }}</b> <code>{{ part.text }}
{#- #}</code>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}</p>
{%- endif %}</article>
{%- endfor %}
</div></section><script>{{ script }}</script></body></html>
"""
