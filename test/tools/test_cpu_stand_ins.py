"""scripts/cpu_stand_ins: importable without a driver, useless on purpose."""

import os
import subprocess
import sys
from pathlib import Path

STAND_INS = Path(__file__).parents[2] / "scripts" / "cpu_stand_ins"
PROGRAM = """
import sgl_kernel
from sgl_kernel.kvcacheio import transfer_kv_per_layer
assert not hasattr(sgl_kernel, "__version__")
transfer_kv_per_layer(1, out=2)
"""


def test_names_import_and_calls_raise():
    command = [sys.executable, "-c", PROGRAM]
    environment = {**os.environ, "PYTHONPATH": str(STAND_INS)}
    told = subprocess.run(command, env=environment, capture_output=True, text=True)
    last = told.stderr.splitlines()[-1]
    needs = "RuntimeError: sgl_kernel.transfer_kv_per_layer needs a CUDA device"
    assert last.startswith(needs) and "cpu_stand_ins" in last
