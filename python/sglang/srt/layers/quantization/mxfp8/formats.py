"""How MXFP8 checkpoints say what they hold, and one description of it for the loader.

What the config of any format says becomes a `quantization_config` of sglang's own form
(`describe_mxfp8`): quant_method "mxfp8", and the list of layers that are not in MXFP8.
What is recognised but not served is refused by the name of its format.

An entry of that list is one of
    "lm_head"                   sglang's own lists: the layers whose names contain it, or,
                                as of 0.5.23, have it as a part between dots
    "glob:layers.0.self_attn*"  the layers that match, and those in them
    "re:.*down_proj"            the layers whose name matches from its start
    "unless:re:.*mlp.*"         every layer that matches none of the entries "unless:"
Names are compared whatever "model." and "language_model." they begin with.
"""

import fnmatch
import functools
import re
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Tuple

_GROUP_SIZE = 32  # values along K that share one scale
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
_GLOB = re.compile(r"[*?\[]")
# What sglang's modules or a checkpoint's may be in.
_LANGUAGE = "language_model."
_WRAPPERS = ("", "model.", _LANGUAGE, f"{_LANGUAGE}model.", f"model.{_LANGUAGE}")
_SERVED = (
    "MXFP8 is served from checkpoints of sglang's own form, ModelOpt and "
    "compressed-tensors (W8A8), and from bf16 ones with --quantization mxfp8"
)


class LayerList:
    """Which layers a description's `ignored_layers` leave in MXFP8.

    Args:
        whole_parts: entries of sglang's own lists are parts of names between dots, so
            that "mlp.gate" is not in "mlp.gate_up_proj".
        fused: what a model's layers are made of, by the last part of their names, where
            it is not the usual.
    """

    def __init__(
        self,
        ignored: Iterable[str],
        whole_parts: bool = False,
        fused: Optional[Mapping[str, List[str]]] = None,
    ) -> None:
        ignored = list(ignored)
        targets = tuple(entry for entry in ignored if entry.startswith(_UNLESS))
        kept = tuple(entry for entry in ignored if not entry.startswith(_UNLESS))
        self._kept = _matcher(kept, whole_parts)
        self._targeted = _matcher(targets) if targets else lambda name: True
        own = {name: [parts] for name, parts in (fused or {}).items()}
        self._fused = {**_FUSED_PARTS, **own}

    def has(self, module: str) -> bool:
        """Whether a checkpoint's module, by its own name, is in MXFP8."""
        return not self._kept(module) and self._targeted(module)

    def has_layer(self, name: str, modules: Iterable[str] = ()) -> bool:
        """Whether the linear or the experts that sglang calls `name` are in MXFP8.

        `modules` are the checkpoint's that it is made of; where they are not known, what
        it is usually made of. Raises ValueError for a layer of which only a part is so.
        """
        parent, dot, last = name.rpartition(".")
        usual = () if modules else self._fused.get(last, ())
        families = [[f"{parent}{dot}{part}" for part in parts] for parts in usual]
        families += [list(modules)] if modules else []
        for parts in families:
            _refuse_split(name, parts, [part for part in parts if self.has(part)])
        parts = sum(families, [])
        if all(map(self.has, parts or [name])):
            return not self._kept(name)
        # A checkpoint that is fused as sglang is (Phi-3) may be targeted by that name.
        unknown = not modules and not any(map(self._kept, parts))
        return unknown and self.has(name)


def _refuse_split(name: str, parts: List[str], mxfp8: List[str]) -> None:
    if 0 < len(mxfp8) < len(parts):
        kept = [part for part in parts if part not in mxfp8]
        raise ValueError(
            f"{name} is one layer here, but the checkpoint's quantization config has "
            f"{_listed(mxfp8)} in MXFP8 and {_listed(kept)} not: quantize all or none of "
            "them"
        )


