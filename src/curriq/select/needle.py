"""Needle in a haystack: one window of real text among N − 1 windows that repeat one token.

The held-out sets are copies of the needle, so training on it is the only thing that earns reward, and a
selector that works puts its weight there.
"""

from dataclasses import replace

import torch

from curriq.config import RunConfig
from curriq.data.corpus import Corpus, open_corpus
from curriq.data.split import HeldOutSets
from curriq.data.stream import window_id
from curriq.data.tokenizer import ordinary_ids
from curriq.types import Candidates, State

SOURCES = ("needle", "haystack")


class NeedleProposer:
    """Puts the needle at a random position among constant windows of random ordinary tokens.

    Args:
        corpus: what `needle_corpus` returns; the needle is its first reward window.
        n: N, windows per step.
        generator: draws the position and the tokens.
    """

    def __init__(self, corpus: Corpus, n: int, generator: torch.Generator) -> None:
        self.needle = corpus.held_out.reward[0]
        self.n = n
        self._straw = torch.from_numpy(ordinary_ids(corpus.tokenizer))
        self._generator = generator

    def propose(self, step: int) -> Candidates:
        drawn = torch.randint(len(self._straw), (self.n,), generator=self._generator)
        position = int(torch.randint(self.n, (), generator=self._generator))
        tokens = self._straw[drawn].unsqueeze(1).repeat(1, len(self.needle))
        tokens[position] = self.needle
        source = torch.ones(self.n, dtype=torch.int64)
        source[position] = 0
        ids = [window_id(SOURCES[s], row.numpy()) for s, row in zip(source.tolist(), tokens, strict=True)]
        return Candidates(
            tokens=tokens, window_ids=torch.tensor(ids), source=source, rows=torch.arange(self.n)
        )

    def state_dict(self) -> State:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: State) -> None:
        self._generator.set_state(state["generator"])


def needle_corpus(config: RunConfig) -> Corpus:
    """The corpus of `config` with copies of its first reward window, the needle, as held-out sets.

    Raises:
        CurriqError: what `open_corpus` refuses.
    """
    corpus = open_corpus(config)
    needle = corpus.held_out.reward[0]
    sets = HeldOutSets(
        reward=needle.repeat(config.data.reward_set_size, 1),
        validation=needle.repeat(config.data.validation_set_size, 1),
        test=needle.repeat(config.data.test_set_size, 1),
    )
    return replace(corpus, held_out=sets, source_names=SOURCES)
