"""What the self-check needs of this release's MXFP8 linears: each has its own file of
these names.
"""

import copy
from dataclasses import dataclass
from typing import Any, Iterator, List, Tuple

import torch

from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
from sglang.srt.layers.quantization.fp8_utils import (
    Mxfp8DenseGemmBackend,
    get_fp8_gemm_runner_backend,
    initialize_fp8_gemm_config,
    mxfp8_dense_gemm_fallbacks,
    mxfp8_linear_of,
    trtllm_mxfp8_linear,
)
from sglang.srt.layers.quantization.mxfp8 import shapes
from sglang.srt.layers.quantization.mxfp8.layout import checkpoint_slabs
from sglang.srt.layers.quantization.mxfp8.numerics import GROUP_SIZE
from sglang.srt.layers.quantization.mxfp8.weight_only import max_m_fused
from sglang.srt.runtime_context import SpawnRanks, get_exec, get_parallel, publish

WITH_ANOTHER_BACKEND = "with another --fp8-gemm-backend"


@dataclass(frozen=True)
class Choice:
    """What one linear runs on.

    Attributes:
        reason: why it is not the one of its shape, or "".
        max_m_8x4: calls with M up to it use 8x4 activation scales; 0 for none.
        max_m_fused: calls of weight_only with M up to it decode in the product.
    """

    backend: Mxfp8DenseGemmBackend
    reason: str = ""
    max_m_8x4: int = 0
    max_m_fused: int = 0


class Linear:
    """An MXFP8 linear that is loaded. `layer` has its weight, its scale in one form or
    more, and the method that serves it."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer = layer
        self.method: Fp8LinearMethod = layer.quant_method

    @property
    def backend(self) -> Mxfp8DenseGemmBackend:
        return self.method.mxfp8_dense_backend

    @property
    def choice(self) -> Choice:
        options = getattr(self.method.w8a8_mxfp8_linear, "keywords", {})
        fused = max_m_fused(*self.layer.weight.shape)
        return Choice(
            self.backend,
            max_m_8x4=options.get("max_m_8x4", 0),
            max_m_fused=fused if self.backend.is_weight_only() else 0,
        )

    def is_offloaded(self) -> bool:
        """Whether its bytes are not where the layer runs."""
        from sglang.srt.utils.offloader import NoopOffloader, get_offloader

        may_be = not isinstance(get_offloader(), NoopOffloader)
        return may_be and self.layer.weight.is_cpu

    def checkpoint_slabs(self) -> Iterator[Tuple[slice, torch.Tensor, torch.Tensor]]:
        """`layout.checkpoint_slabs` of this layer."""
        layer, swizzled = self.layer, None
        if shuffled := getattr(layer, "mxfp8_is_shuffled", False):
            swizzled = layer.weight_scale_inv_shuffled.data.view(-1)
        weight, scale = layer.weight.data, layer.weight_scale_inv.data
        return checkpoint_slabs(weight, scale, swizzled, shuffled)


def linears_of(model: torch.nn.Module) -> List[Linear]:
    """Those whose scale is as loading leaves it: a model may put it in
    a form of its own, and then reads the layer itself."""
    return [Linear(module) for module in model.modules() if _is_served(module)]


def _is_served(module: torch.nn.Module) -> bool:
    method = getattr(module, "quant_method", None)
    if not isinstance(method, Fp8LinearMethod) or not method.use_mxfp8:
        return False
    backend = method.mxfp8_dense_backend
    if backend is None or backend.is_gfx95():
        return False
    scale = getattr(module, "weight_scale_inv", None)
    if scale is None:  # before a bf16 weight is quantized
        return True
    n, k = module.weight.shape
    return scale.dtype == torch.uint8 and scale.shape == (n, k // GROUP_SIZE)


def largest_scale(linear: Linear) -> int:
    """The largest byte among the weight's scales."""
    scale = linear.layer.weight_scale_inv
    return int(getattr(linear.layer, "weight_scale_inv_shuffled", scale).max())


