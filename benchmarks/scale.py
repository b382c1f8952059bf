"""What several processes send, hold and wait for, by engine.

    torchrun --nproc-per-node 2 benchmarks/scale.py --engine fsdp
    torchrun --nproc-per-node 2 benchmarks/scale.py --engine ddp --preset recommended --reward-every 4
    torchrun --nproc-per-node 2 benchmarks/scale.py --preset recommended --stream-shards 4
    python benchmarks/scale.py                                # one process, for comparison
    python benchmarks/scale.py --costs                        # cost against N, T, V, M, I and K instead

For two steps, the second of them with a probe where the preset has one: collectives and bytes per parameter
that a rank hands to them, by kind. Then the bytes per parameter that a rank holds between steps, what reading
takes of a rank (windows that it reads, tokenizes and scores itself, and processor time), and windows per
second. Any setting of `curriq train` can be given; the defaults are a small Llama on the embedded corpus.
Counts and bytes are exact; rates need a machine that does nothing else. `--costs` is growth.py.
"""

import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import synchronise
from growth import report_costs
from torch.utils._python_dispatch import TorchDispatchMode

from curriq import parallel
from curriq.cli import parse_run_config
from curriq.data.shards import ShardedStream
from curriq.lm.engine import local
from curriq.lm.held_out import EffectProbe
from curriq.state import State
from curriq.train.loop import train_step
from curriq.train.run import Run, prepare
from curriq.types import Offer, Proposer

WARM_UP = 7
STEPS = 24
DEFAULTS = (
    "--model random:llama:hidden_size=512,intermediate_size=1376,num_hidden_layers=4,num_attention_heads=8 "
    "--num-candidates 8 --window 32 --micro-batch 2 --vocab-size 1024 --reward-every 8 --reward-windows 8 "
    "--probe-windows 8 --reward-set-size 32 --validation-set-size 8 --test-set-size 8 --steps 64 "
    "--no-tensorboard --progress none"
)


class Traffic(TorchDispatchMode):
    """Counts the collectives that are called, and the bytes that are handed to them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = str(func).split(".")[:2]
        if namespace == "c10d":
            kind = name.strip("_").removesuffix("_")
            self.calls[kind] += 1
            self.bytes[kind] += bytes_in(args[0])
        return func(*args, **(kwargs or {}))


def bytes_in(value: Any) -> int:
    """Bytes of a tensor, or of all tensors of nested lists."""
    if isinstance(value, torch.Tensor):
        return local(value).numel() * value.element_size()
    return sum(map(bytes_in, value)) if isinstance(value, list | tuple) else 0


def held(run: Run) -> dict[str, int]:
    """Bytes that a rank holds between steps, by kind."""
    parts = run.session.components
    moments = [value for entry in parts.learner.optimizer.state.values() for value in entry.values()]
    kinds = {
        "θ": run.lm.parameters,
        "gradient": [p.grad for p in run.lm.parameters if p.grad is not None],
        "moments": [value for value in moments if value.dim()],
    }
    if isinstance(parts.held_out, EffectProbe):
        kinds["average of held-out gradients"] = parts.held_out._average._average
    return {kind: bytes_in(tensors) for kind, tensors in kinds.items()}


@dataclass
class Reading:
    """A proposer, and what its proposals take of this rank.

    Attributes:
        seconds: of the main thread's processor time; waiting for other ranks takes none.
        windows: read by this rank itself.
    """

    inner: Proposer
    share: float
    seconds: list[float] = field(default_factory=list)
    windows: list[float] = field(default_factory=list)

    def propose(self, step: int) -> Offer:
        began = time.thread_time()
        offer = self.inner.propose(step)
        self.seconds.append(time.thread_time() - began)
        self.windows.append(offer.cost.windows_read * self.share)
        return offer

    def state_dict(self) -> State:
        return self.inner.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.inner.load_state_dict(state)

    def report(self) -> str:
        """The mean over the steps after the warm-up, of the rank where it is greatest."""
        seconds, windows = (statistics.mean(values[WARM_UP:]) for values in (self.seconds, self.windows))
        return (
            f"reading, per step and rank: {parallel.reduce_max(windows):.0f} windows, "
            f"{1000 * parallel.reduce_max(seconds):.1f} ms of processor time (mean of {STEPS} steps)"
        )


def main() -> None:
    words = [*DEFAULTS.split(), *sys.argv[1:]]
    with TemporaryDirectory() as folder:
        run = prepare(parse_run_config(words).override(run_dir=folder, threads=1))
        stream = run.corpus.stream
        share = len(stream.shards) / stream.count if isinstance(stream, ShardedStream) else 1.0
        reading = Reading(run.session.components.proposer, share)
        parts, state = replace(run.session.components, proposer=reading), run.session.state
        count = sum(parameter.numel() for parameter in run.lm.parameters)  # of a sharded one the whole
        say = print if parallel.rank() == 0 else lambda *words: None
        kind = type(run.lm.engine).__name__
        say(f"{kind}, {parallel.world_size()} processes, {count / 1e6:.1f} M parameters")
        seconds = []
        for k in range(WARM_UP + STEPS):
            began = time.perf_counter()
            with Traffic() as traffic:
                step = train_step(parts, state)
            synchronise(run.lm.device)
            seconds.append(time.perf_counter() - began)
            if k in (WARM_UP, WARM_UP + 1):
                sent = ", ".join(f"{n} {c} {traffic.bytes[c] / count:.2f}" for c, n in traffic.calls.items())
                say(f"step {k}{' with a reward' if step.reward is not None else ''}: {sent or 'nothing'}")
        say("held, bytes per parameter:", *(f"{k} {n / count:.2f}" for k, n in held(run).items()))
        report = reading.report()  # of all ranks
        say(report)
        rate = len(step.trained) / statistics.median(seconds[WARM_UP:])
        say(f"{rate:.1f} windows/s (median of {STEPS} steps)")
        if parallel.world_size() > 1:
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    report_costs() if sys.argv[1:] == ["--costs"] else main()
