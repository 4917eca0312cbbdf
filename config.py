"""Every setting: name, type, default, help; JSON files and flags into dataclasses. Default < JSON file < flag."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import os
import types
import typing
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

SETTINGS_FILE = "training_settings.json"
# The README's short words for two of TRL's fields; both may be used everywhere.
ALIASES = {"num_epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}
TRL_CONFIGS = {"sft": "sft_config.py", "grpo": "grpo_config.py"}


# Name in --ablate_crops -> the engine's `SamplingParams.crops`.
ABLATIONS = {"none": "off", "blank": "blank", "random": "random"}


def setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is loaded."""

    model_name: str = setting("Qwen/Qwen2.5-VL-7B-Instruct", "hub name or folder of a Qwen2.5-VL model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "weights in memory; auto: bfloat16/float16 under LoRA with --bf16/--fp16, else float32"
    )
    attn_implementation: Literal["auto", "flash_attention_2", "sdpa", "eager"] = setting(
        "auto", "attention kernel; auto: sdpa, and flash_attention_2 for the vision tower where it is installed"
    )
    freeze_vision: bool = setting(True, "keep the vision tower and its merger as they are")
    load_in_4bit: bool = setting(False, "LoRA on 4-bit weights (QLoRA); needs bitsandbytes")


@dataclass(frozen=True)
class DataConfig:
    """Where the examples are, and how they become tokens. Unset frame settings follow the model's contract."""

    train_data: str = setting("data/train.jsonl", "training JSONL, one image a row")
    val_data: str | None = setting(None, "validation JSONL [data/val.jsonl where that file exists]")
    image_base_path: str = setting("data/images", "folder that image_path is relative to; no image outside it")
    answer_key: str = setting("A3", "key of the annotated answer in each QnA entry")
    max_length: int = setting(8192, "longest example in tokens, image tokens included")
    overlong: Literal["skip", "cut"] = setting("skip", "longer examples: skip the row, or cut it (never inside a crop)")
    min_box_side: int = setting(28, "smallest annotated box, original pixels; rows with a smaller one are faults")
    data_check: Literal["auto", "full", "lazy"] = setting(
        "auto", "check all training rows at start-up, or each when it is drawn; auto: full up to 10,000 rows"
    )
    num_proc: int | None = setting(None, "processes that check the data at start-up [one a core, 8 at most]")
    bad_rows_file: str | None = setting(None, "where faulty rows are written [<output_dir>/bad_rows.jsonl]")
    coordinate_space: Literal["resized", "original", "normalized_1000"] | None = setting(
        None, "frame in which the model reads and writes boxes [resized]"
    )
    image_shorter_side: int | None = setting(None, "shorter side of the main image as shown, pixels [448]")
    crop_shorter_side: int | None = setting(None, "largest shorter side of a crop as shown, pixels [448]")
    max_pixels: int | None = setting(None, "largest area of a shown image, pixels [1003520]")
    system_prompt: str | None = setting(None, "system prompt [one that explains the crop call and its frame]")

    def __post_init__(self) -> None:
        for name, bound in {"max_length": 1, "min_box_side": 0, "num_proc": 1}.items():
            value = getattr(self, name)
            require(value is None or value >= bound, f"{name} is {value}, but it must be at least {bound}")

    def contract_settings(self) -> dict[str, Any]:
        """The settings given that belong to the crop contract."""
        names = ("coordinate_space", "image_shorter_side", "crop_shorter_side", "max_pixels", "system_prompt")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class StageConfig:
    """What both stages share. Fields of TRL's config that are not listed here stand in `trl`."""

    learning_rate: float = setting(2e-5, "peak learning rate")
    num_train_epochs: float = setting(3.0, "passes over the data (alias: num_epochs)")
    per_device_train_batch_size: int = setting(4, "sequences a device and micro-batch (alias: batch_size)")
    gradient_accumulation_steps: int = setting(4, "micro-batches an optimizer step")
    warmup_ratio: float = setting(0.1, "share of the steps in which the learning rate rises")
    weight_decay: float = setting(0.01, "AdamW's weight decay")
    lr_scheduler_type: str = setting("cosine", "learning-rate schedule")
    bf16: bool = setting(False, "bfloat16 mixed precision")
    fp16: bool = setting(False, "float16 mixed precision")
    gradient_checkpointing: bool = setting(True, "recompute activations in the backward pass: less memory, slower")
    use_lora: bool = setting(False, "train a LoRA adapter on the language model instead of all its weights")
    lora_r: int = setting(64, "LoRA rank")
    lora_alpha: int | None = setting(None, "LoRA scale [2 x lora_r]")
    lora_dropout: float = setting(0.1, "dropout in front of the adapter")
    logging_steps: float = setting(10, "optimizer steps between two log lines")
    save_steps: float | None = setting(
        None,
        "steps between two checkpoints; under 1: a share of all steps [0.1; with validation: eval_steps]",
    )
    save_total_limit: int = setting(3, "checkpoints kept")
    seed: int = setting(42, "seed of weights, order and sampling")
    resume: bool = setting(True, "go on from the newest whole checkpoint in output_dir, where there is one")
    trl: dict[str, Any] = field(default_factory=dict)

    @property
    def alpha(self) -> int:
        return self.lora_alpha if self.lora_alpha is not None else 2 * self.lora_r


