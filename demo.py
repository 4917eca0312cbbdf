"""The embedded default: a small Qwen2.5-VL learns to look, in both stages, with the code that trains a 7B.

    make demo        (or: python demo.py [--full])

It draws pictures, writes them as image files and JSONL, makes a tiny base model, and then runs the ordinary
commands on them. The stripes asked for cannot be seen in the model's overview, only in a crop.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Threads that spin while they wait slow each other down many times over where another program uses a core too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class DemoPlan:
    """How long the demo trains; `make demo` stays below 20 minutes on two cores, `make demo-full` below an hour."""

    pictures: int = 2000
    warm_up_steps: int = 500
    probe_steps: int = 150
    sft_steps: int = 1650
    sft_warmup_steps: int = 50
    sft_eval_steps: int = 165  # shapes the order of batches, and with it when the model begins to find the shape
    sft_schedule: str = "constant_with_warmup"  # half-trained: what R-GRPO starts from has not settled
    grpo_steps: int = 180
    test_pictures: int = 200
    sampled_answers: int = 2  # sampled answers a question

    def stage_flags(self) -> list[str]:
        """Settings of the two stages, as flags of train_qwenvl_25.py."""
        flags = {
            "sft_max_steps": self.sft_steps,
            "sft_batch_size": 32,
            "sft_gradient_accumulation_steps": 1,
            "learning_rate": 1.5e-3,
            "sft_lr_scheduler_type": self.sft_schedule,
            "sft_warmup_steps": self.sft_warmup_steps,
            "sft_eval_steps": self.sft_eval_steps,
            "sft_adam_beta2": 0.98,
            "sft_dataloader_num_workers": 1,
            "sft_dataloader_persistent_workers": "true",
            "grpo_max_steps": self.grpo_steps,
            "grpo_batch_size": 128,
            "grpo_gradient_accumulation_steps": 1,
            "grpo_rollout_batch_size": 128,
            "grpo_learning_rate": 3e-4,
            "grpo_lr_scheduler_type": "constant_with_warmup",
            "grpo_warmup_ratio": 0.05,
            "beta": 0.02,
            "max_completion_length": 64,
            "grpo_logging_steps": 5,
            "watch_every": 60,
            "keep_rollouts_every": 60,
            "gradient_checkpointing": "false",
        }
        return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


QUICK = DemoPlan()
FULL = DemoPlan(sft_steps=3300, grpo_steps=300)


def make_world(folder: Path, plan: DemoPlan, seed: int) -> None:
    """Pictures and JSONL in `data`, the base model in `base_model`, and the gate that the overview tells nothing."""
    import demo_model
    import demo_world
    from crop_tool import CropContract

    demo_world.write_dataset(folder / "data", plan.pictures, seed, num_val=40, num_test=plan.test_pictures)
    processor = demo_model.build_processor()
    model = demo_model.build_model(processor, seed)
    demo_model.warm_up_vision(model, processor, plan.warm_up_steps, seed)
    leak = demo_model.leak_probe(model, processor, plan.probe_steps, seed, num_pictures=400)
    demo_model.assert_no_leak(leak)
    print(
        f"leak gate: the vision tower reads the stripes from the overview at {leak.overview_accuracy:.1%} "
        f"(chance 16.7%), from a crop at {leak.crop_accuracy:.1%}"
    )
    base = folder / "base_model"
    model.save_pretrained(base)
    processor.save_pretrained(base)
    side = demo_world.OVERVIEW_SIDE
    CropContract(
        image_shorter_side=side,
        crop_shorter_side=side,
        max_pixels=4 * side * side,
        factor=demo_world.MERGED_PATCH,
        system_prompt=demo_world.SYSTEM_PROMPT,
    ).save(base)


def train_command(folder: Path, plan: DemoPlan, seed: int) -> list[str]:
    """The ordinary training command on the demo's data."""
    return [
        "train_qwenvl_25.py",
        *("--stage", "both", "--model_name", f"{folder}/base_model"),
        *("--train_data", f"{folder}/data/train.jsonl", "--val_data", f"{folder}/data/val.jsonl"),
        *("--image_base_path", f"{folder}/data"),
        *("--sft_output_dir", f"{folder}/sft", "--grpo_output_dir", f"{folder}/grpo", "--seed", str(seed)),
        *plan.stage_flags(),
    ]


