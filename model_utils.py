"""One door for every stage: load processor and model, LoRA, save, merge.

python model_utils.py --merge outputs/grpo/final_model --output outputs/merged
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import DataConfig, InferenceConfig, ModelConfig, SettingsError, StageConfig, TrainingSettings
from crop_tool import CALL_CLOSE, CALL_OPEN, CONTRACT_FILE, MAX_ASPECT_RATIO, CropContract
from model_card import write_card

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, Qwen2_5_VLProcessor

# transformers 5.23 renames the field, and the methods that TRL and peft call; the new names do not exist in 5.17, on
# which this also runs.
warnings.filterwarnings("ignore", message=r"`(is_)?gradient_checkpointing\w*` is deprecated")

log = logging.getLogger(__name__)

BASE_FILE = "base_weights.json"  # of an adapter: which weights it was trained on
LORA_LAYERS = r"(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
LORA_VISION_LAYERS = r"(qkv|proj|gate_proj|up_proj|down_proj|mlp\.[02])"


@dataclass(frozen=True)
class LoadedModel:
    """A model with what belongs to it. `model` is a PeftModel where an adapter is trained or loaded."""

    model: PreTrainedModel
    processor: Qwen2_5_VLProcessor
    contract: CropContract


def companion(model: str | Path, name: str) -> Path | None:
    """The file `name` of a model, in its folder or fetched from the hub; None where the model has none."""
    if _is_local(str(model)):
        path = Path(model, name)
        return path if path.is_file() else None
    from transformers.utils import cached_file

    silent = ("gated_repo", "missing_entries", "connection_errors")
    found = cached_file(str(model), name, **{f"_raise_exceptions_for_{reason}": False for reason in silent})
    return Path(found) if found is not None else None


def is_adapter(model: str | Path) -> bool:
    return companion(model, "adapter_config.json") is not None


def base_model_of(adapter: str | Path) -> str:
    """The model that an adapter was trained on."""
    return _adapter_config(adapter)["base_model_name_or_path"]


def _adapter_config(adapter: str | Path) -> dict[str, Any]:
    return json.loads(companion(adapter, "adapter_config.json").read_text(encoding="utf-8"))


def load_contract(path: str, given: dict[str, Any], factor: int) -> CropContract:
    """The contract saved with the model at `path`, or a new one from the settings given.

    Raises:
        SettingsError: for a given setting that contradicts the saved contract, or cannot be.
    """
    try:
        file = companion(path, CONTRACT_FILE)
        if file is not None:
            return CropContract.load(file.parent).with_settings(given, source=path)
        return CropContract(**given, factor=factor)
    except ValueError as error:
        raise SettingsError(str(error)) from None


def load_processor(path: str, given: dict[str, Any] | None = None) -> tuple[Qwen2_5_VLProcessor, CropContract]:
    """Processor and contract of a model (hub name, folder of full weights, or folder of an adapter)."""
    from transformers import AutoProcessor

    _require_exists(path)
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:  # no such model on the hub, no way to it, or a folder without one
        raise SettingsError(
            f"the model {path} cannot be loaded: {str(error).strip().splitlines()[0]} Check the name and the "
            "connection, or give a folder that holds the model"
        ) from None
    images = processor.image_processor
    factor = images.patch_size * images.merge_size
    contract = load_contract(path, given or {}, factor)
    # We bring every image to its final size; the processor's own limits must let it pass as it is. Qwen's
    # smallest size (56 x 56) would enlarge small crops. A strip one token wide may take more than max_pixels.
    images.size = {"shortest_edge": factor**2, "longest_edge": max(contract.max_pixels, MAX_ASPECT_RATIO * factor**2)}
    processor.tokenizer.padding_side = "left"
    return processor, contract


def _is_local(path: str) -> bool:
    """Whether this names a folder rather than a model on the hub (owner/name)."""
    return path.startswith((".", "/")) or path.count("/") != 1 or Path(path.split("/")[0]).is_dir()


def _require_exists(path: str) -> None:
    if _is_local(path) and not Path(path).is_dir():
        raise SettingsError(f"there is no model at {path}: give a folder with weights or a hub name (owner/name)")
    is_model = any(Path(path, name).is_file() for name in ("config.json", "adapter_config.json"))
    if Path(path, "final_model").is_dir() and not is_model:
        raise SettingsError(f"{path} is the output folder of a training: its model is {Path(path, 'final_model')}")


def add_tool_tokens(model: PreTrainedModel, processor: Qwen2_5_VLProcessor, use_lora: bool) -> None:
    """Qwen2.5's vocabulary has the two tool tokens; a tokenizer without them gets them, with new embeddings."""
    tokenizer = processor.tokenizer
    missing = [token for token in (CALL_OPEN, CALL_CLOSE) if token not in tokenizer.get_vocab()]
    if not missing:
        return
    if use_lora:
        raise SettingsError(
            f"the tokenizer of this model lacks {missing}. Their new embeddings need training, which an adapter "
            "does not do: train full weights (leave --use_lora out), or start from Qwen2.5-VL."
        )
    tokenizer.add_tokens(missing)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    log.warning("added %s to the vocabulary: the embeddings now have %d rows", missing, len(tokenizer))


