"""Both stages from one command: SFT, then R-GRPO from its result.

    python train_qwenvl_25.py --stage both --train_data data/train.jsonl --val_data data/val.jsonl \\
        --image_base_path data/images --use_lora --bf16
"""

from __future__ import annotations

import sys
from pathlib import Path

from command_line import parse_training
from config import TrainingSettings, use_one_gpu


def run_training(settings: TrainingSettings) -> Path:
    """Run the stages that have settings, in order; returns the folder of the last final model."""
    from training import release_memory

    folder = None
    if settings.sft is not None:
        from train_sft import run_sft

        folder = run_sft(settings)
        release_memory()
    if settings.grpo is not None:
        from train_grpo import run_grpo

        folder = run_grpo(settings)
    return folder


def main(argv: list[str]) -> None:
    use_one_gpu()
    if "--demo" in argv:
        from demo import main as run_demo

        run_demo([argument for argument in argv if argument not in ("--demo", "--stage", "both", "--stage=both")])
        return
    settings = parse_training(argv, (__doc__ or "").split("\n")[0])
    settings.show()
    from training import exit_with_message

    with exit_with_message("train_qwenvl_25.py"):
        run_training(settings)


if __name__ == "__main__":
    main(sys.argv[1:])
