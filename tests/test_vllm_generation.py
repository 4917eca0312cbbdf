"""vLLM for real: the same tokens, log-probs and records as our engine, in this process and on a server.

What is marked `vllm` needs the environment of requirements-vllm.txt: `make test-vllm`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # vLLM would take the cores from its neighbours

import pytest
import torch
from PIL import Image
from test_trainers import LORA, grpo_trainer, length_part, settings_for
from transformers import TrainerCallback

import demo_model
import demo_world
import inference as command
import vllm_generation
from config import GRPOStageConfig, InferenceConfig, SettingsError
from generation import CropEngine
from inference import QwenVLInference
from rollouts import SamplingParams
from training import train
from vllm_generation import LocalVLLM, VLLMEngine, VLLMServer, collapse, trained_weights

QUESTIONS = ["Which stripes are on the red square?", "What?", "Which stripes are on the blue circle, please tell?"]
CALLS = "<think>\nhere <tool_call>[3, 3, 30, 40]</tool_call> and <tool_call>[9, 9, 1, 1]</tool_call> "
WANTED = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
needs_vllm = pytest.mark.vllm


@pytest.fixture(scope="module")
def prompts(renderer):
    pictures = [Image.fromarray(demo_world.draw_picture(3, index).pixels) for index in range(3)]
    pictures[1] = pictures[1].resize((300, 500))
    return [renderer.prompt(*pair) for pair in zip(QUESTIONS, pictures, strict=True)]


@pytest.fixture(scope="module")
def scripts(renderer):
    """Beginnings with no call, one that is not carried out beside one that is, and three that are, one very small."""
    small = "<tool_call>[3, 3, 4, 5]</tool_call>"
    return [renderer.text_ids(text) for text in ("<think>\nThe red ", CALLS, CALLS + small + " shows" + small)]


@pytest.fixture(scope="module")
def engine(tiny_model, renderer):
    return CropEngine(tiny_model, renderer)


@pytest.fixture(scope="module")
def plain_folder(base_folder, tmp_path_factory):
    """The model with a processor that enlarges small crops, as Qwen's own does."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    shutil.copytree(base_folder, folder)
    processor = demo_model.build_processor()
    processor.image_processor.size = {"shortest_edge": 9 * demo_world.MERGED_PATCH**2, "longest_edge": 10**6}
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def local(plain_folder, renderer):
    return LocalVLLM(str(plain_folder), renderer, "float32", rows=16)


@pytest.fixture(autouse=True, scope="module")
def several_in_one_process():
    """Keep every vLLM of this module: one that is freed would take what is global to the process from the others."""
    kept, start = [], LocalVLLM.__init__

    def keep(self, *args, **kwargs):
        kept.append(self)
        start(self, *args, **kwargs)

    LocalVLLM.__init__ = keep
    yield
    LocalVLLM.__init__ = start


@pytest.fixture(scope="module")
def address(plain_folder, renderer):
    """A running `vllm serve`, as the README starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = plain_folder.with_name("vllm_serve.log")
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    # The module behind `vllm serve`, whose command asks for metadata that the CPU build has under another name.
    arguments = f"-m vllm.entrypoints.openai.api_server --model {plain_folder} --host 127.0.0.1 --port {port}".split()
    arguments += f"--enable-scale-out --dtype float32 --enforce-eager --kv-cache-memory-bytes {2**27}".split()
    arguments += ["--mm-processor-kwargs", json.dumps({"size": dict(renderer.processor.image_processor.size)})]
    with log.open("w") as output:
        server = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=output, stderr=output)
    try:
        yield f"http://127.0.0.1:{_when_ready(server, port, log)}"
    finally:
        server.terminate()
        server.wait(60)


def _when_ready(server: subprocess.Popen, port: int, log: Path) -> int:
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return port
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(scope="module")
def server(address, tmp_path_factory):
    return VLLMServer(address, rows=8, folder=tmp_path_factory.mktemp("sync"))


@pytest.fixture(scope="module", params=["local", "server"])
def backend(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def on_vllm(backend, renderer, tiny_model):
    return VLLMEngine(backend, renderer, tiny_model.config, tiny_model.generation_config)


def _reset(backend):
    """The weights that the module's other tests expect."""
    backend.load(iter(demo_model.build_model(demo_model.build_processor()).state_dict().items()))


