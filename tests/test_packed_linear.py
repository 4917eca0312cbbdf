"""Linear layers with packed weights give what they gave, and are themselves again afterwards."""

from __future__ import annotations

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from test_generation import full_logprobs, scripted

import packed_linear
from generation import CropEngine, SamplingParams
from packed_linear import PackedLinears

pytestmark = pytest.mark.skipif(not packed_linear._has_onednn(), reason="torch has no oneDNN here")


def layers() -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return torch.nn.ModuleDict(
        {
            "wide": torch.nn.Linear(512, 1536, bias=False),
            "tall": torch.nn.Linear(1536, 512),
            "small": torch.nn.Linear(64, 64),
            "rounded": torch.nn.Linear(512, 1536, dtype=torch.bfloat16),
        }
    )


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_packed_layers_multiply_as_before(rows):
    model = layers()
    inputs = {name: torch.randn(rows, 2, layer.in_features).to(layer.weight.dtype) for name, layer in model.items()}
    with torch.no_grad():
        before = {name: model[name](inputs[name]) for name in model}
        packed = PackedLinears(model, 8)
        assert [layer for layer, _ in packed.packed] == [model["wide"], model["tall"]]
        with packed.used():
            during = {name: model[name](inputs[name]) for name in model}
    for name in ("small", "rounded"):
        assert torch.equal(before[name], during[name])
    for name in ("wide", "tall"):
        assert torch.allclose(before[name], during[name], atol=1e-5)


def test_layers_are_their_own_again_also_after_an_error_and_train():
    model = layers()
    packed = PackedLinears(model, 8)
    with pytest.raises(KeyError), packed.used():
        assert "forward" in model["wide"].__dict__
        raise KeyError
    assert all("forward" not in layer.__dict__ for layer in model.values())
    model["wide"](torch.randn(3, 512)).sum().backward()
    assert model["wide"].weight.grad.abs().sum() > 0


def test_weights_that_would_fill_the_memory_are_not_packed(monkeypatch):
    free = psutil.virtual_memory()._replace(available=2 * 4 * 2 * 512 * 1536 - 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert PackedLinears(layers(), 8).packed == []
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=free.available + 1))
    assert len(PackedLinears(layers(), 8).packed) == 2


def test_rollouts_under_autocast_are_left_to_autocast(trainable_model, renderer, monkeypatch):
    prompts = [renderer.prompt("Where?", Image.effect_noise((500, 448), 90).convert("RGB"))]
    engine, sampling = CropEngine(trainable_model, renderer), SamplingParams(6, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        plain = engine.generate(prompts, sampling, 2)
        monkeypatch.setattr(packed_linear, "LEAST_NUMBERS", 4096)  # some layers, not all
        assert engine.generate(prompts, sampling, 2) == plain


def test_layers_under_an_adapter_are_packed_and_the_adapter_counts():
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(512, 1024)), LoraConfig(target_modules=["0"]))
    torch.nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    rows = torch.randn(5, 512)
    with torch.no_grad():
        expected, packed = model(rows), PackedLinears(model, 5)
        assert len(packed.packed) == 1
        with packed.used():
            assert torch.allclose(model(rows), expected, atol=1e-4)


def test_rollouts_with_packed_weights_equal_one_full_forward(trainable_model, renderer, monkeypatch):
    monkeypatch.setattr(packed_linear, "LEAST_NUMBERS", 1)
    prompts = [renderer.prompt(f"Where is {n}?", Image.effect_noise((500, 448), 90).convert("RGB")) for n in range(2)]
    engine = CropEngine(trainable_model, renderer, batch_size=3)
    forced = [scripted(renderer, number, calls=number % 3) for number in range(6)]
    used = []
    multiply = packed_linear._linear
    monkeypatch.setattr(packed_linear, "_linear", lambda *args, **kwargs: used.append(1) or multiply(*args, **kwargs))
    for rollout in engine.generate(prompts, SamplingParams(40, seed=1), 3, forced=forced):
        expected = full_logprobs(trainable_model, renderer, rollout)
        own = [place for place, sampled in enumerate(rollout.sampled_mask) if sampled]
        assert [rollout.logprobs[place] for place in own] == pytest.approx([expected[place] for place in own], abs=1e-4)
    assert len(used) > 100
