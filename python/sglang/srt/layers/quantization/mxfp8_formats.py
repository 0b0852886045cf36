"""How MXFP8 checkpoints say what they hold, and one description of it for the loader.

What the config of any format says becomes a `quantization_config` of sglang's own form
(`describe_mxfp8`): quant_method "mxfp8", and the list of layers that are not in MXFP8.
What is recognised but not served is refused by the name of its format.

An entry of that list is one of
    "lm_head"                   any layer whose name contains it (sglang's own lists)
    "glob:layers.0.self_attn*"  the layers that match from any dot on, and those in them
    "re:.*down_proj"            the layers whose name matches from its start
"""

import functools
import re
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import torch

from sglang.srt.layers.quantization.mxfp8_layout import GROUP_SIZE

SCALE = "weight_scale_inv"
# What the parameter is called in checkpoints of ModelOpt and compressed-tensors.
_OTHER_SCALE = "weight_scale"

# Layers that sglang makes of several of a checkpoint's.
_FUSED_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "experts": ("experts.0.gate_proj", "experts.0.up_proj", "experts.0.down_proj"),
}

_SERVED = (
    "MXFP8 is served from checkpoints of sglang's own form, ModelOpt and "
    "compressed-tensors (W8A8), and from bf16 ones with --quantization mxfp8"
)


def is_mxfp8_layer(name: str, ignored: Iterable[str]) -> bool:
    """Whether the linear or the experts that sglang calls `name` are in MXFP8.

    Raises ValueError for a fused layer of which a checkpoint has only a part so.
    """
    parent, dot, last = name.rpartition(".")
    if _matches(ignored, name):
        return False
    parts = [f"{parent}{dot}{part}" for part in _FUSED_PARTS.get(last, ())]
    kept = [part for part in parts if _matches(ignored, part)]
    if kept and len(kept) < len(parts):
        others = ", ".join(part for part in parts if part not in kept)
        raise ValueError(
            f"{name} is one layer here, but the checkpoint's quantization config has "
            f"{others} in MXFP8 and {', '.join(kept)} not: quantize all or none of them"
        )
    return not kept


def renamed_layers(
    ignored: Iterable[str], rename: Callable[[List[str]], List[str]]
) -> List[str]:
    """The list after a model's map from the checkpoint's names to sglang's."""
    return [
        f"{kind}{new}" for kind, body in map(_split, ignored) for new in rename([body])
    ]


def describe_mxfp8(
    config: Optional[Dict[str, Any]], as_w8a8: bool = False
) -> Optional[Dict[str, Any]]:
    """The `quantization_config` of an MXFP8 checkpoint in sglang's form; None for others.

    Args:
        config: `quantization_config` of config.json, or the contents of ModelOpt's
            hf_quant_config.json.
        as_w8a8: quantize activations even if the checkpoint leaves them in 16 bits.

    Returns a dict with quant_method "mxfp8", activation_scheme, weight_block_size,
    scale_fmt, checkpoint_format, ignored_layers, and kv_cache_quant_algo "FP8" where the
    KV cache is. A description is its own description.

    Raises ValueError, by the name of the format, for MXFP8 that is not served.
    """
    if not config:
        return None
    if "quantization" in config:
        config = {"quant_method": "modelopt", **config["quantization"]}
    method = config.get("quant_method") or (
        "modelopt" if "quant_algo" in config else ""
    )
    reader = _READERS.get(method.lower().replace("_", "-"))
    found = reader(config, as_w8a8) if reader else None
    if found is None:
        return None
    return {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, GROUP_SIZE],
        "scale_fmt": "ue8m0",
        **found,
    }


def _read_sglang(config: Dict[str, Any], as_w8a8: bool) -> Dict[str, Any]:
    for key, expected in (
        ("activation_scheme", "dynamic"),
        ("weight_block_size", [1, GROUP_SIZE]),
        ("scale_fmt", "ue8m0"),
    ):
        if config.get(key) not in (None, expected):
            raise ValueError(
                f'quant_method "mxfp8" with {key} {config[key]!r} is not served, only '
                f"with {expected!r}"
            )
    ignored = [
        name
        for key in ("ignored_layers", "modules_to_not_convert")
        for name in config.get(key) or ()
    ]
    kept = ("checkpoint_format", "kv_cache_quant_algo")
    return {
        "checkpoint_format": "mxfp8",
        **{key: config[key] for key in kept if key in config},
        "ignored_layers": list(dict.fromkeys(ignored)),
    }


def _read_modelopt(config: Dict[str, Any], as_w8a8: bool) -> Optional[Dict[str, Any]]:
    algorithm = config.get("quant_algo")
    if algorithm == "MIXED_PRECISION":
        _refuse_mixed(config.get("quantized_layers") or {})
    if algorithm != "MXFP8":
        return None
    if config.get("group_size", GROUP_SIZE) != GROUP_SIZE:
        raise ValueError(
            f"ModelOpt MXFP8 with group_size {config['group_size']} is not served, only "
            f"with {GROUP_SIZE}"
        )
    ignored = config.get("ignore") or config.get("exclude_modules") or ()
    fp8_cache = config.get("kv_cache_quant_algo") == "FP8"
    return {
        "checkpoint_format": "modelopt",
        "ignored_layers": [f"glob:{name}" for name in ignored],
        **_kv_cache(fp8_cache or _is_fp8(config.get("kv_cache_scheme"))),
    }


