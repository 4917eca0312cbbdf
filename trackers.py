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
COLUMNS = ("group", "rollout", "question", "response", "expected", "answer", "reward", "advantage")
Row = tuple[str, "Image", dict[str, str | float]]  # name, picture, and a value for each of `COLUMNS`


def check_trackers(report_to: str | Sequence[str] | None) -> None:
    """Raises SettingsError where `report_to` names a tracker that is unknown or not installed."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    named = [report_to] if isinstance(report_to, str) else report_to or []
    unknown = [name for name in named if name not in {*INTEGRATION_TO_CALLBACK, "all", "none"}]
    if unknown:
        raise SettingsError(
            f"report_to is {', '.join(named)}, but {', '.join(unknown)} is no tracker: give {', '.join(TRACKERS)}, or "
            "another one that transformers knows"
        )
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
            _log_to(importlib.import_module(name), step, rows)


def _rows(groups: Sequence[Sequence[ScoredRollout]], image_base: str) -> Iterable[Row]:
    for number, group in enumerate(groups, start=1):
        image = load_image(group[0].example.image_path, image_base)
        ranked = sorted(group, key=lambda item: item.reward)
        for which, item in {"best": ranked[-1], "worst": ranked[0]}.items():
            values = dict(zip(COLUMNS, (number, which, *_texts(item), item.reward, item.advantage), strict=True))
            yield f"rollouts/group {number} {which}", draw_answer(item.trace(image)), values


def _texts(item: ScoredRollout) -> Iterable[str]:
    texts = (item.example.question, item.response.text, item.reference.answer, item.response.answer_content)
    return (text.encode("utf-8", "replace").decode() for text in texts)


def _to_tensorboard(callbacks: Iterable[TrainerCallback], step: int, rows: Sequence[Row]) -> None:
    import numpy as np
    from transformers.integrations import TensorBoardCallback

    writer = next(callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback))
    for name, picture, values in rows:
        writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        text = "\n\n".join(f"**{column}**\n\n{_as_code(values[column])}" for column in COLUMNS[2:])
        writer.add_text(name, text, step)
    writer.flush()


def _as_code(value: str | float) -> str:
    """Text of a model as Markdown that shows it as it is."""
    lines = (f"{value:.3f}" if isinstance(value, float) else value).splitlines()
    return "\n".join(f"    {line}" for line in lines)


def _log_to(tracker: Any, step: int, rows: Sequence[Row]) -> None:
    """wandb and trackio have the same interface for this."""
    pictures = {name: tracker.Image(picture, caption=values["response"]) for name, picture, values in rows}
    table = tracker.Table(columns=list(COLUMNS), data=[list(values.values()) for *_, values in rows])
    tracker.log({**pictures, "rollouts": table, "train/global_step": step})
