"""A decode step recorded once and replayed: on a GPU without the time that launching its kernels one by one takes.

A step of one token a row launches some thousand kernels, each of which is over before the next has been launched. While
the places of the batch, their slots and the read length stay the same, the next step runs the same kernels on the same
addresses; only the numbers in its input table are others. So the step is a function of that table, recorded as a CUDA
graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from functools import lru_cache

import torch

Step = Callable[[torch.Tensor], torch.Tensor]  # table of the rows -> logits; writes to the cache
Recorder = Callable[[Step, torch.Tensor], Step]

MOST_GRAPHS = 4  # kept at a time; each holds logits of its own
# Half precision: what a replay may differ by from the step itself, as a share of the largest logit.
TOLERANCE = 0.02


class StepGraphs:
    """Runs steps by way of their recordings, one a key; a key says all that a step depends on besides its table.

    record: None runs every step as it is.
    """

    def __init__(self, record: Recorder | None) -> None:
        self.record = record
        self.recorded: dict[Hashable, Step] = {}

    def clear(self) -> None:
        """Forget all recordings: what they read or wrote has moved."""
        self.recorded.clear()

    def run(self, step: Step, key: Hashable, table: torch.Tensor) -> torch.Tensor:
        """`step(table)`, recorded where its key is new; the first run of a key is the step itself."""
        if self.record is None:
            return step(table)
        if key in self.recorded:
            return self.recorded[key](table)
        logits = step(table)
        try:
            # Recorded on zeros, where no row runs: what the recording kept of its table shows in the replay.
            replay = self.record(step, torch.zeros_like(table))
            difference = (replay(table) - logits).abs().max() / logits.abs().max()
        except (RuntimeError, AssertionError) as error:
            self._give_up(f"it could not be recorded ({str(error).splitlines()[0]})")
            return logits
        if not difference <= TOLERANCE:
            self._give_up(f"its replay differs by {difference:.1%}")
            return logits
        while len(self.recorded) >= MOST_GRAPHS:
            del self.recorded[next(iter(self.recorded))]
        self.recorded[key] = replay
        return logits

    def _give_up(self, reason: str) -> None:
        self.record = None
        self.clear()
        warnings.warn(f"decoding goes on without CUDA graphs, more slowly: {reason}", stacklevel=2)


class CudaRecorder:
    """Records steps as CUDA graphs that share memory; the tables' shapes must not change for a key.

    A step must have run under the same autocast: the copies of weights that it left there are what is recorded. Others
    would stay for after the recording, where nothing fills them.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.first: Step | None = None

    def __call__(self, step: Step, table: torch.Tensor) -> Step:
        if self.first is None:
            self.first = self._record(torch.clone, table)  # torch takes no second graph into a pool whose graphs died
        return self._record(step, table)

    def _record(self, step: Step, table: torch.Tensor) -> Step:
        own, graph, stream = table.clone(), torch.cuda.CUDAGraph(), _recording_stream(table.device)
        with (
            torch.cuda.device(table.device),
            # A recording that fails would leave its stream the current one.
            torch.cuda.stream(torch.cuda.current_stream(table.device)),
            # Other threads, such as those that load data or watch NCCL, may use the GPU meanwhile.
            torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"),
        ):
            logits = step(own)

        def replay(table: torch.Tensor) -> torch.Tensor:
            own.copy_(table)
            graph.replay()
            return logits

        return replay


@lru_cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps memory for each stream that it has seen."""
    return torch.cuda.Stream(device)
