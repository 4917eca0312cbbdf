"""Kept rollouts for tensorboard, wandb and trackio, as pictures and text; the figures go there through transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from config import SettingsError
from conversation import load_image
from rollout_pages import ScoredRollout
from visualize import draw_answer

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import TrainerCallback

TRACKERS = ("tensorboard", "wandb", "trackio")
COLUMNS = ("group", "rollout", "picture", "question", "response", "expected", "answer", "reward", "advantage")


def check_trackers(report_to: str | Sequence[str] | None) -> None:
    """Raises SettingsError where `report_to` names a tracker that is not installed."""
    named = [report_to] if isinstance(report_to, str) else report_to or []
    missing = [name for name in named if name in TRACKERS and importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"report_to is {', '.join(named)}, but {', '.join(missing)} is not installed: pip install "
            f"{' '.join(missing)}, or leave it out"
        )


def send_rollouts(
    report_to: Sequence[str],
    callbacks: Iterable[TrainerCallback],
    step: int,
    groups: Sequence[Sequence[ScoredRollout]],
    image_base: str,
) -> None:
    """The best and the worst rollout of each group, where a tracker of `report_to` can show them."""
    wanted = [name for name in TRACKERS if name in report_to]
    if not wanted:
        return
    rows = list(_rows(groups, image_base))
    if "tensorboard" in wanted:
        _to_tensorboard(callbacks, step, rows)
    for name in wanted:
        if name != "tensorboard":
            _to_table(importlib.import_module(name), step, rows)


def _rows(groups: Sequence[Sequence[ScoredRollout]], image_base: str) -> Iterable[dict[str, Any]]:
    """Rows of `COLUMNS`."""
    for number, group in enumerate(groups, start=1):
        image = load_image(group[0].example.image_path, image_base)
        ranked = sorted(group, key=lambda item: item.reward)
        for which, item in {"best": ranked[-1], "worst": ranked[0]}.items():
            if which == "best" or item is not ranked[-1]:
                yield dict(
                    zip(COLUMNS, (number, which, draw_answer(item.trace(image)), *_texts(item)), strict=True),
                )


def _texts(item: ScoredRollout) -> tuple[str | float, ...]:
    texts = (item.example.question, item.response.text, item.reference.answer, item.response.answer_content)
    return *(text.encode("utf-8", "replace").decode() for text in texts), item.reward, item.advantage


def _to_tensorboard(callbacks: Iterable[TrainerCallback], step: int, rows: Sequence[dict[str, Any]]) -> None:
    import numpy as np
    from transformers.integrations import TensorBoardCallback

    writer = next(callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback))
    for row in rows:
        picture: Image = row["picture"]
        tag = f"rollouts/group {row['group']} {row['rollout']}"
        writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")
        text = "\n\n".join(f"**{name}**\n\n{_as_code(row[name])}" for name in COLUMNS[3:])
        writer.add_text(tag, text, step)
    writer.flush()


def _as_code(value: str | float) -> str:
    """Text of a model as Markdown that shows it as it is."""
    lines = (f"{value:.3f}" if isinstance(value, float) else value).splitlines()
    return "\n".join(f"    {line}" for line in lines)


def _to_table(tracker: Any, step: int, rows: Sequence[dict[str, Any]]) -> None:
    """wandb and trackio have the same interface for this."""
    data = [[tracker.Image(row[name]) if name == "picture" else row[name] for name in COLUMNS] for row in rows]
    table = tracker.Table(columns=list(COLUMNS), data=data)
    tracker.log({"rollouts": table, "train/global_step": step})
