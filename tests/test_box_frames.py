"""Frames of boxes: a file's frame is told from its boxes, what cannot be told is called ambiguous."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data_utils
from box_frames import FRAMES, convert_file, detect_frame, frame_extent, to_original_pixels
from crop_tool import Box, CropContract, rewrite_boxes, split_annotations

CONTRACT = CropContract()
COCO = [(640, 480), (480, 640), (500, 375), (427, 640), (612, 612)]
PHOTOS = [(4000, 3000), (3000, 4000), (1920, 1080), (1280, 720)]
sizes = st.lists(st.tuples(st.integers(120, 4000), st.integers(120, 4000)), min_size=1, max_size=8)


def draw(count, images, frame, seed, margin=0.0):
    """Synthetic boxes as written in `frame`; objects at the border end there, as annotators draw them."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        size = rng.choice(images)
        extent = frame_extent(frame, size, CONTRACT)
        corners = []
        for side in extent:
            centre, half = rng.uniform(margin, 1 - margin), rng.uniform(0.025, 0.25)
            corners.append((max(margin, centre - half) * side, min(1 - margin, centre + half) * side))
        (x1, x2), (y1, y2) = corners
        numbers = (x1, y1, x2, y2)
        digits = 4 if frame == "normalized_1" else 0
        rows.append((Box(*(round(value, digits) for value in numbers)), size))
    return rows


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("images", [COCO, PHOTOS, [(640, 480)], [(320, 240), (200, 300)]], ids=str)
def test_the_frame_of_common_data_is_sure(frame, images):
    for seed in range(5):
        guess = detect_frame(draw(200, images, frame, seed), CONTRACT)
        assert (guess.frame, guess.verdict) == (frame, "sure")
        assert guess.is_foreign == (frame != "original")


@given(sizes, st.sampled_from(sorted(FRAMES)), st.integers(0, 10**6), st.integers(20, 150), st.sampled_from([0, 0.1]))
@settings(max_examples=150, deadline=None)
def test_no_other_frame_is_ever_called_sure(images, frame, seed, count, margin):
    guess = detect_frame(draw(count, images, frame, seed, margin), CONTRACT)
    if guess.verdict == "ambiguous":
        return
    # Another frame may only win where it says much the same about these images.
    for size in images:
        true, told = (frame_extent(name, size, CONTRACT) for name in (frame, guess.frame))
        if guess.frame != frame:
            assert told == pytest.approx(true, rel=0.06)


@given(sizes, st.integers(0, 10**6), st.integers(4, 60))
@settings(max_examples=60, deadline=None)
def test_shares_are_told_from_four_boxes(images, seed, count):
    guess = detect_frame(draw(count, images, "normalized_1", seed), CONTRACT)
    assert (guess.frame, guess.verdict) == ("normalized_1", "sure")


@pytest.mark.parametrize("count", [1, 30, 3000])
def test_boxes_that_keep_off_the_borders_of_like_images_are_ambiguous(count):
    """Original 640 x 480 and shown 588 x 448 hold the same boxes, however many there are."""
    guess = detect_frame(draw(count, [(640, 480)], "original", 0, margin=0.1), CONTRACT)
    assert guess.verdict == "ambiguous"
    assert {"original", "resized"} <= set(guess.possible)
    assert not guess.is_foreign
    assert "original pixels" in guess.describe()
    assert "resized pixels" in guess.describe()


def test_frames_that_are_one_for_these_images_count_once():
    rows = draw(50, [(1000, 1000)], "normalized_1000", 0)
    guess = detect_frame(rows, CONTRACT)
    assert (guess.frame, guess.verdict) == ("original", "sure")  # thousandths of 1000 pixels are pixels


def test_a_few_faulty_boxes_do_not_change_the_verdict():
    rows = draw(300, COCO, "resized", 1)
    rows[::100] = [(Box(0, 0, 5000, 5000), size) for _, size in rows[::100]]
    guess = detect_frame(rows, CONTRACT)
    assert (guess.frame, guess.verdict, guess.outside) == ("resized", "sure", 3)


def test_no_boxes_say_nothing():
    guess = detect_frame([], CONTRACT)
    assert (guess.verdict, guess.is_foreign, guess.describe()) == ("ambiguous", False, "no boxes")


@given(st.sampled_from(sorted(FRAMES)), st.tuples(st.integers(100, 4000), st.integers(100, 4000)), st.integers(0, 999))
def test_conversion_keeps_the_place_in_the_image(frame, size, seed):
    ((box, _),) = draw(1, [size], frame, seed)
    width, height = frame_extent(frame, size, CONTRACT)
    converted = to_original_pixels(box, frame, size, CONTRACT)
    assert converted.x2 / size[0] == pytest.approx(box.x2 / width)
    assert converted.y1 / size[1] == pytest.approx(box.y1 / height)


