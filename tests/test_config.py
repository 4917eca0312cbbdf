"""Settings: default < file < flag, and whatever cannot be is refused at once with a message."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import config
import train_grpo
import train_qwenvl_25
import train_sft
from command_line import parse_pass_through, parse_training, resolve_training
from config import SETTINGS_FILE, InferenceConfig, SettingsError, build, convert, trl_fields

ROOT = Path(__file__).parent.parent
BOTH = ("sft", "grpo")


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    for folder in ("data/images", "outputs/sft/final_model"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data/train.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path


def parse(*argv, stages=()):
    return parse_training(list(argv), "", stages)


def refused(capsys, *argv, stages=()):
    """The message with which a command is refused."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv, stages=stages)
    assert stop.value.code == 2
    return capsys.readouterr().err


def write_json(name, values):
    Path(name).write_text(json.dumps(values))
    return name


# ------------------------------------------------------------------------------------------- precedence


def test_a_flag_is_over_the_file_and_the_file_over_the_default():
    file = write_json("sft.json", {"learning_rate": 1e-3, "weight_decay": 0.5, "num_epochs": 7})
    sft = parse("--sft_config", file, "--learning_rate", "1e-4", "--num_epochs", "9", stages=("sft",)).sft
    assert (sft.learning_rate, sft.weight_decay, sft.num_train_epochs, sft.warmup_ratio) == (1e-4, 0.5, 9.0, 0.1)


def test_a_flag_with_the_defaults_value_is_over_the_file():
    file = write_json("sft.json", {"learning_rate": 1e-3, "bf16": True, "use_lora": True})
    sft = parse("--sft_config", file, "--learning_rate", "2e-5", "--bf16", "false", stages=("sft",)).sft
    assert (sft.learning_rate, sft.bf16, sft.use_lora) == (2e-5, False, True)


def test_model_and_data_files_are_read_too():
    model = write_json("model.json", {"model_name": "here/there", "freeze_vision": False})
    data = write_json("data.json", {"max_length": 100, "overlong": "cut", "bad_rows_file": None})
    settings = parse(
        "--stage",
        "sft",
        "--model_config",
        model,
        "--data_config",
        data,
        "--max_length",
        "200",
        "--freeze_vision",
        "true",
    )
    assert (settings.model.model_name, settings.model.freeze_vision) == ("here/there", True)
    assert (settings.data.max_length, settings.data.overlong, settings.data.bad_rows_file) == (200, "cut", None)


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        (["--bf16"], "bf16", True),
        (["--gradient_checkpointing=false"], "gradient_checkpointing", False),
        (["--gradient_checkpointing", "no"], "gradient_checkpointing", False),
        (["--lora_alpha", "16", "--use_lora"], "lora_alpha", 16),
        (["--lora_alpha", "none"], "lora_alpha", None),
        (["--batch_size", "2"], "per_device_train_batch_size", 2),
        (["--per_device_train_batch_size", "2"], "per_device_train_batch_size", 2),
        (["--logging_steps", "0.5"], "logging_steps", 0.5),
    ],
)
def test_flags_are_read_as_their_fields_type(flag, name, value):
    sft = parse(*flag, "--use_lora", stages=("sft",)).sft
    assert getattr(sft, name) == value and type(getattr(sft, name)) is type(value)


# ------------------------------------------------------------------------------------------------ typos


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning_rate", "1"], "unknown flag --lerning_rate. Did you mean 'learning_rate'?"),
        (["--grpo_lerning_rate", "1"], "unknown flag --grpo_lerning_rate. Did you mean 'grpo_learning_rate'?"),
        (["--train_date", "x"], "unknown flag --train_date. Did you mean 'train_data'?"),
        (["--sav_steps", "1"], "unknown flag --sav_steps. Did you mean 'save_steps'?"),
        (["--qqqqqq"], "unknown flag --qqqqqq.\n"),
        (["--stage", "sft", "--beta", "1"], "It belongs to a stage that does not run; this run has: sft."),
        (["--stage", "sft", "--grpo_learning_rate", "1"], "It belongs to a stage that does not run"),
        (["--use_lora", "--bf16", "true", "stray"], "unexpected argument 'stray': every setting is a --flag"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest_name(capsys, argv, message):
    assert message in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("which", "values", "message"),
    [
        ("sft", {"lerning_rate": 1}, "unknown setting 'lerning_rate' of the sft stage. Did you mean 'learning_rate'?"),
        ("grpo", {"num_generation": 4}, "unknown setting 'num_generation' of the grpo stage. Did you mean "),
        ("sft", {"beta": 0.1}, "unknown setting 'beta' of the sft stage."),
        ("data", {"train_dta": "x"}, "unknown setting 'train_dta' of DataConfig. Did you mean 'train_data'?"),
        ("model", {"use_lora": True}, "unknown setting 'use_lora' of ModelConfig."),
        ("sft", ["learning_rate"], "sft.json must hold one JSON object of names and values"),
    ],
)
def test_an_unknown_key_of_a_file_is_refused_with_the_nearest_name(capsys, which, values, message):
    assert message in refused(capsys, f"--{which}_config", write_json(f"{which}.json", values))


