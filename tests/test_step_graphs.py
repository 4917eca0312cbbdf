"""Recorded decode steps write what the steps themselves would.

There is no GPU in the tests, so steps are recorded by torch.fx instead of as CUDA graphs: what is replayed is, here
too, the operations of one step on the tensors of that step, with every number that Python saw baked in.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_generation import scripted
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import decoding
import kv_cache
import step_graphs
from generation import CropEngine, SamplingParams
from step_graphs import MOST_GRAPHS, StepGraphs


class Recorder:
    """Records with torch.fx; counts the replays of each recording, which all write to one place, as CUDA's do."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.replays: list[int] = []

    def __call__(self, step, table):
        graph, number = make_fx(step)(table.clone()), len(self.graphs)
        own, logits = table.clone(), graph(table)
        self.graphs.append(graph)
        self.replays.append(0)

        def replay(table):
            self.replays[number] += 1
            own.copy_(table)
            return logits.copy_(graph(own))

        return replay


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    monkeypatch.setattr(decoding.Decoder, "recorder", lambda self: found)
    monkeypatch.setitem(kv_cache.READ_BLOCK, "cpu", 32)
    monkeypatch.setattr(decoding, "SLOT_BLOCK", 64)
    return found


@pytest.fixture
def prompts(renderer):
    images = [Image.effect_noise((448 + 56 * number, 448), 90).convert("RGB") for number in range(4)]
    return [renderer.prompt("Where? " * (number + 1), image) for number, image in enumerate(images)]


def rollouts(model, renderer, prompts, batch_size):
    """Twelve of four prompts with crops at different times, some long and some short."""
    forced = [scripted(renderer, number, calls=number % 3)[: 20 + 5 * number] for number in range(12)]
    engine = CropEngine(model, renderer, batch_size)
    return engine.generate(prompts, SamplingParams(70, temperature=1.0, seed=5), 3, forced=forced)


@pytest.mark.parametrize("batch_size", [3, 12])
def test_replayed_steps_sample_the_same_tokens_with_the_same_log_probs(
    tiny_model, renderer, prompts, request, batch_size
):
    eager = rollouts(tiny_model, renderer, prompts, batch_size)
    recorder = request.getfixturevalue("recorder")
    replayed = rollouts(tiny_model, renderer, prompts, batch_size)
    assert len(recorder.graphs) > 3 and sum(recorder.replays) > 3 * len(recorder.graphs), "steps were replayed"
    for one, other in zip(eager, replayed, strict=True):
        assert one.completion_ids == other.completion_ids and one.finish_reason == other.finish_reason
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_benchmarks_count_the_steps_that_are_replayed(tiny_model, renderer, prompts, request, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    from common import counted

    with counted(tiny_model) as eager:
        rollouts(tiny_model, renderer, prompts, 4)
    request.getfixturevalue("recorder")
    with counted(tiny_model) as replayed:
        rollouts(tiny_model, renderer, prompts, 4)
    assert replayed == eager and eager.steps > 60


def test_a_step_reads_no_number_and_changes_no_shape_on_the_way(tiny_model, renderer, prompts, recorder):
    """What a CUDA graph cannot record: a value that comes back to Python, or a shape that depends on values."""
    rollouts(tiny_model, renderer, prompts, 4)
    called = {str(node.target) for graph in recorder.graphs for node in graph.graph.nodes if node.op == "call_function"}
    assert any("index_put" in name for name in called) and any("attention" in name for name in called)
    assert not [
        name for name in called if any(word in name for word in ("scalar_dense", "nonzero", "unique", "masked_select"))
    ]


def test_no_more_recordings_are_kept_than_a_few_and_none_after_clear():
    graphs = StepGraphs(lambda step, table: step)
    for key in range(MOST_GRAPHS + 3):
        graphs.run(lambda table: table + 1.0, key, torch.ones(2, 4))
    assert list(graphs.recorded) == [3, 4, 5, 6]
    graphs.clear()
    assert not graphs.recorded


class Casts(TorchDispatchMode):
    """Counts what is cast."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


def test_a_recording_casts_no_weight_that_the_step_has_cast(monkeypatch):
    """On a GPU that is not there: tensors without values, and recording is running."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(step_graphs, "_recording_stream", lambda device: None)
    for name in ("graph_pool_handle", "CUDAGraph", "current_stream", "device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    with FakeTensorMode(), torch.autocast("cuda", torch.bfloat16):
        layer, table = torch.nn.Linear(8, 8, device="cuda"), torch.zeros(2, 8, device="cuda")
        with Casts() as first:
            layer(table)
        with Casts() as recorded:
            step_graphs.CudaRecorder()._record(layer, table)
    assert (first.count, recorded.count) == (3, 1)


def fails(step, table):
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (fails, "could not be recorded .CUDA error: operation not permitted when stream is capturing.$"),
        (lambda step, table: lambda table: step(table) + 1.0, "its replay differs by 50.0%"),
        (lambda step, table: partial(lambda kept, _: kept, step(table)), "its replay differs by 50.0%"),
        (lambda step, table: lambda table: step(table) * float("nan"), "its replay differs by nan%"),
    ],
)
def test_a_step_that_cannot_be_recorded_or_replays_wrongly_runs_as_it_is(record, reason):
    graphs = StepGraphs(record)
    calls = []

    def step(table):
        calls.append(1)
        return table + 1.0

    with pytest.warns(UserWarning, match=rf"without CUDA graphs, more slowly: .*{reason}"):
        first = graphs.run(step, "key", torch.ones(2, 4))
    before = len(calls)
    second = graphs.run(step, "key", torch.ones(2, 4) * 2)
    assert first.eq(2).all() and second.eq(3).all() and len(calls) == before + 1
    assert graphs.record is None and not graphs.recorded
