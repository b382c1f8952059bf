"""Work of the host while the device computes the passes of a step."""

import functools
import time
from collections.abc import Callable

import torch


class Beside:
    """Some work that is done once, when the passes of a step have been queued and before their outcome is
    read.

    On a GPU what the work itself computes there runs on a stream of its own, behind all that was queued
    before this object was made and beside what was queued since: the passes must not change what the work
    reads. Elsewhere nothing runs beside it.
    """

    def __init__(self, work: Callable[[], object], device: torch.device) -> None:
        self._work: Callable[[], object] | None = work
        self._device = device
        self._seconds = 0.0
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            self._events[0].record(torch.cuda.current_stream(device))

    def __call__(self) -> None:
        work, self._work = self._work, None
        if work is None:
            return
        if not self._events:
            began = time.perf_counter()
            work()
            self._seconds = time.perf_counter() - began
            return
        begun, queued, resumed = self._events
        passes, side = torch.cuda.current_stream(self._device), _side_stream(self._device)
        queued.record(passes)
        side.wait_event(begun)
        with torch.cuda.stream(side):
            work()
        passes.wait_stream(side)  # what the work has made may be used, and what it has freed be taken
        resumed.record(passes)

    @property
    def waited(self) -> float:
        """Seconds for which the device had nothing else to do; to be asked when the outcome has been read."""
        if not self._events or self._work is not None:
            return self._seconds
        _, queued, resumed = self._events
        resumed.synchronize()
        return queued.elapsed_time(resumed) / 1e3


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # its few small kernels go first
