"""
ModelConfig._verify_quantization, ModelConfig._described_as_mxfp8
    why: other formats of MXFP8 become a config of sglang's own form, which the loader gets even where config.json has none; without one it quantizes online

ModelConfig._parse_modelopt_quant_config
    why: a ModelOpt checkpoint of FP8 and MXFP8 layers is taken for w4afp8
"""

from typing import TYPE_CHECKING, Optional

from overlay.marks import prepend, splice

from sglang.srt.layers.quantization.mxfp8.formats import (
    describe_mxfp8,
    flat_modelopt_mxfp8,
    own_list,
)

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import (
        REQUANTIZATION_METHODS,
        unwrap_modelopt_quantization_config,
    )


class ModelConfig:
    @splice
    def _verify_quantization(self):
        hf_config = self._described_as_mxfp8(self._parse_quant_hf_config())

    @prepend
    def _parse_modelopt_quant_config(self, quant_config_dict):
        settings = unwrap_modelopt_quantization_config(quant_config_dict)
        # With NVFP4 layers it is served, as modelopt_mixed.
        if settings.get("quant_algo") == "MIXED_PRECISION" and (
            "NVFP4" not in str(settings.get("quantized_layers"))
        ):
            mxfp8 = flat_modelopt_mxfp8({"quantization": settings})
            if mxfp8 is not None:
                return mxfp8

    def _described_as_mxfp8(self, declared: Optional[dict]) -> Optional[dict]:
        """What a checkpoint declares; of an MXFP8 one in sglang's form, for its loader too.

        Raises ValueError, by the name of the format, for MXFP8 that is not served.
        """
        if not declared or self.quantization in ("humming", *REQUANTIZATION_METHODS):
            return declared  # these read the checkpoint's own config
        if declared.get("quant_method") == "mxfp8":
            described = {**declared, "ignored_layers": own_list(declared)}
        else:
            described = describe_mxfp8(declared, as_w8a8=self.quantization == "mxfp8")
        if described is None:
            return declared
        self.hf_config.quantization_config = described
        return described
