"""All of a run is on one device: rollouts and both trainers on a device beside the CPU give what the CPU gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_trainers import length_part, settings_for
from transformers import PreTrainedModel

import train_grpo
import train_sft
from config import InferenceConfig
from conversation import Renderer
from generation import CropEngine, SamplingParams
from model_utils import load_for_inference, load_for_training
from training import train

ROOT = Path(__file__).parent.parent
LORA = {"use_lora": "true", "lora_r": 4, "lora_dropout": 0}
CASES = {
    "padded": ("sft", {"padding_free": "false"}),
    "packed": ("sft", {"padding_free": "true", **LORA}),
    "grpo": ("grpo", {"beta": 0, "num_iterations": 2}),
    "reference": ("grpo", {"beta": 0.1, "watch_every": 1, "watch_samples": 2, **LORA}),
}
CALLS = "<think>\nhere <tool_call>[3, 3, 30, 40]</tool_call> and <tool_call>[9, 9, 1, 1]</tool_call> "


def move(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """With new parameters, since those of the CPU cannot become the device's; later moves must keep them."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    model.to(device)
    torch.__future__.set_overwrite_module_params_on_conversion(False)
    return model


def trained(stage: str, base: Path, data: Path, folder: Path, device: str, flags: dict) -> list[dict]:
    """Losses and gradient norms of three steps."""
    settings = settings_for(stage, base, data, folder, save_strategy="no", max_steps=3, **flags)
    loaded = load_for_training(settings.model, settings.data, getattr(settings, stage), str(base))
    move(loaded.model, device)
    build = train_sft.build_trainer if stage == "sft" else partial(train_grpo.build_trainer, parts=(length_part(),))
    trainer = build(loaded, settings)
    assert trainer.args.device == next(trainer.model.parameters()).device == torch.device(device)
    train(trainer, settings, stage)
    history = [item for item in trainer.state.log_history if "loss" in item]
    return [{name: item[name] for name in ("loss", "grad_norm")} for item in history]


def rollouts(base: Path, data: Path, device: str) -> list[dict]:
    """Six sampled rollouts with crops, two a prompt, more than run side by side."""
    loaded = load_for_inference(InferenceConfig(str(base), device="cpu"))
    model, renderer = move(loaded.model, device), Renderer(loaded.processor, loaded.contract)
    prompts = [renderer.prompt("What?", Image.open(path)) for path in sorted(data.glob("images/*.jpg"))[:3]]
    forced = [renderer.text_ids(CALLS[: 20 * place]) for place in range(6)]
    engine = CropEngine(model, renderer, batch_size=4)
    found = engine.generate(prompts, SamplingParams(60, seed=5), 2, forced=forced, keep_features=True)
    for rollout in found:
        assert all(features.device == torch.device(device) for features in rollout.features)
    return [{"ids": rollout.completion_ids, "logprobs": rollout.logprobs} for rollout in found]


@pytest.fixture(scope="module")
def on_the_device(base_folder, data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    plan = {"base": str(base_folder), "data": str(data_folder), "folder": str(folder), "cases": CASES}
    (folder / "plan.json").write_text(json.dumps(plan))
    environment = {"ACCELERATE_TORCH_DEVICE": "standin:0", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "tests/stand_in_device.py", str(folder / "plan.json")],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "device.json").read_text())


def test_the_device_refuses_tensors_of_the_cpu(on_the_device):
    assert on_the_device["refuses_a_mix"]


def test_rollouts_on_a_device_are_those_of_the_cpu(on_the_device, base_folder, data_folder):
    for one, other in zip(rollouts(base_folder, data_folder, "cpu"), on_the_device["rollouts"], strict=True):
        assert one["ids"] == other["ids"]
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_training_on_a_device_is_training_on_the_cpu(on_the_device, base_folder, data_folder, tmp_path, case):
    stage, flags = CASES[case]
    expected = trained(stage, base_folder, data_folder, tmp_path, "cpu", flags)
    assert len(expected) == 3 and all(item["grad_norm"] > 0 for item in expected)
    for one, other in zip(expected, on_the_device[case], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
