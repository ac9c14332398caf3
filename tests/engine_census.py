"""What DeepSpeed's engines really send and hold, counted once for the tests of traffic and of state: one launch for
each number of ranks.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path

from benchmarks import plan_engine
from benchmarks.plan_engine import Case
from peco_ds.data.atomic_files import lock_file
from peco_ds.errors import UserError

# benchmarks/plan_engine.py counts these too; here they would say nothing that their neighbours do not.
LEFT_OUT = (
    "zero1, fp32",
    "zero1, summed in bf16, no overlap",
    "zero2, no overlap",
    "zero2, reduce_scatter false",
    "zero3, fp32",
    "zero3, reduced in bf16",
    "zero3, no overlap",
    "zero3, clipping off",
    "ZeRO-2, bf16, one bucket",
    "ZeRO-3, bf16, summed in bf16",
)
TRAFFIC = {
    2: [case.name for case in plan_engine.TRAFFIC if case.name not in LEFT_OUT],
    4: ["zero1, classifier", "zero2, reduced to owners", "zero3, 3 micro-steps"],
}
STATE = {
    1: ["ZeRO-1, bf16", "ZeRO-2, bf16", "ZeRO-3, bf16"],
    2: [case.name for case in plan_engine.STATE if case.name not in LEFT_OUT],
    4: ["ZeRO-0, bf16", "ZeRO-1, bf16", "ZeRO-2, bf16", "ZeRO-3, bf16", "ZeRO-2, fp32"],
}
OFFLOADED = [
    "ZeRO-1, optimiser offloaded",
    "ZeRO-2, optimiser offloaded",
    "ZeRO-2, optimiser offloaded, summed in bf16",
    "ZeRO-3, optimiser offloaded",
    "ZeRO-3, optimiser and weights offloaded",
]

_CASES = {case.name: case for case in (*plan_engine.TRAFFIC, *plan_engine.STATE, *plan_engine.OFFLOADED)}


def census(ranks: int) -> dict[str, tuple[Case, dict]]:
    """Name of a case -> the case, and what rank 0 counted."""
    rows, fault = _launch(ranks)
    assert not fault, fault
    return rows


@functools.cache
def _launch(ranks: int) -> tuple[dict[str, tuple[Case, dict]], str]:
    """A launch that fails is not tried again by every test that needs it; both test files share one that succeeds."""
    names = [*TRAFFIC.get(ranks, []), *STATE[ranks], *(OFFLOADED if ranks == 2 else [])]
    cases = [_CASES[name] for name in names]
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())
    shared = Path(tempfile.gettempdir()) / f"peco_census_{run}_{ranks}.json"
    with (
        lock_file(shared.with_suffix(".lock"), wait=True),
        tempfile.TemporaryDirectory(prefix="peco_census_") as folder,
    ):
        if not shared.exists():
            try:
                shared.write_text(json.dumps(plan_engine.measure(cases, ranks, Path(folder))))
            except UserError as error:
                return {}, str(error)
    return dict(zip(names, zip(cases, json.loads(shared.read_text())))), ""


def each(names: dict[int, list[str]]) -> list[tuple[int, str]]:
    return [(ranks, name) for ranks, found in names.items() for name in found]
