"""R-GRPO on a long file: rows are checked when they are drawn, and a sound one stands in for a faulty one."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from test_data_utils import images, row, write  # noqa: F401 - images is a fixture
from test_resume import assert_same_run, run
from test_sft_data import LAZY, faulty, several  # noqa: F401 - faulty is a fixture
from test_trainers import grpo_trainer, length_part, settings_for

import row_index
from config import DataConfig
from data_check import Checker, check_file
from patience import OutageError
from row_index import MOST_IN_A_ROW, SoundRows, load_training_rows
from training import train
from watching import fixed_questions

GRPO = {"max_steps": 6, "gradient_accumulation_steps": 1, "steps_per_generation": 1, "save_steps": 1, "beta": 0}


def sound_rows(data, renderer, tmp_path):
    table = load_training_rows(data, renderer, str(tmp_path / "bad.jsonl"))
    return SoundRows(table, Checker(data, renderer.contract, renderer))


def test_a_sound_row_stands_in_for_a_faulty_one_the_same_in_every_process(faulty, renderer, tmp_path):  # noqa: F811
    checked = {(item["line"], item["entry"]): item for item in check_file(faulty, renderer.contract, renderer)}
    rows, others = (sound_rows(faulty, renderer, tmp_path) for _ in range(2))
    for drawn in rows.table:
        key = drawn["line"], drawn["entry"]
        found, faults = rows([drawn, drawn])
        assert found == [found[0]] * 2 and found[0] is not found[1]
        assert not checked[found[0]["line"], found[0]["entry"]]["fault"]
        passed = [(fault["line"], fault["entry"], fault["fault"]) for fault in faults]
        assert all(checked[line, entry]["fault"] == fault for line, entry, fault in passed)
        is_sound = not checked.get(key, {"fault": "the line itself"})["fault"]
        assert is_sound == (not passed) == ((found[0]["line"], found[0]["entry"]) == key)
        assert is_sound or passed[0][0] == drawn["line"]
        assert others([drawn])[0] == found[:1]


def test_rows_that_were_checked_before_are_taken_as_they_are(images, renderer, tmp_path):  # noqa: F811
    data = DataConfig(train_data=write(tmp_path / "train.jsonl", [row()] * 3), image_base_path=str(images))
    rows = sound_rows(data, renderer, tmp_path)
    drawn = rows.table[1]
    assert rows.is_checked and rows([drawn]) == ([drawn], [])


def test_a_long_block_of_faulty_rows_does_not_stop_the_run_a_faulty_file_does(images, renderer, tmp_path):  # noqa: F811
    lines = [row()] * 300 + [row(image="none.jpg")] * 2 * MOST_IN_A_ROW
    path = write(tmp_path / "train.jsonl", lines)
    rows = sound_rows(DataConfig(train_data=path, image_base_path=str(images), **LAZY), renderer, tmp_path)
    found, faults = rows([rows.table[place] for place in range(300, 400)])
    assert all(item["line"] <= 300 for item in found) and len({item["line"] for item in found}) > 50
    assert 100 <= len(faults) < 300, "of two in five, some more than those that were drawn"
    rows.table = rows.table.select(range(300, 500))
    with pytest.raises(OutageError, match=r"100 rows drawn from .* were all faulty, the last: line .* --check"):
        rows([rows.table[0]])


@pytest.fixture
def long_file(data_folder, tmp_path):
    """Training rows of which every third is faulty: (faulty file, the same with sound rows alone)."""
    rows = [json.loads(line) for line in (data_folder / "train.jsonl").read_text().splitlines()]
    rows = [{**item, "QnA": item["QnA"][:1]} for item in rows]
    mixed = [{"image_path": "none.jpg", "QnA": item["QnA"]} if n % 3 == 1 else item for n, item in enumerate(rows)]
    for name, items in (("mixed", mixed), ("sound", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return tmp_path / "mixed.jsonl", tmp_path / "sound.jsonl"


def test_rgrpo_on_rows_checked_when_drawn_is_rgrpo_on_rows_checked_before(
    base_folder, data_folder, long_file, tmp_path
):
    trainers = []
    for kind in ("lazy", "full"):
        flags = {**GRPO, "max_steps": 3, "train_data": str(long_file[1]), "data_check": kind}
        trainers.append(run("grpo", base_folder, data_folder, tmp_path / kind, flags))
    assert_same_run(*trainers)
    assert trainers[0].fault_logs["train"].drawn > 0 == trainers[0].fault_logs["train"].skipped


def test_rgrpo_trains_past_faulty_rows_names_them_and_resumes_exactly(
    base_folder, data_folder, long_file, tmp_path, capsys
):
    flags = {**GRPO, "train_data": str(long_file[0]), **LAZY}
    whole = run("grpo", base_folder, data_folder, tmp_path / "whole", flags)
    said = capsys.readouterr().out
    log, lines = whole.fault_logs["train"], long_file[0].read_bytes().splitlines()
    assert log.skipped and {fault for _, _, fault in log.known} == {"missing image none.jpg"}
    logged = [item["faulty_rows"] for item in whole.state.log_history if "faulty_rows" in item]
    assert logged == sorted(logged) and logged[-1] == log.skipped
    for line, entry, fault in log.known:
        assert said.count(f"skipped line {line}, QnA[{entry}]: {fault}\n") == 1
    bad = (tmp_path / "whole/bad_rows.jsonl").read_bytes().splitlines()
    assert sorted(bad) == sorted(lines[line - 1] for line, _, _ in log.known)
    run("grpo", base_folder, data_folder, tmp_path / "cut", flags, kill_at=3)
    resumed = run("grpo", base_folder, data_folder, tmp_path / "cut", flags)
    assert_same_run(whole, resumed)
    assert vars(resumed.fault_logs["train"])["known"] == log.known


def test_fixed_questions_of_a_long_file_are_sound(base_folder, data_folder, long_file, tmp_path):
    flags = {**GRPO, "train_data": str(long_file[0]), "watch_samples": 12, **LAZY}
    settings = settings_for("grpo", base_folder, data_folder, tmp_path / "out", **flags)
    torch.manual_seed(0)
    _, trainer = grpo_trainer(settings, (length_part(),))
    questions = fixed_questions(settings.grpo, settings.data, trainer.rows)
    lines = [int(question.name.split()[1].rstrip(",")) for question in questions]
    assert lines and all(line % 3 != 2 for line in lines) and len(set(lines)) == len(lines)


@pytest.mark.parametrize("extra", ['"NaN": NaN, ', '"huge": 1e999, ', '"half": "\\ud800", ', ""])
@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""])
def test_the_index_finds_the_entries_of_all_json_that_the_check_reads(images, renderer, tmp_path, extra, mark):  # noqa: F811
    line = several(3).replace("{", "{" + extra, 1).encode()
    path = tmp_path / "train.jsonl"
    path.write_bytes(mark + line + b"\n")
    data = DataConfig(train_data=str(path), image_base_path=str(images))
    checked = check_file(data, renderer.contract, renderer)
    assert len(checked) == 3 and not any(checked["fault"])
    index = load_training_rows(replace(data, **LAZY), renderer, str(tmp_path / "bad.jsonl"))
    assert [(row["line"], row["entry"]) for row in index] == [(1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize("kind", ["lazy", "full"])
def test_images_are_read_once_and_in_threads_ahead_of_the_step(
    base_folder, data_folder, long_file, tmp_path, monkeypatch, kind
):
    """Two steps a batch of rollouts: the second announces what the first did."""
    flags = {**GRPO, "steps_per_generation": 2, "train_data": str(long_file[1]), "data_check": kind}
    settings = settings_for("grpo", base_folder, data_folder, tmp_path / "out", **flags)
    _, trainer = grpo_trainer(settings, (length_part(),))
    ahead, load = trainer.rows.images, row_index.load_image
    read, announced, asked = [], {}, {}

    def load_image(path, base):
        read.append((path, threading.current_thread().name))
        return load(path, base)

    class Images:
        def announce(self, paths):
            paths = list(paths)
            announced.update({path: trainer.state.global_step for path in paths if path not in announced})
            ahead.announce(paths)

        def __call__(self, path):
            asked[path] = trainer.state.global_step
            return ahead(path)

    monkeypatch.setattr(row_index, "load_image", load_image)
    trainer.rows.images = Images()
    train(trainer, settings, "grpo")
    assert sorted(path for path, _ in read) == sorted(set(announced)) and set(asked) <= set(announced)
    assert all(thread.startswith("images ahead") for _, thread in read)
    assert max(asked.values()) == 4 and all(announced[path] == max(step - 1, 0) for path, step in asked.items())
