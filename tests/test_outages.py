"""A server that dies in R-GRPO is waited for; one that stays away, or an image that is gone, stops the run for a resume
that ends as the run that met nothing."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import shutil
import signal
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch
from judge_server import Handler, Server, completion
from PIL import Image
from test_resume import assert_same_run
from test_trainers import grpo_trainer, length_part, settings_for, sft_trainer

import patience
import row_index
from checkpoints import StoppedError, checkpoints_in, fault_of
from conversation import IMAGE_PAD, Renderer
from crop_tool import CALL_CLOSE
from patience import OutageError, Patience
from rewards import reward_parts
from training import exit_with_message, train
from vllm_server import VLLMServer
from watching import CropGain

WORDS = ("sloping", "the red square", "horizontal", "stripes", "a circle")


class Mortal:
    """A server that dies at its `dies_at`-th question; `returns` seconds later another one takes its port.

    The new one knows nothing of what the old one was told.
    """

    def __init__(self, serve, dies_at: int | None = None, returns: float | None = None) -> None:
        self.serve, self.dies_at, self.returns, self.asked = serve, dies_at, returns, 0
        self.server: Server = serve(self)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def __call__(self, handler: Handler, body: dict) -> None:
        if handler.path in self.questions:
            with handler.server.lock:
                self.asked += 1
                is_end = self.asked == self.dies_at
            if is_end:
                handler.server.die()
                if self.returns is not None:
                    threading.Timer(self.returns, self.come_back).start()
            if handler.server.fileno() == -1:
                return  # what was asked of the dead ends without a word
        self.answer(handler, body)

    def come_back(self) -> None:
        self.forget()
        self.server = self.serve(self, self.server.server_port)

    def forget(self) -> None:
        pass


class WordJudge(Mortal):
    questions = ("/v1/chat/completions",)

    def answer(self, handler: Handler, body: dict) -> None:
        claim = body["messages"][1]["content"]
        handler.send(completion("right" if zlib.crc32(claim.encode()) % 2 else "wrong"))


class WordModel(Mortal):
    """Speaks vLLM's protocol. What it says follows from the tokens, the seed, and the weights that it was given."""

    questions = ("/inference/v1/generate",)

    def __init__(self, serve, renderer: Renderer, **end) -> None:
        self.renderer, self.weights, self.loads = renderer, 0, 0
        super().__init__(serve, **end)

    def forget(self) -> None:
        self.weights = 0

    def answer(self, handler: Handler, body: dict) -> None:
        if handler.path == "/v1/models":
            handler.send(json.dumps({"data": [{"id": "words", "max_model_len": 4096}]}).encode())
        elif handler.path == "/collective_rpc":
            file = Path(body["kwargs"]["weights_path"], "model.safetensors")
            self.weights, self.loads = zlib.crc32(file.read_bytes()), self.loads + 1
            handler.send(b"")
        elif handler.path in self.questions:
            handler.send(json.dumps(self.say(body)).encode())
        else:
            handler.send(b"")

    def say(self, body: dict) -> dict:
        given, sampling = body["token_ids"], body["sampling_params"]
        dice = random.Random(f"{self.weights} {given} {sampling['seed']}")
        word = dice.choice(WORDS)
        shown = len(body["content_parts"]) - 1
        text = f"</think><answer>{word} {dice.randrange(100)}</answer><|im_end|>"
        if not shown:
            corner = f"{dice.randrange(8, 20)}, {dice.randrange(8, 20)}"
            text = f"<think>{word} <tool_call>[0, 0, {corner}]{CALL_CLOSE}"
        ids = self.renderer.text_ids(text)[: sampling["max_tokens"]]
        entries = [{"logprob": -dice.random()} for _ in ids]
        choice = {"token_ids": ids, "logprobs": {"content": entries}}
        return {"choices": [choice], "prompt_token_ids": self.expanded(body), "prompt_logprobs": None}

    def expanded(self, body: dict) -> list[int]:
        pad, images, ids = self.renderer.ids[IMAGE_PAD], iter(body["content_parts"]), []
        for token in body["token_ids"]:
            count = 1
            if token == pad:
                data = base64.b64decode(next(images)["url"].partition(",")[2])
                width, height = Image.open(io.BytesIO(data)).size
                count = width * height // self.renderer.contract.factor**2
            ids += [token] * count
        return ids


# A step has two generations; the first one's gradient is lost with the second one's outage.
TWICE = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 4}
# A generation serves two steps, and a log interval three.
HALF = {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "max_steps": 5, "logging_steps": 3}


