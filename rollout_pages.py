"""Rollouts kept in training: a page of groups to look at, and JSONL whose rollouts open token by token.

    python rollout_pages.py outputs/grpo/rollouts/step_000050.jsonl
    python rollout_pages.py outputs/grpo/rollouts/step_000050.jsonl --show 3

The first command lists the rollouts of a file, the second shows one of them as the model got it, each token coloured by
whether it carried loss.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import SettingsError
from conversation import IGNORED, EncodedExample, Example, Renderer, check_image_tokens, load_image
from crop_tool import CropContract, ToolCall, cut_crop, show_image
from response_format import ParsedResponse, parse_response
from rewards import CORRECT_AT, Reference, accuracy_reward
from token_view import as_html, as_text
from traces import Trace, data_uri, html_environment, overlay, response_data, write_whole

if TYPE_CHECKING:
    from rollouts import Rollout

KEPT_GROUPS = 4  # groups on a page
KEPT_PAGES = 64  # more of them, and every second one of the older goes


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout of training and what it earned. parts: each part of the reward, before its weight."""

    example: Example
    reference: Reference
    rollout: Rollout
    parts: dict[str, float]
    reward: float
    advantage: float

    @cached_property
    def response(self) -> ParsedResponse:
        return parse_response(self.rollout.text, self.rollout.tool_calls)

    @property
    def is_correct(self) -> bool:
        return accuracy_reward(self.response, self.reference) >= CORRECT_AT

    def trace(self, image: Any) -> Trace:
        """image: the original."""
        shown = iter(self.rollout.images[1:])
        crops = tuple(next(shown) if call.is_executed else None for call in self.rollout.tool_calls)
        return Trace(
            self.example.question,
            self.response,
            image,
            crops,
            expected=self.reference.answer,
            reference_boxes=self.reference.boxes,
            is_correct=self.is_correct,
        )

    def to_json(self) -> dict[str, Any]:
        rollout = self.rollout
        return {
            **asdict(self.example),
            "expected": self.reference.answer,
            "text": rollout.text.encode("utf-8", "replace").decode(),
            "tool_calls": [call.to_json() for call in rollout.tool_calls],
            "finish_reason": rollout.finish_reason,
            "reward": self.reward,
            "advantage": self.advantage,
            "parts": self.parts,
            "prompt_ids": rollout.prompt_ids,
            "completion_ids": rollout.completion_ids,
            "sampled_mask": rollout.sampled_mask,
        }


def groups_of(rollouts: Sequence[ScoredRollout]) -> list[list[ScoredRollout]]:
    """Rollouts of one question together, in the order in which the questions come."""
    groups: dict[tuple[int, int], list[ScoredRollout]] = {}
    for item in rollouts:
        groups.setdefault((item.example.line, item.example.entry), []).append(item)
    return list(groups.values())


# ------------------------------------------------------------------------------------------------- keep


