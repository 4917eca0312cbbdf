"""The one writer: its tokens are those of the chat template, its labels and images those of the response."""

from __future__ import annotations

import pytest
from PIL import Image

import demo_world
from conversation import IGNORED, Example, check_image_tokens, cut_to_length, model_inputs
from crop_tool import CALL_CLOSE, Box, Frame, cut_crop, resolve_box

RESPONSE = (
    "<think>\nThe red square is here {Crop red square [88.2, 40, 200, 131.7]}\nIt shows "
    "<Crop stripes [8, 240, 120, 447]> rising stripes.\n</think>\n\n<answer>rising</answer>"
)


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(demo_world.draw_picture(3, 0).pixels)


@pytest.fixture
def encoded(renderer, picture):
    return renderer.encode(Example(4, 1, "", "Which stripes are on the red square?", RESPONSE), picture)


def test_ids_are_those_of_the_chat_template_with_text_and_image_parts_in_one_assistant_turn(
    processor, renderer, encoded
):
    calls = ["<tool_call>[11, 5, 25, 16]</tool_call>", "<tool_call>[1, 30, 15, 56]</tool_call>"]
    parts = [
        {"type": "text", "text": f"<think>\nThe red square is here {calls[0]}"},
        {"type": "image"},
        {"type": "text", "text": f"\nIt shows {calls[1]}"},
        {"type": "image"},
        {"type": "text", "text": " rising stripes.\n</think>\n\n<answer>rising</answer>"},
    ]
    messages = [
        *renderer.messages("Which stripes are on the red square?"),
        {"role": "assistant", "content": parts},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    theirs = processor(text=[text], images=[list(encoded.images)])["input_ids"][0]
    # The template's last line break stands behind the end of the turn, where the engine has stopped.
    assert list(theirs[: len(encoded.input_ids)]) == encoded.input_ids
    assert processor.tokenizer.decode(theirs[len(encoded.input_ids) :]) == "\n"
    assert encoded.input_ids[-1] == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_loss_is_on_the_models_own_text_only(renderer, encoded):
    own = [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != IGNORED]
    assert renderer.tokenizer.decode(own) == (
        "<think>\nThe red square is here <tool_call>[11, 5, 25, 16]</tool_call>\nIt shows "
        "<tool_call>[1, 30, 15, 56]</tool_call> rising stripes.\n</think>\n\n<answer>rising</answer><|im_end|>"
    )
    assert all(label in (IGNORED, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))


def test_crop_follows_its_call_and_shows_the_region_that_the_written_numbers_name(renderer, contract, encoded, picture):
    frame = Frame.of(picture.size, contract)
    for image, numbers in zip(encoded.images[1:], ([11, 5, 25, 16], [1, 30, 15, 56]), strict=True):
        _, region = resolve_box(frame.to_original(Box(*numbers)), picture.size, contract.min_crop_side)
        assert image.tobytes() == cut_crop(picture, region, contract).tobytes()
    closes = [at for at, token in enumerate(encoded.input_ids) if token == renderer.ids[CALL_CLOSE]][-2:]
    blocks = [
        encoded.input_ids[at + 1 :][: len(renderer.image_block(i.size))]
        for at, i in zip(closes, encoded.images[1:], strict=True)
    ]
    assert blocks == [renderer.image_block(image.size) for image in encoded.images[1:]]


def test_shown_images_pass_the_processor_unchanged(processor, contract, encoded):
    pixels = processor.image_processor(images=list(encoded.images), return_tensors="pt")
    sides = [(image.width // 7, image.height // 7) for image in encoded.images]
    assert [(int(w), int(h)) for _, h, w in pixels["image_grid_thw"]] == sides


def test_special_tokens_in_a_question_are_refused(renderer, picture):
    for token in ("<|image_pad|>", "<|vision_start|>", "<|im_end|>"):
        with pytest.raises(ValueError, match="the question contains the reserved token"):
            renderer.prompt(f"What is {token} here?", picture)


def test_region_outside_the_image_is_an_error_not_a_missing_crop(renderer, picture):
    example = Example(7, 0, "", "What?", "<think>{Crop a [9, 9, 5, 5]}</think><answer>b</answer>")
    # Rounding to whole numbers keeps a box from being empty, so an inverted one must be caught before it is written.
    with pytest.raises(ValueError, match="inverted box"):
        renderer.encode(example, picture)


def test_cut_is_at_a_segment_border_and_drops_the_images_behind(renderer, encoded):
    starts = [at for at, token in enumerate(encoded.input_ids) if token == renderer.ids["<|vision_start|>"]]
    inside_second_crop = starts[2] + 3
    cut = cut_to_length(encoded, renderer, inside_second_crop)
    assert len(cut.input_ids) == starts[2]
    assert len(cut.images) == 2
    check_image_tokens(cut.input_ids, cut.images, renderer, "cut")
    with pytest.raises(ValueError, match="too long: the prompt alone takes"):
        cut_to_length(encoded, renderer, 20)


def test_row_whose_images_and_tokens_differ_is_named(renderer, encoded):
    broken = type(encoded)(encoded.input_ids, encoded.labels, encoded.images[:-1], "line 4, QnA[1]")
    with pytest.raises(ValueError, match=r"line 4, QnA\[1\]: \d+ image tokens, but 2 images"):
        model_inputs([broken], renderer)
    assert encoded.name == "line 4, QnA[1]"
