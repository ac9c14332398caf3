#!/usr/bin/env bash
# All tests on a fresh clone: environment first (.venv), then pytest. Arguments go to pytest:  bash tests/run.sh -k slurm
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/setup_venv.sh requirements.txt tests/requirements.txt
exec python -m pytest -rs "$@"
