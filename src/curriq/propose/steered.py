"""NEXTBATCH by the policy: the stream is read on until enough windows have been taken."""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from curriq.data.stream import Windows
from curriq.types import Candidates, State, concatenate


class SteeredStream:
    """Reads the stream in its order and takes each window with its own probability (rejection sampling).

    With probabilities p(x) = min(1, exp((Q(x) − c)/β)) the windows taken are distributed as the stream is,
    tilted by exp(Q/β) below c: the Boltzmann policy over everything that the stream offers, spent before the
    forward pass, so that no pass and no part of the effective batch goes to what is passed over. Where all
    probabilities are 1 it is NEXTBATCH to the letter: it reads no window more than it takes. Otherwise it
    reads ahead as many as it will probably need, and looks at what it did not need in the next step.

    Args:
        stream: where the windows come from.
        n: N, windows taken per step.
        most: windows read per window taken, at the most. When they are spent the step is filled with those
            that came nearest to being taken.
        probability: of being taken, for each of some windows; from what is known of them without a forward
            pass.
        open_windows: how many of the first windows of a step are taken as they come.
        generator: CPU generator of the draws, one per window read.
    """

    def __init__(
        self,
        stream: Windows,
        n: int,
        *,
        most: int,
        probability: Callable[[Candidates], Float[Tensor, "n"]],
        open_windows: Callable[[int], int],
        generator: torch.Generator,
    ) -> None:
        self.stream = stream
        self.n = n
        self._most = most * n
        self._probability = probability
        self._open_windows = open_windows
        self._generator = generator
        self._ahead: Candidates | None = None

    def propose(self, step: int) -> Candidates:
        began = time.perf_counter()
        unselected = self._open_windows(step)
        read: list[Candidates] = []
        chance = torch.ones(0, dtype=torch.float64)
        taken = torch.zeros(0, dtype=torch.bool)
        keys = torch.zeros(0, dtype=torch.float64)  # a window is taken where its key is not negative
        while (missing := self.n - int(taken.sum())) > 0 and len(keys) < self._most:
            # As many as it will probably take; where all are taken, none is read that is not needed now.
            wanted = missing if not len(chance) else math.ceil(missing / max(chance.mean().item(), 1e-6))
            batch = self._next(min(wanted, self._most - len(keys)))
            new = self._probability(batch).double().cpu()
            drawn = torch.rand(len(batch), dtype=torch.float64, generator=self._generator)
            read.append(replace(batch, chance=new))
            chance = torch.cat([chance, new])
            keys = torch.cat([keys, new.log() - drawn.log()])
            keys[:unselected] = torch.inf
            taken = keys >= 0
        everything = concatenate(read)
        # What came after the last that was needed is looked at in the next step, with a draw of its own.
        end = int((taken.cumsum(0) < self.n).sum()) + 1
        self._put_back(everything.take(slice(end, None)))
        chosen = keys[:end].topk(self.n).indices.sort().values
        passed_over = torch.ones(min(end, len(keys)), dtype=torch.bool)
        passed_over[chosen] = False
        metrics = {"data/windows_read": float(len(passed_over)), "time/propose": time.perf_counter() - began}
        return replace(
            everything.take(chosen),
            rows=torch.arange(self.n),
            unselected=chosen < unselected,
            passed_over=everything.take(passed_over.nonzero().squeeze(1)),
            metrics=everything.metrics | metrics,
        )

    def _next(self, n: int) -> Candidates:
        """At most n windows: those that were put back, then the stream's."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self.stream.next_batch(n)
        self._put_back(ahead.take(slice(n, None)))
        return ahead.take(slice(n))

    def _put_back(self, windows: Candidates) -> None:
        """To be read before all others."""
        parts = [part for part in (windows, self._ahead) if part is not None and len(part)]
        self._ahead = concatenate(parts) if parts else None

    def state_dict(self) -> State:
        return {
            "stream": self.stream.state_dict(),
            "generator": self._generator.get_state(),
            "ahead": None if self._ahead is None else dict(vars(self._ahead)),
        }

    def load_state_dict(self, state: State) -> None:
        self.stream.load_state_dict(state["stream"])
        self._generator.set_state(state["generator"])
        self._ahead = None if state["ahead"] is None else Candidates(**state["ahead"])
