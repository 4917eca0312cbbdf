"""What shows the data: the contact sheet and the tokens of one example say what training sees, and escape all text."""

import base64
import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from PIL import Image

import data_utils
from conversation import IGNORED, EncodedExample, load_image
from data_sheet import MOST_SHOWN, choose_rows, fault_kind
from token_view import as_html, as_text, token_runs

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.text = [], [], 0, ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def encoded(renderer, data_folder):
    """(example, encoded) of the drawn world's first sound row with a call."""
    row = json.loads((data_folder / "train.jsonl").read_text().splitlines()[0])
    from conversation import Example

    example = Example(1, 0, row["image_path"], row["QnA"][0]["Q"], row["QnA"][0]["A3"])
    return renderer.encode(example, load_image(example.image_path, data_folder))


# ------------------------------------------------------------------------------------------ token by token


def test_runs_are_the_labels_of_training(encoded, renderer):
    runs = token_runs(encoded, renderer)
    kinds = [run.kind for run in runs for _ in range(run.tokens)]
    assert [kind == "trained" for kind in kinds] == [label != IGNORED for label in encoded.labels]
    assert [run.image for run in runs if run.kind == "image"] == list(encoded.images)
    assert [run.kind for run in runs][:3] == ["prompt", "image", "prompt"]
    assert {"trained", "masked"} <= set(kinds)
    text = "".join(run.text for run in runs if run.kind == "trained")
    assert text == renderer.tokenizer.decode([label for label in encoded.labels if label != IGNORED])
    for run in runs:
        assert run.kind == "image" or sum(count for _, count in run.pieces) == run.tokens


def test_a_changed_label_shows(encoded, renderer):
    """The view must follow the labels even where they are wrong: that is what it is for."""
    wrong = EncodedExample(encoded.input_ids, [IGNORED] * len(encoded.labels), encoded.images, "wrong")
    assert {run.kind for run in token_runs(wrong, renderer)} == {"prompt", "image"}
    place = next(place for place, label in enumerate(encoded.labels) if label != IGNORED) - 1
    labels = list(encoded.labels)
    labels[place] = encoded.input_ids[place]
    leaky = EncodedExample(encoded.input_ids, labels, encoded.images, "leaky")
    trained = sum(run.tokens for run in token_runs(leaky, renderer) if run.kind == "trained")
    assert trained == sum(label != IGNORED for label in encoded.labels) + 1


def test_terminal_text_with_and_without_colours(encoded, renderer):
    plain, coloured = (as_text(encoded, renderer, colours) for colours in (False, True))
    assert "\x1b" not in plain
    assert coloured.count("\x1b[30;42m") > 1
    pads = [run.tokens for run in token_runs(encoded, renderer) if run.kind == "image"]
    assert f"[crop 1, {encoded.images[1].width} x {encoded.images[1].height}: {pads[1]} x <|image_pad|>]" in plain
    trained = sum(label != IGNORED for label in encoded.labels)
    assert f"{len(encoded.labels)} tokens: " in plain and f"trained {trained}," in plain
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured).count("<|image_pad|>") == len(pads)


def test_page_shows_each_image_once_and_all_tokens(encoded, renderer):
    page = Tags(as_html(encoded, renderer))
    assert page.tags.count("img") == len(encoded.images)
    assert "script" not in page.tags
    classes = [value for name, value in page.attributes if name == "class"]
    assert classes.count("trained") == sum(
        len(run.pieces) for run in token_runs(encoded, renderer) if run.kind == "trained"
    )


def test_show_of_the_command(base_folder, data_folder, tmp_path, capsys):
    flags = ["--check", str(data_folder / "train.jsonl"), "--image_base_path", str(data_folder)]
    flags += ["--model_name", str(base_folder)]
    assert data_utils.main([*flags, "--show", "2:1"]) == 0
    assert capsys.readouterr().out.startswith("line 2, QnA[1]\n")
    assert data_utils.main([*flags, "--show", "2:1", "--html", str(tmp_path / "one.html")]) == 0
    assert "line 2, QnA[1]" in (tmp_path / "one.html").read_text()
    for which, message in (
        ("0", "must be a line from 1"),
        ("999", "no such line"),
        ("1:99", "QnA entries"),
        ("x", "line"),
    ):
        with pytest.raises(SystemExit):
            data_utils.main([*flags, "--show", which])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        data_utils.main([*flags[:-2], "--show", "1"])
    assert "give --model_name" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- contact sheet


