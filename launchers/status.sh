#!/usr/bin/env bash
# Where runs stand, read off their folders alone, while they write or on a copy.   bash launchers/status.sh RUN [RUN...] [--verify]
home="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || exit
python="${PECO_VENV:-$home/.venv}/bin/python"
[ -x "$python" ] || python=python
exec "$python" "$home/peco_ds/run_status.py" "$@"
