"""What the benchmarks share: random models of real shapes, the work to do, timing, floors, tables."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from config import use_one_gpu
from conversation import Prompt, Renderer
from crop_tool import CropContract
from demo_model import CHAT_TEMPLATE, build_tokenizer
from generation import Rollout
from step_graphs import StepGraphs
from vision_tower import speed_up

PATCH, IMAGE, CROP = 14, (700, 504), (420, 280)  # pixels: 450 and 150 image tokens
# Hidden, MLP, layers, heads, key heads, vocabulary; vision depth, hidden, heads, MLP. "mid" has 41 million parameters,
# and an image token costs its vision tower a third of what it costs its language model, as in the 7B model.
SHAPES = {
    "tiny": ((128, 384, 3, 4, 2, 512), (2, 64, 4, 256)),  # to try a benchmark out
    "mid": ((512, 1536, 10, 8, 2, 8192), (4, 192, 4, 576)),
    "3b": ((2048, 11008, 36, 16, 2, 151936), (32, 1280, 16, 3420)),
    "7b": ((3584, 18944, 28, 28, 4, 152064), (32, 1280, 16, 3420)),
}


def arguments(description: str) -> argparse.ArgumentParser:
    """The flags of every benchmark."""
    use_one_gpu()
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--shape", choices=list(SHAPES), default="mid", help="size of the random model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side; medians are shown")
    parser.add_argument("--json", metavar="FILE", help="write the table here")
    return parser


def build_renderer() -> Renderer:
    """The embedded tokenizer, Qwen2.5-VL's own patches, and a contract that shows images in their own size."""
    limits = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 1280 * (2 * PATCH) ** 2}
    patches = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(limits), **patches),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(size=dict(limits), **patches),
        chat_template=CHAT_TEMPLATE,
    )
    return Renderer(processor, CropContract(image_shorter_side=min(IMAGE), system_prompt="Look closer with crops."))


def build_model(
    shape: str, renderer: Renderer, device: str, dtype: torch.dtype | None = None
) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL in `dtype` [float32 on a CPU, bfloat16 on a GPU]; sdpa, in eval mode."""
    (hidden, mlp, layers, heads, kv_heads, vocabulary), (depth, v_hidden, v_heads, v_mlp) = SHAPES[shape]
    ids, dim = renderer.ids, hidden // heads
    half, end = dim // 2, renderer.ids["<|im_end|>"]
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "bos_token_id": None, "eos_token_id": end, "tie_word_embeddings": False,
            "pad_token_id": renderer.tokenizer.pad_token_id,
        },
        vision_config={
            "depth": depth, "hidden_size": v_hidden, "num_heads": v_heads, "intermediate_size": v_mlp,
            "out_hidden_size": hidden, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "window_size": 112, "fullatt_block_indexes": list(range(depth // 4 - 1, depth, max(1, depth // 4))),
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or (torch.float32 if device == "cpu" else torch.bfloat16))
    try:
        with torch.device(device):
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    speed_up(model)
    pad = renderer.tokenizer.pad_token_id
    model.generation_config.update(bos_token_id=None, eos_token_id=end, pad_token_id=pad)
    return model.eval()


# ------------------------------------------------------------------------------------------------- work


def build_prompts(renderer: Renderer, count: int, length: int = 550) -> list[Prompt]:
    """Prompts of exactly `length` tokens, each with an image of 450 tokens of its own."""
    dice = np.random.default_rng(0)
    prompts = []
    for _ in range(count):
        image = Image.fromarray(dice.integers(0, 256, (IMAGE[1], IMAGE[0], 3), dtype=np.uint8))
        missing = length - len(renderer.prompt("", image).ids)
        prompts.append(renderer.prompt(" red" * missing, image))
        assert len(prompts[-1].ids) == length
    return prompts


def build_response(renderer: Renderer, number: int, length: int, crops: int) -> list[int]:
    """`length` tokens to force, evenly cut by `crops` calls of 150 tokens, whose boxes differ by `number`."""
    filler, end = renderer.text_ids(" red"), renderer.ids["<|im_end|>"]
    assert len(filler) == 1
    ids: list[int] = []
    for crop in range(crops):
        x, y = 28 * ((number + crop) % 9), 28 * ((number + 3 * crop) % 7)
        call = renderer.text_ids(f"<tool_call>[{x}, {y}, {x + CROP[0]}, {y + CROP[1]}]</tool_call>")
        ids += filler * (length * (crop + 1) // (crops + 1) - len(ids) - len(call)) + call
    return ids + filler * (length - 1 - len(ids)) + [end]


# ---------------------------------------------------------------------------------------------- measures


@dataclass
class Counts:
    """What went through the model: tokens of chunks wider than one, decode steps, images and their tokens."""

    prefill_tokens: int = 0
    steps: int = 0
    images: int = 0
    image_tokens: int = 0


@contextmanager
def counted(model: Qwen2_5_VLForConditionalGeneration) -> Iterator[Counts]:
    """Count what the model is given inside the `with`."""
    counts = Counts()

    def text(module: Any, args: tuple, inputs: dict) -> None:
        rows, width = inputs["inputs_embeds"].shape[:2]
        counts.prefill_tokens += rows * width if width > 1 else 0
        counts.steps += width == 1

    def vision(module: Any, args: tuple, inputs: dict) -> None:
        grids = inputs["grid_thw"]
        counts.images += len(grids)
        counts.image_tokens += int(grids.prod(-1).sum()) // 4

    def run(*args: Any) -> torch.Tensor:
        before = counts.steps
        logits = run_step(*args)
        counts.steps = before + 1  # a replay calls no module, and a recording calls them once more
        return logits

    run_step = StepGraphs.run
    hooks = [
        model.model.language_model.register_forward_pre_hook(text, with_kwargs=True),
        model.model.visual.register_forward_pre_hook(vision, with_kwargs=True),
    ]
    try:
        with mock.patch.object(StepGraphs, "run", run):
            yield counts
    finally:
        for hook in hooks:
            hook.remove()


def seconds(work: Callable[[], Any], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def medians(sides: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, tuple[float, float]]:
    """Median seconds and median CPU seconds of each side; they take turns, so that a busy machine slows them alike."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            before = time.process_time()
            wall = seconds(work, device)
            taken[name].append((wall, time.process_time() - before))
            print(f"  {name}: {wall:.2f} s, {taken[name][-1][1]:.2f} CPU s", file=sys.stderr, flush=True)
    return {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in taken.items()}