def _listed(names: List[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def flat_modelopt_mxfp8(config: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """hf_quant_config.json as config.json would say it, if there is MXFP8 in it.

    Raises ValueError where it says nothing that its readers look for.
    """
    quantization = config.get("quantization", config)
    layers = quantization.get("quantized_layers") or {}
    algorithms = [_algorithm(settings) for settings in (quantization, *layers.values())]
    if "MXFP8" in algorithms:
        return {**quantization, "quant_method": "modelopt"}
    if "quantization" not in config:
        raise ValueError(
            f'hf_quant_config.json has no "quantization", only {_listed(sorted(config))}'
        )
    return None


def _algorithm(settings: Dict[str, Any]) -> str:
    return str(settings.get("quant_algo")).upper()


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
        "weight_block_size": [1, _GROUP_SIZE],
        "scale_fmt": "ue8m0",
        **found,
    }


def _read_sglang(config: Dict[str, Any], as_w8a8: bool) -> Dict[str, Any]:
    scale_format = config.get("scale_fmt") or "ue8m0"
    for key, value, expected in (
        ("activation_scheme", config.get("activation_scheme"), "dynamic"),
        ("weight_block_size", config.get("weight_block_size"), [1, _GROUP_SIZE]),
        ("scale_fmt", scale_format.lower(), "ue8m0"),
    ):
        if value not in (None, expected):
            raise ValueError(
                f'quant_method "mxfp8" with {key} {value!r} is not served, only with '
                f"{expected!r}"
            )
    return {
        "mxfp8_format": config.get("mxfp8_format", "mxfp8"),
        "ignored_layers": own_list(config),
    }


def own_list(config: Dict[str, Any]) -> List[str]:
    """The entries of both lists that a config of sglang's own form may have."""
    keys = ("ignored_layers", "modules_to_not_convert")
    names = [name for key in keys for name in config.get(key) or ()]
    is_new_glob = lambda name: _GLOB.search(name) and not _split(name)[0]
    return _unique(f"glob:{name}" if is_new_glob(name) else name for name in names)


def _read_fp8(config: Dict[str, Any], as_w8a8: bool) -> Optional[Dict[str, Any]]:
    if config.get("weight_block_size") != [1, _GROUP_SIZE]:
        return None
    if str(config.get("scale_fmt")).lower() != "ue8m0":
        raise ValueError(
            f'quant_method "fp8" with weight_block_size [1, {_GROUP_SIZE}] is MXFP8 only if '
            'its scales are E8M0 bytes: say so with "scale_fmt": "ue8m0"'
        )
    return _read_sglang(config, as_w8a8)


def _unique(names: Iterable[str]) -> List[str]:
    return list(dict.fromkeys(names))


def _read_modelopt(config: Dict[str, Any], as_w8a8: bool) -> Optional[Dict[str, Any]]:
    algorithm = _algorithm(config)
    if algorithm == "MIXED_PRECISION":
        _refuse_mixed_mxfp8(config.get("quantized_layers") or {})
    if algorithm != "MXFP8":
        return None
    group_size = config.get("group_size") or _GROUP_SIZE
    if group_size != _GROUP_SIZE:
        raise ValueError(
            f"ModelOpt MXFP8 with group_size {group_size} is not served, only with "
            f"{_GROUP_SIZE}"
        )
    ignored = config.get("ignore") or config.get("exclude_modules") or ()
    return {
        "mxfp8_format": "modelopt",
        "ignored_layers": [f"glob:{name}" for name in ignored],
        **_kv_cache(config),
    }


def _refuse_mixed_mxfp8(layers: Dict[str, Dict[str, Any]]) -> None:
    algorithms = sorted({_algorithm(layer) for layer in layers.values()})
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
        **_kv_cache(config),
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
        and scheme.get("group_size") == _GROUP_SIZE
        and scheme.get("symmetric") is not False
        and scheme.get("scale_dtype") in (None, "torch.uint8", "uint8")
    )


def _kv_cache(config: Dict[str, Any]) -> Dict[str, str]:
    scheme = config.get("kv_cache_scheme")
    algorithm = config.get("kv_cache_quant_algo")
    if scheme and not (scheme.get("num_bits") == 8 and scheme.get("type") == "float"):
        raise ValueError(f"kv_cache_scheme {scheme} is not served, only 8-bit floats")
    if algorithm and str(algorithm).upper() != "FP8":
        raise ValueError(f"kv_cache_quant_algo {algorithm!r} is not served, only 'FP8'")
    return {"kv_cache_quant_algo": "FP8"} if scheme or algorithm else {}


def _as_pattern(name: str) -> str:
    return name if name.startswith("re:") else f"glob:{name}"


def _refuse_auto_round(config: Dict[str, Any], as_w8a8: bool) -> None:
    if "mx_fp" in str(config.get("data_type")) and config.get("bits") == 8:
        raise ValueError(
            f"AutoRound's MXFP8 (data_type mx_fp) is not served. {_SERVED}."
        )


_READERS = {
    "mxfp8": _read_sglang,
    "fp8": _read_fp8,
    "modelopt": _read_modelopt,
    "compressed-tensors": _read_compressed_tensors,
    "auto-round": _refuse_auto_round,
}


def has_patterns(entries: Iterable[str]) -> bool:
    return any(entry.startswith((_UNLESS, "glob:", "re:")) for entry in entries)


def map_names(
    entries: Iterable[str], mapped: Callable[[List[str]], List[str]]
) -> List[str]:
    """The entries by the names that `mapped` gives; regular expressions stay."""
    result = []
    for entry in entries:
        kind, body = _split(entry)
        names = [body] if kind.endswith("re:") else mapped([body])
        result += [kind + name for name in names]
    return _unique(result)


@functools.lru_cache(maxsize=8)  # since it is asked again for every layer
def _matcher(
    entries: Tuple[str, ...], whole_parts: bool = False
) -> Callable[[str], bool]:
    """Whether any of these entries has a name, in whatever modules the name is wrapped."""
    modules, parts, globs, patterns = set(), [], [], []
    for kind, body in map(_split, entries):
        if kind.endswith("re:"):
            patterns.append(re.compile(body))
            continue
        # Some lists have a layer's weight, or what llm-compressor wraps it in.
        body = re.sub(r"(?<=\w)\.(weight|linear)$", "", body)
        if not kind.endswith("glob:"):
            parts.append(f".{body.rstrip('.')}." if whole_parts else body)
        elif "." in body and not _GLOB.search(body):
            modules.add(bare_name(body))
        else:
            globs.append(_glob_regex(body))
    if globs:
        patterns.append(re.compile("|".join(globs)))

    def matches(name: str) -> bool:
        bare = bare_name(name)
        ends = [match.start() for match in re.finditer(r"\.|$", bare)]
        if not modules.isdisjoint(bare[:end] for end in ends):
            return True
        names = [name, *(wrapper + bare for wrapper in _WRAPPERS if bare)]
        text = "\n".join(f".{alias}." if whole_parts else alias for alias in names)
        return any(part in text for part in parts) or any(
            pattern.match(alias) for pattern in patterns for alias in names
        )

    return matches


def bare_name(name: str) -> str:
    """A layer's name without what models and checkpoints wrap their layers in."""
    return re.sub(r"^((model|language_model)\.)+", "", name)


def _glob_regex(body: str) -> str:
    anywhere = "" if "." in body else r"(.*\.)?"
    pattern = fnmatch.translate(body)[:-2]  # but the end of the string
    return rf"{anywhere}{pattern}(\..*)?$"


def _split(entry: str) -> Tuple[str, str]:
    """("glob:", "a*") of "glob:a*"."""
    kind = re.match("(unless:)?(glob:|re:)?", entry).group()
    return kind, entry[len(kind) :]