# -------------------------------------------------------------------------------------------------- load


def resolve_attention(choice: str, half: bool) -> str | dict[str, str]:
    """`auto`: torch's own sdpa, and flash-attn for the vision tower where it is usable (half precision on a GPU).

    The tower's many small windows gain most. In the language model sdpa takes flash kernels by itself, and rollouts are
    scored behind a shared prompt, which flash-attn cannot mask (packing.py).
    """
    import torch

    if choice != "auto":
        return choice
    usable = half and importlib.util.find_spec("flash_attn") is not None
    usable = usable and torch.cuda.is_bf16_supported(including_emulation=False)  # by Ampere and later, as flash-attn is
    return {"vision_config": "flash_attention_2", "text_config": "sdpa"} if usable else "sdpa"


def load_weights(path: str, dtype: torch.dtype, attention: str, half: bool = False, **settings: Any) -> PreTrainedModel:
    """Full weights, from safetensors only and without remote code. Falls back to sdpa, saying so.

    settings: of `from_pretrained` (see `four_bit`).
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    from vision_tower import speed_up

    _require_exists(path)
    _require_safetensors(path, "model.safetensors", "model.safetensors.index.json")
    settings |= {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}
    chosen = resolve_attention(attention, half)
    with _whole_weights(path):
        try:
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, attn_implementation=chosen, **settings)
        except ImportError as error:
            if attention != "auto" or chosen == "sdpa":
                raise
            log.warning("flash-attn is installed but cannot be used (%s): using sdpa", error)
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, attn_implementation="sdpa", **settings)
    speed_up(model)
    return model


@contextlib.contextmanager
def _whole_weights(path: str) -> Iterator[None]:
    """A file of weights that is cut off, or is none, ends in a message."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise SettingsError(f"the weights in {path} are damaged ({error}): copy or download them anew") from None


def four_bit(dtype: torch.dtype) -> dict[str, Any]:
    """Settings that load the language model's linear layers in 4 bits (nf4, QLoRA, arXiv 2305.14314).

    What is multiplied is of `dtype`. The vision tower, a tenth of the weights, and the output head stay as they are.
    """
    import torch
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    return {"quantization_config": quantization, "device_map": {"": device}}


def training_dtype(model: ModelConfig, stage: StageConfig, on_adapter: bool) -> torch.dtype:
    """Frozen weights may be half precision; trained ones stay float32, or small updates would round away."""
    import torch

    if model.dtype == "float16" and stage.fp16 and not on_adapter:
        raise SettingsError(
            "dtype is float16, but --fp16 scales gradients, which it cannot do where the weights that train are "
            "float16: leave --dtype out, or add --use_lora"
        )
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    if on_adapter and (stage.bf16 or stage.fp16):
        return torch.bfloat16 if stage.bf16 else torch.float16
    return torch.float32


