"""How MXFP8 checkpoints say what they hold, and one description of it for the loader.

What the config of any format says becomes a `quantization_config` of sglang's own form
(`describe_mxfp8`): quant_method "mxfp8", and the list of layers that are not in MXFP8.
What is recognised but not served is refused by the name of its format.

An entry of that list is one of
    "lm_head"                   any layer whose name contains it (sglang's own lists)
    "glob:layers.0.self_attn*"  the layers that match, and those in them
    "re:.*down_proj"            the layers whose name matches from its start
    "unless:re:.*mlp.*"         every layer that matches none of the entries "unless:"
Names are compared whatever "model." and "language_model." they begin with.
"""

import functools
import re
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import torch

from sglang.srt.layers.quantization.mxfp8_layout import GROUP_SIZE

SCALE = "weight_scale_inv"
# What the parameter is called in checkpoints of ModelOpt and compressed-tensors.
OTHER_SCALE = "weight_scale"

# Layers that sglang makes of several of a checkpoint's: families of parts.
_FUSED_PARTS = {
    "qkv_proj": [("q_proj", "k_proj", "v_proj")],
    "gate_up_proj": [("gate_proj", "up_proj")],
    "fused_qkv_a_proj_with_mqa": [("q_a_proj", "kv_a_proj_with_mqa")],
    "experts": [
        ("experts.0.gate_proj", "experts.0.up_proj", "experts.0.down_proj"),
        ("experts.0.w1", "experts.0.w2", "experts.0.w3"),
    ],
}
# Values of --quantization that name a format on the way to MXFP8.
_FLAGS = {
    "modelopt": ("modelopt", "modelopt_fp8"),
    "compressed-tensors": ("compressed-tensors", "compressed_tensors"),
}
_UNLESS = "unless:"
_SERVED = (
    "MXFP8 is served from checkpoints of sglang's own form, ModelOpt and "
    "compressed-tensors (W8A8), and from bf16 ones with --quantization mxfp8"
)


def is_mxfp8_layer(name: str, ignored: Iterable[str]) -> bool:
    """Whether the linear or the experts that sglang calls `name` are in MXFP8.

    Raises ValueError for a fused layer of which a checkpoint has only a part so.
    """
    targets = [entry for entry in ignored if entry.startswith(_UNLESS)]
    ignored = [entry for entry in ignored if not entry.startswith(_UNLESS)]

    def has(layer: str) -> bool:
        return not _matches(ignored, layer) and (
            not targets or _matches(targets, layer)
        )

    parent, dot, last = name.rpartition(".")
    families = [
        [f"{parent}{dot}{part}" for part in parts]
        for parts in _FUSED_PARTS.get(last, ())
    ]
    if not families:
        return has(name)
    for parts in families:
        _refuse_split(name, parts, [part for part in parts if has(part)])
    parts = sum(families, [])
    if not all(map(has, parts)):
        # A checkpoint that is fused as sglang is (Phi-3) may be targeted by that name.
        return not any(_matches(ignored, part) for part in parts) and has(name)
    if last == "experts":
        below = [entry for entry in ignored if f"{_bare(name)}." in entry]
        _refuse_split(name, ["the others", *below], ["the others"])
    return not _matches(ignored, name)


def _refuse_split(name: str, parts: List[str], mxfp8: List[str]) -> None:
    if 0 < len(mxfp8) < len(parts):
        kept = ", ".join(part for part in parts if part not in mxfp8)
        raise ValueError(
            f"{name} is one layer here, but the checkpoint's quantization config has "
            f"{', '.join(mxfp8)} in MXFP8 and {kept} not: quantize all or none of them"
        )


def renamed_layers(
    ignored: Iterable[str], rename: Callable[[List[str]], List[str]]
) -> List[str]:
    """The list with each entry also as a model's map of weight names has it."""
    entries = list(ignored)
    for entry in ignored:
        kind, body = _split(entry)
        entries += [f"{kind}{new}" for new in rename([body])]
    return _unique(entries)


