"""One epoch of SFT on mixed lengths: samples a second and memory, against TRL's SFTTrainer with its own VLM collator.

    python benchmarks/bench_sft.py --json sft.json
    python benchmarks/bench_sft.py --shape 7b --rows 64 --batch_size 8       # LoRA, bfloat16, on a GPU

Same model, same conversations, same pixels. TRL's side has the crops cut beforehand, as its data format wants them; its
labels are every token but the padding, and each side trains on its own. Before anything is timed both sides must give
the same loss for the same labels. Every timed run is a process of its own, and the sides take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from PIL import Image

from command_line import resolve_training
from conversation import IGNORED, Renderer, load_image
from crop_tool import split_annotations
from data_check import as_example
from model_utils import LoadedModel, lora_config
from sft_data import ROWS, ExampleEncoder
from training import peak_memory, release_memory

SIDES = {
    "trl": "TRL: random batches, padded",
    "padded": "ours: like lengths, padded",
    "packed": "ours: like lengths, padding-free",
}
WORDS = (" red", " blue", " green")


def write_data(folder: Path, renderer: Renderer, count: int) -> None:
    """`count` pictures of 450 tokens with answers of 50 to 800 tokens and 0 to 4 crops of 150."""
    dice = np.random.default_rng(0)
    assert all(len(renderer.text_ids(word)) == 1 for word in WORDS)
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            coarse = Image.fromarray(dice.integers(0, 256, (63, 88, 3), np.uint8))
            coarse.resize(common.IMAGE, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
            calls = int(dice.integers(0, 5))
            text = ""
            for part in np.array_split(dice.choice(WORDS, int(dice.integers(50, 801))), calls + 1):
                x, y = int(dice.integers(0, 280)), int(dice.integers(0, 224))
                text += "".join(part) + f" {{Crop it [{x}, {y}, {x + common.CROP[0]}, {y + common.CROP[1]}]}}"
            text = text[: text.rindex(" {Crop")]  # calls stand between the parts
            answer = f"<think>\n{text}\n</think>\n\n<answer>red</answer>"
            row = {"image_path": f"{number}.png", "QnA": [{"Q": "What is there?", "A3": answer}]}
            file.write(json.dumps(row) + "\n")


def settings_for(folder: Path, options: argparse.Namespace, **more: Any) -> Any:
    flags = {
        "train_data": f"{folder}/train.jsonl", "image_base_path": str(folder), "output_dir": f"{folder}/out",
        "batch_size": options.batch_size, "gradient_accumulation_steps": 1, "num_epochs": 1, "save_steps": 10**6,
        "gradient_checkpointing": "false" if options.device == "cpu" else "true", "disable_tqdm": True,
        "logging_steps": 10**6, "use_cpu": options.device == "cpu", **more,
    }  # fmt: skip
    return resolve_training(flags, ("sft",))


def build_trainer(side: str, folder: Path, options: argparse.Namespace) -> Any:
    renderer = common.build_renderer()
    model = common.build_model(options.shape, renderer, options.device)
    settings = settings_for(folder, options, padding_free=side == "packed")
    if options.shape == "mid":
        model.model.visual.requires_grad_(False)
    else:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, lora_config(LoraConfig, settings.model, settings.sft))
    if side == "trl":
        return trl_trainer(model, renderer, folder, settings)
    from train_sft import build_trainer as build

    return build(LoadedModel(model, renderer.processor, renderer.contract), settings)


def trl_trainer(model: Any, renderer: Renderer, folder: Path, settings: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    from training import common_arguments

    arguments = common_arguments(settings.sft) | {"max_length": None} | settings.sft.trl
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments),
        train_dataset=trl_rows(renderer, folder, settings),
        processing_class=renderer.processor,
    )


def trl_rows(renderer: Renderer, folder: Path, settings: Any) -> Any:
    """The same conversations as TRL wants them: messages with places for images, and the images as files."""
    import datasets

    from data_check import load_examples

    encoder, rows = ExampleEncoder(renderer, settings.data), []
    for number, row in enumerate(load_examples(settings.data.train_data, settings.data, renderer, f"{folder}/bad")):
        example = as_example(row)
        encoded = encoder.encode(example, load_image(example.image_path, folder))
        paths = []
        for place, image in enumerate(encoded.images):
            paths.append(f"{folder}/shown-{number}-{place}.png")
            image.save(paths[-1])
        own = [label for label in encoded.labels if label != IGNORED]
        texts = renderer.tokenizer.decode(own[:-1]).split("</tool_call>")
        content = []
        for text in texts[:-1]:
            content += [{"type": "text", "text": text + "</tool_call>"}, {"type": "image", "text": None}]
        assert len(texts) == len(split_boxes(example)) + 1 == len(paths)
        messages = [
            {"role": "system", "content": [{"type": "text", "text": renderer.contract.system_text()}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.question}]},
            {"role": "assistant", "content": [*content, {"type": "text", "text": texts[-1]}]},
        ]
        rows.append({"images": paths, "messages": messages})
    table = datasets.Dataset.from_list(rows)
    return table.cast_column("images", datasets.List(datasets.Image()))


def split_boxes(example: Any) -> list:
    return [part for part in split_annotations(example.response) if not isinstance(part, str)]


def check_equal(folder: Path, options: argparse.Namespace) -> float:
    """The largest relative difference between the three sides' losses on one batch with the same labels."""
    ours, packed, theirs = (build_trainer(side, folder, options) for side in ("padded", "packed", "trl"))
    own = ours.data_collator([ours.train_dataset[index] for index in range(2)])
    other = theirs.data_collator([theirs.train_dataset[index] for index in range(2)])
    labels = torch.full_like(other["labels"], IGNORED)
    for row, (ids, mask) in enumerate(zip(own["input_ids"], own["attention_mask"], strict=True)):
        length = int(mask.sum())  # TRL's row has one token more: the newline that the template ends a turn with
        assert torch.equal(ids[:length], other["input_ids"][row, :length]), "the sides' tokens differ"
        assert int(other["attention_mask"][row].sum()) == length + 1
        labels[row, :length] = own["labels"][row, :length]
    assert torch.equal(own["pixel_values"], other["pixel_values"]), "the sides' pixels differ"
    given = {"padded": (ours, own), "packed": (packed, own), "trl": (theirs, {**other, "labels": labels})}
    losses = {}
    for side, (trainer, batch) in given.items():
        trainer.model.eval()
        batch = {name: value.to(options.device) for name, value in batch.items() if name != ROWS}
        with torch.no_grad():
            losses[side] = trainer.compute_loss(trainer.model, batch).item()
    print(f"  loss on the same labels: {losses}", file=sys.stderr)
    return max(abs(loss / losses["trl"] - 1) for loss in losses.values())