def keep_rollouts(
    folder: Path,
    step: int,
    groups: Sequence[Sequence[ScoredRollout]],
    total: int,
    image_base: str,
    model: str,
    contract: CropContract,
) -> None:
    """Write `step_N.html` and `step_N.jsonl` of these groups, of `total` there were; thin out the older pages.

    model: what `--show` takes the tokenizer from.
    """
    name = f"step_{step:06d}"
    header = {"step": step, "model": model, "image_base_path": image_base, "contract": asdict(contract)}
    rows = [header, *(item.to_json() for group in groups for item in group)]
    write_whole(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    page = rollouts_html(step, groups, total, image_base)
    write_whole(folder / f"{name}.html", page.encode("utf-8", "xmlcharrefreplace"))
    pages = sorted(folder.glob("step_*.html"))
    if len(pages) > KEPT_PAGES:
        for old in pages[1:-1:2]:
            old.unlink()
            old.with_suffix(".jsonl").unlink(missing_ok=True)


def rollouts_html(step: int, groups: Sequence[Sequence[ScoredRollout]], total: int, image_base: str) -> str:
    """A self-contained page; the picture of a group is in it once."""
    sections, number = [], 0
    for group in groups:
        image = load_image(group[0].example.image_path, image_base)
        width, height = image.size
        rewards = [item.reward for item in group]
        order = sorted(range(len(group)), key=lambda place: group[place].reward)
        section = {
            "name": group[0].example.name,
            "question": group[0].example.question,
            "expected": group[0].reference.answer,
            "picture": data_uri(image, 800),
            "width": width,
            "height": height,
            "boxes": [overlay(box, width, height) for box in group[0].reference.boxes],
            "regions": [
                overlay(call.box, width, height) for item in group for call in item.response.tool_calls if call.box
            ],
            "low": min(rewards),
            "high": max(rewards),
            "mean": sum(rewards) / len(rewards),
            "right": sum(item.is_correct for item in group),
            "rollouts": [],
        }
        for place, item in enumerate(group):
            number += 1
            data = response_data(item.trace(image)) | {"item": item, "number": number}
            section["rollouts"].append(data | {"open": place in (order[0], order[-1])})
        sections.append(section)
    return html_environment().from_string(TEMPLATE).render(step=step, sections=sections, total=total, count=number)


TEMPLATE = """
{%- from "picture.html" import rect, numbered -%}
{%- from "flow.html" import flow -%}
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Rollouts of step {{ step }}</title><style>{{ page_style }}{{ style }}
.crop-trace { max-width:62rem; }
.crop-trace h1 { font-size:1.4rem; margin:0; }
.crop-trace .head { display:flex; gap:1.2rem; flex-wrap:wrap; align-items:flex-start; margin-bottom:.8rem; }
.crop-trace .head > div:last-child { flex:1 1 20rem; }
.crop-trace .shot { position:relative; background:var(--picture) 0 0 / 100% 100% no-repeat; border-radius:6px;
  flex:none; max-width:100%; }
.crop-trace .shot svg { position:absolute; inset:0; width:100%; height:100%; overflow:visible; }
.crop-trace .shot rect { fill:none; vector-effect:non-scaling-stroke; }
.crop-trace .region { stroke:#ffd33d; stroke-width:1.3; stroke-opacity:.85; }
.crop-trace .shot text { fill:#fff; font-weight:700; font-family:system-ui, sans-serif; text-anchor:middle;
  dominant-baseline:central; }
.crop-trace details { border:1px solid var(--line); border-radius:8px; margin:.4rem 0; background:var(--card); }
.crop-trace summary { display:flex; gap:.8rem; align-items:baseline; padding:.4rem .8rem; cursor:pointer;
  font-variant-numeric:tabular-nums; }
.crop-trace summary .small { margin:0; white-space:nowrap; }
.crop-trace summary .said { flex:1; overflow:hidden; text-overflow:ellipsis; white-space:nowrap; }
.crop-trace summary .n { color:var(--soft); font-size:.85rem; min-width:1.6rem; text-align:right; }
.crop-trace .advantage { border-radius:5px; padding:0 .45rem; font-weight:600; font-size:.9rem; min-width:3.6rem;
  text-align:right; color:#fff; background:#59636e; }
.crop-trace .advantage.up { background:#1a7f37; } .crop-trace .advantage.down { background:#b42318; }
.crop-trace .body { display:flex; gap:1rem; flex-wrap:wrap; padding:.2rem .8rem .8rem; align-items:flex-start; }
.crop-trace .body > div:last-child { flex:1 1 22rem; min-width:0; }
.crop-trace .body .flow { background:var(--paper); }
.crop-trace .parts { display:flex; gap:.4rem; flex-wrap:wrap; margin:0 0 .6rem; font-size:.85rem; }
.crop-trace .parts span { border:1px solid var(--line); border-radius:5px; padding:0 .45rem; }
</style></head><body><section class="crop-trace">
<h1>Rollouts of step {{ step }}</h1>
<p class="small">{{ sections | length }} of {{ total }} groups, {{ count }} rollouts, of the first process. In each
group the best and the worst are open. Dashed: annotated regions; numbered: the calls; yellow: all calls of the group.
A rollout N of the file beside this page opens token by token:
<code>python rollout_pages.py FOLDER/step_{{ '%06d' % step }}.jsonl --show N</code></p>
</section>
{% for section in sections -%}
<section class="crop-trace" style="--picture:url('{{ section.picture }}')">
<h2>{{ section.name }}</h2>
<div class="head">
{%- macro shot(calls, regions, widest) -%}
<div class="shot" style="width:{{ [widest, widest * section.width / section.height] | min | round | int }}px;
{#- #} aspect-ratio:{{ section.width }}/{{ section.height }}">
{#- -#}<svg viewBox="0 0 {{ section.width }} {{ section.height }}" role="img" aria-label="the image and its regions">
{%- for box in regions %}{{ rect(box, 'region') }}{% endfor -%}
{%- for box in section.boxes %}{{ rect(box, 'halo') }}{{ rect(box, 'reference') }}{% endfor -%}
{{ numbered(calls) }}</svg></div>
{%- endmacro -%}
{{ shot([], section.regions, 300) }}
<div><h3 style="margin-top:0">Question</h3><p class="question">{{ section.question }}</p>
<h3>Expected</h3><p class="answer">{{ section.expected }}</p>
<p class="small">{{ section.right }} of {{ section.rollouts | length }} right; rewards
{{ '%.2f' % section.low }} to {{ '%.2f' % section.high }}, mean {{ '%.2f' % section.mean }}
{%- if section.low == section.high %}. <b class="wrong">All rewards are equal: this group teaches nothing.</b>
{%- endif %}</p></div></div>
{% for one in section.rollouts %}{% set item = one.item -%}
<details{{ ' open' if one.open }}><summary><span class="n">{{ one.number }}</span>
<span class="advantage {{ 'up' if item.advantage > 0.005 else 'down' if item.advantage < -0.005 }}">
{{- '%+.2f' % item.advantage }}</span>
<span class="said">{{ one.answer or 'no answer' }}
{%- if item.is_correct %} <span class="right">✓</span>{% else %} <span class="wrong">✗</span>{% endif %}</span>
<span class="small">{{ item.response.tool_calls | length }}
{{- ' call' if item.response.tool_calls | length == 1 else ' calls' }} · {{ item.rollout.sampled_mask | sum }} tokens
{%- if item.rollout.finish_reason == 'length' %} · <b class="wrong">cut off</b>{% endif %}</span></summary>
<div class="body">{{ shot(one.calls, [], 220) }}<div>
<div class="parts"><span><b>reward {{ '%.3f' % item.reward }}</b></span>
{%- for name, value in item.parts.items() %}<span>{{ name }} {{ '%.2f' % value }}</span>{% endfor %}</div>
{{ flow(one.reasoning) }}
<p class="small">Answer: <b>{{ one.answer or 'none was written' }}</b></p>
{%- if one.after %}<h3>In and after the answer</h3>{{ flow(one.after) }}{% endif %}
</div></div></details>
{% endfor %}</section>
{% endfor %}</body></html>
"""


# ------------------------------------------------------------------------------------------------- show


def read_rollouts(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and rollouts of a kept file.

    Raises:
        SettingsError: for a file that is not one.
    """
    try:
        header, *rows = map(json.loads, Path(path).read_bytes().splitlines())
        header["contract"] = CropContract(**header["contract"])
        for row in rows:
            row["tool_calls"] = [ToolCall.from_json(call) for call in row["tool_calls"]]
        return header, rows
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, LookupError) as error:
        raise SettingsError(f"{path} is no file of kept rollouts ({type(error).__name__}: {error})") from None


def encoded_rollout(row: dict[str, Any], header: dict[str, Any], renderer: Renderer, name: str) -> EncodedExample:
    """A kept rollout as it was trained on: a label where the model sampled, its images cut again.

    Raises:
        SettingsError: where the image is gone, or is not the one of the training.
    """
    labels = [
        token if sampled else IGNORED for token, sampled in zip(row["completion_ids"], row["sampled_mask"], strict=True)
    ]
    ids = row["prompt_ids"] + row["completion_ids"]
    try:
        original = load_image(row["image_path"], header["image_base_path"])
        crops = [cut_crop(original, call.box, renderer.contract) for call in row["tool_calls"] if call.is_executed]
        images = (show_image(original, renderer.contract), *crops)
        check_image_tokens(ids, images, renderer, name)
    except ValueError as error:
        raise SettingsError(f"{name}: its image is not the one of the training: {error}") from None
    return EncodedExample(ids, [IGNORED] * len(row["prompt_ids"]) + labels, images, name)


def listing(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each rollout of a file."""
    lines = ["    N  line  reward  advantage  calls  answer"]
    for number, row in enumerate(rows, start=1):
        answer = " ".join(parse_response(row["text"], ()).answer_content.split())
        printable = "".join(character if character.isprintable() else "\ufffd" for character in answer)
        figures = f"{row['reward']:>6.3f}  {row['advantage']:>+9.3f}  {len(row['tool_calls']):>5}"
        lines.append(f"{number:>5}  {row['line']:>4}  {figures}  {printable:.60}")
    return "\n".join(lines)


def show(path: str, number: int, model: str | None, html: str | None) -> None:
    """Show rollout `number` of a file, in the terminal or as a page.

    Raises:
        SettingsError: where there is no such rollout, or its image or tokenizer cannot be had.
    """
    from model_utils import load_processor

    header, rows = read_rollouts(path)
    if not 1 <= number <= len(rows):
        raise SettingsError(f"--show is {number}, but {path} has the rollouts 1 to {len(rows)}")
    row, contract = rows[number - 1], header["contract"]
    processor, _ = load_processor(model or header["model"])
    renderer = Renderer(processor, contract)
    said = f"reward {row['reward']:.3f}, advantage {row['advantage']:+.3f}"
    name = f"step {header['step']}, rollout {number} (line {row['line']}, QnA[{row['entry']}]; {said})"
    encoded = encoded_rollout(row, header, renderer, name)
    if html is not None:
        write_whole(html, as_html(encoded, renderer).encode("utf-8", "xmlcharrefreplace"))
        print(html)
    else:
        print(as_text(encoded, renderer, colours=sys.stdout.isatty() and "NO_COLOR" not in os.environ))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("file", metavar="FILE", help="rollouts/step_N.jsonl of a training")
    parser.add_argument("--show", type=int, metavar="N", help="show rollout N token by token [list them]")
    parser.add_argument("--model_name", metavar="MODEL", help="model of the tokenizer [what the training began from]")
    parser.add_argument("--html", metavar="FILE", help="write what --show shows as a page, with the crops in place")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(argv)
    try:
        if options.show is not None:
            show(options.file, options.show, options.model_name, options.html)
        elif options.html is not None:
            raise SettingsError("--html was given without --show: the page of all rollouts lies beside the file")
        else:
            print(listing(read_rollouts(options.file)[1]))
    except SettingsError as error:
        parser.exit(2, f"rollout_pages.py: {error}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
