"""The answering API and command: results, follow-ups, batches of mixed sizes, traces, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import demo_world
import inference as command
from config import InferenceConfig, SettingsError
from inference import QwenVLInference

QUESTION = "Which stripes are on the red square?"


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(demo_world.draw_picture(3, 0).pixels)


@pytest.fixture(scope="module")
def answering(base_folder):
    return QwenVLInference(InferenceConfig(str(base_folder), max_new_tokens=40, temperature=0.7))


@pytest.fixture
def looking(answering, monkeypatch):
    """The same, with every answer led by a scripted text that looks twice, once in vain."""
    script = (
        "<think>\nhere <tool_call>[10, 10, 30, 40]</tool_call> and <tool_call>[9, 9, 1, 1]</tool_call>\n</think>\n\n"
        "<answer>rising</answer><|im_end|>"
    )
    generate, ids = answering.engine.generate, answering.renderer.text_ids(script)

    def scripted(prompts, sampling, **rest):
        return generate(prompts, replace(sampling, max_new_tokens=100), forced=[ids] * len(prompts), **rest)

    monkeypatch.setattr(answering.engine, "generate", scripted)
    return answering


def test_result_has_the_parts_of_the_answer_and_boxes_in_original_pixels(looking, picture):
    result = looking.generate(image=picture, question=QUESTION)
    assert result.answer_content == "rising"
    assert result.think_content.startswith("here <tool_call>")
    assert [call.outcome for call in result.tool_calls] == ["exact", "inverted"]
    assert result.tool_calls[0].box.as_list() == [80, 80, 240, 320]  # 56 shown pixels stand for 448
    assert [crop is not None for crop in result.crops] == [True, False]
    assert result.finish_reason == "stop"


def test_result_shows_itself_in_a_notebook(looking, picture):
    html = looking.generate(picture, QUESTION)._repr_html_()
    assert html.count("<img") == 2
    assert "inverted" in html


def test_batch_of_mixed_sizes_answers_each_as_if_alone(base_folder, picture):
    asking = QwenVLInference(InferenceConfig(str(base_folder), max_new_tokens=20, temperature=0.0))
    images = [picture, picture.resize((300, 200)), picture.crop((0, 0, 90, 400))]
    questions = [QUESTION, "What?", "Which stripes are on the blue circle?"]
    together = [result.text for result in asking.batch_generate(images, questions)]
    assert together == [asking.generate(*pair).text for pair in zip(images, questions, strict=True)]


def test_sampling_is_repeatable_and_seed_and_temperature_count(base_folder, answering, picture):
    first, again = (answering.generate(picture, QUESTION).text for _ in range(2))
    assert first == again
    for setting in ({"seed": 1}, {"temperature": 0.0}):
        other = QwenVLInference(InferenceConfig(str(base_folder), max_new_tokens=40, **setting))
        assert other.generate(picture, QUESTION).text != first


def test_follow_up_goes_on_with_image_and_crops_in_view(looking, picture, tmp_path):
    first = looking.generate(picture, QUESTION)
    second = looking.follow_up(first, "And below?")
    assert len(second.prompt.images) == 2
    assert second.prompt.ids[: len(first.prompt.ids)] == first.prompt.ids
    second.save_trace(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "And below?" in page
    assert QUESTION in page


def test_calls_can_be_left_out_and_crops_switched_off(base_folder, picture):
    quiet = QwenVLInference(InferenceConfig(str(base_folder), parse_tool_calls=False, max_new_tokens=5))
    assert quiet.generate(picture, QUESTION).tool_calls == []
    blind = QwenVLInference(InferenceConfig(str(base_folder), execute_crops=False, max_new_tokens=5))
    assert blind.sampling.crops == "off"


def test_images_and_questions_must_pair_up(answering, picture):
    with pytest.raises(ValueError, match="1 images and 2 questions were given"):
        answering.batch_generate([picture], ["a", "b"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5, but it must be a whole number"),
        ({"dtype": "int8"}, "dtype is 'int8', but it must be one of auto, float32"),
        ({"model_path": None}, "model_path is None, but it must be text"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        InferenceConfig(**setting)


def test_settings_made_in_python_are_converted_as_those_of_the_command_line():
    config = InferenceConfig(Path("outputs/model"), temperature="0.5", max_crops="3")
    assert (config.model_path, config.temperature, config.max_crops) == ("outputs/model", 0.5, 3)


@pytest.mark.parametrize("image", [None, b"\x89PNG", [[[0, 0, 0]]]])
def test_what_is_no_image_is_named_by_its_type(answering, image):
    with pytest.raises(ValueError, match=f"the image is a {type(image).__name__}, but it must be a PIL image, a path"):
        answering.generate(image, QUESTION)


def test_a_training_output_folder_leads_to_its_model(base_folder, tmp_path):
    (tmp_path / "final_model").mkdir()
    with pytest.raises(SettingsError, match=r"is the output folder of a training: its model is .*/final_model"):
        QwenVLInference(InferenceConfig(tmp_path))


def test_command_writes_json_and_trace_and_takes_follow_ups(base_folder, picture, tmp_path, capsys):
    picture.save(tmp_path / "picture.png")
    command.main(
        [
            *("--model_path", str(base_folder), "--image_path", f"{tmp_path}/picture.png", "--question", QUESTION),
            *("--question", "And below?", "--max_new_tokens", "12", "--temperature", "0.7"),
            *("--output_json", f"{tmp_path}/out/answer.json", "--save_trace", f"{tmp_path}/out/trace.html"),
        ]
    )
    answers = json.loads((tmp_path / "out/answer.json").read_text())
    assert [answer["question"] for answer in answers] == [QUESTION, "And below?"]
    assert set(answers[0]) >= {"think_content", "answer_content", "tool_calls", "response", "finish_reason"}
    assert (tmp_path / "out/trace.html").read_text().count(QUESTION) >= 1
    assert "Answer:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_path", "gone.png", "--question", "a"], "missing image gone.png"),
        (
            ["--image_path", "{picture}", "--question", "a", "--model_path", "/gone/model"],
            "there is no model at /gone/model",
        ),
        (["--image_path", "{picture}", "--question", "a <|image_pad|>"], "reserved token"),
        (
            ["--image_path", "{picture}", "--question", "a", "--output_json", "{picture}"],
            "the image itself",
        ),
        (
            ["--image_path", "{picture}", "--question", "a", "--save_trace", "{picture}"],
            "the image itself",
        ),
        (
            ["--image_path", "{picture}", "--question", "a", "--device", "tpu"],
            "device is tpu, which torch cannot",
        ),
        (["--image_path", "{picture}", "--question", " "], "the question is ' ', but it must be text"),
        (["--image_path", "{picture}", "--question", "a", "--top_k", "x"], "top_k is 'x', but it must be a number"),
        pytest.param(
            ["--image_path", "{picture}", "--question", "a", "--device", "cuda:1"],
            "device is cuda:1, but torch sees no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_input_ends_in_one_line_without_a_traceback(base_folder, picture, tmp_path, capsys, flags, message):
    picture.save(tmp_path / "picture.png")
    flags = [flag.format(picture=tmp_path / "picture.png") for flag in flags]
    if "--model_path" not in flags:
        flags += ["--model_path", str(base_folder)]
    with pytest.raises(SystemExit) as stop:
        command.main(flags)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_file_that_cannot_be_written_ends_the_command_in_one_line(base_folder, picture, tmp_path, capsys):
    picture.save(tmp_path / "picture.png")
    flags = ["--model_path", str(base_folder), "--image_path", str(tmp_path / "picture.png"), "--question", "a"]
    with pytest.raises(SystemExit) as stop:
        command.main([*flags, "--max_new_tokens", "2", "--save_trace", str(tmp_path / "picture.png/trace.html")])
    assert stop.value.code == 1
    assert "picture.png" in capsys.readouterr().err.splitlines()[-1]


def test_out_of_memory_ends_the_command_with_what_takes_less(base_folder, picture, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("decoding.Decoder.forward", fail)
    picture.save(tmp_path / "picture.png")
    with pytest.raises(SystemExit) as stop:
        command.main(
            ["--model_path", str(base_folder), "--image_path", str(tmp_path / "picture.png"), "--question", "a"]
        )
    assert stop.value.code == 1
    assert capsys.readouterr().err.endswith(
        "inference.py: out of memory: --dtype bfloat16, or fewer --max_new_tokens or --max_crops\n"
    )


def test_a_question_that_does_not_fit_max_batch_tokens_is_refused(base_folder, picture):
    answering = QwenVLInference(InferenceConfig(str(base_folder), max_new_tokens=10, max_batch_tokens=20))
    with pytest.raises(SettingsError, match="max_batch_tokens is 20, but prompt 0 has"):
        answering.generate(picture, QUESTION)


@pytest.mark.parametrize("question", [None, "", "\n"])
def test_an_empty_question_is_refused(answering, picture, question):
    for ask in (answering.generate, lambda *given: next(answering.stream(*given))):
        with pytest.raises(ValueError, match=f"the question is {question!r}, but it must be text".replace("\\", ".")):
            ask(picture, question)
