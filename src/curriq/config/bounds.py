"""Bounds of numeric settings, and the base class of the sections, which checks them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_type_hints

from curriq.config.checks import flag, require, require_writable
from curriq.errors import CurriqError


@dataclass(frozen=True)
class Within:
    """The interval of a numeric setting, such as "[0, 1)"; what an error adds to that rule; and why there is
    an upper bound, where the setting does not show it."""

    interval: str
    hint: str = ""
    above: str = ""

    @property
    def ends(self) -> tuple[float, float]:
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        return low, high

    def check(self, name: str, value: float) -> None:
        """Raise CurriqError unless the value lies in the interval."""
        (low, high), with_low, with_high = self.ends, self.interval[0] == "[", self.interval[-1] == "]"
        inside = low < value < high or (with_low and value == low) or (with_high and value == high)
        rule = f"lie in {self.interval}{self.hint}"
        if self.above and value > high:
            rule = f"be at most {high:g}: {self.above}"
        elif self.above:
            rule = f"be {'at least' if with_low else 'greater than'} {low:g}{self.hint}"
        require(inside, f"{flag(name)} = {value}: it must {rule}.")

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        """The interval in JSON Schema's words."""
        low, high = (int(end) if end == int(end) else end for end in self.ends)
        lower = "minimum" if self.interval[0] == "[" else "exclusiveMinimum"
        upper = "maximum" if self.interval[-1] == "]" else "exclusiveMaximum"
        return handler(core) | {lower: low, upper: high}


class WithinOrAuto(Within):
    """The interval of a setting whose 0 lets the program choose, for which `auto` may be written too."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(
            lambda value: 0 if value == "auto" else value, handler(source)
        )

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [super().__get_pydantic_json_schema__(core, handler), {"enum": ["auto"]}]}


# Every upper bound is far above what is of use, and below what overflows or takes the machine down.
OVERFLOWS = "greater numbers overflow in float32"
ENDLESS = "more would take years"
IN_MEMORY = "all of them are in memory at once"
Positive = Annotated[float, Within("(0, 1e9]", above=OVERFLOWS)]
NonNegative = Annotated[float, Within("[0, 1e9]", above=OVERFLOWS)]
Share = Annotated[float, Within("[0, 1)")]
Fraction = Annotated[float, Within("(0, 1]")]
Count = Annotated[int, Within("[1, 1e10]", above=ENDLESS)]
CountOrZero = Annotated[int, Within("[0, 1e10]", above=ENDLESS)]
Size = Annotated[int, Within("[1, 1e6]", above=IN_MEMORY)]
SizeOrZero = Annotated[int, Within("[0, 1e6]", above=IN_MEMORY)]
Stock = Annotated[int, Within("[1, 1e9]", above=IN_MEMORY)]
StockOrZero = Annotated[int, Within("[0, 1e9]", above=IN_MEMORY)]
SizeOrAuto = Annotated[int, WithinOrAuto("[0, 1e6]", above=IN_MEMORY)]
StockOrAuto = Annotated[int, WithinOrAuto("[0, 1e9]", above=IN_MEMORY)]
"""`Size` is of a step, a model or a text, `Stock` of what is kept from step to step."""
Seed = Annotated[int, Within("[0, 9223372036854775807]", above="a seed has at most 63 bits")]

Pairs = Iterator[tuple[str, str, str]]
"""Two settings by name; why they exclude each other, and how to fix it."""


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Types and bounds of a section's fields."""
    return get_type_hints(kind, include_extras=True)


class Section:
    """Base of the dataclasses of settings; making one checks its bounds, its own rules and its pairs, and
    names all that it refuses."""

    def __post_init__(self) -> None:
        errors: list[CurriqError] = []
        for name, hint in _hints(type(self)).items():
            try:
                for bound in getattr(hint, "__metadata__", ()):
                    bound.check(name, getattr(self, name))
                require_writable(flag(name), getattr(self, name))
            except CurriqError as error:
                errors.append(error)
        if errors:
            raise CurriqError.together(errors)
        self.check()
        pairs = [f"{self.spelled(a)} with {self.spelled(b)}: {why}." for a, b, why in self.illegal_pairs()]
        if pairs:
            raise CurriqError(*pairs)

    def check(self) -> None:
        """Raise CurriqError for what is neither a bound nor a pair."""

    def illegal_pairs(self) -> Pairs:
        """The pairs of settings that are both set and exclude each other."""
        yield from ()

    def value(self, name: str) -> Any:
        """A setting by its name."""
        return getattr(self, name)

    def spelled(self, name: str) -> str:
        """A setting as the user writes it: `--beta 0.1`, `--no-q-weighting`, `--q-features last mean`."""
        value = self.value(name)
        if isinstance(value, bool):
            return flag(name if value else f"no_{name}")
        return " ".join((flag(name), *map(str, value if isinstance(value, tuple) else (value,))))
