"""Each benchmark is read from the files and columns in which it is distributed."""

from __future__ import annotations

import base64
import io
import json

import pandas
import pytest
from PIL import Image

from answer_rules import answer_accuracy
from benchmark_data import read_questions
from config import SettingsError
from crop_tool import Box


def picture(path, size=(60, 40), color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def encoded(color, size=(60, 40)) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


# ------------------------------------------------------------------------------------------------ our JSONL


def test_jsonl_questions_carry_answer_boxes_and_category(tmp_path):
    picture(tmp_path / "a.png")
    response = "<think>\nI look {Crop it [1, 2, 30, 40]}.\n</think>\n\n<answer>a cup</answer>"
    rows = [
        {"image_path": "a.png", "category": "things", "QnA": [{"Q": "What?", "A3": response}]},
        {
            "image_path": "a.png",
            "QnA": [{"Q": "Where?", "A3": "left", "category": "places"}, {"Q": "Who?", "A3": "me"}],
        },
    ]
    (tmp_path / "set.jsonl").write_text("\ufeff" + "\r\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = read_questions(tmp_path / "set.jsonl")
    assert [(q.name, q.text, q.answers, q.category) for q in found.questions] == [
        ("line 1, QnA[0]", "What?", ("a cup",), "things"),
        ("line 3, QnA[0]", "Where?", ("left",), "places"),
        ("line 3, QnA[1]", "Who?", ("me",), ""),
    ]
    assert found.questions[0].boxes == (Box(1, 2, 30, 40),)
    assert found.questions[0].load().size == (60, 40)


def test_faulty_jsonl_rows_are_named_and_left_out(tmp_path):
    good = {"image_path": "a.png", "QnA": [{"Q": "What?", "A3": "a cup"}]}
    lines = [
        b"{",
        b"\xff\xfe",
        b'{"image_path": "a.png"}',
        b"[1]",
        json.dumps({**good, "QnA": [{"Q": "What?"}]}).encode(),
        json.dumps({**good, "QnA": [{"Q": "What?", "A3": "<think>no end {Crop x [1, 2, 3]}</think>"}]}).encode(),
        json.dumps({**good, "QnA": ["What?", None]}).encode(),
        json.dumps({**good, "QnA": [{"Q": "half a pair \ud800", "A3": "x"}, {"Q": None, "A3": "x"}]}).encode(),
        json.dumps(good).encode(),
    ]
    (tmp_path / "set.jsonl").write_bytes(b"\n".join(lines))
    found = read_questions(tmp_path / "set.jsonl")
    assert [question.name for question in found.questions] == ["line 9, QnA[0]"]
    assert [fault.partition(":")[0] for fault in found.faults] == [
        *("line 1", "line 2", "line 3", "line 4"),
        *("line 5, QnA[0]", "line 6, QnA[0]", "line 7, QnA[0]", "line 7, QnA[1]"),
        *("line 8, QnA[0]", "line 8, QnA[1]"),
    ]


def test_an_image_outside_the_base_folder_is_not_read(tmp_path):
    picture(tmp_path / "secret.png")
    (tmp_path / "base").mkdir()
    row = {"image_path": "../secret.png", "QnA": [{"Q": "What?", "A3": "x"}]}
    (tmp_path / "set.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="leaves the base folder"):
        read_questions(tmp_path / "set.jsonl", tmp_path / "base").questions[0].load()


def test_another_answer_changes_the_digest_and_a_limit_draws_evenly(tmp_path):
    def write(answer):
        entries = [{"Q": f"{n}?", "A3": answer} for n in range(10)]
        (tmp_path / "set.jsonl").write_text(json.dumps({"image_path": "a.png", "QnA": entries}))
        return read_questions(tmp_path / "set.jsonl")

    one, two = write("x"), write("y")
    assert one.digest() != two.digest()
    assert two.digest() == write("y").digest()
    assert [question.text for question in one.limited(4).questions] == ["0?", "2?", "5?", "7?"]
    assert one.limited(0) is one.limited(99) is one


# -------------------------------------------------------------------------------------------------- V*Bench


@pytest.fixture
def vstar(tmp_path):
    """Two questions; keys and units of the per-image files as in the published set: boxes are x, y, width, height."""
    picture(tmp_path / "direct_attributes/sa_4690.jpg", (2000, 1500))
    notes = {
        "target_object": ["glove"],
        "bbox": [[564, 142, 155, 157]],
        "question": "What is the material of the glove?",
        "options": ["rubber", "cotton", "kevlar", "leather"],
    }
    (tmp_path / "direct_attributes/sa_4690.json").write_text(json.dumps(notes))
    picture(tmp_path / "relative_position/sa_1.jpg")
    notes = {
        "target_object": ["dog", "car"],
        "bbox": [[1, 2, 3, 4], [10, 20, 5, 5]],
        "question": "Is the dog left or right of the car?",
        "options": ["The dog is left.", "The dog is right."],
    }
    (tmp_path / "relative_position/sa_1.json").write_text(json.dumps(notes))
    return tmp_path


def test_vstar_without_the_official_order_shuffles_by_name(vstar):
    found = read_questions(vstar)
    glove, dog = found.questions
    assert (found.kind, glove.name, glove.category) == ("V*Bench", "direct_attributes/sa_4690.jpg", "direct_attributes")
    assert glove.boxes == (Box(564, 142, 719, 299),)
    assert glove.load().size == (2000, 1500)
    letter, _, option = glove.answers[0].partition(". ")
    assert option == "rubber"
    assert f"\n{letter}. rubber\n" in glove.text
    assert len(dog.boxes) == 2
    assert answer_accuracy("the dog is left", dog.answers[0]) == 1.0
    assert read_questions(vstar).digest() == found.digest(), "the same order each time"


def test_vstar_takes_the_official_order_of_options(vstar):
    text = (
        "What is the material of the glove?\n(A) leather\n(B) rubber\n(C) cotton\n(D) kevlar\nAnswer with the letter."
    )
    row = {"image": "direct_attributes/sa_4690.jpg", "text": text, "label": "B", "question_id": "0"}
    (vstar / "test_questions.jsonl").write_text(json.dumps({**row, "category": "direct_attributes"}) + "\n")
    glove = read_questions(vstar).questions[0]
    assert (glove.text, glove.answers) == (text, ("B. rubber",))


def test_a_vstar_image_without_its_json_is_named(vstar):
    (vstar / "relative_position/sa_1.json").unlink()
    found = read_questions(vstar)
    assert len(found.questions) == 1
    assert found.faults[0].startswith("relative_position/sa_1.jpg: FileNotFoundError")


# ------------------------------------------------------------------------------------------------- HR-Bench


@pytest.fixture
def hr_bench(tmp_path):
    """One question asked four times with its options moved on, and another, with a quote and a tab in it."""
    rows, options = [], ["red", "green", "blue", "black"]
    for cycle in range(4):
        shown = options[cycle:] + options[:cycle]
        rows.append(
            {
                "index": cycle,
                "question": "Which colour?",
                "answer": "ABCD"[shown.index("red")],
                "category": "single",
                **dict(zip("ABCD", shown, strict=True)),
                "cycle_category": f"cycle_{cycle}",
                "image": encoded("red"),
            }
        )
    rows.append(
        {
            "index": 4,
            "question": 'What does "the\tsign"\nsay?',
            "answer": "A",
            "category": "cross",
            **{"A": 'say "no"', "B": "two", "C": "three", "D": "four"},
            "cycle_category": "cycle_0",
            "image": encoded("blue", (50, 50)),
        }
    )
    pandas.DataFrame(rows).to_csv(tmp_path / "hr_bench_4k.tsv", sep="\t", index=False)
    return tmp_path


def test_hr_bench_rotations_are_one_group_and_images_come_from_their_rows(hr_bench):
    found = read_questions(hr_bench)
    assert found.kind == "HR-Bench 4K"
    assert [q.answers[0] for q in found.questions] == ["A. red", "D. red", "C. red", "B. red", 'A. say "no"']
    assert [q.category for q in found.questions] == ["single"] * 4 + ["cross"]
    assert len({q.group for q in found.questions[:4]}) == 1
    assert found.questions[4].group != found.questions[0].group
    assert found.questions[1].text.startswith("Which colour?\nA. green\nB. blue\nC. black\nD. red\n")
    assert found.questions[4].text.startswith('What does "the\tsign"\nsay?\nA. say "no"\n')
    assert found.questions[4].load().size == (50, 50)
    assert found.questions[2].load().getpixel((0, 0)) == (255, 0, 0)


def test_both_tables_of_hr_bench_are_kept_apart(hr_bench):
    (hr_bench / "hr_bench_8k.tsv").write_bytes((hr_bench / "hr_bench_4k.tsv").read_bytes())
    found = read_questions(hr_bench)
    assert len({question.name for question in found.questions}) == 10
    assert {q.category for q in found.questions} == {
        f"hr_bench_{size}/{name}" for size in ("4k", "8k") for name in ("single", "cross")
    }
    assert len(read_questions(hr_bench / "hr_bench_8k.tsv").questions) == 5


def test_a_table_that_is_no_hr_bench_is_refused(tmp_path):
    (tmp_path / "hr_bench_4k.tsv").write_text("index\tquestion\n1\twhat\n")
    with pytest.raises(SettingsError, match="has no column answer, category, cycle_category, image"):
        read_questions(tmp_path)


def test_a_broken_image_of_hr_bench_is_named(hr_bench):
    table = hr_bench / "hr_bench_4k.tsv"
    table.write_text(table.read_text().replace(encoded("blue", (50, 50)), "bm90IGFuIGltYWdl"))
    with pytest.raises(ValueError, match="unreadable image of hr_bench_4k:4"):
        read_questions(hr_bench).questions[4].load()


# -------------------------------------------------------------------------------------- TextVQA, ScienceQA


def test_textvqa(tmp_path):
    item = {"question_id": 34602, "image_id": "003a8ae2ef43b901", "question": "what is the brand?"}
    data = [{**item, "answers": ["dakota"] * 9 + ["nous"], "image_classes": ["Camera"], "set_name": "val"}]
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"dataset_type": "val", "data": [*data, item]}))
    picture(tmp_path / "train_images/003a8ae2ef43b901.jpg")
    found = read_questions(tmp_path)
    (question,) = found.questions
    assert (found.kind, question.name, len(question.answers)) == ("TextVQA", "34602", 10)
    assert question.load().size == (60, 40)
    assert found.faults == ("a question of TextVQA_0.5.1_val.json: KeyError: 'answers'",)


