"""Waiting for a server that does not answer: growing pauses, one line where it begins, an end.

What a run cannot do without may be away for a while: a judge, a vLLM server, an image. `OutageError` says that it is,
and that nothing else is wrong: a trainer then stops with a checkpoint that goes on before the step (resuming.py).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

DEFAULT_PATIENCE = 300.0  # seconds
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds
GLANCE = 0.5  # seconds after which a pause looks whether the process is to stop


class OutageError(Exception):
    """What a run needs from outside is not there; the run itself is sound."""


class Patience:
    """How long a server has been silent, over all requests to it.

    name: of the server, for messages. seconds: how long it may be silent.
    """

    process_stops = False  # once a signal has come: who has little time left waits for nobody

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self.silent_since: float | None = None
        self._lock = threading.Lock()

    def failed(self, reason: str) -> None:
        """To be called where a request got no answer: pauses before the next one.

        Raises:
            OutageError: where the server has been silent for `seconds`, or the process is to stop.
        """
        now = time.monotonic()
        with self._lock:
            is_first = self.silent_since is None
            since = self.silent_since = now if is_first else self.silent_since
        if is_first:
            print(f"{self.name} does not answer ({reason}): waiting up to {self.seconds:g} s", file=sys.stderr)
        silent = now - since
        end = now + min(max(FIRST_PAUSE, silent / 2), LONGEST_PAUSE, self.seconds - silent)
        while not Patience.process_stops and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, GLANCE))
        if silent >= self.seconds or Patience.process_stops:
            raise OutageError(f"{self.name} gave no answer in {time.monotonic() - since:.0f} s ({reason})")

    def answered(self) -> None:
        with self._lock:  # threads that waited together are answered together
            since, self.silent_since = self.silent_since, None
        if since is not None:
            print(f"{self.name} answers again, after {time.monotonic() - since:.0f} s", file=sys.stderr)


@contextlib.contextmanager
def shared_outage() -> Iterator[None]:
    """An outage that one process meets in the block is raised by all: they would wait for it for ever elsewhere."""
    from accelerate.utils import gather_object

    outage = None
    try:
        yield
    except OutageError as error:
        outage = str(error)
    met = [message for message in gather_object([outage]) if message is not None]
    if met:
        raise OutageError(met[0])
