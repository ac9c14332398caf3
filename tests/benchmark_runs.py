"""Starts a benchmark as a user does."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import REPOSITORY


def run_benchmark(name: str, *arguments, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """`python -m benchmarks.NAME ARGUMENTS` from the root, on the CPU; text output."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", **environment}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=env)
    assert done.returncode == 0 or not check, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done
