"""Data: every fault is named with its line, sound rows train, and batches carry loss where they should."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_images import png

import data_utils
import sft_data
from config import DataConfig, SettingsError
from conversation import IGNORED, EncodedExample, Example, Renderer, cut_to_length, load_image, model_inputs
from crop_tool import CropContract, image_token_count
from data_check import Checker, as_example, byte_ranges, check_file, load_examples
from sft_data import ExampleEncoder, SFTCollator

SOUND = "<think>\nIt is there {Crop it [10, 10, 90, 80]}\n</think>\n\n<answer>yes</answer>"


def row(answer=SOUND, image="photo.jpg", question="Is it there?", **more):
    return json.dumps({"image_path": image, "QnA": [{"Q": question, "A3": answer}], **more})


def calling(*boxes):
    calls = " ".join(f"{{Crop it {box}}}" for box in boxes)
    return f"<think>\n{calls}\n</think>\n\n<answer>yes</answer>"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder `base` of images, with a picture beside it that no row may reach."""
    parent = tmp_path_factory.mktemp("images")
    base = parent / "base"
    base.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (160, 200, 3), np.uint8)
    photo = Image.fromarray(noise)
    photo.save(base / "photo.jpg")
    photo.save(parent / "outside.jpg")
    (base / "link.jpg").symlink_to(parent / "outside.jpg")
    (base / "inner.jpg").symlink_to(base / "photo.jpg")
    (base / "loop.jpg").symlink_to(base / "loop.jpg")
    whole = (base / "photo.jpg").read_bytes()
    (base / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (base / "text.jpg").write_text("no picture")
    Image.new("RGB", (6030, 30)).save(base / "strip.png")
    Image.new("L", (6000, 4000)).save(base / "large.png")
    (base / "bomb.png").write_bytes(png((30_000, 30_000), 1, 0, (b"\0" * 3751) * 30_000))
    os.mkfifo(base / "pipe.jpg")
    return base


def write(path, lines, newline=b"\n"):
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + newline for line in lines))
    return str(path)


def check(capsys, path, base, *flags):
    """Exit code and printed text of the check."""
    code = data_utils.main(["--check", path, "--image_base_path", str(base), *flags])
    return code, capsys.readouterr().out


# ------------------------------------------------------------------------------------------- the faults

