#!/usr/bin/env bash
# Brings a release's environment up to date: the pinned packages of requirements/lock*.txt,
# and the patched wheel built from this tree. Run it, or source it and call `setup`.
set -euo pipefail

# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# sglang imports 5,000 modules in each of its processes: without bytecode that doubles the
# time that a server takes to start.
unset PYTHONDONTWRITEBYTECODE

setup() {
    ensure_uv
    ensure_tools
    [[ -e $VENV/.$LOCK-stamp ]] ||
        echo "The first run installs about 10 GB, which takes minutes" >&2
    ensure_requirements "$LOCK" --no-deps
    install_once wheel "$(digest python scripts/overlay scripts/patchset "$EDITS")" \
        install_patched_wheel
}

install_patched_wheel() {
    echo "Building the patched wheel" >&2
    rm -rf "$ROOT/dist/sglang-$RELEASE+"*.whl
    "$ROOT/scripts/patchset" wheel --release "$RELEASE" --output "$ROOT/dist" >&2
    "$UV" pip install --python "$VENV/bin/python" --no-deps --reinstall-package sglang \
        "$ROOT/dist/sglang-$RELEASE+"*.whl >&2
}

# SmolLM2-135M-Instruct in MXFP8, from its package and converted on the first call. The
# converter is the default release's, and both releases read what its transformers write.
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
    MXFP8_RELEASE=$DEFAULT_RELEASE "$ROOT/scripts/setup.sh"
    UV="$UV" "$ROOT/.venv/bin/python" "$ROOT/scripts/fetch_model.py"
    "$ROOT/.venv/bin/python" -W ignore "$ROOT/scripts/convert_to_mxfp8.py" \
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
    [[ ${1-} != --release ]] || { use_release "${2-none}" && shift 2; }
    case ${1-} in
        "") setup ;;
        -h | --help)
            cat <<'USAGE'
Usage: ./scripts/setup.sh [--release VERSION]

Brings .venv up to date: the packages of requirements/lock.txt and the patched sglang, built
from this tree. With --release 0.5.23 it is .venv-0.5.23, lock-0.5.23.txt and that release's
sglang. serve.sh and test.sh call it.

It needs Linux, Python 3.11 or 3.12 and a package index; no GPU. The first run takes minutes
and about 10 GB, later ones a second where nothing changed. Safe to interrupt: what was
under way is done again by the next run.
USAGE
            ;;
        *) echo "setup.sh: unknown argument $1 (see --help)" >&2 && exit 2 ;;
    esac
fi