def load_for_training(model_config: ModelConfig, data: DataConfig, stage: StageConfig, start: str) -> LoadedModel:
    """The model that a stage trains, from `start`: a hub name, full weights, or an adapter to train on.

    An adapter is trained on as an adapter, whatever `use_lora` says; merge it first to train full weights.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(stage.seed)  # a new adapter starts from random weights
    processor, contract = load_processor(start, data.contract_settings())
    on_adapter = is_adapter(start)
    base = base_model_of(start) if on_adapter else start
    dtype = training_dtype(model_config, stage, on_adapter or stage.use_lora)
    half = dtype != torch.float32 or stage.bf16 or stage.fp16
    quantized = four_bit(dtype) if model_config.load_in_4bit else {}
    model = load_weights(base, dtype, model_config.attn_implementation, half, **quantized)
    if model_config.load_in_4bit:
        for module in model.modules():
            # On a CPU bitsandbytes lays weights out anew for a forward without gradients, and has no backward then.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    add_tool_tokens(model, processor, on_adapter or stage.use_lora)
    if model_config.freeze_vision:
        # With checkpointing an adapter's training makes all input embeddings require gradients, a vision tower's
        # patches among them: it would keep activations, and run backwards, for nothing.
        model.model.visual.get_input_embeddings = lambda: None
    if on_adapter:
        _check_adapter(start, stage)
        model = _with_adapter(model, start, is_trainable=True)
    elif stage.use_lora:
        model = get_peft_model(model, lora_config(LoraConfig, model_config, stage))
    elif model_config.freeze_vision:
        model.model.visual.requires_grad_(False)
    return LoadedModel(model, processor, contract)


def _check_adapter(folder: str, stage: StageConfig) -> None:
    """An adapter keeps its own rank and scale: settings that say otherwise would be read by nobody."""
    saved = _adapter_config(folder)
    given = {"lora_r": stage.lora_r, "lora_alpha": stage.alpha}
    kept = {"lora_r": saved["r"], "lora_alpha": saved["lora_alpha"]}
    if stage.use_lora and given != kept:
        raise SettingsError(f"{folder} is an adapter with {kept}, but {given} was set: leave the LoRA settings out")


def _require_safetensors(model: str, *names: str) -> None:
    if all(companion(model, name) is None for name in names):
        raise SettingsError(f"{model} has no {names[0]}: weights in a pickle could run code, and are not loaded")


def _with_adapter(model: PreTrainedModel, folder: str, **settings: Any) -> PeftModel:
    """The model with the adapter of `folder`, which must have been trained on this very base."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    _require_safetensors(folder, "adapter_model.safetensors")
    base, known = base_model_of(folder), companion(folder, BASE_FILE)
    foreign = f"the adapter {folder} was trained on another base than {base}, which it names: "
    digest = weights_digest(base)
    if known is not None and digest and json.loads(known.read_text(encoding="utf-8"))["digest"] != digest:
        raise SettingsError(
            f"{foreign}its weights have changed since. Put the old ones back, or delete {known} if they were converted"
        )
    try:
        with _whole_weights(folder):
            adapted = PeftModel.from_pretrained(model, folder, **settings)
    except RuntimeError as error:  # torch lists every tensor; the first line that names one says enough
        raise SettingsError(foreign + str(error).splitlines()[-1].strip()) from None
    with safe_open(companion(folder, "adapter_model.safetensors"), "pt") as file:
        saved = {name for name in file.keys() if "lora_" in name}  # noqa: SIM118
    # peft only warns where layers have no weights, or weights no layer.
    layers = {name for name in get_peft_model_state_dict(adapted, save_embedding_layers=False) if "lora_" in name}
    if saved != layers:
        raise SettingsError(f"{foreign}{len(saved - layers)} of its tensors fit no layer, {len(layers - saved)} lack")
    return adapted


def weights_digest(folder: str) -> str:
    """Changes with the weights in a folder, by a few values of each; "" for a name on the hub, or no safetensors."""
    import torch
    from safetensors import safe_open

    found = []
    for path in Path(folder).glob("*.safetensors") if Path(folder).is_dir() else ():
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part, shape = file.get_slice(name), file.get_slice(name).get_shape()
                ends = (part[:1], part[shape[0] - 1 :]) if shape else (file.get_tensor(name)[None],) * 2
                values = torch.cat([ends[0].flatten()[:64], ends[1].flatten()[-64:]])
                found.append((name, shape, values.view(torch.uint8).numpy().tobytes()))
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest() if found else ""


