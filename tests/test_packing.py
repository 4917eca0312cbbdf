"""A packed batch is the padded one: same loss, same gradients, and no row sees another."""

import json

import pytest
import torch
from test_trainers import LORA, gradient_positions, settings_for, sft_trainer
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

from config import SettingsError
from conversation import IGNORED
from packing import Packer
from sft_data import ROWS
from training import train

PACKED = {"padding_free": "true"}


def trainer_for(base_folder, data_folder, tmp_path, **flags):
    settings = settings_for("sft", base_folder, data_folder, tmp_path, **flags)
    _, trainer = sft_trainer(settings)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return settings, trainer


def mixed_batch(trainer):
    """Rows of several lengths, with none to three crops."""
    rows = [dict(trainer.train_dataset[index]) for index in (0, 4, 20, 35)]
    call = "{Crop it [10, 10, 90, 80]} "
    for count, row in enumerate(rows):
        words = "there is more to say " * (3 * count + 1)
        row["response"] = f"<think>\n{call * count}{words}\n</think>\n\n<answer>yes</answer>"
    batch = trainer.data_collator(rows)
    batch.pop(ROWS)
    assert len(set(batch["attention_mask"].sum(1).tolist())) == 4
    assert len(batch["image_grid_thw"]) == 4 + 0 + 1 + 2 + 3
    return batch


def loss_and_gradients(trainer, batch, **kwargs):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), **kwargs)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), grads


FLAGS = {"full": {}, "lora": {**LORA, "lora_dropout": 0}, "recomputed": {"gradient_checkpointing": "true"}}


@pytest.mark.parametrize("kind", FLAGS)
def test_packed_loss_and_gradients_are_those_of_the_padded_batch(base_folder, data_folder, tmp_path, kind):
    results = []
    for flags in ({}, PACKED):
        _, trainer = trainer_for(base_folder, data_folder, tmp_path, **FLAGS[kind], **flags)
        with torch.no_grad():  # a fresh adapter is zero, and would hide its own gradients
            generator = torch.Generator().manual_seed(0)
            for name, value in trainer.model.named_parameters():
                if "lora_" in name:
                    value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
        batch = mixed_batch(trainer)
        results.append(loss_and_gradients(trainer, batch, num_items_in_batch=torch.tensor(77)))
        assert trainer._metrics["train"]["num_tokens"] == [batch["attention_mask"].sum()]
    (padded, padded_grads), (packed, packed_grads) = results
    assert packed == pytest.approx(padded, rel=1e-5)
    assert padded_grads.keys() == packed_grads.keys() and padded_grads
    for name, grad in padded_grads.items():
        assert torch.allclose(packed_grads[name], grad, rtol=1e-3, atol=2e-5), name


def test_packing_loses_no_label_and_scores_nothing_else(base_folder, data_folder, tmp_path):
    _, trainer = trainer_for(base_folder, data_folder, tmp_path, **PACKED)
    batch = mixed_batch(trainer)
    packed = trainer._packer(batch)
    assert packed["input_ids"].tolist() == [batch["input_ids"][batch["attention_mask"].bool()].tolist()]
    assert packed["shift_labels"].tolist() == [batch["labels"][batch["labels"] != IGNORED].tolist()]
    assert torch.equal(packed["input_ids"][0, packed["scored"] + 1], packed["shift_labels"][0])
    output = trainer.model(**{k: v for k, v in packed.items() if k != "labels"}, fused_lm_head=True)
    assert output.log_probs.shape == packed["shift_labels"].shape


def test_a_row_in_a_packed_batch_does_not_see_its_neighbours(base_folder, data_folder, tmp_path):
    _, trainer = trainer_for(base_folder, data_folder, tmp_path, **PACKED)
    batch = mixed_batch(trainer)
    other = {**batch, "input_ids": batch["input_ids"].clone(), "pixel_values": batch["pixel_values"].clone()}
    end = int(batch["attention_mask"][0].sum())
    other["input_ids"][0, end - 20 : end] = 5
    other["pixel_values"][:4] += 1.0

    def log_probs(given):
        packed = trainer._packer(given)
        packed.pop("labels")
        return trainer.model(**packed, fused_lm_head=True).log_probs[0]

    own = int((batch["labels"][0] != IGNORED).sum())
    before, after = log_probs(batch), log_probs(other)
    assert torch.equal(before[own:], after[own:]) and not torch.allclose(before[:own], after[:own])


