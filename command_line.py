"""The command line of training: flags and JSON files -> settings that hold together. Default < file < flag."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from config import (
    ALIASES,
    STAGES,
    DataConfig,
    ModelConfig,
    SettingsError,
    SFTStageConfig,
    StageConfig,
    TrainingSettings,
    build,
    build_stage,
    nearest,
    own_fields,
    placeholder,
    read_json,
    require,
    require_file,
    trl_fields,
)

NO_FLAG = "every setting is a --flag, and a value with spaces in it stands in quotes"


def end_quietly(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """For `sys.excepthook`: Ctrl-C, while libraries load too, ends a command with a line in place of a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"{Path(sys.argv[0]).name}: stopped by Ctrl-C", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


class CommandParser(argparse.ArgumentParser):
    """Flags are given whole, and for one that there is not the nearest is named."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)
        sys.excepthook = end_quietly

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        options, rest = self.parse_known_args(args, namespace)
        if rest and not rest[0].startswith("-"):
            self.error(f"unexpected argument {rest[0]!r}: {NO_FLAG}")
        if rest:
            flag = rest[0].partition("=")[0]
            self.error(f"unknown flag {flag}.{nearest(flag, self._option_string_actions)}")
        return options


def add_flags(parser: argparse.ArgumentParser, config: type, title: str, omit: tuple[str, ...] = ()) -> None:
    """One flag a setting, but for those in `omit`; a flag that is not given stays absent: nothing to compare to."""
    group = parser.add_argument_group(title, (config.__doc__ or "").split("\n")[0])
    hints, known = own_fields(config), parser._option_string_actions
    for item in fields(config):
        if item.name in ("trl", *omit):
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
        require(flag.startswith("--"), f"unexpected argument {flag!r}: {NO_FLAG}")
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
    parser = CommandParser(
        description=description,
        usage="%(prog)s [--setting value ...]",
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
SFT_ONLY_IN_BOTH = ("learning_rate", "num_train_epochs")


def split_stage_flags(flags: dict[str, Any], stages: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Hand each flag to the stages that know it; a prefixed flag to its own stage, over an unprefixed one.

    Raises:
        SettingsError: for a flag that no running stage reads.
    """
    given: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    prefixed: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    known = {stage: {*own_fields(STAGES[stage]), *trl_fields(stage), *ALIASES} for stage in STAGES}
    for flag, value in flags.items():
        stage, _, name = flag.partition("_")
        readers = [reader for reader in stages if flag in known[reader]]
        if stage in stages and name in known[stage] and not readers:
            prefixed[stage][ALIASES.get(name, name)] = value
            continue
        flag = ALIASES.get(flag, flag)
        if len(stages) == 2 and flag == "output_dir":
            raise SettingsError(
                "--output_dir would be that of both stages: give --sft_output_dir and --grpo_output_dir"
            )
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
        parser.add_argument(
            "--demo",
            action="store_true",
            default=argparse.SUPPRESS,
            help="train the embedded default instead (demo.py)",
        )
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
        require(
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
            require(
                Path(start).is_dir(),
                f"R-GRPO starts from an SFT model, but there is none at {start}. Run train_sft.py first, or give "
                "--sft_checkpoint FOLDER (or --model_name to start from a model without SFT).",
            )
            grpo = replace(grpo, sft_checkpoint=start)
    return replace(settings, data=data, grpo=grpo)


# --------------------------------------------------------------------------------------- contradictions


# Settings of TRL that this project decides by itself, or whose work its own code does: nobody would read them.
RESERVED = {"dataset_kwargs", "remove_unused_columns", "max_length", "packing"}
RESERVED |= {"model_init_kwargs", "trust_remote_code"}
RESERVED_IN = {
    "sft": {"assistant_only_loss", "completion_only_loss", "dataset_text_field", "dataset_num_proc", "eos_token"}
    | {"pad_token", "chat_template_path", "eval_packing", "packing_strategy", "truncation_mode", "pad_to_multiple_of"},
    "grpo": {"use_vllm", "min_p", "repetition_penalty", "generation_kwargs", "cache_implementation"}
    | {"use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged"}
    | {"chat_template_kwargs", "reward_weights", "num_generations_eval", "max_tool_calling_iterations"}
    | {"vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex", "vllm_group_port"}
    | {"vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"}
    | {"vllm_tensor_parallel_size", "vllm_max_model_length"},
}


def check_settings(settings: TrainingSettings, flags: dict[str, dict[str, Any]]) -> None:
    """Refuse what cannot work, with what was given and what to do. Looks at names and files, loads nothing."""
    for path, name in ((settings.data.train_data, "train_data"), (settings.data.val_data, "val_data")):
        if path is not None:
            require_file(name, path)
    base = settings.data.image_base_path
    require(Path(base).is_dir(), f"image_base_path is {base}, but there is no such folder")
    for stage, config in (("sft", settings.sft), ("grpo", settings.grpo)):
        if config is not None:
            _check_stage(stage, config, flags[stage])
    if settings.model.load_in_4bit:
        _check_four_bit(settings)
    if settings.sft is not None:
        require(
            settings.sft.early_stopping_patience is None or settings.data.val_data is not None,
            "early_stopping_patience was given, but there is no validation data: give --val_data",
        )
    if settings.grpo is not None:
        _check_grpo(settings)


def _check_stage(stage: str, config: StageConfig, flags: dict[str, Any]) -> None:
    require(not (config.bf16 and config.fp16), f"{stage}: bf16 and fp16 were both given; choose one")
    require(config.learning_rate > 0, f"{stage}: learning_rate is {config.learning_rate}, but it must be over 0")
    require(0 <= config.warmup_ratio < 1, f"{stage}: warmup_ratio is {config.warmup_ratio}, but it is a share: 0 to 1")
    require(0 <= config.lora_dropout < 1, f"{stage}: lora_dropout is {config.lora_dropout}, but it must be in [0, 1)")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "lora_r"):
        require(
            getattr(config, name) >= 1,
            f"{stage}: {name} is {getattr(config, name)}, but it must be at least 1",
        )
    require(
        config.num_train_epochs > 0 or config.trl.get("max_steps", -1) > 0,
        f"{stage}: num_train_epochs is {config.num_train_epochs}, but it must be over 0",
    )
    if not config.use_lora:
        given = [name for name in ("lora_r", "lora_alpha", "lora_dropout") if name in flags]
        require(not given, f"{stage}: {', '.join(given)} was given, but LoRA is off: add --use_lora")
    reserved = RESERVED | RESERVED_IN[stage]
    taken = sorted(reserved & set(config.trl))
    require(not taken, f"{stage}: {', '.join(taken)} is set by this project and cannot be passed on to TRL")