def assert_same(given, expected, tolerance=1e-4):
    for one, other in zip(given, expected, strict=True):
        for name in ("prompt_ids", "completion_ids", "sampled_mask", "tool_calls", "text", "finish_reason"):
            assert getattr(one, name) == getattr(other, name), name
        assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]
        assert one.logprobs == pytest.approx(other.logprobs, abs=tolerance)


# ------------------------------------------------------------------------------------ without vLLM installed


def test_without_vllm_the_error_names_the_requirements(monkeypatch, renderer):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SettingsError, match=r"pip install -r requirements-vllm\.txt"):
        LocalVLLM("somewhere", renderer, "float32", rows=1)


def test_vllms_environment_has_all_that_the_project_imports():
    root = Path(command.__file__).parent
    ours, vllms = (
        set(re.findall(r"^[\w-]+==", (root / name).read_text(), re.MULTILINE))
        for name in ("requirements.txt", "requirements-vllm.txt")
    )
    assert ours - vllms == {"torch==", "torchvision==", "transformers=="}, "those that vLLM decides"


def test_an_address_without_a_server_is_named(renderer):
    with pytest.raises(SettingsError, match=r"there is no vLLM server at http://127\.0\.0\.1:9"):
        VLLMServer("http://127.0.0.1:9", rows=1)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (GRPOStageConfig, {"trl": {"use_vllm": True}}, "cannot insert crops: give rollout_backend=vllm instead"),
        (GRPOStageConfig, {"vllm_server": "http://a"}, "only vLLM reads it: add --rollout_backend vllm"),
        (GRPOStageConfig, {"vllm_sync_dir": "x"}, "without vllm_server nothing reads it"),
        (
            GRPOStageConfig,
            {"rollout_backend": "vllm", "vllm_server": "http://a", "temperature": 0.7},
            "reports log-probs at temperature 1 alone",
        ),
        (InferenceConfig, {"vllm_server": "http://a"}, "only vLLM reads it: add --backend vllm"),
        (InferenceConfig, {"backend": "vllm", "vllm_server": "a:8000"}, "must be an address like"),
        (InferenceConfig, {"backend": "vllm", "device": "cpu"}, "vLLM's own choice"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, values, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        config(**values)


def test_each_image_keeps_one_pad():
    assert collapse([1, 7, 7, 7, 2, 7, 3, 7, 7], 7) == [1, 7, 2, 7, 3, 7]


def test_synced_weights_of_full_training_are_the_language_model(trainable_model):
    trainable_model.model.visual.requires_grad_(False)
    sent = dict(trained_weights(trainable_model))
    names = {name for name in trainable_model.state_dict() if "visual" not in name}
    assert set(sent) == names
    trainable_model.model.visual.requires_grad_(True)
    assert set(dict(trained_weights(trainable_model))) == set(trainable_model.state_dict())


def test_synced_weights_of_an_adapter_are_merged_and_the_model_stays_as_it_is(base_folder, data_folder, tmp_path):
    _, trainer = grpo_trainer(settings_for("grpo", base_folder, data_folder, tmp_path, beta=0, **LORA))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    sent = dict(trained_weights(trainer.model))
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    merged = deepcopy(trainer.model).merge_and_unload().state_dict()
    assert set(sent) == {name for name in merged if "visual" not in name}
    assert all(torch.allclose(value, merged[name], atol=1e-6) for name, value in sent.items())
    plain = trainer.model.get_base_model().model.language_model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.allclose(sent["model.language_model.layers.0.self_attn.q_proj.weight"], plain, atol=1e-4)


# --------------------------------------------------------------------------------------------------- tokens


@needs_vllm
def test_greedy_tokens_and_logprobs_equal_our_engines_with_crops(on_vllm, engine, prompts, scripts):
    sampling = SamplingParams(110, temperature=0.0)
    expected = engine.generate(prompts, sampling, forced=scripts)
    assert [len(rollout.images) for rollout in expected] == [1, 2, 4]
    assert all(sum(r.sampled_mask) > len(script) + 3 for r, script in zip(expected, scripts, strict=True))
    assert_same(on_vllm.generate(prompts, sampling, forced=scripts), expected)


@needs_vllm
def test_sampled_rollouts_carry_the_mask_and_logprobs_that_our_engine_gives_their_tokens(
    backend, on_vllm, engine, prompts, scripts
):
    temperature = 1.0 if backend.is_shared else 0.7
    sampling = SamplingParams(110, temperature=temperature, top_p=0.95, top_k=200)
    forced = [script for script in scripts for _ in range(4)]
    given = on_vllm.generate(prompts, sampling, counts=4, forced=forced)
    assert len({tuple(rollout.completion_ids) for rollout in given}) == 12
    own = [[t for t, m in zip(r.completion_ids, r.sampled_mask, strict=True) if m] for r in given]
    assert_same(given, engine.generate(prompts, sampling, counts=4, forced=own))


@needs_vllm
def test_calls_that_the_model_makes_itself_are_carried_out(local, renderer, trainable_model, prompts):
    """A model that closes a call wherever it may, so that its own calls, not scripted ones, drive the loop."""
    close = renderer.ids["</tool_call>"]
    with torch.no_grad():
        trainable_model.lm_head.weight[close] *= 8
    try:
        local.load(iter(trainable_model.state_dict().items()))
        on_vllm = VLLMEngine(local, renderer, trainable_model.config, trainable_model.generation_config)
        forced = [renderer.text_ids("<tool_call>[3, 3, 30, 40]")] * 6
        sampling = SamplingParams(40, temperature=0.0)
        engine = CropEngine(trainable_model, renderer)
        given = on_vllm.generate(prompts, sampling, counts=2, forced=forced)
        assert any(len(r.images) > 1 for r in given) or any(r.tool_calls for r in given)
        assert_same(given, engine.generate(prompts, sampling, counts=2, forced=forced))
    finally:
        _reset(local)


@needs_vllm
def test_image_tokens_never_appear_even_when_the_model_wants_nothing_else(
    backend, renderer, trainable_model, prompts, scripts
):
    wanted = [renderer.ids[token] for token in WANTED]
    direction = torch.randn(trainable_model.lm_head.weight.shape[1])
    with torch.no_grad():  # of two opposite directions, one is always far above all others
        for at, token in enumerate(wanted):
            trainable_model.lm_head.weight[token] = 1e3 * direction * (-1) ** at
    assert _first_choice(trainable_model, renderer, prompts[0]) in wanted
    try:
        backend.load(iter(trainable_model.state_dict().items()))
        on_vllm = VLLMEngine(backend, renderer, trainable_model.config, trainable_model.generation_config)
        for temperature in (0.0, 1.0):
            sampling = SamplingParams(110, temperature=temperature, seed=0)
            for rollout in on_vllm.generate(prompts, sampling, counts=2, forced=[s for s in scripts for _ in "ab"]):
                own = [t for t, m in zip(rollout.completion_ids, rollout.sampled_mask, strict=True) if m]
                assert not set(own) & set(wanted)
                assert rollout.completion_ids.count(wanted[2]) == len(rollout.images) - 1
    finally:
        _reset(backend)


def _first_choice(model, renderer, prompt) -> int:
    from conversation import EncodedExample, model_inputs

    inputs = model_inputs([EncodedExample(prompt.ids, prompt.ids, prompt.images)], renderer)
    inputs.pop("labels")
    with torch.no_grad():
        return int(model(**inputs).logits[0, -1].argmax())


@needs_vllm
def test_a_seed_samples_the_same_tokens_again_and_rows_differ(on_vllm, prompts, scripts):
    def ids(seed):
        sampling = SamplingParams(110, seed=seed)
        return [r.completion_ids for r in on_vllm.generate(prompts[1:2], sampling, 3, forced=[scripts[1]] * 3)]

    def ids_without():
        torch.manual_seed(5)
        return ids(None)

    assert ids(1) == ids(1)
    assert ids_without() == ids_without()
    assert ids(1) != ids(2)
    assert len({tuple(row) for row in ids(1)}) == 3


@needs_vllm
def test_limits_and_withheld_crops_are_those_of_our_engine(on_vllm, engine, prompts, scripts):
    for sampling in (
        SamplingParams(110, temperature=0.0, max_crops=1),
        SamplingParams(110, temperature=0.0, crops="off"),
        SamplingParams(110, temperature=0.0, crops="blank"),
        SamplingParams(len(scripts[2]), temperature=0.0),  # the last forced token ends the budget
        SamplingParams(5, temperature=0.0),
    ):
        expected = engine.generate(prompts[2:], sampling, forced=scripts[2:])
        assert_same(on_vllm.generate(prompts[2:], sampling, forced=scripts[2:]), expected)


@needs_vllm
def test_a_stream_is_the_rollout_that_generate_gives(on_vllm, prompts, scripts):
    sampling = SamplingParams(110, temperature=0.0)
    for prompt, script in zip(prompts, scripts, strict=True):
        *_, last = responses = list(on_vllm.stream(prompt, sampling, script))
        assert all(response is last for response in responses)
        assert_same([on_vllm.writer.rollout(last)], on_vllm.generate([prompt], sampling, forced=[script]))


@needs_vllm
def test_progress_counts_every_rollout_once(on_vllm, prompts):
    finished = []
    on_vllm.generate(prompts, SamplingParams(4, seed=0), counts=[1, 0, 3], on_finish=finished.append)
    assert sum(finished) == 4


@needs_vllm
def test_what_was_read_before_comes_from_the_prefix_cache(local, renderer, tiny_model, prompts, scripts, monkeypatch):
    cached, completion = [], vllm_generation._completion
    monkeypatch.setattr(
        vllm_generation, "_completion", lambda out: cached.append(out.num_cached_tokens) or completion(out)
    )
    on_vllm = VLLMEngine(local, renderer, tiny_model.config, tiny_model.generation_config)
    local.load(iter(tiny_model.state_dict().items()))  # which forgets the prefixes of the old weights
    prompt = renderer.prompt(QUESTIONS[0] * 20, prompts[0].original)
    block = local.llm.llm_engine.vllm_config.cache_config.block_size
    rollouts = on_vllm.generate([prompt], SamplingParams(4), counts=4)
    whole = len(prompt.ids) // block * block
    assert len(rollouts) == 4
    assert sorted(cached) == [0, whole, whole, whole], "four rollouts read one prompt once"
    assert whole >= block
    local.load(iter(tiny_model.state_dict().items()))
    on_vllm.generate([prompt], SamplingParams(4))
    assert cached[-1] == 0, "new weights forget what the old ones read"


@needs_vllm
def test_images_that_vllm_expands_twice_are_noticed(on_vllm, prompts, monkeypatch):
    monkeypatch.setattr(vllm_generation, "collapse", lambda ids, pad: list(ids))
    with pytest.raises(RuntimeError):
        on_vllm.generate(prompts[:1], SamplingParams(3))


@needs_vllm
def test_an_answer_that_fills_vllms_longest_sequence_ends_as_length(on_vllm, renderer, prompts, monkeypatch):
    room = on_vllm.backend.max_length
    longer = 10 * room
    prompt = renderer.prompt("What? " * (room // 7), prompts[0].original)
    assert room // 2 < len(prompt.ids) < room
    call = renderer.text_ids(CALLS)
    rollout = on_vllm.generate([prompt], SamplingParams(longer, temperature=0.0), forced=[call])[0]
    assert [call.outcome for call in rollout.tool_calls] == ["over_limit", "inverted"], "no room for a crop and answer"
    if rollout.finish_reason == "length":  # else the random model happened to end its answer before
        assert len(rollout.prompt_ids + rollout.completion_ids) == room
    with pytest.raises(SettingsError, match=f"vLLM was started for {room}"):
        on_vllm.generate([prompt], SamplingParams(longer), forced=[call * room])


# ------------------------------------------------------------------------------------------ training, answers


class SameAsEngine(TrainerCallback):
    """After every step: vLLM with the synced weights against our engine on the model that trains."""

    def __init__(self, prompts, scripts):
        self.prompts, self.scripts, self.trainer, self.seen = prompts, scripts, None, []

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.engine.sync_weights()
        sampling = SamplingParams(110, temperature=0.0)
        expected = CropEngine(trainer.model, trainer.engine.renderer).generate(
            self.prompts, sampling, forced=self.scripts
        )
        assert_same(trainer.engine.generate(self.prompts, sampling, forced=self.scripts), expected)
        self.seen.append([rollout.logprobs for rollout in expected])


@needs_vllm
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("where", ["inside", "server"])
def test_three_rgrpo_steps_sample_from_the_weights_that_train(
    where, lora, base_folder, data_folder, tmp_path, prompts, scripts, request
):
    flags = {"rollout_backend": "vllm", "max_steps": 3, "beta": 0.1, **(LORA if lora else {})}
    if where == "server":
        server = request.getfixturevalue("server")
        flags["vllm_server"] = server.url
        request.addfinalizer(lambda: _reset(server))
    else:
        flags["temperature"] = 0.9
    settings = settings_for("grpo", base_folder, data_folder, tmp_path, **flags)
    _, trainer = grpo_trainer(settings, (length_part(),))
    checks = SameAsEngine(prompts, scripts)
    checks.trainer = trainer
    trainer.add_callback(checks)
    train(trainer, settings, "grpo")
    assert len(checks.seen) == 3
    assert checks.seen[0] != checks.seen[1] != checks.seen[2]
    log = [item for item in trainer.state.log_history if "loss" in item]
    # The rollouts of each step came from the synced weights: TRL compares their log-probs with the trainer's.
    assert max(item["sampling/sampling_logp_difference/max"] for item in log) < 1e-3
    kept = [path.name for path in tmp_path.glob("vllm_weights/*/*")]
    assert kept == (["model.safetensors"] if where == "server" else []), "for a server that comes back without them"


@needs_vllm
@pytest.mark.parametrize("where", ["inside", "server"])
def test_two_processes_have_a_vllm_each_or_share_a_server(where, base_folder, data_folder, tmp_path, request):
    flags = f"--model_name {base_folder} --train_data {data_folder}/train.jsonl --image_base_path {data_folder} "
    flags += f"--output_dir {tmp_path}/out --rollout_backend vllm --max_steps 2 --num_generations 4 --batch_size 4 "
    flags += "--gradient_accumulation_steps 1 --max_completion_length 16 --use_lora --lora_r 8 --beta 0 "
    flags += "--logging_steps 1 --use_cpu true --ddp_backend gloo --learning_rate 1e-3"
    if where == "server":
        server = request.getfixturevalue("server")
        flags += f" --vllm_server {server.url}"
        request.addfinalizer(lambda: _reset(server))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [*launch, "train_grpo.py", *flags.split()],
        cwd=Path(command.__file__).parent,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((tmp_path / "out/training_log.json").read_text())["history"]
    differences = [item["sampling/sampling_logp_difference/max"] for item in log if "loss" in item]
    assert len(differences) == 2
    assert max(differences) < 1e-3
    assert not list(tmp_path.glob("out/vllm_weights/*")), "weights are left behind"


@needs_vllm
def test_answers_through_the_api_with_a_follow_up(base_folder, prompts):
    def answers(**flags):
        config = InferenceConfig(str(base_folder), max_new_tokens=30, temperature=0.0, **flags)
        answering = QwenVLInference(config)
        first = answering.generate(prompts[0].original, QUESTIONS[0])
        return [first.to_dict(), answering.follow_up(first, "And?").to_dict()]

    assert answers(backend="vllm") == answers()


@needs_vllm
def test_an_adapter_answers_merged(base_folder, data_folder, tmp_path, prompts):
    loaded, _ = grpo_trainer(settings_for("grpo", base_folder, data_folder, tmp_path, beta=0, **LORA))
    loaded.model.save_pretrained(tmp_path / "adapter")
    loaded.processor.save_pretrained(tmp_path / "adapter")
    loaded.contract.save(tmp_path / "adapter")

    def answer(**flags):
        config = InferenceConfig(str(tmp_path / "adapter"), max_new_tokens=30, temperature=0.0, **flags)
        return QwenVLInference(config).generate(prompts[0].original, QUESTIONS[0]).rollout

    assert_same([answer(backend="vllm")], [answer()])


@needs_vllm
def test_the_command_answers_over_the_server(base_folder, address, prompts, tmp_path, capsys):
    prompts[0].original.save(tmp_path / "image.png")
    shared = ["--model_path", str(base_folder), "--image_path", f"{tmp_path}/image.png", "--question", QUESTIONS[0]]
    shared += ["--temperature", "0", "--max_new_tokens", "30", "--output_json"]
    command.main([*shared, f"{tmp_path}/vllm.json", "--backend", "vllm", "--vllm_server", address])
    command.main([*shared, f"{tmp_path}/engine.json"])
    answers = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("vllm", "engine")]
    assert answers[0] == answers[1]