def flash_attention_by_parts(module, query, key, value, attention_mask, position_ids=None, **kwargs):
    """As flash-attention's kernel, which needs a GPU; where sequences begin is found by transformers' own code."""
    assert attention_mask is None and _is_packed_sequence(position_ids, batch_size=len(query))
    (starts, _), _ = prepare_fa_kwargs_from_position_ids(position_ids)
    parts = zip(*(states.split(starts.diff().tolist(), dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **kwargs)[0] for part in parts], dim=1), None


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_flash_attention_finds_the_rows_of_a_packed_batch(base_folder, data_folder, tmp_path, recompute):
    AttentionInterface.register("flash_attention_by_parts", flash_attention_by_parts)
    AttentionMaskInterface.register("flash_attention_by_parts", flash_attention_mask)
    results = []
    for attention in ("sdpa", "flash_attention_by_parts"):
        _, trainer = trainer_for(base_folder, data_folder, tmp_path, gradient_checkpointing=recompute)
        trainer.model.config.get_text_config()._attn_implementation = attention
        if attention != "sdpa":
            trainer._packer = Packer(trainer.model)
        results.append(loss_and_gradients(trainer, mixed_batch(trainer)))
    (loss, grads), (packed_loss, packed_grads) = results
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert grads.keys() == packed_grads.keys()
    assert all(torch.allclose(grads[name], packed_grads[name], atol=1e-5) for name in grads)


def test_a_batch_without_labels_gives_zero_loss_and_gradients(base_folder, data_folder, tmp_path):
    for flags in ({}, PACKED):
        _, trainer = trainer_for(base_folder, data_folder, tmp_path, **flags)
        batch = mixed_batch(trainer)
        batch["labels"][:] = IGNORED
        loss, grads = loss_and_gradients(trainer, batch, num_items_in_batch=torch.tensor(0))
        assert loss == 0 and grads and not any(grad.any() for grad in grads.values())


def test_a_model_that_packs_still_takes_padded_inputs_and_masks(base_folder, data_folder, tmp_path):
    _, trainer = trainer_for(base_folder, data_folder, tmp_path)
    batch = mixed_batch(trainer)
    batch.pop("labels")
    trainer.model.eval()
    with torch.no_grad():
        before = trainer.model(**batch).logits
        packer = Packer(trainer.model)
        after = trainer.model(**batch).logits
    assert not packer.flash
    assert torch.equal(before, after)


def test_sliding_windows_are_refused(tiny_model, trainable_model):
    trainable_model.config.text_config.use_sliding_window = True
    with pytest.raises(SettingsError, match="the model uses sliding windows: leave --padding_free off"):
        Packer(trainable_model)


def test_label_smoothing_is_refused(base_folder, data_folder, tmp_path):
    with pytest.raises(SettingsError, match="label smoothing needs the padded logits"):
        trainer_for(base_folder, data_folder, tmp_path, label_smoothing_factor=0.1, **PACKED)


def test_packed_gradient_comes_from_exactly_the_models_own_tokens(base_folder, data_folder, tmp_path):
    _, trainer = trainer_for(base_folder, data_folder, tmp_path, **PACKED)
    batch = mixed_batch(trainer)
    carries = gradient_positions(trainer, dict(batch))
    kept = batch["attention_mask"].bool()
    following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    assert torch.equal(carries[0], (following != IGNORED)[kept])