@dataclass(frozen=True)
class SFTStageConfig(StageConfig):
    """Stage 1: supervised fine-tuning on annotated rationales."""

    output_dir: str = setting("outputs/sft", "checkpoints, logs and final_model of stage 1")
    early_stopping_patience: int | None = setting(
        None, "stop after so many evaluations without a better validation loss [off]"
    )
    eval_steps: float | None = setting(
        None,
        "optimizer steps between two evaluations on the validation data; under 1: a share of all steps "
        "[save_steps, else 0.1]",
    )
    padding_free: bool | None = setting(
        None, "put the rows of a batch behind each other instead of padding them [true on a GPU with sdpa]"
    )


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port or a bracket that cannot be
        return False


@dataclass(frozen=True)
class JudgeConfig:
    """A model behind an OpenAI-compatible endpoint that judges free-form answers; its key: JUDGE_API_KEY."""

    judge_url: str | None = setting(None, "base URL of the endpoint, as http://localhost:8000/v1 [no judge: rules]")
    judge_model: str | None = setting(None, "the model that judges, by the endpoint's name for it")
    judge_cache: str = setting("outputs/judge_cache.sqlite", "file of verdicts, so that nothing is asked twice")
    judge_timeout: float = setting(30.0, "seconds for one request")
    judge_retries: int = setting(3, "further requests after one that failed, with growing pauses")
    judge_concurrency: int = setting(16, "requests side by side")
    judge_reply_tokens: int = setting(16, "tokens of a reply at most; more for a model that reasons first")
    judge_patience: float = setting(
        300.0, "seconds to wait where it does not answer at all, then stop; 0: the rules judge at once"
    )
    judge_max_requests: int = setting(100_000, "requests of a run and process at most, then rules judge; 0: no bound")
    judge_max_tokens: int = setting(0, "the same for tokens, of requests and replies; 0: no bound")

    def __post_init__(self) -> None:
        url, model = self.judge_url, self.judge_model
        require((url is None) == (model is None), f"judge_url is {url} and judge_model is {model}: give both, or none")
        require(url is None or _is_http(url), f"judge_url is {url}, but it must be a http:// or https:// address")
        require(self.judge_timeout > 0, f"judge_timeout is {self.judge_timeout}, but it must be over 0 seconds")
        least = {"judge_retries": 0, "judge_concurrency": 1, "judge_reply_tokens": 1, "judge_patience": 0}
        for name, bound in (least | {"judge_max_requests": 0, "judge_max_tokens": 0}).items():
            require(getattr(self, name) >= bound, f"{name} is {getattr(self, name)}, but it must be at least {bound}")


