"""The card of a merged model: settings, data, curves and last figures of the training folder it came from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

SETTINGS_FILE, LOG_FILE, CURVES_FILE = "training_settings.json", "training_log.json", "training_curves.png"
# Of the logs, by the order in which they are shown.
FIGURES = {
    "loss": "training loss",
    "eval_loss": "validation loss",
    "mean_token_accuracy": "share of trained tokens that are the likeliest",
    "reward": "reward",
    "kl": "KL divergence to the SFT model",
    "crops/per_rollout": "crops a rollout",
    "crops/no_call": "share of rollouts without a call",
    "crops/iou": "overlap of the calls with the annotated boxes",
    "completions/mean_length": "tokens a rollout",
}
TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

`{{ base }}` trained to *think with crops*: while it reasons it writes `<tool_call>[x1, y1, x2, y2]</tool_call>`, that
region is cut out of the original image, and its image tokens are put right after the call, in the same assistant turn.

The weights are the base model's with a LoRA adapter of rank {{ rank }} merged into them, in {{ dtype }}. On a test
input their logits differ from the adapter's by {{ "%.2g" | format(100 * difference) }}% (the adapter changes those of
the base model by {{ "%.2g" | format(100 * effect) }}%).

## Use

```
python inference.py --model_path {{ name }} --image_path image.jpg --question "What does it say?"
```

`crop_contract.json` says in which pixels boxes are written (`{{ contract.coordinate_space }}`), and how large images
and crops are shown (shorter sides {{ contract.image_shorter_side }} and {{ contract.crop_shorter_side }} pixels).
Another program must cut and show crops in the same way.
{% if data %}
## Data

{% for key, value in data.items() -%}
- {{ key }}: {{ value }}
{% endfor %}{% endif %}{% if figures %}
## Training

| figure | first | last | best |
|---|---|---|---|
{% for row in figures -%}
| {{ row.name }} | {{ row.first }} | {{ row.last }} | {{ row.best }} |
{% endfor %}
{{ steps }} optimizer steps of {{ stage }}. These are figures of the training itself, not of a benchmark.
{% endif %}{% if has_curves %}
![training curves](training_curves.png)
{% endif %}{% if settings %}
## Settings

| setting | value |
|---|---|
{% for key, value in settings.items() -%}
| `{{ key }}` | {{ value }} |
{% endfor %}{% endif %}"""


def write_card(folder: str | Path, adapter: str | Path, facts: dict[str, Any]) -> None:
    """Write `README.md` into `folder`, and the curves beside it where the training folder of `adapter` has them.

    facts: `name`, `base`, `rank`, `dtype`, `difference` and `effect` of the merge, `contract`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    settings = _read(Path(adapter, SETTINGS_FILE))
    # A final model lies in its stage's output folder.
    stage_folder = Path(adapter).resolve().parent
    history = _read(stage_folder / LOG_FILE).get("history", [])
    curves = stage_folder / CURVES_FILE
    if curves.is_file():
        shutil.copyfile(curves, Path(folder, CURVES_FILE))
    stage = "grpo" if settings.get("grpo") and Path(settings["grpo"]["output_dir"]).name == stage_folder.name else "sft"
    local = Path(facts["base"]).is_dir()
    facts = facts | {"base": Path(facts["base"]).name if local else facts["base"]}
    data = ModelCardData(
        base_model=None if local else facts["base"],
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["qwen2_5_vl", "thinking-with-images", "crops", stage],
    )
    ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        **facts,
        stage={"sft": "SFT", "grpo": "R-GRPO"}[stage],
        data=_data_summary(settings, stage_folder),
        figures=_figures(history),
        steps=max((entry.get("step", 0) for entry in history), default=0),
        has_curves=curves.is_file(),
        settings=_chosen(settings, stage),
    ).save(Path(folder, "README.md"))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _data_summary(settings: dict[str, Any], stage_folder: Path) -> dict[str, Any]:
    """Names without their folders: a path of the machine that trained is nobody's business."""
    data = settings.get("data")
    if not data:
        return {}
    found = {"training data": f"`{Path(data['train_data']).name}`"}
    if Path(data["train_data"]).is_file():
        with open(data["train_data"], "rb") as lines:
            found["rows"] = f"{sum(1 for line in lines if line.strip()):,}"
    bad_rows = Path(data["bad_rows_file"] or stage_folder / "bad_rows.jsonl")
    if bad_rows.is_file():
        with bad_rows.open("rb") as lines:
            found["faulty entries skipped"] = f"{sum(1 for line in lines if line.strip()):,}"
    if data["val_data"]:
        found["validation data"] = f"`{Path(data['val_data']).name}`"
    return found | {"tokens an example at most": data["max_length"]}


def _figures(history: list[dict[str, Any]]) -> list[dict[str, str]]:
    rows = []
    for key, name in FIGURES.items():
        values = [entry[key] for entry in history if key in entry]
        if values:
            best = min(values) if "loss" in key else max(values) if key in ("reward", "crops/iou") else None
            shown = {"first": values[0], "last": values[-1], "best": best}
            rows.append({"name": name} | {k: "" if v is None else f"{v:.4g}" for k, v in shown.items()})
    return rows


def _chosen(settings: dict[str, Any], stage: str) -> dict[str, Any]:
    """The stage's settings that have a value, the judge's where there is one; folders and addresses are left out."""
    values = {**(settings.get("model") or {}), **(settings.get(stage) or {})}
    values |= values.pop("trl", {})
    # Paths and addresses are of the machine that trained.
    hidden = {"output_dir", "sft_checkpoint", "resume", "model_name", "judge_cache", "judge_url", "vllm_server"}
    hidden |= {"vllm_sync_dir", "deepspeed", "logging_dir"}
    if not values.get("judge_url"):
        hidden |= {key for key in values if key.startswith("judge_")}
    return {key: value for key, value in values.items() if value is not None and key not in hidden}
