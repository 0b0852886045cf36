#!/usr/bin/env bash
# Brings .venv up to date: the pinned packages of requirements/lock.txt, and the patched
# wheel built from this tree. Run it, or source it and call `setup`.
set -euo pipefail

# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# sglang imports 5,000 modules in each of its processes: without bytecode that doubles the
# time that a server takes to start.
unset PYTHONDONTWRITEBYTECODE

setup() {
    ensure_uv
    ensure_tools
    [[ -e $VENV/.lock.txt-stamp ]] ||
        echo "The first run installs about 10 GB, which takes minutes" >&2
    ensure_requirements lock.txt --no-deps
    install_once wheel "$(digest python scripts/overlay scripts/patchset upstream.toml)" \
        install_patched_wheel
}

install_patched_wheel() {
    echo "Building the patched wheel" >&2
    rm -rf "$ROOT"/dist/sglang-*.whl
    "$ROOT/scripts/patchset" wheel --output "$ROOT/dist" >&2
    "$UV" pip install --python "$VENV/bin/python" --no-deps --reinstall-package sglang \
        "$ROOT"/dist/sglang-*.whl >&2
}

# SmolLM2-135M-Instruct in MXFP8, from its package and converted on the first call.
DEFAULT_MODEL=$ROOT/.cache/models/SmolLM2-135M-Instruct-MXFP8
get_default_model() {
    [[ -f $DEFAULT_MODEL/config.json ]] || locked make_default_model >&2
}

make_default_model() {
    [[ ! -f $DEFAULT_MODEL/config.json ]] || return 0
    # Bars that cannot overwrite themselves stay short.
    [[ -t 2 ]] || export TQDM_MININTERVAL=10
    # What a killed run left behind.
    rm -rf "${DEFAULT_MODEL%/*}"/.SmolLM2-135M-Instruct*.partial-*
    UV="$UV" "$VENV/bin/python" "$ROOT/scripts/fetch_model.py"
    "$VENV/bin/python" -W ignore "$ROOT/scripts/convert_to_mxfp8.py" \
        "${DEFAULT_MODEL%-MXFP8}" "$DEFAULT_MODEL"
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
    case ${1-} in
        "") setup ;;
        -h | --help)
            cat <<'USAGE'
Usage: ./scripts/setup.sh

Brings .venv up to date: the packages of requirements/lock.txt and the patched sglang, built
from this tree. serve.sh and test.sh call it.

It needs Linux, Python 3.11 or 3.12 and a package index; no GPU. The first run takes minutes
and about 10 GB, later ones a second where nothing changed. Safe to interrupt: what was
under way is done again by the next run.
USAGE
            ;;
        *) echo "setup.sh: it takes no arguments (see --help)" >&2 && exit 2 ;;
    esac
fi
