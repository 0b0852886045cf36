"""Which tensors of a checkpoint each layer of a model is loaded from: the model is asked.

Models rename what they load, fuse it, and build linears under other names or none. A copy
of the model on the meta device, unquantized, loads the checkpoint's names; where each one
arrives is what lists of layers, scales of the KV cache and the converter go by.
"""

import copy
import functools
import logging
import re
from dataclasses import dataclass, field
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple

import torch

from sglang.srt.layers.quantization.mxfp8.formats import bare_name
from sglang.srt.layers.quantization.mxfp8.headers import read_headers, reads_files
from sglang.srt.layers.quantization.mxfp8.meta import (
    Probe,
    build_on_meta,
    on_meta_device,
)
from sglang.srt.layers.quantization.mxfp8.weights import SCALE
from sglang.srt.server_args import get_global_server_args

logger = logging.getLogger(__name__)

Weights = Iterable[Tuple[str, torch.Tensor]]
Shapes = Dict[str, Tuple[int, ...]]

# What the parameter is called in checkpoints of ModelOpt and compressed-tensors.
OTHER_SCALE = "weight_scale"
_KV_SCALE = re.compile(
    r"\.(?:(?P<kind>k|v|kv)_scale|(?P<quark>k|v)_proj\.output_scale)$"
)
# The attention layers of models on the Transformers backend, by number.
_OUTSIDE = "attention_instances"
IS_SCALE = re.compile(r"_scales?(_inv|_2)?$")


@dataclass
class Layer:
    """A linear, or the experts, that a model builds by its quantization config."""

    prefix: str  # what the model's code calls it
    module: torch.nn.Module
    path: str = ""  # in the model; empty if the model has dropped it
    tensors: Set[str] = field(default_factory=set)  # the checkpoint's, that it loads
    rearranged: Set[str] = field(default_factory=set)  # those that it rearranges

    @property
    def modules(self) -> List[str]:
        return sorted({module_of(name) for name in self.tensors})


@dataclass
class ModelNames:
    """What a model does with the names of a checkpoint.

    layers: in the order in which they are built, which is the same every time.
    places: for each tensor that the model takes, the modules that it goes to.
    attention: the attention layers that have a KV cache.
    """

    layers: List[Layer]
    places: Dict[str, Set[str]]
    attention: List[str]

    @functools.cached_property
    def parents(self) -> Dict[str, str]:
        """A module of the checkpoint's, and the model's that its members go to."""
        return {
            _parent(module_of(name)): _parent(path)
            for name, paths in self.places.items()
            for path in paths
        }

    def attention_of(self, scale: str) -> List[str]:
        """The attention layers that a scale of the KV cache belongs to.

        None of them, where the model does not load that layer of the checkpoint's.
        Raises ValueError where it does, and has no KV cache there.
        """
        known = [self.parents[name] for name in _above(scale) if name in self.parents]
        if not known:
            return []
        found = [path for path in self.attention if path.startswith(f"{known[0]}.")]
        number = re.search(r"layers\.(\d+)", known[0])
        if not found and number:
            outside = f"{_OUTSIDE}.{number[1]}"
            found = [path for path in self.attention if path == outside]
        if not found:
            raise ValueError(f"{scale}: the model has no KV cache in {known[0]}")
        return found


