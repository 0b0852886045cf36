"""A module of MXFP8's Triton kernels, imported alone: Triton reads its environment then."""

import os
import subprocess
import sys
import textwrap

from sglang.srt.layers.quantization import mxfp8
from sglang.test.test_utils import CustomTestCase


def run_with_kernel(test: CustomTestCase, module: str, script: str, **env: str) -> None:
    """Run `script` in a new Python that has the module as `kernel`."""
    script = f"import {module} as kernel\n" + textwrap.dedent(script)
    [folder] = mxfp8.__path__
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": folder, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    test.assertEqual(result.returncode, 0, result.stdout)
