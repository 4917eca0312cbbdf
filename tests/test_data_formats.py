"""Each format's true layout, written by hand, becomes our row; and our row keeps in each what that format can carry."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from config import ConversionConfig, SettingsError
from conversation import load_image
from crop_tool import Box, parse_box, split_annotations
from data_formats import BESIDE_BOX, FORMATS, SYSTEM, TURNS, UNITED, parse_columns
from format_parts import (
    CALLS,
    CALLS_ALONE,
    ENTRY_KEYS,
    NO_REASONING,
    REASONING,
    ROW_KEYS,
    SPLIT,
    TAGS,
    WORDS,
    Conversion,
    check_row,
    image_size,
    qwen_size,
)

THOUGHTS = "<think>\nI look {Crop the dog [12.5, 8, 60, 44.25]} and it is brown.\n</think>\n\n<answer>brown</answer>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    Image.new("RGB", (100, 60), "red").save(folder / "wide.png")
    Image.new("RGB", (80, 40), "blue").save(folder / "flat.jpg")
    Image.new("RGB", (30, 90), "green").save(folder / "tall.png")
    return folder


@pytest.fixture
def conversion(folder):
    return Conversion(ConversionConfig(image_folder=str(folder)))


def ours(response, path="wide.png", question="What colour?", **others):
    return {"image_path": path, "QnA": [{"Q": question, "A3": response}], **others}


def read(kind, row, conversion):
    return check_row(FORMATS[kind].read(row, conversion), conversion)


def write(kind, row, conversion):
    return json.loads(json.dumps(FORMATS[kind].write(check_row(row, conversion), conversion)))


# ------------------------------------------------------------------------------------------------- VLIR


def vlir(**changes):
    texts = ['<think> I look closer.\n{"bbox_2d": [56, 28, 112, 56]}', "It is red.\n</think>\n<answer>A</answer>"]
    row = {"image_path": "wide.png", "question": "Which?", "response_list": texts, "img_crop_list": ["crops/1.png"]}
    return row | changes


def test_vlir_boxes_are_mapped_from_what_qwens_processor_makes_of_the_image(conversion):
    assert qwen_size((100, 60), 1605632) == (112, 56)
    row = read("vlir", vlir(source="textvqa"), conversion)
    assert row == {
        "image_path": "wide.png",
        "QnA": [
            {
                "Q": "Which?",
                "A3": "<think> I look closer.\n{Crop region [50, 30, 100, 60]}It is red.\n</think>\n<answer>A</answer>",
            }
        ],
        "source": "textvqa",
    }
    assert conversion.lost == set()


@pytest.mark.parametrize(
    ("frame", "box"), [("original", [56, 28, 112, 56]), ("normalized_1000", [5.6, 1.68, 11.2, 3.36])]
)
def test_vlir_in_another_frame(folder, frame, box):
    conversion = Conversion(ConversionConfig(image_folder=str(folder), box_frame=frame))
    response = read("vlir", vlir(), conversion)["QnA"][0]["A3"]
    assert split_annotations(response)[1] == Box(*box)


def test_vlir_fences_labels_and_missing_think_tags_are_read(conversion):
    texts = ['<think> Look.\n```json\n{"bbox_2d": [0, 0, 56, 28], "label": "cat"}\n```\n', "\n<answer>A</answer>\n"]
    response = read("vlir", vlir(response_list=texts), conversion)["QnA"][0]["A3"]
    assert response == "<think> Look.\n{Crop region [0, 0, 50, 30]}</think>\n\n<answer>A</answer>"
    assert conversion.lost == {TAGS}


def test_vlir_is_written_with_whole_boxes_and_crop_files(conversion, folder):
    (row,) = write("vlir", ours(THOUGHTS, image_id=7), conversion)
    crop = row.pop("img_crop_list")
    assert row == {
        "image_path": "wide.png",
        "question": "What colour?",
        "response_list": [
            '<think>\nI look {"bbox_2d": [14, 7, 67, 41]}',
            " and it is brown.\n</think>\n\n<answer>brown</answer>",
        ],
        "image_id": 7,
    }
    assert Image.open(folder / crop[0]).size == (48, 37)
    assert conversion.lost == {WORDS}


# -------------------------------------------------------------------------------------------- Visual-CoT


def visual_cot(shares="[0.250, 0.375, 0.750, 0.625]", pixels="[20, 10, 60, 30]", **changes):
    request = " Please provide the bounding box coordinate of the region that can help you answer the question better."
    said = [("human", f"<image>\nWhat is there?{request}"), ("gpt", shares), ("human", "<image>"), ("gpt", "A dog")]
    turns = [{"from": who, "value": text} for who, text in said]
    row = {"dataset": "v7w", "split": "train", "question_id": 3, "image": ["flat.jpg", f"flat.jpg###{pixels}"]}
    return row | {"conversations": turns} | changes


def test_visual_cot_takes_the_pixels_behind_the_path(conversion):
    row = read("visual_cot", visual_cot(shares="[0.1, 0.1, 0.2, 0.2]"), conversion)
    response = "<think>\n{Crop region [20, 10, 60, 30]}\n</think>\n\n<answer>A dog</answer>"
    assert row == ours(response, "flat.jpg", "What is there?", dataset="v7w", split="train", question_id=3)
    assert conversion.lost == {CALLS_ALONE}


def test_visual_cot_says_where_words_beside_the_box_are_lost(conversion):
    read("visual_cot", visual_cot(shares="I look left: [0.1, 0.1, 0.2, 0.2]"), conversion)
    assert BESIDE_BOX in conversion.lost


@pytest.mark.parametrize("pixels", ["", "[0.25, 0.375, 0.75, 0.625]"])
def test_visual_cot_shares_are_those_of_the_padded_square(conversion, pixels):
    """80 x 40 is padded to 80 x 80 with 20 pixels above: y = 0.375 * 80 - 20."""
    response = read("visual_cot", visual_cot(pixels=pixels), conversion)["QnA"][0]["A3"]
    assert split_annotations(response)[1] == Box(20, 10, 60, 30)


def test_visual_cot_is_written_as_its_own_tool_does(conversion):
    response = "<think>\n{Crop region [20, 10, 60, 30]}\n</think>\n\n<answer>A dog</answer>"
    row = ours(response, "flat.jpg", "What is there?", dataset="v7w", split="train", question_id=3)
    assert write("visual_cot", row, conversion) == [visual_cot()]
    assert conversion.lost == set()


def test_visual_cot_of_a_tall_image_pads_left_and_right(conversion):
    response = "<think>\n{Crop region [0, 45, 30, 90]}\n</think>\n\n<answer>x</answer>"
    (row,) = write("visual_cot", ours(response, "tall.png"), conversion)
    assert row["conversations"][1]["value"] == "[0.333, 0.500, 0.667, 1.000]"


def test_visual_cot_unites_boxes_clamps_them_and_says_what_is_lost(conversion):
    response = "<think>a {Crop dog [-5, 10, 20, 20]} b {Crop [40, 5, 60, 30]}</think><answer>x</answer>"
    (row,) = write("visual_cot", ours(response, "flat.jpg"), conversion)
    assert row["image"] == ["flat.jpg", "flat.jpg###[0, 5, 60, 30]"]
    assert conversion.lost == {UNITED, "had a box beyond the image, which was clamped", WORDS, REASONING}


def test_visual_cot_without_a_box_is_a_plain_conversation(conversion):
    (row,) = write("visual_cot", ours("<think>\n</think>\n\n<answer>x</answer>"), conversion)
    assert (row["image"], len(row["conversations"])) == ("wide.png", 2)
    assert read("visual_cot", row, conversion) == ours("<think>\n</think>\n\n<answer>x</answer>")


# ----------------------------------------------------------------------------------------- conversations


def test_llava_turns_become_questions(conversion):
    row = {
        "id": "000000033471",
        "image": "wide.png",
        "conversations": [
            {"from": "human", "value": "What colour?\n<image>"},
            {"from": "gpt", "value": THOUGHTS},
            {"from": "human", "value": "And the sky?"},
            {"from": "gpt", "value": "Blue."},
        ],
    }
    made = read("llava", row, conversion)
    assert made["id"] == "000000033471"
    assert made["QnA"] == [
        {"Q": "What colour?", "A3": THOUGHTS},
        {"Q": "And the sky?", "A3": "<think>\n</think>\n\n<answer>Blue.</answer>"},
    ]
    assert conversion.lost == {TURNS, NO_REASONING}


def test_messages_with_a_system_prompt_and_lists_of_parts(conversion):
    content = [{"type": "image"}, {"type": "text", "text": "Who are "}, {"type": "text", "text": "they?"}]
    said = [("system", "Be brief."), ("user", content), ("assistant", "Kane and Gretzka.")]
    row = {"messages": [{"role": who, "content": text} for who, text in said], "images": ["wide.png"]}
    made = read("messages", row, conversion)
    assert made == ours("<think>\n</think>\n\n<answer>Kane and Gretzka.</answer>", question="Who are they?")
    assert conversion.lost == {SYSTEM, NO_REASONING}


def test_llava_and_messages_as_written(conversion):
    (row,) = write("llava", ours(THOUGHTS), conversion)
    assert row == {
        "id": "0",
        "image": "wide.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat colour?"},
            {"from": "gpt", "value": THOUGHTS},
        ],
    }
    (row,) = write("messages", ours(THOUGHTS, image="taken"), conversion)
    assert row == {
        "messages": [
            {"role": "user", "content": "<image>\nWhat colour?"},
            {"role": "assistant", "content": THOUGHTS},
        ],
        "images": ["wide.png"],
        "image": "taken",
    }
    assert conversion.lost == set()
    (row,) = write("llava", ours(THOUGHTS, image="taken"), conversion)
    assert row["image"] == "wide.png"
    assert conversion.lost == {ROW_KEYS}


# ---------------------------------------------------------------------------------------- DeepEyes and hub


def picture_bytes(folder):
    return (folder / "flat.jpg").read_bytes()


def deepeyes(folder, **changes):
    tail = "\nThink first, call **image_zoom_in_tool** if needed, then answer. Format strictly as:  <think>...</think> "
    said = [("system", "You may call tools"), ("user", f"<image>\nWhat is there?{tail}")]
    return {
        "data_source": "vstar",
        "prompt": [{"role": who, "content": text} for who, text in said],
        "images": [{"bytes": picture_bytes(folder), "path": "../../etc/evil.jpg"}],
        "ability": "vl_chart",
        "env_name": "visual_toolbox_v2",
        "reward_model": {"ground_truth": "A dog", "style": "model"},
        "extra_info": {"question": f"<image>\nWhat is there?{tail}", "answer": "A dog", "index": "4"},
    } | changes


@pytest.mark.parametrize("about", [{}, {"extra_info": None}])
def test_deepeyes_is_a_question_and_an_answer(folder, tmp_path, about):
    conversion = Conversion(ConversionConfig(image_folder=str(tmp_path / "images")))
    row = read("deepeyes", deepeyes(folder, **about), conversion)
    name = row.pop("image_path")
    entry = {"Q": "What is there?", "A3": "<think>\n</think>\n\n<answer>A dog</answer>"}
    assert row == {"QnA": [entry], "data_source": "vstar", "ability": "vl_chart"}
    assert re.fullmatch(r"[0-9a-f]{32}\.jpg", name)
    assert [path.name for path in tmp_path.rglob("*.*")] == [name]
    assert (tmp_path / "images" / name).read_bytes() == picture_bytes(folder)
    assert conversion.lost == {NO_REASONING}


def test_deepeyes_says_what_it_drops(conversion, folder):
    two = ours(THOUGHTS, "flat.jpg", category="x")
    two["QnA"].append({"Q": "Which?", "A3": "<think></think><answer>B</answer>", "level": 2})
    first, second = FORMATS["deepeyes"].write(two, conversion)
    assert first["images"] == second["images"] == [{"bytes": picture_bytes(folder), "path": "flat.jpg"}]
    assert (first["reward_model"]["ground_truth"], second["extra_info"]["question"]) == ("brown", "Which?")
    assert conversion.lost == {REASONING, CALLS, SPLIT, ENTRY_KEYS, ROW_KEYS}


@pytest.mark.parametrize(
    ("cells", "form", "frame", "boxes"),
    [
        ([10, 5, 40, 30], None, None, [[10, 5, 40, 30]]),
        ("[[10, 5, 40, 30], [0, 0, 8, 8]]", None, None, [[10, 5, 40, 30], [0, 0, 8, 8]]),
        ([10, 5, 40, 30], "xywh", None, [[10, 5, 50, 35]]),
        ([[0.1, 0.5, 0.5, 1.0]], None, "normalized_1", [[8, 20, 40, 40]]),
        ([100, 500, 500, 1000], None, "normalized_1000", [[8, 20, 40, 40]]),
        ([], None, None, []),
        (None, None, None, []),
    ],
)
def test_hub_boxes(folder, cells, form, frame, boxes):
    config = ConversionConfig(image_folder=str(folder), box_form=form, box_frame=frame)
    columns = parse_columns("image=img,question=prompt,answer=solution,boxes=bbox")
    row = {"img": "flat.jpg", "prompt": "<image>How many?", "solution": 4, "bbox": cells, "more": 1}
    made = read("hub", row, Conversion(config, columns))
    calls = [part.as_list() for part in split_annotations(made["QnA"][0]["A3"]) if isinstance(part, Box)]
    assert calls == boxes
    assert (made["QnA"][0]["Q"], made["image_path"], set(made)) == ("How many?", "flat.jpg", {"image_path", "QnA"})


def test_a_column_that_is_not_there_stops_at_once(conversion):
    conversion.columns = parse_columns("image=img")
    with pytest.raises(SettingsError, match="no column img, but image, question, answer: name them with --columns"):
        read("hub", {"image": "a", "question": "b", "answer": "c"}, conversion)


@pytest.mark.parametrize("text", ["image", "picture=img", "image="])
def test_columns_that_cannot_be(text):
    with pytest.raises(SettingsError, match="it is a list like image=img"):
        parse_columns(text)


def test_a_set_cannot_point_at_files_outside_its_own_folder(folder, tmp_path):
    (tmp_path / "set").mkdir()
    row = {"image": {"bytes": None, "path": str(folder / "flat.jpg")}, "question": "q", "answer": "a"}
    for source, message in (
        (None, "must be a path, or an image's bytes"),
        (tmp_path / "set", "leaves the base folder"),
    ):
        conversion = Conversion(ConversionConfig(image_folder=str(tmp_path)), parse_columns(None), source)
        with pytest.raises(ValueError, match=message):
            read("hub", row, conversion)
    inside = Conversion(ConversionConfig(image_folder=str(tmp_path)), parse_columns(None), folder)
    assert (tmp_path / read("hub", row, inside)["image_path"]).read_bytes() == picture_bytes(folder)


# ------------------------------------------------------------------------------------------------- faults


def asked(ground_truth="a", **changes):
    row = {
        "reward_model": {"ground_truth": ground_truth},
        "extra_info": {"question": "q"},
        "prompt": [{"role": "system"}],
    }
    return row | changes


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("jsonl", {"image_path": "a", "QnA": []}, "missing key 'QnA'"),
        ("jsonl", ours("{Crop dog [1, 2, 3]}"), "malformed call"),
        ("jsonl", ours("<|image_pad|>"), "image_pad"),
        ("vlir", vlir(image_path="gone.png"), "missing image gone.png"),
        ("vlir", vlir(image_path="../wide.png"), "leaves the base folder"),
        ("vlir", vlir(img_crop_list=[]), "1 boxes, but img_crop_list has 0 crops"),
        ("vlir", vlir(response_list=['<think>{"bbox_2d": [1, 2, 3]}</think>']), "expected \\[x1, y1, x2, y2\\]"),
        ("vlir", vlir(response_list=['<think>{"bbox_2d": [1, 2, 3, 1e400]}']), "not finite"),
        ("vlir", vlir(response_list=['<think>{"bbox_2d": [1, 2, 3, true]}']), "expected four numbers"),
        ("vlir", vlir(response_list=['<think>{"bbox_2d": [1, 2, 3, os.x]}']), "it is not JSON"),
        ("vlir", vlir(response_list=['<think>{"label": "bbox_2d"}']), "malformed box None"),
        ("vlir", vlir(response_list=['<think>{"bbox_2d": [1, 2, 3, 4]']), "outside of a JSON object"),
        ("vlir", vlir(response_list=['{"bbox_2d": [1, 2, 3, 4]}']), "there are calls, but no <think>"),
        ("vlir", vlir(response_list=["<answer>A</answer> <answer>B</answer>"], img_crop_list=[]), "missing tags"),
        ("vlir", vlir(response_list=[1]), "must be a list of text"),
        ("visual_cot", visual_cot(shares="none", pixels="none"), "no box: neither"),
        ("visual_cot", visual_cot(image="flat.jpg"), "4 turns, but a row with 1 images has 2"),
        ("visual_cot", visual_cot(image=["a", "b", "c"]), "image must be a path, or"),
        ("llava", {"conversations": []}, "no images"),
        ("llava", {"image": ["a", "b"], "conversations": []}, "2 images"),
        ("llava", {"image": "a", "conversations": [{"from": "function_call"}]}, "a turn of 'function_call'"),
        ("llava", {"image": "a", "conversations": [{"from": "gpt", "value": "x"}]}, "question and answer, again"),
        ("messages", {"images": ["a"], "messages": [{"role": "user", "content": 3}]}, "a turn's text is int"),
        ("deepeyes", asked(ground_truth=["a"]), "must be text or a number"),
        ("deepeyes", asked(extra_info={}), "0 questions"),
        ("deepeyes", asked(images=[1, 2]), "2 images"),
        ("deepeyes", asked(images=[{"bytes": b"GIF"}]), "unreadable image of 3 bytes"),
    ],
)
def test_a_row_that_cannot_be_is_named(conversion, kind, row, message):
    with pytest.raises(ValueError, match=message):
        read(kind, row, conversion)


@pytest.mark.parametrize(
    ("kind", "response", "message"),
    [
        ("vlir", 'a "bbox_2d" b', "holds bbox_2d as text"),
        ("vlir", "<think>{Crop [200, 0, 300, 10]}</think><answer>a</answer>", "outside box"),
        ("visual_cot", "<think>{Crop [40, 0, 30, 10]}</think><answer>a</answer>", "inverted or outside box"),
        ("visual_cot", "<think>x</think>", "there is no <answer>"),
        ("llava", "see <image>", "stands for a picture"),
        ("deepeyes", "<think>x</think><answer></answer>", "there is no <answer>"),
    ],
)
def test_a_row_of_ours_that_a_format_cannot_hold_is_named(conversion, kind, response, message):
    with pytest.raises(ValueError, match=message):
        write(kind, ours(response), conversion)


def test_image_size_is_upright_as_load_image_has_it(tmp_path):
    image = Image.new("RGB", (50, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert image_size("turned.jpg", str(tmp_path)) == load_image("turned.jpg", tmp_path).size == (20, 50)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8) | st.just("wide.png")
    | st.sampled_from(["human", "gpt", "user", "<answer>a</answer>", '{"bbox_2d": [1, 2, 30, 40]}', "[0, 0, 9, 9]"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(
        ["from", "value", "role", "content", "bytes", "path", "ground_truth", "question", "type", "text"]
    ), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
KEYS = ["image_path", "QnA", "question", "response_list", "img_crop_list", "image", "images", "conversations"]
KEYS += ["messages", "prompt", "reward_model", "extra_info", "answer", "boxes"]


@settings(max_examples=300, deadline=None)
@given(row=st.dictionaries(st.sampled_from(KEYS), json_values))
def test_no_row_raises_anything_but_a_named_fault(folder, row):
    for kind in FORMATS:
        columns = {"image": "image", "question": "question", "answer": "answer", "boxes": "boxes"}
        try:
            read(kind, row, Conversion(ConversionConfig(image_folder=str(folder)), columns))
        except ValueError as error:
            assert str(error)


# -------------------------------------------------------------------------------------------- round trips


words = st.text(st.characters(exclude_characters="{}<>", exclude_categories=["Cs"]), max_size=20)
named = words.map(lambda text: text.replace("[", "").replace("]", "").replace("\n", " "))
numbers = st.floats(0, 20, allow_nan=False).map(lambda value: round(value, 2))
boxes = st.builds(lambda x, y, w, h: Box(x, y, round(x + w + 30, 2), round(y + h + 10, 2)), *[numbers] * 4)


@st.composite
def responses(draw):
    parts = [draw(words)]
    for box in draw(st.lists(boxes, max_size=3)):
        shown = ", ".join(f"{value:g}" for value in box.as_list())
        parts += [f"{{Crop {draw(named)} [{shown}]}}", draw(words)]
    answer = draw(words.filter(str.strip))
    return f"<think>{''.join(parts)}</think>\n\n<answer>{answer}</answer>"


questions = words.filter(lambda text: text.strip() == text != "")
rows = st.builds(
    lambda pairs, more: {"image_path": "wide.png", "QnA": [{"Q": q, "A3": a} for q, a in pairs], **more},
    st.lists(st.tuples(questions, responses()), min_size=1, max_size=3),
    st.dictionaries(st.sampled_from(["category", "image_id"]), st.text(st.characters(exclude_categories=["Cs"]))),
)


@settings(max_examples=60, deadline=None)
@given(row=rows)
def test_conversations_carry_everything(folder, row):
    conversion = Conversion(ConversionConfig(image_folder=str(folder)))
    for kind in ("llava", "messages"):
        (made,) = write(kind, row, conversion)
        back = read(kind, made, conversion)
        assert back == row | ({"id": "0"} if kind == "llava" else {})


@settings(max_examples=30, deadline=None)
@given(row=rows)
def test_vlir_carries_texts_and_boxes_to_a_pixel_of_its_frame(folder, row):
    conversion = Conversion(ConversionConfig(image_folder=str(folder)))
    made = [read("vlir", part, conversion) for part in write("vlir", row, conversion)]
    assert [back["QnA"][0]["Q"] for back in made] == [entry["Q"] for entry in row["QnA"]]
    for back, entry in zip(made, row["QnA"], strict=True):
        assert {key: back[key] for key in row if key != "QnA"} == {key: row[key] for key in row if key != "QnA"}
        was, now = split_annotations(entry["A3"]), split_annotations(back["QnA"][0]["A3"])
        assert now[0::2] == was[0::2]
        for before, after in zip(was[1::2], now[1::2], strict=True):
            clamped = [min(before.x1, 99), min(before.y1, 59), min(before.x2, 100), min(before.y2, 60)]
            assert after.as_list() == pytest.approx(clamped, abs=0.55)  # half a pixel of 112 x 56


@settings(max_examples=60, deadline=None)
@given(row=rows)
def test_visual_cot_carries_question_answer_and_the_boxes_border(folder, row):
    conversion = Conversion(ConversionConfig(image_folder=str(folder)))
    made = write("visual_cot", row, conversion)
    for part, entry in zip(made, row["QnA"], strict=True):
        back = read("visual_cot", part, conversion)
        was = [piece for piece in split_annotations(entry["A3"]) if isinstance(piece, Box)]
        now = [piece for piece in split_annotations(back["QnA"][0]["A3"]) if isinstance(piece, Box)]
        assert back["QnA"][0]["Q"] == entry["Q"]
        answer = entry["A3"].partition("<answer>")[2].removesuffix("</answer>").strip()
        assert back["QnA"][0]["A3"].endswith(f"<answer>{answer}</answer>")
        assert len(now) == bool(was)
        if was:
            low = [min(box.as_list()[side] for box in was) for side in (0, 1)]
            high = [max(box.as_list()[side] for box in was) for side in (2, 3)]
            assert now[0].as_list() == [*low, min(high[0], 100), min(high[1], 60)]
            shares = parse_box(part["conversations"][1]["value"])
            assert shares.x2 * 100 == pytest.approx(now[0].x2, abs=0.06)
            assert shares.y2 * 100 - 20 == pytest.approx(now[0].y2, abs=0.06)