@dataclass(frozen=True)
class GRPOStageConfig(JudgeConfig, StageConfig):
    """Stage 2: R-GRPO (Region-Conditioned Reinforcement Policy Optimization, arXiv 2505.16192)."""

    output_dir: str = setting("outputs/grpo", "checkpoints, logs and final_model of stage 2")
    sft_checkpoint: str | None = setting(
        None,
        "model of stage 1, adapter or full weights [outputs/sft/final_model unless --model_name is given]",
    )
    learning_rate: float = setting(5e-6, "peak learning rate")
    num_train_epochs: float = setting(1.0, "passes over the prompts (alias: num_epochs)")
    beta: float = setting(0.04, "weight of the KL divergence to the SFT model; 0 keeps no reference")
    num_generations: int = setting(8, "rollouts a prompt, the group size G")
    temperature: float = setting(1.0, "sampling temperature of the rollouts")
    max_completion_length: int = setting(1024, "sampled tokens a rollout; crop tokens come on top")
    max_crops: int = setting(8, "crops a rollout; later calls are not carried out")
    rollout_batch_size: int = setting(64, "rollouts decoded side by side")
    rollout_backend: Literal["engine", "vllm"] = setting("engine", "what samples the rollouts: our engine, or vLLM")
    vllm_server: str | None = setting(
        None, "rollout_backend vllm: address of a running `vllm serve` [a vLLM inside each training process]"
    )
    vllm_gpu_memory_utilization: float = setting(
        0.3, "rollout_backend vllm without a server: share of the GPU's memory for it"
    )
    vllm_sync_dir: str | None = setting(
        None, "vllm_server: folder, seen by both sides, through which weights go to it [<output_dir>/vllm_weights]"
    )
    vllm_patience: float = setting(300.0, "vllm_server: seconds to wait where it does not answer, then stop")
    max_batch_tokens: int = setting(0, "rollouts: bound of the KV cache, rows x tokens each; 0: none")
    cuda_graphs: bool = setting(True, "on a GPU, record decode steps as CUDA graphs and replay them")
    reward_preset: Literal["balanced", "vlm_r3_paper", "vlm_r3_code", "deepeyes"] = setting(
        "balanced", "which reward (see rewards.py)"
    )
    global_reward_weight: float = setting(1.0, "balanced: weight of the global part (answer and format)")
    region_reward_weight: float = setting(1.0, "balanced: weight of the regional part (boxes and their use)")
    watch_every: int = setting(
        50, "steps between two measurements of the crop gain on fixed questions, also at both ends; 0: none"
    )
    watch_samples: int = setting(32, "so many fixed questions for it, drawn evenly from val_data, else from train_data")
    keep_rollouts_every: int = setting(
        50, "steps between two pages of rollouts in <output_dir>/rollouts, also of the first step; 0: none"
    )

    def __post_init__(self) -> None:
        JudgeConfig.__post_init__(self)
        for name, bound in {"watch_every": 0, "watch_samples": 1, "keep_rollouts_every": 0}.items():
            require(getattr(self, name) >= bound, f"{name} is {getattr(self, name)}, but it must be at least {bound}")
        require(
            not self.trl.get("use_vllm"),
            "use_vllm is TRL's own way to vLLM, which cannot insert crops: give rollout_backend=vllm instead",
        )
        check_server(self.vllm_server, self.rollout_backend == "vllm", "--rollout_backend vllm")
        require(
            self.vllm_server is not None or self.vllm_sync_dir is None,
            f"vllm_sync_dir is {self.vllm_sync_dir!r}, but without vllm_server nothing reads it: leave it out",
        )
        require(
            self.vllm_server is None or self.temperature == 1,
            f"temperature is {self.temperature}, but a vLLM server reports log-probs at temperature 1 alone: leave it "
            "at 1, or leave vllm_server out",
        )
        check_batch_tokens(self.max_batch_tokens, self.rollout_backend)
        require(self.vllm_patience >= 0, f"vllm_patience is {self.vllm_patience}, but it cannot be negative")


