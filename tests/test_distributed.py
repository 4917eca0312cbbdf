"""Two processes on the CPU, for real: both stages, what they share, and what must not make them wait for ever."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.dataclasses import get_module_class_from_name
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load, load_file
from test_outages import WordModel
from two_processes import Group

from config import InferenceConfig, SettingsError
from model_utils import load_for_inference
from rollout_pages import read_rollouts
from sharding import check_rollouts_possible

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs/accelerate").glob("*.yaml"))
SECONDS = 240  # far more than any run here takes: past it, the processes wait for each other


def launch(script: str, *arguments: str, **environment: str) -> str:
    """Run a script on two processes; returns what both printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout


def run_scenarios(base: Path, data: Path, folder: Path, scenarios: list[str], **environment: str):
    """name -> what each process reports."""
    plan = {"base": str(base), "data": str(data), "folder": str(folder), "scenarios": scenarios}
    (folder / "plan.json").write_text(json.dumps(plan))
    launch("tests/two_processes.py", str(folder / "plan.json"), **environment)
    return {name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)] for name in scenarios}


def launcher_environment(config: Path, *flags: str) -> dict[str, str]:
    """What `accelerate launch --config_file …` puts into the environment, by accelerate's own code."""
    arguments = launch_command_parser().parse_args(["--config_file", str(config), *flags, "train_qwenvl_25.py"])
    arguments, *_ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""  # the launcher itself adds it
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def zero_environment(stage: int) -> dict[str, str]:
    environment = launcher_environment(ROOT / f"configs/accelerate/zero{stage}.yaml", "--mixed_precision", "no")
    return environment | {"ACCELERATE_USE_CPU": "false", "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def ddp(base_folder, data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    rows = (data_folder / "train.jsonl").read_text().splitlines()
    rows[4] = rows[4].replace(".jpg", ".gone.jpg")
    (folder / "fresh.jsonl").write_text("\n".join(rows) + "\n")
    half = [line if n % 2 else line.replace(".jpg", ".gone.jpg") for n, line in enumerate(rows)]
    (folder / "half_faulty.jsonl").write_text("\n".join(half) + "\n")
    names = ["data_check", "sft", "order", "grpo", "cut", "group", "stand_in", "blind", "outage"]
    names += ["faults", "unshared_disk"]
    return folder, run_scenarios(base_folder, data_folder, folder, names)


@pytest.fixture(scope="module")
def fsdp(base_folder, data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    environment = launcher_environment(ROOT / "configs/accelerate/fsdp2.yaml", "--mixed_precision", "no")
    return folder, run_scenarios(
        base_folder, data_folder, folder, ["sft", "grpo", "lora", "resume", "group"], **environment
    )


@pytest.fixture(scope="module")
def alone(base_folder, data_folder, tmp_path_factory):
    """One process with twice the batch."""
    folder = tmp_path_factory.mktemp("alone")
    group = Group(str(base_folder), str(data_folder), str(folder))
    return folder, {"sft": group.sft(8), "grpo": group.grpo(8), "cut": group.cut(8), "lora": group.lora(8)}


def assert_same_weights(first: Path, second: Path) -> None:
    name = next(path.name for path in first.glob("*.safetensors"))
    left, right = load_file(first / name), load_file(second / name)
    assert left.keys() == right.keys()
    assert {key for key in left if not torch.allclose(left[key], right[key], atol=1e-6)} == set()


# ------------------------------------------------------------------------------------- data parallel (DDP)


def test_both_stages_run_on_two_processes_and_only_the_first_speaks(base_folder, data_folder, tmp_path):
    stages = ("sft", "grpo")
    printed = launch(
        *("train_qwenvl_25.py", "--stage", "both", "--model_name", str(base_folder)),
        *("--train_data", f"{data_folder}/train.jsonl", "--val_data", f"{data_folder}/val.jsonl"),
        *("--image_base_path", str(data_folder), "--num_generations", "4", "--max_completion_length", "16"),
        *("--sft_output_dir", f"{tmp_path}/sft", "--grpo_output_dir", f"{tmp_path}/grpo", "--sft_eval_steps", "1"),
        *("--max_steps", "2", "--batch_size", "4", "--gradient_accumulation_steps", "1", "--logging_steps", "1"),
        *("--disable_tqdm", "true", "--ddp_backend", "gloo", "--use_cpu", "true"),
    )
    for once in ("=== stage 1: SFT ===", "=== stage 2: R-GRPO ===", "train.jsonl: 36 examples", "parameters train"):
        assert printed.count(once) == (2 if once[0] in "tp" else 1), once  # of two stages
    assert len(re.findall(r"^\{'loss'", printed, re.MULTILINE)) == 4
    for stage in stages:
        load_for_inference(InferenceConfig(str(tmp_path / stage / "final_model")))
        left = {path.name for path in (tmp_path / stage).iterdir()}
        assert left == {
            *("final_model", "started_from.json", "training_log.json", "training_curves.png"),
            *("checkpoint-1", "checkpoint-2"),
            *(("rollouts",) if stage == "grpo" else ()),
        }
        assert (tmp_path / stage / "checkpoint-2/crop_contract.json").is_file()


@pytest.mark.parametrize("scenario", ["sft", "grpo", "cut"])
def test_two_processes_learn_what_one_learns_with_twice_the_batch(ddp, alone, scenario):
    first, second = ddp[1][scenario]
    assert first["weights"] == second["weights"], "the processes have drifted apart"
    for figure in ("loss", "grad_norm"):
        assert first[figure] == second[figure]
        assert first[figure] == pytest.approx(alone[1][scenario][figure], rel=1e-4)
    assert all(norm > 0 for norm in first["grad_norm"])
    assert_same_weights(ddp[0] / scenario / "final_model", alone[0] / scenario / "final_model")


def test_a_token_weighs_the_same_in_every_micro_batch(alone, base_folder, data_folder, tmp_path):
    group = Group(str(base_folder), str(data_folder), str(tmp_path))
    halves = group.sft(4, "halves", gradient_accumulation_steps=2)
    assert halves["loss"] == pytest.approx(alone[1]["sft"]["loss"], rel=1e-6)
    assert_same_weights(tmp_path / "halves/final_model", alone[0] / "sft/final_model")


def test_processes_may_differ_in_calls_lengths_and_images(ddp):
    first, second = ddp[1]["grpo"]
    assert first["images"] == [2, 3, 2, 3]
    assert second["images"] == [1, 1, 1, 1]
    assert set(first["finish"]) == {"stop"}
    assert set(second["finish"]) == {"length"}
    assert max(*first["differences"], *second["differences"]) < 1e-4


def test_rollouts_of_one_prompt_differ_between_processes(ddp):
    first, second = ddp[1]["group"]
    assert first["rows"] == second["rows"]
    assert len({*first["texts"], *second["texts"]}) == 8


def test_a_faulty_row_of_a_long_file_gives_way_to_the_same_one_on_all_processes(ddp):
    first, second = ddp[1]["stand_in"]
    assert first == second
    assert len(first["rows"]) == 4 and all(len({*lines}) == 1 and lines[0] % 2 == 0 for lines in first["rows"])
    faulty = {line for line, _, _ in first["known"]}
    assert faulty and first["skipped"] >= len(first["known"]) and first["drawn"] >= 4
    assert len((ddp[0] / "stand_in/bad_rows.jsonl").read_text().splitlines()) == len(first["known"])


def test_a_row_that_one_process_alone_finds_faulty_stops_all_with_a_checkpoint(ddp):
    for result in ddp[1]["blind"]:
        assert "can be read by some of the processes alone. Stopped before step 2; " in result["stopped"]
        assert "blind/checkpoint-1 is saved" in result["stopped"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_fixed_questions_are_shared_out_and_one_process_keeps_its_rollouts(kind, request):
    folder, results = request.getfixturevalue(kind)
    first, second = results["group"]
    assert first["watched"] == second["watched"]
    assert [(item["step"], item["watch/questions"]) for item in first["watched"]] == [(0, 3), (1, 3)]
    _, rows = read_rollouts(folder / "group/rollouts/step_000001.jsonl")
    assert [row["text"] for row in rows] == first["texts"]


def test_every_row_is_seen_in_every_epoch(ddp, data_folder):
    seen = [result["seen"] for result in ddp[1]["order"]]
    steps = len(seen[0]) // 3
    assert len(seen[0]) == len(seen[1])
    for epoch in range(3):
        rows = {tuple(row) for part in seen for row in part[epoch * steps : (epoch + 1) * steps]}
        assert len(rows) == 36
    assert seen[0][:steps] != seen[0][steps : 2 * steps]


def test_data_are_checked_once_for_all_processes(ddp):
    results = ddp[1]["data_check"]
    assert sum(result["checked"] for result in results) == 12
    assert results[0]["lines"] == results[1]["lines"] == [line for line in range(1, 13) if line != 5]
    assert len((ddp[0] / "data_check/bad_rows.jsonl").read_text().splitlines()) == 1


def test_processes_that_see_different_checkpoints_end_with_a_message(ddp):
    for result in ddp[1]["unshared_disk"]:
        assert "different checkpoints (checkpoint-1, None): output_dir must be on a disk" in result["error"]


def test_what_one_process_misses_stops_all_with_a_checkpoint_that_goes_on(ddp):
    for result in ddp[1]["outage"]:
        assert "missing image. Stopped before step 2; " in result["cut"]["stopped"]
        assert "outage/checkpoint-1 is saved: the same command goes on from it" in result["cut"]["stopped"]
        assert result["resumed"] == result["straight"]


def test_faulty_rows_of_one_process_stop_all_at_the_end_of_the_step(ddp):
    rest = "faults/checkpoint-2 is saved: the same command goes on from it"
    for result, reason in zip(ddp[1]["faults"], ("stopped by another process", "faulty rows"), strict=True):
        assert result["stopped"].startswith(f"{reason}; ") and result["stopped"].endswith(rest)


# --------------------------------------------------------------------------------------- sharded (FSDP2)


@pytest.mark.parametrize("scenario", ["sft", "grpo", "lora"])
def test_fsdp2_learns_and_saves_what_one_process_does(fsdp, alone, scenario):
    first, second = fsdp[1][scenario]
    for result in (first, second):
        assert result["loss"] == pytest.approx(alone[1][scenario]["loss"], rel=1e-4)
        assert result["grad_norm"] == pytest.approx(alone[1][scenario]["grad_norm"], rel=1e-4)
    assert_same_weights(fsdp[0] / scenario / "final_model", alone[0] / scenario / "final_model")
    load_for_inference(InferenceConfig(str(fsdp[0] / scenario / "final_model")))


@pytest.mark.parametrize("scenario", ["grpo", "lora"])
def test_fsdp2_scores_rollouts_as_they_were_sampled(fsdp, scenario):
    first, second = fsdp[1][scenario]
    assert first["images"] != second["images"]
    assert max(*first["differences"], *second["differences"]) < 1e-4


def test_fsdp2_goes_on_from_a_checkpoint(fsdp):
    losses = fsdp[1]["resume"][0]
    assert len(losses["resumed"]) == 3
    assert losses["resumed"] == pytest.approx(losses["straight"], rel=1e-5)
    assert_same_weights(fsdp[0] / "resume/final_model", fsdp[0] / "straight/final_model")


class WeightKeeper(WordModel):
    """Keeps all weights that it is brought, and says the same whatever they are."""

    def __init__(self, *args) -> None:
        self.brought: list[dict[str, torch.Tensor]] = []
        super().__init__(*args)

    def answer(self, handler, body) -> None:
        if handler.path == "/collective_rpc":
            self.brought.append(load(Path(body["kwargs"]["weights_path"], "model.safetensors").read_bytes()))
            handler.send(b"")
        else:
            super().answer(handler, body)


@pytest.fixture
def brought(base_folder, data_folder, tmp_path, serve, renderer):
    """Weights that a server was brought in two runs of two steps, and what the processes report."""

    def run(kind: str, **environment: str):
        keeper = WeightKeeper(serve, renderer)
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "server").write_text(keeper.address)
        results = run_scenarios(base_folder, data_folder, tmp_path / kind, ["served"], **environment)["served"]
        assert not list((tmp_path / kind).glob("*/vllm_weights/*")), "weights are left behind"
        return keeper.brought, results

    return run


def assert_brings_the_same(brought, kind: str, **environment: str) -> None:
    """`kind` of sharding brings to the server what DDP does."""
    whole, alike = brought("ddp"), brought(kind, **environment)
    assert len(whole[0]) == len(alike[0]) == 4
    for one, other in zip(whole[0], alike[0], strict=True):
        assert one.keys() == other.keys() and len(one) > 20
        assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    for start, later in ((0, 1), (2, 3)):
        assert any(not torch.equal(value, whole[0][later][name]) for name, value in whole[0][start].items())
    for one, other in zip(whole[1], alike[1], strict=True):
        for name in ("whole", "adapter"):
            assert one[name]["texts"] == other[name]["texts"] and len(set(one[name]["texts"])) > 1
            assert one[name]["loss"] == pytest.approx(other[name]["loss"], rel=1e-4, abs=1e-6)
    assert whole[1][0]["whole"]["texts"] != whole[1][1]["whole"]["texts"]


def test_fsdp2_brings_a_vllm_server_the_weights_that_ddp_does(brought):
    config = ROOT / "configs/accelerate/fsdp2.yaml"
    assert_brings_the_same(brought, "fsdp", **launcher_environment(config, "--mixed_precision", "no"))


@pytest.mark.slow
def test_zero3_brings_a_vllm_server_the_weights_that_ddp_does(brought):
    pytest.importorskip("deepspeed")  # not among the requirements
    assert_brings_the_same(brought, "zero3", **zero_environment(3))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_learns_and_saves_what_one_process_does(alone, base_folder, data_folder, tmp_path, stage):
    pytest.importorskip("deepspeed")  # not among the requirements
    names = ["sft", "grpo", "lora"]
    results = run_scenarios(base_folder, data_folder, tmp_path, names, **zero_environment(stage))
    for name in names:
        for result in results[name]:
            assert result["loss"] == pytest.approx(alone[1][name]["loss"], rel=1e-4)
        assert_same_weights(tmp_path / name / "final_model", alone[0] / name / "final_model")
        load_for_inference(InferenceConfig(str(tmp_path / name / "final_model")))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "fsdp_version: 2"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, "ds3_gather_for_generation is off"),
    ],
)
def test_rollouts_without_whole_weights_are_refused(state, message):
    trainer = SimpleNamespace(
        is_fsdp_enabled="fsdp_plugin" in state,
        is_deepspeed_enabled="deepspeed_plugin" in state,
        accelerator=SimpleNamespace(state=SimpleNamespace(**state)),
        args=SimpleNamespace(ds3_gather_for_generation=False),
    )
    with pytest.raises(SettingsError, match=message):
        check_rollouts_possible(trainer)


# ------------------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_reads_the_config(path):
    config = ClusterConfig.from_yaml_file(path)  # refuses unknown keys
    assert config.mixed_precision == "bf16"
    assert config.num_processes == 8
    environment = launcher_environment(path)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if path.name.startswith("zero"):
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == path.stem[-1]
    assert (environment.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL") == "true") == (path.stem == "zero3")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_same_config_serves_two_machines(path):
    flags = ("--num_machines", "2", "--num_processes", "16", "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    launcher_environment(path, *flags, "--main_process_port", "29500")


def test_fsdp_config_cuts_up_what_the_model_has_and_saves_it_whole(tiny_model, monkeypatch):
    for name, value in launcher_environment(ROOT / "configs/accelerate/fsdp2.yaml").items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert all(get_module_class_from_name(tiny_model, name) for name in plugin.transformer_cls_names_to_wrap)
    assert len(plugin.transformer_cls_names_to_wrap) == 2