def test_packed_training_with_evaluation_follows_the_padded_run(base_folder, data_folder, tmp_path):
    histories = []
    for name, flags in (("padded", {}), ("packed", PACKED)):
        flags = flags | {"val_data": f"{data_folder}/val.jsonl", "eval_steps": 1, "learning_rate": 1e-4, "max_steps": 3}
        settings, trainer = trainer_for(base_folder, data_folder, tmp_path / name, **flags)
        train(trainer, settings, "sft")
        histories.append(trainer.state.log_history)
    for key in ("loss", "eval_loss", "num_tokens", "mean_token_accuracy"):
        padded, packed = ([item[key] for item in history if key in item] for history in histories)
        assert len(padded) >= 3 and packed == pytest.approx(padded, rel=2e-3), key


def test_the_log_tells_tokens_per_second_and_peak_memory(base_folder, data_folder, tmp_path):
    settings, trainer = trainer_for(base_folder, data_folder, tmp_path, max_steps=3)
    train(trainer, settings, "sft")
    logs = [item for item in trainer.state.log_history if "loss" in item]
    assert all(0.1 < item["peak_memory_gib"] < 64 for item in logs)
    assert ["tokens_per_second" in item for item in logs] == [False, True, True]
    assert all(item["tokens_per_second"] > 0 for item in logs[1:])


def drawn_lines(trainer):
    """The lines in the order in which the next epoch draws them."""
    names = []
    encode = trainer.data_collator._encode
    trainer.data_collator._encode = lambda row: (names.append((row["line"], row["entry"])), encode(row))[1]
    return names


@pytest.fixture
def faulty_data(data_folder, tmp_path):
    """The drawn data, 12 rows of three questions, of which the first and the tenth have lost their image."""
    rows = (data_folder / "train.jsonl").read_text().splitlines()
    for number in range(0, len(rows), 9):
        rows[number] = json.dumps({**json.loads(rows[number]), "image_path": "gone.jpg"})
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    return {"train_data": f"{tmp_path}/train.jsonl", "data_check": "lazy"}


def test_rows_checked_when_drawn_train_in_the_seeds_order_and_resume_exactly(
    base_folder, data_folder, tmp_path, faulty_data, capsys
):
    def run(name, steps):
        flags = {**faulty_data, "save_steps": 2, "max_steps": steps}
        settings, trainer = trainer_for(base_folder, data_folder, tmp_path / name, **flags)
        order = drawn_lines(trainer)
        train(trainer, settings, "sft")
        losses = [item["loss"] for item in trainer.state.log_history if "loss" in item]
        return losses, order, dict(trainer.model.named_parameters())

    losses, order, weights = run("whole", 9)  # an epoch
    _, first, _ = run("interrupted", 4)
    again, rest, resumed = run("interrupted", 9)
    assert first[:16] + rest[:20] == order[:36]  # accelerate draws one batch ahead
    assert losses == again and all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert "skipped line 1, QnA[0]: missing image gone.jpg" in capsys.readouterr().out


def test_a_whole_epoch_skips_and_counts_the_faulty_rows_and_trains_on_the_others(
    base_folder, data_folder, tmp_path, faulty_data
):
    flags = {**faulty_data, "max_steps": -1, "num_epochs": 1, "batch_size": 1, **PACKED}
    settings, trainer = trainer_for(base_folder, data_folder, tmp_path / "out", **flags)
    train(trainer, settings, "sft")
    log = trainer.fault_logs["train"]
    assert (log.drawn, log.skipped) == (36, 6)
    assert {(line, entry) for line, entry, _ in log.known} == {(1, 0), (10, 0)}
    assert [item["faulty_rows"] for item in trainer.state.log_history if "faulty_rows" in item][-1] == 6
    assert trainer.state.global_step == 36
    bad = (tmp_path / "out/bad_rows.jsonl").read_text().splitlines()
    assert len(bad) == 2 and all("gone.jpg" in line for line in bad)
    losses = [item["loss"] for item in trainer.state.log_history if "loss" in item]
    assert sum(loss == 0 for loss in losses) == 6, "a batch of faulty rows alone has no loss"
