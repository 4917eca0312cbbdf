"""Scoring and update of R-GRPO: a prompt computed once and images encoded once, against TRL's passes row by row.

    python benchmarks/bench_grpo_step.py --json grpo_step.json

Both sides score the same rollouts (forced tokens; a group of 8, two crops of 150 tokens each) in the same trainer and
on the same weights: reference pass, the update's forward and its backward pass; that loss and gradient agree is checked
first. The rollouts themselves are not timed here, see bench_rollout.py.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import Counts, arguments, build_model, build_renderer, build_response, counted, medians, report, side
from PIL import Image

import train_grpo
import trainers
from command_line import resolve_training
from model_utils import load_for_training
from rewards import RewardPart
from trainers import CropGRPOTrainer


class RowByRow(CropGRPOTrainer):
    """TRL's own scoring: each row with its prompt, and a run of the vision tower in every pass."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.keeps_features = self.shares_prompts = False


def write_world(folder: Path, args: Any) -> None:
    """A random model with its contract, and questions of 550 tokens about a picture of 450."""
    renderer = build_renderer()
    model = build_model(args.shape, renderer, args.device)
    model.save_pretrained(folder / "model")
    renderer.processor.save_pretrained(folder / "model")
    renderer.contract.save(folder / "model")
    Image.effect_noise((700, 504), 90).convert("RGB").save(folder / "noise.png")
    missing = 550 - len(renderer.prompt("", Image.open(folder / "noise.png")).ids)
    answer = "<think>\n{Crop it [0, 0, 420, 280]}\n</think>\n\n<answer>red</answer>"
    row = {"image_path": "noise.png", "QnA": [{"Q": " red" * missing, "A3": answer}]}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


def build_trainer(folder: Path, kind: type[CropGRPOTrainer], args: Any) -> CropGRPOTrainer:
    on_gpu = args.device != "cpu"
    flags = {
        "sft_checkpoint": f"{folder}/model", "train_data": f"{folder}/train.jsonl", "image_base_path": str(folder),
        "output_dir": f"{folder}/out", "max_steps": 1, "batch_size": args.group, "num_generations": args.group,
        "gradient_accumulation_steps": 1, "max_completion_length": args.tokens, "max_length": 8192, "beta": 0.02,
        "gradient_checkpointing": str(on_gpu).lower(), "resume": "false", "disable_tqdm": True,
        "watch_every": 0, "keep_rollouts_every": 0,
        **({"use_lora": "true", "bf16": "true"} if on_gpu else {"use_cpu": True}),
    }  # fmt: skip
    settings = resolve_training(flags, ("grpo",))
    loaded = load_for_training(settings.model, settings.data, settings.grpo, f"{folder}/model")
    variety = RewardPart("variety", lambda response, reference: len(response.text) % 7 / 7)
    trainers.CropGRPOTrainer = kind
    trainer = train_grpo.build_trainer(loaded, settings, (variety,))
    trainer.current_gradient_accumulation_steps = 1  # what the training loop would have set
    trainer.model.train()
    return trainer


class Update:
    """Scoring and update of one group whose rollouts are given."""

    def __init__(self, trainer: CropGRPOTrainer, args: Any) -> None:
        self.trainer, self.loss = trainer, 0.0
        self.batch = next(iter(trainer.get_train_dataloader()))
        engine = trainer.engine
        scripts = [build_response(engine.renderer, n, args.tokens - 3 * n, args.crops) for n in range(args.group)]
        generate, self.rollouts = engine.generate, None

        def once(*given: Any, **settings: Any) -> list:
            if self.rollouts is None:
                self.rollouts = generate(*given, forced=scripts, **{**settings, "keep_features": True})
            return self.rollouts

        engine.generate = once

    def __call__(self) -> None:
        self.trainer.model.zero_grad()
        inputs = self.trainer._generate_and_score_completions([dict(row) for row in self.batch])
        loss = self.trainer.compute_loss(self.trainer.model, inputs)
        self.trainer.accelerator.backward(loss)
        self.loss = loss.item()

    def gradient(self) -> torch.Tensor:
        values = [value.grad.float().flatten() for value in self.trainer.model.parameters() if value.grad is not None]
        return torch.cat(values)


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--group", type=int, default=8, help="rollouts of the prompt")
    parser.add_argument("--crops", type=int, default=2, help="crops of a rollout")
    parser.add_argument("--tokens", type=int, default=200, help="sampled tokens of a rollout")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = {"row by row": RowByRow, "shared and kept": CropGRPOTrainer}
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder), args)
        updates = {name: Update(build_trainer(Path(folder), kind, args), args) for name, kind in names.items()}
        firsts: dict[str, Counts] = {}
        for name, update in updates.items():  # makes the rollouts, and warms up
            with counted(update.trainer.engine.base) as firsts[name], counted_reference(update, firsts[name]):
                update()
    counts, gradients, peaks = {}, {}, {}
    for name, update in updates.items():
        model = update.trainer.engine.base
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        with counted(model) as counts[name], counted_reference(update, counts[name]):
            update()
        peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if args.device != "cpu" else 0.0
        gradients[name] = update.gradient()
    plain, shared = (gradients[name] for name in names)
    difference = ((plain - shared).norm() / plain.norm()).item()
    assert difference < (1e-3 if args.device == "cpu" else 5e-2), f"gradients differ by {difference:.1e}"
    losses = [updates[name].loss for name in names]
    assert abs(losses[0] - losses[1]) < 1e-4 + 1e-2 * (args.device != "cpu"), f"losses differ: {losses}"
    times = medians({name: updates[name] for name in names}, args.repeats, args.device)
    rows = [side(name, times, counts[name]) | {"image tokens": counts[name].image_tokens} for name in names]
    if args.device != "cpu":
        rows = [row | {"peak GiB": peaks[name]} for row, name in zip(rows, names, strict=True)]
    rollouts = updates["row by row"].rollouts
    # A loop that re-encodes the prompt and every crop so far after each crop, for each rollout, and twice in training.
    in_rollouts = sum(sum(tokens[: n + 1]) for tokens in map(image_tokens, rollouts) for n in range(len(tokens)))
    ours = firsts["shared and kept"].image_tokens  # rollouts included
    theirs = in_rollouts + counts["row by row"].image_tokens
    report(
        "scoring and update of one group",
        rows,
        args,
        gradient_difference=difference,
        image_tokens_per_step=f"{theirs} against {ours}: {theirs / ours:.1f} times fewer",
    )


@contextmanager
def counted_reference(update: Update, counts: Counts) -> Iterator[None]:
    """Add the passes of the reference model, where it is one of its own."""
    if update.trainer.ref_model is None:
        yield
        return
    with counted(update.trainer.ref_model) as more:
        yield
    counts.prefill_tokens += more.prefill_tokens
    counts.images += more.images
    counts.image_tokens += more.image_tokens


def image_tokens(rollout: Any) -> list[int]:
    return [image.width * image.height // 28**2 for image in rollout.images]


if __name__ == "__main__":
    main()
