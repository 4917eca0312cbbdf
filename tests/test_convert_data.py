"""The command: files read and written whole, rows left out by name, hub sets, and the demo's data there and back."""

import hashlib
import json
import os
import shutil
import tracemalloc

import datasets
import pyarrow.parquet
import pytest
from PIL import Image

import convert_data
import data_utils
from config import ConversionConfig, SettingsError

ANSWER = "<think>\n{Crop region [2, 2, 40, 36]}\n</think>\n\n<answer>red</answer>"


@pytest.fixture
def demo(data_folder, tmp_path):
    """A copy of the demo's data, since conversions write images beside it."""
    return shutil.copytree(data_folder, tmp_path / "demo")


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    return tmp_path


def convert(source, target, folder, **settings):
    config = ConversionConfig(image_folder=str(folder), **settings)
    return convert_data.convert((source[0], str(source[1])), (target[0], str(target[1])), config)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def llava_row(name="a.png", answer=ANSWER):
    return {"image": name, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": answer}]}


# ----------------------------------------------------------------------------------------------- the demo


@pytest.mark.parametrize(
    ("kind", "name", "rows"),
    [
        ("vlir", "there.json", 36),
        ("vlir", "there.jsonl", 36),
        ("visual_cot", "there.json", 36),
        ("llava", "there.json", 12),
        ("messages", "there.jsonl", 12),
        ("deepeyes", "there.parquet", 36),
    ],
)
def test_the_demos_data_there_and_back_is_sound(demo, kind, name, rows, capsys):
    there, back = demo / name, demo / "back.jsonl"
    report = convert(("jsonl", demo / "train.jsonl"), (kind, there), demo)
    assert (report.read, report.written, report.skipped) == (12, rows, 0)
    assert convert((kind, there), ("jsonl", back), demo).skipped == 0
    assert data_utils.main(["--check", str(back), "--image_base_path", str(demo)]) == 0
    assert "no faults" in capsys.readouterr().out
    was = [entry for row in rows_of(demo / "train.jsonl") for entry in row["QnA"]]
    now = [entry for row in rows_of(back) for entry in row["QnA"]]
    assert [entry["Q"] for entry in now] == [entry["Q"] for entry in was]
    assert [tail(entry) for entry in now] == [tail(entry) for entry in was]
    if kind in ("llava", "messages"):
        assert now == was
    if kind == "deepeyes":  # images are kept byte by byte
        assert digests(demo, rows_of(back)) == [
            d for d in digests(demo, rows_of(demo / "train.jsonl")) for _ in range(3)
        ]


def tail(entry):
    return entry["A3"].partition("</think>")[2]


def digests(folder, rows):
    return [hashlib.sha256((folder / row["image_path"]).read_bytes()).hexdigest() for row in rows]


def test_a_foreign_format_goes_straight_into_another(demo):
    convert(("jsonl", demo / "train.jsonl"), ("vlir", demo / "a.json"), demo)
    convert(("vlir", demo / "a.json"), ("visual_cot", demo / "b.json"), demo)
    row = json.loads((demo / "b.json").read_text())[0]
    assert row["image"][1].startswith(f"{row['image'][0]}###[")


# -------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("text", ["[\n{0},\n{1}]\n", "\ufeff[{0}, {1}]", "{0}\r\n\r\n{1}\r\n", "\ufeff{0}\n{1}"])
def test_arrays_and_lines_are_told_apart(folder, text):
    rows = [json.dumps(llava_row()), json.dumps(llava_row(answer="blue"))]
    source = folder / "in.json"
    source.write_bytes(text.replace("{0}", rows[0]).replace("{1}", rows[1]).encode())
    report = convert(("llava", source), ("jsonl", folder / "out.jsonl"), folder)
    assert (report.read, report.written, report.skipped) == (2, 2, 0)
    assert [tail(row["QnA"][0]).strip() for row in rows_of(folder / "out.jsonl")] == [
        "<answer>red</answer>",
        "<answer>blue</answer>",
    ]


def test_a_json_target_is_an_array_and_a_jsonl_target_has_lines(folder):
    source = folder / "in.jsonl"
    source.write_text(json.dumps(llava_row()) + "\n" + json.dumps(llava_row(answer="blau, größer")))
    for name in ("out.json", "out.jsonl"):
        convert(("llava", source), ("messages", folder / name), folder)
    assert json.loads((folder / "out.json").read_text("utf-8")) == rows_of(folder / "out.jsonl")
    assert "größer" in (folder / "out.jsonl").read_text("utf-8")


def test_rows_that_cannot_be_are_left_out_by_name(folder, capsys):
    bad = [
        json.dumps(llava_row())[:-3],
        "[1]",
        json.dumps(llava_row(name="")),
        r'{"image": "\ud800", "conversations": []}',
    ]
    half = json.dumps(llava_row(answer="x\ud800"))
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("\n".join([json.dumps(llava_row()), *bad, half, "", json.dumps(llava_row())]))
    flags = ["--from", "llava", str(source), "--to", "jsonl", str(target), "--image_folder", str(folder)]
    convert_data.main(flags)
    printed = capsys.readouterr().out
    assert "2 rows from 7, 5 left out" in printed
    named = (folder / "out.jsonl.skipped.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in named] == [f"line {number}" for number in (2, 3, 4, 5, 6)]
    assert "bad JSON" in named[0]
    assert all(line in printed for line in named)
    assert len(rows_of(target)) == 2
    source.write_text(json.dumps(llava_row()))
    convert_data.main(flags)
    assert not (folder / "out.jsonl.skipped.txt").exists()


def test_many_faults_are_counted_on_the_screen_and_listed_in_the_file(folder, capsys):
    source = folder / "in.json"
    source.write_text(json.dumps([llava_row(), *[3] * 25]))
    convert_data.main(["--from", "llava", str(source), "--to", "jsonl", str(folder / "out.jsonl")])
    assert "… and 15 more" in capsys.readouterr().out
    assert len((folder / "out.jsonl.skipped.txt").read_text().splitlines()) == 25


@pytest.mark.parametrize(("kind", "name"), [("jsonl", "out.jsonl"), ("llava", "out.json"), ("deepeyes", "out.parquet")])
def test_where_nothing_can_be_read_the_earlier_file_stays(folder, kind, name):
    (folder / "in.jsonl").write_text("{}\n{}")
    (folder / name).write_text("earlier")
    with pytest.raises(SettingsError, match=r"no row of .* could be read as llava\n  line 1: no images"):
        convert(("llava", folder / "in.jsonl"), (kind, folder / name), folder)
    assert sorted(os.listdir(folder)) == sorted(["a.png", "in.jsonl", name])
    assert (folder / name).read_text() == "earlier"


def test_a_parquet_file_that_ends_too_soon_leaves_nothing(folder, capsys):
    image = {"bytes": os.urandom(10_000), "path": "x.png"}
    table = pyarrow.Table.from_pylist([{"images": [image], "reward_model": {"ground_truth": "a"}}] * 200)
    pyarrow.parquet.write_table(table, folder / "in.parquet", row_group_size=50, compression=None, use_dictionary=False)
    with open(folder / "in.parquet", "r+b") as file:
        file.seek(300_000)
        file.write(b"\xff" * 300_000)
    with pytest.raises(SystemExit, match="2"):
        flags = ["--from", "deepeyes", str(folder / "in.parquet"), "--to", "jsonl", str(folder / "out.jsonl")]
        convert_data.main([*flags, "--image_folder", str(folder / "images")])
    assert capsys.readouterr().err.splitlines()[-1].startswith("convert_data.py: ")
    assert sorted(os.listdir(folder)) == ["a.png", "in.parquet"]


def test_a_long_jsonl_file_is_not_held_in_memory(folder):
    row = llava_row(answer="long " * 20_000)
    with open(folder / "in.jsonl", "w") as file:
        for _ in range(300):  # 30 MB
            file.write(json.dumps(row) + "\n")
    tracemalloc.start()
    try:
        convert(("llava", folder / "in.jsonl"), ("messages", folder / "out.json"), folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert os.path.getsize(folder / "out.json") > 29e6
    assert peak < 8e6


# ------------------------------------------------------------------------------------------------- parquet


def test_deepeyes_files_are_read_by_datasets_as_deepeyes_reads_them(demo):
    convert(("jsonl", demo / "train.jsonl"), ("deepeyes", demo / "out.parquet"), demo)
    table = datasets.load_dataset("parquet", data_files=str(demo / "out.parquet"))["train"]
    row = table[4]
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
    assert row["prompt"][1]["content"].startswith("<image>\nWhich stripes")
    assert row["images"][0]["bytes"] == (demo / "images/train_00001.jpg").read_bytes()
    assert row["extra_info"]["question"] in row["prompt"][1]["content"]
    assert row["reward_model"] == {"ground_truth": row["extra_info"]["answer"], "style": "model"}
    assert len(table) == 36


# --------------------------------------------------------------------------------------------------- hub


def hub_set(folder):
    """Three rows as sets of the hub have them: an image column, other names, shares as boxes."""
    pictures = [Image.new("RGB", (100, 50), color) for color in ("red", "green", "blue")]
    columns = {
        "img": pictures,
        "prompt": ["Which?", "What?", "Where?"],
        "solution": ["red", "green", "<think>Up there.</think><answer>sky</answer>"],
        "bbox": [[[0.1, 0.2, 0.5, 0.9]], [[0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 1.0, 1.0]], []],
    }
    table = datasets.Dataset.from_dict(columns).cast_column("img", datasets.Image())
    (folder / "set").mkdir()
    return table, folder / "set"


@pytest.mark.parametrize("layout", ["parquet folder", "parquet file", "saved", "saved with splits"])
def test_a_set_is_read_by_its_columns(folder, layout):
    table, home = hub_set(folder)
    if layout == "saved":
        table.save_to_disk(home)
    elif layout == "saved with splits":
        datasets.DatasetDict({"train": table}).save_to_disk(home)
    else:
        table.to_parquet(home / "train-00000-of-00001.parquet")
    source = home / "train-00000-of-00001.parquet" if layout == "parquet file" else home
    columns = "image=img,question=prompt,answer=solution,boxes=bbox"
    settings = {"columns": columns, "box_frame": "normalized_1"}
    report = convert(("hub", source), ("jsonl", folder / "out.jsonl"), folder / "images", **settings)
    rows = rows_of(folder / "out.jsonl")
    assert report.skipped == 0, report.faults
    assert [row["QnA"][0]["Q"] for row in rows] == ["Which?", "What?", "Where?"]
    assert [row["QnA"][0]["A3"] for row in rows] == [
        "<think>\n{Crop region [10, 10, 50, 45]}\n</think>\n\n<answer>red</answer>",
        "<think>\n{Crop region [0, 0, 100, 50]}\n{Crop region [50, 25, 100, 50]}\n</think>\n\n<answer>green</answer>",
        "<think>Up there.</think><answer>sky</answer>",
    ]
    assert [Image.open(folder / "images" / row["image_path"]).getpixel((0, 0)) for row in rows] == [
        (255, 0, 0),
        (0, 128, 0),
        (0, 0, 255),
    ]
    flags = ["--check", str(folder / "out.jsonl"), "--image_base_path", str(folder / "images"), "--min_box_side", "8"]
    assert data_utils.main(flags) == 0


def test_a_set_of_jsonl_with_paths_and_a_split(folder):
    home = folder / "set"
    home.mkdir()
    row = {"image": "a.png", "question": "Which?", "answer": 4, "boxes": [2, 2, 30, 30]}
    (home / "test.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"answer": "5", "image": None}))
    settings = {"columns": "boxes=boxes", "split": "test", "box_form": "xywh"}
    report = convert(("hub", home), ("jsonl", folder / "out.jsonl"), folder, **settings)
    (made,) = rows_of(folder / "out.jsonl")
    assert made["QnA"][0]["A3"] == "<think>\n{Crop region [2, 2, 32, 32]}\n</think>\n\n<answer>4</answer>"
    assert report.faults == ("row 1: the image must be a path, or an image's bytes",)


def test_a_folder_of_images_is_copied_into_the_image_folder(folder):
    home = folder / "set"
    home.mkdir()
    shutil.copy(folder / "a.png", home / "one.png")
    row = {"file_name": "one.png", "question": "Which?", "answer": "red"}
    (home / "metadata.jsonl").write_text(json.dumps(row))
    convert(("hub", home), ("jsonl", folder / "out.jsonl"), folder / "images")
    (made,) = rows_of(folder / "out.jsonl")
    assert (folder / "images" / made["image_path"]).read_bytes() == (folder / "a.png").read_bytes()


def test_a_set_without_the_named_column_or_split_writes_nothing(folder):
    table, home = hub_set(folder)
    table.to_parquet(home / "train.parquet")
    with pytest.raises(SettingsError, match="no column image, question, answer, but img, prompt, solution, bbox"):
        convert(("hub", home), ("jsonl", folder / "out.jsonl"), folder)
    with pytest.raises(SettingsError, match=r"split validation\) cannot be read by datasets.load_dataset"):
        convert(("hub", home), ("jsonl", folder / "out.jsonl"), folder, split="validation")
    assert not (folder / "out.jsonl").exists()


def test_a_set_with_code_of_its_own_is_not_run(folder):
    home = folder / "evil"
    home.mkdir()
    (home / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with pytest.raises(SettingsError, match=r"cannot be read by datasets\.load_dataset"):
        convert(("hub", home), ("jsonl", folder / "out.jsonl"), folder)
    assert not (folder / "ran").exists()


# ------------------------------------------------------------------------------------------------ command


def test_the_command_that_checks_the_result_can_be_pasted():
    report = convert_data.Report("my data/o.jsonl", 1, 1, 0, {}, ())
    said = convert_data.describe(report, ("llava", "x.json"), ("jsonl", report.target), "my images")
    assert said.endswith("data_utils.py --check 'my data/o.jsonl' --image_base_path 'my images'")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--from coco x --to jsonl o.jsonl", "--from is 'coco', but it must be one of jsonl, vlir"),
        ("--from llava x.json --to hub me/mine", "sets of the hub are read, not written"),
        ("--from llava x.json --to jsonl o.json", "the name of such a file ends in .jsonl"),
        ("--from llava x.json --to deepeyes o.jsonl", "the name of such a file ends in .parquet"),
        ("--from llava gone.json --to jsonl o.jsonl", "--from is gone.json, but there is no such file"),
        ("--from jsonl empty.jsonl --to llava o.json", "empty.jsonl is empty"),
        ("--from llava x.json --to messages x.json", "x.json is the source itself"),
        ("--from llava x.json --to jsonl o.jsonl", "x.json cannot be read as JSON"),
        ("--from deepeyes x.json --to jsonl o.jsonl", "x.json cannot be read as parquet"),
        ("--from llava x.json --to jsonl o.jsonl --split test", "split was given, but --from llava"),
        ("--from llava x.json --to vlir o.json --box_frame qwen", "box_frame was given, but"),
        ("--from llava x.json --to jsonl o.jsonl --box_max_pixels 9999", "box_max_pixels was given"),
        ("--from vlir x.json --to jsonl o.jsonl --box_max_pixels 9", "it must be at least 3136"),
        ("--from vlir x.json --to jsonl o.jsonl --box_frame tiles", "it must be one of original"),
        ("--from hub x.json --to jsonl o.jsonl --columns a=b", "it is a list like image=img"),
        ("--from hub x.json --to jsonl o.jsonl --subset big", "subset is 'big', but x.json is one set alone"),
    ],
)
def test_what_cannot_be_is_said(folder, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(folder)
    (folder / "x.json").write_text("[{")
    (folder / "empty.jsonl").touch()
    with pytest.raises(SystemExit, match="2"):
        convert_data.main(flags.split())
    assert message in capsys.readouterr().err
    assert sorted(os.listdir(folder)) == ["a.png", "empty.jsonl", "x.json"]
