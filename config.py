"""Every setting: name, type, default, help; JSON files and flags into dataclasses. Default < JSON file < flag."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import json
import os
import sys
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

SETTINGS_FILE = "training_settings.json"
# The README's short words for two of TRL's fields; both may be used everywhere.
ALIASES = {"num_epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}
TRL_CONFIGS = {"sft": "sft_config.py", "grpo": "grpo_config.py"}


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
        "auto", "attention kernel; auto: flash_attention_2 where it is installed and usable, else sdpa"
    )
    freeze_vision: bool = setting(True, "keep the vision tower and its merger as they are")


@dataclass(frozen=True)
class DataConfig:
    """Where the examples are, and how they become tokens. Unset frame settings follow the model's contract."""

    train_data: str = setting("data/train.jsonl", "training JSONL, one image a row")
    val_data: str | None = setting(None, "validation JSONL [data/val.jsonl where that file exists]")
    image_base_path: str = setting("data/images", "folder that image_path is relative to; no image outside it")
    answer_key: str = setting("A3", "key of the annotated answer in each QnA entry")
    max_length: int = setting(8192, "longest example in tokens, image tokens included")
    overlong: Literal["skip", "cut"] = setting(
        "skip", "longer examples: skip the row, or cut it at a segment border (never inside a crop)"
    )
    min_box_side: int = setting(28, "smallest annotated box, original pixels; rows with a smaller one are faults")
    num_proc: int = setting(1, "processes that check the data at start-up")
    bad_rows_file: str | None = setting(None, "where faulty rows are written [<output_dir>/bad_rows.jsonl]")
    coordinate_space: Literal["resized", "original", "normalized_1000"] | None = setting(
        None, "frame in which the model reads and writes boxes [resized]"
    )
    image_shorter_side: int | None = setting(None, "shorter side of the main image as shown, pixels [448]")
    crop_shorter_side: int | None = setting(None, "largest shorter side of a crop as shown, pixels [448]")
    max_pixels: int | None = setting(None, "largest area of a shown image, pixels [1003520]")
    system_prompt: str | None = setting(None, "system prompt [one that explains the crop call and its frame]")

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
    save_steps: float = setting(500, "optimizer steps between two checkpoints")
    save_total_limit: int = setting(3, "checkpoints kept")
    seed: int = setting(42, "seed of weights, order and sampling")
    resume: bool = setting(True, "go on from the newest checkpoint in output_dir, where there is one")
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
    eval_steps: float = setting(500, "optimizer steps between two evaluations on the validation data")


@dataclass(frozen=True)
class GRPOStageConfig(StageConfig):
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
    reward_preset: Literal["balanced", "vlm_r3_paper", "vlm_r3_code", "deepeyes"] = setting(
        "balanced", "which reward (see rewards.py)"
    )
    global_reward_weight: float = setting(1.0, "balanced: weight of the global part (answer and format)")
    region_reward_weight: float = setting(1.0, "balanced: weight of the regional part (boxes and their use)")


@dataclass(frozen=True)
class InferenceConfig:
    """How a trained model answers."""

    model_path: str = setting("outputs/grpo/final_model", "trained model: full weights or an adapter")
    max_new_tokens: int = setting(512, "sampled tokens an answer; crop tokens come on top")
    temperature: float = setting(0.7, "0: greedy")
    top_p: float = setting(1.0, "keep the most likely tokens that hold this much probability")
    top_k: int = setting(0, "keep so many of the most likely tokens; 0: all")
    max_crops: int = setting(8, "crops an answer; later calls are not carried out")
    execute_crops: bool = setting(True, "cut the regions and show them to the model")
    parse_tool_calls: bool = setting(True, "report the calls in result.tool_calls")
    seed: int = setting(0, "the same seed samples the same tokens again")
    batch_size: int = setting(16, "questions answered side by side")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "auto: bfloat16 on a GPU that has it, else float32"
    )
    attn_implementation: Literal["auto", "flash_attention_2", "sdpa", "eager"] = setting("auto", "attention kernel")
    device: str = setting("auto", "cuda, cpu, ...; auto: a GPU where there is one")

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, f"temperature is {self.temperature}, but it cannot be negative (0: greedy)")
        _require(0 < self.top_p <= 1, f"top_p is {self.top_p}, but it must be in (0, 1]")
        _require(self.top_k >= 0, f"top_k is {self.top_k}, but it cannot be negative (0: all tokens)")
        _require(self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}, but it must be at least 1")
        _require(self.max_crops >= 0, f"max_crops is {self.max_crops}, but it cannot be negative")


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

    def table(self) -> str:
        """The resolved settings, one a line; what TRL keeps at its own default is left out."""
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
            lines += [
                f"[{name}]",
                *(f"  {key:<30} {value}" for key, value in values.items() if value is not None),
            ]
        return "\n".join(lines)


