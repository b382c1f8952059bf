"""The one exception a user is meant to read, a kind of it, and one that becomes it."""

from collections.abc import Sequence

OWN_FILES: set[str] = set()
"""Files of the modules that components of the user's own were taken from: an error there is none of ours."""


class CurriqError(ValueError):
    """A mistake in the input or the environment that the user can fix.

    The message names the value, the rule it breaks, and how to fix it. The command line prints it
    alone, without a traceback, and exits with status 2.

    Several mistakes that were found together are one error, with a line for each.
    """

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong, one message per mistake."""
        return tuple(map(str, self.args)) if len(self.args) > 1 else (super().__str__(),)

    def __str__(self) -> str:
        return "\n".join(self.faults)

    @classmethod
    def together(cls, errors: "Sequence[CurriqError]") -> "CurriqError":
        """One error with the mistakes of several, each once, in their order."""
        return cls(*dict.fromkeys(fault for error in errors for fault in error.faults))


class StreamEnded(CurriqError):
    """A stream that ends, as one of the user's own may, has no window left."""

    def __init__(self) -> None:
        super().__init__("the stream has no window left: lower --steps, or let it begin again at its end.")


class Diverged(ArithmeticError):
    """A loss is not finite after the update of θ; a smaller update may avoid it."""
