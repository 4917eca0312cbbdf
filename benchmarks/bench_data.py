"""Start-up on a long JSONL: seconds and memory from a fresh process to the first batch.

    python benchmarks/bench_data.py --rows 1000000 --json data.json

Every side draws a shuffled batch of the same file. Ours are the whole of a stage's set-up, model and trainer included;
the others are what one writes without it, and check nothing. Processor seconds tell what a side costs on a machine that
has other work.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from transformers import Trainer

SIDES = {
    "ours": "ours, SFT: index, rows checked when drawn",
    "grpo": "ours, R-GRPO: the same",
    "datasets": 'datasets.load_dataset("json"), nothing checked',
    "json": "json.loads of every line into a list, nothing checked",
}
BATCH, IMAGES = 8, 16


def write_file(folder: Path, rows: int) -> None:
    """`train.jsonl` with 20 to 200 words a row and 0 to 3 calls, and a few photographs that all rows share."""
    import numpy as np
    from PIL import Image

    dice, words = random.Random(0), ["the", "dog", "stands", "near", "a", "red", "car", "left", "of", "that", "table"]
    noise = np.random.default_rng(0)
    for number in range(IMAGES):
        Image.fromarray(noise.integers(0, 256, (480, 640, 3), np.uint8)).save(folder / f"{number}.jpg")
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for number in range(rows):
            text = " ".join(dice.choices(words, k=dice.randint(20, 200)))
            calls = " ".join(["{Crop it [40, 60, 300, 280]}"] * dice.randint(0, 3))
            answer = f"<think>\n{text} {calls}\n</think>\n\n<answer>yes</answer>"
            row = {"image_path": f"{number % IMAGES}.jpg", "image_id": number}
            file.write(json.dumps(row | {"QnA": [{"Q": f"Is number {number} there?", "A3": answer}]}) + "\n")


def first_batch(side: str, folder: Path) -> None:
    """What a side does in its own process."""
    if side == "grpo":
        trainer = set_up("grpo", folder)
        drawn, faults = trainer.rows(next(iter(trainer.get_train_dataloader())))
        assert len(drawn) >= BATCH and all(row["response"] for row in drawn) and not faults
        return
    batch = next(iter(set_up("sft", folder).get_train_dataloader())) if side == "ours" else plain_batch(side, folder)
    assert len(batch["input_ids"]) == BATCH


def set_up(stage: str, folder: Path) -> Trainer:
    import train_grpo
    import train_sft
    from command_line import resolve_training
    from model_utils import load_for_training

    flags = {"model_name": f"{folder}/model", "train_data": f"{folder}/train.jsonl", "image_base_path": str(folder)}
    flags |= {"output_dir": f"{folder}/out", "batch_size": BATCH, "disable_tqdm": True}
    settings = resolve_training(flags, (stage,))
    loaded = load_for_training(settings.model, settings.data, getattr(settings, stage), settings.model.model_name)
    return {"sft": train_sft, "grpo": train_grpo}[stage].build_trainer(loaded, settings)


def plain_batch(side: str, folder: Path) -> dict:
    import datasets
    import torch

    from config import DataConfig
    from conversation import Renderer
    from model_utils import load_processor
    from sft_data import ExampleEncoder, SFTCollator

    path = str(folder / "train.jsonl")
    collator = SFTCollator(
        ExampleEncoder(Renderer(*load_processor(f"{folder}/model")), DataConfig(image_base_path=str(folder)))
    )
    if side == "datasets":
        rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=f"{folder}/cache")
    else:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]

    def collate(drawn: list[dict]) -> dict:
        entries = [(row["image_path"], row["QnA"][0]) for row in drawn]
        return collator(
            [{"line": 1, "entry": 0, "offset": 0, "image_path": path, "question": entry["Q"], "response": entry["A3"]}
             for path, entry in entries]
        )  # fmt: skip

    return next(iter(torch.utils.data.DataLoader(rows, BATCH, shuffle=True, collate_fn=collate)))


def measure(side: str, folder: Path) -> dict[str, float]:
    """Seconds from the start of a process to its first batch, and the most that it and its workers had resident.

    Pages that processes share are counted once (proportional set size).
    """
    import psutil

    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    watched, peak, before = psutil.Process(process.pid), 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    while process.poll() is None:
        resident = 0
        for part in (watched, *watched.children(recursive=True)):
            try:
                resident += part.memory_full_info().pss
            except psutil.Error:  # it has just ended
                continue
        peak = max(peak, resident)
        time.sleep(0.25)  # looking costs time itself
    taken, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(process.stderr.read()[-2000:])
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": taken, "processor_seconds": processor, "gib": peak / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, in turns; medians are shown")
    parser.add_argument("--json", metavar="FILE", help="write the table here")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        first_batch(options.side, options.folder)
        return
    with tempfile.TemporaryDirectory(prefix="bench-data-") as name:
        folder = Path(name)
        write_file(folder, options.rows)
        write_model(folder / "model")
        size = (folder / "train.jsonl").stat().st_size
        imports = [seconds_of_imports() for _ in range(options.repeats)]
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.repeats):
            for side in SIDES:
                for left in ("cache", "out"):
                    subprocess.run(["rm", "-rf", f"{folder}/{left}"], check=True)
                runs[side].append(measure(side, folder))
                print(f"  {side}: {runs[side][-1]}", file=sys.stderr, flush=True)
    median = {
        side: {key: statistics.median(run[key] for run in found) for key in found[0]} for side, found in runs.items()
    }
    print(f"{options.rows:,} rows, {size / 2**20:,.0f} MiB; imports alone {statistics.median(imports):.1f} s")
    print(f"{'':<56}{'seconds':>9}{'processor s':>13}{'GiB':>7}")
    for side, title in SIDES.items():
        print(
            f"{title:<56}{median[side]['seconds']:>9.1f}{median[side]['processor_seconds']:>13.1f}{median[side]['gib']:>7.2f}"
        )
    others = {side: median[side]["seconds"] / median["ours"]["seconds"] for side in ("datasets", "json")}
    print("ratio: " + ", ".join(f"{value:.2f}x the time of ours with {side}" for side, value in others.items()))
    if options.json:
        table = {"rows": options.rows, "bytes": size, "imports": statistics.median(imports), "sides": median}
        Path(options.json).write_text(json.dumps(table | {"ratio": others["json"]}, indent=2) + "\n", encoding="utf-8")


def write_model(folder: Path) -> None:
    import demo_model

    processor = demo_model.build_processor()
    demo_model.build_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    from crop_tool import CropContract

    # The embedded model's patches of 7 px.
    CropContract(factor=demo_model.MERGED_PATCH, image_shorter_side=56, crop_shorter_side=56, max_pixels=56 * 112).save(
        folder
    )


def seconds_of_imports() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import trl, datasets, transformers.trainer; from trl import SFTTrainer"],
                   check=True, capture_output=True)  # fmt: skip
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
