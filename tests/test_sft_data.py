"""SFT's rows: a long file is indexed, and its faulty rows are skipped, counted and named when they are drawn."""

import builtins
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_data_utils import FAULTS, images, row, write  # noqa: F401 - images is a fixture

import row_index
import train_sft
from config import DataConfig, SettingsError
from conversation import IGNORED
from data_check import check_file
from patience import OutageError
from row_index import FaultLog, is_lazy, load_training_rows
from sft_data import FAULTS as FAULTS_KEY
from sft_data import ROWS, ExampleEncoder, SFTCollator, length_buckets

LAZY = {"data_check": "lazy"}
# This one is a fault in the default frame only.
KINDS = {name: line for name, (line, _) in FAULTS.items() if name != "box that is over-long as the model writes it"}


def several(count):
    """A line of `count` entries."""
    return json.dumps({"image_path": "photo.jpg", "QnA": [json.loads(row())["QnA"][0]] * count})


@pytest.fixture
def faulty(images, tmp_path):  # noqa: F811
    """A file with every kind of fault, one in twenty rows, and its settings."""
    lines = []
    for line in KINDS.values():
        lines += [line, *(row(question=f"Is {len(lines) + n} there?") for n in range(19))]
    entry = json.loads(row())["QnA"][0]
    lines.append(json.dumps({"image_path": "photo.jpg", "QnA": [entry, {"Q": "second?"}, entry]}))
    lines.append(several(3).replace("photo.jpg", "none.jpg"))
    path = write(tmp_path / "train.jsonl", ["", *lines, ""])
    return DataConfig(train_data=path, image_base_path=str(images), **LAZY)


def draw_all(data, renderer, tmp_path, size=4):
    """Draw every row in order; returns names of the rows in batches, and the log."""
    table = load_training_rows(data, renderer, str(tmp_path / "bad.jsonl"))
    collator = SFTCollator(ExampleEncoder(renderer, data))
    log, names = FaultLog(data.train_data, str(tmp_path / "bad.jsonl")), []
    encode = collator.encoder.encode
    collator.encoder.encode = lambda example, image: (names.append(example.name), encode(example, image))[1]
    for start in range(0, len(table), size):
        rows = [table[index] for index in range(start, min(start + size, len(table)))]
        batch = collator(rows)
        drawn, faults = batch.pop(FAULTS_KEY, (len(rows), []))
        assert drawn == len(rows) and len(batch["input_ids"]) == (len(rows) - len(faults) or 1)
        log.add(drawn, faults)
    return names, log


def test_drawing_finds_the_faults_of_the_check_and_trains_on_all_other_rows(faulty, renderer, tmp_path, capsys):
    checked = check_file(faulty, renderer.contract, renderer)
    expected = {(item["line"], item["entry"], item["fault"]) for item in checked if item["fault"]}
    assert len(expected) == len(KINDS) + 2
    names, log = draw_all(faulty, renderer, tmp_path)
    assert log.known == expected
    assert names == [f"line {item['line']}, QnA[{item['entry']}]" for item in checked if not item["fault"]]
    assert log.skipped == len(expected) + 2  # all three entries of the row without image were drawn
    assert log.drawn == log.skipped + len(names)
    out = capsys.readouterr().out
    for line, entry, fault in expected:
        assert f"skipped line {line}, QnA[{entry}]: {fault}\n" in out
    with open(faulty.train_data, "rb") as file:
        lines = file.readlines()
    bad = (tmp_path / "bad.jsonl").read_bytes().splitlines(keepends=True)
    assert sorted(bad) == sorted(lines[line - 1] for line, _, _ in expected)


def test_a_fault_drawn_again_is_counted_and_skipped_but_not_named_again(faulty, renderer, tmp_path, capsys):
    log = FaultLog(faulty.train_data, str(tmp_path / "bad.jsonl"))
    fault = {"line": 2, "entry": 0, "offset": 1, "fault": "bad JSON"}
    log.add(4, [fault])
    log.add(4, [fault])
    assert (log.drawn, log.skipped) == (8, 2)
    assert capsys.readouterr().out.count("skipped line 2") == 1
    assert len((tmp_path / "bad.jsonl").read_bytes().splitlines()) == 1


