"""The evaluation command: on the drawn world with a random model, stopped and gone on with, and its page."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from judge_server import completion

import evaluate as evaluate_module
from benchmark_data import read_questions
from config import EvaluationConfig, SettingsError, build
from crop_tool import Box, CropContract, ToolCall
from decoding import Decoder
from evaluate import ask, chosen_traces, evaluate, main, page
from generation import CropEngine
from measures import Answer, measure
from sampling import SamplingParams

ROOT = Path(evaluate_module.__file__).parent
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"


@pytest.fixture(scope="module")
def engine(tiny_model, renderer):
    """The random model, made to begin each response with a call, so that crops matter."""
    engine = CropEngine(tiny_model, renderer, batch_size=4)
    generate = engine.generate

    def calling(prompts, sampling, counts, **settings):
        first = renderer.text_ids("<think>\nHere <tool_call>[3, 3, 20, 20]</tool_call>")
        return generate(prompts, sampling, counts, forced=[first] * sum(counts), **settings)

    engine.generate = calling
    return engine


@pytest.fixture
def config(base_folder, data_folder, tmp_path):
    return EvaluationConfig(
        model_path=str(base_folder),
        data=str(data_folder / "test.jsonl"),
        max_new_tokens=12,
        batch_size=4,
        output=str(tmp_path / "out"),
        traces=2,
    )


def lines_of(config: EvaluationConfig) -> list[str]:
    """The answers of a run, without how long they took."""
    lines = Path(config.output, "answers.jsonl").read_text().splitlines()
    return sorted(re.sub(r'"seconds": [0-9.]+', "", line) for line in lines)


def figures_of(results: dict) -> dict:
    def strip(value):
        if isinstance(value, dict):
            return {name: strip(part) for name, part in value.items() if name not in ("seconds", "settings")}
        return value

    return strip(results)


# --------------------------------------------------------------------------------------------------- asking


def test_an_answer_depends_neither_on_the_batch_nor_on_what_is_done(engine, data_folder):
    questions = read_questions(data_folder / "test.jsonl").questions
    sampling = SamplingParams(24, temperature=1.0, seed=3, crops="random")
    whole = {answer.key: answer for answer in ask(engine, questions, sampling, 2)}
    assert len(whole) == 18
    assert {answer.calls[0].outcome for answer in whole.values()} == {"exact"}
    done = set(list(whole)[3:10])
    rest = {answer.key: answer for answer in ask(engine, questions, sampling, 2, done)}
    assert set(rest) == set(whole) - done
    for key, answer in rest.items():
        assert replace(answer, seconds=0.0) == replace(whole[key], seconds=0.0)


def test_one_by_one_the_seconds_are_those_of_each_answer(engine, tiny_model, renderer, data_folder):
    questions = read_questions(data_folder / "test.jsonl").questions[:3]
    single = CropEngine(tiny_model, renderer, batch_size=1)
    answers = list(ask(single, questions, SamplingParams(8, temperature=0.0)))
    assert len({answer.seconds for answer in answers}) > 1
    together = list(ask(engine, questions, SamplingParams(8, temperature=0.0)))
    assert len({answer.seconds for answer in together}) == 1


def test_an_image_that_cannot_be_read_leaves_its_questions_out(engine, data_folder, tmp_path):
    shutil.copytree(data_folder, tmp_path / "data")
    questions = read_questions(tmp_path / "data/test.jsonl").questions
    picture = next((tmp_path / "data/images").glob("test_00001*"))
    picture.write_bytes(picture.read_bytes()[:200])
    faults: list[str] = []
    answers = list(ask(engine, questions, SamplingParams(4, temperature=0.0), faults=faults))
    assert len(answers) == 6
    assert len(faults) == 3
    assert faults[0].startswith("line 2, QnA[0]: unreadable image images/test_00001")
    with pytest.raises(ValueError, match="unreadable image"):
        list(ask(engine, questions, SamplingParams(4, temperature=0.0)))


# ------------------------------------------------------------------------------------------------ whole runs


def test_a_run_writes_figures_with_and_without_crops(config):
    results = evaluate(replace(config, ablate_crops="none,blank,random"))
    assert json.loads(Path(config.output, "results.json").read_text()) == json.loads(json.dumps(results))
    assert list(results["crops"]) == ["real", "none", "blank", "random"]
    assert set(results["crop_gain"]) == {"none", "blank", "random"}
    whole = results["crops"]["real"]["all"]
    assert (whole["questions"], whole["answers"]) == (9, 9)
    assert 0 <= whole["accuracy"] <= 1
    assert whole["tokens"] <= 12
    assert whole["seconds"] > 0
    assert len(lines_of(config)) == 1 + 4 * 9


def test_a_stopped_run_goes_on_to_the_same_result(config, tmp_path):
    config = replace(config, samples=2, temperature=1.0, ablate_crops="blank")
    results = evaluate(config)
    whole = lines_of(config)
    stopped = replace(config, output=str(tmp_path / "stopped"))
    Path(stopped.output).mkdir()
    kept = Path(config.output, "answers.jsonl").read_bytes().splitlines(keepends=True)[:14]
    Path(stopped.output, "answers.jsonl").write_bytes(b"".join(kept) + b'{"name": "line 1')
    again = evaluate(stopped)
    assert lines_of(stopped) == whole
    assert figures_of(again) == figures_of(results)


def test_a_finished_run_loads_no_model_and_more_crops_are_asked_for_alone(config, monkeypatch):
    evaluate(config)
    with monkeypatch.context() as patch:
        patch.setattr("inference.QwenVLInference", lambda _: pytest.fail("the model was loaded"))
        evaluate(replace(config, traces=1))
    before = lines_of(config)
    results = evaluate(replace(config, ablate_crops="blank"))
    assert set(before) < set(lines_of(config))
    assert results["crop_gain"]["blank"]["all"]["questions"] == 9


def test_kill_9_loses_no_finished_answer(config, tmp_path):
    flags = ["--model_path", config.model_path, "--data", config.data, "--output", config.output]
    flags += ["--max_new_tokens", "12", "--batch_size", "1", "--ablate_crops", "none,blank,random"]
    command = [sys.executable, str(ROOT / "evaluate.py"), *flags]
    answers = Path(config.output, "answers.jsonl")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        limit = time.monotonic() + 600
        while time.monotonic() < limit and run.poll() is None:
            if answers.is_file() and answers.read_bytes().count(b"\n") >= 4:
                break
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
    killed = answers.read_bytes()
    assert killed.count(b"\n") >= 4
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "answers: going on" in done.stdout or killed.count(b"\n") == 37
    assert answers.read_bytes().startswith(killed[: killed.rfind(b"\n") + 1])
    assert len(lines_of(config)) == len(set(lines_of(config))) == 37


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": 0.5}, r"temperature \(0.0 -> 0.5\)"),
        ({"max_new_tokens": 13}, r"max_new_tokens \(12 -> 13\)"),
        ({"seed": 4}, r"seed \(0 -> 4\)"),
        ({"limit": 3}, r"data \(other questions: the file, or --limit\)"),
    ],
)
def test_other_settings_are_refused_and_can_start_anew(config, change, named):
    evaluate(config)
    before = lines_of(config)
    with pytest.raises(SettingsError, match=rf"answers of other settings: {named}.*--resume false to start anew"):
        evaluate(replace(config, **change))
    assert lines_of(config) == before
    evaluate(replace(config, **change, resume=False))
    evaluate(replace(config, **change, batch_size=2), progress=True)  # the size of the batch is free


def test_other_weights_in_the_same_folder_are_refused(config, tmp_path):
    shutil.copytree(config.model_path, tmp_path / "model")
    config = replace(config, model_path=str(tmp_path / "model"))
    evaluate(config)
    weights = tmp_path / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SettingsError, match=r"answers of other settings: model \(other weights\)\. "):
        evaluate(config)


@pytest.mark.parametrize("content", [b"[1]\n", b"{}\n", b'{"settings": {}, "contract": {}}\nnot json\n', b"\xff\n"])
def test_a_file_that_holds_no_answers_is_left_alone(config, content):
    Path(config.output).mkdir()
    Path(config.output, "answers.jsonl").write_bytes(content)
    with pytest.raises(SettingsError, match="is no file of answers"):
        evaluate(config)
    assert Path(config.output, "answers.jsonl").read_bytes() == content


@pytest.fixture
def saying_sloping(monkeypatch):
    """Every answer is a word that only a judge can hold to be right."""
    generate = CropEngine.generate

    def saying(self, prompts, sampling, counts, **settings):
        said = self.renderer.text_ids("<think>a</think><answer>sloping</answer><|im_end|>")
        return generate(self, prompts, sampling, counts, forced=[said] * sum(counts), **settings)

    monkeypatch.setattr(CropEngine, "generate", saying)


def test_a_judge_decides_and_is_asked_once(config, serve, tmp_path, saying_sloping):
    server = serve(lambda handler, body: handler.send(completion("right")))
    given = {"judge_url": server.url, "judge_model": "m", "judge_cache": str(tmp_path / "cache")}
    judged = replace(config, **given, max_new_tokens=40)
    results = evaluate(judged)
    assert results["crops"]["real"]["all"]["accuracy"] == 1.0
    assert (results["judge"]["claims"], results["judge"]["judged"], len(server.seen)) == (9, 9, 9)
    assert evaluate(judged)["judge"]["cached"] == 9
    assert len(server.seen) == 9
    assert evaluate(replace(config, max_new_tokens=40))["crops"]["real"]["all"]["accuracy"] == 0.0, "by rules"


def test_a_judge_that_stays_away_ends_the_command_and_no_question_is_asked_again(
    config, serve, tmp_path, saying_sloping, capsys
):
    server = serve(lambda handler, body: handler.send(completion("right")))
    flags = ["--model_path", config.model_path, "--data", config.data, "--output", config.output]
    flags += ["--max_new_tokens", "40", "--judge_url", server.url, "--judge_model", "m", "--judge_patience", "0.2"]
    flags += ["--judge_cache", str(tmp_path / "cache"), "--judge_retries", "0"]
    server.die()
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 1
    answers = Path(config.output, "answers.jsonl")
    said = capsys.readouterr().err
    assert (
        f"gave no answer in 0 s (no connection (ConnectError)). The answers so far are in {answers}: the same" in said
    )
    before = answers.read_bytes()
    serve(lambda handler, body: handler.send(completion("right")), server.server_port)
    main(flags)
    assert "judged 9" in capsys.readouterr().out and answers.read_bytes() == before


def test_a_full_disk_ends_the_command_without_a_traceback(config, capsys):
    Path(config.output).mkdir()
    Path(config.output, "answers.jsonl").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as stop:
        main(["--model_path", config.model_path, "--data", config.data, "--output", config.output])
    assert stop.value.code == 1
    assert "evaluate.py: [Errno 28] No space left on device" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- the page


@pytest.fixture
def evil_items(tmp_path, data_folder, contract):
    """Answers of a set and a model that write markup wherever they can."""
    row = {"image_path": "images/" + next((data_folder / "images").iterdir()).name, "category": EVIL}
    entries = [{"Q": f"{n} {EVIL}", "A3": f"<think>{EVIL}</think><answer>{n} {EVIL}</answer>"} for n in range(4)]
    path = tmp_path / "evil.jsonl"
    path.write_text(json.dumps({**row, "QnA": entries}))
    known = read_questions(path, data_folder)
    box = Box(0, 0, 64, 64)
    answers = [
        Answer(
            question.name, "real", 0, f"<think>{EVIL}<tool_call>{EVIL}</tool_call></think><answer>0 {EVIL}</answer>",
            (ToolCall(EVIL, 7 + len(EVIL), "exact", box),), "stop", 9, 4, 0.1, (448, 448),
        )
        for question in known.questions
    ]  # fmt: skip
    return known, measure({question.name: question for question in known.questions}, answers, contract)


def test_text_of_data_and_model_is_escaped_everywhere(evil_items, contract, config):
    known, items = evil_items
    config = replace(config, model_path=EVIL)
    results = evaluate_module.summary(config, known, items, {"real": "real"}, [f"line 9: {EVIL}"])
    html = page(results, chosen_traces(items, contract, 2))
    assert "alert(1)" in html
    assert not re.search(r"<(script|img src=x)", html)
    assert "{{ 7*7 }}" in html and ">49<" not in html
    assert "default-src 'none'" in html
    assert html.count("data:image/") == 8, "picture and crop of two worst and two best"


def test_the_worst_come_first_and_no_answer_is_both(evil_items, contract):
    _, items = evil_items
    ranked = [replace(item, figures={**item.figures, "accuracy": float(n), "iou": 0.0}) for n, item in enumerate(items)]
    chosen = chosen_traces(ranked, contract, 3)
    assert [trace.question[0] for trace in chosen["worst"]] == ["0", "1"]
    assert [trace.question[0] for trace in chosen["best"]] == ["3", "2"]


def test_crops_of_a_trace_are_those_that_the_model_saw(engine, data_folder, contract: CropContract):
    questions = read_questions(data_folder / "test.jsonl").questions[:2]
    sampling = SamplingParams(24, temperature=0.0)
    prompts = [engine.renderer.prompt(question.text, question.load()) for question in questions]
    rollouts = engine.generate(prompts, sampling, [1, 1])
    items = measure({item.name: item for item in questions}, list(ask(engine, questions, sampling)), contract)
    for item, rollout in zip(items, rollouts, strict=True):
        trace = evaluate_module.trace_of(item, contract)
        shown = [crop.tobytes() for crop in trace.crops if crop is not None]
        assert shown == [image.tobytes() for image in rollout.images[1:]] != []


# ---------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": 4}, "samples is 4, but at temperature 0 all of them are the same"),
        ({"ablate_crops": "none,grey"}, "ablate_crops is 'none,grey', but it is a list of: none, blank, random"),
        ({"limit": -1}, "limit is -1, but it must be at least 0"),
        ({"temperature": -1}, "temperature is -1.0"),
        ({"judge_url": "http://localhost:1/v1"}, "judge_model is None: give both"),
    ],
)
def test_settings_that_cannot_be(given, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        build(EvaluationConfig, given)


def test_the_command_prints_a_table_and_names_its_files(config, capsys):
    flags = ["--model_path", config.model_path, "--data", config.data, "--output", config.output, "--limit", "4"]
    main([*flags, "--max_new_tokens", "6", "--ablate_crops", "blank", "--samples", "2", "--temperature", "0.7"])
    printed = capsys.readouterr().out
    assert f"JSONL {config.data}, 2 answers a question" in printed
    assert re.search(r"^real +4 +\d\.\d{3} +", printed, re.MULTILINE)
    assert re.search(r"^crop gain over blank +[+-]\d\.\d{3} ", printed, re.MULTILINE)
    assert set(os.listdir(config.output)) == {"answers.jsonl", "results.json", "report.html"}


def test_the_command_refuses_without_a_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--data", str(tmp_path / "none.jsonl")])
    assert stop.value.code == 2
    assert "evaluate.py: data is" in capsys.readouterr().err


def test_ctrl_c_ends_the_command_in_one_line_that_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stopped(config, progress):
        (tmp_path / "answers.jsonl").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_module, "evaluate", stopped)
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path)])
    assert stop.value.code == 130
    assert re.fullmatch(
        r"evaluate.py: stopped by Ctrl-C\. .*the same command goes on from there\n", capsys.readouterr().err
    )


def test_out_of_memory_ends_the_command_with_a_smaller_batch_and_keeps_the_answers(config, monkeypatch, capsys):
    flags = ["--model_path", config.model_path, "--data", config.data, "--output", config.output]
    flags += ["--max_new_tokens", "4", "--ablate_crops", "none"]
    forward = Decoder.forward

    def fail(self, *args, **kwargs):
        if Path(config.output, "answers.jsonl").read_bytes().count(b"\n") > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", fail)
        patch.setattr(evaluate_module, "ROUNDS", 1)
        with pytest.raises(SystemExit) as stop:
            main([*flags, "--batch_size", "4"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1
    assert said.startswith(
        "evaluate.py: out of memory: --batch_size 2, or a bound by --max_batch_tokens. The answers so far"
    )
    kept = Path(config.output, "answers.jsonl").read_bytes()
    main([*flags, "--batch_size", "2"])
    assert Path(config.output, "answers.jsonl").read_bytes().startswith(kept) and kept.count(b"\n") > 1