@pytest.fixture
def sheet(tmp_path):
    """The page of a file with sound, faulty and hostile rows, and its printed report."""
    Image.effect_noise((320, 200), 40).convert("RGB").save(tmp_path / "a.jpg")
    answer = "<think>{Crop it [10, 20, 110, 120]} and {Crop it [200, 50, 300, 150]}</think><answer>ja</answer>"

    def line(question, answer=answer, image="a.jpg"):
        return json.dumps({"image_path": image, "QnA": [{"Q": question, "A3": answer}]})

    lines = [line("sound?"), line(EVIL), line("gone?", image=f"{EVIL}.jpg"), line("evil answer?", answer + EVIL)]
    lines.append(line("small?", answer.replace("110, 120", "12, 22")))
    lines.append(line("inverted?", answer.replace("10, 20, 110, 120", "110, 120, 10, 20")))
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    page = tmp_path / "sheet.html"
    flags = ["--check", str(tmp_path / "train.jsonl"), "--image_base_path", str(tmp_path), "--html", str(page)]
    assert data_utils.main(flags) == 1
    return page.read_text()


def test_sheet_shows_boxes_and_puts_faulty_rows_first(sheet):
    page = Tags(sheet)
    cards = re.findall(r'<article class="card( bad)?" data-kind="([^"]*)" data-calls="(\d)"', sheet)
    assert [bad for bad, _, _ in cards] == [" bad"] * 4 + [""] * 2
    assert cards[2:] == [(" bad", "tiny box", "2"), (" bad", "inverted box", "2"), ("", "", "2"), ("", "", "2")]
    assert 'width="-' not in sheet, "the inverted box is drawn too: a browser draws none of a negative size"
    assert "tiny box [10, 20, 12, 22]: 2 x 2 px" in page.text
    assert page.text.count("line 1, QnA[0]") == 1
    assert 'viewBox="0 0 320 200"' in sheet and 'x="200.0" y="50.0" width="100.0" height="100.0"' in sheet
    assert "6 of 6 entries are on this page, 4 of the file are faulty" in page.text
    assert "sample" not in page.text
    gone = sheet[sheet.index('data-kind="missing image') :].partition("</article>")[0]
    assert "<h3>" not in gone  # a heading with nothing under it


def test_sheet_escapes_all_text_and_runs_no_script_but_its_own(sheet):
    page = Tags(sheet)
    assert page.tags.count("script") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert" not in sheet
    script = re.search(r"<script>(.*)</script>", sheet, re.DOTALL).group(1)
    import hashlib

    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in sheet
    assert "https:" not in sheet and "http:" not in sheet


def test_choice_of_rows_keeps_faults_first_and_spreads_the_rest():
    faults = ["tiny box" if number % 1000 == 7 else "" for number in range(10_000)]
    chosen = choose_rows(faults)
    assert len(chosen) == len(set(chosen)) == MOST_SHOWN
    assert chosen[:10] == list(range(7, 10_000, 1000))
    assert max(right - left for left, right in pairwise(chosen[10:])) < 60
    bad = choose_rows(["x"] * 9000 + [""] * 1000)
    assert sum(number < 9000 for number in bad) == 300 and len(bad) == MOST_SHOWN
    assert choose_rows(["", "x"]) == [1, 0]
    assert fault_kind("bad JSON: no") == "bad JSON" and fault_kind("") == ""


def test_a_long_file_says_that_it_is_sampled(tmp_path):
    from data_sheet import sheet_html

    row = {"line": 1, "entry": 0, "image_path": "a", "question": "q", "response": "r", "fault": ""}
    page = sheet_html("t", [row] * 3, [""] * 10_000, lambda path: Image.new("RGB", (40, 30)), "no boxes")
    assert "3 of 10000 entries are on this page" in page and "It is a sample" in page


def test_ten_thousand_rows_give_a_page_of_a_few_megabytes(tmp_path):
    from data_sheet import sheet_html

    noise = Image.effect_noise((1280, 960), 60).convert("RGB")
    row = {"line": 1, "entry": 0, "image_path": "a", "question": "q" * 80, "response": "r" * 600, "fault": ""}
    page = sheet_html("t", [row] * 20, [""] * 10_000, lambda path: noise, "no boxes")
    assert len(page) / 20 * MOST_SHOWN < 60e6  # noise is the worst that JPEG can meet
