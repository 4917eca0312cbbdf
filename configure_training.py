"""Settings by dataset size and GPU memory.

python configure_training.py --dataset_size 40000 --gpu_memory 32 --show_command
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

DEFAULT_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
SMALL_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
# Gigabytes of the weights alone in bfloat16.
WEIGHTS_GB = {
    "Qwen/Qwen2.5-VL-3B-Instruct": 7.5,
    "Qwen/Qwen2.5-VL-7B-Instruct": 16.6,
    "Qwen/Qwen2.5-VL-32B-Instruct": 66.9,
    "Qwen/Qwen2.5-VL-72B-Instruct": 146.8,
}
EFFECTIVE_BATCH = 32  # sequences an optimizer step
GROUP_SIZE = 8  # rollouts a prompt in R-GRPO: it must divide the effective batch
FULL_FINE_TUNING_GB = 80
# (from this much memory on, sequences a device and micro-batch)
LORA_BATCHES = ((80, 16), (32, 8), (24, 4), (16, 2), (8, 1))
CONFIGS = Path(__file__).parent / "configs"
PATHS = {"train_data": "data/train.jsonl", "val_data": "data/val.jsonl", "image_base_path": "data/images"}


@dataclass(frozen=True)
class Recommendation:
    """What to train with. `reasons` explains each choice by its name."""

    dataset_size: int
    gpu_memory: float  # GB of one GPU
    num_gpus: int
    model_name: str
    use_lora: bool
    lora_r: int | None  # None: full fine-tuning
    learning_rate: str  # as written in a command: 2e-5
    batch_size: int
    gradient_accumulation_steps: int
    reasons: dict[str, str]

    @property
    def effective_batch(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps * self.num_gpus


def recommend(dataset_size: int, gpu_memory: float, num_gpus: int = 1, model_name: str | None = None) -> Recommendation:
    """Settings for so many images on so many GPUs of `gpu_memory` GB each.

    Raises:
        ValueError: where nothing can be recommended, saying what was given and what to do.
    """
    _check(dataset_size, gpu_memory, num_gpus)
    model_name, model_reason = _choose_model(model_name, gpu_memory)
    use_lora, lora_r, learning_rate, method_reason = _choose_method(dataset_size, gpu_memory, model_name)
    batch_size, accumulation = _choose_batch(gpu_memory, num_gpus, use_lora)
    batch_reason = f"{gpu_memory:g} GB" if use_lora else f"{gpu_memory:g} GB; gradients and Adam fill most of it"
    return Recommendation(
        dataset_size,
        gpu_memory,
        num_gpus,
        model_name,
        use_lora,
        lora_r,
        learning_rate,
        batch_size,
        accumulation,
        reasons={
            "model_name": model_reason,
            "method": method_reason,
            "learning_rate": "for the SFT stage; R-GRPO keeps its own 5e-6",
            "batch_size": f"sequences a device: {batch_reason}",
            "gradient_accumulation_steps": f"{batch_size} x {accumulation} x {num_gpus} GPU: the group of "
            f"{GROUP_SIZE} rollouts divides it",
        },
    )


def _check(dataset_size: int, gpu_memory: float, num_gpus: int) -> None:
    if dataset_size < 1:
        raise ValueError(f"dataset_size is {dataset_size}, but it counts images: give 1 or more")
    if not 8 <= gpu_memory < math.inf:
        raise ValueError(
            f"gpu_memory is {gpu_memory:g} GB, but the weights of the smallest model, {SMALL_MODEL}, take "
            f"{WEIGHTS_GB[SMALL_MODEL]} GB alone: use a GPU of 8 GB or more (16 GB to be at ease)"
        )
    if num_gpus < 1:
        raise ValueError(f"num_gpus is {num_gpus}, but training needs at least 1")


def _choose_model(model_name: str | None, gpu_memory: float) -> tuple[str, str]:
    if model_name is None:
        if gpu_memory >= 24:
            return DEFAULT_MODEL, "the default"
        return (
            SMALL_MODEL,
            f"the 7B's weights alone take {WEIGHTS_GB[DEFAULT_MODEL]} GB, {gpu_memory:g} GB are there",
        )
    if model_name in WEIGHTS_GB and WEIGHTS_GB[model_name] >= gpu_memory:
        raise ValueError(
            f"model_name is {model_name}, whose weights take {WEIGHTS_GB[model_name]} GB in bfloat16, "
            f"but gpu_memory is {gpu_memory:g} GB: choose a smaller model or a larger GPU"
        )
    return model_name, "as given"


def _choose_method(dataset_size: int, gpu_memory: float, model_name: str) -> tuple[bool, int | None, str, str]:
    """(use_lora, lora_r, learning rate, reason): more data carries more trained weights, at a lower rate."""
    if dataset_size < 10_000:
        return True, 64, "2e-5", "under 10k images: a small adapter does not learn them by heart"
    if dataset_size < 50_000:
        return True, 128, "2e-5", "10k to 50k images carry a larger adapter"
    # Weights, gradients and Adam's two states, all in bfloat16.
    needed = max(FULL_FINE_TUNING_GB, 4 * WEIGHTS_GB.get(model_name, 0))
    has_memory = gpu_memory >= needed
    if dataset_size <= 100_000:
        choice = "; full fine-tuning at 5e-6 would fit as well" if has_memory else ""
        return True, 256, "1e-5", f"50k to 100k images: a large adapter at a lower rate{choice}"
    if has_memory:
        return (
            False,
            None,
            "5e-6",
            "over 100k images and the memory: all weights, in bfloat16, which rounds small updates away; float32 takes "
            "twice that (several GPUs and ZeRO-2), leave --dtype out there (--beta 0 spares R-GRPO a second copy)",
        )
    return (
        True,
        256,
        "1e-5",
        f"over 100k images, but training all weights takes {needed:g} GB or more",
    )


def _choose_batch(gpu_memory: float, num_gpus: int, use_lora: bool) -> tuple[int, int]:
    """(sequences a device, accumulation steps): rules of thumb for some 450 image tokens and two crops."""
    fits = next(batch for memory, batch in LORA_BATCHES if gpu_memory >= memory)
    if not use_lora:
        fits //= 4
    batch_size = min(fits, max(1, EFFECTIVE_BATCH // num_gpus))
    accumulation = math.ceil(EFFECTIVE_BATCH / (batch_size * num_gpus))
    while batch_size * accumulation * num_gpus % GROUP_SIZE:
        accumulation += 1
    return batch_size, accumulation


# ----------------------------------------------------------------------------------------------- output


def training_command(choice: Recommendation, paths: dict[str, str], config_dir: Path | None = None) -> str:
    """The command that trains with these settings; with `config_dir` they come from its files."""
    launcher = ["python"] if choice.num_gpus == 1 else ["torchrun", "--nproc_per_node", str(choice.num_gpus)]
    words = [*launcher, "train_qwenvl_25.py", "--stage", "both"]
    if config_dir is not None:
        for name in ("model", "data", "sft", "grpo"):
            words += [f"--{name}_config", str(config_dir / f"{name}_config.json")]
        return shlex.join(words)
    for name, path in paths.items():
        words += [f"--{name}", path]
    if choice.model_name != DEFAULT_MODEL:
        words += ["--model_name", choice.model_name]
    words += ["--use_lora", "--lora_r", str(choice.lora_r)] if choice.use_lora else ["--dtype", "bfloat16"]
    words += ["--learning_rate", choice.learning_rate, "--batch_size", str(choice.batch_size)]
    words += ["--gradient_accumulation_steps", str(choice.gradient_accumulation_steps), "--bf16"]
    return shlex.join(words)


def table(choice: Recommendation) -> str:
    """The recommendation with the reason for each choice, to be read."""
    reasons = choice.reasons
    method = f"LoRA, r {choice.lora_r}" if choice.use_lora else "full, in bfloat16"
    rows = [
        ("model_name", choice.model_name, reasons["model_name"]),
        ("fine-tuning", method, reasons["method"]),
        ("learning_rate", choice.learning_rate, reasons["learning_rate"]),
        ("batch_size", str(choice.batch_size), reasons["batch_size"]),
        ("gradient_accumulation_steps", str(choice.gradient_accumulation_steps), ""),
        ("sequences a step", str(choice.effective_batch), reasons["gradient_accumulation_steps"]),
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    gpus = f"{choice.num_gpus} GPU{'s' if choice.num_gpus > 1 else ''} of {choice.gpu_memory:g} GB"
    lines = [f"For {choice.dataset_size:,} images on {gpus}:", ""]
    lines += [f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {reason}".rstrip() for name, value, reason in rows]
    lines += [
        "",
        "Batch sizes are rules of thumb: halve batch_size and double gradient_accumulation_steps if memory",
    ]
    return "\n".join([*lines, "runs out. --show_command prints the command, --save_configs DIR writes settings files."])


def save_configs(choice: Recommendation, folder: Path, paths: dict[str, str]) -> None:
    """Write the four settings files: those of `configs/` with the recommendation over them."""
    shared = {
        "per_device_train_batch_size": choice.batch_size,
        "gradient_accumulation_steps": choice.gradient_accumulation_steps,
        "use_lora": choice.use_lora,
    }
    if choice.use_lora:
        shared |= {"lora_r": choice.lora_r, "lora_alpha": 2 * choice.lora_r}
    changes = {
        "model": {"model_name": choice.model_name} | ({} if choice.use_lora else {"dtype": "bfloat16"}),
        "data": paths,
        "sft": shared | {"learning_rate": float(choice.learning_rate)},
        "grpo": shared | {"num_generations": GROUP_SIZE},
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Training settings by dataset size and GPU memory.")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--dataset_size", type=int, help="images in the training data")
    size.add_argument("--data", type=Path, help="training JSONL to count instead")
    parser.add_argument("--gpu_memory", type=float, required=True, help="memory of one GPU in GB")
    parser.add_argument("--num_gpus", type=int, default=1, help="GPUs of that size [1]")
    parser.add_argument("--model_name", help=f"model to train [{DEFAULT_MODEL}; the 3B below 24 GB]")
    parser.add_argument("--show_command", action="store_true", help="print only the training command")
    parser.add_argument("--save_configs", type=Path, metavar="DIR", help="write the four settings files there")
    args = parser.parse_args(argv)
    paths = PATHS | ({"train_data": str(args.data)} if args.data else {})
    try:
        dataset_size = count_images(args.data) if args.data else args.dataset_size
        choice = recommend(dataset_size, args.gpu_memory, args.num_gpus, args.model_name)
    except ValueError as error:
        parser.exit(2, f"configure_training.py: {error}\n")
    if not args.show_command:
        print(table(choice))
    if args.save_configs:
        save_configs(choice, args.save_configs, paths)
    if args.show_command or args.save_configs:
        print(training_command(choice, paths, args.save_configs))


if __name__ == "__main__":
    main()
