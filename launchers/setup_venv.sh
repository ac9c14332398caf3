# shellcheck shell=bash
# Sourced, not run:   source launchers/setup_venv.sh requirements.txt [more files] [--no-deps files]
# Makes the virtual environment (PECO_VENV, default .venv at the root) if it is missing, installs the named files and this
# package into it, and activates it. What stands in the files behind --no-deps is installed without its dependencies.
# A second call with unchanged files installs nothing. Needs Python >= 3.11; no root.

peco_python() {  # name of the first Python that is new enough
    local candidate
    for candidate in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python >= 3.11 found; install one, or name it: PYTHON=/path/to/python3" >&2
    return 2
}

peco_make_venv() {  # ROOT VENV
    local python
    python="$(peco_python)" || return
    echo "setting up $2 with $("$python" --version)" >&2
    if ! "$python" -m venv "$2" >&2; then
        rm -rf "$2"
        echo "error: $python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
        return 2
    fi
}

# peco_install ROOT VENV FILE... [--no-deps FILE...]
# What was installed is remembered by content, so an interrupted install is taken up again.
peco_install() {
    local root="$1" venv="$2" file stamp missing=() alone=() stamps=() with=missing
    shift 2
    mkdir -p "$venv/.installed"
    for file in "$@"; do
        if [ "$file" = --no-deps ]; then
            with=alone
            continue
        fi
        stamp="$venv/.installed/$(sha256sum < "$root/$file" | cut -c1-32)"
        stamps+=("$stamp")
        if [ ! -e "$stamp" ] && [ "$with" = alone ]; then
            alone+=(-r "$root/$file")
        elif [ ! -e "$stamp" ]; then
            missing+=(-r "$root/$file")
        fi
    done
    if [ ${#missing[@]} -gt 0 ]; then
        echo "installing ${missing[*]} (several GB and some minutes the first time)" >&2
        # Together, so that one file's choice of versions cannot break the other's. DeepSpeed compiles its operators when first used.
        DS_BUILD_OPS=0 "$venv/bin/python" -m pip install --quiet "${missing[@]}" >&2 || return
    fi
    if [ ${#alone[@]} -gt 0 ]; then
        "$venv/bin/python" -m pip install --quiet --no-deps "${alone[@]}" >&2 || return
    fi
    stamp="$venv/.installed/$(cat "$root/pyproject.toml" "$root/requirements.txt" | sha256sum | cut -c1-32)"
    if [ ! -e "$stamp" ]; then
        "$venv/bin/python" -m pip install --quiet --no-deps -e "$root" >&2 || return
        touch "$stamp"
    fi
    touch "${stamps[@]}"
}

peco_setup() {
    local root venv
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return
    venv="${PECO_VENV:-$root/.venv}"
    [ -x "$venv/bin/python" ] || peco_make_venv "$root" "$venv" || return
    (flock 9 && peco_install "$root" "$venv" "$@") 9> "$venv/.install_lock" || return
    # shellcheck disable=SC1091
    source "$venv/bin/activate"

    # A build that was killed leaves its lock, and the next one waits on it for ever. The folder is ours alone, so where
    # nobody else runs from it (they would hold descriptor 9) every lock in it is left over.
    export TORCH_EXTENSIONS_DIR="$venv/torch_extensions"
    mkdir -p "$TORCH_EXTENSIONS_DIR"
    exec 9> "$venv/.in_use"
    if flock --nonblock 9; then
        find "$TORCH_EXTENSIONS_DIR" -name lock -delete
    fi
    flock --shared 9

    if ! command -v "${CXX:-c++}" > /dev/null; then
        echo "warning: no C++ compiler; DeepSpeed on CPU compiles one operator at its first start (apt-get install g++)" >&2
    elif ! [ -e "$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; then
        echo "warning: no Python.h; DeepSpeed on CPU compiles one operator at its first start (apt-get install python3-dev)" >&2
    fi
}

peco_setup "$@"
