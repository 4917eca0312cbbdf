"""The vision tower's windows at once, and without cuDNN: the same features and gradients in fewer operations."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2_5_VLConfig
from transformers.integrations import sdpa_attention
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from vision_tower import WINDOWED_SDPA, speed_up

# Patches, rows and columns: whole windows of 8 x 8 with parts at two sides, twice the same, and less than a window.
GRIDS = [[1, 36, 50], [1, 20, 30], [1, 20, 30], [1, 4, 4], [1, 2, 26]]


@pytest.fixture
def visual():
    shape = {"depth": 4, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(vision_config={**shape, "window_size": 112, "fullatt_block_indexes": [3]}).vision_config
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return Qwen2_5_VisionTransformerPretrainedModel(config)


def sped_up(visual):
    visual = deepcopy(visual)
    speed_up(SimpleNamespace(model=SimpleNamespace(visual=visual)))
    return visual


def features(visual, grids):
    """Features of random pixels, and what a loss on them leaves at the weights."""
    columns = visual.patch_embed.proj.weight[0].numel()
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), columns, generator=torch.Generator().manual_seed(0))
    result = visual(pixels, torch.tensor(grids)).pooler_output
    result.square().sum().backward()
    return result.detach(), [value.grad for value in visual.parameters()]


@pytest.mark.parametrize("grids", [GRIDS, GRIDS[:1], [[1, 8, 8]] * 3], ids=["several", "one", "one length"])
def test_features_and_gradients_are_those_of_one_window_after_the_other(visual, grids):
    windowed = sped_up(visual)
    assert windowed.config._attn_implementation == WINDOWED_SDPA != visual.config._attn_implementation
    (expected, gradients), (found, others) = features(visual, grids), features(windowed, grids)
    assert torch.equal(found, expected)
    for one, other in zip(gradients, others, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * one.abs().max().item())


def test_windows_of_one_length_are_one_call(visual, monkeypatch):
    seen, plain = [], sdpa_attention.sdpa_attention_forward

    def attend(module, query, *others, **settings):
        seen.append((len(query), query.shape[2]))
        return plain(module, query, *others, **settings)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", attend)
    features(sped_up(visual), GRIDS)
    in_windows, over_images = seen[: (len(seen) - 4) // 3], [(1, 16), (1, 52), (2, 600), (1, 1800)]
    assert seen == in_windows * 3 + over_images
    lengths = [length for _, length in in_windows]
    assert lengths == sorted(set(lengths)) and sum(count * length for count, length in in_windows) == 1800 + 1200 + 68


def test_a_tower_with_another_attention_keeps_it(visual):
    visual.config._attn_implementation = "eager"
    assert sped_up(visual).config._attn_implementation == "eager"


def test_on_a_gpu_cudnn_is_left_out_and_the_features_are_the_same(visual, monkeypatch):
    expected, gradients = features(sped_up(visual), GRIDS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delattr(torch.nn.Conv3d, "_conv_forward")
    torch.backends.cuda.enable_cudnn_sdp(True)
    found, others = features(deepcopy(sped_up(visual)), GRIDS)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.allclose(found, expected, atol=1e-5)
    for one, other in zip(gradients, others, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * one.abs().max().item())