def _refuse_mixed(layers: Dict[str, Dict[str, Any]]) -> None:
    algorithms = sorted({str(layer.get("quant_algo")) for layer in layers.values()})
    if "MXFP8" in algorithms:
        raise ValueError(
            f"ModelOpt MIXED_PRECISION of {', '.join(algorithms)} is not served. {_SERVED}."
        )


def _read_compressed_tensors(
    config: Dict[str, Any], as_w8a8: bool
) -> Optional[Dict[str, Any]]:
    groups = config.get("config_groups") or {}
    mxfp8 = {name for name, group in groups.items() if _is_mxfp8(group.get("weights"))}
    if not mxfp8:
        return None
    if len(mxfp8) < len(groups):
        others = ", ".join(sorted(groups.keys() - mxfp8))
        raise ValueError(
            f"compressed-tensors with MXFP8 and other formats ({others}) in one "
            f"checkpoint is not served. {_SERVED}."
        )
    for name, group in groups.items():
        if not _is_mxfp8(group.get("input_activations")) and not as_w8a8:
            raise ValueError(
                f"compressed-tensors MXFP8 W8A16 ({name} has no MXFP8 input_activations) "
                "is not served as such: the kernels take MXFP8 activations. To have the "
                "activations quantized as well, pass --quantization mxfp8."
            )
    targets = [target for group in groups.values() for target in group["targets"]]
    ignored = [_as_pattern(name) for name in config.get("ignore") or ()]
    if "Linear" not in targets:
        chosen = "|".join(_regex(_as_pattern(target)).pattern for target in targets)
        ignored.append(f"re:(?!{chosen})")
    return {
        "checkpoint_format": "compressed-tensors",
        "ignored_layers": ignored,
        **_kv_cache(_is_fp8(config.get("kv_cache_scheme"))),
    }


def _is_mxfp8(scheme: Optional[Dict[str, Any]]) -> bool:
    """Of weights or input_activations: 8-bit floats in groups of 32 with E8M0 scales."""
    return (
        bool(scheme)
        and scheme.get("num_bits") == 8
        and scheme.get("type") == "float"
        and scheme.get("strategy") == "group"
        and scheme.get("group_size") == GROUP_SIZE
    )


def _is_fp8(scheme: Optional[Dict[str, Any]]) -> bool:
    return (
        bool(scheme) and scheme.get("num_bits") == 8 and scheme.get("type") == "float"
    )


def _kv_cache(is_fp8: bool) -> Dict[str, str]:
    return {"kv_cache_quant_algo": "FP8"} if is_fp8 else {}


def _as_pattern(name: str) -> str:
    return name if name.startswith("re:") else f"glob:{name}"


def _refuse_auto_round(config: Dict[str, Any], as_w8a8: bool) -> None:
    if "mx_fp" in str(config.get("data_type")) and config.get("bits") == 8:
        raise ValueError(
            f"AutoRound's MXFP8 (data_type mx_fp) is not served. {_SERVED}."
        )


_READERS = {
    "mxfp8": _read_sglang,
    "modelopt": _read_modelopt,
    "compressed-tensors": _read_compressed_tensors,
    "auto-round": _refuse_auto_round,
}


def with_mxfp8_names(
    weights: Iterable[Tuple[str, torch.Tensor]],
) -> Iterator[Tuple[str, torch.Tensor]]:
    """Checkpoint tensors by the names that sglang's MXFP8 loaders know."""
    for name, tensor in weights:
        layer, dot, last = name.rpartition(".")
        yield f"{layer}{dot}{SCALE}" if last == _OTHER_SCALE else name, tensor


def takes_mxfp8_names(initialize_model: Callable) -> Callable:
    """Make the MXFP8 models that a function builds load any format's tensor names."""

    @functools.wraps(initialize_model)
    def initialize(model_config, load_config, quant_config=None):
        model = initialize_model(model_config, load_config, quant_config)
        if getattr(quant_config, "use_mxfp8", False):
            load_weights = model.load_weights

            @functools.wraps(load_weights)
            def load_named_weights(weights, *args, **kwargs):
                return load_weights(with_mxfp8_names(weights), *args, **kwargs)

            model.load_weights = load_named_weights
        return model

    return initialize


def _matches(names: Iterable[str], layer: str) -> bool:
    return any(_regex(name).match(layer) for name in names)


@functools.lru_cache(maxsize=None)
def _regex(name: str) -> "re.Pattern[str]":
    kind, body = _split(name)
    if kind == "re:":
        return re.compile(body)
    literal = re.escape(body)
    if not kind:
        return re.compile(f".*{literal}")
    any_text = literal.replace(r"\*", ".*").replace(r"\?", ".")
    return re.compile(rf"(.*\.)?{any_text}(\..*)?$")


def _split(name: str) -> Tuple[str, str]:
    for kind in ("glob:", "re:"):
        if name.startswith(kind):
            return kind, name[len(kind) :]
    return "", name
