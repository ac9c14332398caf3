"""Things measured by turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator


def by_turns(names: Collection[str], rounds: int, *, warm_up: int = 1) -> Iterator[tuple[bool, str]]:
    """(whether it counts, name): each name once a round, in an order that turns from round to round.

    Args:
        names: one that is removed meanwhile has no turn in later rounds.  warm_up: rounds before those that count.
    """
    for number in range(-warm_up, rounds):
        for name in list(names)[:: 1 if number % 2 else -1]:
            yield number >= 0, name


def measured(ways: dict[str, Callable[[], float]], rounds: int, *, warm_up: int = 1) -> dict[str, list[float]]:
    """What each way gives, an entry a counted round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for counted, name in by_turns(ways, rounds, warm_up=warm_up):
        value = ways[name]()
        if counted:
            found[name].append(value)
    return found


def spread(values: list[float], form: str = ".2f") -> str:
    """Median, smallest and largest; "" of none."""
    if not values:
        return ""
    middle, low, high = (format(value, form) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def ratios(over: list[float], under: list[float]) -> list[float]:
    """Round by round."""
    return [one / other for one, other in zip(over, under)]
