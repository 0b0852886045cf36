#!/usr/bin/env bash
# Sets up .venv and runs all tests: the registered ones as sglang's CI does, each file in a
# process of its own, the rest with pytest. Arguments go to pytest, which then runs alone:
# e.g. test/tools -x.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh
setup
get_default_model
export MXFP8_TEST_MODEL=$DEFAULT_MODEL
if ! cuda_device_visible; then
    use_cpu_stand_ins
    export SGLANG_USE_CPU_ENGINE=1 SGLANG_MXFP8_EMULATION=1
fi
# sglang's test class retries on its own: a test that fails once has failed.
export SGLANG_TEST_MAX_RETRY=0

pytest=("$VENV/bin/python" -m pytest --durations=8 --junitxml=.cache/junit.xml)
run_suite=("$VENV/bin/python" test/run_suite.py)

run_everything() {
    local hardware=(cpu) summaries=() status=0 hw files registered
    ! cuda_device_visible || hardware+=(cuda)
    rm -rf .cache/reports .cache/junit.xml
    for hw in "${hardware[@]}"; do
        "${run_suite[@]}" --hw "$hw" --suite all --reports ".cache/reports/$hw" || status=1
        summaries+=(".cache/reports/$hw/summary.json")
    done
    # What nobody registered is pytest's, so that no test file is left out.
    files=$("${run_suite[@]}" --registered-files)
    mapfile -t registered <<<"$files"
    "${pytest[@]}" "${registered[@]/#/--ignore=}" || status=1
    "${run_suite[@]}" --total "${summaries[@]}" .cache/junit.xml || status=1
    exit "$status"
}

(($# == 0)) || exec "${pytest[@]}" "$@" </dev/null
run_everything </dev/null