def test_a_file_that_is_missing_or_no_json_is_refused(capsys):
    assert "cannot read the settings file none.json: No such file" in refused(capsys, "--sft_config", "none.json")
    Path("bad.json").write_text("{'a': 1}")
    assert "bad.json is not JSON: Expecting property name" in refused(capsys, "--sft_config", "bad.json")


def test_a_file_for_a_stage_that_does_not_run_is_refused(capsys):
    file = write_json("grpo.json", {"beta": 0.1})
    message = refused(capsys, "--stage", "sft", "--grpo_config", file)
    assert "--grpo_config was given, but the grpo stage does not run" in message


@pytest.mark.parametrize(
    ("name", "value", "hint", "message"),
    [
        ("max_length", "many", int, "max_length is 'many', but it must be a number"),
        ("max_length", 1.5, int, "max_length is 1.5, but it must be a whole number"),
        ("max_length", "inf", int, "max_length is 'inf', but it must be a whole number"),
        ("max_length", "nan", int, "max_length is 'nan', but it must be a whole number"),
        ("max_length", "1e400", int, "max_length is '1e400', but it must be a whole number"),
        ("learning_rate", None, float, "learning_rate is None, but it must be a number"),
        ("learning_rate", [1], float, "learning_rate is [1], but it must be a number"),
        ("bf16", "perhaps", bool, "bf16 is 'perhaps', but it must be true or false"),
        ("train_data", 7, str, "train_data is 7, but it must be text"),
        ("overlong", "trim", config.own_fields(config.DataConfig)["overlong"], "must be one of skip, cut"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name, value, hint, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        convert(name, value, hint)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, but it cannot be negative"),
        ({"top_p": 0}, "top_p is 0.0, but it must be in"),
        ({"top_k": -1}, "top_k is -1, but it cannot be negative"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, but it must be at least 1"),
        ({"max_crops": -1}, "max_crops is -1, but it cannot be negative"),
        ({"batch_size": 0}, "batch_size is 0, but it must be at least 1"),
        ({"max_batch_tokens": -1}, "max_batch_tokens is -1, but it cannot be negative"),
        ({"max_batch_tokens": 9, "backend": "vllm"}, "max_batch_tokens is 9, but vLLM bounds its cache by its share"),
        ({"max_new_token": 5}, "unknown setting 'max_new_token' of InferenceConfig. Did you mean 'max_new_tokens'?"),
    ],
)
def test_inference_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        build(InferenceConfig, values)


# --------------------------------------------------------------------------------------- TRL's settings


@pytest.mark.parametrize(("stage", "name"), [("sft", "SFTConfig"), ("grpo", "GRPOConfig")])
def test_names_read_from_trls_source_are_the_fields_of_its_config(stage, name):
    import trl

    fields = {item.name: item.type for item in dataclasses.fields(getattr(trl, name)) if item.init}
    assert trl_fields(stage).keys() == fields.keys()
    plain = {name: kind for name, kind in trl_fields(stage).items() if kind is not None}
    assert len(plain) > 80 and plain == {name: fields[name] for name in plain}


def test_further_fields_of_trl_are_passed_on_from_flags():
    argv = ["--max_steps", "-1", "--report_to", '["tensorboard", "wandb"]', "--bf16", "--deepspeed", "zero3.json"]
    settings = parse(*argv, "--tf32", "--run_name=first try", "--save_steps", "50", "--grpo_top_k", "5")
    passed = {"max_steps": -1, "report_to": ["tensorboard", "wandb"], "deepspeed": "zero3.json", "tf32": True}
    assert settings.sft.trl == passed | {"run_name": "first try"}
    assert settings.grpo.trl == passed | {"run_name": "first try", "top_k": 5}
    assert (settings.sft.save_steps, settings.grpo.save_steps, settings.sft.bf16) == (50, 50, True)


def test_further_fields_of_trl_are_passed_on_from_a_file_and_a_flag_is_over_it():
    file = write_json("sft.json", {"max_steps": 5, "report_to": "tensorboard", "neftune_noise_alpha": 0.5})
    sft = parse("--sft_config", file, "--max_steps", "7", stages=("sft",)).sft
    assert sft.trl == {"max_steps": 7, "report_to": "tensorboard", "neftune_noise_alpha": 0.5}


def test_a_field_that_one_stage_of_trl_knows_goes_to_that_stage_alone():
    settings = parse("--epsilon", "0.1", "--activation_offloading", "false")
    assert (settings.sft.trl, settings.grpo.trl) == ({"activation_offloading": False}, {"epsilon": 0.1})


def test_values_of_further_flags_have_their_json_types():
    rest = ["--a", "1", "--b", "0.5", "--c", "false", "--d", "[1, 2]", "--e", "007", "--f", "--g=x=y", "--h", "null"]
    given = parse_pass_through(rest)
    assert given == {"a": 1, "b": 0.5, "c": False, "d": [1, 2], "e": "007", "f": True, "g": "x=y", "h": None}
    assert type(given["a"]) is int and type(given["c"]) is bool


def test_text_for_a_truth_value_or_number_of_trl_is_converted_or_refused(capsys):
    flags = [
        "--log_completions",
        "False",
        "--vllm_importance_sampling_correction",
        "FALSE",
        "--generation_batch_size",
        "none",
    ]
    given = parse(*flags, "--run_name", "True", stages=("grpo",)).grpo.trl
    assert given["log_completions"] is given["vllm_importance_sampling_correction"] is False
    assert given["generation_batch_size"] is None and given["run_name"] == "True"
    assert "top_k is 'many', but it must be a number" in refused(capsys, "--top_k", "many", stages=("grpo",))
    message = "log_completions is 'maybe', but it must be true or false"
    assert message in refused(capsys, "--log_completions", "maybe", stages=("grpo",))


@pytest.mark.parametrize("name", ["packing", "dataset_kwargs", "remove_unused_columns"])
def test_a_field_of_trl_that_would_break_the_data_is_refused(name, capsys):
    message = f"sft: {name} is set by this project and cannot be passed on to TRL"
    assert message in refused(capsys, f"--{name}", "true", stages=("sft",))


@pytest.mark.parametrize(
    ("name", "value"), [("vllm_tensor_parallel_size", "4"), ("vllm_server_host", "4"), ("trust_remote_code", "true")]
)
def test_a_field_of_trl_whose_work_our_own_code_does_is_refused(name, value, capsys):
    message = f"grpo: {name} is set by this project and cannot be passed on to TRL"
    assert message in refused(capsys, f"--{name}", value, stages=("grpo",))


# --------------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bf16", "--fp16"], "sft: bf16 and fp16 were both given; choose one"),
        (["--grpo_bf16", "true", "--grpo_fp16", "true"], "grpo: bf16 and fp16 were both given; choose one"),
        (
            ["--batch_size", "3", "--gradient_accumulation_steps", "2"],
            "one generation makes 6 rollouts (batch size 3 x 1 processes x 2 steps), which num_generations=8 does "
            "not divide. Change batch_size, gradient_accumulation_steps or num_generations.",
        ),
        (["--grpo_steps_per_generation", "1"], "one generation makes 4 rollouts"),
        (["--num_generations", "1"], "num_generations is 1, but a group needs at least 2"),
        (["--temperature", "0"], "temperature is 0.0, but rollouts must be sampled (over 0)"),
        (
            ["--early_stopping_patience", "2"],
            "early_stopping_patience was given, but there is no validation data: give --val_data",
        ),
        (["--lora_r", "8"], "sft: lora_r was given, but LoRA is off: add --use_lora"),
        (
            ["--stage", "sft", "--lora_dropout", "0", "--lora_alpha", "2"],
            "sft: lora_alpha, lora_dropout was given, but LoRA is off: add --use_lora",
        ),
        (["--lora_r", "0", "--use_lora"], "sft: lora_r is 0, but it must be at least 1"),
        (["--max_batch_tokens", "-1"], "max_batch_tokens is -1, but it must be at least 0"),
        (["--learning_rate", "0"], "sft: learning_rate is 0.0, but it must be over 0"),
        (["--learning_rate", "nan"], "sft: learning_rate is nan, but it must be over 0"),
        (["--num_epochs", "0"], "sft: num_train_epochs is 0.0, but it must be over 0"),
        (["--max_steps", "2.5"], "max_steps is 2.5, but it must be a whole number"),
        (["--max_steps"], "max_steps is true, but it must be a number"),
        (["--max_grad_norm", "high"], "max_grad_norm is 'high', but it must be a number"),
        (
            ["--sft_output_dir", "o", "--grpo_output_dir", "./o"],
            "output_dir is ./o in both stages: give --sft_output_dir",
        ),
        (["--max_length", "0"], "max_length is 0, but it must be at least 1"),
        (["--num_proc", "0"], "num_proc is 0, but it must be at least 1"),
        (["--train_data", "none.jsonl"], "train_data is none.jsonl, but there is no such file"),
        (["--val_data", "none.jsonl"], "val_data is none.jsonl, but there is no such file"),
        (["--image_base_path", "none"], "image_base_path is none, but there is no such folder"),
        (["--stage", "grpo", "--sft_checkpoint", "nowhere"], "sft_checkpoint is nowhere: no such folder"),
        (
            ["--sft_checkpoint", "other"],
            "sft_checkpoint is other, but --stage both starts R-GRPO from its own SFT model "
            "(outputs/sft/final_model). Leave it out, or use --stage grpo.",
        ),
        (
            ["--reward_preset", "deepeyes", "--region_reward_weight", "2"],
            "reward weights (1.0, 2.0) were given, but the preset 'deepeyes' has its paper's: leave them out",
        ),
    ],
)
def test_a_contradiction_is_refused_with_what_was_given_and_what_to_do(capsys, argv, message):
    assert message in refused(capsys, *argv)


