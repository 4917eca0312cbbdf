"""Settings by dataset size and GPU memory: what fits, what was chosen and why, and how long it takes.

python configure_training.py --dataset_size 40000 --gpu_memory 32 --show_command
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from architecture import ARCHITECTURES, Architecture
from command_line import CommandParser
from config import convert, require
from memory_model import GIB, Memory, Run, cache_bytes, peak, phases, rollout_memory

DEFAULT_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
SMALL_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
EFFECTIVE_BATCH = 32  # sequences an optimizer step
GROUP_SIZE = 8  # rollouts a prompt in R-GRPO: it must divide the effective batch
FULL_FINE_TUNING_GB = 80
# (from this much memory on, sequences a device and micro-batch at most)
LORA_BATCHES = ((80, 16), (32, 8), (24, 4), (16, 2), (8, 1))
SMALLEST_RANK, CACHE_STEP = 16, 4096
CUT_UP = ("zero3", "fsdp2")  # ways to share the weights themselves
SFT_EPOCHS = 3
CONFIGS = Path(__file__).parent / "configs"
PATHS = {"train_data": "data/train.jsonl", "val_data": "data/val.jsonl", "image_base_path": "data/images"}
METHODS = {"lora": "LoRA", "qlora": "LoRA on 4-bit weights", "full": "full"}


@dataclass(frozen=True)
class Recommendation:
    """What to train with. `reasons` explains each choice by its name; `run` is what the memory model counted."""

    dataset_size: int
    gpu_memory: float  # GB of one GPU
    model_name: str
    model: Architecture
    learning_rate: str  # as written in a command: 2e-5
    run: Run
    reasons: dict[str, str]

    @property
    def use_lora(self) -> bool:
        return self.run.method != "full"

    @property
    def lora_r(self) -> int | None:
        return self.run.lora_r if self.use_lora else None

    @property
    def num_gpus(self) -> int:
        return self.run.num_gpus

    @property
    def batch_size(self) -> int:
        return self.run.batch_size

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.run.gradient_accumulation_steps

    @property
    def effective_batch(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps * self.num_gpus

    @property
    def settings(self) -> dict[str, dict[str, str | int]]:
        """Settings that are no default and not in the guidelines, by the file that they belong to."""
        found: dict[str, dict[str, str | int]] = {"model": {}, "stages": {}, "grpo": {}}
        if self.run.method == "qlora":
            found["model"]["load_in_4bit"] = "true"
        if self.run.half_weights:
            found["model"]["dtype"] = "bfloat16"
        if not self.run.gradient_checkpointing:
            found["stages"]["gradient_checkpointing"] = "false"
        if self.run.max_batch_tokens:
            found["grpo"]["max_batch_tokens"] = self.run.max_batch_tokens
        if not self.run.beta:
            found["grpo"]["beta"] = 0
        return found


def recommend(
    dataset_size: int,
    gpu_memory: float,
    num_gpus: int = 1,
    model_name: str | None = None,
    method: str | None = None,
    sharding: str | None = None,
    lengths: Run = Run(),  # noqa: B008 (frozen)
    batch_size: int | None = None,
) -> Recommendation:
    """Settings for so many images on so many GPUs of `gpu_memory` GB each.

    method, sharding, batch_size: to be kept rather than chosen. lengths: a `Run` that says how long the rows are, and
    whether gradients are checkpointed.

    Raises:
        ValueError: where nothing can be recommended, saying what was given and what to do.
    """
    _check(dataset_size, num_gpus, method, sharding, lengths, batch_size)
    model_name, model_reason = _choose_model(model_name, gpu_memory)
    model = Architecture.find(model_name)
    lengths = replace(lengths, num_gpus=num_gpus)
    full = _full_run(lengths, sharding)
    full_fits = gpu_memory >= FULL_FINE_TUNING_GB and _fitting(model, [full], gpu_memory, batch_size) is not None
    train_all, rank, learning_rate, method_reason = _guideline(dataset_size, full_fits)
    if method is not None:
        train_all, method_reason = method == "full", "as given"
        learning_rate = "5e-6" if train_all else learning_rate if rank else "1e-5"
    runs = [full] if train_all else list(_lora_runs(lengths, rank or 256, method, sharding))
    run = _fitting(model, runs, gpu_memory, batch_size)
    if run is None:
        raise ValueError(_nothing_fits(model_name, model, replace(runs[-1], batch_size=batch_size or 1), gpu_memory))
    return Recommendation(
        dataset_size,
        gpu_memory,
        model_name,
        model,
        learning_rate,
        run,
        reasons={
            "model_name": model_reason,
            "method": _explain_method(method_reason, run, None if train_all else rank or 256),
            "learning_rate": "for the SFT stage; R-GRPO keeps its own 5e-6",
            "batch_size": "sequences a device: "
            + ("as given" if batch_size else f"the largest of 1 to {_most(gpu_memory, run)} that fits"),
            "gradient_accumulation_steps": _steps_reason(run),
            "max_batch_tokens": "KV cache of the rollouts: what is left beside the weights",
            "beta": "no reference model: a second copy of the weights does not fit",
            "dtype": "weights, gradients and optimizer in bfloat16, which rounds small updates away",
            "load_in_4bit": "frozen weights in 4 bits; needs `pip install bitsandbytes`",
            "gradient_checkpointing": "as given",
        },
    )


def _steps_reason(run: Run) -> str:
    steps = f"{run.batch_size} x {run.gradient_accumulation_steps} x {run.num_gpus} GPU"
    return f"{steps}: the group of {GROUP_SIZE} rollouts divides it"


def _check(
    dataset_size: int, num_gpus: int, method: str | None, sharding: str | None, lengths: Run, batch_size: int | None
) -> None:
    require(dataset_size >= 1, f"dataset_size is {dataset_size}, but it counts images: give 1 or more")
    require(num_gpus >= 1, f"num_gpus is {num_gpus}, but training needs at least 1")
    require(batch_size is None or batch_size >= 1, f"batch_size is {batch_size}, but it must be at least 1")
    for name in LENGTHS:
        value, least = getattr(lengths, name), int(name in ("prompt_tokens", "max_completion_length"))
        require(value >= least, f"{name} is {value}, but it must be at least {least}")
    require(
        sharding in (None, "ddp") or num_gpus > 1,
        f"sharding is {sharding}, but there is one GPU to cut the weights up over: give --num_gpus, or leave it out",
    )
    require(
        method != "qlora" or sharding not in CUT_UP,
        f"method is qlora, but {sharding} cuts weights up, and those in 4 bits must be whole: give --sharding ddp or "
        "zero2, or --method lora",
    )


def _choose_model(model_name: str | None, gpu_memory: float) -> tuple[str, str]:
    if model_name is not None:
        require(0 < gpu_memory < math.inf, f"gpu_memory is {gpu_memory:g} GB: give that of one GPU")
        return model_name, "as given"
    if not 8 <= gpu_memory < math.inf:
        weights = 2 * ARCHITECTURES[SMALL_MODEL].parameters / 1e9
        raise ValueError(
            f"gpu_memory is {gpu_memory:g} GB, but the weights of the smallest model, {SMALL_MODEL}, take "
            f"{weights:.1f} GB alone: use a GPU of 8 GB or more (16 GB to be at ease)"
        )
    if gpu_memory >= 24:
        return DEFAULT_MODEL, "the default"
    weights = 2 * ARCHITECTURES[DEFAULT_MODEL].parameters / 1e9
    return SMALL_MODEL, f"the 7B's weights alone take {weights:.1f} GB, {gpu_memory:g} GB are there"


def _guideline(dataset_size: int, full_fits: bool) -> tuple[bool, int | None, str, str]:
    """(train all weights, rank, learning rate, reason): more data carries more trained weights, at a lower rate."""
    if dataset_size < 10_000:
        return False, 64, "2e-5", "under 10k images: a small adapter does not learn them by heart"
    if dataset_size < 50_000:
        return False, 128, "2e-5", "10k to 50k images carry a larger adapter"
    if dataset_size <= 100_000:
        choice = "; full fine-tuning at 5e-6 would fit as well" if full_fits else ""
        return False, 256, "1e-5", f"50k to 100k images: a large adapter at a lower rate{choice}"
    if full_fits:
        return True, None, "5e-6", "over 100k images and the memory: all weights"
    return False, 256, "1e-5", "over 100k images, but training all weights does not fit"


# --------------------------------------------------------------------------------------------- what fits


def _full_run(lengths: Run, sharding: str | None) -> Run:
    """On one GPU in bfloat16; on several with float32 weights, cut up."""
    if lengths.num_gpus == 1:
        return replace(lengths, method="full", half_weights=True)
    return replace(lengths, method="full", sharding=sharding or "fsdp2")


def _lora_runs(lengths: Run, rank: int, method: str | None, sharding: str | None) -> Iterator[Run]:
    """From the best to the smallest: the rank halved to 64, then the frozen weights in 4 bits, which must be whole."""
    for kind in [method] if method else ["lora"] if sharding in CUT_UP else ["lora", "qlora"]:
        lora_r, smallest = rank, SMALLEST_RANK if kind == "qlora" else 64
        while lora_r >= smallest:
            yield replace(lengths, method=kind, lora_r=lora_r, sharding=sharding or "ddp")
            lora_r //= 2


def _most(gpu_memory: float, run: Run) -> int:
    """Sequences of a micro-batch at most: larger ones make a step hardly faster."""
    most = next((batch for memory, batch in LORA_BATCHES if gpu_memory >= memory), 1)
    return min(most if run.method != "full" else max(1, most // 4), max(1, EFFECTIVE_BATCH // run.num_gpus))


def _fitting(model: Architecture, runs: list[Run], gpu_memory: float, batch_size: int | None) -> Run | None:
    """The first of `runs` that fits, at its largest batch; None where none does at any."""
    for run in runs:
        size = batch_size or _most(gpu_memory, run)
        while size:
            fitted = _with_rollouts(model, with_batch(run, size), gpu_memory)
            if fitted is not None:
                return fitted
            size = 0 if batch_size else size // 2
    return None


def with_batch(run: Run, batch_size: int) -> Run:
    """`run` at this batch size, its accumulation such that a step stays as large as it should be."""
    accumulation = math.ceil(EFFECTIVE_BATCH / (batch_size * run.num_gpus))
    while batch_size * accumulation * run.num_gpus % GROUP_SIZE:
        accumulation += 1
    return replace(run, batch_size=batch_size, gradient_accumulation_steps=accumulation)


def _with_rollouts(model: Architecture, run: Run, gpu_memory: float) -> Run | None:
    """`run` where it fits: as it is, with a bound of the KV cache, or without a reference model; else None."""
    there = gpu_memory * GIB
    for beta in (run.beta, 0.0) if run.method == "full" else (run.beta,):
        bounded = replace(run, beta=beta)
        if peak(model, bounded).needed <= there:
            return bounded
        spare = there - rollout_memory(model, replace(bounded, max_batch_tokens=1)).needed
        slots = int(spare / cache_bytes(model, bounded, 1) / 1.1) // CACHE_STEP * CACHE_STEP
        # A row must fit, and under four side by side decoding would take for ever.
        if slots >= max(4 * bounded.rollout_row, CACHE_STEP):
            bounded = replace(bounded, max_batch_tokens=slots)
            if peak(model, bounded).needed <= there:
                return bounded
    return None


def _nothing_fits(name: str, model: Architecture, run: Run, gpu_memory: float) -> str:
    memory = peak(model, with_batch(replace(run, max_batch_tokens=4 * run.rollout_row), run.batch_size))
    weights = memory.parts["weights"] / 1e9
    whole = " --sharding ddp" if run.sharding in CUT_UP else ""
    further = "" if run.method == "qlora" else f", or 4-bit weights (--method qlora{whole})"
    return (
        f"model_name is {name}, whose weights take {weights:.1f} GB ({_method(run)}), and at a batch size of "
        f"{run.batch_size} {memory.phase} needs {memory.needed / GIB:.1f} GB in all, but gpu_memory is {gpu_memory:g} "
        f"GB: choose a smaller model, a larger GPU, shorter rows{further}"
    )


def _explain_method(reason: str, run: Run, rank: int | None) -> str:
    if run.method == "full":
        if run.half_weights:
            return reason + ", in bfloat16, which rounds small updates away; several GPUs hold them in float32"
        return reason + f", in float32, cut up over {run.num_gpus} GPUs ({run.sharding})"
    if rank is not None and run.lora_r < rank:
        reason += f"; rank {rank} does not fit"
    return reason


def _method(run: Run) -> str:
    if run.method == "full":
        return "full, in bfloat16" if run.half_weights else f"full, {run.sharding}"
    return f"{METHODS[run.method]}, r {run.lora_r}"


def hours(
    choice: Recommendation, tokens_per_second: float, rollout_tokens_per_second: float | None
) -> dict[str, float]:
    """Hours of each stage from measured throughputs.

    tokens_per_second: of all GPUs together in an update, prompts and images among them (the probe reports it);
    rollout_tokens_per_second: sampled by one GPU (the training log's `rollout/tokens_per_second`).
    """
    run, images = choice.run, choice.dataset_size
    found = {"SFT": SFT_EPOCHS * images * run.sft_row / tokens_per_second / 3600}
    if rollout_tokens_per_second:
        sampled = images * GROUP_SIZE * run.max_completion_length / (rollout_tokens_per_second * run.num_gpus)
        # The reference pass is a forward alone, a quarter of an update with checkpoints.
        passes = 1.25 if run.beta else 1.0
        update = passes * images * GROUP_SIZE * run.rollout_row / tokens_per_second
        found["R-GRPO"] = (sampled + update) / 3600
    return found


def probed_hours(choice: Recommendation, tokens_per_second: float) -> dict[str, float]:
    """Hours of R-GRPO from probed steps of it, which held their rollouts."""
    return {"R-GRPO": choice.dataset_size * GROUP_SIZE * choice.run.rollout_row / tokens_per_second / 3600}


# ----------------------------------------------------------------------------------------------- output


def training_command(
    choice: Recommendation, paths: dict[str, str | None], config_dir: Path | None = None, stage: str = "both"
) -> str:
    """The command that trains with these settings; with `config_dir` they come from its files."""
    launcher = ["python"]
    if choice.num_gpus > 1 and choice.run.sharding == "ddp":
        launcher = ["torchrun", "--nproc_per_node", str(choice.num_gpus)]
    elif choice.num_gpus > 1:
        config = f"configs/accelerate/{choice.run.sharding}.yaml"
        launcher = ["accelerate", "launch", "--config_file", config, "--num_processes", str(choice.num_gpus)]
    words = [*launcher, "train_qwenvl_25.py", "--stage", stage]
    if config_dir is not None:
        for name in ("model", "data", "sft", "grpo"):
            words += [f"--{name}_config", str(config_dir / f"{name}_config.json")]
        return shlex.join(words)
    return shlex.join(words + training_flags(choice, paths, stage))


def training_flags(choice: Recommendation, paths: dict[str, str | None], stage: str = "both") -> list[str]:
    words = []
    for name, path in paths.items():
        words += [f"--{name}", path] if path is not None else []
    if choice.model_name != DEFAULT_MODEL:
        words += ["--model_name", choice.model_name]
    if choice.use_lora:
        words += ["--use_lora", "--lora_r", str(choice.lora_r)]
    for part, values in choice.settings.items():
        if part != "grpo" or stage != "sft":
            for name, value in values.items():
                words += [f"--{name}", *([str(value)] if value != "true" else [])]
    words += ["--learning_rate", choice.learning_rate, "--batch_size", str(choice.batch_size)]
    return [*words, "--gradient_accumulation_steps", str(choice.gradient_accumulation_steps), "--bf16"]


def table(choice: Recommendation) -> str:
    """The recommendation with the reason for each choice, to be read."""
    reasons = choice.reasons
    rows = [
        ("model_name", choice.model_name, reasons["model_name"]),
        ("fine-tuning", _method(choice.run), reasons["method"]),
        ("learning_rate", choice.learning_rate, reasons["learning_rate"]),
        ("batch_size", str(choice.batch_size), reasons["batch_size"]),
        ("gradient_accumulation_steps", str(choice.gradient_accumulation_steps), ""),
        ("sequences a step", str(choice.effective_batch), reasons["gradient_accumulation_steps"]),
    ]
    for values in choice.settings.values():
        rows += [(name, str(value), reasons[name]) for name, value in values.items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    gpus = f"{choice.num_gpus} GPU{'s' if choice.num_gpus > 1 else ''} of {choice.gpu_memory:g} GB"
    lines = [f"For {choice.dataset_size:,} images on {gpus}:", ""]
    lines += [f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {reason}".rstrip() for name, value, reason in rows]
    return "\n".join([*lines, "", *memory_table(choice), "", *fits_table(choice)])


def memory_table(choice: Recommendation) -> list[str]:
    """The peak of each phase on one GPU, by what holds it."""
    run = choice.run
    lines = [
        f"Memory of one GPU at its peak, GB (rows of {run.sft_row} tokens in SFT, up to {run.rollout_row} in R-GRPO):",
    ]
    for memory in phases(choice.model, run):
        held = memory.parts | {"reserve": memory.reserve}
        parts = ", ".join(f"{name} {value / GIB:.1f}" for name, value in held.items() if value > 0.05 * GIB)
        lines.append(f"  {memory.phase:<15}  {memory.needed / GIB:>5.1f} of {choice.gpu_memory:g}: {parts}")
    return lines


def fits_table(choice: Recommendation) -> list[str]:
    """What else would fit, each at the recommended batch size."""
    run, rank = choice.run, choice.run.lora_r
    gpus = choice.num_gpus
    others = [replace(run, method="lora", half_weights=False, sharding="ddp")]
    others += [replace(others[0], method="qlora")]
    full = replace(run, method="full", sharding="ddp")
    others += [replace(full, half_weights=True), replace(full, half_weights=False)]
    others += [replace(full, half_weights=False, sharding=kind) for kind in ("zero2", "zero3", "fsdp2") if gpus > 1]
    lines = [f"Needed of one GPU at a batch size of {run.batch_size}, GB:"]
    for other in others:
        memory: Memory = peak(choice.model, other)
        name = _method(replace(other, lora_r=rank)) + (", float32" if other.method == "full" and not
                                                       other.half_weights else "")  # fmt: skip
        verdict = "fits" if memory.needed <= choice.gpu_memory * GIB else "does not fit"
        lines.append(f"  {name:<28}  {memory.needed / GIB:>6.1f}  {verdict} ({memory.phase})")
    return lines


def save_configs(choice: Recommendation, folder: Path, paths: dict[str, str | None]) -> None:
    """Write the four settings files: those of `configs/` with the recommendation over them."""
    shared = {
        "per_device_train_batch_size": choice.batch_size,
        "gradient_accumulation_steps": choice.gradient_accumulation_steps,
        "use_lora": choice.use_lora,
    }
    if choice.use_lora:
        shared |= {"lora_r": choice.lora_r, "lora_alpha": 2 * choice.lora_r}
    further = {
        part: {name: {"true": True, "false": False}.get(value, value) for name, value in values.items()}
        for part, values in choice.settings.items()
    }
    shared |= further["stages"]
    changes = {
        "model": {"model_name": choice.model_name} | further["model"],
        "data": paths,
        "sft": shared | {"learning_rate": float(choice.learning_rate)},
        "grpo": shared | {"num_generations": GROUP_SIZE} | further["grpo"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, change in changes.items():
        values = json.loads((CONFIGS / f"{name}_config.json").read_text(encoding="utf-8")) | change
        if not choice.use_lora:
            values = {key: value for key, value in values.items() if not key.startswith("lora_")}
        (folder / f"{name}_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def count_images(path: Path) -> int:
    """Rows of a JSONL file, one image a row; empty lines do not count."""
    try:
        with path.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    except OSError as error:
        raise ValueError(f"data is {path}, which cannot be read: {error.strerror}") from None


def build_parser() -> CommandParser:
    parser = CommandParser(description="Training settings by dataset size and GPU memory.")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--dataset_size", type=int, help="images in the training data")
    size.add_argument("--data", type=Path, help="training JSONL to count instead; a val.jsonl beside it validates")
    parser.add_argument("--gpu_memory", type=float, required=True, help="memory of one GPU in GB")
    parser.add_argument("--num_gpus", type=int, default=1, help="GPUs of that size [1]")
    parser.add_argument(
        "--model_name",
        help=f"built-in model, folder, or config.json [{DEFAULT_MODEL}; the 3B below 24 GB]",
    )
    parser.add_argument("--method", choices=list(METHODS), help="keep to this method [by dataset size and memory]")
    parser.add_argument("--sharding", choices=["ddp", "zero2", "zero3", "fsdp2"], help="how several GPUs share weights")
    parser.add_argument("--batch_size", type=int, help="keep to this many sequences a device")
    parser.add_argument(
        "--gradient_checkpointing",
        type=lambda text: convert("gradient_checkpointing", text, bool),
        default=True,
        metavar="true|false",
        help="recompute activations in the backward pass [true]",
    )
    lengths = parser.add_argument_group("lengths in tokens that the memory is counted for")
    for name, help in LENGTHS.items():
        lengths.add_argument(
            f"--{name}", type=int, default=getattr(Run(), name), help=f"{help} [{getattr(Run(), name)}]"
        )
    time = parser.add_argument_group("hours, from what was measured")
    time.add_argument("--tokens_per_second", type=float, help="of an update, all GPUs together (--probe reports it)")
    time.add_argument("--rollout_tokens_per_second", type=float, help="of one GPU's rollouts (the training log has it)")
    probe = parser.add_argument_group("a trial run on this machine")
    probe.add_argument("--probe", choices=["sft", "grpo"], help="train two steps: the largest batch size that fits")
    probe.add_argument("--memory_limit", type=float, help="GB that the probe may use [--gpu_memory]")
    probe.add_argument("--image_base_path", default=PATHS["image_base_path"], help="folder of the images")
    parser.add_argument("--show_command", action="store_true", help="print only the training command")
    parser.add_argument("--save_configs", type=Path, metavar="DIR", help="write the four settings files there")
    return parser


LENGTHS = {
    "prompt_tokens": "prompt, its image among them",
    "image_tokens": "image of the prompt: one for 28 x 28 pixels",
    "crops": "number of crops",
    "crop_tokens": "each crop",
    "answer_tokens": "annotated answer without crops",
    "max_completion_length": "sampled tokens of a rollout",
}


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    try:
        run(parser.parse_args(argv))
    except ValueError as error:
        parser.exit(2, f"configure_training.py: {error}\n")


def _probe(
    choice: Recommendation, paths: dict[str, str | None], args: argparse.Namespace
) -> tuple[Recommendation, float]:
    """The recommendation at the largest batch size that two real steps fit, and the tokens a second that they made."""
    from probe import largest_batch

    if choice.run.sharding != "ddp":
        raise ValueError(
            f"--probe runs on one GPU, but {choice.run.sharding} cuts the weights up over {choice.num_gpus}: leave "
            "--probe out, or give --sharding ddp"
        )
    train_data = {name: path for name, path in paths.items() if name != "val_data"}

    def flags(batch_size: int) -> list[str]:
        trial = replace(choice, run=with_batch(choice.run, batch_size))
        words = training_flags(trial, train_data, args.probe)
        return [*words, *([] if "--model_name" in words else ["--model_name", choice.model_name])]

    most = args.batch_size or max(1, EFFECTIVE_BATCH // choice.num_gpus)
    trial = largest_batch(args.probe, flags, most, args.memory_limit or args.gpu_memory)
    run = with_batch(choice.run, trial.batch_size)
    reasons = choice.reasons | {"batch_size": f"the largest of 1 to {most} at which two steps of {args.probe} fit here"}
    reasons["gradient_accumulation_steps"] = _steps_reason(run)
    return replace(choice, run=run, reasons=reasons), trial.tokens_per_second * choice.num_gpus


def run(args: argparse.Namespace) -> None:
    paths: dict[str, str | None] = {**PATHS, "image_base_path": args.image_base_path}
    if args.data:
        beside = args.data.with_name("val.jsonl")
        paths |= {"train_data": str(args.data), "val_data": str(beside) if beside.is_file() else None}
    dataset_size = count_images(args.data) if args.data else args.dataset_size
    require(dataset_size > 0 or not args.data, f"data is {args.data}, which is empty")
    lengths = {name: getattr(args, name) for name in LENGTHS}
    lengths = Run(gradient_checkpointing=args.gradient_checkpointing, **lengths)
    choice = recommend(
        dataset_size,
        args.gpu_memory,
        args.num_gpus,
        args.model_name,
        args.method,
        args.sharding,
        lengths,
        args.batch_size,
    )
    time: dict[str, float] = {}
    if args.probe:
        choice, args.tokens_per_second = _probe(choice, paths, args)
    if args.probe == "grpo":
        time = probed_hours(choice, args.tokens_per_second)
    elif args.tokens_per_second:
        time = hours(choice, args.tokens_per_second, args.rollout_tokens_per_second)
    if not args.show_command:
        print(table(choice))
        for stage, value in time.items():
            print(f"{stage}: {value:.1f} hours at the measured throughput")
        print("\n--show_command prints the command, --save_configs DIR writes settings files.")
    if args.save_configs:
        save_configs(choice, args.save_configs, paths)
    if args.show_command or args.save_configs:
        print(training_command(choice, paths, args.save_configs))


if __name__ == "__main__":
    main()