def lora_config(lora: type, model_config: ModelConfig, stage: StageConfig) -> Any:
    targets = rf".*language_model\..*\.{LORA_LAYERS}"
    if not model_config.freeze_vision:
        targets = rf"({targets}|.*visual\..*{LORA_VISION_LAYERS})"
    return lora(
        r=stage.lora_r,
        lora_alpha=stage.alpha,
        lora_dropout=stage.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def inference_dtype(config: InferenceConfig, device: str) -> torch.dtype:
    import torch

    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    has_half = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_half else torch.float32


def load_for_inference(config: InferenceConfig) -> LoadedModel:
    """A trained model, ready to answer; an adapter is merged into its base, which makes decoding faster."""
    import torch

    processor, contract = load_processor(config.model_path)
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError(f"device is {device}, but torch sees no GPU here: leave it out, or give cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # of no such kind, of none here, or of none with that number
        reason = str(error).partition("\n")[0]
        raise SettingsError(f"device is {device}, which torch cannot use here: {reason}") from None
    dtype = inference_dtype(config, device)
    on_adapter = is_adapter(config.model_path)
    base = base_model_of(config.model_path) if on_adapter else config.model_path
    half = dtype != torch.float32 and device.startswith("cuda")
    model = load_weights(base, dtype, config.attn_implementation, half).to(device)
    if on_adapter:
        model = _with_adapter(model, config.model_path).merge_and_unload()
    return LoadedModel(model.eval(), processor, contract)


# -------------------------------------------------------------------------------------------------- save


def write_folder(folder: str | Path, fill: Callable[[str], None]) -> None:
    """Let `fill` write into a folder beside `folder`, then put it in place: it is whole, or it is not there."""
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    fill(str(aside))
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(aside, folder)
        shutil.rmtree(old)
    else:
        os.replace(aside, folder)


def save_companions(
    folder: str | Path,
    processor: Qwen2_5_VLProcessor,
    contract: CropContract,
    settings: TrainingSettings | None,
) -> None:
    """What a checkpoint needs beside its weights: processor files, crop contract, settings, an adapter's base."""
    processor.save_pretrained(folder)
    contract.save(folder)
    if settings is not None:
        settings.save(folder)
    base = base_model_of(folder) if is_adapter(folder) else None  # None, too, of a model that came from no folder
    digest = weights_digest(base) if base else ""
    if digest:
        Path(folder, BASE_FILE).write_text(json.dumps({"digest": digest}) + "\n", encoding="utf-8")


def save_final_model(trainer: Any, loaded: LoadedModel, settings: TrainingSettings, folder: str | Path) -> None:
    """Save a trainer's model on every process; the main one adds the companions and puts it in place."""
    aside = Path(folder).with_name(f".{Path(folder).name}.weights")
    if trainer.is_world_process_zero():
        shutil.rmtree(aside, ignore_errors=True)  # what a killed run may have left
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(aside))
    if trainer.is_world_process_zero():
        # TRL keeps the SFT adapter beside the trained one as the reference; it is no part of the result.
        shutil.rmtree(aside / "ref", ignore_errors=True)
        (aside / "training_args.bin").unlink(missing_ok=True)  # a pickle; our own settings file says it all

        def fill(target: str) -> None:
            shutil.copytree(aside, target, dirs_exist_ok=True)
            save_companions(target, loaded.processor, loaded.contract, settings)

        write_folder(folder, fill)
        shutil.rmtree(aside)
    trainer.accelerator.wait_for_everyone()


# ------------------------------------------------------------------------------------------------- merge


# How far the logits of merged weights may be from the adapter's, as a share of their size.
MERGE_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Merge:
    """What merging did to the logits of a test input, as shares of their size.

    difference: between merged weights and the adapter beside its base. effect: of the adapter on its base.
    """

    difference: float
    effect: float


def merge_adapter(adapter: str, output: str, dtype: str | None = None) -> Merge:
    """Write full weights: the adapter merged into its base, with processor, chat template, crop contract and card.

    dtype: of the weights that are written [the base's own].

    Raises:
        SettingsError: for what is no adapter, where `output` holds something, and where the merged weights do not
            answer as the adapter does.
    """
    _require_exists(adapter)
    if not is_adapter(adapter):
        raise SettingsError(f"{adapter} holds no adapter (no adapter_config.json): there is nothing to merge")
    _require_empty(output)
    import torch
    from transformers import AutoConfig

    _require_safetensors(adapter, "adapter_model.safetensors")
    base = base_model_of(adapter)
    if dtype is None:
        saved = AutoConfig.from_pretrained(base, trust_remote_code=False).dtype
        dtype = str(saved).removeprefix("torch.") if saved is not None else "float32"
    processor, contract = load_processor(adapter)
    model = load_weights(base, getattr(torch, dtype), "sdpa").eval()
    batch = _test_input(processor, contract)
    before = _logits(model, batch)
    model = _with_adapter(model, adapter).eval()
    expected = _logits(model, batch)
    model = model.merge_and_unload()
    size = expected.norm()
    merge = Merge(float((_logits(model, batch) - expected).norm() / size), float((expected - before).norm() / size))
    if not merge.difference <= MERGE_TOLERANCE[dtype]:  # also where it is not a number
        raise SettingsError(
            f"the merged weights do not answer as {adapter} does: their logits differ by {merge.difference:.1%} in "
            f"{dtype}, where {MERGE_TOLERANCE[dtype]:.2%} is allowed. Nothing was written. --dtype float32 merges "
            "without rounding; if that differs too, the adapter is not one of this base model or version of peft"
        )
    config = _adapter_config(adapter)
    facts = {"name": Path(output).name, "base": base, "rank": config["r"], "dtype": dtype, "contract": contract}

    def fill(target: str) -> None:
        model.save_pretrained(target)
        save_companions(target, processor, contract, None)
        write_card(target, adapter, facts | {"difference": merge.difference, "effect": merge.effect})

    write_folder(output, fill)
    return merge


def _require_empty(output: str) -> None:
    """A folder takes the place of the one before it as a whole, so that what this holds would be lost."""
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise SettingsError(f"output is {output}, which is a file: give a new folder")
    held = sorted(item.name for item in path.iterdir()) if path.is_dir() else []
    if held:
        raise SettingsError(
            f"output is {output}, which holds {held[0]}{' and more' if len(held) > 1 else ''}: give a new folder, or "
            "empty this one first"
        )


def _test_input(processor: Qwen2_5_VLProcessor, contract: CropContract) -> dict[str, torch.Tensor]:
    """A question about a picture, and a call as an answer to it."""
    from PIL import Image

    image = Image.radial_gradient("L").resize((8 * contract.factor, 6 * contract.factor)).convert("RGB")
    question = [{"type": "image"}, {"type": "text", "text": "What is written on the sign on the left?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    text = f"{prompt}<think>\nI look closer {CALL_OPEN}[12, 24, 56, 80]{CALL_CLOSE}"
    return processor(text=[text], images=[image], return_tensors="pt", return_mm_token_type_ids=True)


def _logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    import torch

    with torch.no_grad():
        return model(**batch).logits.float()


def push_to_hub(folder: str, repository: str, public: bool = False) -> str:
    """Upload a merged model; returns its address. The repository is made where there is none, private unless told.

    Raises:
        SettingsError: where the hub refuses.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        hub = HfApi()
        address = hub.create_repo(repository, private=not public, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Merged weights")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, HTTPError, OSError) as error:
        upload = ["hf", "upload", repository, folder, *([] if public else ["--private"])]
        raise SettingsError(
            f"{folder} is written, but could not be uploaded to {repository}: {error}. Log in with `hf auth login` and "
            f"a token that may write, then: {shlex.join(upload)}"
        ) from None
    return str(address)


def merge_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Merge a LoRA adapter into full weights.", allow_abbrev=False)
    parser.add_argument("--merge", required=True, metavar="ADAPTER", help="folder of the adapter")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the full weights are written")
    parser.add_argument("--dtype", choices=list(MERGE_TOLERANCE), help="of the weights written [the base model's]")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the result to this repository (owner/name)")
    parser.add_argument("--public", action="store_true", help="make a new repository public [private]")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = merge_parser()
    options = parser.parse_args(argv)
    try:
        merge = merge_adapter(options.merge, options.output, options.dtype)
        print(f"merged {options.merge} into {options.output}")
        print(f"logits differ by {merge.difference:.2g} of their size; the adapter changes them by {merge.effect:.2g}")
        if merge.difference > merge.effect / 2:
            print("rounding takes much of what the adapter learned: --dtype float32 keeps it")
        if options.push_to_hub:
            print(f"uploaded to {push_to_hub(options.output, options.push_to_hub, options.public)}")
    except SettingsError as error:
        parser.exit(2, f"model_utils.py: {error}\n")
    except OSError as error:  # a full disk, a folder that cannot be written there
        parser.exit(1, f"model_utils.py: {error}\n")


if __name__ == "__main__":
    main()
