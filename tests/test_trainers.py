"""Both stages for real, on the tiny model: what carries gradient, what moves, what is saved and resumed."""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from judge_server import completion
from PIL import Image

import train_grpo
import train_sft
import trainers
from command_line import resolve_training
from config import InferenceConfig, SettingsError
from conversation import IGNORED
from inference import QwenVLInference
from model_utils import is_adapter, load_for_inference, load_for_training
from rewards import RewardPart
from training import finish, train

LORA = {"use_lora": "true", "lora_r": 8, "lora_dropout": 0.1}


def settings_for(stage: str, base_folder: Path, data_folder: Path, output: Path, **flags):
    """Settings of a short run on the demo's data, through the code that reads the command line."""
    flags = {
        "model_name": str(base_folder),
        "train_data": str(data_folder / "train.jsonl"),
        "image_base_path": str(data_folder),
        "output_dir": str(output),
        "max_steps": 2,
        "learning_rate": 1e-3,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "false",
        "warmup_ratio": 0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "disable_tqdm": True,
        **flags,
    }
    if stage == "grpo":
        flags = {
            "num_generations": 4,
            "batch_size": 8,
            "max_completion_length": 24,
            "watch_every": 0,
            "keep_rollouts_every": 0,
            **{k: v for k, v in flags.items() if k != "batch_size"},
        }
    return resolve_training(flags, (stage,))


def length_part() -> RewardPart:
    """A reward that differs between the rollouts of any group."""
    return RewardPart("variety", lambda response, reference: zlib.crc32(response.text.encode()) % 1000 / 1000)


def sft_trainer(settings):
    loaded = load_for_training(settings.model, settings.data, settings.sft, settings.model.model_name)
    return loaded, train_sft.build_trainer(loaded, settings)


def grpo_trainer(settings, parts=None):
    start = settings.grpo.sft_checkpoint or settings.model.model_name
    loaded = load_for_training(settings.model, settings.data, settings.grpo, start)
    with torch.no_grad():  # a fresh adapter is zero, and would hide its dropout
        for name, value in loaded.model.named_parameters():
            if "lora_B" in name and not value.any():
                value.normal_(std=0.05)
    return loaded, train_grpo.build_trainer(loaded, settings, parts)


def gradient_positions(trainer, inputs) -> torch.Tensor:
    """True at each position whose last hidden state gets gradient from the loss: (rows, seq)."""
    base = trainer.model.get_base_model() if is_peft(trainer.model) else trainer.model
    kept = []

    def keep(module, args, output):
        output.retain_grad()
        kept.append(output)

    handle = base.model.language_model.norm.register_forward_hook(keep)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # what the training loop would have set
    try:
        trainer.compute_loss(trainer.model, inputs).backward()
    finally:
        handle.remove()
    return kept[0].grad.abs().sum(-1) > 0


def is_peft(model) -> bool:
    return hasattr(model, "peft_config")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_sft_gradient_comes_from_exactly_the_models_own_tokens(base_folder, data_folder, tmp_path, lora):
    settings = settings_for("sft", base_folder, data_folder, tmp_path, **(LORA if lora else {}))
    _, trainer = sft_trainer(settings)
    batch = next(iter(trainer.get_train_dataloader()))
    carries = gradient_positions(trainer, batch)
    # The hidden state at t makes the logits of token t + 1.
    assert torch.equal(carries[:, :-1], batch["labels"][:, 1:] != IGNORED)
    assert not carries[:, -1].any()


