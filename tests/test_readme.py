"""What README and docs say is so: their commands parse, their settings and files exist, their pieces of code run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from torch.distributed.run import get_args_parser

import configure_training
import convert_data
import data_utils
import evaluate
import inference
import model_utils
import rollout_pages
import web_demo
from command_line import parse_training
from config import EvaluationConfig, WebConfig, build

ROOT = Path(__file__).parent.parent
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
README = "\n".join(PAGES.values())
STAGES = {"train_sft.py": ("sft",), "train_grpo.py": ("grpo",), "train_qwenvl_25.py": ()}


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for kind, text in fenced if kind == language]


def commands(program: str = "python") -> list[list[str]]:
    """Every `python …` command of the README, or of another program, continuation lines joined."""
    text = "\n".join(blocks("")).replace("\\\n", " ")
    lines = [line.removeprefix("$ ") for line in text.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working folder with the files that the README's commands name."""
    (tmp_path / "data/images").mkdir(parents=True)
    (tmp_path / "outputs/sft/final_model").mkdir(parents=True)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("train", "val"):
        (tmp_path / f"data/{name}.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_has_commands_for_every_door():
    scripts = {command[0] for command in commands()}
    doors = {
        "train_qwenvl_25.py",
        "train_sft.py",
        "train_grpo.py",
        "inference.py",
        "evaluate.py",
        "configure_training.py",
        "convert_data.py",
        "data_utils.py",
        "model_utils.py",
        "web_demo.py",
    }
    assert doors <= scripts


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command_parses_as_written(command, project, capsys):
    script, *flags = command
    assert (ROOT / script).is_file()
    if script in STAGES:
        settings = parse_training(flags, "", STAGES[script])
        assert settings.sft or settings.grpo
    elif script == "inference.py":
        assert inference._parser().parse_args(flags).image_path == "test_image.jpg"
    elif script == "evaluate.py":
        config = build(EvaluationConfig, vars(evaluate._parser().parse_args(flags)))
        assert config.model_path.startswith("outputs/")
    elif script == "rollout_pages.py":
        assert rollout_pages.build_parser().parse_args(flags).file.endswith("step_000050.jsonl")
    elif script == "model_utils.py":
        assert model_utils.merge_parser().parse_args(flags).merge == "outputs/grpo/final_model"
    elif script == "configure_training.py" and "--probe" in flags:
        assert configure_training.build_parser().parse_args(flags).probe == "sft"
    elif script == "web_demo.py":
        assert build(WebConfig, vars(web_demo._parser().parse_args(flags))).host == "127.0.0.1"
    elif script == "configure_training.py":
        configure_training.main(flags)
        out = capsys.readouterr().out
        shown = [line for line in README.splitlines() if " of 32: weights" in line]
        expected = ["train_qwenvl_25.py"] if "--show_command" in flags else shown
        assert expected and all(line in out for line in expected)
    elif script == "convert_data.py":
        source, target, config = convert_data.read_flags(vars(convert_data._parser().parse_args(flags)))
        convert_data.check_target(source, target)
        assert config.image_folder == "data/images"
    elif script == "data_utils.py":
        assert data_utils.main(flags) == 1, "the row of the test's file is faulty"
    else:
        pytest.fail(f"no test for {script}")


@pytest.mark.parametrize("command", [*commands("torchrun"), *commands("accelerate")], ids=" ".join)
def test_launcher_command_parses_as_written(command, project):
    if command[0] == "launch":
        arguments = launch_command_parser().parse_args(command[1:])
        assert Path(arguments.config_file).is_file()
        _validate_launch_command(arguments)
    else:
        arguments = get_args_parser().parse_args(command)
    assert arguments.training_script == "train_qwenvl_25.py"
    assert parse_training(arguments.training_script_args, "", ()).grpo


def test_readme_names_every_config_of_accelerate():
    assert commands("torchrun")
    assert commands("accelerate")
    configs = {path.name for path in (ROOT / "configs/accelerate").iterdir()}
    assert {name for name in configs if f"`{name}`" not in README} == set()


def test_settings_file_shown_is_the_one_in_configs():
    shown = next(json.loads(block) for block in blocks("json") if "lora_alpha" in block)
    assert shown == json.loads((ROOT / "configs/sft_config.json").read_text())


def test_data_row_shown_is_sound_but_for_its_image(project):
    row = next(block for block in blocks("json") if "QnA" in block)
    (project / "data/train.jsonl").write_text(row)
    from PIL import Image

    target = project / "data/images" / json.loads(row)["image_path"]
    target.parent.mkdir(parents=True)
    Image.new("RGB", (640, 480)).save(target)
    assert data_utils.main(["--check", "data/train.jsonl", "--image_base_path", "data/images"]) == 0


def test_tree_names_every_file_and_no_other():
    tree = next(block for block in blocks("") if "config.py " in block)
    named = set(re.findall(r"[\w/]+\.py", tree))
    assert named == {path.name for path in ROOT.glob("*.py")}


def test_relative_links_lead_somewhere():
    links = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\((?!http)([^)#]+)", text)]
    assert {page.name for page, _ in links} == {page.name for page in PAGES}
    assert [link for page, link in links if not (page.parent / link).exists()] == []


def test_links_to_a_heading_lead_to_one():
    for page, text in PAGES.items():
        for target, heading in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", text):
            words = PAGES[(page.parent / target).resolve() if target else page]
            titles = re.findall(r"^#+ (.+)$", words, re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, heading


def test_python_shown_runs_on_a_model(base_folder, project, monkeypatch):
    code = "\n".join(block for block in blocks("python") if "inference" in block)
    code = code.replace("outputs/grpo/final_model", str(base_folder)).replace("max_new_tokens=512", "max_new_tokens=8")
    from PIL import Image

    picture = Image.new("RGB", (200, 150), "red")
    names = {"image": picture, "images": [picture] * 2, "questions": ["What?", "Where?"]}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["results"]) == 2
    assert names["news"].text == names["inference"].generate(picture, names["news"].question).text
    assert (project / "trace.html").is_file()
