"""A measurement ends between two batches when its ranks are asked to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator


class Stopped(Exception):
    """The ranks were asked to stop."""


def until_stopped(batches: Iterable, stop_requested: Callable[[], bool]) -> Iterator:
    """The batches, as long as no rank was asked to stop. Collective where `stop_requested` is: every rank then has
    equally many batches.

    Raises: Stopped.
    """
    for batch in batches:
        if stop_requested():
            raise Stopped
        yield batch