def test_rewritten_calls_keep_every_other_character():
    text = (
        "a {Crop the [big] dog [1, 2, 3, 4] } b <Crop x [5,6,7,8]> <tool_call> [9, 1, 12, 13]</tool_call> [1, 2, 3, 4]"
    )
    with pytest.raises(ValueError, match="malformed call"):
        rewrite_boxes(text, lambda box: box)
    text = text.replace("[big]", "big")
    doubled = rewrite_boxes(text, lambda box: box.scaled(2, 2))
    assert doubled == (
        "a {Crop the big dog [2, 4, 6, 8] } b <Crop x [10, 12, 14, 16]> <tool_call> [18, 2, 24, 26]</tool_call> "
        "[1, 2, 3, 4]"
    )


# ----------------------------------------------------------------------------------------------- the command


@pytest.fixture
def folder(tmp_path):
    """`train.jsonl` in shares, with the pixels that they came from, and two rows that cannot be converted."""
    Image.new("RGB", (200, 160)).save(tmp_path / "a.png")
    rng, lines = random.Random(0), []
    for _ in range(12):
        x, y = rng.uniform(0, 0.5), rng.uniform(0, 0.5)
        box = f"[{x:.4f}, {y:.4f}, {x + 0.4:.4f}, {y + 0.5:.4f}]"
        answer = f"<think>\nit – {{Crop it {box}}}\n</think>\n\n<answer>ja</answer>"
        lines.append(json.dumps({"image_path": "a.png", "id": 7, "QnA": [{"Q": "Is it?", "A3": answer, "A1": "x"}]}))
    lines += [lines[0].replace("a.png", "gone.png"), lines[0].replace("{Crop it", "{Crop it [")]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def run(folder, *flags):
    return data_utils.main(["--check", str(folder / "train.jsonl"), "--image_base_path", str(folder), *flags])


def test_check_warns_and_a_converted_file_is_sound(folder, capsys):
    target = folder / "pixels.jsonl"
    assert run(folder, "--convert_boxes", str(target)) == 1
    printed = capsys.readouterr().out
    assert "boxes in      shares, 0 to 1 (sure, 99.9%: 0 of 12 boxes leave the image" in printed
    assert "WARNING: boxes must be in pixels of the original image" in printed
    assert "12 boxes converted from shares, 0 to 1 to original pixels" in printed
    assert "line 13: the size of its image is not known" in printed
    assert "line 14, QnA[0]: malformed call" in printed
    before, after = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (folder / "train.jsonl", target)
    )
    assert after[12:] == before[12:]
    for old, new in zip(before[:12], after[:12], strict=True):
        (old_box,), (new_box,) = (
            [part for part in split_annotations(row["QnA"][0].pop("A3")) if isinstance(part, Box)] for row in (old, new)
        )
        assert new_box.as_list() == pytest.approx(old_box.scaled(200, 160).as_list(), abs=0.01)
        assert old == new
    target.write_text("".join(line + "\n" for line in target.read_text().splitlines()[:12]))
    assert data_utils.main(["--check", str(target), "--image_base_path", str(folder)]) == 0
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--from_frame", "resized"], "--from_frame was given without --convert_boxes"),
        (["--convert_boxes", "{file}"], "the data file itself"),
        (
            ["--convert_boxes", "out.jsonl", "--from_frame", "original"],
            "is in original pixels already, as --from_frame says: nothing to convert\n",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused(folder, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run(folder, *(flag.format(file=folder / "train.jsonl") for flag in flags))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_without_boxes_has_nothing_to_convert(tmp_path, capsys):
    Image.new("RGB", (640, 480)).save(tmp_path / "a.png")
    row = {"image_path": "a.png", "QnA": [{"Q": "Is it?", "A3": "<think>I see.</think><answer>ja</answer>"}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit):
        run(tmp_path, "--convert_boxes", str(tmp_path / "out.jsonl"))
    assert "has no boxes: nothing to convert" in capsys.readouterr().err


def test_an_ambiguous_file_needs_the_frame_named(tmp_path, capsys):
    Image.new("RGB", (640, 480)).save(tmp_path / "a.png")
    answer = "<think>{Crop it [200, 150, 400, 300]}</think><answer>ja</answer>"
    row = {"image_path": "a.png", "QnA": [{"Q": "Is it?", "A3": answer}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    target = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit):
        run(tmp_path, "--convert_boxes", str(target))
    assert "name it with --from_frame" in capsys.readouterr().err
    assert not target.exists()
    assert run(tmp_path, "--convert_boxes", str(target), "--from_frame", "resized") == 0
    width, height = frame_extent("resized", (640, 480), CONTRACT)
    assert f"[{200 * 640 / width:.2f}, {150 * 480 / height:.2f}," in target.read_text()


def test_a_conversion_that_fails_leaves_the_earlier_file(folder, monkeypatch):
    target = folder / "out.jsonl"
    target.write_text("earlier")
    with pytest.raises(json.JSONDecodeError):
        (folder / "broken.jsonl").write_text("{")
        convert_file(str(folder / "broken.jsonl"), str(target), "resized", {1: (10, 10)}, "A3", CONTRACT)
    assert target.read_text() == "earlier"
    assert not list(folder.glob("*.tmp"))
