"""One random generator per purpose, so that no component can disturb another's draws.

Two arms of a comparison with the same seed see the same stream and the same reward subsets, however
many numbers their selectors or critics draw, because each purpose has its own generator seeded from
`sha256("seed/purpose")`. Generators live on the CPU: a run draws the same numbers on every device.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed for one purpose: the first eight bytes of `sha256("seed/purpose")`."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Generators:
    """Hands out named CPU generators and saves and restores the state of all of them.

    Calling with the same purpose twice gives the same generator object.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[str, torch.Generator] = {}

    def __call__(self, purpose: str) -> "torch.Generator":
        import torch  # here, so that data can be checked before torch is loaded

        if purpose not in self._generators:
            generator = torch.Generator(device="cpu")
            generator.manual_seed(derive_seed(self.seed, purpose))
            self._generators[purpose] = generator
        return self._generators[purpose]

    def state_dict(self) -> "dict[str, torch.Tensor]":
        return {purpose: g.get_state() for purpose, g in self._generators.items()}

    def load_state_dict(self, state: "dict[str, torch.Tensor]") -> None:
        """The states that were saved; a purpose that had not drawn by then begins again."""
        for purpose in self._generators.keys() - state.keys():
            self(purpose).manual_seed(derive_seed(self.seed, purpose))
        for purpose, generator_state in state.items():
            self(purpose).set_state(generator_state)
