"""MXFP8's Triton kernels where there is no GPU: interpreted, and compiled for one."""

import os
import subprocess
import sys
import textwrap
from typing import Dict, Set

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sglang.srt.layers.quantization import mxfp8
from sglang.test.test_utils import CustomTestCase


def run_interpreted(test: CustomTestCase, module: str, script: str) -> None:
    """Run `script` in a new Python, since Triton reads its environment at import, that
    has the module as `kernel`, imported alone."""
    script = f"import {module} as kernel\n" + textwrap.dedent(script)
    [folder] = mxfp8.__path__
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": folder, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    test.assertEqual(result.returncode, 0, result.stdout)


def compiled(
    function,
    arch: int,
    warps: int,
    types: Dict[str, str],
    aligned: Set[str],
    **constants,
):
    """A kernel as it is on a GPU of a compute capability, 90 for 9.0; int32 is the type of
    other arguments than these, and `aligned` ones are multiples of 16."""
    names = function.arg_names
    types = {name: types.get(name, "i32") for name in names}
    types.update(dict.fromkeys(constants, "constexpr"))
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name in aligned
    }
    source = ASTSource(function, types, constants, attributes)
    return triton.compile(source, GPUTarget("cuda", arch, 32), {"num_warps": warps})
