"""
ModelConfig._verify_quantization, ModelConfig._described_as_mxfp8, ModelConfig._declared_quantization
    why: every MXFP8 format is served by one linear path; upstream takes ModelOpt's for FP8 and has no compressed-tensors scheme for it
    until: upstream reads these formats
"""

import json
from pathlib import Path
from typing import Optional

from overlay.marks import splice
from transformers.utils import cached_file

from sglang.srt.layers.quantization.mxfp8_formats import describe_mxfp8


class ModelConfig:
    @splice
    def _verify_quantization(self):
        hf_config = self._described_as_mxfp8(self._parse_quant_hf_config())

    def _described_as_mxfp8(self, parsed: Optional[dict]) -> Optional[dict]:
        """`parsed`, or what an MXFP8 checkpoint declares in sglang's form.

        The latter also becomes the config that the loader reads. Raises ValueError, by
        the name of the format, for MXFP8 that is not served.
        """
        if parsed is None:
            return None
        described = describe_mxfp8(
            self._declared_quantization(), as_w8a8=self.quantization == "mxfp8"
        )
        if described is None:
            return parsed
        self.hf_config.quantization_config = described
        self.kv_cache_quant_algo = described.get("kv_cache_quant_algo")
        return described

    def _declared_quantization(self) -> Optional[dict]:
        """What config.json declares, or else ModelOpt's hf_quant_config.json."""
        for config in (self.hf_config, getattr(self.hf_config, "text_config", None)):
            for key in ("quantization_config", "compression_config"):
                declared = getattr(config, key, None)
                if declared is not None:
                    return (
                        declared if isinstance(declared, dict) else declared.to_dict()
                    )
        file = cached_file(
            self.model_path,
            "hf_quant_config.json",
            revision=self.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return json.loads(Path(file).read_text()) if file else None
