"""
Mxfp8DenseGemmBackend.WEIGHT_ONLY, weight_only_mxfp8_matmul, weight_only_mxfp8_op
    why: a kernel decodes the weight as it multiplies, where the weight was decoded in every call

resolve_mxfp8_dense_gemm_backend, _mxfp8_dense_gemm_lacks, dispatch_w8a8_mxfp8_linear
    why: without a flag, what no other backend runs is weight-only; a flag that cannot run says so

mxfp8_group_quantize
    why: Triton has no e4m3 below SM89, and none on a CPU
"""

from enum import Enum
from typing import TYPE_CHECKING

import torch
from overlay.marks import drop, prepend

from sglang.srt.layers.quantization.mxfp8 import numerics
from sglang.srt.layers.quantization.mxfp8.weight_only import (
    max_m_fused,
    weight_only_linear,
)
from sglang.srt.utils.custom_op import register_custom_op

if TYPE_CHECKING:
    from sglang.srt.layers.quantization.fp8_utils import (
        _is_cuda,
        _is_gfx95_supported,
        _is_hip,
        _raw_flashinfer_mm_mxfp8,
        deep_gemm_wrapper,
        get_device_capability,
        get_device_sm,
        get_fp8_gemm_runner_backend,
        get_platform,
        is_flashinfer_available,
        print_warning_once,
        weight_only_mxfp8_linear,
    )


class Mxfp8DenseGemmBackend(Enum):
    # 16-bit activations, and the checkpoint's own bytes: for what no other kernel takes.
    WEIGHT_ONLY = "weight_only"


def resolve_mxfp8_dense_gemm_backend() -> Mxfp8DenseGemmBackend:
    """The backend that --fp8-gemm-backend names, if it has an MXFP8 product, or else the
    first one that runs here. Raises RuntimeError if the named one does not run here."""
    flag = get_fp8_gemm_runner_backend().value
    choices = (
        Mxfp8DenseGemmBackend.FLASHINFER_CUTEDSL,
        Mxfp8DenseGemmBackend.FLASHINFER_CUTLASS,
        Mxfp8DenseGemmBackend.DEEP_GEMM,
    )
    for backend in (*choices, Mxfp8DenseGemmBackend.FLASHINFER_TRTLLM):
        if backend.value == flag:
            if lacks := _mxfp8_dense_gemm_lacks(backend):
                raise RuntimeError(
                    f"--fp8-gemm-backend={flag} cannot run MXFP8 linears here: it needs "
                    f"{lacks}. auto takes what runs: weight_only, from SM80 on."
                )
            return backend
    if _is_hip and _is_gfx95_supported:
        return Mxfp8DenseGemmBackend.GFX95_DOT_SCALED
    runs = (backend for backend in choices if not _mxfp8_dense_gemm_lacks(backend))
    return next(runs, Mxfp8DenseGemmBackend.WEIGHT_ONLY)


def _mxfp8_dense_gemm_lacks(backend: Mxfp8DenseGemmBackend) -> str:
    """What `backend` needs and this machine does not have, or ""."""
    if backend.is_deep_gemm():
        # On SM90 it has no scales of groups of 32.
        runs = deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM and not get_platform().is_sm90
        return "" if runs else "DeepGEMM and a GPU later than SM90"
    has_flashinfer = get_platform().is_blackwell and is_flashinfer_available()
    if backend.is_flashinfer_cutlass():
        return "" if has_flashinfer else "a Blackwell GPU and FlashInfer"
    if backend.is_flashinfer_trtllm():
        runs = has_flashinfer and get_platform().is_sm100
    else:
        runs = has_flashinfer and _raw_flashinfer_mm_mxfp8.is_backend_supported(
            "cute-dsl", get_device_sm()
        )
    return "" if runs else "an SM100 or SM103 GPU and FlashInfer"


@prepend
def dispatch_w8a8_mxfp8_linear():
    if resolve_mxfp8_dense_gemm_backend().is_weight_only():
        print_warning_once(
            "No MXFP8 product runs on this device: dense MXFP8 layers multiply 16-bit "
            "activations by weights that are decoded on the fly (weight_only)."
        )
        return weight_only_mxfp8_linear


@drop
def dispatch_w8a8_mxfp8_linear():
    if backend.is_unsupported():
        ...


@prepend
def mxfp8_group_quantize(x):
    if x.is_cpu or (_is_cuda and get_device_capability() < (8, 9)):
        return numerics.quantize(x)


def weight_only_mxfp8_matmul(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """`weight_only_mxfp8_linear` for x [M, K]."""
    if x.is_cuda:
        return weight_only_mxfp8_op(x, weight, weight_scale)
    return weight_only_linear(x, weight, weight_scale, 0)  # plain torch needs no op


@register_custom_op(
    mutates_args=[],
    fake_impl=lambda x, weight, weight_scale: x.new_empty(x.shape[0], weight.shape[0]),
)
def weight_only_mxfp8_op(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """`weight_only_mxfp8_matmul` as one op: opaque to torch.compile."""
    n, k = weight.shape
    return weight_only_linear(x, weight, weight_scale, max_m_fused(n, k))
