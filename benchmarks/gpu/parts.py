"""A part of a GPU run, as the functions that measure see it.

Nothing here needs more than Python's own library.
"""

from __future__ import annotations

import importlib
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.limits import CutOff, Processes, budget, words_to
from benchmarks.gpu.report import CUT_OFF, DONE, FAILED, PartFound, Report
from benchmarks.guards import free_memory, reason


@dataclass(frozen=True)
class PartPlan:
    """What to measure, and how long it may take.

    Attributes:
        function: "module:name" below benchmarks.gpu, imported when the part begins.
        arguments: of the function, after the part.
        small_budget_s: at small sizes; a CPU, and others on it, may take any time.
    """

    name: str
    title: str
    budget_s: float
    function: str
    arguments: dict[str, object] = field(default_factory=dict)
    small_budget_s: float = float("inf")

    def load(self) -> Callable:
        module, name = self.function.split(":")
        return getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)


@dataclass
class Part:
    """A part under way.

    Attributes:
        small: whether to take sizes for a CPU.
        work: a folder for what is not kept.   logs: a folder for what is kept in the archive.
        stretch_s: that a kernel is timed for.
    """

    name: str
    small: bool
    work: Path
    logs: Path
    processes: Processes
    ends: float
    report: Report
    found: PartFound

    @property
    def stretch_s(self) -> float:
        return 0.001 if self.small else 0.05

    @property
    def log(self) -> Path:
        return self.logs / f"{self.name}.log"

    def left_s(self) -> float:
        return max(0.0, self.ends - time.monotonic())

    def keep(self, heading: str, text: str, **figures) -> None:
        """Markdown and figures; those of an earlier call with the same heading or name give way."""
        # a copy, and nothing in it that JSON does not know
        self.report.keep(self.found, heading, text, json.loads(json.dumps(figures, default=str)))

    def device(self):
        """torch's."""
        import torch

        return torch.device("cpu" if self.small else "cuda")


def run_part(plan: PartPlan, part: Part) -> None:
    """Measure, and write down how it went: nothing that a part does reaches the next one."""
    part.report.begin(part.found)
    try:
        with words_to(part.log), budget(part.left_s()):
            plan.load()(part, **plan.arguments)
    except CutOff:
        part.report.end(part.found, CUT_OFF)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # a library may end the process too
        with open(part.log, "a") as log:
            log.write("".join(traceback.format_exception(error)))
        part.report.end(part.found, FAILED, reason(error))
    else:
        part.report.end(part.found, DONE)
    finally:
        part.processes.end_all()
        free_memory()
