"""NEXTBATCH as a proposer: the candidates of a step are the next N windows of the stream."""

import time
from dataclasses import replace

from curriq.data.stream import Windows
from curriq.types import Candidates, State


class StreamProposer:
    """C_k = NEXTBATCH (Algorithm 1, line 3).

    Args:
        stream: where the windows come from.
        n: N, windows per step.
    """

    def __init__(self, stream: Windows, n: int) -> None:
        self.stream = stream
        self.n = n

    def propose(self, step: int) -> Candidates:
        began = time.perf_counter()
        candidates = self.stream.next_batch(self.n)
        seconds = time.perf_counter() - began
        return replace(candidates, metrics=candidates.metrics | {"time/propose": seconds})

    def state_dict(self) -> State:
        return self.stream.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.stream.load_state_dict(state)