def test_a_batch_of_faulty_rows_alone_has_no_loss_and_keeps_an_image(faulty, renderer):
    table = load_training_rows(faulty, renderer, "bad.jsonl")
    batch = SFTCollator(ExampleEncoder(renderer, faulty))([table[0]])
    assert batch[FAULTS_KEY][0] == 1 and batch[FAULTS_KEY][1][0]["line"] == table[0]["line"]
    assert (batch["labels"] == IGNORED).all() and len(batch["image_grid_thw"]) == 1


def test_mostly_faulty_rows_stop_the_run_at_start_or_when_drawn(images, renderer, tmp_path):  # noqa: F811
    path = write(tmp_path / "train.jsonl", [row(image="none.jpg")] * 30 + [row()] * 20)
    data = DataConfig(train_data=path, image_base_path=str(images), **LAZY)
    with pytest.raises(
        SettingsError, match=r"20 of 32 rows of .* are faulty, the first: +line 1, QnA\[0\]: missing im"
    ):
        load_training_rows(data, renderer, "bad.jsonl")
    log = FaultLog(path, str(tmp_path / "bad.jsonl"))
    fault = {"line": 1, "entry": 0, "offset": 0, "fault": "missing image none.jpg"}
    log.add(99, [fault] * 60)
    with pytest.raises(
        OutageError, match=r"61 of the last 100 rows drawn from .* were faulty, .*data_utils\.py --check"
    ):
        log.add(1, [fault])
    log = FaultLog(path, str(tmp_path / "bad.jsonl"))
    for _ in range(100):
        log.add(10, [])
    for _ in range(5):
        log.add(10, [fault] * 10)
    with pytest.raises(OutageError, match="60 of the last 100 rows"):
        log.add(10, [fault] * 10)


def test_a_file_changed_while_it_is_trained_on_is_refused(images, renderer, tmp_path):  # noqa: F811
    path = write(tmp_path / "train.jsonl", [row()] * 3)
    log = FaultLog(path, str(tmp_path / "bad.jsonl"))
    log.add(1, [])
    with open(path, "ab") as file:
        file.write(b"\n")
    with pytest.raises(OutageError, match="was changed while it is trained on"):
        log.add(1, [])


def test_the_data_file_is_never_the_file_of_bad_rows(images, tmp_path):  # noqa: F811
    path = write(tmp_path / "train.jsonl", [row()])
    with pytest.raises(SettingsError, match="the data file itself"):
        FaultLog(path, path)


