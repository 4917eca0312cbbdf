"""Every command of the README parses as written, and every script answers --help at once."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import inference
from command_line import parse_training
from config import DataConfig, GRPOStageConfig, InferenceConfig, ModelConfig, SFTStageConfig, TrainingSettings, build

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if 'if __name__ == "__main__"' in path.read_text("utf-8"))
BOTH_STAGES = ["--model_name", "--train_data", "--learning_rate", "--num_epochs", "--use_lora", "--max_length"]
MAIN_FLAGS = {
    "configure_training.py": ["--dataset_size", "--gpu_memory", "--show_command"],
    "convert_data.py": ["--from", "--to", "--image_folder", "--columns", "--split", "--box_frame"],
    "data_utils.py": [
        "--check",
        "--image_base_path",
        "--answer_key",
        "--bad_rows_file",
        "--convert_boxes",
        "--from_frame",
    ],
    "demo.py": ["--full", "--seed"],
    "evaluate.py": [
        "--data",
        "--samples",
        "--ablate_crops",
        "--resume",
        "--judge_url",
        "--model_path",
        "JUDGE_API_KEY",
    ],
    "web_demo.py": ["--model_path", "--host", "--port", "--share", "--max_upload_mb", "--temperature"],
    "inference.py": ["--model_path", "--image_path", "--question", "--output_json", "--save_trace", "--temperature"],
    "model_utils.py": ["--merge", "--output"],
    "train_grpo.py": [*BOTH_STAGES, "--sft_checkpoint", "--beta", "--reward_preset"],
    "train_qwenvl_25.py": [*BOTH_STAGES, "--stage", "--sft_config", "--grpo_config", "--sft_checkpoint", "--beta"],
    "train_sft.py": [*BOTH_STAGES, "--early_stopping_patience"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_in_under_two_seconds_and_names_the_main_flags(script):
    seconds = []
    while not seconds or (min(seconds) >= 2 and len(seconds) < 3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, timeout=60)
        seconds.append(time.perf_counter() - started)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {script}")
    assert [flag for flag in MAIN_FLAGS.get(script, []) if flag not in done.stdout] == []
    assert min(seconds) < 2


def test_no_script_lost_its_command():
    assert set(MAIN_FLAGS) <= set(SCRIPTS)


# ------------------------------------------------------------------------------------ README's commands


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A working directory with what the README's commands name."""
    for folder in ("data/images", "outputs/sft/final_model"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("train", "val"):
        (tmp_path / f"data/{name}.jsonl").write_text("{}\n")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path


def settings_of(command: str, stages: tuple[str, ...] = ()) -> TrainingSettings:
    return parse_training(shlex.split(command)[2:], "", stages)


DATA = "--train_data data/train.jsonl --val_data data/val.jsonl --image_base_path data/images"


def test_the_recommended_command_of_both_stages():
    settings = settings_of(
        f"python train_qwenvl_25.py --stage both {DATA} --use_lora --lora_r 128 --learning_rate 2e-5 "
        "--batch_size 8 --gradient_accumulation_steps 4 --bf16"
    )
    assert settings.model == ModelConfig(model_name="Qwen/Qwen2.5-VL-7B-Instruct")
    assert settings.data == DataConfig(val_data="data/val.jsonl")
    for stage in (settings.sft, settings.grpo):
        assert (stage.use_lora, stage.lora_r, stage.alpha, stage.bf16) == (True, 128, 256, True)
        assert (stage.per_device_train_batch_size, stage.gradient_accumulation_steps, stage.trl) == (8, 4, {})
    assert (settings.sft.learning_rate, settings.sft.num_train_epochs) == (2e-5, 3.0)
    assert (settings.grpo.learning_rate, settings.grpo.num_train_epochs) == (5e-6, 1.0)
    assert settings.grpo.sft_checkpoint == "outputs/sft/final_model"


def test_both_stages_in_short():
    settings = settings_of(f"python train_qwenvl_25.py --stage both {DATA} --use_lora --bf16")
    assert settings.sft == SFTStageConfig(use_lora=True, bf16=True)
    assert settings.grpo == GRPOStageConfig(use_lora=True, bf16=True, sft_checkpoint="outputs/sft/final_model")


def test_the_sft_stage():
    settings = settings_of(
        f"python train_qwenvl_25.py --stage sft {DATA} --model_name Qwen/Qwen2.5-VL-7B-Instruct --use_lora "
        "--lora_r 64 --learning_rate 2e-5 --num_epochs 3 --batch_size 4 --gradient_accumulation_steps 4 "
        "--sft_output_dir outputs/elsewhere --bf16"
    )
    assert settings.grpo is None
    assert settings.model.model_name == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert settings.sft == SFTStageConfig(
        use_lora=True, lora_r=64, learning_rate=2e-5, num_train_epochs=3.0, bf16=True, output_dir="outputs/elsewhere"
    )


def test_the_grpo_stage():
    settings = settings_of(
        f"python train_qwenvl_25.py --stage grpo {DATA} --sft_checkpoint outputs/sft/final_model "
        "--learning_rate 5e-6 --beta 0.1 --grpo_output_dir outputs/elsewhere --bf16"
    )
    assert settings.sft is None
    assert settings.grpo == GRPOStageConfig(
        sft_checkpoint="outputs/sft/final_model", beta=0.1, output_dir="outputs/elsewhere", bf16=True
    )


def test_the_four_settings_files():
    settings = settings_of(
        "python train_qwenvl_25.py --stage both --model_config configs/model_config.json "
        "--data_config configs/data_config.json --sft_config configs/sft_config.json "
        "--grpo_config configs/grpo_config.json"
    )
    lora = {"use_lora": True, "lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.1, "bf16": True}
    assert settings.model == ModelConfig()
    assert settings.data == DataConfig(val_data="data/val.jsonl", coordinate_space="resized")
    assert settings.sft == SFTStageConfig(**lora)
    assert settings.grpo == GRPOStageConfig(
        **lora, beta=0.1, gradient_accumulation_steps=8, sft_checkpoint="outputs/sft/final_model"
    )


@pytest.mark.parametrize(
    ("command", "stages", "sft", "grpo"),
    [
        ("python train_sft.py", ("sft",), SFTStageConfig(), None),
        ("python train_grpo.py", ("grpo",), None, GRPOStageConfig(sft_checkpoint="outputs/sft/final_model")),
    ],
)
def test_a_stage_alone_runs_with_defaults_and_finds_the_validation_data(command, stages, sft, grpo):
    settings = settings_of(command, stages)
    assert settings == TrainingSettings(ModelConfig(), DataConfig(val_data="data/val.jsonl"), sft, grpo)


def test_a_given_training_file_does_not_pull_in_another_data_sets_validation_file(project):
    (project / "mine.jsonl").write_text("{}\n")
    assert settings_of("python train_sft.py --train_data mine.jsonl", ("sft",)).data.val_data is None


def test_in_both_stages_r_grpo_starts_where_sft_ends():
    settings = settings_of("python train_qwenvl_25.py --sft_output_dir a/b --grpo_output_dir c --num_epochs 2")
    assert (settings.sft.output_dir, settings.grpo.output_dir) == ("a/b", "c")
    assert settings.grpo.sft_checkpoint == "a/b/final_model"
    assert (settings.sft.num_train_epochs, settings.grpo.num_train_epochs) == (2.0, 1.0)


def test_a_prefixed_flag_sets_its_own_stage_over_the_common_one():
    settings = settings_of(
        "python train_qwenvl_25.py --stage both --learning_rate 1e-4 --grpo_learning_rate 1e-6 --grpo_num_epochs 2 "
        "--batch_size 8 --sft_batch_size 2 --grpo_save_steps 7"
    )
    assert (settings.sft.learning_rate, settings.grpo.learning_rate) == (1e-4, 1e-6)
    assert (settings.sft.num_train_epochs, settings.grpo.num_train_epochs) == (3.0, 2.0)
    assert (settings.sft.per_device_train_batch_size, settings.grpo.per_device_train_batch_size) == (2, 8)
    assert (settings.sft.save_steps, settings.grpo.save_steps) == (None, 7)


def test_the_answering_command():
    argv = shlex.split(
        "--model_path outputs/grpo/final_model --image_path test_image.jpg --question 'What is he holding?' "
        "--max_new_tokens 512 --temperature 0.7 --output_json output.json"
    )
    flags = vars(inference._parser().parse_args(argv))
    assert (flags.pop("image_path"), flags.pop("question")) == ("test_image.jpg", ["What is he holding?"])
    assert (flags.pop("output_json"), flags.pop("save_trace"), flags.pop("stream")) == ("output.json", None, False)
    expected = replace(InferenceConfig(), model_path="outputs/grpo/final_model", max_new_tokens=512, temperature=0.7)
    assert build(InferenceConfig, flags) == expected


def test_the_answering_command_without_a_model_says_so_without_a_traceback(project):
    from PIL import Image

    Image.new("RGB", (60, 60)).save(project / "test_image.jpg")
    command = [sys.executable, ROOT / "inference.py", "--image_path", "test_image.jpg", "--question", "?"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "inference.py: there is no model at outputs/grpo/final_model: give a folder with weights or a hub name "
        "(owner/name)"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "wrong", "right"),
    [
        ("configure_training.py --dataset_size 9 --gpu_memory 80", "--num_gpu", "--num_gpus"),
        ("convert_data.py --from llava a --to jsonl b", "--image_foldr", "--image_folder"),
        ("data_utils.py --check a", "--image_base_pth", "--image_base_path"),
        ("evaluate.py --model_path a --data b", "--sampls", "--samples"),
        ("inference.py --model_path a --image_path b --question c", "--temprature", "--temperature"),
    ],
)
def test_a_mistyped_flag_is_named_with_the_nearest_one(command, wrong, right):
    for given in ([wrong, "1"], [f"{wrong}=1"]):
        arguments = [sys.executable, *command.split(), *given]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert f"unknown flag {wrong}. Did you mean '{right}'?" in done.stderr


def test_an_unquoted_path_with_spaces_is_explained():
    done = subprocess.run(
        [sys.executable, ROOT / "data_utils.py", "--check", "my", "data/train.jsonl"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "unexpected argument 'data/train.jsonl': every setting is a --flag, and a value with spaces" in done.stderr


def test_ctrl_c_while_libraries_load_is_one_line():
    code = "import command_line; command_line.CommandParser(); raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "-c: stopped by Ctrl-C\n")
