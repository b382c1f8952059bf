"""The trivial half of the Selector protocol."""

from curriq.types import Candidates, Metrics, Outcome, State


class PlainSelector:
    """Keeps all candidates, learns nothing and has no state; a subclass adds `scores`."""

    needs_entropy: bool = False
    needs_reward: bool = False

    def narrow(self, step: int, candidates: Candidates) -> Candidates:
        return candidates

    def observe(self, step: int, outcome: Outcome) -> Metrics:
        return {}

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        assert not state, f"{type(self).__name__} has no state, but was given {sorted(state)}"
