"""What the configs of an MXFP8 checkpoint say, in each format."""

from dataclasses import dataclass
from typing import Callable, Dict, List, Sequence, Tuple

GROUP_SIZE = 32
HF_QUANT_CONFIG = "hf_quant_config.json"


@dataclass(frozen=True)
class Format:
    """The name of a weight's scale, and the configs for a list of modules in bf16.

    `describe` gives the `quantization_config` of config.json, and what else to write
    beside it, by file name.
    """

    scale_suffix: str
    describe: Callable[[Sequence[str]], Tuple[dict, Dict[str, dict]]]


def _sglang(kept: Sequence[str]) -> Tuple[dict, Dict[str, dict]]:
    config = {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, GROUP_SIZE],
        "scale_fmt": "ue8m0",
        "modules_to_not_convert": sorted(kept),
    }
    return config, {}


def _modelopt(kept: Sequence[str]) -> Tuple[dict, Dict[str, dict]]:
    # Readers look at the producer; the version is that whose form is followed here.
    producer = {"name": "modelopt", "version": "0.47.0"}
    config = {
        "ignore": _with_head(kept),
        "quant_algo": "MXFP8",
        "producer": producer,
        "quant_method": "modelopt",
    }
    quantization = {
        "quant_algo": "MXFP8",
        "kv_cache_quant_algo": None,
        "group_size": GROUP_SIZE,
        "exclude_modules": _with_head(kept),
    }
    return config, {
        HF_QUANT_CONFIG: {"producer": producer, "quantization": quantization}
    }


def _compressed_tensors(kept: Sequence[str]) -> Tuple[dict, Dict[str, dict]]:
    group = {
        "format": "mxfp8-quantized",
        "input_activations": _quantization_args(dynamic=True, observer=None),
        "output_activations": None,
        "targets": ["Linear"],
        "weights": _quantization_args(dynamic=False, observer="memoryless_minmax"),
    }
    config = {
        "config_groups": {"group_0": group},
        "format": "mxfp8-quantized",
        "global_compression_ratio": None,
        "ignore": _with_head(kept),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        # The version of the library whose form this is.
        "version": "0.15.0.1",
    }
    return config, {}


def _with_head(kept: Sequence[str]) -> List[str]:
    """The names sorted; a head that is tied, and so has no tensor, is listed too."""
    has_head = any(f".{name}".endswith(".lm_head") for name in kept)
    return sorted(kept if has_head else [*kept, "lm_head"])


def _quantization_args(dynamic: bool, observer: str | None) -> dict:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": GROUP_SIZE,
        "num_bits": 8,
        "observer": observer,
        "observer_kwargs": {},
        "scale_dtype": "torch.uint8",
        "strategy": "group",
        "symmetric": True,
        "type": "float",
        "zp_dtype": None,
    }


FORMATS = {
    "sglang": Format("_scale_inv", _sglang),
    "modelopt": Format("_scale", _modelopt),
    "compressed-tensors": Format("_scale", _compressed_tensors),
}