class SettingsError(ValueError):
    """A setting that cannot be: says what was given, why it cannot be, and what to do."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SettingsError(message)


# ------------------------------------------------------------------------------------- names and values


@cache
def trl_field_names(stage: str) -> frozenset[str]:
    """Field names of TRL's `SFTConfig` / `GRPOConfig`, read from the source: importing it takes seconds."""
    roots = {name: Path(importlib.util.find_spec(name).origin).parent for name in ("trl", "transformers")}
    files = [
        roots["trl"] / "trainer" / TRL_CONFIGS[stage],
        roots["trl"] / "trainer" / "base_config.py",
        roots["transformers"] / "training_args.py",
    ]
    names = set()
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                names |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
    return frozenset(name for name in names if not name.startswith("_"))


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
        _require(value in choices, f"{name} is {value!r}, but it must be one of {', '.join(choices)}")
        return value
    if hint is bool:
        truth = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        _require(str(value).lower() in truth, f"{name} is {value!r}, but it must be true or false")
        return truth[str(value).lower()]
    if hint in (int, float):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise SettingsError(f"{name} is {value!r}, but it must be a number") from None
        _require(hint is float or number.is_integer(), f"{name} is {value!r}, but it must be a whole number")
        return hint(number)
    _require(isinstance(value, str), f"{name} is {value!r}, but it must be text")
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
        elif name in trl_field_names(stage):
            passed[name] = value
        else:
            known = {*hints, *trl_field_names(stage), *ALIASES}
            raise SettingsError(f"unknown setting {name!r} of the {stage} stage.{nearest(name, known)}")
    return config(**own, trl=passed)


def build(config: type, given: dict[str, Any]) -> Any:
    """Model, data or inference settings from names and values; an unknown name raises SettingsError."""
    hints = own_fields(config)
    for name in given:
        _require(name in hints, f"unknown setting {name!r} of {config.__name__}.{nearest(name, hints)}")
    return config(**{name: convert(name, value, hints[name]) for name, value in given.items()})


def read_json(path: str) -> dict[str, Any]:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path} is not JSON: {error}") from None
    _require(isinstance(values, dict), f"{path} must hold one JSON object of names and values")
    return values


# ------------------------------------------------------------------------------------------------ flags


def placeholder(hint: Any) -> str:
    """The word that stands for a value in `--help`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(typing.get_args(hint)) + "}"
    return {bool: "true|false", int: "N", float: "X"}.get(hint, "TEXT")


def add_flags(parser: argparse.ArgumentParser, config: type, title: str) -> None:
    """One flag a setting; a flag that is not given stays absent, so nothing is compared to a default."""
    group = parser.add_argument_group(title, (config.__doc__ or "").split("\n")[0])
    hints, known = own_fields(config), parser._option_string_actions
    for item in fields(config):
        if item.name == "trl":
            continue
        has_default = item.default is not MISSING and item.default is not None
        default = f" [{item.default}]" if has_default else ""
        if f"--{item.name}" in known:  # both stages have it: one flag, and the other stage's default beside the first
            if has_default and default not in known[f"--{item.name}"].help:
                known[f"--{item.name}"].help += f" {title}:{default}"
            continue
        group.add_argument(
            *(f"--{item.name}", *(f"--{short}" for short, name in ALIASES.items() if name == item.name)),
            dest=item.name,
            default=argparse.SUPPRESS,
            metavar=placeholder(hints[item.name]),
            help=(item.metadata["help"] + default).replace("%", "%%"),
            **({"nargs": "?", "const": "true"} if hints[item.name] is bool else {}),
        )


def parse_pass_through(rest: list[str]) -> dict[str, Any]:
    """`--name value`, `--name=value` and bare `--name` (true) of flags that argparse does not know."""
    given: dict[str, Any] = {}
    position = 0
    while position < len(rest):
        flag = rest[position]
        _require(flag.startswith("--"), f"unexpected argument {flag!r}: every setting is a --flag")
        name, equals, text = flag[2:].partition("=")
        position += 1
        if not equals:
            has_value = position < len(rest) and not rest[position].startswith("--")
            text = rest[position] if has_value else "true"
            position += has_value
        try:
            given[name] = json.loads(text)
        except json.JSONDecodeError:
            given[name] = text
    return given


def training_parser(description: str, stages: tuple[str, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [--setting value ...]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any further field of TRL's SFTConfig / GRPOConfig may be given as a flag or in a stage's JSON file "
        "(--save_steps 50,\n--report_to tensorboard, --deepspeed zero3.json). With --stage both, --sft_NAME and "
        "--grpo_NAME set one stage only.",
    )
    files = parser.add_argument_group("settings files", "default < file < flag")
    for name in ("model", "data", *stages):
        files.add_argument(f"--{name}_config", metavar="FILE", help=f"JSON file with {name} settings")
    add_flags(parser, ModelConfig, "model")
    add_flags(parser, DataConfig, "data")
    for stage in stages:
        add_flags(parser, STAGES[stage], f"{stage} stage")
    return parser


# In `--stage both` these belong to SFT alone when they come without a prefix.
SFT_ONLY_IN_BOTH = ("learning_rate", "num_train_epochs", "output_dir")


def split_stage_flags(flags: dict[str, Any], stages: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Hand each flag to the stages that know it; a prefixed flag to its own stage, over an unprefixed one.

    Raises:
        SettingsError: for a flag that no running stage reads.
    """
    given: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    prefixed: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    known = {stage: {*own_fields(STAGES[stage]), *trl_field_names(stage), *ALIASES} for stage in STAGES}
    for flag, value in flags.items():
        stage, _, name = flag.partition("_")
        readers = [reader for reader in stages if flag in known[reader]]
        if stage in stages and name in known[stage] and not readers:
            prefixed[stage][ALIASES.get(name, name)] = value
            continue
        flag = ALIASES.get(flag, flag)
        if len(stages) == 2 and flag in SFT_ONLY_IN_BOTH:
            readers = ["sft"]
        if not readers:
            everything = set().union(*known.values(), own_fields(ModelConfig), own_fields(DataConfig))
            prefixes = {f"{reader}_{setting}" for reader in stages for setting in own_fields(STAGES[reader])}
            hint = nearest(flag, everything | prefixes)
            if any(flag in names or (stage == owner and name in names) for owner, names in known.items()):
                hint = f" It belongs to a stage that does not run; this run has: {', '.join(stages)}."
            raise SettingsError(f"unknown flag --{flag}.{hint}")
        for reader in readers:
            given[reader][flag] = value
    return {stage: given[stage] | prefixed[stage] for stage in stages}