@dataclass(frozen=True)
class InferenceConfig:
    """How a trained model answers."""

    model_path: str = setting("outputs/grpo/final_model", "trained model: full weights or an adapter")
    backend: Literal["engine", "vllm"] = setting("engine", "what samples the answers: our engine, or vLLM")
    vllm_server: str | None = setting(
        None, "backend vllm: address of a `vllm serve` that serves model_path [a vLLM inside this process]"
    )
    max_new_tokens: int = setting(512, "sampled tokens an answer; crop tokens come on top")
    temperature: float = setting(0.7, "0: greedy")
    top_p: float = setting(1.0, "keep the most likely tokens that hold this much probability")
    top_k: int = setting(0, "keep so many of the most likely tokens; 0: all")
    max_crops: int = setting(8, "crops an answer; later calls are not carried out")
    execute_crops: bool = setting(True, "cut the regions and show them to the model")
    parse_tool_calls: bool = setting(True, "report the calls in result.tool_calls")
    seed: int = setting(0, "the same seed samples the same tokens again")
    batch_size: int = setting(16, "questions answered side by side")
    max_batch_tokens: int = setting(0, "bound of the KV cache, questions side by side x tokens each; 0: none")
    cuda_graphs: bool = setting(True, "on a GPU, record decode steps as CUDA graphs and replay them")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "auto: bfloat16 on a GPU that has it, else float32"
    )
    attn_implementation: Literal["auto", "flash_attention_2", "sdpa", "eager"] = setting("auto", "attention kernel")
    device: str = setting("auto", "cuda, cpu, ...; auto: a GPU where there is one")

    def __post_init__(self) -> None:
        for name, hint in own_fields(InferenceConfig).items():  # made from Python there was no command line to check it
            object.__setattr__(self, name, convert(name, getattr(self, name), hint))
        check_server(self.vllm_server, self.backend == "vllm", "--backend vllm")
        require(
            self.backend == "engine" or (self.device == "auto" and self.attn_implementation == "auto"),
            "device and attn_implementation are vLLM's own choice under --backend vllm: leave them out",
        )
        require(self.temperature >= 0, f"temperature is {self.temperature}, but it cannot be negative (0: greedy)")
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}, but it must be in (0, 1]")
        require(self.top_k >= 0, f"top_k is {self.top_k}, but it cannot be negative (0: all tokens)")
        require(self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}, but it must be at least 1")
        require(self.max_crops >= 0, f"max_crops is {self.max_crops}, but it cannot be negative")
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}, but it must be at least 1")
        require(self.max_batch_tokens >= 0, f"max_batch_tokens is {self.max_batch_tokens}, but it cannot be negative")
        check_batch_tokens(self.max_batch_tokens, self.backend)


@dataclass(frozen=True)
class EvaluationConfig(JudgeConfig, InferenceConfig):
    """What is asked, how often, and where the answers go."""

    data: str = setting(
        "data/test.jsonl", "JSONL of this project, or a folder of V*Bench, HR-Bench, TextVQA, ScienceQA"
    )
    image_base_path: str | None = setting(None, "JSONL: folder that image_path is relative to [the file's own folder]")
    answer_key: str = setting("A3", "JSONL: key of the annotated answer in each QnA entry")
    split: str = setting("test", "ScienceQA: which split of pid_splits.json")
    limit: int = setting(0, "ask so many questions, drawn evenly from the whole set; 0: all")
    samples: int = setting(1, "answers a question; over 1 with a temperature over 0 (Avg@k)")
    ablate_crops: str | None = setting(
        None, "ask again with other crops, from none,blank,random: what is lost is the crop gain"
    )
    temperature: float = setting(0.0, "0: greedy")
    output: str = setting("outputs/evaluation", "folder of answers.jsonl, results.json and report.html")
    resume: bool = setting(True, "go on with the answers in the output folder; false: start anew")
    traces: int = setting(8, "worst and best answers shown in report.html, so many of each")

    def __post_init__(self) -> None:
        JudgeConfig.__post_init__(self)
        InferenceConfig.__post_init__(self)
        for name, bound in {"limit": 0, "samples": 1, "traces": 0}.items():
            require(getattr(self, name) >= bound, f"{name} is {getattr(self, name)}, but it must be at least {bound}")
        require(
            self.samples == 1 or self.temperature > 0,
            f"samples is {self.samples}, but at temperature 0 all of them are the same: give --temperature 0.7",
        )
        unknown = set(self.ablations) - set(ABLATIONS)
        require(not unknown, f"ablate_crops is {self.ablate_crops!r}, but it is a list of: {', '.join(ABLATIONS)}")

    @property
    def ablations(self) -> tuple[str, ...]:
        given = self.ablate_crops.split(",") if self.ablate_crops else []
        return tuple(dict.fromkeys(name.strip() for name in given))


