"""One stream in S fixed shards, of which each process reads its own.

The documents are dealt out to the shards once and for all. A shard reads, cuts, shuffles and, behind a
filter, accepts with generators of its own, so that what it gives does not depend on the process that reads
it. Then the windows of all shards are put together in the shards' order, on every process: the windows of a
run are the same for any number of processes, and the cost of reading falls with it.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from curriq import parallel
from curriq.config import require
from curriq.data.prefetch import Prefetched
from curriq.data.stream import WindowStream
from curriq.errors import CurriqError
from curriq.state import State, Stateful
from curriq.types import Cost, Offer

Item = TypeVar("Item")


def own_shards(count: int) -> range:
    """The shards that this process reads, of so many; neighbours, so that the order of the shards is that of
    the processes. A single shard is read whole by every process.

    Raises:
        CurriqError: they cannot be dealt out evenly to the processes of the run.
    """
    world = parallel.world_size()
    if count == 1:
        return range(1)
    fitting = [w for w in range(1, count + 1) if count % w == 0]
    require(
        count % world == 0,
        f"--stream-shards = {count} cannot be dealt out evenly to {world} processes: start a number of them "
        f"that divides it ({', '.join(map(str, fitting))}), or a new run with a multiple of {world} shards.",
    )
    each = count // world
    return range(parallel.rank() * each, (parallel.rank() + 1) * each)


def from_all_shards(own: Callable[[], Mapping[int, Item]]) -> list[Item]:
    """What every shard has, in the shards' order, on all processes; `own` gives it for those of this one.

    Raises:
        CurriqError: on all processes, the first one of any process's shards.
    """
    ours: Mapping[int, Item] = {}
    failure = None
    try:
        ours = own()
    except CurriqError as error:
        failure = error
    by_shard: dict[int, Item] = {}
    for theirs, error in parallel.gather_objects((ours, failure)):
        if error is not None:
            raise failure or error
        by_shard |= theirs
    return [by_shard[number] for number in sorted(by_shard)]


def together(own: Callable[[], Mapping[int, Offer]]) -> Offer:
    """The offers of all shards as one, in the shards' order, on all processes: those that were accepted, and
    those that were rejected.

    Raises:
        CurriqError: on all processes, the first one of any process's shards.
        RanksDiffer: the offers were made by different versions of the policy.
    """
    packed = from_all_shards(lambda: {number: _packed(offer) for number, offer in own().items()})
    versions = [entry["version"] for entry in packed]
    if len({*versions}) > 1:
        apart = next(number for number, version in enumerate(versions) if version != versions[0])
        raise parallel.RanksDiffer(
            f"the shards of the stream were read by different versions of the policy (shard 0 by version "
            f"{versions[0]}, shard {apart} by version {versions[apart]})"
        )
    offers = [_unpacked(entry) for entry in packed]
    rejected = [offer.rejected for offer in offers if offer.rejected is not None]
    epochs = [offer.epoch for offer in offers if offer.epoch is not None]
    return replace(
        Offer.cat(offers),
        rejected=Offer.cat(rejected) if rejected else None,
        epoch=max(epochs, default=None),
        version=versions[0],
    )


def _packed(offer: Offer) -> dict[str, Any]:
    """Tokens in 4 bytes each; the rest as it is."""
    return {"offer": offer.state_dict(), "cost": offer.cost, "version": offer.version}


def _unpacked(entry: dict[str, Any]) -> Offer:
    cost: Cost = entry["cost"]
    return replace(Offer.from_state_dict(entry["offer"]), cost=cost, version=entry["version"])


def states_of_all(own: Mapping[int, Stateful]) -> State:
    """The state of every shard by its number, on rank 0; those of this process elsewhere. All must ask."""
    ours = {str(number): part.state_dict() for number, part in own.items()}
    states: State = {}
    for theirs in parallel.gather_to_rank_zero(ours):
        states |= theirs
    return states


class ShardedStream:
    """The windows of all shards, in turn: with n windows per reading, n/S of each, in the shards' order.

    Args:
        shards: those of this process, by number.
        count: S.
    """

    def __init__(self, shards: Mapping[int, WindowStream | Prefetched], count: int) -> None:
        self.shards = shards
        self.count = count
        self.fingerprint = next(iter(shards.values())).fingerprint
        self._position = 0  # windows that have been read

    def read(self, n: int) -> Offer:
        """The next n windows, on every process; all must ask for as many.

        Raises:
            CurriqError: on all processes, where a source of any cannot be read on.
        """

        def own() -> dict[int, Offer]:
            offers = {}
            for number, shard in self.shards.items():
                wanted = self._windows_of(number, self._position + n) - self._windows_of(
                    number, self._position
                )
                if wanted:
                    offers[number] = shard.read(wanted)
            return offers

        offer = together(own)
        self._position += n
        return offer

    def _windows_of(self, shard: int, position: int) -> int:
        """Windows of a shard among the first so many of the stream: they are taken in turn."""
        return (position - shard - 1) // self.count + 1

    @property
    def skipped(self) -> dict[str, int]:
        """Rows that the shards have left out of each source, by its name; all processes must ask."""
        total: Counter[str] = Counter()
        for theirs in from_all_shards(lambda: {number: s.skipped for number, s in self.shards.items()}):
            total.update(theirs)
        return dict(total)

    def state_dict(self) -> State:
        """That of all shards, on rank 0; all processes must ask."""
        return {"position": self._position, "shards": states_of_all(self.shards)}

    def load_state_dict(self, state: State) -> None:
        """Continue exactly where the state was taken, on any number of processes."""
        self._position = state["position"]
        for number, shard in self.shards.items():
            shard.load_state_dict(state["shards"][str(number)])
