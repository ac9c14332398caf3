#!/usr/bin/env bash
# Everything that CI checks, on a fresh clone: the environment (.venv), lint and types, then the tests.
#   bash tests/run.sh            all tests
#   bash tests/run.sh --quick    what starts no process and trains nothing
#   bash tests/run.sh -k slurm   other arguments go to pytest
# PECO_TEST_WORKERS: so many tests run at a time (default 2; each takes a core and about 3 GB).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/setup_venv.sh requirements.txt tests/requirements.txt --no-deps requirements-judges.txt

chosen=()
if [ "${1:-}" = --quick ]; then
    shift
    chosen=(-m "not slow and not slurm")
fi

ruff format --check --quiet . || { echo "error: not formatted; run: ruff format" >&2; exit 1; }
ruff check --quiet .
if grep -q '^\[tool.mypy\]' pyproject.toml; then
    mypy peco_ds
fi
# Files stay whole, the longest come first (tests/conftest.py).
exec python -m pytest -rs --durations=10 -n "${PECO_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder \
    "${chosen[@]}" "$@"
