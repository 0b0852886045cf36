"""scripts/cpu_stand_ins: importable without a driver, useless on purpose."""

import subprocess
import sys
from pathlib import Path

STAND_INS = Path(__file__).parents[2] / "scripts" / "cpu_stand_ins"
PROGRAM = """
import sgl_kernel
from sgl_kernel import silu_and_mul
from sgl_kernel.kvcacheio import transfer_kv_per_layer
assert sgl_kernel.__file__.startswith({path!r})
assert not hasattr(sgl_kernel, "__version__")
try:
    import sgl_kernel.scalar_type
except ImportError:  # sglang has a substitute of its own for this one
    pass
else:
    raise AssertionError
for kernel in silu_and_mul, transfer_kv_per_layer, sgl_kernel.fp8_scaled_mm:
    try:
        kernel(1, out=2)
    except RuntimeError as error:
        print(error)
"""


def test_names_import_and_calls_raise():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(path=str(STAND_INS))],
        env={"PYTHONPATH": str(STAND_INS)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    for line, name in zip(
        lines, ("silu_and_mul", "transfer_kv_per_layer", "fp8_scaled_mm")
    ):
        assert line.startswith(f"sgl_kernel.{name} needs a CUDA device")
        assert "cpu_stand_ins" in line
