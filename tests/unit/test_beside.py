"""Work beside the passes of a step: once, and on a GPU in the right order with them."""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from curriq.errors import CurriqError
from curriq.lm.beside import Beside

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_it_is_done_once_and_a_cpu_waits_for_it(monkeypatch):
    clock = iter([1.0, 3.5, 4.0, 4.25, 5.0, 6.0])
    monkeypatch.setattr("curriq.lm.beside.time.perf_counter", lambda: next(clock))
    done = []
    works = [partial(done.append, name) for name in ("measured", "proposed", "learnt", "recorded")]
    beside = Beside(*works, device=CPU)
    assert (done, beside.waited) == ([], 0.0)
    beside()
    beside()  # passes that ran out of memory are run again
    assert done == ["measured", "proposed", "learnt", "recorded"]
    assert (beside.proposed, beside.waited) == (0.25, 3.75)


def test_too_little_memory_for_a_measurement_is_no_reason_for_smaller_passes():
    """Those would be run again, and the measurement would begin twice."""

    def measure():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(CurriqError, match="--probe-windows"):
        Beside(measure, device=CPU)()


class Gpu:
    """A device that carries out what its streams hold only when somebody waits: it keeps the order in which
    each stream would see records, waits and kernels."""

    def __init__(self) -> None:
        self.passes, self.side = [], []
        self.now = self.passes

    def stream(self, held: list) -> SimpleNamespace:
        return SimpleNamespace(
            held=held,
            wait_event=lambda event: held.append(("after", event.place)),
            wait_stream=lambda other: held.append(("after", (id(other.held), len(other.held)))),
        )

    def event(self, **settings):
        made = SimpleNamespace(place=None, synchronize=lambda: None, elapsed_time=lambda other: 40.0)

        def record(stream):
            made.place = (id(stream.held), len(stream.held))

        made.record = record
        return made

    def install(self, patch: pytest.MonkeyPatch) -> None:
        @contextmanager
        def running(stream):
            before, self.now = self.now, stream.held
            yield
            self.now = before

        patch.setattr(torch.cuda, "Event", self.event)
        patch.setattr("curriq.lm.beside._side_stream", lambda device: self.stream(self.side))
        patch.setattr(torch.cuda, "current_stream", lambda device: self.stream(self.now))
        patch.setattr(torch.cuda, "stream", running)


def test_on_a_gpu_it_sees_what_was_before_and_passes_go_on_beside_it(monkeypatch):
    gpu = Gpu()
    with monkeypatch.context() as patch:
        gpu.install(patch)
        gpu.now.append("update of the step before")
        beside = Beside(lambda: gpu.now.append("measurement"), lambda: gpu.now.append("scores"), device=GPU)
        gpu.now.append("passes")
        assert beside.waited == 0.0
        beside()
        gpu.now.append("policy")
        waited = beside.waited
    # Behind the first entry of the passes' stream and not the second.
    assert gpu.side == [("after", (id(gpu.passes), 1)), "scores"]
    whole = ("after", (id(gpu.side), 2))
    assert gpu.passes == ["update of the step before", "passes", "measurement", whole, "policy"]
    # Of the measurement, from its end to that of the scores, and from there to what is queued next.
    assert waited == pytest.approx(0.12)
