"""The training recommendation: its borders, its command, its files.

python -m pytest tests/test_configure_training.py
"""

import json
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

import command_line
import config
import configure_training
import probe
from configure_training import recommend
from memory_model import GIB, phases

ROOT = Path(configure_training.__file__).parent
README_COMMAND = (
    "python train_qwenvl_25.py --stage both --train_data data/train.jsonl --val_data data/val.jsonl "
    "--image_base_path data/images --use_lora --lora_r 128 --learning_rate 2e-5 --batch_size 8 "
    "--gradient_accumulation_steps 4 --bf16"
)


@pytest.mark.parametrize(
    ("dataset_size", "gpu_memory", "expected"),
    [
        (1, 32, (True, 64, "2e-5")),
        (9_999, 32, (True, 64, "2e-5")),
        (10_000, 32, (True, 128, "2e-5")),
        (49_999, 80, (True, 128, "2e-5")),
        (50_000, 80, (True, 256, "1e-5")),
        (100_000, 80, (True, 256, "1e-5")),
        (100_001, 80, (False, None, "5e-6")),
        (100_001, 79.9, (True, 256, "1e-5")),
    ],
)
def test_method_changes_at_the_borders_of_the_guidelines(dataset_size, gpu_memory, expected):
    choice = recommend(dataset_size, gpu_memory)
    assert (choice.use_lora, choice.lora_r, choice.learning_rate) == expected


@pytest.mark.parametrize(
    ("gpu_memory", "batch"),
    [
        (8, (1, 32)),
        (16, (2, 16)),
        (23.9, (2, 16)),
        (24, (2, 16)),  # 4 sequences of R-GRPO's longest rollouts do not fit beside the 7B
        (32, (8, 4)),
        (48, (8, 4)),
        (80, (16, 2)),
        (141, (16, 2)),
    ],
)
def test_batch_follows_memory_and_stays_32_in_all(gpu_memory, batch):
    choice = recommend(5_000, gpu_memory)
    assert (choice.batch_size, choice.gradient_accumulation_steps) == batch
    assert choice.effective_batch == 32


def test_group_divides_every_effective_batch():
    for num_gpus, gpu_memory, dataset_size in product(range(1, 70), (8, 16, 24, 80), (1_000, 200_000)):
        choice = recommend(dataset_size, gpu_memory, num_gpus)
        assert choice.effective_batch >= 32
        assert choice.effective_batch % configure_training.GROUP_SIZE == 0


def test_full_fine_tuning_leaves_room_for_gradients():
    choice = recommend(200_000, 80)
    assert choice.batch_size < recommend(1_000, 80).batch_size
    assert "--use_lora" not in configure_training.training_command(choice, {})


def test_full_fine_tuning_of_a_32b_is_not_recommended_on_80_gb():
    assert recommend(200_000, 80, model_name="Qwen/Qwen2.5-VL-32B-Instruct").use_lora


