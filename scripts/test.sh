#!/usr/bin/env bash
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh
[[ ${1-} != --release ]] || { use_release "${2-none}" && shift 2; }

case ${1-} in
    -h | --help)
        cat <<'USAGE'
Usage: ./scripts/test.sh [--release VERSION] [PYTEST_ARGUMENT...]

Sets up .venv (see ./scripts/setup.sh --help), gets the model that the tests serve, and runs
all tests: the registered ones as sglang's CI does, each file in a process of its own, and
beside them the rest with pytest. No GPU is needed; with one, the tests for it run, too.
With --release 0.5.23 it is the tests that the stack in releases/0.5.23 brings.

With arguments, pytest alone runs, e.g. ./scripts/test.sh test/tools -x; all of them are
listed by .venv/bin/python -m pytest --help.
USAGE
        exit
        ;;
esac

setup
get_default_model
export MXFP8_TEST_MODEL=$DEFAULT_MODEL
if ! cuda_device_visible; then
    use_cpu_stand_ins
    export SGLANG_USE_CPU_ENGINE=1 SGLANG_MXFP8_EMULATION=1
fi
# sglang's test class retries on its own: a test that fails once has failed.
export SGLANG_TEST_MAX_RETRY=0

reports=.cache/reports
[[ $RELEASE == "$DEFAULT_RELEASE" ]] || reports+=-$RELEASE
pytest=("$VENV/bin/python" -m pytest --durations=8)
run_suite=("$VENV/bin/python" test/run_suite.py)

run_everything() {
    local hardware=(cpu) status=0 hw
    ! cuda_device_visible || hardware+=(cuda)
    rm -rf "$reports"
    mkdir -p "$reports"
    # Two at a time: with a thread each they do not wait for one another.
    export OMP_NUM_THREADS=1
    "${pytest[@]}" --junitxml="$reports/rest.xml" --ignore=test/registered \
        >"$reports/rest.log" 2>&1 &
    rest=$!
    trap 'kill "$rest" 2>/dev/null || true' EXIT
    for hw in "${hardware[@]}"; do
        "${run_suite[@]}" --hw "$hw" --suite all --reports "$reports/$hw" || status=1
    done
    echo "Waiting for the tests that are not registered ($reports/rest.log)"
    wait "$rest" || status=1
    cat "$reports/rest.log"
    "${run_suite[@]}" --total "${hardware[@]/#/$reports/}" "$reports/rest.xml" || status=1
    exit "$status"
}

# The tests of another release's stack: of its own folders, and those of ours that it brings.
run_release() {
    local status=0 part files shared
    rm -rf "$reports"
    for part in "$EDITS"/*/test/registered; do
        # Each pull request names what it patches.
        SGLANG_MXFP8_EMULATION=0 "${run_suite[@]}" --suite all --root "$part" \
            --reports "$reports/$(basename "${part%/test/registered}")" || status=1
    done
    files=$(grep -ho 'test/registered/[^"]*' "$EDITS"/*/pr.toml | sort -u)
    mapfile -t shared <<<"$files"
    "${run_suite[@]}" --suite all --reports "$reports/shared" "${shared[@]}" || status=1
    "${pytest[@]}" --junitxml="$reports/e2e.xml" test/e2e/test_serve_smollm2.py || status=1
    "${run_suite[@]}" --total "$reports" || status=1
    exit "$status"
}

(($# == 0)) || exec "${pytest[@]}" --junitxml=.cache/junit.xml "$@" </dev/null
[[ $RELEASE == "$DEFAULT_RELEASE" ]] || run_release </dev/null
run_everything </dev/null
