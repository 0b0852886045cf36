"""What the configs of an MXFP8 checkpoint say, in each format."""

from typing import Dict, Sequence

GROUP_SIZE = 32
CONFIG = "config.json"
HF_QUANT_CONFIG = "hf_quant_config.json"
SCALE_SUFFIXES = {
    "sglang": "_scale_inv",
    "modelopt": "_scale",
    "compressed-tensors": "_scale",
}


def describe(form: str, kept: Sequence[str]) -> Dict[str, dict]:
    """The `quantization_config` of config.json for a list of modules in bf16, and what
    else is written beside it, by file name."""
    if form == "sglang":
        return {CONFIG: _sglang(kept)}
    # A head that is tied, and so has no tensor, is listed too.
    has_head = any(f".{name}".endswith(".lm_head") for name in kept)
    listed = sorted(kept if has_head else [*kept, "lm_head"])
    if form == "modelopt":
        return _modelopt(listed)
    return {CONFIG: _compressed_tensors(listed)}


def _sglang(kept: Sequence[str]) -> dict:
    return {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, GROUP_SIZE],
        "scale_fmt": "ue8m0",
        "modules_to_not_convert": sorted(kept),
    }


def _modelopt(kept: Sequence[str]) -> Dict[str, dict]:
    # Readers look at the producer; the version is that whose form is followed here.
    producer = {"name": "modelopt", "version": "0.47.0"}
    config = {"ignore": kept, "quant_algo": "MXFP8"}
    config |= {"producer": producer, "quant_method": "modelopt"}
    quantization = {"quant_algo": "MXFP8", "kv_cache_quant_algo": None}
    quantization |= {"group_size": GROUP_SIZE, "exclude_modules": kept}
    sidecar = {"producer": producer, "quantization": quantization}
    return {CONFIG: config, HF_QUANT_CONFIG: sidecar}


def _compressed_tensors(kept: Sequence[str]) -> dict:
    import compressed_tensors
    from compressed_tensors import quantization

    form = "mxfp8-quantized"
    scheme = quantization.preset_name_to_scheme("MXFP8", ["Linear"])
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme.model_copy(update={"format": form})},
        quantization_status=quantization.QuantizationStatus.COMPRESSED,
        format=form,
        ignore=kept,
    )
    version = compressed_tensors.__version__
    others = {"version": version, "sparsity_config": {}, "transform_config": {}}
    return {**config.model_dump(mode="json"), **others}