def test_small_gpu_gets_the_model_that_fits_and_the_command_names_it():
    choice = recommend(5_000, 16)
    assert "3B" in choice.model_name
    assert f"--model_name {choice.model_name}" in configure_training.training_command(choice, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-5, 32), "dataset_size is -5, but it counts images"),
        ((0, 32), "dataset_size is 0"),
        ((100, 7.5), "gpu_memory is 7.5 GB.*use a GPU of 8 GB or more"),
        ((100, float("nan")), "gpu_memory is nan"),
        ((100, float("inf")), "gpu_memory is inf"),
        ((100, 32, 0), "num_gpus is 0"),
        (
            (100, 16, 1, "Qwen/Qwen2.5-VL-32B-Instruct"),
            "weights take 20.6 GB.*but gpu_memory is 16 GB: choose a smaller",
        ),
        ((100, 16, 1, "Qwen/Qwen2.5-VL-8B"), "no such file or folder. Built in are Qwen/Qwen2.5-VL-3B-Instruct"),
    ],
)
def test_bad_input_says_what_was_given_and_what_to_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        recommend(*arguments)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--dataset_size 900 --num_gpus 2 --method qlora --sharding fsdp2",
            "method is qlora, but fsdp2 cuts weights up",
        ),
        ("--dataset_size 900 --sharding zero3", "sharding is zero3, but there is one GPU"),
        ("--dataset_size 900 --crops -1", "crops is -1, but it must be at least 0"),
        ("--dataset_size 900 --max_completion_length 0", "max_completion_length is 0, but it must be at least 1"),
        ("--dataset_size 900 --batch_size 0", "batch_size is 0, but it must be at least 1"),
        ("--data empty.jsonl", "data is empty.jsonl, which is empty"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    with pytest.raises(SystemExit):
        configure_training.main([*flags.split(), "--gpu_memory", "24"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("sharding", ["fsdp2", "zero3"])
def test_weights_that_are_cut_up_are_not_put_in_4_bits(sharding):
    assert recommend(40_000, 48, 2, sharding=sharding).run.method == "lora"
    with pytest.raises(ValueError, match=r"or 4-bit weights \(--method qlora --sharding ddp\)"):
        recommend(40_000, 24, 2, sharding=sharding)


def test_a_small_model_of_ones_own_may_train_on_a_small_gpu(base_folder):
    assert recommend(900, 4, model_name=str(base_folder)).model_name == str(base_folder)


def test_40000_images_and_32_gb_show_exactly_the_readme_command(capsys):
    configure_training.main(["--dataset_size", "40000", "--gpu_memory", "32", "--show_command"])
    assert capsys.readouterr().out == README_COMMAND + "\n"


@pytest.mark.parametrize(("dataset_size", "gpu_memory"), [(900, 16), (40_000, 32), (70_000, 80), (200_000, 80)])
def test_shown_command_is_one_that_training_accepts(dataset_size, gpu_memory, tmp_path, monkeypatch):
    (tmp_path / "data/images").mkdir(parents=True)
    for name in ("train", "val"):
        (tmp_path / f"data/{name}.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    choice = recommend(dataset_size, gpu_memory)
    command = shlex.split(configure_training.training_command(choice, configure_training.PATHS))
    settings = command_line.parse_training(command[2:], "")
    assert settings.model.model_name == choice.model_name
    assert settings.sft.learning_rate == float(choice.learning_rate)
    assert settings.grpo.learning_rate == 5e-6
    for stage in (settings.sft, settings.grpo):
        assert (stage.use_lora, stage.per_device_train_batch_size) == (choice.use_lora, choice.batch_size)


def test_several_gpus_are_launched_as_several_processes(capsys):
    configure_training.main(["--dataset_size", "40000", "--gpu_memory", "32", "--num_gpus", "4", "--show_command"])
    assert capsys.readouterr().out.startswith("torchrun --nproc_per_node 4 train_qwenvl_25.py --stage both")


def test_table_gives_each_choice_with_its_reason(capsys):
    configure_training.main(["--dataset_size", "40000", "--gpu_memory", "32"])
    out = capsys.readouterr().out
    assert "40,000 images on 1 GPU of 32 GB" in out
    assert all(word in out for word in ("LoRA, r 128", "10k to 50k images", "2e-5", "5e-6", "8 x 4 x 1 GPU"))


def test_data_file_is_counted_and_named_in_the_command(tmp_path, capsys):
    data = tmp_path / "my train.jsonl"
    data.write_text('{"image_path": "a.jpg"}\n' * 3 + "\n")
    configure_training.main(["--data", str(data), "--gpu_memory", "32"])
    assert "For 3 images" in capsys.readouterr().out
    configure_training.main(["--data", str(data), "--gpu_memory", "32", "--show_command"])
    out = capsys.readouterr().out
    assert f"--train_data '{data}'" in out and "--val_data" not in out
    data.with_name("val.jsonl").touch()
    flags = ["--data", str(data), "--gpu_memory", "32"]
    configure_training.main([*flags, "--show_command"])
    assert f"--val_data {data.with_name('val.jsonl')}" in capsys.readouterr().out
    data.with_name("val.jsonl").unlink()
    configure_training.main([*flags, "--save_configs", str(tmp_path / "configs")])
    assert json.loads((tmp_path / "configs/data_config.json").read_text())["val_data"] is None


def test_missing_data_file_ends_with_a_message_and_no_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        configure_training.main(["--data", str(tmp_path / "none.jsonl"), "--gpu_memory", "32"])
    assert stopped.value.code == 2
    assert "which cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["40000 --gpu_memory 32", "200000 --gpu_memory 80", "900 --gpu_memory 16"])
def test_saved_configs_are_settings_that_training_accepts(arguments, tmp_path, capsys):
    configure_training.main(f"--dataset_size {arguments} --save_configs {tmp_path / 'c'}".split())
    files = {path.stem.removesuffix("_config"): config.read_json(str(path)) for path in (tmp_path / "c").iterdir()}
    size, _, memory = arguments.split()
    choice = recommend(int(size), float(memory))
    assert set(files) == {"model", "data", "sft", "grpo"}
    assert config.build(config.ModelConfig, files["model"]).model_name == choice.model_name
    config.build(config.DataConfig, files["data"])
    for stage in ("sft", "grpo"):
        built = config.build_stage(stage, files[stage])
        assert built.trl == {}
        assert (built.use_lora, built.per_device_train_batch_size) == (choice.use_lora, choice.batch_size)
        assert built.gradient_accumulation_steps == choice.gradient_accumulation_steps
        assert not choice.use_lora or (built.lora_r, built.alpha) == (choice.lora_r, 2 * choice.lora_r)
    assert files["sft"]["learning_rate"] == float(choice.learning_rate)
    assert files["grpo"]["learning_rate"] == 5e-6
    command = capsys.readouterr().out.splitlines()[-1]
    assert all(f"--{name}_config {tmp_path / 'c' / name}_config.json" in command for name in files)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_shipped_stage_configs_are_settings_that_training_accepts(stage):
    values = json.loads((ROOT / "configs" / f"{stage}_config.json").read_text())
    built = config.build_stage(stage, values)
    assert built.trl == {}
    if stage == "grpo":
        assert built.per_device_train_batch_size * built.gradient_accumulation_steps % built.num_generations == 0


def test_shipped_sft_config_is_the_readme_example():
    assert json.loads((ROOT / "configs/sft_config.json").read_text()) == {
        "output_dir": "outputs/sft",
        "learning_rate": 2e-5,
        "num_train_epochs": 3,
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "gradient_accumulation_steps": 4,
        "bf16": True,
        "use_lora": True,
        "lora_r": 64,
        "lora_alpha": 128,
        "lora_dropout": 0.1,
    }


@pytest.mark.parametrize(("name", "cls"), [("model", config.ModelConfig), ("data", config.DataConfig)])
def test_shipped_model_and_data_configs_are_settings_that_training_accepts(name, cls):
    config.build(cls, json.loads((ROOT / "configs" / f"{name}_config.json").read_text()))


def test_no_torch_is_imported():
    code = "import sys, configure_training; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_model_too_large_for_the_gpu_is_recommended_in_four_bits(capsys):
    configure_training.main(
        ["--dataset_size", "900", "--gpu_memory", "16", "--model_name", configure_training.DEFAULT_MODEL]
    )
    out = capsys.readouterr().out
    assert "LoRA on 4-bit weights, r 64" in out and "pip install bitsandbytes" in out
    choice = recommend(900, 16, model_name=configure_training.DEFAULT_MODEL)
    assert "--load_in_4bit --learning_rate" in configure_training.training_command(choice, {})


def test_every_recommendation_fits_by_the_memory_model():
    for dataset_size, gpu_memory, num_gpus in product((900, 40_000, 200_000), (8, 12, 16, 24, 32, 80), (1, 8)):
        choice = recommend(dataset_size, gpu_memory, num_gpus)
        for memory in phases(choice.model, choice.run):
            assert memory.needed <= gpu_memory * GIB, (dataset_size, gpu_memory, num_gpus, memory.phase)


def test_rollouts_that_do_not_fit_get_a_bound_of_the_cache_in_command_and_files(tmp_path):
    choice = recommend(5_000, 24)
    bound = choice.run.max_batch_tokens
    assert bound and bound % 4096 == 0
    assert f"--max_batch_tokens {bound}" in configure_training.training_command(choice, {})
    configure_training.save_configs(choice, tmp_path, {})
    assert json.loads((tmp_path / "grpo_config.json").read_text())["max_batch_tokens"] == bound


def test_all_weights_on_several_gpus_are_cut_up_and_keep_float32():
    choice = recommend(200_000, 80, 8)
    command = configure_training.training_command(choice, {})
    assert command.startswith("accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_processes 8 ")
    assert "--use_lora" not in command and "--dtype" not in command


def test_method_batch_and_checkpoints_are_kept_as_given(capsys):
    given = "--dataset_size 900 --gpu_memory 80 --method qlora --batch_size 2 --gradient_checkpointing false"
    configure_training.main([*given.split(), "--show_command"])
    out = capsys.readouterr().out
    assert "--load_in_4bit" in out and "--batch_size 2 " in out and "--gradient_checkpointing false" in out


def test_hours_follow_from_the_measured_throughput():
    choice = recommend(36_000, 80)
    run = choice.run
    found = configure_training.hours(choice, 10_000, 500)
    assert found["SFT"] == 3 * 36_000 * run.sft_row / 10_000 / 3600
    assert found["R-GRPO"] == pytest.approx(
        (36_000 * 8 * 1024 / 500 + 1.25 * 36_000 * 8 * run.rollout_row / 10_000) / 3600
    )
    assert set(configure_training.hours(choice, 10_000, None)) == {"SFT"}


def test_a_probe_of_rollouts_tells_their_hours_and_not_those_of_the_other_stage(tmp_path, monkeypatch, capsys):
    """A probed step of R-GRPO holds its rollouts."""
    trial = probe.Trial(4, fits=True, tokens_per_second=10_000.0)
    monkeypatch.setattr(probe, "largest_batch", lambda *_: trial)
    configure_training.main(["--dataset_size", "36000", "--gpu_memory", "80", "--probe", "grpo"])
    hours = 36_000 * 8 * recommend(36_000, 80).run.rollout_row / 10_000 / 3600
    out = capsys.readouterr().out
    assert f"R-GRPO: {hours:.1f} hours" in out and "SFT: " not in out


def test_the_memory_of_each_phase_adds_up():
    lines = configure_training.memory_table(recommend(40_000, 32))[1:]
    for line in lines:
        needed, parts = line.split(" of 32: ")
        numbers = [float(part.split()[-1]) for part in parts.split(", ")]
        assert sum(numbers) == pytest.approx(float(needed.split()[-1]), abs=0.3), line
