"""Starts a benchmark as a user does."""

from __future__ import annotations

import subprocess

from conftest import run_stage


def run_benchmark(name: str, *arguments, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """`python -m benchmarks.NAME ARGUMENTS` from the root, on the CPU; text output."""
    return run_stage(f"benchmarks.{name}", *arguments, check=check, environment=environment)
