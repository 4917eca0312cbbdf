"""Group rollouts with crops: our engine against `model.generate` re-run after each crop, and against lock-step batches.

    python benchmarks/bench_rollout.py group --json group.json     # one prompt, G rollouts, K crops each
    python benchmarks/bench_rollout.py queue --json queue.json     # 32 prompts, lengths from 20 to 400

Tokens are forced, so that both sides do the same work; that they write the same ids with the same log-probs is checked
before anything is timed. Nothing here was run on a GPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from unittest import mock

import hf_generate
import torch
from common import (
    arguments,
    build_model,
    build_prompts,
    build_renderer,
    build_response,
    counted,
    floor_seconds,
    medians,
    report,
    side,
)

from generation import CropEngine, SamplingParams


def bench_group(args) -> None:
    """P=550 with an image of 450 tokens, G rollouts of T tokens with K crops of 150 tokens."""
    renderer = build_renderer()
    model = build_model(args.shape, renderer, args.device)
    prompts = build_prompts(renderer, 1)
    scripts = [build_response(renderer, number, args.tokens, args.crops) for number in range(args.group)]
    engine = CropEngine(model, renderer, args.group)
    sampling = SamplingParams(args.tokens, seed=0)

    def ours():
        return engine.generate(prompts, sampling, args.group, scripts)

    def theirs(keep_logprobs: bool = False):
        return hf_generate.generate(model, renderer, prompts * args.group, scripts, keep_logprobs)

    with counted(model) as our_counts:
        rollouts = ours()
    with counted(model) as their_counts:
        responses = theirs(keep_logprobs=True)
    hf_generate.check_equal(rollouts, responses, args.device)
    times = medians({"engine": ours, "generate": theirs}, args.repeats, args.device)
    rows = [side("generate", times, their_counts), side("engine", times, our_counts)]
    report(
        f"Group rollouts: P=550, G={args.group}, K={args.crops}, T={args.tokens}",
        rows,
        args,
        prefill_ratio=their_counts.prefill_tokens / our_counts.prefill_tokens,
        floor_seconds=floor_seconds(model, rollouts, our_counts, args.device),
    )


def bench_queue(args) -> None:
    """`--prompts` prompts, G rollouts each; lengths from 20 to 400, evenly on a log scale; a call per 60 tokens."""
    renderer = build_renderer()
    model = build_model(args.shape, renderer, args.device)
    prompts = build_prompts(renderer, args.prompts)
    dice = random.Random(0)
    count = args.prompts * args.group
    lengths = [round(20 * 20 ** ((number + 0.5) / count)) for number in range(count)]
    if args.spread == "even":
        lengths = [round(20 + 380 * (number + 0.5) / count) for number in range(count)]
    dice.shuffle(lengths)
    scripts = [
        build_response(renderer, number, length, min(args.crops, length // 60)) for number, length in enumerate(lengths)
    ]
    engine = CropEngine(model, renderer, args.batch_size)
    sampling = SamplingParams(400, seed=0)
    together = args.batch_size // args.group

    def queued(count: int = args.prompts):
        return engine.generate(prompts[:count], sampling, args.group, scripts[: count * args.group])

    def lock_step(count: int = args.prompts):
        results = []
        for start in range(0, count, together):
            part = slice(start * args.group, (start + together) * args.group)
            results += engine.generate(prompts[start : start + together], sampling, args.group, scripts[part])
        return results

    def keeping_finished_rows(work: Callable):
        """`work` with batches whose finished rows are fed on until the last one is done, as in `model.generate`."""
        with mock.patch("decoding.COMPACT_SHARE", 2.0):
            return work()

    first = 2 * together  # the check, and the warm-up
    hf_generate.check_equal(queued(first), lock_step(first), args.device)
    counts, rollouts = {}, []

    def noted(name: str, work: Callable):
        with counted(model) as counts[name]:
            rollouts[:] = work()

    works = {
        "lock-step, finished rows leave": lock_step,
        "lock-step": partial(keeping_finished_rows, lock_step),
        "queue": queued,
    }
    sides = {name: partial(noted, name, work) for name, work in works.items()}
    times = medians(sides, args.repeats, args.device)
    rows = [side(name, times, counts[name]) for name in works]
    report(
        f"Queue of {args.prompts} prompts, G={args.group}, batch {args.batch_size}, T from 20 to 400 ({args.spread})",
        rows,
        args,
        mean_length=sum(lengths) / count,
        floor_seconds=floor_seconds(model, rollouts, counts["queue"], args.device),
    )


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("work", choices=["group", "queue"])
    parser.add_argument("--group", type=int, default=8, help="rollouts a prompt")
    parser.add_argument("--crops", type=int, default=2, help="crops a rollout, at most")
    parser.add_argument("--tokens", type=int, default=200, help="group: tokens a rollout")
    parser.add_argument("--prompts", type=int, default=32, help="queue: prompts")
    parser.add_argument("--batch_size", type=int, default=8, help="queue: rows side by side")
    parser.add_argument("--spread", choices=["log", "even"], default="log", help="queue: how lengths are spread")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"group": bench_group, "queue": bench_queue}[args.work](args)


if __name__ == "__main__":
    main()