def test_auto_checks_short_files_at_start_and_long_ones_when_drawn(images, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(row_index, "FULL_CHECK_ROWS", 5)
    for rows, lazy in ((5, False), (6, True)):
        path = write(tmp_path / f"{rows}.jsonl", [row()] * rows)
        data = DataConfig(train_data=path)
        assert is_lazy(data) is lazy
        assert is_lazy(replace(data, data_check="lazy")) and not is_lazy(replace(data, data_check="full"))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_index_names_each_entry_by_line_and_place_however_the_file_is_cut(
    images, renderer, tmp_path, monkeypatch, processes  # noqa: F811
):  # fmt: skip
    lines = ["", row(), several(2), b"\xff", "  ", several(3), "[1]", '{"QnA": 5}', '{"QnA": ["Q", {}]}', row()] * 7
    path = write(tmp_path / "train.jsonl", lines)
    counts = [0, 1, 2, 1, 0, 3, 1, 1, 2, 1] * 7
    expected = [(number, entry) for number, count in enumerate(counts, 1) for entry in range(count)]
    data = DataConfig(train_data=path, image_base_path=str(images), num_proc=processes, **LAZY)
    monkeypatch.setattr("data_check.PART_BYTES", 100)
    monkeypatch.setattr(row_index, "MOST_FAULTY", 1)
    table = load_training_rows(data, renderer, "bad.jsonl")
    assert list(zip(table["line"], table["entry"], strict=True)) == expected
    with open(path, "rb") as file:
        content = file.read()
    for item in table:
        assert content[: item["offset"]].count(b"\n") == item["line"] - 1
        assert item["offset"] == 0 or content[item["offset"] - 1 : item["offset"]] == b"\n"


def test_start_up_reads_a_long_file_once_and_few_images_and_keeps_24_bytes_a_row(
    images, renderer, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    path = write(tmp_path / "train.jsonl", [row(question=f"Is {n} there?") for n in range(50_000)])
    opened, loaded = [], []
    load, real_open = row_index.Checker._image, builtins.open
    monkeypatch.setattr(row_index.Checker, "_image", lambda self, name: (loaded.append(name), load(self, name))[1])

    def counting(name, *args, **kwargs):
        file = real_open(name, *args, **kwargs)
        if name == path:
            opened.append(file)
        return file

    data = DataConfig(train_data=path, image_base_path=str(images), num_proc=1)
    assert is_lazy(data)
    monkeypatch.setattr(builtins, "open", counting)
    table = load_training_rows(data, renderer, "bad.jsonl")
    monkeypatch.undo()
    assert len(table) == 50_000
    assert len(loaded) == row_index.PROBED_ROWS
    parts = -(-os.path.getsize(path) // (16 * 1024**2))
    assert len(opened) <= 4 + 2 * parts + row_index.PROBED_ROWS
    assert table.data.nbytes == 50_000 * 24
    assert not table.cache_files, "nothing is copied to the disk"


def test_lengths_told_from_the_text_put_longer_rows_into_higher_buckets(images, renderer, tmp_path):  # noqa: F811
    answer = "<think>\n{}\n</think>\n\n<answer>yes</answer>"
    texts = ["word " * n + "{Crop it [10, 10, 90, 80]} " * (n % 3) for n in (10, 100, 200, 500)]
    path = write(tmp_path / "train.jsonl", [row(answer.format(text)) for text in texts])
    data = DataConfig(train_data=path, image_base_path=str(images))
    told = load_training_rows(replace(data, **LAZY), renderer, "bad.jsonl")
    exact = load_training_rows(data, renderer, str(tmp_path / "bad.jsonl"))
    assert sorted(range(4), key=exact["length"][:].__getitem__) == sorted(range(4), key=told["length"][:].__getitem__)
    assert isinstance(length_buckets(told), list) and len(set(length_buckets(told))) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_drawn_row_is_encoded_as_a_checked_one_in_this_process_or_a_worker(
    images, renderer, tmp_path, workers  # noqa: F811
):  # fmt: skip
    path = write(tmp_path / "train.jsonl", [row(question=f"Is {n} there?") for n in range(6)] + [several(2), "[1]"])
    data = DataConfig(train_data=path, image_base_path=str(images))
    collator = SFTCollator(ExampleEncoder(renderer, data))
    batches = []
    for kind in ("lazy", "full"):
        rows = load_training_rows(replace(data, data_check=kind), renderer, str(tmp_path / "bad.jsonl"))
        loader = torch.utils.data.DataLoader(rows, 3, collate_fn=collator, num_workers=workers)
        batches.append(list(loader))
    lazy, full = batches
    assert lazy[2].pop(FAULTS_KEY)[1][0]["line"] == 8
    drawn = [[key for batch in side for key in batch.pop(ROWS)] for side in batches]
    assert drawn[0] == [*drawn[1], (8, 0)] and len(drawn[1]) == 8
    for one, two in zip(lazy, full, strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("free", "workers"), [(2**26, 0), (2**34, 4)])
def test_workers_read_images_for_a_gpu_where_shared_memory_holds_their_batches(monkeypatch, capsys, free, workers):
    """Docker gives 64 MB: a worker would die of a bus error."""
    assert train_sft.default_workers(4) == 0, "of a CPU they would take the cores"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train_sft.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert train_sft.default_workers(4) == workers
    assert ("need 1.0 GB of /dev/shm" in capsys.readouterr().out) == (not workers)


def test_an_image_that_goes_after_the_check_is_a_named_fault_and_not_a_crash(images, renderer, tmp_path):  # noqa: F811
    (tmp_path / "here.jpg").write_bytes((images / "photo.jpg").read_bytes())
    path = write(tmp_path / "train.jsonl", [row(image="here.jpg")])
    data = DataConfig(train_data=path, image_base_path=str(tmp_path), data_check="full")
    table = load_training_rows(data, renderer, str(tmp_path / "bad.jsonl"))
    (tmp_path / "here.jpg").unlink()
    faults = SFTCollator(ExampleEncoder(renderer, data))([table[0]])[FAULTS_KEY]
    assert faults == (1, [{"line": 1, "entry": 0, "offset": 0, "fault": "missing image here.jpg"}])
