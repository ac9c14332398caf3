"""What a settings field says beyond its type and default, as `Annotated[type, mark, ...]`, and how the marks are read.

`config.py` holds the fields. `recipe_checks.py` refuses what lies outside `Bounds`, the run folder compares what is not
`FreeOnResume`, and `old_spellings.py` reads the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Bounds:
    """The range of a number, or of every number of a tuple. None is never outside.

    Args:
        or_zero: 0 is allowed too; it switches something off.
        because: the reason, where the range alone does not tell it.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    or_zero: bool = False
    because: str = ""

    def fault(self, value) -> str:
        """Why a value is refused, as the end of a sentence; "" if it is not."""
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        if all(number is None or self._holds(number) for number in numbers):
            return ""
        each = "each " if isinstance(value, (tuple, list)) else ""
        reason = f" ({self.because})" if self.because else ""
        return f"{each}must be {self._words()}{', or 0' if self.or_zero else ''}{reason}"

    def _words(self) -> str:
        low = self.at_least if self.above is None else self.above
        high = self.at_most if self.below is None else self.below
        if low is None:
            return f"at most {high}" if self.below is None else f"below {high}"
        if high is None:
            return f"at least {low}" if self.above is None else f"above {low}"
        return f"in {'[' if self.above is None else '('}{low}, {high}{']' if self.below is None else ')'}"

    def _holds(self, number: float) -> bool:
        return (self.or_zero and number == 0) or (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )


@dataclass(frozen=True)
class FreeOnResume:
    """May differ between a run and its continuation. On a section: all its fields may."""


@dataclass(frozen=True)
class AbsentMeans:
    """What runs of `stage` did before the field existed, where that is not today's default."""

    value: Any
    stage: str


class Renamed:
    """Former spellings of values, each with today's: `Renamed(picture="image")`."""

    def __init__(self, **today: str) -> None:
        self.today = today


@dataclass(frozen=True)
class FormerKey:
    """The dotted key that the setting once had, for example `run.recompute`."""

    key: str


@cache
def settings_fields(settings_type: type) -> list[tuple[str, Any, tuple]]:
    """(name, type without marks, marks) of every field of one dataclass, in order."""
    hints = get_type_hints(settings_type, include_extras=True)
    names = [item.name for item in fields(settings_type)]
    return [(name, _bare(hints[name]), tuple(_marks(hints[name]))) for name in names]


def _bare(hint):
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _marks(hint) -> Iterator:
    """Marks of a hint and of the types inside it, as in `AtLeastOne | None` and `tuple[Share, ...]`."""
    if get_origin(hint) is Annotated:
        hint, *marks = get_args(hint)
        yield from marks
    for part in get_args(hint):
        yield from _marks(part)


@cache
def recipe_fields(recipe_type: type) -> dict[str, tuple]:
    """Dotted setting of a recipe -> its marks and those of the sections that it stands in."""
    found: dict[str, tuple] = {}
    for name, kind, marks in settings_fields(recipe_type):
        if isinstance(kind, type) and is_dataclass(kind):
            found |= {f"{name}.{inner}": (*marks, *own) for inner, own in recipe_fields(kind).items()}
        else:
            found[name] = marks
    return found


def known_keys(recipe_type: type) -> list[str]:
    """Every dotted setting of a recipe."""
    return list(recipe_fields(recipe_type))


@cache
def text_keys(recipe_type: type) -> frozenset[str]:
    """Every dotted setting of a recipe that is plain text, such as a path."""
    found: set[str] = set()
    for name, kind, _ in settings_fields(recipe_type):
        if isinstance(kind, type) and is_dataclass(kind):
            found |= {f"{name}.{inner}" for inner in text_keys(kind)}
        elif kind is str:
            found.add(name)
    return frozenset(found)


def keys_with(recipe_type: Any, mark_type: type) -> dict[str, Any]:
    """Dotted setting -> its first mark of a type, for the settings of a recipe, or of a union of recipes, that have
    one.
    """
    return {
        key: next(mark for mark in marks if isinstance(mark, mark_type))
        for one_type in get_args(recipe_type) or (recipe_type,)
        for key, marks in recipe_fields(one_type).items()
        if any(isinstance(mark, mark_type) for mark in marks)
    }


def values_before(recipe_type: Any, stage: str) -> dict[str, Any]:
    """Dotted setting -> what runs of a stage did before it existed, for those whose default says otherwise today."""
    return {
        key: mark.value
        for one_type in get_args(recipe_type) or (recipe_type,)
        for key, marks in recipe_fields(one_type).items()
        for mark in marks
        if isinstance(mark, AbsentMeans) and mark.stage == stage
    }
