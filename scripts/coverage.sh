#!/usr/bin/env bash
# coverage.sh [TEST ...]: runs the registered tests (all of them, or those named) on a CPU and
# writes how many of our own lines they ran, file by file, to
# benchmark/results/mxfp8_coverage.md. Own lines are those that the diff adds to upstream.
# Takes about half an hour.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh
setup
get_default_model
ensure_requirements coverage.txt
use_cpu_stand_ins
work=$ROOT/.cache/coverage
rm -rf "$work"
mkdir -p "$work"
python=$VENV/bin/python

# A merged tree with the diff's paths.
"$python" -m zipfile -e dist/sglang-*.whl "$work/python"
./scripts/patchset diff --output "$work/own.patch" >/dev/null
sed -n 's#^+++ b/\(python/.*\.py\)$#    */\1#p' "$work/own.patch" >"$work/files"
cat >"$work/rc" <<RC
[run]
include =
$(cat "$work/files")
data_file = $work/data
parallel = true
patch = subprocess
sigterm = true
relative_files = true
RC

tests=("$@")
(($# > 0)) || tests=(test/registered)
# The diff's paths are those of a repository; coverage's are relative to where it runs.
git init --quiet "$work"
cd "$work"
status=0
PYTHONPATH="$work/python:$PYTHONPATH" SGLANG_USE_CPU_ENGINE=1 SGLANG_MXFP8_EMULATION=1 \
    SGLANG_TEST_MAX_RETRY=0 MXFP8_TEST_MODEL=$DEFAULT_MODEL \
    "$python" -m coverage run --rcfile=rc -m pytest -c "$ROOT/pytest.ini" \
    "${tests[@]/#/$ROOT/}" </dev/null || status=$?
"$python" -m coverage combine --quiet --rcfile=rc
"$python" -m coverage xml --quiet --rcfile=rc -o coverage.xml
"$VENV/bin/diff-cover" coverage.xml --quiet --diff-file own.patch --format json:report.json
"$python" "$ROOT/scripts/coverage_table.py" report.json "scripts/coverage.sh $*" |
    tee "$ROOT/benchmark/results/mxfp8_coverage.md"
exit "$status"