def parse_training(argv: list[str] | None, description: str, stages: tuple[str, ...] = ()) -> TrainingSettings:
    """Flags and files of a training command -> settings that hold together.

    `stages` fixes what runs; without it the command has `--stage sft|grpo|both`. Exits with a message on a
    setting that cannot be, before anything heavy is imported.
    """
    parser = training_parser(description, stages or tuple(STAGES))
    if not stages:
        parser.add_argument("--stage", choices=["sft", "grpo", "both"], default="both", help="what to run [both]")
    known, rest = parser.parse_known_args(argv)
    flags = vars(known)
    if not stages:
        stage = flags.pop("stage")
        stages = ("sft", "grpo") if stage == "both" else (stage,)
    try:
        return resolve_training(flags | parse_pass_through(rest), stages)
    except SettingsError as error:
        parser.exit(2, f"{Path(sys.argv[0]).name}: {error}\n")


def resolve_training(flags: dict[str, Any], stages: tuple[str, ...]) -> TrainingSettings:
    """Settings from flags (names and values, `*_config` files among them) for the stages that run."""
    flags = dict(flags)
    files = {name: flags.pop(f"{name}_config", None) for name in ("model", "data", *STAGES)}
    files = {name: read_json(path) if path else {} for name, path in files.items()}
    for stage in STAGES:
        _require(
            stage in stages or not files[stage],
            f"--{stage}_config was given, but the {stage} stage does not run",
        )
    own: dict[str, dict[str, Any]] = {"model": {}, "data": {}}
    for name, config in (("model", ModelConfig), ("data", DataConfig)):
        own[name] = {key: flags.pop(key) for key in own_fields(config) if key in flags}
    stage_flags = split_stage_flags(flags, stages)
    built = {stage: build_stage(stage, _without_aliases(files[stage]) | stage_flags[stage]) for stage in stages}
    settings = TrainingSettings(
        model=build(ModelConfig, files["model"] | own["model"]),
        data=build(DataConfig, files["data"] | own["data"]),
        sft=built.get("sft"),
        grpo=built.get("grpo"),
    )
    settings = _fill_paths(settings, files, own)
    check_settings(settings, stage_flags)
    return settings


def _without_aliases(values: dict[str, Any]) -> dict[str, Any]:
    return {ALIASES.get(name, name): value for name, value in values.items()}