class _Arrivals:
    """Which modules of a meta model the tensors of a checkpoint arrive in."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.places: Dict[str, Set[str]] = {}
        self.rearranged: Set[str] = set()
        self._owners = {
            parameter.untyped_storage()._cdata: path
            for path, module in model.named_modules()
            for parameter in module.parameters(recurse=False)
        }

    def write(self, probe: Probe, target: torch.Tensor, place) -> None:
        path = self._owners.get(target.untyped_storage()._cdata)
        if path is not None:
            for name in probe.origins:
                self.places.setdefault(name, set()).add(path)
            if probe.is_rearranged:
                self.rearranged |= probe.origins

    def read(self, probe: Probe) -> None:
        pass


def ask_model(
    initialize: Callable, model_config, load_config, quant_config, shapes: Shapes
) -> ModelNames:
    """The names that a model has for a checkpoint's tensors of these `shapes`.

    `initialize` is the loaders' `_initialize_model`. Raises what the model's code does.
    """
    layers: List[Layer] = []

    def record(module: torch.nn.Module, prefix: str) -> bool:
        layers.append(Layer(prefix, module))
        return False

    asked = copy.deepcopy(quant_config)
    asked.choose_mxfp8 = record
    model = build_on_meta(initialize, model_config, load_config, asked)
    with on_meta_device(model_config.dtype):
        give_kv_scales(model, asked)
    load = _Arrivals(model)
    empty = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    model.load_weights(
        (name, Probe.of(empty(shape), {name}, load)) for name, shape in shapes.items()
    )
    arrived: Dict[str, Set[str]] = {}
    for name, paths in load.places.items():
        for path in paths:
            arrived.setdefault(path, set()).add(name)
    paths = {id(module): path for path, module in model.named_modules()}
    for layer in layers:
        layer.path = paths.get(id(layer.module), "")
        layer.tensors = arrived.get(layer.path, set()) if layer.path else set()
        layer.rearranged = layer.tensors & load.rearranged
    return ModelNames(layers, load.places, list(kv_caches(model)))


@dataclass
class Mxfp8Plan:
    """Which layers of a model are in MXFP8, and where scales of its KV cache belong.

    Made once, when the model is first built, and followed each time that it is.

    layers: (prefix, whether it is in MXFP8) in the order of construction; None where
        layers go by their prefixes.
    attention: the attention layers of each such scale that the checkpoint has.
    """

    layers: Optional[List[Tuple[str, bool]]] = None
    attention: Dict[str, List[str]] = field(default_factory=dict)

    def chooser(self) -> Optional[Callable[[torch.nn.Module, str], bool]]:
        """Says of each layer, in the order of construction, whether it is in MXFP8."""
        if self.layers is None:
            return None
        layers = iter(self.layers)

        def choose(module: torch.nn.Module, prefix: str) -> bool:
            expected, in_mxfp8 = next(layers, (None, False))
            if prefix != expected:
                raise ValueError(
                    f"{prefix} is built where {expected} was when the model was asked "
                    "which layers it has"
                )
            return in_mxfp8

        return choose

    def attention_of(self, scale: str, caches: Iterable[str]) -> List[str]:
        """The attention layers that a scale of the KV cache belongs to.

        Raises ValueError for one that the checkpoint did not have and no layer's name has.
        """
        if scale not in self.attention:
            around = {bare_name(name) for name in _above(scale)}
            found = [path for path in caches if bare_name(_parent(path)) in around]
            if not found:
                raise ValueError(f"{scale}: the model has no such KV cache")
            self.attention[scale] = found
        return self.attention[scale]


def plan_mxfp8(initialize: Callable, loader, model_config, quant_config) -> Mxfp8Plan:
    """The plan of a model that is about to be built, by the headers of its checkpoint.

    Where there are none, and where the model cannot be asked, layers go by their prefixes.
    Raises ValueError for a fused layer of which only a part is in MXFP8, and for a scale
    of a KV cache that the model does not have.
    """
    listed = quant_config.mxfp8_layers
    shapes = _shapes(loader, model_config)
    scales = [name for name in shapes if _KV_SCALE.search(name)]
    shapes = {name: s for name, s in shapes.items() if not IS_SCALE.search(name)}
    wanted = {group for name in scales for group in _above(name)}
    wanted |= {_group(name) for name in shapes if not listed.has(module_of(name))}
    shapes = {name: s for name, s in shapes.items() if _group(name) in wanted}
    if not shapes:
        return Mxfp8Plan()
    try:
        names = ask_model(
            initialize, model_config, loader.load_config, quant_config, shapes
        )
    except Exception as error:
        logger.warning(
            "The model cannot be asked for the checkpoint's names: %r", error
        )
        return Mxfp8Plan()
    layers = [
        (layer.prefix, listed.has_layer(layer.path or layer.prefix, layer.modules))
        for layer in names.layers
    ]
    return Mxfp8Plan(layers, {name: names.attention_of(name) for name in scales})


def give_kv_scales(model: torch.nn.Module, quant_config) -> None:
    """Give every attention layer scales for its KV cache: not all models' code does."""
    from sglang.srt.layers.radix_attention import RadixAttention

    if isinstance(getattr(model, _OUTSIDE, None), list):
        setattr(model, _OUTSIDE, torch.nn.ModuleList(getattr(model, _OUTSIDE)))
    for name, module in model.named_modules():
        if isinstance(module, RadixAttention) and module.quant_method is None:
            module.quant_method = quant_config.get_quant_method(module, name)
            module.quant_method.create_weights(module)