def machine_limits(device: str) -> tuple[float, float]:
    """Floating-point operations a second of a large product, and bytes a second of a large read, as measured here.

    On a CPU by CPU time over threads, so that other programs do not count.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    size = 1536 if device == "cpu" else 8192
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    large = torch.ones(2**26 if device == "cpu" else 2**30, device=device)
    out = torch.empty_like(left)

    def least(work: Callable[[], Any]) -> float:
        found = []
        for _ in range(8):
            before = time.process_time()
            wall = seconds(work, device)
            found.append((time.process_time() - before) / torch.get_num_threads() if device == "cpu" else wall)
        return min(found)

    products = least(lambda: torch.mm(left, right, out=out))
    return 2 * size**3 / products, large.numel() * 4 / least(lambda: large.sum())


def floor_seconds(
    model: Qwen2_5_VLForConditionalGeneration, rollouts: Sequence[Rollout], counts: Counts, device: str
) -> float:
    """Least time for `rollouts`: operations over the peak, then bytes of decode over the bandwidth, both as measured.

    Operations: two a weight and token of prefill, crops and vision (four patches an image token); attention is left
    out, so this floor is a low one. Bytes: a decode step reads the weights once, and keys and values of its rows.
    """
    operations, bandwidth = machine_limits(device)
    text, config = model.model.language_model, model.config.text_config
    weights = sum(weight.numel() for weight in text.layers.parameters())
    vision = sum(weight.numel() for weight in model.model.visual.parameters())
    compute = 2 * weights * counts.prefill_tokens + 2 * vision * 4 * counts.image_tokens
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * text.layers[0].self_attn.head_dim
    slots = sum(sum(r.sampled_mask) * (len(r.prompt_ids) + len(r.completion_ids) / 2) for r in rollouts)
    read = counts.steps * (weights + model.lm_head.weight.numel()) + slots * slot
    return compute / operations + read * model.dtype.itemsize / bandwidth


# ------------------------------------------------------------------------------------------------ report


def side(name: str, times: dict[str, tuple[float, float]], counts: Counts) -> dict[str, Any]:
    """A line of the table."""
    wall, cpu = times[name]
    return {
        "side": name,
        "seconds": wall,
        "CPU seconds": cpu,
        "prefill tokens": counts.prefill_tokens,
        "decode steps": counts.steps,
        "images encoded": counts.images,
    }


def report(title: str, rows: Sequence[dict[str, Any]], args: argparse.Namespace, **more: Any) -> None:
    """Print the sides with the ratio of the seconds of the first to the last, ours; write all of it to `--json`."""
    other, ours = rows[0], rows[-1]
    ratio = other["seconds"] / ours["seconds"]
    more = {"cpu_ratio": other["CPU seconds"] / ours["CPU seconds"], **more}
    names = list(rows[0])
    cells = [
        names,
        *([f"{value:,.2f}" if isinstance(value, float) else f"{value}" for value in row.values()] for row in rows),
    ]
    widths = [max(len(line[number]) for line in cells) for number in range(len(names))]
    print(f"\n{title} ({args.shape}, {args.device}, {args.threads} threads)")
    for line in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    for name, value in {"ratio": ratio, **more}.items():
        print(f"  {name}: {value:.2f}" if isinstance(value, float) else f"  {name}: {value}")
    if args.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        found = {"title": title, "ratio": ratio, "rows": list(rows), **more, "arguments": vars(args), **versions}
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
