"""The one door: what is saved comes back bit by bit, and what does not fit is refused."""

import importlib.util
import json
import os
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen2VLImageProcessor
from transformers import Qwen2_5_VLForConditionalGeneration as Qwen

import demo_model
import demo_world
import model_card
import model_utils
from command_line import resolve_training
from config import DataConfig, InferenceConfig, ModelConfig, SettingsError, SFTStageConfig
from conversation import Example, Renderer, model_inputs
from crop_tool import CALL_CLOSE, CALL_OPEN, CropContract, shown_crop_size, shown_image_size
from model_utils import (
    base_model_of,
    is_adapter,
    load_for_inference,
    load_for_training,
    load_processor,
    load_weights,
    merge_adapter,
    save_companions,
    training_dtype,
    write_folder,
)
from vllm_generation import trained_weights

FULL, LORA = SFTStageConfig(), SFTStageConfig(use_lora=True, lora_r=4, lora_dropout=0.0)


@pytest.fixture(scope="module")
def batch(renderer):
    """Two rows of unlike length, one with a crop."""
    picture = demo_world.draw_picture(0, 0)
    shape = picture.shapes[0]
    question, image = demo_world.question_for(shape), Image.fromarray(picture.pixels)
    texts = (demo_world.rationale_for(shape, shape.box), "<think>\n</think>\n\n<answer>rising</answer>")
    rows = [renderer.encode(Example(1, 0, "", question, text), image) for text in texts]
    return model_inputs(rows, renderer)


def logits_of(model, batch):
    with torch.no_grad():
        return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


def save(loaded, folder):
    def fill(target):
        loaded.model.save_pretrained(target)
        save_companions(target, loaded.processor, loaded.contract, None)

    write_folder(folder, fill)
    return str(folder)