def test_textvqa_without_its_images(tmp_path):
    (tmp_path / "TextVQA_0.5.1_val.json").write_text("{}")
    with pytest.raises(SettingsError, match="there is no folder train_images"):
        read_questions(tmp_path)


@pytest.fixture
def science_qa(tmp_path):
    problem = {
        "question": "Which state is north?",
        "choices": ["Ohio", "Texas"],
        "answer": 0,
        "hint": "Look at the map.",
    }
    shared = {"subject": "social science", "task": "closed choice", "grade": "grade2"}
    problems = {
        "5": {**problem, **shared, "image": "image.png", "split": "test"},
        "6": {**problem, **shared, "image": None, "split": "test"},
        "7": {**problem, **shared, "image": "image.png", "split": "train", "answer": 1, "hint": ""},
    }
    folder = tmp_path / "data/scienceqa"
    folder.mkdir(parents=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["7"], "test": ["5", "6"], "minitest": ["5"]}))
    picture(folder / "images/test/5/image.png")
    picture(folder / "images/train/7/image.png")
    return tmp_path


def test_science_qa_asks_the_questions_with_an_image(science_qa):
    found = read_questions(science_qa)
    (question,) = found.questions
    assert (found.kind, question.name, question.category) == ("ScienceQA test", "5", "social science")
    assert question.text.startswith("Look at the map.\nWhich state is north?\nA. Ohio\nB. Texas\n")
    assert question.answers == ("A. Ohio",)
    assert question.load().size == (60, 40)
    assert found.faults == ("1 questions without an image were left out",)
    (other,) = read_questions(science_qa, split="train").questions
    assert other.answers == ("B. Texas",)
    assert other.text.startswith("Which state")
    with pytest.raises(SettingsError, match="split is 'val', but ScienceQA has: train, test, minitest"):
        read_questions(science_qa, split="val")


# --------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "data is .*missing, but there is no such file or folder"),
        ("empty", r"which holds none of: direct_attributes.*hr_bench_4k.tsv.*TextVQA_0.5.1_val.json.*problems.json"),
        ("list.txt", r"a file must be a .jsonl, or HR-Bench's .tsv"),
        ("nothing.jsonl", "JSONL: no question could be read: there is none"),
        ("text.jsonl", "line 1: ValueError: 'QnA' must be a list, this is 'abc'"),
        ("texts.jsonl", r"line 1, QnA\[0\]: ValueError: a QnA entry must be an object, this is 'abc'"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").touch()
    (tmp_path / "nothing.jsonl").touch()
    for given, entries in (("text.jsonl", "abc"), ("texts.jsonl", ["abc"])):
        (tmp_path / given).write_text(json.dumps({"image_path": "a.png", "QnA": entries}))
    with pytest.raises(SettingsError, match=message):
        read_questions(tmp_path / name)
