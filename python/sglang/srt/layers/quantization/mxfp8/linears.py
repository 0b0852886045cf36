"""What the self-check needs of this release's MXFP8 linears: each has its own file of
these names.
"""

from typing import Any, List

import torch

from sglang.srt.distributed import get_tp_group
from sglang.srt.distributed.parallel_state import model_parallel_is_initialized
from sglang.srt.layers.quantization.mxfp8 import routing
from sglang.srt.layers.quantization.mxfp8.numerics import quantize
from sglang.srt.layers.quantization.mxfp8.weights import (
    Mxfp8LinearWeights,
    kernel_scale,
    mxfp8_weights_of,
)

Choice = routing.Mxfp8LinearChoice
Linear = Mxfp8LinearWeights
linears_of = mxfp8_weights_of
WITH_ANOTHER_BACKEND = "with another backend for it in SGLANG_MXFP8_LINEAR_BACKEND"


def largest_scale(linear: Linear) -> int:
    """The largest byte among the weight's scales and what pads them."""
    scale = linear.layer.weight_scale_inv
    padded = kernel_scale(scale) if linear.backend.is_flashinfer() else scale
    return int(padded.max())


def run(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    """[M, N] of x [M, K], by the function that serves the layer."""
    layer, input_scale = linear.layer, None
    if linear.backend.is_triton():  # upstream's quantizer is not in question
        x, input_scale = quantize(x)
    return layer.w8a8_mxfp8_linear(
        input=x,
        weight=layer.weight,
        weight_scale=layer.weight_scale_inv,
        input_scale=input_scale,
    )


def with_bytes(linear: Linear, weight: torch.Tensor, scale: torch.Tensor) -> Linear:
    """Another layer that runs as `linear` does, with e4m3 [N, K] and its scale, both of
    which it rearranges in place."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)
    layer.w8a8_mxfp8_linear = linear.layer.w8a8_mxfp8_linear
    made = Mxfp8LinearWeights(layer, linear.choice, quantize_on_load=False)
    made.release()
    made.to_kernel_form()
    return made


def choice_after(linear: Linear, dtype: torch.dtype, reason: str) -> Choice:
    """What it runs on instead of its backend, which is wrong for that reason.

    Raises RuntimeError where that was asked for by name, and where it is the last.
    """
    layer = linear.layer
    return routing.choice_after(
        layer.quant_method.mxfp8_options,
        linear.backend,
        *layer.weight.shape,
        dtype,
        getattr(layer, "prefix", ""),
        reason,
    )


def use(linear: Linear, choice: Choice) -> None:
    linear.layer.quant_method.use_mxfp8_choice(linear.layer, choice)


def from_every_rank(value: Any) -> List[Any]:
    """Collective: what each rank of the tensor parallel group has."""
    group = get_tp_group() if model_parallel_is_initialized() else None
    if group is None or group.world_size == 1:
        return [value]
    values = [None] * group.world_size
    torch.distributed.all_gather_object(values, value, group=group.cpu_group)
    return values


def linears_on_meta(path: str, tp: int, flag: str) -> List[Linear]:
    """The linears of the model at `path`, as one of `tp` ranks builds them."""
    # A model is more than this module may know of; only the command builds one.
    from sglang.srt import server_args
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
    from sglang.srt.layers.quantization.mxfp8.meta import (
        build_on_meta,
        init_lone_process,
    )
    from sglang.srt.model_loader import loader

    arguments = server_args.ServerArgs(
        path, tp_size=tp, fp8_gemm_runner_backend=flag, skip_tokenizer_init=True
    )
    config = ModelConfig.from_server_args(arguments)
    if config.quantization is None:
        arguments.quantization = "mxfp8"
        config = ModelConfig.from_server_args(arguments)
    server_args.set_global_server_args_for_scheduler(arguments)
    initialize_fp8_gemm_config(arguments)
    init_lone_process()
    # Nothing is sent, so one process can stand for any rank.
    get_tp_group().world_size = tp
    initialize_dp_attention(arguments, config)
    load_config = LoadConfig()
    quant_config = loader._get_quantization_config(config, load_config)
    model = build_on_meta(loader._initialize_model, config, load_config, quant_config)
    return linears_of(model)
