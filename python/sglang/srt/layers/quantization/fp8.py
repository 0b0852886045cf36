"""
Fp8Config.get_min_capability
    why: emulation runs on any device
    until: never, as long as there is emulation

Fp8Config.get_cache_scale
    why: GraniteMoeHybrid asks every quantization config for it
    until: upstream's base class has it

Fp8Config.mxfp8_linear_options
    why: what can run is found out once per server, and before any layer is built
    until: upstream chooses per layer at load

Fp8Config.from_config, Fp8Config.get_quant_method, Fp8Config.override_quantization_method, Fp8Config.mxfp8_plan, Fp8Config.choose_mxfp8, Fp8Config.mxfp8_layers
    why: which layers are in MXFP8 is decided in one place, for every checkpoint format and for the parts of fused layers
    until: upstream reads these formats

Fp8LinearMethod.__init__
    why: MXFP8 has a dispatch of its own; block FP8's raises for flashinfer_trtllm off SM100
    thread: sgl-project/sglang#21576
    until: the base is 0.5.10 or later

Fp8LinearMethod.create_weights
    why: the backend is chosen where the shape is known; loaders bring the layer to checkpoint form
    thread: sgl-project/sglang#22484
    until: upstream has restore_weights_before_loading

Fp8LinearMethod.process_weights_after_loading_block_quant
    why: MXFP8 comes before the CPU branch, which asks for AMX
    until: upstream tests use_mxfp8 first

Fp8LinearMethod._quantize_mxfp8_weights
    why: replaced: the weight loader quantizes a bf16 checkpoint, and later bf16 updates as well
    until: upstream requantizes on reload

Fp8LinearMethod._process_mxfp8_linear_weight_scale, Fp8LinearMethod.restore_weights_before_loading, Fp8LinearMethod.use_mxfp8_choice
    why: weights change between checkpoint and kernel form in place
    thread: sgl-project/sglang#22484
    until: upstream has restore_weights_before_loading

Fp8LinearMethod.apply
    why: each layer runs on the backend chosen at load
    thread: sgl-project/sglang#21576
    until: the base is 0.5.10 or later
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Callable, Optional

from overlay.marks import append, drop, prepend, splice
from torch.nn import Module

from sglang.srt.environ import envs
from sglang.srt.layers.quantization.base_config import (
    LinearMethodBase,
    QuantizationConfig,
)
from sglang.srt.layers.quantization.fp8_utils import (
    dispatch_w8a8_mxfp8_linear,
    get_fp8_gemm_runner_backend,
)
from sglang.srt.layers.quantization.mxfp8.formats import (
    LayerList,
    names_the_format,
)
from sglang.srt.layers.quantization.mxfp8.names import Mxfp8Plan
from sglang.srt.layers.quantization.mxfp8.routing import (
    Mxfp8LinearChoice,
    Mxfp8LinearOptions,
    resolve_mxfp8_linear_backend,
    select_mxfp8_linear_backend,
)
from sglang.srt.layers.quantization.mxfp8.weights import Mxfp8LinearWeights

if TYPE_CHECKING:
    from sglang.srt.layers.quantization.fp8 import (
        Fp8MoEMethod,
        UnquantizedLinearMethod,
        dispatch_w8a8_block_fp8_linear,
        get_moe_runner_backend,
        is_layer_skipped,
        is_sm100_supported,
    )


class Fp8Config(QuantizationConfig):
    # Of the model that is built by it: see mxfp8.names.
    mxfp8_plan: Optional[Mxfp8Plan] = None
    choose_mxfp8: Optional[Callable[[Module, str], bool]] = None

    @drop
    def from_config(cls):
        if use_mxfp8 and weight_block_size is not None:
            ...

    @splice
    def get_quant_method(self, layer, prefix, LinearBase, FusedMoE):
        if isinstance(layer, LinearBase):
            quantized = self._quantizes(layer, prefix)
            return Fp8LinearMethod(self) if quantized else UnquantizedLinearMethod()
        if isinstance(layer, FusedMoE):
            if self.use_mxfp8 and not self._quantizes(layer, prefix):
                return None
            self._require_mxfp8_experts(prefix)
            return Fp8MoEMethod(self)

    def _quantizes(self, layer: Module, prefix: str) -> bool:
        if self.choose_mxfp8 is not None:
            return self.choose_mxfp8(layer, prefix)
        if self.use_mxfp8:
            return self.mxfp8_layers.has_layer(prefix)
        return not is_layer_skipped(prefix, self.ignored_layers)

    def _require_mxfp8_experts(self, prefix: str) -> None:
        if self.use_mxfp8 and not (
            is_sm100_supported() and get_moe_runner_backend().is_cutlass()
        ):
            raise ValueError(
                f"{prefix}: MXFP8 experts run on SM100 only, with --moe-runner-backend "
                "cutlass, which --quantization mxfp8 chooses. Elsewhere they have to be "
                "in bf16."
            )

    @cached_property
    def mxfp8_layers(self) -> LayerList:
        return LayerList(self.ignored_layers)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg, user_quant) -> Optional[str]:
        """The answer is "mxfp8" for an MXFP8 checkpoint, if the flag names its format."""
        return "mxfp8" if names_the_format(user_quant, hf_quant_cfg) else None

    def get_cache_scale(self, name: str) -> Optional[str]:
        """Asked by some models' loaders; load_kv_scales has taken such tensors before."""
        return None

    def get_min_capability(self) -> int:
        emulated = self.use_mxfp8 and envs.SGLANG_MXFP8_EMULATION.get()
        return 0 if emulated else 80

    @cached_property
    def mxfp8_linear_options(self) -> Mxfp8LinearOptions:
        """What this server's MXFP8 linear layers can run on."""
        return resolve_mxfp8_linear_backend(get_fp8_gemm_runner_backend().value)


