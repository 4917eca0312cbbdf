"""Models with flash attention: the package runs on GPUs alone, so its functions are written here in plain torch.

All else is real: what is handed to them, by transformers and by us, decides who sees whom.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import transformers.modeling_flash_attention_utils as flash_utils
from test_packing import loss_and_gradients, mixed_batch, trainer_for
from test_trainers import LORA, grpo_trainer, length_part, settings_for

import model_utils
from training import train
from vision_tower import WINDOWED_SDPA

FLASH = "flash_attention_2"
SDPA = ["sdpa", WINDOWED_SDPA]  # language model, vision tower


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False):  # fmt: skip
    """(tokens, heads, head size); segments end at the cumulated lengths."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q[-1] == len(q) and dropout_p == 0
    lengths = cu_seqlens_q.diff().tolist()
    assert max(lengths) == max_seqlen_q == max_seqlen_k
    calls.append(len(lengths))
    parts = zip(*(states.transpose(0, 1).split(lengths, dim=1) for states in (q, k, v)), strict=True)
    options = {"scale": softmax_scale, "is_causal": causal, "enable_gqa": True}
    return torch.cat([F.scaled_dot_product_attention(*part, **options) for part in parts], dim=1).transpose(0, 1)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """(rows, tokens, heads, head size)."""
    assert q.shape[1] == k.shape[1] and dropout_p == 0
    calls.append(0)
    states = (states.transpose(1, 2) for states in (q, k, v))
    options = {"scale": softmax_scale, "is_causal": causal, "enable_gqa": True}
    return F.scaled_dot_product_attention(*states, **options).transpose(1, 2)


calls: list[int] = []  # segments of each


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """flash-attn is installed, and there is a GPU for it, as far as transformers knows."""
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache = None
    padding.pad_input, padding.unpad_input = flash_utils._pad_input, flash_utils._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", lambda *_: True)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    known = flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    for name in ("general_availability_check", "pkg_availability_check"):
        monkeypatch.setitem(known, name, lambda *_, **__: True)
    monkeypatch.setitem(known, "supported_devices", ((lambda: True, "cuda"),))
    calls.clear()


def attention_of(model):
    return [config._attn_implementation for config in (model.config.text_config, model.config.vision_config)]


@pytest.mark.parametrize("kind", ["full", "lora", "recomputed"])
def test_packed_loss_and_gradients_are_those_of_padded_sdpa(base_folder, data_folder, tmp_path, kind):
    results = []
    flags = {"lora": {**LORA, "lora_dropout": 0}, "recomputed": {"gradient_checkpointing": "true"}}.get(kind, {})
    for own in ({}, {"attn_implementation": FLASH, "padding_free": "true"}):
        _, trainer = trainer_for(base_folder, data_folder, tmp_path, **flags, **own)
        with torch.no_grad():
            for name, value in trainer.model.named_parameters():
                if "lora_" in name:
                    value.fill_(0.02)
        results.append(loss_and_gradients(trainer, mixed_batch(trainer), num_items_in_batch=torch.tensor(77)))
    assert attention_of(trainer.model) == [FLASH, FLASH] and calls.count(4) in (3, 6), "four rows in three layers"
    (padded, expected), (packed, gradients) = results
    assert packed == pytest.approx(padded, rel=1e-5)
    assert expected.keys() == gradients.keys() and expected
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-3, atol=2e-5), name


@pytest.mark.parametrize("choice", [FLASH, {"vision_config": FLASH, "text_config": "sdpa"}], ids=["all", "auto"])
def test_rollouts_and_updates_are_those_of_sdpa(base_folder, data_folder, tmp_path, monkeypatch, choice):
    runs = []
    for chosen in ("sdpa", choice):
        monkeypatch.setattr(model_utils, "resolve_attention", lambda *_, chosen=chosen: chosen)
        settings = settings_for("grpo", base_folder, data_folder, tmp_path, beta=0.1, save_strategy="no", max_crops=2)
        loaded, trainer = grpo_trainer(settings, (length_part(),))
        assert attention_of(loaded.model)[1] == (WINDOWED_SDPA if chosen == "sdpa" else FLASH)
        train(trainer, settings, "grpo")
        logged = [item for item in trainer.state.log_history if "loss" in item]
        runs.append([[rollout.text for rollout in trainer._batch_rollouts], logged])
    assert calls
    (texts, logged), (other_texts, other_logged) = runs
    assert texts == other_texts and len(logged) == len(other_logged) == 2
    for one, other in zip(logged, other_logged, strict=True):
        for name in ("loss", "grad_norm", "kl", "entropy"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


def test_auto_takes_it_for_the_vision_tower_alone_and_does_without_where_it_fails(base_folder, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "flash_attn" or find_spec(name))
    assert attention_of(model_utils.load_weights(str(base_folder), torch.bfloat16, "auto", True)) == ["sdpa", FLASH]
    assert attention_of(model_utils.load_weights(str(base_folder), torch.float32, "auto", False)) == SDPA
    assert attention_of(model_utils.load_weights(str(base_folder), torch.bfloat16, FLASH, True)) == [FLASH, FLASH]

    def broken(*_, **__):
        raise ImportError("undefined symbol")

    monkeypatch.setitem(flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2], "general_availability_check", broken)
    assert attention_of(model_utils.load_weights(str(base_folder), torch.bfloat16, "auto", True)) == SDPA
    assert "flash-attn is installed but cannot be used (undefined symbol): using sdpa" in caplog.text
