# Sourced by the scripts beside it: the release, uv, its environment, and the way to install
# into that once.

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
# Within itself, also in scripts that COMMAND starts, it does not wait.
locked() {
    if [[ -n ${MXFP8_SETUP_LOCKED-} ]]; then
        "$@"
        return
    fi
    mkdir -p "$ROOT/.cache"
    (
        flock -n 9 || { echo "Waiting for another setup to finish" >&2; flock 9; }
        export MXFP8_SETUP_LOCKED=1
        "$@"
    ) 9>"$ROOT/.cache/setup.lock"
}

# install_once NAME WANT COMMAND...: runs COMMAND, which installs into `VENV`, unless the last
# one for NAME ended well and had the same WANT.
install_once() {
    is_installed "$1" "$2" || locked install_now "$@"
}

is_installed() {
    [[ -x $VENV/bin/python && $(cat "$VENV/.$1-stamp" 2>/dev/null) == "$2" ]]
}

install_now() {
    # Another process may have done it meanwhile.
    ! is_installed "$1" "$2" || return 0
    ensure_uv
    ensure_venv
    local stamp=$VENV/.$1-stamp reinstall=""
    ! is_installed "$1" interrupted || reinstall=--reinstall
    echo interrupted >"$stamp"
    "${@:3}"
    echo "$2" >"$stamp"
}

# Prints one hash of the names and contents of files and folders below the root.
digest() {
    (
        cd "$ROOT"
        find "$@" -type f -not -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z |
            xargs -0 sha256sum | sha256sum
    )
}

# Finds uv, or installs it into a private virtual environment.
ensure_uv() {
    UV=$(command -v uv || echo "$ROOT/.cache/uv/bin/uv")
    [[ -x $UV ]] || locked install_uv
}

install_uv() {
    echo "Installing uv $UV_VERSION into .cache/uv" >&2
    python3 -m venv "$ROOT/.cache/uv"
    "$ROOT/.cache/uv/bin/python" -m pip install "uv==$UV_VERSION" >&2
}

# Makes `VENV`, with Python 3.11 or 3.12.
ensure_venv() {
    local check='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'
    "$VENV/bin/python" -c "$check" 2>/dev/null ||
        "$UV" venv --clear --no-python-downloads --python '>=3.11,<3.13' "$VENV" >&2
}

# ensure_requirements FILE [OPTION...]: installs a file of requirements/ into `VENV`, with
# these options of `uv pip install`.
ensure_requirements() {
    install_once "$1" "$(digest "requirements/$1")" install_requirements "$@"
}

install_requirements() {
    echo "Installing the packages of requirements/$1" >&2
    # What an interrupted run left half installed looks installed: $reinstall.
    # shellcheck disable=SC2086
    "$UV" pip install --python "$VENV/bin/python" $reinstall "${@:2}" \
        -r "$ROOT/requirements/$1" >&2
}

# What scripts/patchset needs.
ensure_tools() {
    ensure_requirements tools.txt
}
