"""Streaming: what comes in pieces is what comes at once, no piece is half of something, and a closed stream is gone."""

from __future__ import annotations

import gc
import json
import weakref
from functools import partial

import pytest
import torch
from PIL import Image

import demo_world
import generation
import inference as command
from config import InferenceConfig, SettingsError
from crop_tool import CALL_CLOSE
from decoding import Batch
from inference import InferenceResult, QwenVLInference
from streaming import WHOLE, CallResult, ResponseReader, TextPiece
from vllm_generation import Completion, VLLMEngine

QUESTION = "Which stripes are on the red square?"
SCRIPT = (
    "<think>\nZwölf 🟥🟩 größer 紅 here <tool_call>[10, 10, 30, 40]</tool_call> and "
    "<tool_call>[9, 9, 1, 1]</tool_call>\n2 < 3 <b> <tool_call>[3, 3, 20, 20]</tool_call></think>\n\n"
    "<answer>naïve ½</answer><|im_end|>"
)


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(demo_world.draw_picture(3, 0).pixels)


@pytest.fixture(scope="module")
def models(base_folder):
    """Answering with settings, one model a setting."""
    return lambda **settings: QwenVLInference(InferenceConfig(str(base_folder), **{"max_new_tokens": 60, **settings}))


@pytest.fixture(scope="module")
def greedy(models):
    return models(temperature=0.0)


@pytest.fixture
def led(greedy, monkeypatch):
    """Have every answer begin with a text, whole or in pieces."""

    def lead(script: str | list[int], **settings) -> QwenVLInference:
        ids = greedy.renderer.text_ids(script) if isinstance(script, str) else script
        engine, sampling = greedy.engine, greedy.sampling
        whole, pieces = type(engine).generate, type(engine).stream
        monkeypatch.setattr(greedy, "sampling", type(sampling)(**{"max_new_tokens": len(ids), "seed": 0, **settings}))
        monkeypatch.setattr(engine, "generate", partial(whole, engine, forced=[ids]))
        monkeypatch.setattr(engine, "stream", partial(pieces, engine, forced=ids))
        return greedy

    return lead


def parts(stream) -> tuple[list[str], list[CallResult], InferenceResult]:
    news = list(stream)
    assert isinstance(news[-1], InferenceResult)
    texts = [piece.text for piece in news if isinstance(piece, TextPiece)]
    return texts, [piece for piece in news if isinstance(piece, CallResult)], news[-1]


def assert_equal(given: InferenceResult, expected: InferenceResult) -> None:
    """The two answers are the same: record, pixels and log-probs."""
    assert given.to_dict() == expected.to_dict()
    assert given.rollout.completion_ids == expected.rollout.completion_ids
    assert given.rollout.sampled_mask == expected.rollout.sampled_mask
    assert given.rollout.logprobs == expected.rollout.logprobs
    images = [[image.tobytes() for image in result.rollout.images] for result in (given, expected)]
    assert images[0] == images[1]


def test_pieces_and_calls_are_those_of_the_whole_answer(led, picture):
    answering = led(SCRIPT)
    texts, calls, result = parts(answering.stream(picture, QUESTION))
    assert_equal(result, answering.generate(picture, QUESTION))
    assert "".join(texts) == result.text == SCRIPT.removesuffix("<|im_end|>")
    assert len(texts) > 40
    assert [call.number for call in calls] == [1, 2, 3]
    assert [call.call for call in calls] == result.tool_calls
    assert [call.call.outcome for call in calls] == ["exact", "inverted", "exact"]
    assert calls[0].call.box.as_list() == [80, 80, 240, 320], "original pixels: 56 shown ones stand for 448"
    assert [call.crop for call in calls] == result.crops
    assert calls[1].crop is None


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5}, {"max_crops": 0}])
def test_sampled_and_greedy_streams_are_what_generate_gives(models, picture, settings):
    answering = models(**settings)
    texts, calls, result = parts(answering.stream(picture, QUESTION))
    assert_equal(result, answering.generate(picture, QUESTION))
    assert "".join(texts) == result.text
    assert [call.call for call in calls] == result.tool_calls


def test_a_call_is_told_right_behind_its_text(led, picture):
    text = ""
    for news in led(SCRIPT).stream(picture, QUESTION):
        if isinstance(news, TextPiece):
            text += news.text
        elif isinstance(news, CallResult):
            assert text.endswith(f"<tool_call>{news.call.text}{CALL_CLOSE}")
            assert text.count(CALL_CLOSE) == news.number


def test_no_piece_ends_inside_a_character_or_a_tag(led, picture):
    answering = led(SCRIPT)
    tokens = [answering.renderer.tokenizer.decode([token]) for token in answering.renderer.text_ids("🟥<answer>")]
    assert len(tokens) > 5, "the test's text must come in more than one token a character and a tag"
    texts, _, result = parts(answering.stream(picture, QUESTION))
    assert not any("\ufffd" in text for text in texts)
    told = ""
    for text in texts:
        told += text
        ends = [tag for tag in WHOLE if any(told.endswith(tag[:size]) for size in range(2, len(tag)))]
        assert not ends, f"{told[-20:]!r} ends inside {ends[0]}"
    assert told == result.text


@pytest.mark.parametrize("end", ["🟥", "<answ", "<tool_call>[1, 2", CALL_CLOSE, "\ufffd", "a <", "<|im_end|>", ""])
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_what_is_held_back_comes_at_the_end(led, picture, end, cut):
    answering = led("x")
    ids = answering.renderer.text_ids("Here " + end)
    answering = led(ids[: max(1, len(ids) - cut)])
    texts, _, result = parts(answering.stream(picture, QUESTION))
    assert "".join(texts) == result.text == answering.generate(picture, QUESTION).text