def flat_modelopt_mxfp8(config: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """hf_quant_config.json as config.json would say it, if there is MXFP8 in it."""
    quantization = config["quantization"]
    layers = quantization.get("quantized_layers") or {}
    algorithms = [layer.get("quant_algo") for layer in layers.values()]
    if "MXFP8" not in (quantization.get("quant_algo"), *algorithms):
        return None
    return {**quantization, "quant_method": "modelopt"}


def names_the_format(flag: Optional[str], config: Dict[str, Any]) -> bool:
    """Whether --quantization `flag` names the format of a described checkpoint."""
    return config.get("quant_method") == "mxfp8" and flag in _FLAGS.get(
        config.get("mxfp8_format"), ()
    )


def describe_mxfp8(
    config: Optional[Dict[str, Any]], as_w8a8: bool = False
) -> Optional[Dict[str, Any]]:
    """The `quantization_config` of an MXFP8 checkpoint in sglang's form; None for others.

    Args:
        config: `quantization_config` of config.json.
        as_w8a8: quantize activations even if the checkpoint leaves them in 16 bits.

    Returns `config` with quant_method "mxfp8", activation_scheme, weight_block_size,
    scale_fmt, mxfp8_format, ignored_layers, and kv_cache_quant_algo "FP8" where the
    KV cache is. A description is its own description.

    Raises ValueError, by the name of the format, for MXFP8 that is not served.
    """
    method = (config or {}).get("quant_method") or ""
    reader = _READERS.get(method.lower().replace("_", "-"))
    found = reader(config, as_w8a8) if reader else None
    if found is None:
        return None
    return {
        **config,
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, GROUP_SIZE],
        "scale_fmt": "ue8m0",
        **found,
    }


def _read_sglang(config: Dict[str, Any], as_w8a8: bool) -> Dict[str, Any]:
    scale_format = config.get("scale_fmt") or "ue8m0"
    for key, value, expected in (
        ("activation_scheme", config.get("activation_scheme"), "dynamic"),
        ("weight_block_size", config.get("weight_block_size"), [1, GROUP_SIZE]),
        ("scale_fmt", scale_format.lower(), "ue8m0"),
    ):
        if value not in (None, expected):
            raise ValueError(
                f'quant_method "mxfp8" with {key} {value!r} is not served, only with '
                f"{expected!r}"
            )
    ignored = [
        name
        for key in ("ignored_layers", "modules_to_not_convert")
        for name in config.get(key) or ()
    ]
    return {
        "mxfp8_format": config.get("mxfp8_format", "mxfp8"),
        "ignored_layers": _unique(ignored),
    }


def _unique(names: Iterable[str]) -> List[str]:
    return list(dict.fromkeys(names))


def _read_modelopt(config: Dict[str, Any], as_w8a8: bool) -> Optional[Dict[str, Any]]:
    algorithm = config.get("quant_algo")
    if algorithm == "MIXED_PRECISION":
        _refuse_mixed_mxfp8(config.get("quantized_layers") or {})
    if algorithm != "MXFP8":
        return None
    group_size = config.get("group_size") or GROUP_SIZE
    if group_size != GROUP_SIZE:
        raise ValueError(
            f"ModelOpt MXFP8 with group_size {group_size} is not served, only with "
            f"{GROUP_SIZE}"
        )
    ignored = config.get("ignore") or config.get("exclude_modules") or ()
    fp8_cache = config.get("kv_cache_quant_algo") == "FP8"
    return {
        "mxfp8_format": "modelopt",
        "ignored_layers": [f"glob:{name}" for name in ignored],
        **_kv_cache(fp8_cache or _is_fp8(config.get("kv_cache_scheme"))),
    }


def _refuse_mixed_mxfp8(layers: Dict[str, Dict[str, Any]]) -> None:
    algorithms = sorted({str(layer.get("quant_algo")) for layer in layers.values()})
    if "MXFP8" in algorithms:
        raise ValueError(
            f"ModelOpt MIXED_PRECISION of {', '.join(algorithms)} is not served. {_SERVED}."
        )


