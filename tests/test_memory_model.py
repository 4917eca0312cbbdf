"""The memory model against measured peaks: bytes of the tensors that really live, counted at every operation.

python -m pytest tests/test_memory_model.py
"""

import gc
import json
import sys
import weakref
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

import memory_model
from architecture import ARCHITECTURES, Architecture
from command_line import resolve_training
from config import SettingsError
from memory_model import Run, peak, phases, savings, state_bytes, update_bytes

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench_memory
from bench_memory import measure

MODEL_7B = ARCHITECTURES["Qwen/Qwen2.5-VL-7B-Instruct"]


@pytest.mark.parametrize(
    ("size", "total"), [("3B", 3_754_622_976), ("7B", 8_292_166_656), ("32B", 33_452_718_336), ("72B", 73_410_777_344)]
)
def test_built_in_architectures_have_the_parameters_of_the_published_weights(size, total):
    assert ARCHITECTURES[f"Qwen/Qwen2.5-VL-{size}-Instruct"].parameters == total


def test_an_architecture_read_from_a_folder_counts_the_parameters_of_its_model(tiny_model, base_folder):
    counted = Architecture.find(str(base_folder))
    assert counted.parameters == sum(value.numel() for value in tiny_model.parameters())
    assert counted.vision_parameters == sum(value.numel() for value in tiny_model.model.visual.parameters())
    assert Architecture.find(str(base_folder / "config.json")) == counted


def test_a_config_of_another_model_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4}))
    with pytest.raises(SettingsError, match=r"config\.json is not the config\.json of a Qwen2\.5-VL model"):
        Architecture.find(str(tmp_path))


CASES = {
    "full, float32": Run(method="full", half=False, gradient_checkpointing=False),
    "full, float32, checkpoints": Run(method="full", half=False),
    "full, mixed": Run(method="full", gradient_checkpointing=False),
    "full, mixed, checkpoints": Run(method="full"),
    "lora, float32": Run(half=False, gradient_checkpointing=False),
    "lora, bfloat16": Run(gradient_checkpointing=False),
    "lora, bfloat16, checkpoints": Run(),
}


FAST = ("full, mixed, checkpoints", "lora, bfloat16")


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in FAST)]
)
def test_modelled_peak_of_an_update_is_within_15_percent_of_the_measured_one(name, monkeypatch):
    """A mid-size model, without arithmetic; the output head in narrow tiles, since its CPU code is not a GPU's."""
    _holds("mid", replace(CASES[name], lora_dropout=0.0, lora_r=16, batch_size=2), 600, monkeypatch, fake=True)


@pytest.mark.parametrize("name", CASES)
def test_modelled_peak_holds_for_real_tensors_on_the_tiny_model(name, monkeypatch):
    _holds("tiny", replace(CASES[name], lora_dropout=0.0, lora_r=4, batch_size=2), 200, monkeypatch, fake=False)


def _holds(shape: str, run: Run, tokens: int, monkeypatch, fake: bool) -> None:
    monkeypatch.setattr(memory_model, "HEAD_TILE", (4096, 64))
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    model, measured = measure(shape, run, tokens, fake)
    state = state_bytes(model, run)
    update = update_bytes(model, run, 0.0, run.batch_size * tokens, tokens, run.batch_size * tokens)
    steady = sum(value for part, value in state.items() if part != "gradients")
    assert steady == pytest.approx(measured["between steps"], rel=0.02)
    assert sum(state.values()) + sum(update.values()) == pytest.approx(measured["peak"], rel=0.15)
    assert update["activations"] == pytest.approx(measured["kept for backward"], rel=0.15)


def test_a_measurement_begins_without_the_model_of_the_one_before(monkeypatch):
    build, models, before = bench_memory.build_model, [], []

    def noted(*args):
        before.append([model for model in models if model() is not None])
        model = build(*args)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(bench_memory, "build_model", noted)
    gc.disable()
    try:
        for _ in range(2):
            measure("tiny", Run(method="full", half=False, batch_size=1), 32, fake=False)
    finally:
        gc.enable()
    assert before == [[], []]


def test_a_measurement_counts_what_lives_and_forgets_what_is_freed():
    from bench_memory import PeakBytes

    with PeakBytes() as counted:
        first = torch.zeros(1000)
        second = first + 1
        view = second[:10]
        del first, second
        third = torch.zeros(500)
    assert (counted.now, counted.peak) == (6000, 8000)
    del view, third


def test_checkpoints_adapters_four_bits_and_sharding_each_take_less():
    run = Run(method="full", half_weights=True, batch_size=4)
    size = peak(MODEL_7B, run).allocated
    assert peak(MODEL_7B, replace(run, gradient_checkpointing=False)).allocated > size
    lora = peak(MODEL_7B, replace(run, method="lora", half_weights=False)).allocated
    assert peak(MODEL_7B, replace(run, method="qlora", half_weights=False)).allocated < lora < size
    several = replace(run, half_weights=False, num_gpus=8)
    sizes = [peak(MODEL_7B, replace(several, sharding=kind)).allocated for kind in ("ddp", "zero2", "fsdp2")]
    assert sizes == sorted(sizes, reverse=True)


