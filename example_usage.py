"""What the project does, in seven short pieces that run on the demo's model (`make demo` makes it).

python example_usage.py                 # all of them
python example_usage.py one_answer      # one
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from config import use_one_gpu

DEMO = Path("outputs/demo")


def load_inference(demo: Path) -> Any:
    """The trained model, with greedy answers."""
    from config import InferenceConfig
    from inference import QwenVLInference

    config = InferenceConfig(model_path=f"{demo}/grpo/final_model", max_new_tokens=64, temperature=0.0)
    return QwenVLInference(config)


def questions(demo: Path, count: int) -> list[tuple[Path, str, str]]:
    """Image, question and expected answer of some held-out pictures."""
    rows = [json.loads(line) for line in (demo / "data/test.jsonl").read_text(encoding="utf-8").splitlines()[:count]]
    return [
        (demo / "data" / row["image_path"], row["QnA"][0]["Q"], row["QnA"][0]["A3"].split("<answer>")[1].split("<")[0])
        for row in rows
    ]


def one_answer(demo: Path) -> None:
    """Ask about one image."""
    image, question, expected = questions(demo, 1)[0]
    result = load_inference(demo).generate(image=image, question=question)
    print(f"{question}\n{result.think_content}\n-> {result.answer_content} (expected {expected})")


def batch(demo: Path) -> None:
    """Ask many questions side by side; the images may have any sizes."""
    asked = questions(demo, 8)
    results = load_inference(demo).batch_generate([image for image, _, _ in asked], [text for _, text, _ in asked])
    for (_, _, expected), result in zip(asked, results, strict=True):
        print(f"{result.answer_content:<12} expected {expected}")


def follow_up(demo: Path) -> None:
    """Go on from an answer, with the image and its crops still in view."""
    image, question, _ = questions(demo, 1)[0]
    inference = load_inference(demo)
    first = inference.generate(image, question)
    second = inference.follow_up(first, question)
    print(f"first: {first.answer_content}; then: {second.answer_content}, after {len(second.prompt.images)} images")


def crops(demo: Path) -> None:
    """Look at what the model looked at: boxes in pixels of the original image, and the crops themselves."""
    image, question, _ = questions(demo, 1)[0]
    result = load_inference(demo).generate(image, question)
    for call, crop in zip(result.tool_calls, result.crops, strict=True):
        print(call.outcome, call.box, "shown as", crop.size if crop else None)
    result.save_trace(demo / "example_trace.html")
    print(f"see {demo}/example_trace.html")


def check_data(demo: Path) -> None:
    """Check a training file, as `python data_utils.py --check` does."""
    from config import DataConfig
    from data_utils import run_check

    data = DataConfig(train_data=f"{demo}/data/val.jsonl", image_base_path=f"{demo}/data")
    run_check(data, model_name=f"{demo}/base_model", bad_rows=f"{demo}/bad_rows.jsonl")


def train_from_python(demo: Path) -> None:
    """A few steps of SFT with a LoRA adapter, from Python instead of the shell."""
    from command_line import resolve_training
    from train_sft import run_sft

    settings = resolve_training(
        {
            "model_name": f"{demo}/base_model",
            "train_data": f"{demo}/data/train.jsonl",
            "image_base_path": f"{demo}/data",
            "output_dir": f"{demo}/example_sft",
            "use_lora": True,
            "lora_r": 8,
            "max_steps": 3,
            "batch_size": 4,
            "gradient_accumulation_steps": 1,
            "resume": False,
        },
        stages=("sft",),
    )
    print(f"trained {run_sft(settings)}")


def own_reward(demo: Path) -> None:
    """R-GRPO with a reward of one's own beside the built-in ones: here, short reasoning."""
    from command_line import resolve_training
    from model_utils import load_for_training
    from rewards import RewardPart, reward_parts
    from train_grpo import build_trainer
    from training import train

    def brevity(response: Any, reference: Any) -> float:
        return 1.0 / (1.0 + len(response.think_content) / 100)

    settings = resolve_training(
        {
            "sft_checkpoint": f"{demo}/sft/final_model",
            "train_data": f"{demo}/data/train.jsonl",
            "image_base_path": f"{demo}/data",
            "output_dir": f"{demo}/example_grpo",
            "max_steps": 2,
            "batch_size": 16,
            "gradient_accumulation_steps": 1,
            "max_completion_length": 64,
            "logging_steps": 1,
            "resume": False,
        },
        stages=("grpo",),
    )
    config = settings.grpo
    loaded = load_for_training(settings.model, settings.data, config, config.sft_checkpoint)
    trainer = build_trainer(loaded, settings, (*reward_parts("balanced"), RewardPart("brevity", brevity, 0.2)))
    train(trainer, settings, "grpo")
    log = next(line for line in trainer.state.log_history if "rewards/brevity/mean" in line)
    print({key: value for key, value in log.items() if key.startswith("rewards/")})


EXAMPLES = {
    function.__name__: function
    for function in (one_answer, batch, follow_up, crops, check_data, train_from_python, own_reward)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run: {', '.join(EXAMPLES)} [all]")
    parser.add_argument("--demo", default=DEMO, type=Path, metavar="DIR", help=f"the demo's folder [{DEMO}]")
    options = parser.parse_args()
    use_one_gpu()
    unknown = set(options.names) - set(EXAMPLES)
    if unknown:
        parser.error(f"there is no example {', '.join(sorted(unknown))}; there are: {', '.join(EXAMPLES)}")
    if not (options.demo / "grpo/final_model").is_dir():
        parser.error(f"there is no trained model in {options.demo}: run `make demo` first")
    for name in options.names or EXAMPLES:
        print(f"\n--- {name}: {EXAMPLES[name].__doc__}")
        EXAMPLES[name](options.demo)


if __name__ == "__main__":
    main()
