"""
ModelConfig._verify_quantization, ModelConfig._described_as_mxfp8, ModelConfig._parse_modelopt_quant_config
    why: every MXFP8 format is served by one linear path; upstream takes ModelOpt's for FP8 and has no compressed-tensors scheme for it
    until: upstream reads these formats
"""

from typing import Optional

from overlay.marks import prepend, splice

from sglang.srt.layers.quantization.mxfp8.formats import (
    describe_mxfp8,
    flat_modelopt_mxfp8,
)


class ModelConfig:
    @splice
    def _verify_quantization(self):
        hf_config = self._described_as_mxfp8(self._parse_quant_hf_config())

    @prepend
    def _parse_modelopt_quant_config(self, quant_config_dict):
        mxfp8 = flat_modelopt_mxfp8(quant_config_dict)
        if mxfp8 is not None:
            return mxfp8

    def _described_as_mxfp8(self, declared: Optional[dict]) -> Optional[dict]:
        """What a checkpoint declares; of an MXFP8 one in sglang's form, for its loader too.

        Raises ValueError, by the name of the format, for MXFP8 that is not served.
        """
        described = describe_mxfp8(declared, as_w8a8=self.quantization == "mxfp8")
        if described is None:
            return declared
        self.hf_config.quantization_config = described
        self.kv_cache_quant_algo = described.get("kv_cache_quant_algo")
        return described
