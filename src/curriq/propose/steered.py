"""NEXTBATCH by the policy: the stream is read on until enough windows have been taken."""

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

    With probabilities p(x) = min(1, exp((Q(x) − c)/β)) the windows taken are distributed as the stream's are,
    tilted by exp(Q/β): the Boltzmann policy over everything that the stream has to offer, spent before the
    forward pass, so that no pass and no part of the effective batch goes to what is passed over. Where all
    probabilities are 1 it is NEXTBATCH to the letter: it reads no window more than it takes.

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

    def propose(self, step: int) -> Candidates:
        began = time.perf_counter()
        unselected = self._open_windows(step)
        read: list[Candidates] = []
        keys = torch.zeros(0, dtype=torch.float64)  # a window is taken where its key is not negative
        while (missing := self.n - int((keys >= 0).sum())) and len(keys) < self._most:
            # As many as are missing: if all were taken, none would have been read in vain.
            batch = self.stream.next_batch(min(missing, self._most - len(keys)))
            drawn = torch.rand(len(batch), dtype=torch.float64, generator=self._generator)
            chance = self._probability(batch).double().cpu()
            new = chance.log() - drawn.log()
            new[: max(0, unselected - len(keys))] = torch.inf
            read.append(replace(batch, chance=chance))
            keys = torch.cat([keys, new])
        taken = keys.topk(self.n).indices.sort().values
        everything = concatenate(read)
        passed_over = torch.ones(len(keys), dtype=torch.bool)
        passed_over[taken] = False
        metrics = {"data/windows_read": float(len(keys)), "time/propose": time.perf_counter() - began}
        return replace(
            everything.take(taken),
            rows=torch.arange(self.n),
            unselected=taken < unselected,
            passed_over=everything.take(passed_over.nonzero().squeeze(1)),
            metrics=everything.metrics | metrics,
        )

    def state_dict(self) -> State:
        return {"stream": self.stream.state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: State) -> None:
        self.stream.load_state_dict(state["stream"])
        self._generator.set_state(state["generator"])
