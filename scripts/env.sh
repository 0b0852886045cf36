# Sourced by the scripts beside it: the repository's root, and its `.venv`.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
UV_VERSION=0.13.9

# Finds uv, or installs it into a private virtual environment.
ensure_uv() {
    if command -v uv >/dev/null; then
        UV=uv
        return
    fi
    UV=$ROOT/.cache/uv/bin/uv
    if [ ! -x "$UV" ]; then
        echo "installing uv $UV_VERSION into .cache/uv" >&2
        python3 -m venv "$ROOT/.cache/uv"
        "$ROOT/.cache/uv/bin/python" -m pip install "uv==$UV_VERSION" >&2
    fi
}

# Makes `.venv`, with Python 3.11 or 3.12.
ensure_venv() {
    local check='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'
    if ! "$ROOT/.venv/bin/python" -c "$check" 2>/dev/null; then
        ensure_uv
        "$UV" venv --clear --no-python-downloads --python '>=3.11,<3.13' "$ROOT/.venv" >&2
    fi
}

# ensure_requirements FILE...: installs these requirement files into `.venv`, unless
# their contents were the last ones installed.
ensure_requirements() {
    ensure_venv
    local file stamp
    for file in "$@"; do
        stamp=$ROOT/.venv/.installed-$(basename "$file")
        if ! cmp -s "$file" "$stamp"; then
            ensure_uv
            "$UV" pip install --python "$ROOT/.venv/bin/python" -r "$file" >&2
            cp "$file" "$stamp"
        fi
    done
}

# What scripts/patchset needs.
ensure_tools() {
    ensure_requirements "$ROOT/requirements/tools.txt"
}