def run(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    """[M, N] of x [M, K], by the method that serves the layer, with the scale of its
    backend."""
    return linear.method.apply(linear.layer, x)


def with_bytes(linear: Linear, weight: torch.Tensor, scale: torch.Tensor) -> Linear:
    """Another layer that is prepared and runs as `linear` is, with e4m3 [N, K] and its
    scale, both of which it may rearrange in place."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)
    layer.quant_method = linear.method
    linear.method._process_mxfp8_linear_weight_scale(layer)
    return Linear(layer)


def choice_after(linear: Linear, dtype: torch.dtype, reason: str) -> Choice:
    """What it runs on instead of its backend, which is wrong for that reason.

    Raises RuntimeError where the flag named that one, and where it is the last.
    """
    failed, order = linear.backend, mxfp8_dense_gemm_fallbacks()
    if failed.value == get_fp8_gemm_runner_backend().value or failed == order[-1]:
        way_out = "the model in bf16"
        if failed != order[-1]:
            way_out = f"with --fp8-gemm-backend auto, or {way_out}"
        raise RuntimeError(
            f"{reason}. Serve {way_out}; SGLANG_MXFP8_SELF_CHECK=0 leaves the check out"
        )
    if failed in order:
        order = order[order.index(failed) + 1 :]
    n, k = linear.layer.weight.shape
    takes = (b for b in order if not shapes.refusal(b.value, n, k, dtype))
    return Choice(next(takes), reason)


def use(linear: Linear, choice: Choice) -> None:
    """Serve on another backend from now on, or on trtllm without 8x4: no other layer leaves
    trtllm, which only the flag chooses."""
    method = linear.method
    if choice.backend.is_flashinfer_trtllm():
        method.w8a8_mxfp8_linear = trtllm_mxfp8_linear
        return
    method.mxfp8_dense_backend = choice.backend
    method.w8a8_mxfp8_linear = mxfp8_linear_of(choice.backend)
    method.process_weights_after_loading(linear.layer)


def from_every_rank(value: Any) -> List[Any]:
    """Collective: what each rank of the tensor parallel group has. A rank that joins the
    others while they serve is alone."""
    group = get_parallel().tp_group
    if group.world_size == 1 or get_exec().moe.is_ep_joiner:
        return [value]
    values = [None] * group.world_size
    torch.distributed.all_gather_object(values, value, group=group.cpu_group)
    return values


def linears_on_meta(path: str, tp: int, flag: str) -> List[Linear]:
    """The linears of the model at `path`, as one of `tp` ranks builds them."""
    # A model is more than this module may know of; only the command builds one.
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.quantization.mxfp8.meta import (
        build_on_meta,
        init_lone_process,
    )
    from sglang.srt.model_loader import loader
    from sglang.srt.server_args import ServerArgs

    options = dict(fp8_gemm_runner_backend=flag, skip_tokenizer_init=True)
    arguments = ServerArgs(model_path=path, **options)
    config = ModelConfig.from_server_args(arguments)
    if config.quantization is None:
        arguments = ServerArgs(model_path=path, quantization="mxfp8", **options)
        config = ModelConfig.from_server_args(arguments)
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0))
    initialize_fp8_gemm_config()
    init_lone_process()
    # Nothing is sent, so one process can stand for any rank.
    group = copy.copy(get_parallel().tp_group)
    group.world_size = tp
    parts = "tp", "attn_tp", "moe_tp"
    widths = {f"{part}_size": tp for part in parts}
    load_config = LoadConfig()
    quant_config = loader._get_quantization_config(config, load_config)
    with get_parallel().override(**widths, **{f"{p}_group": group for p in parts}):
        model = build_on_meta(
            loader._initialize_model, config, load_config, quant_config
        )
    return linears_of(model)
