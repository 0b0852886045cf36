#!/usr/bin/env bash
# Sets up .venv and runs all tests. Arguments go to pytest, e.g. test/tools -x.
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
exec "$VENV/bin/python" -m pytest --durations=8 --junitxml=.cache/junit.xml "$@" </dev/null