def _fill_paths(settings: TrainingSettings, files: dict, own: dict) -> TrainingSettings:
    """Defaults that depend on what else was given: validation data, and where stage 2 starts."""
    data, grpo = settings.data, settings.grpo
    if (
        data.val_data is None
        and Path("data/val.jsonl").is_file()
        and "train_data" not in {**files["data"], **own["data"]}
    ):
        data = replace(data, val_data="data/val.jsonl")
    if grpo is not None and grpo.sft_checkpoint is None:
        if settings.sft is not None:
            grpo = replace(grpo, sft_checkpoint=f"{settings.sft.output_dir}/final_model")
        elif "model_name" not in {**files["model"], **own["model"]}:
            start = f"{SFTStageConfig().output_dir}/final_model"
            _require(
                Path(start).is_dir(),
                f"R-GRPO starts from an SFT model, but there is none at {start}. Run train_sft.py first, or give "
                "--sft_checkpoint FOLDER (or --model_name to start from a model without SFT).",
            )
            grpo = replace(grpo, sft_checkpoint=start)
    return replace(settings, data=data, grpo=grpo)


# --------------------------------------------------------------------------------------- contradictions


def check_settings(settings: TrainingSettings, flags: dict[str, dict[str, Any]]) -> None:
    """Refuse what cannot work, with what was given and what to do. Looks at names and files, loads nothing."""
    for path, name in ((settings.data.train_data, "train_data"), (settings.data.val_data, "val_data")):
        _require(path is None or Path(path).is_file(), f"{name} is {path}, but there is no such file")
    base = settings.data.image_base_path
    _require(Path(base).is_dir(), f"image_base_path is {base}, but there is no such folder")
    for stage, config in (("sft", settings.sft), ("grpo", settings.grpo)):
        if config is not None:
            _check_stage(stage, config, flags[stage])
    if settings.sft is not None:
        _require(
            settings.sft.early_stopping_patience is None or settings.data.val_data is not None,
            "early_stopping_patience was given, but there is no validation data: give --val_data",
        )
    if settings.grpo is not None:
        _check_grpo(settings)


def _check_stage(stage: str, config: StageConfig, flags: dict[str, Any]) -> None:
    _require(not (config.bf16 and config.fp16), f"{stage}: bf16 and fp16 were both given; choose one")
    _require(config.learning_rate > 0, f"{stage}: learning_rate is {config.learning_rate}, but it must be over 0")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "lora_r"):
        _require(
            getattr(config, name) >= 1,
            f"{stage}: {name} is {getattr(config, name)}, but it must be at least 1",
        )
    _require(
        config.num_train_epochs > 0 or config.trl.get("max_steps", -1) > 0,
        f"{stage}: num_train_epochs is {config.num_train_epochs}, but it must be over 0",
    )
    if not config.use_lora:
        given = [name for name in ("lora_r", "lora_alpha", "lora_dropout") if name in flags]
        _require(not given, f"{stage}: {', '.join(given)} was given, but LoRA is off: add --use_lora")
    reserved = {
        "dataset_kwargs",
        "remove_unused_columns",
        "max_length",
        "packing",
        "padding_free",
        "model_init_kwargs",
    }
    taken = sorted(reserved & set(config.trl))
    _require(not taken, f"{stage}: {', '.join(taken)} is set by this project and cannot be passed on to TRL")


def _check_grpo(settings: TrainingSettings) -> None:
    grpo = settings.grpo
    _require(grpo.num_generations >= 2, f"num_generations is {grpo.num_generations}, but a group needs at least 2")
    _require(grpo.temperature > 0, f"temperature is {grpo.temperature}, but rollouts must be sampled (over 0)")
    weights = (grpo.global_reward_weight, grpo.region_reward_weight)
    _require(
        grpo.reward_preset == "balanced" or weights == (1.0, 1.0),
        f"reward weights {weights} were given, but the preset {grpo.reward_preset!r} has its paper's: leave them out",
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    steps = grpo.trl.get("steps_per_generation") or grpo.gradient_accumulation_steps
    rollouts = grpo.trl.get("generation_batch_size") or grpo.per_device_train_batch_size * processes * steps
    _require(
        rollouts % grpo.num_generations == 0,
        f"one generation makes {rollouts} rollouts (batch size {grpo.per_device_train_batch_size} x {processes} "
        f"processes x {steps} steps), which num_generations={grpo.num_generations} does not divide. Change "
        "batch_size, gradient_accumulation_steps or num_generations.",
    )
    if settings.sft is None and grpo.sft_checkpoint is not None:
        _require(Path(grpo.sft_checkpoint).is_dir(), f"sft_checkpoint is {grpo.sft_checkpoint}: no such folder")
    if settings.sft is not None:
        expected = f"{settings.sft.output_dir}/final_model"
        _require(
            grpo.sft_checkpoint == expected,
            f"sft_checkpoint is {grpo.sft_checkpoint}, but --stage both starts R-GRPO from its own SFT model "
            f"({expected}). Leave it out, or use --stage grpo.",
        )
