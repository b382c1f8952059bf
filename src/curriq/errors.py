"""The one exception a user is meant to read, and one that becomes it."""


class CurriqError(ValueError):
    """A mistake in the input or the environment that the user can fix.

    The message names the value, the rule it breaks, and how to fix it. The command line prints it
    alone, without a traceback, and exits with status 2.
    """


class Diverged(ArithmeticError):
    """A loss is not finite after the update of θ; a smaller update may avoid it."""