class Fp8LinearMethod(LinearMethodBase):
    @splice
    def __init__(self):
        self.w8a8_block_fp8_linear = (
            None if self.use_mxfp8 else dispatch_w8a8_block_fp8_linear()
        )
        # An MXFP8 layer holds fp8 parameters from the start: a bf16 checkpoint is
        # quantized by the weight loader.
        self.is_checkpoint_fp8_serialized = (
            self.use_mxfp8 or self.quant_config.is_checkpoint_fp8_serialized
        )

    @append
    def __init__(self):
        if self.use_mxfp8:
            self.use_marlin = False
            self.mxfp8_options = self.quant_config.mxfp8_linear_options

    @splice
    def create_weights(self, layer, extra_weight_attrs):
        weight_loader = self._wrap_weight_loader(
            layer, extra_weight_attrs.get("weight_loader")
        )

    @append
    def create_weights(
        self, layer, input_size_per_partition, output_size_per_partition, params_dtype
    ):
        if self.use_mxfp8:
            choice = select_mxfp8_linear_backend(
                self.mxfp8_options,
                output_size_per_partition,
                input_size_per_partition,
                params_dtype,
                getattr(layer, "prefix", ""),
            )
            layer.w8a8_mxfp8_linear = dispatch_w8a8_mxfp8_linear(choice)
            layer.mxfp8_weights = Mxfp8LinearWeights(
                layer,
                choice,
                quantize_on_load=not self.quant_config.is_checkpoint_fp8_serialized,
            )

    def _wrap_weight_loader(self, layer: Module, loader):
        if not self.use_mxfp8:
            return loader

        def weight_loader(param, loaded_weight, *shard_id):
            weights = layer.mxfp8_weights
            loaded_weight = weights.accept(param, loaded_weight, *shard_id)
            self.restore_weights_before_loading(layer)
            weights.write(loader, param, loaded_weight, *shard_id)

        return weight_loader

    @prepend
    def process_weights_after_loading_block_quant(self, layer):
        if self.use_mxfp8:
            self._process_mxfp8_linear_weight_scale(layer)
            return

    @drop
    def process_weights_after_loading_block_quant(self):
        if self.use_mxfp8:
            ...

    @drop
    def _quantize_mxfp8_weights(self): ...

    def _process_mxfp8_linear_weight_scale(self, layer: Module) -> None:
        """Bring the layer's weight and scale to the form that its backend reads, in place."""
        layer.mxfp8_weights.to_kernel_form()

    def use_mxfp8_choice(self, layer: Module, choice: Mxfp8LinearChoice) -> None:
        """Run the layer on another backend than it was created for."""
        layer.w8a8_mxfp8_linear = dispatch_w8a8_mxfp8_linear(choice)
        layer.mxfp8_weights.use(choice)

    def restore_weights_before_loading(self, layer: Module) -> None:
        """Undo the processing in place: the checkpoint's bytes, ready to be written."""
        if self.use_mxfp8:
            layer.mxfp8_weights.to_checkpoint_form()

    @splice
    def apply(self, layer, x, bias):
        if self.use_mxfp8:
            x, input_scale = x if isinstance(x, tuple) else (x, None)
            return layer.w8a8_mxfp8_linear(
                input=x,
                weight=layer.weight,
                weight_scale=layer.weight_scale_inv,
                input_scale=input_scale,
                bias=bias,
            )