def infer(folder):
    return load_for_inference(InferenceConfig(model_path=str(folder), device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def adapter(base_folder, tmp_path_factory):
    """An adapter folder whose adapter changes the answers, and the model that it was saved from."""
    loaded = load_for_training(ModelConfig(), DataConfig(), LORA, str(base_folder))
    generator = torch.Generator().manual_seed(0)
    for name, weight in loaded.model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3, generator=generator)
    return save(loaded, tmp_path_factory.mktemp("trained") / "final_model"), loaded


# ---------------------------------------------------------------------------------------- full weights


def test_full_weights_come_back_bit_by_bit_for_training_and_for_inference(base_folder, tiny_model, batch, tmp_path):
    expected = logits_of(tiny_model, batch)
    trained = load_for_training(ModelConfig(), DataConfig(), FULL, str(base_folder))
    assert torch.equal(logits_of(trained.model.eval(), batch), expected)
    folder = save(trained, tmp_path / "final_model")
    answering = infer(folder)
    assert torch.equal(logits_of(answering.model, batch), expected)
    assert not answering.model.training and answering.model.dtype == torch.float32
    assert (answering.contract, trained.contract) == (trained.contract, CropContract.load(base_folder))
    tokenizers = trained.processor.tokenizer, answering.processor.tokenizer
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert trained.processor.chat_template == answering.processor.chat_template


def test_the_vision_tower_is_frozen_and_the_language_model_trains(base_folder):
    def trained(**settings):
        model = load_for_training(ModelConfig(**settings), DataConfig(), FULL, str(base_folder)).model
        return {name.split(".")[1] for name, weight in model.named_parameters() if weight.requires_grad}

    assert trained() == {"language_model", "weight"}  # "lm_head.weight"
    assert trained(freeze_vision=False) == {"language_model", "weight", "visual"}


@pytest.mark.parametrize(
    ("settings", "stage", "dtype"),
    [
        ({}, FULL, torch.float32),
        ({}, replace(FULL, bf16=True), torch.float32),
        ({}, replace(LORA, bf16=True), torch.bfloat16),
        ({}, replace(LORA, fp16=True), torch.float16),
        ({"dtype": "bfloat16"}, FULL, torch.bfloat16),
    ],
)
def test_weights_that_train_stay_float32_unless_asked(settings, stage, dtype):
    assert training_dtype(ModelConfig(**settings), stage, stage.use_lora) == dtype


def test_float16_weights_that_would_train_under_a_gradient_scaler_are_refused():
    model, stage = ModelConfig(dtype="float16"), SFTStageConfig(fp16=True)
    with pytest.raises(SettingsError, match="leave --dtype out, or add --use_lora"):
        training_dtype(model, stage, on_adapter=False)
    assert training_dtype(model, stage, on_adapter=True) == torch.float16


def test_pickled_weights_are_refused(base_folder, tiny_model, tmp_path):
    shutil.copytree(base_folder, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(tiny_model.state_dict(), tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(SettingsError, match=r"pickled has no model\.safetensors: weights in a pickle could run code"):
        load_weights(str(tmp_path / "pickled"), torch.float32, "auto")


PLANTED = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
class Planted:
    pass
"""


def test_code_in_a_models_folder_is_not_run(base_folder, tmp_path):
    folder = tmp_path / "planted"
    shutil.copytree(base_folder, folder)
    (folder / "code.py").write_text(PLANTED)
    names = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
    planted = dict.fromkeys(names, "code.Planted") | {"AutoTokenizer": ["code.Planted", "code.Planted"]}
    files = [file for file in folder.glob("*.json") if file.name.endswith("config.json")]
    assert {"config.json", "tokenizer_config.json", "processor_config.json"} <= {file.name for file in files}
    for file in files:
        file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": planted}))
    assert infer(folder).contract == CropContract.load(base_folder)
    load_for_training(ModelConfig(), DataConfig(), FULL, str(folder))
    assert not (folder / "ran").exists() and not list(folder.rglob("*.pyc"))


def other_base(tiny_model, folder, **sizes):
    """The base model with other sizes, in `folder`."""
    config = deepcopy(tiny_model.config)
    for name, value in sizes.items():
        setattr(config.get_text_config(), name, value)
    Qwen(config).save_pretrained(folder)


def test_an_adapter_knows_the_weights_of_its_base_however_they_are_cut_into_files(
    base_folder, tiny_model, batch, tmp_path
):
    base, folder = tmp_path / "base", tmp_path / "final_model"
    shutil.copytree(base_folder, base)
    save(load_for_training(ModelConfig(), DataConfig(), LORA, str(base)), folder)
    expected = logits_of(infer(folder).model, batch)
    (base / "model.safetensors").unlink()
    tiny_model.save_pretrained(base, max_shard_size="1MB")
    assert len(list(base.glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(infer(folder).model, batch), expected)
    changed = deepcopy(tiny_model)
    changed.model.language_model.layers[2].self_attn.q_proj.weight.data += 1e-4
    changed.save_pretrained(base, max_shard_size="1MB")
    with pytest.raises(SettingsError, match=r"trained on another base than .*its weights have changed since"):
        infer(folder)
    (folder / "base_weights.json").unlink()
    assert not torch.equal(logits_of(infer(folder).model, batch), expected)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"intermediate_size": 96}, "size mismatch for base_model"),
        ({"num_hidden_layers": 2}, "14 of its tensors fit no layer, 0 lack"),
        ({"num_hidden_layers": 4}, "0 of its tensors fit no layer, 14 lack"),
    ],
    ids=["wider", "fewer layers", "more layers"],
)
def test_an_adapter_of_another_base_is_refused_at_every_door(adapter, base_folder, tiny_model, tmp_path, sizes, reason):
    folder, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(adapter[0], folder)
    shutil.copytree(base_folder, base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    if "num_hidden_layers" in sizes:
        sizes = {**sizes, "layer_types": ["full_attention"] * sizes["num_hidden_layers"]}
    other_base(tiny_model, base, **sizes)
    (folder / "base_weights.json").unlink(missing_ok=True)  # as of an adapter that another program trained
    named = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(named))
    message = rf"the adapter {folder} was trained on another base than {base}, which it names: .*{reason}"
    for door in (
        lambda: load_for_training(ModelConfig(), DataConfig(), LORA, str(folder)),
        lambda: infer(folder),
        lambda: merge_adapter(str(folder), str(tmp_path / "merged")),
    ):
        with pytest.raises(SettingsError, match=message):
            door()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("path", ["/no/such/folder", "./here", "outputs/a/final_model", "final_model"])
def test_a_missing_folder_is_named_and_not_looked_up_on_the_hub(path):
    message = f"there is no model at {path}: give a folder with weights or a hub name"
    with pytest.raises(SettingsError, match=message):
        load_for_training(ModelConfig(), DataConfig(), FULL, path)
    with pytest.raises(SettingsError, match=message):
        load_weights(path, torch.float32, "auto")


def test_an_adapter_of_a_model_that_came_from_no_folder_is_saved_without_a_digest(adapter, tmp_path):
    folder, loaded = adapter
    shutil.copytree(folder, tmp_path / "adapter")
    (tmp_path / "adapter/base_weights.json").unlink()
    named = json.loads((tmp_path / "adapter/adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(named))
    save_companions(tmp_path / "adapter", loaded.processor, loaded.contract, None)
    assert not (tmp_path / "adapter/base_weights.json").exists()


# -------------------------------------------------------------------------------------------- adapters


def test_lora_reaches_every_layer_of_the_language_model_and_nothing_of_the_vision_tower(adapter):
    names = [name for name, weight in adapter[1].model.named_parameters() if weight.requires_grad]
    assert all("language_model" in name and "lora_" in name for name in names)
    assert len(names) == 3 * 7 * 2  # layers, projections, A and B


def test_lora_reaches_the_vision_tower_where_it_is_not_frozen(base_folder):
    model = load_for_training(ModelConfig(freeze_vision=False), DataConfig(), LORA, str(base_folder)).model
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert all("lora_" in name for name in names)
    for layer in ("visual.blocks.1.attn.qkv", "visual.blocks.0.mlp.up_proj", "visual.merger.mlp.2", "language_model"):
        assert any(layer in name for name in names), layer


def test_a_merged_adapter_answers_as_the_adapter_and_not_as_the_base(adapter, tiny_model, batch, tmp_path):
    folder, loaded = adapter
    expected = logits_of(loaded.model.eval(), batch)
    assert (expected - logits_of(tiny_model, batch)).abs().max() > 0.1
    answering = infer(folder)
    assert type(answering.model) is Qwen
    torch.testing.assert_close(logits_of(answering.model, batch), expected, atol=1e-4, rtol=0)
    merge_adapter(folder, str(tmp_path / "merged"))
    merged = infer(tmp_path / "merged")
    assert torch.equal(logits_of(merged.model, batch), logits_of(answering.model, batch))
    assert (merged.contract, is_adapter(tmp_path / "merged")) == (loaded.contract, False)


def test_a_frozen_vision_tower_is_not_run_backwards_for_an_adapter_with_checkpoints(base_folder, batch):
    """TRL makes input embeddings require gradients then, and a vision tower's patches would be among them."""
    model = load_for_training(ModelConfig(), DataConfig(), LORA, str(base_folder)).model
    model.enable_input_require_grads()
    base = model.get_base_model()
    features = base.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
    assert not any(part.requires_grad for part in features)
    assert base.get_input_embeddings()(batch["input_ids"]).requires_grad


def test_an_adapter_trains_on_as_an_adapter_whatever_use_lora_says(adapter, batch):
    folder, loaded = adapter
    again = load_for_training(ModelConfig(), DataConfig(), FULL, folder)
    trained = {name for name, weight in again.model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, weight in loaded.model.named_parameters() if weight.requires_grad}
    assert torch.equal(logits_of(again.model.eval(), batch), logits_of(loaded.model.eval(), batch))


def test_an_adapter_folder_is_known_by_its_config_and_names_its_base(adapter, base_folder, tmp_path):
    assert is_adapter(adapter[0]) and base_model_of(adapter[0]) == str(base_folder)
    assert not is_adapter(base_folder) and not is_adapter(tmp_path / "none")


def test_a_merge_reports_how_far_the_logits_are_and_brings_processor_contract_and_card(adapter, tmp_path, capsys):
    folder, loaded = adapter
    (Path(folder).parent / "training_log.json").write_text(
        json.dumps({"history": [{"step": 1, "loss": 2.5}, {"step": 9, "loss": 0.75}]})
    )
    Image.new("RGB", (8, 8)).save(Path(folder).parent / "training_curves.png")
    model_utils.main(["--merge", folder, "--output", str(tmp_path / "merged")])
    out = capsys.readouterr().out
    difference, effect = map(float, re.search(r"differ by ([\d.e-]+) .* changes them by ([\d.e-]+)", out).groups())
    assert difference < 1e-4 and effect > 0.05
    merged = infer(tmp_path / "merged")
    assert merged.processor.chat_template == loaded.processor.chat_template
    card = (tmp_path / "merged/README.md").read_text()
    assert "| training loss | 2.5 | 0.75 | 0.75 |" in card and "9 optimizer steps" in card
    assert "rank 4" in card and "![training curves](training_curves.png)" in card
    assert (tmp_path / "merged/training_curves.png").is_file()
    assert str(Path(folder).parent) not in card, "a card names no folder of the machine"


def test_merged_weights_that_answer_otherwise_are_not_written(adapter, tmp_path, monkeypatch):
    """peft's product of A and B is taken to be a tenth too large."""
    from peft.tuners.lora.layer import Linear

    product = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 1.1 * product(self, name))
    with pytest.raises(SettingsError, match=r"do not answer as .* does: their logits differ by .*Nothing was written"):
        merge_adapter(adapter[0], str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_overflows_its_dtype_is_refused(adapter, tmp_path):
    """Logits that are not numbers are no agreement."""
    shutil.copytree(adapter[0], tmp_path / "huge")
    file = tmp_path / "huge/adapter_model.safetensors"
    weights = {name: value * 1e4 if "lora_B" in name else value for name, value in load_file(file).items()}
    save_file(weights, file)
    with pytest.raises(SettingsError, match="differ by nan% in float16"):
        merge_adapter(str(tmp_path / "huge"), str(tmp_path / "merged"), "float16")


def test_a_merged_model_is_uploaded_whole_and_private(adapter, tmp_path, monkeypatch, capsys):
    calls = []

    def upload(self, *, repo_id, folder_path, **_):
        calls.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))

    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo",
        lambda self, repo, private, exist_ok: calls.append((repo, private, exist_ok)) or f"https://hub/{repo}",
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    model_utils.main(["--merge", adapter[0], "--output", str(tmp_path / "merged"), "--push_to_hub", "me/crops"])
    assert calls[0] == ("me/crops", True, True)
    assert calls[1][0] == "me/crops"
    assert {"README.md", "model.safetensors", "crop_contract.json", "chat_template.jinja"} <= calls[1][1]
    assert "uploaded to https://hub/me/crops" in capsys.readouterr().out


def test_an_upload_that_the_hub_refuses_leaves_the_merged_model_and_says_what_to_do(adapter, tmp_path, capsys):
    """The tests run with the hub switched off."""
    with pytest.raises(SystemExit):
        model_utils.main(["--merge", adapter[0], "--output", str(tmp_path / "merged"), "--push_to_hub", "me/crops"])
    err = capsys.readouterr().err
    assert "is written, but could not be uploaded to me/crops" in err
    assert err.endswith(f"then: hf upload me/crops {tmp_path / 'merged'} --private\n")
    assert infer(tmp_path / "merged").model is not None


def test_a_hub_out_of_reach_and_a_folder_that_cannot_be_made_end_the_merge_in_one_line(
    adapter, tmp_path, monkeypatch, capsys
):
    def unreachable(*_, **__):
        raise httpx2.ConnectError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", unreachable)
    with pytest.raises(SystemExit):
        model_utils.main(["--merge", adapter[0], "--output", str(tmp_path / "my model"), "--push_to_hub", "me/crops"])
    assert f"then: hf upload me/crops '{tmp_path / 'my model'}' --private\n" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        model_utils.main(["--merge", adapter[0], "--output", str(tmp_path / "file/model")])
    assert stop.value.code == 1
    assert "model_utils.py: [Errno 20] Not a directory: " in capsys.readouterr().err


def test_a_card_names_no_address_and_no_judge_that_was_not_there():
    grpo = {
        "beta": 0.1,
        "vllm_sync_dir": "/dev/shm/x",
        "judge_url": None,
        "judge_retries": 3,
        "trl": {"deepspeed": "/x"},
    }
    assert model_card._chosen({"grpo": grpo}, "grpo") == {"beta": 0.1}
    grpo |= {"judge_url": "http://host:8000/v1", "judge_model": "m", "judge_cache": "outputs/x", "trl": {}}
    assert model_card._chosen({"grpo": grpo}, "grpo") == {"beta": 0.1, "judge_model": "m", "judge_retries": 3}


def test_a_merge_takes_the_place_of_nothing_that_is_there(adapter, tmp_path, capsys):
    """A folder is replaced as a whole: the adapter itself, or whatever else somebody keeps in it."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/thesis.txt").write_text("years")
    for output in (adapter[0], str(tmp_path / "kept"), str(tmp_path / "kept/thesis.txt")):
        with pytest.raises(SystemExit):
            model_utils.main(["--merge", adapter[0], "--output", output])
        assert f"output is {output}, which " in capsys.readouterr().err
    assert is_adapter(adapter[0]) and (tmp_path / "kept/thesis.txt").read_text() == "years"


# --------------------------------------------------------------------------------------------- 4 bits


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_adapters_train_in_float32_on_four_bit_weights_in_both_stages_and_merge_into_whole_ones(
    base_folder, data_folder, tmp_path
):
    from bitsandbytes.nn import Linear4bit

    import train_grpo
    import train_sft

    flags = {
        "model_name": str(base_folder), "train_data": f"{data_folder}/train.jsonl", "image_base_path": str(data_folder),
        "lora_r": 4, "load_in_4bit": True, "use_lora": True, "use_cpu": True, "max_steps": 2, "min_box_side": 1,
        "sft_learning_rate": 1e-2, "grpo_learning_rate": 1e-2, "disable_tqdm": True, "num_generations": 4,
        "max_completion_length": 24, "sft_output_dir": f"{tmp_path}/sft", "grpo_output_dir": f"{tmp_path}/grpo",
        "grpo_gradient_accumulation_steps": 1,
    }  # fmt: skip
    settings = resolve_training(flags, ("sft", "grpo"))
    loaded = load_for_training(settings.model, settings.data, settings.sft, str(base_folder))
    quantized = {name for name, module in loaded.model.named_modules() if isinstance(module, Linear4bit)}
    assert len(quantized) == 3 * 7 and all("language_model.layers" in name for name in quantized)
    sft = train_sft.build_trainer(loaded, settings)
    _train_and_check(sft)
    folder = save(loaded, tmp_path / "sft/final_model")
    again = load_for_training(settings.model, settings.data, settings.grpo, folder)
    _train_and_check(train_grpo.build_trainer(again, settings))
    folder = save(again, tmp_path / "grpo/final_model")
    shutil.rmtree(Path(folder) / "ref", ignore_errors=True)
    assert merge_adapter(folder, str(tmp_path / "merged")).difference < 1e-4
    merged = infer(tmp_path / "merged").model
    assert merged.dtype == torch.float32
    # What a vLLM of the same run gets is the model that trains, rounded weights and all.
    sent = dict(trained_weights(again.model))
    assert not merged.load_state_dict(sent, strict=False).unexpected_keys and len(sent) > 3 * 7
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected, found = (model.eval()(input_ids=ids).logits for model in (again.model, merged))
    assert torch.allclose(found, expected, atol=1e-4)


def _train_and_check(trainer):
    """Adapters are float32, TRL's reference too, and training changes the one that trains."""
    adapters = {name: value for name, value in trainer.model.named_parameters() if ".lora_" in name}
    assert {value.dtype for value in adapters.values()} == {torch.float32}
    before = {name: value.detach().clone() for name, value in adapters.items()}
    trainer.train()
    changed = {name for name, value in adapters.items() if not torch.equal(before[name], value)}
    assert all(".default." in name for name in changed)
    assert changed


def test_merging_what_is_no_adapter_is_refused_in_one_line(base_folder, tmp_path, monkeypatch, capsys):
    message = f"{base_folder} holds no adapter (no adapter_config.json): there is nothing to merge"
    argv = ["model_utils.py", "--merge", str(base_folder), "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as stop:
        model_utils.main()
    assert (stop.value.code, capsys.readouterr().err) == (2, f"model_utils.py: {message}\n")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- crop contract


def test_the_contract_of_the_model_counts_and_a_setting_against_it_is_refused(base_folder, adapter):
    for folder in (str(base_folder), adapter[0]):
        given = {"coordinate_space": "resized", "image_shorter_side": 56}
        assert load_processor(folder, given)[1] == CropContract.load(base_folder)
        message = "coordinate_space='original' was given, but .* was trained with coordinate_space='resized'"
        with pytest.raises(SettingsError, match=message):
            load_processor(folder, {"coordinate_space": "original"})


def test_a_model_without_a_contract_gets_one_of_the_settings_given_and_its_own_patch_size(base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "plain", ignore=shutil.ignore_patterns("crop_contract.json"))
    given = {"coordinate_space": "normalized_1000", "image_shorter_side": 112}
    contract = load_processor(str(tmp_path / "plain"), given)[1]
    assert contract == CropContract(**given, factor=14)
    with pytest.raises(SettingsError, match="max_pixels is 5, but one image token alone takes 196 pixels"):
        load_processor(str(tmp_path / "plain"), {"max_pixels": 5})


def test_settings_are_saved_beside_the_weights(processor, contract, tmp_path, monkeypatch):
    (tmp_path / "data/images").mkdir(parents=True)
    (tmp_path / "data/train.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    save_companions(tmp_path, processor, contract, resolve_training({"learning_rate": "1e-4"}, ("sft",)))
    assert json.loads((tmp_path / "training_settings.json").read_text())["sft"]["learning_rate"] == 1e-4
    assert load_processor(str(tmp_path))[1] == contract


SIDES = [(1, 1), (28, 28), (30, 29), (28, 5600), (5600, 28), (3000, 40), (100, 100), (449, 448), (4000, 3000)]


@pytest.mark.parametrize("max_pixels", [1280 * 28 * 28, 128 * 28 * 28, 28 * 28])
@pytest.mark.parametrize("kind", ["demo", "qwen"])
def test_the_processor_leaves_every_shown_size_as_it_is(base_folder, tmp_path, kind, max_pixels):
    """Were it to resize again, image tokens and image features of the row would differ."""
    shutil.copytree(base_folder, tmp_path / "model", ignore=shutil.ignore_patterns("crop_contract.json"))
    if kind == "qwen":  # patches of 14 px, and a smallest picture of 56 x 56
        config = tmp_path / "model/processor_config.json"
        values = json.loads(config.read_text())
        values["image_processor"] = Qwen2VLImageProcessor().to_dict()
        config.write_text(json.dumps(values))
    processor, contract = load_processor(str(tmp_path / "model"), {"max_pixels": max_pixels})
    images = processor.image_processor
    assert contract.factor == images.patch_size * 2 == (28 if kind == "qwen" else 14)
    shown = [shown(*side, contract) for shown in (shown_crop_size, shown_image_size) for side in SIDES]
    grids = images(images=[Image.new("RGB", size) for size in shown], return_tensors="pt")["image_grid_thw"].tolist()
    assert [(w * images.patch_size, h * images.patch_size) for _, h, w in grids] == shown
    assert (contract.factor, contract.factor) in shown


# -------------------------------------------------------------------------------------- write_folder


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "final_model"

    def fill(target):
        with open(f"{target}/weights", "w") as file:
            file.write("first")

    def fail(target):
        with open(f"{target}/weights", "w") as file:
            file.write("second")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_folder(folder, fail)
    assert not folder.exists()
    write_folder(folder, fill)
    (folder / "stale").touch()
    with pytest.raises(RuntimeError, match="disk full"):
        write_folder(folder, fail)
    assert (folder / "weights").read_text() == "first" and (folder / "stale").exists()
    write_folder(folder, fill)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["final_model", "weights"]


# --------------------------------------------------------------------------------------- tool tokens


@pytest.fixture
def wordless(tmp_path, monkeypatch):
    """A model folder whose tokenizer has no tool tokens."""
    monkeypatch.setattr(demo_model, "TOOL_TOKENS", ())
    processor = demo_model.build_processor()
    assert CALL_OPEN not in processor.tokenizer.get_vocab()
    demo_model.build_model(processor).save_pretrained(tmp_path / "wordless")
    processor.save_pretrained(tmp_path / "wordless")
    return str(tmp_path / "wordless")


def test_missing_tool_tokens_are_added_with_embeddings_that_are_saved(wordless, tmp_path, caplog):
    before = AutoConfig.from_pretrained(wordless).text_config.vocab_size
    loaded = load_for_training(ModelConfig(), DataConfig(image_shorter_side=56), FULL, wordless)
    ids = loaded.processor.tokenizer.convert_tokens_to_ids([CALL_OPEN, CALL_CLOSE])
    assert ids == [before, before + 1]
    assert loaded.model.get_input_embeddings().num_embeddings == before + 2
    assert f"added ['{CALL_OPEN}', '{CALL_CLOSE}'] to the vocabulary" in caplog.text
    renderer = Renderer(loaded.processor, loaded.contract)
    text = "<think>\n{Crop it [0, 0, 60, 60]}\n</think>\n\n<answer>no</answer>"
    row = renderer.encode(Example(1, 0, "", "Is it?", text), Image.new("RGB", (120, 90)))
    assert row.labels.count(ids[0]) == row.labels.count(ids[1]) == 1
    inputs = model_inputs([row], renderer)
    answering = infer(save(loaded, tmp_path / "final_model"))
    assert torch.equal(logits_of(answering.model, inputs), logits_of(loaded.model.eval(), inputs))
    assert answering.processor.tokenizer.convert_tokens_to_ids([CALL_OPEN, CALL_CLOSE]) == ids


def test_missing_tool_tokens_are_refused_under_lora(wordless):
    message = r"lacks \['<tool_call>', '</tool_call>'\]. .* train full weights \(leave --use_lora out\)"
    with pytest.raises(SettingsError, match=message):
        load_for_training(ModelConfig(), DataConfig(), LORA, wordless)


@pytest.mark.parametrize("path", ["nobody/no-such-model", "empty"], ids=["hub", "folder"])
def test_a_model_that_cannot_be_loaded_is_named_without_a_traceback(path, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if path == "empty":
        path = str(tmp_path)
    with pytest.raises(SettingsError, match=f"the model {re.escape(path)} cannot be loaded: .*Check the name"):
        load_processor(path)


@pytest.mark.parametrize("kept", [4, 5000], ids=["header", "tensors"])
def test_damaged_weights_are_named_without_a_traceback(adapter, base_folder, tmp_path, kept):
    shutil.copytree(base_folder, tmp_path / "full")
    shutil.copytree(adapter[0], tmp_path / "adapter")
    for path in (tmp_path / "full/model.safetensors", tmp_path / "adapter/adapter_model.safetensors"):
        os.truncate(path, kept)
        with pytest.raises(SettingsError, match=rf"the weights in {path.parent} are damaged \(.*\): copy or download"):
            infer(path.parent)


def test_a_damaged_contract_is_named(base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "model")
    (tmp_path / "model/crop_contract.json").write_text("{")
    with pytest.raises(SettingsError, match=rf"{tmp_path}/model/crop_contract.json is damaged \(.*\): copy"):
        infer(tmp_path / "model")
