"""Which tensors of a checkpoint each layer of a model is loaded from: the model is asked.

Models rename what they load, fuse it, and build linears under other names or none. A copy
of the model on the meta device, unquantized, loads the checkpoint's names; where each one
arrives is what lists of layers, scales of the KV cache and the converter go by.
"""

import copy
import functools
import logging
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple

import torch

from sglang.srt.layers.quantization.mxfp8.formats import bare_name
from sglang.srt.layers.quantization.mxfp8.headers import (
    Header,
    read_headers,
    reads_files,
    with_mxfp8_names,
)
from sglang.srt.layers.quantization.mxfp8.meta import (
    MetaLoad,
    build_on_meta,
    parameters_of,
)
from sglang.srt.server_args import get_global_server_args

logger = logging.getLogger(__name__)

Weights = Iterable[Tuple[str, torch.Tensor]]
Shapes = Dict[str, Tuple[int, ...]]

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


def ask_model(
    initialize: Callable, model_config, load_config, quant_config, shapes: Shapes
) -> Tuple[List[Layer], Dict[str, str]]:
    """What a model makes of a checkpoint's tensors of these `shapes`.

    `initialize` is the loaders' `_initialize_model`. Raises what the model's code does.

    Returns the layers, in the order in which they are built, which is the same every time;
    and for modules of the checkpoint, the model's that their members go to.
    """
    layers: List[Layer] = []

    def record(module: torch.nn.Module, prefix: str) -> bool:
        layers.append(Layer(prefix, module))
        return False

    asked = copy.deepcopy(quant_config)
    asked.choose_mxfp8 = record
    model = build_on_meta(initialize, model_config, load_config, asked)
    load, parameters = MetaLoad(), parameters_of(model)
    headers = {name: Header(torch.bfloat16, shape) for name, shape in shapes.items()}
    model.load_weights(load.probes(headers.items()))
    arrived: Dict[str, Set[str]] = defaultdict(set)
    for storage in load.writes.keys() & parameters.keys():
        origins = (names for _, names in load.writes[storage].values())
        arrived[parameters[storage].path].update(*origins)
    paths = {id(module): path for path, module in model.named_modules()}
    for layer in layers:
        layer.path = paths.get(id(layer.module), "")
        layer.tensors = arrived[layer.path] if layer.path else set()
        layer.rearranged = layer.tensors & load.rearranged
    modules = {
        _parent(module_of(name)): _parent(path)
        for path, names in sorted(arrived.items())
        for name in names
    }
    return layers, modules


@dataclass
class Mxfp8Plan:
    """Which layers of a model are in MXFP8, and by which names it loads them.

    Made once, when the model is first built, and followed each time that it is.

    layers: (prefix, whether it is in MXFP8) in the order of construction; None where
        layers go by their prefixes.
    modules: for modules of the checkpoint, the model's that their members go to, where
        these have other names.
    """

    layers: Optional[List[Tuple[str, bool]]] = None
    modules: Dict[str, str] = field(default_factory=dict)

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

    def caches_of(self, scale: str, caches: Iterable[str]) -> List[str]:
        """Of the attention layers with a KV cache, those that a scale belongs to."""
        places = {bare_name(_parent(path)): _parent(path) for path in caches}
        places.update(self.modules)
        around = map(bare_name, _above(scale))
        place = next((places[name] for name in around if name in places), None)
        found = [path for path in caches if path.startswith(f"{place}.")]
        number = re.search(r"layers\.(\d+)\.", scale)
        if number and not found:
            found = [path for path in caches if path == f"{_OUTSIDE}.{number[1]}"]
        return found