def _check_four_bit(settings: TrainingSettings) -> None:
    """4-bit weights are frozen, whole, and made by a package that is not among the requirements."""
    sft, grpo = settings.sft, settings.grpo
    for stage, config in (("sft", sft), ("grpo", grpo)):
        if config is None:
            continue
        start = settings.model.model_name if config is sft else config.sft_checkpoint or settings.model.model_name
        on_adapter = Path(start, "adapter_config.json").is_file() or (sft is not None and sft.use_lora)
        require(
            config.use_lora or on_adapter,
            f"{stage}: load_in_4bit was given, but 4-bit weights cannot be trained, only an adapter on them: add "
            "--use_lora, or leave --load_in_4bit out",
        )
    cut_up = os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    require(not cut_up, "load_in_4bit was given, but 4-bit weights cannot be cut up over GPUs: use DDP or ZeRO-2")
    require(
        importlib.util.find_spec("bitsandbytes") is not None,
        "load_in_4bit was given, but bitsandbytes is not installed: pip install bitsandbytes",
    )


def _check_grpo(settings: TrainingSettings) -> None:
    grpo = settings.grpo
    bounds = {"rollout_batch_size": 1, "max_batch_tokens": 0, "max_completion_length": 1, "max_crops": 0, "beta": 0}
    for name, least in bounds.items():
        require(getattr(grpo, name) >= least, f"{name} is {getattr(grpo, name)}, but it must be at least {least}")
    require(grpo.num_generations >= 2, f"num_generations is {grpo.num_generations}, but a group needs at least 2")
    require(grpo.temperature > 0, f"temperature is {grpo.temperature}, but rollouts must be sampled (over 0)")
    weights = (grpo.global_reward_weight, grpo.region_reward_weight)
    require(
        grpo.reward_preset == "balanced" or weights == (1.0, 1.0),
        f"reward weights {weights} were given, but the preset {grpo.reward_preset!r} has its paper's: leave them out",
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    steps = grpo.trl.get("steps_per_generation") or grpo.gradient_accumulation_steps
    rollouts = grpo.trl.get("generation_batch_size") or grpo.per_device_train_batch_size * processes * steps
    require(
        rollouts % grpo.num_generations == 0,
        f"one generation makes {rollouts} rollouts (batch size {grpo.per_device_train_batch_size} x {processes} "
        f"processes x {steps} steps), which num_generations={grpo.num_generations} does not divide. Change "
        "batch_size, gradient_accumulation_steps or num_generations.",
    )
    if settings.sft is None and grpo.sft_checkpoint is not None:
        require(Path(grpo.sft_checkpoint).is_dir(), f"sft_checkpoint is {grpo.sft_checkpoint}: no such folder")
    if settings.sft is not None:
        require(
            Path(settings.sft.output_dir).resolve() != Path(grpo.output_dir).resolve(),
            f"output_dir is {grpo.output_dir} in both stages: give --sft_output_dir and --grpo_output_dir",
        )
        expected = f"{settings.sft.output_dir}/final_model"
        require(
            grpo.sft_checkpoint == expected,
            f"sft_checkpoint is {grpo.sft_checkpoint}, but --stage both starts R-GRPO from its own SFT model "
            f"({expected}). Leave it out, or use --stage grpo.",
        )