def kv_caches(model: torch.nn.Module) -> Dict[str, torch.nn.Module]:
    """A model's attention layers that have scales for a KV cache, by name."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "k_scale", None), torch.nn.Parameter)
    }
    # DeepSeek's second one, of prefills, reads no cache.
    twins = {name.replace(".attn_mqa", ".attn_mha") for name in found if "mqa" in name}
    return {name: module for name, module in found.items() if name not in twins}


def module_of(tensor: str) -> str:
    """The checkpoint's module that a tensor belongs to; itself, if it has no layer's name."""
    return tensor.removesuffix(".weight").removesuffix(".bias")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _group(tensor: str) -> str:
    """Tensors that one layer may be made of have a group in common."""
    module = module_of(tensor)
    before, experts, _ = module.partition(".experts.")
    return before if experts else _parent(module)


def _above(scale: str) -> List[str]:
    """The modules around a scale of the KV cache: its layer's, if any, and its attention's."""
    first = _parent(scale)
    return [first, _parent(first), _parent(_parent(first))]


def _shapes(loader, model_config) -> Shapes:
    """Of a checkpoint's tensors, from its headers; empty where there are none."""
    if not reads_files(loader.load_config):
        return {}
    try:
        _, files, use_safetensors = loader._prepare_weights(
            model_config.model_path, model_config.revision, True
        )
        headers = read_headers(files, use_safetensors) if use_safetensors else ()
    except Exception:  # reading the weights says what is wrong with them
        return {}
    return {name: tuple(header.shape) for name, header in headers}


def takes_mxfp8_names(get_model_loader: Callable) -> Callable:
    """Make the MXFP8 models that a function builds go by a checkpoint's names.

    Their layers are those that its config lists, and they load any format's scales.
    `model.mxfp8_twin()` builds one again on the meta device.
    """

    def decorate(initialize_model: Callable) -> Callable:
        @functools.wraps(initialize_model)
        def initialize(model_config, load_config, quant_config=None):
            configs = model_config, load_config, quant_config
            is_asked = getattr(quant_config, "choose_mxfp8", None) is not None
            if is_asked or not getattr(quant_config, "use_mxfp8", False):
                return initialize_model(*configs)
            if quant_config.mxfp8_plan is None:
                loader = get_model_loader(load_config, model_config)
                quant_config.mxfp8_plan = plan_mxfp8(
                    initialize_model, loader, model_config, quant_config
                )
            quant_config.choose_mxfp8 = quant_config.mxfp8_plan.chooser()
            model = initialize_model(*configs)
            quant_config.choose_mxfp8 = None
            give_kv_scales(model, quant_config)
            model.mxfp8_plan = quant_config.mxfp8_plan
            model.load_weights = _by_name(model)
            model.mxfp8_twin = functools.partial(build_on_meta, initialize, *configs)
            return model

        return initialize

    return decorate


