#!/usr/bin/env bash
# What a usual GPU image (torch 2.11, Python 3.12) lacks, as wheels for a machine without network: some 9 MB.
#
#   bash benchmarks/gather_wheels.sh [FOLDER]       # where there is network; default: benchmarks/wheels
#   python3 -m benchmarks.run_gpu --wheels FOLDER   # where there is none
#
# PYTHON        the interpreter whose pip is used (default: python3); it may be another version than the GPU's
# FOR_PYTHON    the GPU's Python (default: 3.12)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-benchmarks/wheels}
pip=("${PYTHON:-python3}" -m pip --disable-pip-version-check)
version=${FOR_PYTHON:-3.12}
mkdir -p "$folder"

# A line of requirements.txt, without its comment.
required() { sed -n "s/^\($1[>=<][^ #]*\).*/\1/p" requirements.txt; }

# deepspeed has no wheel: its source becomes one without compiling an operator
DS_BUILD_OPS=0 "${pip[@]}" wheel --no-deps --wheel-dir "$folder" "$(required deepspeed)"
for_gpu=(download --only-binary=:all: --python-version "$version" --implementation cp --abi "cp${version/./}" --abi none
  --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any --dest "$folder")
# pydantic with pydantic-core, annotated-types, typing-inspection and typing-extensions; pytest for the `gpu` tests
"${pip[@]}" "${for_gpu[@]}" "$(required pydantic)" 'pytest>=8'
"${pip[@]}" "${for_gpu[@]}" --no-deps hjson "$(required webdataset)" braceexpand "$(required timm)" 'pytest-timeout>=2.3'
ls -l "$folder"
