"""Which weights [N, K] and activation dtypes each kernel of an MXFP8 product takes.

A kernel has the name that --fp8-gemm-backend gives it. sglang 0.5.9 has trtllm, CUTLASS
and Triton; 0.5.23 has trtllm, CUTLASS, CuTe-DSL and DeepGEMM. For what both have,
FlashInfer's limits are the same in 0.6.7.post3 and 0.7.2.
"""

from typing import Optional

import torch


def refusal(kernel: str, n: int, k: int, dtype: torch.dtype) -> Optional[str]:
    """Why `kernel` does not take a weight [N, K] with activations of `dtype`, or None."""
    refuse = _REFUSALS.get(kernel)
    return refuse(n, k, dtype) if refuse else None


def _trtllm(n: int, k: int, dtype: torch.dtype) -> Optional[str]:
    if dtype != torch.bfloat16:
        return f"trtllm writes bf16 only, not {dtype}"
    if k % 256 != 0:
        return f"K = {k} is not a multiple of 256 (trtllm)"
    return _cutlass(n, k, dtype)


def _cutlass(n: int, k: int, dtype: torch.dtype) -> Optional[str]:
    if small := _small(n, k, dtype):
        return small
    return f"N = {n} is not a multiple of 32" if n % 32 != 0 else None


def _cutedsl(n: int, k: int, dtype: torch.dtype) -> Optional[str]:
    if small := _small(n, k, dtype):
        return small
    return f"N = {n} is not a multiple of 8" if n % 8 != 0 else None


def _small(n: int, k: int, dtype: torch.dtype) -> Optional[str]:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} activations cannot be quantized"
    return f"[{n}, {k}] is smaller than 128 x 128" if n < 128 or k < 128 else None


def _triton(n: int, k: int, dtype: torch.dtype) -> Optional[str]:
    if n % 128 != 0 or k % 128 != 0:
        return f"[{n}, {k}] is not in multiples of 128 (triton)"
    return None


def _deep_gemm(n: int, k: int, dtype: torch.dtype) -> Optional[str]:
    if dtype != torch.bfloat16:
        return f"DeepGEMM writes bf16 only, not {dtype}"
    if n % 64 != 0 or k % 128 != 0:
        return f"[{n}, {k}] is not in multiples of 64 and 128 (DeepGEMM)"
    return None


_REFUSALS = {
    "flashinfer_trtllm": _trtllm,
    "flashinfer_cutlass": _cutlass,
    "flashinfer_cutedsl": _cutedsl,
    "triton": _triton,
    "deep_gemm": _deep_gemm,
}