def test_r_grpo_alone_without_a_checkpoint_or_a_model_is_refused(capsys, project):
    (project / "outputs/sft/final_model").rmdir()
    message = refused(capsys, "--stage", "grpo")
    assert "there is none at outputs/sft/final_model. Run train_sft.py first, or give --sft_checkpoint" in message
    assert parse("--stage", "grpo", "--model_name", "a/b").grpo.sft_checkpoint is None


def test_the_number_of_processes_counts_for_the_group_size(monkeypatch, capsys):
    argv = ["--batch_size", "1", "--gradient_accumulation_steps", "4"]
    assert "one generation makes 4 rollouts" in refused(capsys, *argv)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse(*argv).grpo.num_generations == 8


def test_no_epochs_are_needed_where_steps_are_given():
    assert parse("--num_epochs", "0", "--max_steps", "3", stages=("sft",)).sft.num_train_epochs == 0


def test_lora_settings_of_a_file_may_stay_while_lora_is_switched_off():
    file = write_json("sft.json", {"use_lora": True, "lora_r": 8})
    assert parse("--sft_config", file, "--use_lora", "false", stages=("sft",)).sft.use_lora is False


REFUSAL = """
import sys, time
import config, train_qwenvl_25
try:
    train_qwenvl_25.main(["--stage", "both", "--bf16", "--fp16"])
except SystemExit as stop:
    heavy = {"torch", "transformers", "trl", "datasets"} & set(sys.modules)
    print(stop.code, sorted(heavy), time.process_time() < 1)
"""


