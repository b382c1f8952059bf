"""What the host does while the device computes the passes of a step."""

import functools
import time
from collections.abc import Callable

import torch

from curriq.errors import CurriqError


class Span:
    """A context whose `seconds` are those of the device from what was queued before it to what was queued
    within it; on a CPU, those of the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._began = 0.0
        self._events: list[torch.cuda.Event] = []

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record(torch.cuda.current_stream(self._device))
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._seconds = time.perf_counter() - self._began
        if self._events:
            self._events[1].record(torch.cuda.current_stream(self._device))

    @property
    def seconds(self) -> float:
        """0 before the context was entered. To be asked when the device is done, or it is waited for."""
        if not self._events:
            return self._seconds
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3


class Beside:
    """What is done once, when the passes of a step have been queued and before their outcome is read.

    On a GPU what `propose` computes there runs on a stream of its own, behind all that was queued before this
    object was made and beside what was queued since: the passes must not change what it reads. Elsewhere
    nothing runs beside anything.

    Args:
        measure: queues what is measured at θ as it is, behind the passes.
        propose: proposes the windows of the next step; None where that cannot be done yet, or gains nothing.
        others: what the host has to do besides, without the device; None for nothing.
    """

    def __init__(
        self,
        measure: Callable[[], object],
        propose: Callable[[], object] | None = None,
        *others: Callable[[], object] | None,
        device: torch.device,
    ) -> None:
        self._measure = measure
        self._propose = propose
        self._others = others
        self._device = device
        self._done = False
        self._measuring, self._proposing, self._rest = Span(device), Span(device), Span(device)
        self._begun: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._begun = torch.cuda.Event()
            self._begun.record(torch.cuda.current_stream(device))

    def __call__(self) -> None:
        if self._done:  # passes that ran out of memory are run again
            return
        self._done = True
        with self._measuring:
            try:
                self._measure()
            except torch.OutOfMemoryError as error:  # smaller passes would not help
                raise CurriqError(
                    "the GPU has too little memory for what is measured in a step: lower --reward-windows, "
                    "--probe-windows or --micro-batch."
                ) from error
        if self._propose is not None:
            with self._proposing:
                self._run_aside(self._propose)
        with self._rest:
            for work in filter(None, self._others):
                work()

    def _run_aside(self, work: Callable[[], object]) -> None:
        if self._begun is None:
            work()
            return
        passes, side = torch.cuda.current_stream(self._device), _side_stream(self._device)
        side.wait_event(self._begun)
        with torch.cuda.stream(side):
            work()
        passes.wait_stream(side)  # what the work has made may be used, and what it has freed be taken

    @property
    def measured(self) -> float:
        """Seconds of the device for what `measure` has queued."""
        return self._measuring.seconds

    @property
    def proposed(self) -> float:
        """Seconds for which the device had nothing to do but `propose`."""
        return self._proposing.seconds

    @property
    def waited(self) -> float:
        """Seconds of the device that were not the passes'; to be asked when their outcome has been read."""
        return self.measured + self.proposed + self._rest.seconds


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # its few small kernels go first