@pytest.fixture
def run(base_folder, data_folder, tmp_path, serve, renderer):
    """Train in the folder `name` against two servers of words; returns the trainer and the servers."""

    def start(name: str, flags: dict, judge: dict | None = None, model: dict | None = None, waits: float = 60):
        servers = start.servers = WordJudge(serve, **judge or {}), WordModel(serve, renderer, **model or {})
        flags = {
            **flags,
            "save_steps": 100,
            "max_completion_length": 96,
            "rollout_backend": "vllm",
            "vllm_server": servers[1].address,
            "vllm_patience": waits,
            "vllm_importance_sampling_correction": "false",  # its log-probs are invented, and would weigh nothing
            "judge_url": f"http://127.0.0.1:{servers[0].server.server_port}/v1",
            "judge_model": "words",
            "judge_cache": str(tmp_path / f"{name}.sqlite"),
            "judge_retries": 0,
            "judge_patience": waits,
        }
        settings = settings_for("grpo", base_folder, data_folder, tmp_path / name, **flags)
        _, trainer = grpo_trainer(settings, (*reward_parts("vlm_r3_paper", 1.0, 1.0), length_part()))
        if checkpoints_in(tmp_path / name):
            torch.manual_seed(12345)  # what is resumed must not live on the seed that a run starts from
        train(trainer, settings, "grpo")
        return trainer, servers

    return start


CASES = {
    "judge": (TWICE, {"judge": {"dies_at": 45}}),
    "model": (HALF, {"model": {"dies_at": 41}}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_outage_in_rgrpo_is_waited_out_or_leaves_a_checkpoint_that_goes_on_exactly(run, tmp_path, capsys, case):
    flags, deaths = CASES[case]
    whole, _ = run("whole", flags)
    assert any(item["grad_norm"] > 0 for item in whole.state.log_history if "grad_norm" in item)
    back, servers = run("back", flags, **{case: {**deaths[case], "returns": 1.0}})
    assert_same_run(whole, back)
    said = capsys.readouterr().err
    assert said.count("does not answer") == said.count("answers again") == 1
    if case == "model":
        assert servers[1].loads > 1 + 5 // 2, "the server that came back was given the weights"
    with pytest.raises(StoppedError) as stopped:
        run("cut", flags, waits=0.3, **deaths)
    [kept] = checkpoints_in(tmp_path / "cut")
    step = int(kept.name.partition("-")[2])
    assert 0 < step < flags["max_steps"] and fault_of(kept) is None
    assert f"Stopped before step {step + 1}; {kept} is saved: the same command goes on from it" in str(stopped.value)
    assert "gave no answer in" in str(stopped.value)
    with pytest.raises(SystemExit) as ended, exit_with_message("train_grpo.py"):
        raise stopped.value
    assert ended.value.code == 1 and str(kept) in capsys.readouterr().err
    resumed, _ = run("cut", flags)
    assert_same_run(whole, resumed)


@pytest.mark.parametrize("case", CASES)
def test_a_signal_ends_the_waiting_with_a_checkpoint_that_goes_on_exactly(run, tmp_path, case):
    flags, deaths = CASES[case]
    started = []

    def stop() -> None:
        while not hasattr(run, "servers") or all(server.server.fileno() != -1 for server in run.servers):
            time.sleep(0.05)
        time.sleep(0.5)
        started.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(StoppedError, match=r"gave no answer in [0-9] s .*Stopped before step \d; .* is saved"):
        run("cut", flags, waits=600, **deaths)
    assert time.monotonic() - started[0] < 30
    assert not Patience.process_stops
    whole, resumed = (run(name, flags)[0] for name in ("whole", "cut"))
    assert_same_run(whole, resumed)


@pytest.mark.parametrize(("which", "step"), [(0, 2), (1, 2), (0, 5), (1, 5)])
def test_an_outage_while_the_crop_gain_is_measured_stops_before_a_step_and_not_after_the_last(
    run, tmp_path, monkeypatch, capsys, which, step
):
    flags = {**HALF, "watch_every": 2, "watch_samples": 3}
    measure = CropGain.measure

    def dying(callback):
        server = run.servers[which].server
        if callback.trainer.state.global_step == step and server.fileno() != -1:
            server.die()
        measure(callback)

    monkeypatch.setattr(CropGain, "measure", dying)
    if step == 5:
        trainer, _ = run("cut", flags, waits=0.2)
        assert trainer.state.global_step == 5
        assert re.search(r"the crop gain at the end was not measured: the .* gave no answer", capsys.readouterr().out)
        return
    with pytest.raises(StoppedError, match=r"Stopped before step 3; .*checkpoint-2 is saved"):
        run("cut", flags, waits=0.2)
    monkeypatch.undo()
    whole, resumed = (run(name, flags)[0] for name in ("whole", "cut"))
    assert_same_run(whole, resumed)


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        ("full", r"line \d+, QnA\[\d\]: missing image"),
        ("lazy", r"100 rows drawn from .* were all faulty, the last: line \d+, QnA\[\d\]: missing image"),
    ],
)
def test_images_that_go_after_the_start_stop_rgrpo_with_a_checkpoint_and_their_row(
    base_folder, data_folder, tmp_path, check, reason
):
    shutil.copytree(data_folder, tmp_path / "data")
    flags = {"max_steps": 3, "save_steps": 100, "data_check": check}
    settings = settings_for("grpo", base_folder, tmp_path / "data", tmp_path / "cut", **flags)
    _, trainer = grpo_trainer(settings, (length_part(),))
    announce = trainer.rows.images.announce

    def gone(paths):
        if trainer.state.global_step == 1:  # the third batch is asked for before the second step
            (tmp_path / "data/images").rename(tmp_path / "data/moved")
        announce(paths)

    trainer.rows.images.announce = gone
    with pytest.raises(StoppedError, match=reason + ".*checkpoint-2 is saved"):
        train(trainer, settings, "grpo")
    (tmp_path / "data/moved").rename(tmp_path / "data/images")
    trained = []
    for name in ("cut", "whole"):
        settings = settings_for("grpo", base_folder, tmp_path / "data", tmp_path / name, **flags)
        trained.append(grpo_trainer(settings, (length_part(),))[1])
        train(trained[-1], settings, "grpo")
    assert_same_run(*trained)