def _read_compressed_tensors(
    config: Dict[str, Any], as_w8a8: bool
) -> Optional[Dict[str, Any]]:
    groups = {
        name: group
        for name, group in (config.get("config_groups") or {}).items()
        if group.get("weights")
    }
    mxfp8 = {name for name, group in groups.items() if _is_mxfp8(group["weights"])}
    if not mxfp8:
        return None
    _refuse_other_groups(groups, mxfp8)
    for name, group in groups.items():
        if not _is_mxfp8(group.get("input_activations")) and not as_w8a8:
            raise ValueError(
                f"compressed-tensors MXFP8 W8A16 ({name} has no MXFP8 input_activations) "
                "is not served as such: the kernels take MXFP8 activations. To have the "
                "activations quantized as well, pass --quantization mxfp8."
            )
    for key in ("transform_config", "sparsity_config"):
        if config.get(key):
            raise ValueError(
                f"compressed-tensors MXFP8 with a {key} is not served. {_SERVED}."
            )
    ignored = [_as_pattern(name) for name in config.get("ignore") or ()]
    return {
        "mxfp8_format": "compressed-tensors",
        "ignored_layers": ignored + _unless_targeted(groups),
        **_kv_cache(_is_fp8(config.get("kv_cache_scheme"))),
    }


def _refuse_other_groups(groups: Dict[str, Dict[str, Any]], mxfp8: set) -> None:
    if len(mxfp8) < len(groups):
        others = ", ".join(sorted(groups.keys() - mxfp8))
        raise ValueError(
            f"compressed-tensors with MXFP8 and other formats ({others}) in one "
            f"checkpoint is not served. {_SERVED}."
        )
    for name, group in groups.items():
        if group.get("output_activations"):
            raise ValueError(
                f"compressed-tensors MXFP8 with output_activations ({name}) is not "
                f"served. {_SERVED}."
            )


def _unless_targeted(groups: Dict[str, Dict[str, Any]]) -> List[str]:
    targets = _unique(
        t for group in groups.values() for t in group.get("targets") or ()
    )
    if not targets or "Linear" in targets:
        return []
    for target in targets:
        if "." not in target and not target.startswith("re:"):
            raise ValueError(
                f"compressed-tensors target {target!r} names a class that is not sglang's: "
                'targets are "Linear", layer names, or "re:" and a regular expression'
            )
    return [f"{_UNLESS}{_as_pattern(target)}" for target in targets]


def _is_mxfp8(scheme: Optional[Dict[str, Any]]) -> bool:
    """Of weights or input_activations: 8-bit floats in groups of 32 with E8M0 scales."""
    return (
        bool(scheme)
        and scheme.get("num_bits") == 8
        and scheme.get("type") == "float"
        and scheme.get("strategy") == "group"
        and scheme.get("group_size") == GROUP_SIZE
        and scheme.get("symmetric") is not False
        and scheme.get("scale_dtype") in (None, "torch.uint8", "uint8")
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
        yield f"{layer}{dot}{SCALE}" if last == OTHER_SCALE else name, tensor


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


def _matches(entries: Iterable[str], layer: str) -> bool:
    names = _aliases(layer)
    return any(_regex(entry).match(name) for entry in entries for name in names)


@functools.lru_cache(maxsize=None)
def _aliases(layer: str) -> Tuple[str, ...]:
    """A layer's name, in whatever a model's modules or a checkpoint's are wrapped."""
    if not layer:
        return ("",)
    wrappers = (
        "",
        "model.",
        "language_model.",
        "language_model.model.",
        "model.language_model.",
    )
    return (layer, *(f"{wrapper}{_bare(layer)}" for wrapper in wrappers))


def _bare(layer: str) -> str:
    return re.sub(r"^((model|language_model)\.)+", "", layer)


@functools.lru_cache(maxsize=None)
def _regex(entry: str) -> "re.Pattern[str]":
    kind, body = _split(entry)
    if kind.endswith("re:"):
        return re.compile(body)
    literal = re.escape(body)
    if not kind.endswith("glob:"):
        return re.compile(f".*{literal}")
    any_text = literal.replace(r"\*", ".*").replace(r"\?", ".")
    anywhere = "" if "." in body else r"(.*\.)?"
    return re.compile(rf"{anywhere}{any_text}(\..*)?$")


def _split(entry: str) -> Tuple[str, str]:
    """("glob:", "a*") of "glob:a*"."""
    kind = re.match("(unless:)?(glob:|re:)?", entry).group()
    return kind, entry[len(kind) :]
