#!/usr/bin/env bash
# Sets up .venv and runs all tests. Arguments go to pytest, e.g. test/tools -x.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh
setup
cuda_device_visible || use_cpu_stand_ins
exec "$VENV/bin/python" -m pytest --junitxml=.cache/junit.xml "$@" </dev/null
