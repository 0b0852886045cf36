"""
ServerArgs.add_cli_args
    why: --fp8-gemm-backend flashinfer_cutlass; the help text says what the backends do for MXFP8
    thread: sgl-project/sglang#21576
    until: the base is 0.5.10 or later
"""

from typing import TYPE_CHECKING

from overlay.marks import splice

if TYPE_CHECKING:
    from sglang.srt.server_args import FP8_GEMM_RUNNER_BACKEND_CHOICES


class ServerArgs:
    @splice
    def add_cli_args(parser):
        parser.add_argument(
            "--fp8-gemm-backend",
            help="Kernels for the dense linear layers of blockwise FP8 and MXFP8 models. "
            "'auto' (default) picks by hardware. "
            "'deep_gemm': JIT-compiled, the default on Hopper and Blackwell where DeepGEMM is installed. "
            "'flashinfer_trtllm': Blackwell; fastest at small batches. For MXFP8 it needs SM100 or SM103, "
            "and layers that it cannot take run on flashinfer_cutlass. MXFP8 on other GPUs: auto. "
            "'flashinfer_cutlass': MXFP8 only, SM100 or SM103. "
            "'flashinfer_deepgemm': Hopper; swaps A and B for small batches. "
            "'cutlass': Hopper and Blackwell; high throughput. "
            "'triton': runs most widely. 'aiter': ROCm. "
            "Replaces the deprecated SGLANG_ENABLE_FLASHINFER_FP8_GEMM and SGLANG_SUPPORT_CUTLASS_BLOCK_FP8.",
            dest="fp8_gemm_runner_backend",
            default=ServerArgs.fp8_gemm_runner_backend,
            choices=[*FP8_GEMM_RUNNER_BACKEND_CHOICES, "flashinfer_cutlass"],
        )