@pytest.mark.parametrize("shared", [True, False], ids=["shared-prompt", "row-by-row"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_grpo_gradient_comes_from_exactly_the_sampled_tokens(
    base_folder, data_folder, tmp_path, monkeypatch, lora, shared
):
    settings = settings_for("grpo", base_folder, data_folder, tmp_path, beta=0, **(LORA if lora else {}))
    _, trainer = grpo_trainer(settings, (length_part(),))
    assert trainer.shares_prompts
    trainer.shares_prompts = shared
    script_calls(trainer)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert (inputs["advantages"].abs() > 1e-3).any()
    sampled = inputs["tool_mask"].bool() & inputs["completion_mask"].bool()
    assert (~sampled & inputs["completion_mask"].bool()).any(), "no crop block in the batch: the test would be empty"
    packs = record_packs(monkeypatch)
    carries = gradient_positions(trainer, inputs)
    rows = inputs["advantages"].abs() > 1e-3
    if shared:
        assert len(packs) == 1
        expected = torch.zeros_like(carries).flatten()
        expected[packs[0].source[rows][sampled[rows]] - 1] = True  # the hidden state at t makes the logits of t + 1
        assert torch.equal(carries, expected.view_as(carries))
        return
    prompt = inputs["prompt_ids"].shape[1]
    assert not packs
    assert torch.equal(carries[rows, prompt - 1 : -1], sampled[rows])
    assert not carries[:, : prompt - 1].any()


def record_packs(monkeypatch) -> list:
    """The packs that the trainer scores from now on."""
    packs, pack_rows = [], trainers.pack_rows

    def record(*args):
        packs.append(pack_rows(*args))
        return packs[-1]

    monkeypatch.setattr(trainers, "pack_rows", record)
    return packs


def script_calls(trainer) -> None:
    """Let the random model's rollouts begin with one to three calls, so that there are crops to score."""
    generate, renderer = trainer.engine.generate, trainer.engine.renderer

    def scripted(prompts, sampling, counts, **settings):
        rows = sum(counts)
        texts = [f"<tool_call>[{row}, 3, 40, {20 + row}]</tool_call>" * (1 + row % 2) for row in range(rows)]
        forced = [renderer.text_ids(text) for text in texts]
        return generate(prompts, sampling, counts, forced=forced, **settings)

    trainer.engine.generate = scripted
    trainer.sampling = type(trainer.sampling)(max_new_tokens=60, temperature=trainer.sampling.temperature)


@pytest.mark.parametrize(("lora", "beta"), [(False, 0.1), (True, 0.1), (True, 0.0)], ids=["full", "lora", "lora-no-kl"])
def test_trainers_logprobs_equal_the_rollouts(base_folder, data_folder, tmp_path, lora, beta):
    flags = {"beta": beta, "temperature": 0.9, **(LORA if lora else {})}
    settings = settings_for("grpo", base_folder, data_folder, tmp_path, **flags)
    _, trainer = grpo_trainer(settings, (length_part(),))
    script_calls(trainer)
    trainer.model.train()  # as the training loop scores
    batch = next(iter(trainer.get_train_dataloader()))
    output = trainer._generate_and_score_completions(batch)
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, output["completion_ids"].shape[1],
            **{key: output[key] for key in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")},
        )  # fmt: skip
    assert sorted(set(output["num_images"])) == [2, 3]
    shares = {"crops/invalid", "crops/repeated", "crops/whole_image", "crops/after_answer", "crops/iou"}
    metrics = {**trainer._metrics["train"], **trainer._metrics["eval"]}
    assert shares <= set(metrics)
    assert metrics["crops/per_rollout"][0] == pytest.approx(sum(output["num_images"]) / 8 - 1)
    sampled = (output["tool_mask"] * output["completion_mask"]).bool()
    assert torch.allclose(logps[sampled], output["sampling_per_token_logps"][sampled], atol=1e-4)
    for row, rollout in enumerate(trainer._batch_rollouts):
        ids_in_trainer = output["completion_ids"][row, : len(rollout.completion_ids)].tolist()
        assert ids_in_trainer == rollout.completion_ids
        assert output["tool_mask"][row, : len(rollout.sampled_mask)].tolist() == rollout.sampled_mask
    if beta:
        assert torch.allclose(output["ref_per_token_logps"][sampled], logps[sampled], atol=1e-4), (
            "the reference is the start"
        )


@pytest.mark.parametrize("shared", [True, False], ids=["shared-prompt", "row-by-row"])
def test_rows_that_were_cut_off_leave_the_images_of_the_others_in_their_places(
    base_folder, data_folder, tmp_path, shared
):
    """With `mask_truncated_completions` their tokens are masked, but their images are there."""
    settings = settings_for("grpo", base_folder, data_folder, tmp_path, beta=0, mask_truncated_completions=True)
    _, trainer = grpo_trainer(settings, (length_part(),))
    trainer.shares_prompts = shared
    generate, renderer = trainer.engine.generate, trainer.engine.renderer

    def scripted(prompts, sampling, counts, **others):
        calls = "".join(f"<tool_call>[{x}, 3, 40, {20 + 9 * x}]</tool_call>" for x in range(3))
        texts = [calls + ("slop " * 99 if row % 2 == 0 else "<|im_end|>") for row in range(sum(counts))]
        forced = [renderer.text_ids(text)[: sampling.max_new_tokens] for text in texts]
        return generate(prompts, sampling, counts, forced=forced, **others)

    trainer.engine.generate, trainer.sampling = scripted, replace(trainer.sampling, max_new_tokens=80)
    trainer.model.train()
    output = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    assert output["completion_mask"].any(1).tolist() == [False, True] * 4 and set(output["num_images"]) == {4}
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    images = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    with torch.no_grad():
        logps, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, output["completion_ids"].shape[1], **{name: output[name] for name in images}
        )
    own = (output["tool_mask"] * output["completion_mask"]).bool()
    assert own.any() and torch.allclose(logps[own], output["sampling_per_token_logps"][own], atol=1e-4)


def test_a_judge_rewards_what_the_rules_cannot_see(base_folder, data_folder, tmp_path, serve):
    """Its verdict is the accuracy of every part; where it fails the rules decide, and the share is logged."""
    fails = []

    def behave(handler, body):
        handler.send(completion("right"), 500 if fails else 200)

    server = serve(behave)
    given = {"judge_url": server.url, "judge_model": "m", "judge_cache": str(tmp_path / "cache"), "judge_retries": 0}
    settings = settings_for("grpo", base_folder, data_folder, tmp_path, reward_preset="vlm_r3_paper", **given)
    _, trainer = grpo_trainer(settings)
    generate, renderer = trainer.engine.generate, trainer.engine.renderer

    def scripted(prompts, sampling, counts, **others):
        call = "<think><tool_call>[3, 3, 40, 40]</tool_call>"
        answers = ["slop" * (1 + row % 2) for row in range(sum(counts))]
        texts = [f"{call}</think><answer>{answer}</answer><|im_end|>" for answer in answers]
        return generate(prompts, sampling, counts, forced=[renderer.text_ids(text) for text in texts], **others)

    trainer.engine.generate = scripted
    trainer.sampling = replace(trainer.sampling, max_new_tokens=80)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer._generate_and_score_completions(batch)
    claims = [json.loads(body["messages"][1]["content"]) for _, _, body in server.seen]
    assert {claim["question"] for claim in claims} == {row["question"] for row in batch}
    assert {claim["answer"] for claim in claims} == {"slop", "slopslop"}
    fails.append(True)
    Path(tmp_path, "cache").unlink()
    trainer._generate_and_score_completions(batch)
    metrics = trainer._metrics["train"]
    assert metrics["judge/fallback"] == [0.0, 1.0]
    for part in ("accuracy", "region"):
        assert metrics[f"rewards/{part}/mean"] == [1.0, 0.0]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_training_moves_what_it_should_and_nothing_else(base_folder, data_folder, tmp_path, stage, lora):
    settings = settings_for(stage, base_folder, data_folder, tmp_path, **(LORA if lora else {}))
    _, trainer = sft_trainer(settings) if stage == "sft" else grpo_trainer(settings, (length_part(),))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    train(trainer, settings, stage)
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert not [name for name in moved if "visual" in name], "the vision tower is frozen"
    if lora:
        assert all("lora_" in name and ".ref." not in name for name in moved)
    else:
        assert {name for name, value in before.items() if "language_model.layers" in name} <= moved


def test_both_stages_through_the_command_leave_models_that_answer(base_folder, data_folder, tmp_path):
    """SFT adapter -> R-GRPO on that adapter -> inference, with companions, log and curves."""
    import train_qwenvl_25

    train_qwenvl_25.main(
        [
            *("--stage", "both", "--model_name", str(base_folder), "--use_lora", "--lora_r", "8"),
            *("--train_data", f"{data_folder}/train.jsonl", "--val_data", f"{data_folder}/val.jsonl"),
            *("--image_base_path", str(data_folder), "--num_generations", "4", "--max_completion_length", "16"),
            *("--sft_output_dir", f"{tmp_path}/sft", "--grpo_output_dir", f"{tmp_path}/grpo"),
            *("--max_steps", "2", "--batch_size", "4", "--gradient_accumulation_steps", "1", "--disable_tqdm", "true"),
            *("--sft_eval_steps", "1", "--logging_steps", "1", "--grpo_learning_rate", "1e-3"),
        ]
    )
    for stage in ("sft", "grpo"):
        final = tmp_path / stage / "final_model"
        assert is_adapter(final)
        assert not (final / "ref").exists()
        names = {path.name for path in final.iterdir()}
        assert {"crop_contract.json", "training_settings.json", "chat_template.jinja", "tokenizer.json"} <= names
        log = json.loads((tmp_path / stage / "training_log.json").read_text())
        assert log["history"]
        assert (tmp_path / stage / "training_curves.png").stat().st_size > 5000
        load_for_inference(InferenceConfig(str(final)))
    logged = {key for item in log["history"] for key in item}
    assert {"crops/per_rollout", "crops/no_call"} <= logged
    assert {"rewards/accuracy/mean", "rewards/grounding/mean", "kl", "rollout/tokens_per_second"} <= logged


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_best_checkpoint_and_resume_bring_back_the_saved_weights(base_folder, data_folder, tmp_path, lora):
    """transformers' own loading skips the hub's names in silence and would keep the weights in memory."""
    flags = {"val_data": f"{data_folder}/val.jsonl", "eval_steps": 1, "save_steps": 1, **(LORA if lora else {})}
    settings = settings_for("sft", base_folder, data_folder, tmp_path, **flags)
    _, trainer = sft_trainer(settings)
    train(trainer, settings, "sft")
    saved = {name: value.clone() for name, value in trainer.model.named_parameters()}
    with torch.no_grad():
        for value in trainer.model.parameters():
            value.add_(1.0)
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    trainer._load_best_model()
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert trained
    assert all(torch.equal(value, saved[name]) for name, value in trained.items())
    longer = settings_for("sft", base_folder, data_folder, tmp_path, **{**flags, "max_steps": 3})
    _, resumed = sft_trainer(longer)
    train(resumed, longer, "sft")
    assert resumed.state.global_step == 3
    assert [item["step"] for item in resumed.state.log_history if "loss" in item] == [1, 2, 3]


def test_bad_rows_are_skipped_and_the_rest_is_trained_on(base_folder, data_folder, tmp_path, capsys):
    rows = (data_folder / "train.jsonl").read_text().splitlines()
    rows[3] = rows[3].replace(".jpg", ".gone.jpg")
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    settings = settings_for("sft", base_folder, data_folder, tmp_path / "out", train_data=f"{tmp_path}/train.jsonl")
    _, trainer = sft_trainer(settings)
    assert "line 4, QnA[0]: missing image" in capsys.readouterr().out
    assert set(trainer.train_dataset["line"]) == set(range(1, len(rows) + 1)) - {4}
    assert (tmp_path / "out" / "bad_rows.jsonl").read_text() == rows[3] + "\n"


def test_images_that_trl_drops_stop_the_run(base_folder, data_folder, tmp_path, monkeypatch):
    settings = settings_for("grpo", base_folder, data_folder, tmp_path, beta=0)
    _, trainer = grpo_trainer(settings, (length_part(),))
    monkeypatch.setattr(trainer, "_check", lambda rollouts: None)
    roll_out = trainer.rollout_func

    def lose_an_image_token(prompts, owner):
        output = roll_out(prompts, owner)
        pad = trainer.engine.renderer.ids["<|image_pad|>"]
        place = output["prompt_ids"][0].index(pad)
        output["prompt_ids"][0] = output["prompt_ids"][0][:place] + output["prompt_ids"][0][place + 1 :]
        return output

    trainer.rollout_func = lose_an_image_token
    with pytest.raises(RuntimeError, match="TRL dropped the images of a batch"):
        trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_rgrpo_resumes_its_weights_and_keeps_the_start_as_reference(base_folder, data_folder, tmp_path, lora):
    flags = {"save_steps": 1, "beta": 0.1, **(LORA if lora else {})}
    settings = settings_for("sft", base_folder, data_folder, tmp_path / "sft", **(LORA if lora else {}))
    loaded, trainer = sft_trainer(settings)
    train(trainer, settings, "sft")
    start = finish(trainer, loaded, settings, "sft", settings.sft.output_dir)
    flags |= {"sft_checkpoint": str(start)}
    settings = settings_for("grpo", base_folder, data_folder, tmp_path / "grpo", **flags)
    _, trainer = grpo_trainer(settings, (length_part(),))
    reference = reference_weights(trainer)
    train(trainer, settings, "grpo")
    saved = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    _, resumed = grpo_trainer(settings, (length_part(),))  # the same number of steps: nothing is left to train
    train(resumed, settings, "grpo")
    assert resumed.state.global_step == 2
    loaded_again = dict(resumed.model.named_parameters())
    assert all(torch.equal(loaded_again[name], value) for name, value in saved.items())
    again = reference_weights(resumed)
    assert all(torch.equal(again[name], value) for name, value in reference.items())
    assert any(not torch.equal(saved[name], value) for name, value in trained_names(reference).items())


def reference_weights(trainer) -> dict[str, torch.Tensor]:
    """The weights that the KL divergence is taken to: TRL's copy of the model, or of the adapter."""
    if trainer.ref_model is not None:
        return {name: value.clone() for name, value in trainer.ref_model.named_parameters()}
    return {name: value.clone() for name, value in trainer.model.named_parameters() if ".ref." in name}


def trained_names(reference: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The reference's language weights by the names of the trained ones."""
    return {name.replace(".ref.", ".default."): value for name, value in reference.items() if "visual" not in name}


def test_finished_stage_is_not_trained_again_and_another_runs_checkpoint_is_refused(
    base_folder, data_folder, tmp_path, capsys
):
    settings = settings_for("sft", base_folder, data_folder, tmp_path, save_steps=1)
    final = train_sft.run_sft(settings)
    weights = (final / "model.safetensors").read_bytes()
    assert train_sft.run_sft(settings) == final
    assert "nothing to do" in capsys.readouterr().out
    assert (final / "model.safetensors").read_bytes() == weights
    other = settings_for("sft", base_folder, data_folder, tmp_path, save_steps=1, weight_decay=0.5)
    with pytest.raises(SettingsError, match=r"weight_decay \(0.01 -> 0.5\)"):
        train_sft.run_sft(other)
    longer = settings_for("sft", base_folder, data_folder, tmp_path, save_steps=1, max_steps=3)
    train_sft.run_sft(longer)
    assert "resuming from" in capsys.readouterr().out


def test_a_stage_is_not_taken_for_finished_when_its_model_was_trained_again(base_folder, data_folder, tmp_path, capsys):
    sft = settings_for("sft", base_folder, data_folder, tmp_path / "sft", max_steps=1)
    start = str(train_sft.run_sft(sft))
    given = {"sft_checkpoint": start, "max_steps": 1, "watch_every": 0}
    grpo = settings_for("grpo", base_folder, data_folder, tmp_path / "grpo", **given)
    final = train_grpo.run_grpo(grpo)
    assert train_grpo.run_grpo(grpo) == final
    train_sft.run_sft(settings_for("sft", base_folder, data_folder, tmp_path / "sft", max_steps=2))
    with pytest.raises(SettingsError, match=r"sft/final_model has other weights now .* --grpo_resume false"):
        train_grpo.run_grpo(grpo)
    anew = settings_for("grpo", base_folder, data_folder, tmp_path / "grpo", resume=False, **given)
    assert train_grpo.run_grpo(anew) == train_grpo.run_grpo(grpo) == final
    assert "WARNING" not in capsys.readouterr().out


def test_data_that_changed_since_a_run_began_are_pointed_out(base_folder, data_folder, tmp_path, capsys):
    folder = shutil.copytree(data_folder, tmp_path / "data")
    settings = settings_for("sft", base_folder, folder, tmp_path / "run", max_steps=1)
    train_sft.run_sft(settings)
    with open(settings.data.train_data, "ab") as file:
        file.write(b"\n")
    train_sft.run_sft(settings)
    said = capsys.readouterr().out
    assert f"WARNING: {settings.data.train_data} has changed since the run in {tmp_path / 'run'} began" in said
    assert "nothing to do" in said


def test_save_steps_or_eval_steps_alone_decides_both(base_folder, data_folder, tmp_path):
    """transformers wants the best checkpoint evaluated: it refuses save_steps that eval_steps does not divide."""
    for flags, expected in (
        ({}, (0.1, 0.1)),
        ({"save_steps": 10}, (10, 10)),
        ({"eval_steps": 5}, (5, 5)),
        ({"save_steps": 10, "eval_steps": 5}, (5, 10)),
    ):
        settings = settings_for("sft", base_folder, data_folder, tmp_path, **flags)
        arguments = train_sft.sft_arguments(settings.sft, has_validation=True)
        assert (arguments.eval_steps, arguments.save_steps) == expected
    settings = settings_for("sft", base_folder, data_folder, tmp_path, save_steps=7, eval_steps=5)
    with pytest.raises(SettingsError, match=r"TRL refuses .* multiple of the evaluation steps"):
        train_sft.sft_arguments(settings.sft, has_validation=True)


def test_early_stopping_ends_a_run_that_no_longer_improves(base_folder, data_folder, tmp_path):
    flags = {"val_data": f"{data_folder}/val.jsonl", "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 2}
    settings = settings_for("sft", base_folder, data_folder, tmp_path, max_steps=20, learning_rate=1e-12, **flags)
    _, trainer = sft_trainer(settings)
    train(trainer, settings, "sft")
    assert trainer.state.global_step < 20


def test_trls_generate_returns_what_is_replaced(base_folder, data_folder, tmp_path):
    """`_generate` is private: eight results, of which the last two are the images of each row."""
    settings = settings_for("grpo", base_folder, data_folder, tmp_path, beta=0)
    _, trainer = grpo_trainer(settings, (length_part(),))
    trainer._batch_rows = trainer._sound(next(iter(trainer.get_train_dataloader())))
    results = trainer._generate([row["prompt"] for row in trainer._batch_rows])
    assert len(results) == 8
    assert [len(images) for images in results[-1]] == [len(rollout.images) for rollout in trainer._batch_rollouts]


def test_frame_is_obeyed_from_training_to_inference(base_folder, data_folder, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(base_folder, folder)
    (folder / "crop_contract.json").unlink()
    frame = {"coordinate_space": "normalized_1000", "image_shorter_side": 56, "crop_shorter_side": 56}
    settings = settings_for("sft", folder, data_folder, tmp_path / "out", **frame)
    inference = QwenVLInference(InferenceConfig(str(train_sft.run_sft(settings)), max_new_tokens=40))
    renderer = inference.renderer
    assert renderer.contract.coordinate_space == "normalized_1000"
    script = renderer.text_ids("<tool_call>[250, 500, 750, 1000]</tool_call><|im_end|>")
    prompt = renderer.prompt("What?", Image.new("RGB", (400, 200)))
    rollout = inference.engine.generate([prompt], inference.sampling, forced=[script])[0]
    assert rollout.tool_calls[0].box.as_list() == [100, 100, 300, 200]