@dataclass(frozen=True)
class ConversionConfig:
    """How a data file of another format is read or written."""

    image_folder: str = setting(
        "data/images", "folder that image paths are relative to; images that come inside a file are written there"
    )
    answer_key: str = setting("A3", "jsonl: key of the annotated answer in each QnA entry")
    columns: str | None = setting(
        None, "hub: our names and the set's columns, as image=img,question=prompt,answer=solution,boxes=bbox"
    )
    split: str | None = setting(None, "hub: which split [train]")
    subset: str | None = setting(None, "hub: which configuration of the set, where it has several")
    box_form: Literal["xyxy", "xywh"] | None = setting(None, "hub: corners, or a corner with width and height [xyxy]")
    box_frame: Literal["original", "qwen", "normalized_1", "normalized_1000"] | None = setting(
        None,
        "vlir, hub: frame of the boxes that are read; qwen: pixels of the image as Qwen2.5-VL's own processor sizes it "
        "[vlir: qwen, hub: original]",
    )
    box_max_pixels: int = setting(1605632, "frame qwen: the processor's max_pixels")

    def __post_init__(self) -> None:
        require(self.box_max_pixels >= 3136, f"box_max_pixels is {self.box_max_pixels}, but it must be at least 3136")


@dataclass(frozen=True)
class WebConfig(InferenceConfig):
    """Where the web page is served, and to how many at once."""

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: all, so that anyone who reaches it can ask")
    port: int = setting(7860, "port to listen on")
    share: bool = setting(False, "open a public address through Gradio's tunnel")
    max_upload_mb: int = setting(20, "largest picture that may be uploaded, megabytes")
    max_queue: int = setting(16, "questions that may wait; they are answered one at a time")
    questions_per_minute: int = setting(20, "questions, and uploads, a client may send a minute")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.port <= 65535, f"port is {self.port}, but it must be from 1 to 65535")
        for name in ("max_upload_mb", "max_queue", "questions_per_minute"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, but it must be at least 1")


STAGES: dict[str, type[StageConfig]] = {"sft": SFTStageConfig, "grpo": GRPOStageConfig}


@dataclass(frozen=True)
class TrainingSettings:
    """All settings of a run; a stage that does not run is None."""

    model: ModelConfig
    data: DataConfig
    sft: SFTStageConfig | None
    grpo: GRPOStageConfig | None

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, SETTINGS_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def show(self) -> None:
        """Print the resolved settings, on the main process alone."""
        if is_main_process():
            print(self.table(), flush=True)

    def table(self) -> str:
        """The resolved settings, one a line, without TRL's own defaults, and the judge's where there is none."""
        lines = []
        for name, part in (
            ("model", self.model),
            ("data", self.data),
            ("sft", self.sft),
            ("grpo", self.grpo),
        ):
            if part is None:
                continue
            values = {k: v for k, v in asdict(part).items() if k != "trl"} | asdict(part).get("trl", {})
            if values.get("judge_url") is None:  # no judge: its other settings say nothing
                values = {key: value for key, value in values.items() if not key.startswith("judge_")}
            lines += [
                f"[{name}]",
                *(f"  {key:<30} {value}" for key, value in values.items() if value is not None),
            ]
        return "\n".join(lines)


def is_main_process() -> bool:
    """Whether this process is the only one, or the first of several (torchrun's RANK)."""
    return os.environ.get("RANK", "0") == "0"


def use_one_gpu() -> None:
    """Without a launcher, show this process the first of its GPUs alone; to be called before torch looks for them.

    transformers would wrap the model in nn.DataParallel over all of them, which TRL refuses.
    """
    if "RANK" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


class SettingsError(ValueError):
    """A setting that cannot be: says what was given, why it cannot be, and what to do."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise SettingsError(message)


def require_file(name: str, path: str | Path) -> None:
    """Refuse a path at which there is no file, as it was given by the setting `name`."""
    reason = "that is a folder: give the file in it" if Path(path).is_dir() else "there is no such file"
    require(Path(path).is_file(), f"{name} is {path}, but {reason}")


def require_apart(name: str, output: str | None, source: str, what: str) -> None:
    """Refuse to write over what is read: `output`, given by the setting `name`, must not be the file `source`."""
    there = output is not None and os.path.exists(output) and os.path.exists(source)
    require(not (there and os.path.samefile(output, source)), f"{name} is {output}, {what} itself: give another name")


def check_batch_tokens(tokens: int, backend: str) -> None:
    require(
        tokens == 0 or backend == "engine",
        f"max_batch_tokens is {tokens}, but vLLM bounds its cache by its share of the memory: leave it out",
    )


def check_server(address: str | None, is_used: bool, flag: str) -> None:
    require(address is None or is_used, f"vllm_server is {address!r}, but only vLLM reads it: add {flag}")
    require(
        address is None or address.startswith(("http://", "https://")),
        f"vllm_server is {address!r}, but it must be an address like http://localhost:8000",
    )


# ------------------------------------------------------------------------------------- names and values


PLAIN_TYPES = {"bool": bool, "int": int, "float": float}
PLAIN_TYPES |= {f"{name} | None": kind | None for name, kind in PLAIN_TYPES.items()}


@cache
def trl_fields(stage: str) -> dict[str, Any]:
    """Name -> type (None where it is no number or truth value) of each field of TRL's `SFTConfig` / `GRPOConfig`.

    Read from the source: importing it takes seconds.
    """
    roots = {name: Path(importlib.util.find_spec(name).origin).parent for name in ("trl", "transformers")}
    files = [
        roots["trl"] / "trainer" / TRL_CONFIGS[stage],
        roots["trl"] / "trainer" / "base_config.py",
        roots["transformers"] / "training_args.py",
    ]
    found: dict[str, Any] = {}
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            for item in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(item, ast.AnnAssign) and not item.target.id.startswith("_"):
                    found.setdefault(item.target.id, PLAIN_TYPES.get(ast.unparse(item.annotation)))
    return found


def own_fields(config: type) -> dict[str, type]:
    """Name -> type of a dataclass's settings, without the pass-through `trl`."""
    return {name: hint for name, hint in typing.get_type_hints(config).items() if name != "trl"}


def nearest(name: str, known: typing.Iterable[str]) -> str:
    match = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def convert(name: str, value: Any, hint: Any) -> Any:
    """`value` (from JSON, or text from a flag) as the field's type; raises SettingsError with what was given."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        require(value in choices, f"{name} is {value!r}, but it must be one of {', '.join(choices)}")
        return value
    if hint is bool:
        truth = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        require(str(value).lower() in truth, f"{name} is {value!r}, but it must be true or false")
        return truth[str(value).lower()]
    if hint in (int, float):
        require(not isinstance(value, bool), f"{name} is {str(value).lower()}, but it must be a number")
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise SettingsError(f"{name} is {value!r}, but it must be a number") from None
        require(hint is float or number.is_integer(), f"{name} is {value!r}, but it must be a whole number")
        return hint(number)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    require(isinstance(value, str), f"{name} is {value!r}, but it must be text")
    return value


def build_stage(stage: str, given: dict[str, Any]) -> StageConfig:
    """A stage's settings from names and values; names of TRL's own config go to `trl`.

    Raises:
        SettingsError: for a name that neither we nor TRL know, naming the nearest one.
    """
    config, own, passed = STAGES[stage], {}, {}
    hints = own_fields(config)
    for name, value in given.items():
        name = ALIASES.get(name, name)
        if name in hints:
            own[name] = convert(name, value, hints[name])
        elif name in trl_fields(stage):
            hint = trl_fields(stage)[name]
            converted = convert(name, value, hint) if hint else value
            passed[name] = value if converted == value else converted  # 50 stays 50 where TRL has a float
        else:
            known = {*hints, *trl_fields(stage), *ALIASES}
            raise SettingsError(f"unknown setting {name!r} of the {stage} stage.{nearest(name, known)}")
    return config(**own, trl=passed)


def build(config: type, given: dict[str, Any]) -> Any:
    """Model, data or inference settings from names and values; an unknown name raises SettingsError."""
    hints = own_fields(config)
    for name in given:
        require(name in hints, f"unknown setting {name!r} of {config.__name__}.{nearest(name, hints)}")
    return config(**{name: convert(name, value, hints[name]) for name, value in given.items()})


def read_json(path: str) -> dict[str, Any]:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path} is not JSON: {error}") from None
    require(isinstance(values, dict), f"{path} must hold one JSON object of names and values")
    return values


def placeholder(hint: Any) -> str:
    """The word that stands for a value in `--help`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(typing.get_args(hint)) + "}"
    return {bool: "true|false", int: "N", float: "X"}.get(hint, "TEXT")
