"""MXFP8 linears on a CPU that stands for a GPU with FlashInfer and DeepGEMM."""

from contextlib import contextmanager
from typing import Callable, Optional, Tuple
from unittest import mock

import flashinfer
import torch

from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.quantization import fp8, fp8_utils
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.runtime_context import override_platform
from sglang.test.layer_ut_utils import init_single_process_dist


@contextmanager
def on_gpu(
    sm: int = 100,
    flag: str = "auto",
    has_cutedsl: bool = True,
    mm_mxfp8: Optional[Callable] = None,
    mxfp8_quantize: Optional[Callable] = None,
):
    """A GPU of this compute capability, patched by name. FlashInfer's product and quantizer
    are the given ones; without them they return mocks."""
    product = mock.Mock(side_effect=mm_mxfp8)
    product.is_backend_supported = lambda name, sm: has_cutedsl and sm // 10 == 10
    quantizer = mock.Mock(side_effect=mxfp8_quantize)
    both = {
        "_is_cuda": True,
        "get_device_capability": lambda: divmod(sm, 10),
        "is_flashinfer_available": lambda: True,
    }
    fp4, patch = flashinfer.quantization.fp4_quantization, mock.patch.multiple
    with (
        override_platform(
            is_sm90=sm == 90, is_sm100=sm // 10 == 10, is_blackwell=sm >= 100
        ),
        patch(fp8, **both, can_auto_enable_marlin_fp8=lambda: 80 <= sm < 89),
        patch(
            fp8_utils,
            **both,
            get_device_sm=lambda: sm,
            FP8_GEMM_RUNNER_BACKEND=fp8_utils.Fp8GemmRunnerBackend(flag),
        ),
        patch(
            fp8_utils,
            create=True,
            _raw_flashinfer_mm_mxfp8=product,
            flashinfer_mm_mxfp8=product,
            _raw_flashinfer_mxfp8_quantize=quantizer,
            flashinfer_mxfp8_quantize=quantizer,
        ),
        patch(fp8_utils.deep_gemm_wrapper, ENABLE_JIT_DEEPGEMM=sm >= 90),
        patch(flashinfer, block_scale_interleave=interleave),
        patch(fp4, block_scale_interleave=interleave),
    ):
        for function in vars(fp8_utils).values():
            getattr(function, "cache_clear", lambda: None)()
        yield


def interleave(scale: torch.Tensor) -> torch.Tensor:
    """FlashInfer's 128x4 layout of [rows, groups], by its definition; 1-D, padded."""
    rows, groups = scale.shape
    tiles = -(-groups // 4)
    out = torch.zeros(-(-rows // 128) * 128 * tiles * 4, dtype=torch.uint8)
    r, g = torch.meshgrid(torch.arange(rows), torch.arange(groups), indexing="ij")
    tile = r // 128 * tiles + g // 4
    out[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + g % 4] = scale
    return out


def make_linear(
    n: int, k: int, dtype=torch.bfloat16, serialized=True, bias=False
) -> ReplicatedLinear:
    """A linear [N, K] of an MXFP8 checkpoint, or of a bf16 one that it quantizes."""
    init_single_process_dist()
    config = Fp8Config(is_checkpoint_fp8_serialized=serialized, use_mxfp8=True)
    return ReplicatedLinear(k, n, bias=bias, params_dtype=dtype, quant_config=config)


def random_mxfp8(n: int, k: int, seed: int = 0) -> Tuple[torch.Tensor, torch.Tensor]:
    """e4m3 [N, K], and its scale."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.randint(120, 128, (n, k // 32), generator=generator)
    return weight, scale.to(torch.uint8)


def decoded(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight in fp32."""
    return weight.float() * torch.exp2(scale.float() - 127).repeat_interleave(32, 1)


def load(linear: ReplicatedLinear, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Write both as a checkpoint's, and prepare the linear."""
    linear.weight.weight_loader(linear.weight, weight)
    linear.weight_scale_inv.weight_loader(linear.weight_scale_inv, scale)
    linear.quant_method.process_weights_after_loading(linear)


def loaded_linear(
    n: int, k: int, seed: int = 0, **kwargs
) -> Tuple[ReplicatedLinear, torch.Tensor]:
    """A random `make_linear`, and its weight in fp32."""
    linear, tensors = make_linear(n, k, **kwargs), random_mxfp8(n, k, seed)
    load(linear, *tensors)
    return linear, decoded(*tensors)
