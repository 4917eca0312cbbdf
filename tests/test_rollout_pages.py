"""Kept rollouts are those that were trained on: same tokens, mask, crops, rewards and advantages; and text is text."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from PIL import Image, ImageChops
from test_trainers import grpo_trainer, length_part, script_calls, settings_for

import rollout_pages
from config import SettingsError
from conversation import IGNORED, Example
from crop_tool import Box, CropContract, ToolCall
from rewards import Reference, RewardPart
from rollout_pages import ScoredRollout, encoded_rollout, groups_of, keep_rollouts, read_rollouts, rollouts_html
from rollouts import Rollout
from training import train


@pytest.fixture(scope="module")
def kept(base_folder, data_folder, tmp_path_factory):
    """A real run with crops in its rollouts: the trainer, its last scored batch, and the folder."""
    folder = tmp_path_factory.mktemp("kept")
    flags = {"max_steps": 2, "keep_rollouts_every": 2, "beta": 0.1, "batch_size": 8}
    settings = settings_for("grpo", base_folder, data_folder, folder, **flags)
    parts = (replace(length_part(), weight=0.5), RewardPart("calls", lambda response, _: len(response.tool_calls)))
    _, trainer = grpo_trainer(settings, parts)
    script_calls(trainer)
    produce, outputs = trainer._generate_and_score_completions, []
    trainer._generate_and_score_completions = lambda inputs: outputs.append(produce(inputs)) or outputs[-1]
    train(trainer, settings, "grpo")
    return trainer, outputs[-1], folder / "rollouts"


def test_pages_come_at_the_first_step_and_at_each_multiple(kept):
    names = sorted(path.name for path in kept[2].iterdir())
    assert names == [f"step_00000{step}.{kind}" for step in (1, 2) for kind in ("html", "jsonl")]


def test_a_kept_rollout_is_the_one_that_was_trained_on(kept):
    trainer, output, folder = kept
    header, rows = read_rollouts(folder / "step_000002.jsonl")
    renderer = trainer.engine.renderer
    assert header["contract"] == renderer.contract
    assert len(rows) == len(trainer._batch_rollouts) == 8
    crops = 0
    for place, (row, rollout) in enumerate(zip(rows, trainer._batch_rollouts, strict=True)):
        encoded = encoded_rollout(row, header, renderer, "x")
        start, length = len(rollout.prompt_ids), len(rollout.completion_ids)
        assert encoded.input_ids == rollout.prompt_ids + rollout.completion_ids
        carries = [label != IGNORED for label in encoded.labels]
        assert not any(carries[:start])
        assert carries[start:] == output["tool_mask"][place, :length].bool().tolist()
        assert len(encoded.images) == len(rollout.images)
        for shown, again in zip(rollout.images, encoded.images, strict=True):
            assert shown.size == again.size and ImageChops.difference(shown, again).getbbox() is None
        crops += len(rollout.images) - 1
        assert row["advantage"] == pytest.approx(output["advantages"][place].item())
        assert row["parts"]["calls"] == len(rollout.tool_calls)
        assert row["reward"] == pytest.approx(0.5 * row["parts"]["variety"] + row["parts"]["calls"])
        assert row["tool_calls"] == list(rollout.tool_calls)
    assert crops >= 8
    for group in groups_of([ScoredRollout(example_of(row), None, None, {}, row["reward"], 0.0) for row in rows]):
        assert len(group) == 4
    logged = [item for item in trainer.state.log_history if item.get("step") == 2 and "reward" in item]
    assert sum(row["reward"] for row in rows) / 8 == pytest.approx(logged[0]["reward"], rel=1e-4)


def example_of(row: dict) -> Example:
    return Example(*(row[name] for name in ("line", "entry", "image_path", "question", "response")))


def test_the_page_shows_each_rollout_with_its_crops_rewards_and_one_picture_a_group(kept):
    trainer, _, folder = kept
    page = (folder / "step_000002.html").read_text()
    crops = sum(len(rollout.images) - 1 for rollout in trainer._batch_rollouts)
    assert page.count("<details") == 8
    assert page.count('alt="crop') == crops
    assert page.count("--picture:url(") == 2 and page.count('class="shot"') == 2 + 8
    assert page.count("<details open") == 4
    assert "variety" in page and re.search(r"reward \d\.\d{3}", page)
    assert "http:" not in page and "https:" not in page and "<script" not in page


def test_the_command_lists_shows_and_writes_a_page(kept, base_folder, tmp_path, capsys):
    file = str(kept[2] / "step_000002.jsonl")
    rollout_pages.main([file])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and lines[1].split()[0] == "1"
    rollout_pages.main([file, "--show", "1"])  # with the tokenizer of the model that the training began from
    shown = capsys.readouterr().out
    assert "step 2, rollout 1" in shown and "2 images" in shown
    assert re.search(r"trained +\d+ +'<tool_call>\[0, 3, 40, 20\]</tool_call>'", shown)
    target = tmp_path / "tokens.html"
    rollout_pages.main([file, "--show", "2", "--model_name", str(base_folder), "--html", str(target)])
    assert 'alt="crop 2"' in target.read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--show", "9"], "has the rollouts 1 to 8"),
        (["--show", "0"], "has the rollouts 1 to 8"),
        (["--html", "x.html"], "--html was given without --show"),
    ],
)
def test_what_cannot_be_shown_is_said(kept, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        rollout_pages.main([str(kept[2] / "step_000002.jsonl"), *flags])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_another_file_or_another_image_is_refused(kept, tmp_path, renderer):
    (tmp_path / "x.jsonl").write_text('{"image_path": "a.jpg"}\n')
    with pytest.raises(SettingsError, match="no file of kept rollouts"):
        read_rollouts(tmp_path / "x.jsonl")
    with pytest.raises(SettingsError, match="cannot be read"):
        read_rollouts(tmp_path / "none.jsonl")
    header, rows = read_rollouts(kept[2] / "step_000002.jsonl")
    with pytest.raises(SettingsError, match="not the one of the training: missing image"):
        encoded_rollout(rows[0], {**header, "image_base_path": str(tmp_path)}, renderer, "x")


# ------------------------------------------------------------------------------------------------ crafted


def crafted(folder, text: str = "<think>a</think><answer>red</answer>", **values) -> ScoredRollout:
    Image.new("RGB", (200, 100), "navy").save(folder / "a.png")
    bodies = ("[1, 2, 3]", "[0, 0, 56, 56]")
    starts = (len(text), len(text) + len(f"<tool_call>{bodies[0]}</tool_call>"))
    text += "".join(f"<tool_call>{body}</tool_call>" for body in bodies)
    calls = (ToolCall(bodies[0], starts[0], "malformed"), ToolCall(bodies[1], starts[1], "exact", Box(0, 0, 56, 56)))
    images = (Image.new("RGB", (56, 28)), Image.new("RGB", (56, 56)))
    rollout = Rollout([1, 2], [3, 4, 5], [1, 0, 1], [0.0] * 3, images, calls, text, "length")
    example = Example(values.pop("line", 1), 0, "a.png", values.pop("question", "Which?"), "x")
    reference = Reference("red", (Box(10, 10, 60, 60),), (200, 100))
    return ScoredRollout(example, reference, rollout, {"accuracy": 1.0}, values.pop("reward", 1.0), 0.0)


def test_text_of_data_and_model_is_text(tmp_path):
    evil = "<script>alert(1)</script>"
    page = rollouts_html(1, [[crafted(tmp_path, evil + "\ud800", question=evil)]], 1, str(tmp_path))
    page.encode("utf-8", "xmlcharrefreplace")
    assert "<script" not in page and page.count("&lt;script&gt;") >= 2


def test_a_group_whose_rewards_are_equal_says_that_it_teaches_nothing(tmp_path):
    same = [crafted(tmp_path), crafted(tmp_path)]
    other = [crafted(tmp_path), crafted(tmp_path, reward=0.5)]
    words = "this group teaches nothing"
    assert words in rollouts_html(1, [same], 1, str(tmp_path))
    page = rollouts_html(1, [other], 9, str(tmp_path))
    assert words not in page and "1 of 9 groups, 2 rollouts" in page and "cut off" in page


def test_older_pages_are_thinned_out_and_the_first_and_newest_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout_pages, "KEPT_PAGES", 4)
    group = [[crafted(tmp_path)]]
    for step in range(10, 80, 10):
        keep_rollouts(tmp_path / "kept", step, group, 1, str(tmp_path), "m", CropContract())
    files = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert [int(name[5:11]) for name in files if name.endswith("html")] == [10, 50, 70]
    assert len(files) == 6
    header = json.loads((tmp_path / "kept/step_000070.jsonl").read_text().splitlines()[0])
    assert header["step"] == 70 and header["model"] == "m"