def test_any_sequence_of_tokens_is_told_as_it_is_decoded_at_once(greedy, picture):
    """Random ids are mostly broken bytes: what is no character stays none, and nothing is lost or doubled."""
    renderer, writer = greedy.renderer, greedy.engine.writer
    usable = [token for token in range(len(renderer.tokenizer)) if token not in {*writer.suppressed, *writer.stop_ids}]
    dice = torch.Generator().manual_seed(0)
    for _ in range(300):
        ids = [usable[at] for at in torch.randint(len(usable), (40,), generator=dice).tolist()]
        response = generation.Row(renderer.prompt("What?", picture), len(ids))
        reader, told = ResponseReader(response, renderer.tokenizer, renderer.ids[CALL_CLOSE]), ""
        for token in ids:
            writer.take(response, token, 0.0, greedy.sampling)
            if response.crop is not None:
                response.show(renderer.image_block(response.crop.size))
            told += "".join(news.text for news in reader.news() if isinstance(news, TextPiece))
        assert told == writer.rollout(response).text


def test_a_closed_stream_ends_the_work_and_frees_its_cache(led, picture, monkeypatch):
    answering, batches, steps = led(SCRIPT), [], []
    step, start = Batch.step, Batch.__init__

    def starting(self, *args, **kwargs):
        batches.append(weakref.ref(self))
        start(self, *args, **kwargs)

    monkeypatch.setattr(Batch, "__init__", starting)
    monkeypatch.setattr(Batch, "step", lambda self: steps.append(1) or step(self))
    stream = answering.stream(picture, QUESTION)
    assert not steps, "no work before the first piece is asked for"
    next(news for news in stream if isinstance(news, CallResult))
    done = len(steps)
    cache = weakref.ref(batches[0]().cache)
    stream.close()
    gc.collect()
    assert len(steps) == done
    assert batches[0]() is None
    assert cache() is None


def test_streams_and_other_questions_may_take_turns(led, picture):
    answering = led(SCRIPT)
    own = answering.engine.base.config._attn_implementation
    expected = answering.generate(picture, QUESTION)
    first, second = answering.stream(picture, QUESTION), answering.stream(picture, QUESTION)
    news = [next(first), next(second), next(first)]
    assert answering.engine.base.config._attn_implementation == own
    assert torch.is_grad_enabled()
    assert_equal(answering.generate(picture, QUESTION), expected)
    assert_equal([*news, *first][-1], expected)
    assert_equal(list(second)[-1], expected)


def test_a_follow_up_streams_what_it_answers_at_once(led, picture):
    answering = led(SCRIPT)
    result = answering.generate(picture, QUESTION)
    texts, calls, more = parts(answering.stream_follow_up(result, "And below?"))
    assert_equal(more, answering.follow_up(result, "And below?"))
    assert "".join(texts) == more.text
    assert len(calls) == 3
    assert more.earlier is result


def test_calls_can_be_left_out(models, led, picture, monkeypatch):
    answering = led(SCRIPT)
    monkeypatch.setattr(answering, "config", models(parse_tool_calls=False).config)
    texts, calls, result = parts(answering.stream(picture, QUESTION))
    assert (calls, result.tool_calls) == ([], [])
    assert "".join(texts) == result.text


def test_bad_input_is_refused_before_the_first_piece(models, picture):
    with pytest.raises(ValueError, match="reserved token"):
        models().stream(picture, "a <|image_pad|>")
    with pytest.raises(SettingsError, match="max_batch_tokens is 20"):
        next(models(max_batch_tokens=20).stream(picture, QUESTION))


def test_vllm_streams_a_piece_for_each_stretch_between_calls(led, picture):
    """What vLLM would send is played back in place of a vLLM; `make test-vllm` has the real one."""
    answering = led(SCRIPT)
    expected = answering.generate(picture, QUESTION)
    rollout = expected.rollout
    own = [token for token, mine in zip(rollout.completion_ids, rollout.sampled_mask, strict=True) if mine]
    engine, writer = answering.engine, answering.engine.writer

    class Recorded:
        max_length, is_shared = 10_000, False

        def run(self, requests, answers, temperature):
            (request,), (answer,) = requests, answers
            written = next(self.stretches)
            assert answer(Completion(written, [0.0] * len(written), [], request.length)) is None

    backend, stretch = Recorded(), []
    stretches: list[list[int]] = []
    for token in own:
        stretch.append(token)
        if token == writer.call_close:
            stretches, stretch = [*stretches, stretch], []
    backend.stretches = iter([*stretches, stretch])
    vllm = VLLMEngine(backend, engine.renderer, engine.base.config, engine.base.generation_config)
    answering.engine, kept = vllm, engine
    try:
        texts, calls, result = parts(answering.stream(picture, QUESTION))
    finally:
        answering.engine = kept
    assert result.to_dict() == expected.to_dict()
    assert "".join(texts) == result.text
    assert len(texts) == 4
    assert [call.call for call in calls] == result.tool_calls


def test_the_command_prints_as_it_comes(base_folder, picture, tmp_path, capsys):
    picture.save(tmp_path / "picture.png")
    flags = ["--model_path", str(base_folder), "--image_path", f"{tmp_path}/picture.png", "--max_new_tokens", "12"]
    command.main(
        [*flags, "--question", QUESTION, "--question", "And?", "--stream", "--output_json", f"{tmp_path}/a.json"]
    )
    answers = json.loads((tmp_path / "a.json").read_text())
    said = capsys.readouterr().out
    for answer in answers:
        assert f"Question: {answer['question']}\n{answer['response']}" in said
    assert said.count("cut off") == sum(answer["finish_reason"] == "length" for answer in answers)