FAULTS = {
    "no JSON": ('{"image_path": ', r"bad JSON: Expecting value at character 15"),
    "JSON cut off": ('{"image_path": "a', r"bad JSON: Unterminated string starting at character 16"),
    "no text": (b'{"image_path": "\xff"}', r"bad JSON: 'utf-8' codec can't decode byte 0xff in position 16: .*"),
    "nested without end": ("[" * 100_000, r"bad JSON: maximum recursion depth exceeded.*"),
    "key that stands twice": (
        row()[:-1] + ', "QnA": [{"Q": "other?", "A3": "x"}]}',
        r"bad JSON: the key 'QnA' stands twice in an object",
    ),
    "answer that stands twice": (
        row().replace('"A3"', '"A3": "first", "A3"'),
        r"bad JSON: the key 'A3' stands twice in an object",
    ),
    "no object": ("[1]", r"bad JSON: a row must be an object, this is list"),
    "half a surrogate pair": (
        row(question="\ud800 there?"),
        r"bad JSON: 'Q' holds half a surrogate pair at character 0",
    ),
    "half a surrogate pair in the path": (
        row(image="a\udfff"),
        r"bad JSON: 'image_path' holds half a surrogate pair at character 1",
    ),
    "no image_path": ('{"QnA": [{}]}', r"missing key 'image_path': it must be non-empty text"),
    "image_path is a number": ('{"image_path": 5, "QnA": [{}]}', r"missing key 'image_path': .*"),
    "no QnA": ('{"image_path": "photo.jpg"}', r"missing key 'QnA': it must be a non-empty list"),
    "empty QnA": ('{"image_path": "photo.jpg", "QnA": []}', r"missing key 'QnA': it must be a non-empty list"),
    "entry is no object": (
        '{"image_path": "photo.jpg", "QnA": ["Q"]}',
        r"missing key 'Q': a QnA entry must be an object, this is 'Q'",
    ),
    "no Q": ('{"image_path": "photo.jpg", "QnA": [{"A3": "x"}]}', r"missing key 'Q': it must be non-empty text"),
    "no answer": (
        '{"image_path": "photo.jpg", "QnA": [{"Q": "x", "A1": "y"}]}',
        r"missing key 'A3': it must be non-empty text",
    ),
    "blank answer": (row(answer=" \n"), r"missing key 'A3': it must be non-empty text"),
    "missing image": (row(image="none.jpg"), r"missing image none\.jpg"),
    "decompression bomb": (row(image="bomb.png"), r"unreadable image bomb\.png: Image size \(900000000 pixels\) .*"),
    "image is a pipe": (row(image="pipe.jpg"), r"unreadable image pipe\.jpg: it is no file"),
    "image is a folder": (row(image="."), r"unreadable image \.: Is a directory"),
    "a null character": (row(image="a\0.jpg"), r"image path 'a\\x00\.jpg' holds a null character"),
    "a path without end": (row(image="a" * 5000), r"unreadable image a{80}: File name too long"),
    "truncated JPEG": (
        row(image="truncated.jpg"),
        r"unreadable image truncated\.jpg: image file is truncated \(\d+ bytes not processed\)",
    ),
    "no picture": (row(image="text.jpg"), r"unreadable image text\.jpg: cannot identify image file .*"),
    "link to itself": (row(image="loop.jpg"), r"unreadable image loop\.jpg: .*"),
    "broken data URI": (row(image="data:image/png;base64,AAAA"), r"unreadable image data:image/png;base64,AAAA: .*"),
    "strip": (row(image="strip.png"), r"the image is 6030 x 30: its aspect ratio is over 200"),
    "path upwards": (row(image="../outside.jpg"), r"image path \.\./outside\.jpg leaves the base folder .*"),
    "absolute path": (row(image="/etc/hostname"), r"image path /etc/hostname leaves the base folder .*"),
    "link out of the base": (row(image="link.jpg"), r"image path link\.jpg leaves the base folder .*"),
    "malformed box": (
        row(calling("[1, 2, 90]")),
        r"malformed call '\{Crop it \[1, 2, 90\]\}': expected \[x1, y1, x2, y2\]",
    ),
    "call that is never closed": (
        row("<think>{Crop it [1, 2, 3, 4]</think><answer>a</answer>"),
        r"malformed call '\{Crop it \[1, 2, 3, 4\].*': it is never closed",
    ),
    "inverted box": (
        row(calling("[90, 10, 20, 80]")),
        r"inverted box \[90, 10, 20, 80\]: x2 must be over x1, and y2 over y1",
    ),
    "outside box": (row(calling("[200, 10, 300, 80]")), r"outside box \[200, 10, 300, 80\]: the image is 200 x 160"),
    "tiny box": (
        row(calling("[10, 10, 30, 80]")),
        r"tiny box \[10, 10, 30, 80\]: 20 x 70 px, min_box_side is 28",
    ),
    "second box": (row(calling("[10, 10, 90, 80]", "[50.5, 50, 50.5, 90]")), r"inverted box \[50\.5, 50, .*"),
    "over-long box": (
        row(calling("[0, 0, 5700, 28]"), image="large.png"),
        r"extreme box \[0, 0, 5700, 28\]: one side is over 200 times the other",
    ),
    "box that is over-long as the model writes it": (
        row(calling("[4, 0, 5603, 28]"), image="large.png"),
        r"extreme box \[4, 0, 5603, 28\]: one side is over 200 times the other",
    ),
    "empty answer": (
        row("<think>a</think><answer> </answer>"),
        r"empty answer: nothing stands between <answer> and </answer>",
    ),
    "no think tags": (row("<answer>yes</answer>"), r"missing tags: the answer needs one <think>…</think>"),
    "think is not closed": (row("<think>a<answer>b</answer>"), r"missing tags: the answer needs one <think>…</think>"),
    "two answers": (
        row("<think>a</think><answer>b</answer><answer>c</answer>"),
        r"missing tags: the answer needs one <answer>…</answer>",
    ),
    "answer first": (
        row("<answer>b</answer><think>a</think>"),
        r"missing tags: the answer must be <think>…</think> and then <answer>…</answer>",
    ),
    "image token in the question": (
        row(question="What is <|image_pad|>?"),
        r"the question contains the reserved token <\|image_pad\|>: remove it",
    ),
    "end of turn in the answer": (
        row(SOUND.replace("yes", "<|im_end|>")),
        r"the answer contains the reserved token <\|im_end\|>: remove it",
    ),
    "too long": (row(SOUND.replace("yes", "yes " * 9000)), r"too long: \d+ tokens, max_length is 8192"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_line_and_its_neighbours_stay_sound(fault, images, tmp_path):
    line, message = FAULTS[fault]
    path = write(tmp_path / "train.jsonl", [row(), "", line, row(image="inner.jpg")])
    checker = Checker(DataConfig(train_data=path, image_base_path=str(images)), CropContract())
    checked = list(checker.rows(byte_ranges(path, 1)))
    assert [item.line for item in checked] == [1, 3, 4]
    assert [checked[0].fault, checked[2].fault] == ["", ""]
    assert re.fullmatch(message, checked[1].fault, re.DOTALL), checked[1].fault


def test_check_prints_every_fault_writes_the_bad_rows_and_exits_1(images, tmp_path, capsys):
    lines = [row(), *(line for line, _ in FAULTS.values()), row()]
    path = write(tmp_path / "train.jsonl", lines)
    code, out = check(capsys, path, images)
    assert code == 1
    named = re.findall(r"^  line (\d+), QnA\[0\]: (.*)$", out, re.MULTILINE)
    assert [int(number) for number, _ in named] == list(range(2, len(FAULTS) + 2))
    for (_, printed), (_, message) in zip(named, FAULTS.values(), strict=True):
        assert re.fullmatch(message, printed), printed
    assert out.splitlines()[-1] == f"{len(FAULTS)} faults; their rows are in {path}.bad_rows.jsonl"
    assert out.index("  line 2") < out.index("rows  ")  # a long list does not push the figures out of sight
    bad = (tmp_path / "train.jsonl.bad_rows.jsonl").read_bytes()
    assert bad == b"".join((tmp_path / "train.jsonl").read_bytes().splitlines(keepends=True)[1:-1])


def test_check_of_a_sound_file_prints_its_figures_and_exits_0(images, tmp_path, capsys):
    none, two = calling(), calling("[0, 0, 100, 100]", "[50.5, 20, 205, 100]")
    path = write(tmp_path / "train.jsonl", [row(), row(none), row(two), row(two)])
    code, out = check(capsys, path, images)
    assert code == 0
    figures = re.fullmatch(
        r"rows +4\nentries +4   sound 4, faulty 0\ncalls +5\n"
        r"crops a row +1\.25   \(0: 1, 1: 1, 2: 2\)\n"
        r"token lengths +(\d+)   median, (\d+) 95th percentile, (\d+) longest   \(text estimated; give .*\)\n"
        r"boxes in +\w.*\n"
        r"no faults\n",
        out,
    )
    median, high, longest = map(int, figures.groups())
    crops = 4 * 4 + 5 * 3  # of the longest: 100 x 100 and 150 x 80, in tokens of 28 px
    assert 20 * 16 < median <= high == longest and 20 * 16 + crops < longest < 20 * 16 + crops + 250
    assert not (tmp_path / "train.jsonl.bad_rows.jsonl").exists()


def test_check_with_a_model_counts_its_tokens_in_its_frame(base_folder, renderer, images, tmp_path, capsys):
    path = write(tmp_path / "train.jsonl", [row()])
    code, out = check(capsys, path, images, "--model_name", str(base_folder))
    length = renderer.length(Example(1, 0, "photo.jpg", "Is it there?", SOUND), (200, 160))
    assert (code, re.search(r"token lengths +(\d+) .*longest(.*)", out).groups()) == (0, (str(length), ""))
    with pytest.raises(SystemExit) as stop:
        check(capsys, path, images, "--model_name", str(base_folder), "--coordinate_space", "original")
    assert stop.value.code == 2
    assert "coordinate_space='original' was given, but" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_length", "many"], "data_utils.py: max_length is 'many', but it must be a number\n"),
        (["--coordinate_space", "pixels"], "data_utils.py: coordinate_space is 'pixels', but it must be one of "),
        (["--bad_rows_file", "train.jsonl"], "bad_rows_file is train.jsonl, the data file itself: give another name"),
        (["--html", "./train.jsonl"], "html is ./train.jsonl, the data file itself: give another name"),
        (["--html", "."], "data_utils.py: [Errno 21] Is a directory: '.'\n"),
    ],
)
def test_check_refuses_settings_that_cannot_be_and_leaves_the_data_alone(
    flags, message, images, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", [row(), "[1]"])
    before = (tmp_path / "train.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stop:
        check(capsys, "train.jsonl", images, *flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert (tmp_path / "train.jsonl").read_bytes() == before


def test_check_of_a_missing_or_empty_file_or_folder_is_refused(images, tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(SystemExit) as stop:
        check(capsys, str(tmp_path / "empty.jsonl"), tmp_path / "nowhere")
    assert stop.value.code == 2 and "nowhere, but there is no such folder" in capsys.readouterr().err
    cases = {"none.jsonl": "there is no such file", "empty.jsonl": "is empty", ".": "that is a folder"}
    for name, message in cases.items():
        with pytest.raises(SystemExit) as stop:
            check(capsys, str(tmp_path / name), images)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_several_entries_a_row_are_an_example_each_and_a_faulty_one_drops_alone(images, tmp_path, renderer, capsys):
    good = {"Q": "first?", "A3": SOUND}
    entries = [good, {"Q": "second?"}, {**good, "Q": "third?", "A1": "unused"}]
    line = json.dumps({"image_path": "photo.jpg", "image_id": 7, "QnA": entries, "more": None})
    path = write(tmp_path / "train.jsonl", [row(), line])
    data = DataConfig(image_base_path=str(images))
    examples = [as_example(item) for item in load_examples(path, data, renderer, str(tmp_path / "bad.jsonl"))]
    assert [(item.name, item.question) for item in examples] == [
        ("line 1, QnA[0]", "Is it there?"),
        ("line 2, QnA[0]", "first?"),
        ("line 2, QnA[2]", "third?"),
    ]
    assert (tmp_path / "bad.jsonl").read_text() == line + "\n"
    out = capsys.readouterr().out
    assert f"{path}: 1 of 4 entries are faulty and skipped; rows in {tmp_path}/bad.jsonl" in out
    assert "  line 2, QnA[1]: missing key 'A3': it must be non-empty text" in out


def test_another_answer_key_is_read_where_it_is_set(images, tmp_path, capsys):
    line = json.dumps({"image_path": "photo.jpg", "QnA": [{"Q": "?", "cot": SOUND}]})
    path = write(tmp_path / "train.jsonl", [line])
    assert check(capsys, path, images, "--answer_key", "cot")[0] == 0
    code, out = check(capsys, path, images)
    assert code == 1 and "line 1, QnA[0]: missing key 'A3': it must be non-empty text" in out


def test_boxes_are_held_against_the_picture_as_it_is_displayed(images, tmp_path, capsys):
    """Of a photograph that the camera stored on its side, 300 x 100, and that is shown 100 x 300."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 100)).save(tmp_path / "side.jpg", exif=exif)
    lines = [row(calling(box), image="side.jpg") for box in ("[10, 150, 90, 290]", "[150, 10, 290, 90]")]
    code, out = check(capsys, write(tmp_path / "train.jsonl", lines), tmp_path)
    assert code == 1 and re.findall(r"^  line (\d+), .*: (.*): the image is (.*)$", out, re.MULTILINE) == [
        ("2", "outside box [150, 10, 290, 90]", "100 x 300")
    ]


def test_a_file_with_five_percent_bad_rows_gives_the_other_95(images, tmp_path, renderer, capsys):
    names = ("no JSON", "truncated JPEG", "link out of the base", "inverted box", "half a surrogate pair")
    faults = dict(zip((7, 30, 31, 77, 100), names, strict=True))
    lines = [FAULTS[faults[n]][0] if n in faults else row(question=f"Is {n} there?") for n in range(1, 101)]
    path = write(tmp_path / "train.jsonl", lines)
    data = DataConfig(image_base_path=str(images))
    table = load_examples(path, data, renderer, str(tmp_path / "out/bad.jsonl"))
    assert [item["line"] for item in table] == [n for n in range(1, 101) if n not in faults]
    assert all(item["question"] == f"Is {item['line']} there?" for item in table)
    batch = SFTCollator(ExampleEncoder(renderer, data))([table[0], table[94]])
    assert batch["input_ids"].shape[0] == 2
    out = capsys.readouterr().out
    assert "5 of 100 entries are faulty and skipped" in out and out.endswith(f"{path}: 95 examples\n")
    assert re.findall(r"^  line (\d+), ", out, re.MULTILINE) == ["7", "30", "31", "77", "100"]
    assert len((tmp_path / "out/bad.jsonl").read_bytes().splitlines()) == 5


def test_many_faults_are_counted_and_the_first_named(images, tmp_path, renderer, capsys):
    path = write(tmp_path / "train.jsonl", [row(), *["[1]"] * 25])
    load_examples(path, DataConfig(image_base_path=str(images)), renderer, str(tmp_path / "bad.jsonl"))
    out = capsys.readouterr().out
    assert out.count("a row must be an object") == 10 and "  … and 15 more" in out


def test_a_file_without_a_sound_example_is_refused(images, tmp_path, renderer):
    path = write(tmp_path / "train.jsonl", ["[1]"])
    with pytest.raises(SettingsError, match=r": python data_utils\.py --check .* --image_base_path .* says why"):
        load_examples(path, DataConfig(image_base_path=str(images)), renderer, str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize("newline", [b"\r\n", b"\n"], ids=["CRLF", "LF"])
@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""], ids=["BOM", "no BOM"])
def test_line_ends_and_byte_order_marks_of_other_systems_are_read(images, tmp_path, capsys, mark, newline):
    path = write(tmp_path / "train.jsonl", [mark + row().encode(), b"", row(calling()).encode(), b"[1]"], newline)
    code, out = check(capsys, path, images)
    assert code == 1 and "entries              3   sound 2, faulty 1" in out
    assert re.findall(r"^  line (\d+), .*$", out, re.MULTILINE) == ["4"]
    with open(path, "ab") as file:
        file.truncate(os.path.getsize(path) - len(newline) - 3)
    assert check(capsys, path, images)[0] == 0


LINES = st.lists(st.sampled_from([b"", b"  ", b"{", b"[1]", b'{"a": "' + b"x" * 300 + b'"}', b"\xff"]), max_size=30)


@settings(max_examples=60, deadline=None)
@given(lines=LINES, parts=st.integers(1, 9), newline=st.sampled_from([b"\n", b"\r\n"]), closed=st.booleans())
def test_a_file_in_parts_gives_the_rows_and_line_numbers_of_the_whole(tmp_path_factory, lines, parts, newline, closed):
    path = tmp_path_factory.mktemp("parts") / "train.jsonl"
    path.write_bytes(newline.join(lines) + (newline if closed else b""))
    checker = Checker(DataConfig(train_data=str(path)), CropContract())
    ranges = byte_ranges(str(path), parts)
    assert len(ranges) <= parts
    checked = list(checker.rows(ranges))
    assert [item.line for item in checked] == [number for number, line in enumerate(lines, 1) if line.strip()]
    assert checked == list(checker.rows(byte_ranges(str(path), 1)))


LONG_LINE = """
import os, resource, sys
from config import DataConfig
from conversation import Renderer
from data_check import check_file
from data_utils import main
from model_utils import load_processor
from row_index import index_examples
base, images, *files = sys.argv[1:]
renderer = Renderer(*load_processor(base))
for file in files:
    data = DataConfig(train_data=file, image_base_path=images)
    print(main(["--check", file, "--image_base_path", images]), len(index_examples(data, renderer, file + ".bad")))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_a_line_of_100_megabytes_is_a_fault_that_costs_little_memory(images, base_folder, tmp_path):
    short = write(tmp_path / "short.jsonl", [row(), row(), "[1]", row()])
    long = tmp_path / "long.jsonl"
    with open(long, "wb") as file:
        file.write((row() + "\n" + row()[:-2] + ' "').encode())
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(('"}\n[1]\n' + row() + "\n").encode())
    command = [sys.executable, "-c", LONG_LINE, base_folder, images, short, long]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.findall(r"^1 (\d+)$", done.stdout, re.MULTILINE) == ["4", "4"]
    faults = re.findall(r"^  line (\d+), QnA\[0\]: (.*)$", done.stdout.partition("long.jsonl")[2], re.MULTILINE)
    assert ("2", "bad JSON: the line is longer than 33,554,432 bytes") in faults
    assert {line for line, _ in faults} == {"2", "3"}
    before, after = map(int, re.findall(r"^(\d+)$", done.stdout, re.MULTILINE))
    assert after - before < 90, f"{before} and {after} MiB"
    bad = Path(f"{long}.bad_rows.jsonl")
    assert bad.stat().st_size == long.stat().st_size - 2 * len(row() + "\n"), "the row is kept whole"


@pytest.mark.parametrize("count", [0, 50, 300])
def test_a_file_changed_while_it_is_read_is_refused_and_read_anew_later(images, tmp_path, monkeypatch, count):
    path = write(tmp_path / "train.jsonl", [row()] * 200)
    load, calls = Checker._image, []

    def meddle(checker, name):
        calls.append(name)
        if len(calls) == 3:
            write(tmp_path / "train.jsonl", [row(), *[row(question="new?")] * count])
        return load(checker, name)

    monkeypatch.setattr(Checker, "_image", meddle)
    data = DataConfig(train_data=path, image_base_path=str(images))
    with pytest.raises(SettingsError, match="was changed while it was read: start again when it is complete"):
        check_file(data, CropContract())
    monkeypatch.undo()
    assert len(check_file(data, CropContract())) == count + 1


def test_two_processes_check_as_one_does(images, tmp_path):
    path = write(tmp_path / "train.jsonl", [line for fault, _ in FAULTS.values() for line in (fault, row())])
    data = DataConfig(train_data=path, image_base_path=str(images))
    one, two = (check_file(replace(data, num_proc=count), CropContract()) for count in (1, 2))
    assert one.to_list() == two.to_list() and len(one) == 2 * len(FAULTS)


# ---------------------------------------------------------------------------------------- a kept check


def test_a_check_is_kept_until_the_file_an_image_or_a_setting_changes(images, tmp_path):
    for name in ("here.jpg", "other.jpg"):
        (tmp_path / name).write_bytes((images / "photo.jpg").read_bytes())
    path = write(tmp_path / "train.jsonl", [row(image="here.jpg"), row(image="late.jpg")])
    data = DataConfig(train_data=path, image_base_path=str(tmp_path))

    def faults(data=data, contract=CropContract()):  # noqa: B008 - frozen
        table = check_file(data, contract)
        return table.cache_files[0]["filename"], list(table["fault"])

    first, found = faults()
    assert found == ["", "missing image late.jpg"]
    assert faults() == (first, found)
    (tmp_path / "late.jpg").write_bytes((images / "photo.jpg").read_bytes())
    assert faults()[1] == ["", ""]
    (tmp_path / "here.jpg").write_bytes((images / "truncated.jpg").read_bytes())
    assert faults()[1][0].startswith("unreadable image here.jpg")
    (tmp_path / "here.jpg").unlink()
    assert faults()[1] == ["missing image here.jpg", ""]
    (tmp_path / "late.jpg").unlink()
    (tmp_path / "here.jpg").write_bytes((images / "photo.jpg").read_bytes())
    assert faults(replace(data, min_box_side=75))[1][0].startswith("tiny box [10, 10, 90, 80]")
    with open(path, "ab") as file:
        file.write(b"[1]\n")
    assert len(faults()[1]) == 3


# -------------------------------------------------------------------------------------- token lengths


def random_example(rng, width, height):
    boxes = []
    for _ in range(rng.randint(0, 3)):
        x1, y1 = rng.uniform(0, width - 29), rng.uniform(0, height - 29)
        boxes.append([round(v, 2) for v in (x1, y1, rng.uniform(x1 + 28, width), rng.uniform(y1 + 28, height))])
    words = ["dog", "żółw", "龍", "\n\n", "12.5", "the", "</b>", "  "]
    text = "".join(rng.choice(words) + rng.choice(["", " "]) + f"{{Crop it {box}}}" for box in boxes)
    return Example(
        1, 0, "", rng.choice(words) + "?", f"\n<think>{text}x</think>\n<answer>{rng.choice(words)}</answer> "
    )


def lengths(renderer, space, seed):
    """The length told from the image's size, and the true one."""
    rng = random.Random(seed)
    width, height = rng.randint(30, 700), rng.randint(30, 700)
    example = random_example(rng, width, height)
    renderer = Renderer(renderer.processor, replace(renderer.contract, coordinate_space=space))
    told = renderer.length(example, (width, height))
    return told, len(renderer.encode(example, Image.new("RGB", (width, height))).input_ids)


# Renderer.length takes the region of the annotated box, Renderer.encode that of the box rounded to the model's frame.
@pytest.mark.parametrize("space", ["resized", "original", "normalized_1000"])
def test_the_length_told_without_pixels_is_never_below_the_true_one_and_close(renderer, space):
    pairs = [lengths(renderer, space, seed) for seed in range(150)]
    assert [pair for pair in pairs if not pair[1] <= pair[0] <= pair[1] + 24] == []


def cut_lengths(encoded, renderer):
    """Lengths of the prefixes that end at a segment border."""
    inside, borders = False, []
    for index, token in enumerate(encoded.input_ids):
        inside = token == renderer.ids["<|vision_start|>"] or (inside and token != renderer.ids["<|vision_end|>"])
        borders += [] if inside else [index + 1]
    return borders


def test_a_cut_is_at_a_segment_border_and_drops_the_images_behind_it(renderer):
    example = Example(1, 0, "", "?", calling([0, 0, 100, 100], [50, 20, 200, 100], [0, 0, 90, 40]))
    encoded = renderer.encode(example, Image.new("RGB", (200, 160)))
    borders = cut_lengths(encoded, renderer)
    prompt = next(index for index, label in enumerate(encoded.labels) if label != IGNORED)
    images_kept = set()
    for limit in range(prompt + 1, len(encoded.input_ids) + 2):
        cut = cut_to_length(encoded, renderer, limit)
        size = max(border for border in borders if border <= limit)
        assert (cut.input_ids, cut.labels) == (encoded.input_ids[:size], encoded.labels[:size])
        assert cut.images == encoded.images[: cut.input_ids.count(renderer.ids["<|vision_end|>"])]
        model_inputs([cut], renderer)
        images_kept.add(len(cut.images))
    assert images_kept == {1, 2, 3, 4}
    with pytest.raises(ValueError, match=f"too long: the prompt alone takes {prompt} of max_length={prompt} tokens"):
        cut_to_length(encoded, renderer, prompt)


def test_a_long_row_is_skipped_or_cut_as_the_setting_says(images, tmp_path, renderer, capsys):
    long = row(SOUND.replace("there", "there " * 100))
    path = write(tmp_path / "train.jsonl", [row(), long])
    data = DataConfig(image_base_path=str(images), max_length=200)
    table = load_examples(path, data, renderer, str(tmp_path / "bad.jsonl"))
    assert list(table["line"]) == [1]
    assert re.search(r"line 2, QnA\[0\]: too long: \d+ tokens, max_length is 200", capsys.readouterr().out)
    data = replace(data, overlong="cut")
    table = load_examples(path, data, renderer, str(tmp_path / "bad.jsonl"))
    batch = SFTCollator(ExampleEncoder(renderer, data))(list(table))
    assert list(table["line"]) == [1, 2] and batch["input_ids"].shape[1] == 200


# -------------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def drawn(data_folder, renderer, tmp_path_factory):
    """Examples and collator of the drawn data."""
    data = DataConfig(image_base_path=str(data_folder))
    bad = str(tmp_path_factory.mktemp("bad") / "bad.jsonl")
    table = load_examples(str(data_folder / "train.jsonl"), data, renderer, bad)
    return table, SFTCollator(ExampleEncoder(renderer, data))


def test_loss_is_on_the_responses_own_tokens_and_nowhere_else(drawn, renderer):
    table, collator = drawn
    rows = [table[0], {**table[4], "response": "<think>\n</think>\n\n<answer>no</answer>"}, table[35]]
    batch = collator(rows)
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    assert set(labels[labels != ids].tolist()) == {IGNORED}
    assert (labels[mask == 0] == IGNORED).all() and (mask == 0).any()
    blocks = [renderer.ids[token] for token in ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")]
    assert not any((labels == token).any() for token in blocks)
    for example, row_labels in zip(map(as_example, rows), labels.tolist(), strict=True):
        own = renderer.tokenizer.decode([label for label in row_labels if label != IGNORED])
        text = re.sub(r"<tool_call>\[\d+, \d+, \d+, \d+\]</tool_call>", "{Crop}", own)
        assert text == re.sub(r"\{Crop [^}]*\}", "{Crop}", example.response) + "<|im_end|>"


def test_pixels_and_grids_are_those_of_the_rows_images_in_order(drawn, renderer):
    table, collator = drawn
    rows = [{**table[4], "response": "<think>\n</think>\n\n<answer>no</answer>"}, table[0], table[35]]
    batch = collator(rows)
    encoded = [collator.encoder(as_example(item)) for item in rows]
    assert [len(item.images) for item in encoded] == [1, 2, 2]
    grids = batch["image_grid_thw"].tolist()
    assert [(7 * w, 7 * h) for _, h, w in grids] == [image.size for item in encoded for image in item.images]
    assert batch["pixel_values"].shape[0] == sum(h * w for _, h, w in grids)
    tokens = (batch["input_ids"] == renderer.ids["<|image_pad|>"]).sum(1).tolist()
    features = [image_token_count(*image.size, renderer.contract) for item in encoded for image in item.images]
    assert tokens == [features[0], sum(features[1:3]), sum(features[3:])]
    assert (batch["mm_token_type_ids"] == (batch["input_ids"] == renderer.ids["<|image_pad|>"])).all()
    alone = collator([rows[1]])["pixel_values"]
    start = sum(h * w for _, h, w in grids[:1])
    assert (batch["pixel_values"][start : start + len(alone)] == alone).all()


def test_a_row_whose_tokens_and_images_differ_is_named(renderer):
    image = Image.new("RGB", (56, 56))
    ids = [*renderer.image_block(image.size), *renderer.image_block(image.size)]
    lost = EncodedExample(ids, ids, (image,), "line 3, QnA[1]")
    with pytest.raises(ValueError, match=r"line 3, QnA\[1\]: 32 image tokens, but 1 images with 16 features"):
        model_inputs([EncodedExample(ids, ids, (image, image), "line 1, QnA[0]"), lost], renderer)


def test_validation_rows_do_not_get_the_training_rows_of_the_same_image_and_line(drawn):
    """One encoder serves both files; a row of each may have the same picture on the same line."""
    table, collator = drawn
    training = as_example(table[0])
    validation = replace(training, question="Which stripes are on the blue circle?", response=SOUND)
    encoded = [collator.encoder(example) for example in (training, validation, training)]
    assert encoded[0].input_ids != encoded[1].input_ids
    assert encoded[0] is encoded[2]


def test_prepared_examples_are_kept_up_to_the_given_memory(drawn):
    table, collator = drawn
    encoder = ExampleEncoder(collator.encoder.renderer, collator.encoder.data, cache_bytes=60_000)
    for item in table:
        encoder(as_example(item))
        assert 0 <= encoder._size <= 60_000
        assert encoder._size == sum(map(sft_data._bytes, encoder._kept.values()))
    assert 1 < len(encoder._kept) < len(table)
    assert as_example(table[35]) in encoder._kept and as_example(table[0]) not in encoder._kept


def test_a_base_folder_holds_its_images_in(images):
    assert load_image("inner.jpg", images).size == load_image(images / "photo.jpg").size == (200, 160)
    for path in ("../outside.jpg", "link.jpg", str(images.parent / "outside.jpg")):
        with pytest.raises(ValueError, match=re.escape(f"image path {path} leaves the base folder")):
            load_image(path, images)