def test_images_that_go_after_the_start_stop_sft_with_a_checkpoint(base_folder, data_folder, tmp_path, monkeypatch):
    """Else it would go on for hours without a row to learn from."""
    monkeypatch.setattr(row_index, "RECENT", 8)
    shutil.copytree(data_folder, tmp_path / "data")
    flags = {"max_steps": 9, "save_steps": 100, "data_check": "lazy", "batch_size": 4}
    settings = settings_for("sft", base_folder, tmp_path / "data", tmp_path / "out", **flags)
    _, trainer = sft_trainer(settings)
    step = trainer.training_step

    def gone(*args):
        if trainer.state.global_step == 2:
            (tmp_path / "data/images").rename(tmp_path / "data/moved")
        return step(*args)

    trainer.training_step = gone
    with pytest.raises(StoppedError, match=r"8 of the last 8 rows .* faulty, .*missing image.*checkpoint-6 is saved"):
        train(trainer, settings, "sft")
    (tmp_path / "data/moved").rename(tmp_path / "data/images")
    _, trainer = sft_trainer(settings)
    train(trainer, settings, "sft")
    assert trainer.state.global_step == 9 and trainer.fault_logs["train"].skipped == 8


def test_a_server_is_told_the_whole_path_of_the_weights(serve, renderer, monkeypatch, tmp_path):
    """Its own working folder is another one than ours, from which output_dir counts."""
    monkeypatch.chdir(tmp_path)
    model = WordModel(serve, renderer)
    VLLMServer(model.address, rows=1, folder="outputs/vllm_weights").load(iter([("weight", torch.ones(2))]))
    [path] = [body["kwargs"]["weights_path"] for _, _, body in model.server.seen if "kwargs" in body]
    assert Path(path).is_relative_to(tmp_path / "outputs/vllm_weights")


def test_an_outage_in_the_first_step_says_that_nothing_is_lost(run, tmp_path):
    with pytest.raises(StoppedError, match="Stopped before step 1; no step was taken: start again"):
        run("cut", TWICE, judge={"dies_at": 1}, waits=0.1)
    assert not checkpoints_in(tmp_path / "cut")


def test_pauses_grow_and_patience_ends(monkeypatch):
    clock, pauses = [0.0], []

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr(patience.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(patience.time, "sleep", sleep)
    server = Patience("the server", 100)
    with pytest.raises(OutageError, match=r"the server gave no answer in 100 s \(refused\)"):
        while True:
            before = clock[0]
            server.failed("refused")
            pauses.append(clock[0] - before)
    assert pauses[0] == patience.FIRST_PAUSE and 20 < max(pauses) <= 30 and sum(pauses) == 100
    assert pauses[:-1] == sorted(pauses[:-1])
    assert len(pauses) < 15
    server.answered()
    server.failed("refused again")
    assert clock[0] == 100 + patience.FIRST_PAUSE