def run_side(side: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """One epoch; seconds of its steps, without the first of a process, and memory above what the model itself takes."""
    from transformers import TrainerCallback

    torch.set_num_threads(options.threads)
    trainer = build_trainer(side, folder, options)

    class Clock(TrainerCallback):
        times: list[tuple[float, float]] = []  # noqa: RUF012 - one run a process

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if options.device != "cpu":
                torch.cuda.synchronize()
            self.times.append((time.perf_counter(), time.process_time()))

    before = peak_memory()
    trainer.add_callback(Clock())
    trainer.train()
    steps = len(Clock.times) - 1
    wall, processor = np.subtract(Clock.times[-1], Clock.times[0]) / steps
    return {"seconds": wall, "processor": processor, "gib": (peak_memory() - before) / 2**30}


def floor_samples(folder: Path, options: argparse.Namespace) -> float:
    """Samples a second at the measured peak: six operations a weight and token, padding left out; two where frozen."""
    renderer = common.build_renderer()
    model = common.build_model(options.shape, renderer, options.device)
    settings = settings_for(folder, options)
    encoder = ExampleEncoder(renderer, settings.data)
    from data_check import load_examples

    rows = load_examples(settings.data.train_data, settings.data, renderer, f"{folder}/bad")
    encoded = [encoder(as_example(row)) for row in rows]
    tokens = sum(len(item.input_ids) for item in encoded)
    scored = sum(label != IGNORED for item in encoded for label in item.labels)
    patches = sum(image.width * image.height / common.PATCH**2 for item in encoded for image in item.images)
    text, vision, head = (
        sum(p.numel() for p in part.parameters())
        for part in (model.model.language_model.layers, model.model.visual.blocks, model.lm_head)
    )
    factor = 6 if options.shape == "mid" else 4  # a LoRA adapter's frozen weights get no gradient of their own
    operations = factor * (text * tokens + head * scored) + 2 * vision * patches
    return len(encoded) * common.machine_limits(options.device)[0] / operations


def main() -> None:
    parser = common.arguments(__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.side:
        print("RESULT " + json.dumps(run_side(options.side, options.folder, options)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-sft-") as name:
        folder = Path(name)
        write_data(folder, common.build_renderer(), options.rows)
        difference = check_equal(folder, options)
        release_memory()  # for the processes that are timed
        assert difference < (1e-4 if options.device == "cpu" else 2e-2), f"losses differ by {difference:.1e}"
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.repeats):
            for side in SIDES:
                runs[side].append(run_apart(side, folder, options))
        floor = floor_samples(folder, options)
    rows = []
    for side, found in runs.items():
        seconds = statistics.median(run["seconds"] for run in found)
        rows.append(
            {
                "side": SIDES[side],
                "seconds": seconds,
                "CPU seconds": statistics.median(run["processor"] for run in found),
                "samples/s": options.batch_size / seconds,
                "GiB over the model": statistics.median(run["gib"] for run in found),
            }
        )
    delattr(options, "folder")
    more = {"ratio_padded": rows[0]["seconds"] / rows[1]["seconds"], "floor_samples_per_second": floor}
    more["loss_difference"] = f"{difference:.1e}"
    common.report("SFT step on mixed lengths", rows, options, **more)


def run_apart(side: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    given = [f"--{name}={getattr(options, name)}" for name in ("shape", "device", "threads", "batch_size")]
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), *given]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    print(f"  {side}: {line}", file=sys.stderr, flush=True)
    return json.loads(line.removeprefix("RESULT "))


if __name__ == "__main__":
    main()