def run(command: list[str]) -> None:
    """Show and run one of the project's commands."""
    print(f"\n$ python {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], check=True)


# ------------------------------------------------------------------------------------------- evaluation


def evaluate(model_path: Path, data: Path, plan: DemoPlan, seed: int) -> dict[str, float]:
    """Held-out accuracy: greedy and sampled with crops, greedy with blank crops and with crops off; mean IoU."""
    from benchmark_data import read_questions
    from config import InferenceConfig
    from evaluate import ask
    from generation import SamplingParams
    from inference import QwenVLInference
    from measures import Measured, measure

    inference = QwenVLInference(InferenceConfig(str(model_path), batch_size=256, dtype="float32"))
    questions = {question.name: question for question in read_questions(data / "test.jsonl", data).questions}

    def measured(count: int = 1, **settings: Any) -> list[Measured]:
        sampling = SamplingParams(max_new_tokens=64, seed=seed, **settings)
        answers = list(ask(inference.engine, list(questions.values()), sampling, count))
        return measure(questions, answers, inference.renderer.contract)

    def accuracy(items: list[Measured]) -> float:
        return sum(item.figures["accuracy"] == 1.0 for item in items) / len(items)

    greedy = measured(temperature=0.0)
    return {
        "accuracy": accuracy(greedy),
        "sampled_accuracy": accuracy(measured(plan.sampled_answers, temperature=1.0)),
        "accuracy_blank_crops": accuracy(measured(temperature=0.0, crops="blank")),
        "accuracy_no_crops": accuracy(measured(temperature=0.0, crops="off")),
        "mean_iou": sum(item.figures["iou"] for item in greedy) / len(greedy),
        "questions": len(questions),
    }


def save_traces(model_path: Path, data: Path, folder: Path, seed: int, count: int = 5) -> None:
    """Pages of some held-out answers, greedy."""
    from benchmark_data import read_questions
    from config import InferenceConfig
    from evaluate import ask, trace_of
    from inference import QwenVLInference
    from measures import measure
    from traces import save_trace

    inference = QwenVLInference(InferenceConfig(str(model_path), temperature=0.0, max_new_tokens=64, dtype="float32"))
    chosen = random.Random(seed).sample(read_questions(data / "test.jsonl", data).questions, count)
    contract = inference.renderer.contract
    answers = list(ask(inference.engine, chosen, inference.sampling))
    items = measure({question.name: question for question in chosen}, answers, contract)
    for number, item in enumerate(items, start=1):
        save_trace(folder / f"answer_{number}.html", [trace_of(item, contract)])


# ----------------------------------------------------------------------------------------------- report

COLUMNS = {
    "accuracy": "greedy",
    "sampled_accuracy": "sampled",
    "accuracy_blank_crops": "blank crops",
    "accuracy_no_crops": "crops off",
    "mean_iou": "IoU",
}


def table(metrics: dict[str, Any]) -> str:
    """The figures of both stages, side by side."""
    names = {"sft": "after SFT", "grpo": "after R-GRPO"}
    lines = [f"{'':<14}" + "".join(f"{title:>13}" for title in COLUMNS.values())]
    for stage, name in names.items():
        values = metrics[stage]
        lines.append(f"{name:<14}" + "".join(f"{values[key]:>13.{2 if key == 'mean_iou' else 3}f}" for key in COLUMNS))
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in metrics["seconds"].items())
    return "\n".join([*lines, f"{metrics['sft']['questions']} held-out questions, chance 0.167; seconds: {seconds}"])


def stage_seconds(folder: Path) -> float:
    log = json.loads((folder / "training_log.json").read_text(encoding="utf-8"))
    return next(item["train_runtime"] for item in reversed(log["history"]) if "train_runtime" in item)


def clear(folder: Path) -> None:
    """Make the demo's folder anew; a folder that is not the demo's own is left alone."""
    marker = folder / ".made-by-demo"
    if folder.exists() and any(folder.iterdir()) and not marker.is_file():
        raise SystemExit(f"demo.py: {folder} exists and is not the demo's: give --output an empty or new folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()


def run_demo(folder: Path, plan: DemoPlan, seed: int) -> dict[str, Any]:
    """Make the world, train both stages with the ordinary command, and measure; returns the metrics."""
    from visualize import plot_training_curves

    clear(folder)
    seconds, started = {}, time.perf_counter()
    make_world(folder, plan, seed)
    seconds["set_up"] = time.perf_counter() - started
    run(train_command(folder, plan, seed))
    metrics: dict[str, Any] = {}
    started = time.perf_counter()
    history = {}
    for stage in ("sft", "grpo"):
        seconds[stage] = stage_seconds(folder / stage)
        metrics[stage] = evaluate(folder / stage / "final_model", folder / "data", plan, seed)
        log = json.loads((folder / stage / "training_log.json").read_text(encoding="utf-8"))
        history[stage] = log["history"]
    plot_training_curves(history, folder / "training_curves.png")
    save_traces(folder / "grpo" / "final_model", folder / "data", folder / "traces", seed)
    seconds["evaluation"] = time.perf_counter() - started
    metrics["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--full", action="store_true", help="train longer: 85%% or more, in up to an hour")
    parser.add_argument("--output", default="outputs/demo", metavar="DIR", help="where all of it goes [outputs/demo]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same table [0]")
    options = parser.parse_args(argv)
    folder = Path(options.output)
    metrics = run_demo(folder, FULL if options.full else QUICK, options.seed)
    with open(folder / "data" / "test.jsonl", encoding="utf-8") as file:
        row = json.loads(file.readline())
    run(
        [
            "inference.py",
            *("--model_path", f"{folder}/grpo/final_model", "--image_path", f"{folder}/data/{row['image_path']}"),
            *("--question", row["QnA"][0]["Q"], "--temperature", "0"),
            *("--save_trace", f"{folder}/answer.html", "--output_json", f"{folder}/answer.json"),
        ]
    )
    print(f"\n{table(metrics)}\n\npictures: {folder}/training_curves.png, {folder}/answer.html, {folder}/traces/")


if __name__ == "__main__":
    main()