def with_mxfp8_names(weights: Weights) -> Weights:
    """Checkpoint tensors by the names that sglang's MXFP8 loaders know."""
    for name, tensor in weights:
        layer, dot, last = name.rpartition(".")
        yield f"{layer}{dot}{SCALE}" if last == OTHER_SCALE else name, tensor


def _by_name(model: torch.nn.Module) -> Callable:
    load_weights = model.load_weights

    @functools.wraps(load_weights)
    def load_named_weights(weights, *args, **kwargs):
        named = load_kv_scales(model, with_mxfp8_names(weights))
        return load_weights(named, *args, **kwargs)

    return load_named_weights


def load_kv_scales(model: torch.nn.Module, weights: Weights) -> Weights:
    """Load the scales of the KV cache among `weights`, and yield the others.

    Raises ValueError, naming it, for a scale that has no place in the model or that
    `_refuse_kv_scale` refuses, and for a value's first scale without a key's.
    """
    written = {}
    for name, tensor, places in _with_kv_places(model, weights):
        if places is None:
            yield name, tensor
        for path, cache, kind in places or ():
            _set_kv_scale(cache, kind, name, tensor)
            written[path] = cache
    for path, cache in written.items():
        if not cache.k_scale.is_meta and cache.k_scale < 0 < cache.v_scale:
            raise ValueError(f"{path} has a scale for values, but none for keys")


def refuse_bad_kv_scales(model: torch.nn.Module, weights: Weights) -> None:
    """Raise ValueError, naming it, for a scale that `load_kv_scales` would not load."""
    for name, scale, places in _with_kv_places(model, weights):
        for _, cache, kind in places or ():
            _refuse_kv_scale(cache, kind, name, scale)


def _with_kv_places(model: torch.nn.Module, weights: Weights) -> Iterator:
    """(name, tensor, places): (path, attention layer, kind) of each place of a scale of
    the KV cache; None for other tensors."""
    caches = None
    for name, tensor in weights:
        match = _KV_SCALE.search(name)
        if match is None:
            yield name, tensor, None
            continue
        caches = kv_caches(model) if caches is None else caches
        yield name, tensor, [
            (path, caches[path], f"{kind}_scale")
            for path in model.mxfp8_plan.attention_of(name, caches)
            for kind in match["kind"] or match["quark"]
        ]


def _refuse_kv_scale(
    cache: torch.nn.Module, kind: str, name: str, scale: torch.Tensor
) -> None:
    """Raise ValueError for a scale that is not one positive number, and for another than
    CUDA graphs may have kept: some attention kernels take it as a number of Python's.
    """
    if scale.numel() != 1:
        raise ValueError(
            f"{name} is {list(scale.shape)}: a KV cache has one scale a layer here"
        )
    if scale.is_meta:
        return
    number, served = scale.float().item(), getattr(cache, f"{kind}_float")
    if not 0 < number < float("inf"):
        raise ValueError(f"{name} is {number}: a scale is a positive number")
    args = get_global_server_args()
    graphs = args.device != "cpu" and not args.disable_cuda_graph
    if graphs and served not in (None, number):
        raise ValueError(
            f"{name} changes from {served} to {number}, and CUDA graphs may keep the old "
            "one: restart the server on the new weights, or serve with "
            "--disable-cuda-graph"
        )


def remake_kv_floats(model: torch.nn.Module) -> None:
    """After raw writes: the attention kernels take a scale as a number of Python's."""
    for cache in kv_caches(model).values():
        for kind in ("k_scale", "v_scale"):
            if getattr(cache, f"{kind}_float") is not None:
                setattr(cache, f"{kind}_float", getattr(cache, kind).item())


def _set_kv_scale(
    cache: torch.nn.Module, kind: str, name: str, scale: torch.Tensor
) -> None:
    _refuse_kv_scale(cache, kind, name, scale)
    getattr(cache, kind).data.copy_(scale.reshape(()))
    # What the attention kernels take, once it is made of the first scales.
    if getattr(cache, f"{kind}_float") is not None:
        setattr(cache, f"{kind}_float", scale.item())