def plan_mxfp8(initialize: Callable, loader, model_config, quant_config) -> Mxfp8Plan:
    """The plan of a model that is about to be built, by the headers of its checkpoint.

    Where there are none, and where the model cannot be asked, layers go by their prefixes.
    Raises ValueError for a fused layer of which only a part is in MXFP8.
    """
    listed = quant_config.mxfp8_layers
    shapes = _shapes(loader, model_config)
    wanted = {m for name in shapes if _KV_SCALE.search(name) for m in _above(name)}
    shapes = {name: s for name, s in shapes.items() if not IS_SCALE.search(name)}
    wanted |= {_group(name) for name in shapes if not listed.has(module_of(name))}
    shapes = {name: s for name, s in shapes.items() if _group(name) in wanted}
    if not shapes:
        return Mxfp8Plan()
    try:
        layers, modules = ask_model(
            initialize, model_config, loader.load_config, quant_config, shapes
        )
    except Exception as error:
        logger.warning(
            "The model cannot be asked for the checkpoint's names: %r", error
        )
        return Mxfp8Plan()
    choices = []
    for layer in layers:
        own = sorted(set(map(module_of, layer.tensors)))
        in_mxfp8 = listed.has_layer(layer.path or layer.prefix, own)
        choices.append((layer.prefix, in_mxfp8))
    return Mxfp8Plan(choices, {bare_name(name): at for name, at in modules.items()})


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


def _by_name(model: torch.nn.Module) -> Callable:
    load_weights = model.load_weights

    @functools.wraps(load_weights)
    def load_named_weights(weights, *args, **kwargs):
        named = load_kv_scales(model, with_mxfp8_names(weights))
        return load_weights(named, *args, **kwargs)

    return load_named_weights


def load_kv_scales(model: torch.nn.Module, weights: Weights) -> Weights:
    """Load the scales of the KV cache among `weights`, and yield the others.

    One that has no place in the model is dropped: the check of a whole checkpoint knows
    it. Raises ValueError, naming it, for one that `_refuse_kv_scale` refuses, and for a
    value's first scale without a key's.
    """
    written = {}
    for name, tensor, places in _with_kv_places(model, weights):
        if places is None:
            yield name, tensor
        elif not places and not tensor.is_meta:
            logger.warning(f"{name} has no place in the model, and is left out")
        for path, cache, kind in places or ():
            _refuse_kv_scale(cache, kind, name, tensor)
            getattr(cache, kind).data.copy_(tensor.reshape(()))
            written[path] = cache
    for path, cache in written.items():
        if not cache.k_scale.is_meta and cache.k_scale < 0 < cache.v_scale:
            raise ValueError(f"{path} has a scale for values, but none for keys")
        _remake_floats(cache)


def refuse_bad_kv_scales(model: torch.nn.Module, weights: Weights) -> None:
    """Raise ValueError, naming it, for a scale that `load_kv_scales` would not load."""
    for name, scale, places in _with_kv_places(model, weights):
        for _, cache, kind in places or ():
            _refuse_kv_scale(cache, kind, name, scale)


def refuse_old_kv_scales(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError where a checkpoint of these tensors would leave the KV cache with
    scales of the one before, since it has none there."""
    empty = ((name, torch.empty(0)) for name in names)
    given = {
        p for _, _, places in _with_kv_places(model, empty) for p, *_ in places or ()
    }
    for path, cache in kv_caches(model).items():
        scales = cache.k_scale_float, cache.v_scale_float
        if path not in given and scales not in ((None, None), (1.0, 1.0)):
            raise ValueError(
                f"it has no scales of the KV cache, and {path} would keep {scales} for keys "
                "and values: restart the server on the new weights"
            )


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
            for path in model.mxfp8_plan.caches_of(name, caches)
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
    """After raw writes."""
    for cache in kv_caches(model).values():
        _remake_floats(cache)


def _remake_floats(cache: torch.nn.Module) -> None:
    """What the attention kernels take, once it is made of the first scales."""
    for kind in ("k_scale", "v_scale"):
        if getattr(cache, f"{kind}_float") is not None:
            setattr(cache, f"{kind}_float", getattr(cache, kind).item())