def test_a_contradiction_is_refused_in_the_first_second_before_torch_is_imported():
    done = subprocess.run(
        [sys.executable, "-c", REFUSAL], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout == "2 [] True\n", done.stderr


@pytest.mark.parametrize("script", ["train_sft.py", "train_grpo.py", "train_qwenvl_25.py"])
def test_a_typo_ends_a_command_with_one_line_and_no_traceback(script):
    done = subprocess.run([sys.executable, ROOT / script, "--lerning_rate", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{script}: unknown flag --lerning_rate. Did you mean 'learning_rate'?\n"


@pytest.mark.parametrize("command", [train_sft, train_grpo, train_qwenvl_25])
@pytest.mark.parametrize(("given", "seen"), [(None, "0"), ("2,3", "2"), ("GPU-a1", "GPU-a1"), ("", "")])
def test_a_command_without_a_launcher_sees_one_gpu(monkeypatch, command, given, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given or "")
    if given is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    with pytest.raises(SystemExit):
        command.main(["--lerning_rate", "1"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_a_process_of_a_launcher_sees_the_gpus_that_it_was_given(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    config.use_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


# -------------------------------------------------------------------------------------- kept and printed


def test_resolved_settings_are_saved_and_can_be_read_again(tmp_path):
    settings = resolve_training({"use_lora": "true", "max_steps": 5, "grpo_beta": "0.2"}, BOTH)
    settings.save(tmp_path / "new/folder")
    saved = json.loads((tmp_path / "new/folder" / SETTINGS_FILE).read_text())
    assert saved == dataclasses.asdict(settings)
    assert (saved["sft"]["lora_r"], saved["grpo"]["beta"], saved["sft"]["trl"]) == (64, 0.2, {"max_steps": 5})


def test_the_printed_settings_name_both_stages_and_what_is_passed_on():
    table = resolve_training({"learning_rate": "1e-4", "max_steps": 5}, BOTH).table()
    assert re.findall(r"^\[.*\]$", table, re.MULTILINE) == ["[model]", "[data]", "[sft]", "[grpo]"]
    assert re.findall(r"learning_rate +(\S+)", table) == ["0.0001", "5e-06"]
    assert re.findall(r"max_steps +(\S+)", table) == ["5", "5"]
    assert "None" not in table and "trl" not in table
    assert "[grpo]" not in resolve_training({}, ("sft",)).table()


# ------------------------------------------------------------------------------------------- 4-bit weights


@pytest.mark.parametrize(
    ("argv", "stages", "message"),
    [
        (
            ("--load_in_4bit",),
            ("sft",),
            "sft: load_in_4bit was given, but 4-bit weights cannot be trained.*add --use_lora",
        ),
        (("--load_in_4bit", "--sft_use_lora", "false"), BOTH, "sft: load_in_4bit was given"),
        (("--load_in_4bit",), ("grpo",), "grpo: load_in_4bit was given.*only an adapter on them"),
    ],
)
def test_four_bit_weights_that_would_have_to_train_are_refused(capsys, argv, stages, message):
    assert re.search(message, refused(capsys, *argv, stages=stages), re.DOTALL)


def test_four_bit_weights_without_bitsandbytes_name_what_to_install(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    message = refused(capsys, "--load_in_4bit", "--use_lora", stages=("sft",))
    assert "bitsandbytes is not installed: pip install bitsandbytes" in message


def test_four_bit_weights_of_a_stage_that_goes_on_with_an_adapter_need_no_use_lora(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "bitsandbytes" or find(name))
    Path("outputs/sft/final_model/adapter_config.json").write_text("{}")
    assert parse("--load_in_4bit", stages=("grpo",)).model.load_in_4bit
    assert parse("--load_in_4bit", "--sft_use_lora", stages=BOTH).model.load_in_4bit


@pytest.mark.parametrize("name", [("ACCELERATE_USE_FSDP", "true"), ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")])
def test_four_bit_weights_are_not_cut_up_over_gpus(capsys, monkeypatch, name):
    monkeypatch.setenv(*name)
    assert "use DDP or ZeRO-2" in refused(capsys, "--load_in_4bit", "--use_lora", stages=("sft",))


def test_settings_of_a_judge_are_printed_only_where_there_is_one():
    rules = resolve_training({}, ("grpo",)).table()
    judge = {"judge_url": "http://localhost:8000/v1", "judge_model": "judge"}
    judged = resolve_training(judge, ("grpo",)).table()
    assert "judge" not in rules and "num_generations" in rules
    assert all(name in judged for name in ("judge_url", "judge_cache", "judge_max_requests"))