def test_a_bound_of_the_cache_bounds_the_rollouts():
    open_end, bounded = Run(), Run(max_batch_tokens=4096)
    caches = [phases(MODEL_7B, run, ("grpo",))[0].parts["KV cache"] for run in (open_end, bounded)]
    # 28 layers x 4 heads x 128 numbers x keys and values x 2 bytes = 57,344 bytes a token
    assert caches == [57_344 * 32 * open_end.rollout_row, 57_344 * 4096]


def test_out_of_memory_names_the_three_settings_that_save_most():
    run = Run(batch_size=8, gradient_checkpointing=False)
    found = savings(MODEL_7B, run, "sft")
    values = [value for flags, value in found if "skips rows" not in flags]
    assert values == sorted(values, reverse=True) and len(values) == len(found) - 1
    assert found[0][0] == "--gradient_checkpointing true"
    assert found[1][0] == "--batch_size 4 --gradient_accumulation_steps 16"
    message = memory_model.out_of_memory_message(MODEL_7B, run, "sft")
    assert message.count("saves about") == 3
    assert "--beta" not in message, "SFT has none"
    rollouts = savings(MODEL_7B, Run(batch_size=16, gradient_accumulation_steps=16, rollout_batch_size=256), "grpo")
    assert rollouts[0][0].startswith("--max_batch_tokens")


@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_three_settings_are_left_but_for_a_single_row_on_4_bit_weights(stage, method):
    for batch, checkpointing, half, on_gpu in product((1, 2), *[(True, False)] * 3):
        run = Run(method=method, batch_size=batch, gradient_checkpointing=checkpointing, half=half, lora_r=8)
        found = savings(MODEL_7B, run, stage, on_gpu)
        assert len({flags for flags, _ in found}) == len(found)
        assert len(found) >= (2 if (stage, method, batch) == ("sft", "qlora", 1) else 3), run
        if stage == "sft" and batch > 1:
            assert "skips rows" in found[-1][0], "the last resort"


def test_training_that_runs_out_of_memory_ends_with_settings_and_no_traceback(
    base_folder, data_folder, tmp_path, monkeypatch, capsys
):
    """The allocator's error comes out of the first forward pass."""
    import train_sft
    from training import exit_with_message

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    flags = {
        "model_name": str(base_folder), "train_data": f"{data_folder}/train.jsonl", "image_base_path": str(data_folder),
        "output_dir": str(tmp_path), "use_cpu": True, "max_steps": 1, "min_box_side": 1, "disable_tqdm": True,
        "gradient_checkpointing": False,
    }  # fmt: skip
    monkeypatch.setattr("trainers.CropSFTTrainer.compute_loss", fail)
    with pytest.raises(SystemExit), exit_with_message("train_sft.py"):
        train_sft.run_sft(resolve_training(flags, ("sft",)))
    lines = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line or "saves about" in line]
    assert lines[0].startswith("train_sft.py: out of memory. SFT takes about")
    assert 3 <= len(lines) <= 4 and "--batch_size 2 --gradient_accumulation_steps 8" in lines[1]
    assert torch.cuda.is_available() or not any("--bf16" in line for line in lines), "refused on a CPU"


def test_a_model_that_does_not_fit_when_the_trainer_is_made_ends_in_the_same_message(
    base_folder, data_folder, tmp_path, monkeypatch
):
    """What the driver refuses by itself is no error of torch's allocator."""
    from test_trainers import settings_for

    import train_sft

    def fail(*_, **__):
        raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    monkeypatch.setattr("trainers.CropSFTTrainer._move_model_to_device", fail)
    settings = settings_for("sft", base_folder, data_folder, tmp_path)
    with pytest.raises(SettingsError, match=r"out of memory\. SFT takes about [^\n]*\n.*by the memory model:\n  --"):
        train_sft.run_sft(settings)


def test_out_of_memory_knows_an_adapter_that_is_trained_on(base_folder, data_folder, tmp_path, monkeypatch):
    """R-GRPO on an SFT adapter trains it without `use_lora`."""
    from test_trainers import LORA, grpo_trainer, settings_for

    from model_utils import load_for_training, save_companions
    from training import train

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    sft = settings_for("sft", base_folder, data_folder, tmp_path, **LORA)
    loaded = load_for_training(sft.model, sft.data, sft.sft, str(base_folder))
    loaded.model.save_pretrained(tmp_path / "adapter")
    save_companions(tmp_path / "adapter", loaded.processor, loaded.contract, None)
    flags = {"sft_checkpoint": str(tmp_path / "adapter"), "gradient_accumulation_steps": 2, "beta": 0.1}
    settings = settings_for("grpo", base_folder, data_folder, tmp_path / "grpo", **flags)
    _, trainer = grpo_trainer(settings)
    told = []
    monkeypatch.setattr("training.out_of_memory_message", lambda model, run, *_: told.append(run) or "")
    monkeypatch.setattr("trainers.CropGRPOTrainer._generate", fail)
    with pytest.raises(SettingsError):
        train(trainer, settings, "grpo")
    assert (told[0].method, told[0].lora_r) == ("lora", 8)
