"""How often the host waits for the device in a step: a few times, however many passes there are."""

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.runs import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from curriq.presets import own_settings
from curriq.train.run import prepare

METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"selector": "uniform"},
    "soft-q": {},
    "weighted": own_settings("weighted") | {"reward_every": 4, "probe_windows": 4},
}
STREAM = ("data/", "rng.py", "parallel.py")
"""Files that read tensors which are always on the CPU: the stream, and ids of windows."""


class Reads(TorchDispatchMode):
    """Counts scalars that are read off tensors made by passes over the model."""

    def __init__(self) -> None:
        super().__init__()
        self.scalars = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.scalars += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Generator[Counter[str]]:
    """Reads by the file that makes them: calls of what moves numbers to the host, but in the stream."""
    import inspect

    found: Counter[str] = Counter()
    with monkeypatch.context() as patched:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
            read = getattr(torch.Tensor, name)

            def counting(self, *arguments, read=read, **options):
                frame = inspect.currentframe()
                assert frame is not None
                assert frame.f_back is not None
                file = frame.f_back.f_code.co_filename.rpartition("/curriq/")[2]
                if not file.startswith(STREAM) and "site-packages" not in file:
                    found[file] += 1
                return read(self, *arguments, **options)

            patched.setattr(torch.Tensor, name, counting)
        yield found


def reads_of_a_step(settings: dict[str, Any], micro_batch: int, monkeypatch, at: int = 6) -> Counter[str]:
    run = prepare(tiny(**settings, micro_batch=micro_batch, num_candidates=8, steps=50))
    run.session.rehearse(at)
    with counted(monkeypatch) as found:
        run.session.rehearse(1)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_reads_do_not_grow_with_the_passes(name, monkeypatch):
    few, many = (reads_of_a_step(METHODS[name], size, monkeypatch) for size in (8, 1))
    assert few == many


def test_a_plain_step_reads_the_model_twice(monkeypatch):
    """The mixture's numbers at the end of the passes, and the gradient's norm while the update runs; what the
    meter reads lies on the host already (`on_host`)."""
    found = reads_of_a_step(METHODS["uniform"], 2, monkeypatch)
    assert {file: n for file, n in found.items() if file.startswith("lm/")} == {
        "lm/mixture.py": 1,
        "lm/learner.py": 1,
    }


def test_a_probe_reads_the_optimizer_once(monkeypatch):
    """Not once per weight: a fused optimizer keeps the number of its steps on the device."""
    run = prepare(tiny(**METHODS["weighted"], num_candidates=8, steps=50))
    run.session.rehearse(8)
    weights = len(run.lm.parameters)
    with counted(monkeypatch) as found:
        run.session.rehearse(1)  # step 8 has a probe
    assert found["lm/learner.py"] < 4 < weights
    assert sum(n for file, n in found.items() if file.startswith("lm/")) <= 12


def test_scalars_are_read_off_at_the_same_places(monkeypatch):
    """The same count by torch's own operator, which a read cannot avoid."""
    scalars = []
    for size in (8, 1):
        run = prepare(tiny(selector="uniform", micro_batch=size, num_candidates=8, steps=50))
        run.session.rehearse(3)
        offer = run.session.components.proposer.propose(3)
        run.session.components.proposer.propose = lambda step, offer=offer: offer
        with Reads() as reads:
            run.session.rehearse(1)
        scalars.append(reads.scalars)
    assert scalars[0] == scalars[1] <= 10
