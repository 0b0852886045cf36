"""A model on the meta device, and what a checkpoint's tensors become when it loads them.

Such a model has loaders and shapes, and no memory; probes stand for the tensors.
"""

import contextlib
import copy
from collections import defaultdict
from typing import Any, Callable, Dict, Iterable, Iterator, NamedTuple, Set, Tuple

import torch
from torch.overrides import TorchFunctionMode


def build_on_meta(
    initialize: Callable, model_config, load_config, quant_config
) -> torch.nn.Module:
    """The model that `initialize`, the loaders' `_initialize_model`, makes of these."""
    from sglang.srt.model_loader.utils import get_model_architecture

    get_model_architecture(model_config)  # imports models, which is not for meta
    with on_meta_device(model_config.dtype):
        model = initialize(model_config, load_config, copy.deepcopy(quant_config))
    # It computes with the weights, which the meta device has not.
    if hasattr(model, "post_load_weights"):
        model.post_load_weights = lambda *args, **kwargs: None
    return model


def init_lone_process() -> None:
    """Process groups of this process alone, for models that ask for their rank."""
    from sglang.srt.distributed import parallel_state

    parallel_state.init_distributed_environment(
        backend="gloo",
        world_size=1,
        rank=0,
        local_rank=0,
        distributed_init_method="tcp://127.0.0.1:0",
    )
    parallel_state.initialize_model_parallel(backend="gloo")


@contextlib.contextmanager
def on_meta_device(dtype: torch.dtype) -> Iterator[None]:
    """Models built within it have shapes and loaders, and no memory."""
    from sglang.srt.layers.rotary_embedding import get_rope
    from sglang.srt.model_loader.utils import set_default_torch_dtype
    from sglang.srt.utils.offloader import NoopOffloader, get_offloader, set_offloader

    offloader, before = get_offloader(), torch.get_default_dtype()
    # Releases have it in different modules, all in that of get_rope.
    cache = get_rope.__globals__["_ROPE_DICT"]
    ropes = dict(cache)  # a real model must not find those of one on meta
    set_offloader(NoopOffloader())
    try:
        with set_default_torch_dtype(dtype), torch.device("meta"), _Numbers():
            yield
    finally:
        set_offloader(offloader)
        cache.clear()
        cache.update(ropes)
        # Upstream's context leaves its own behind an exception.
        torch.set_default_dtype(before)


class _Numbers(TorchFunctionMode):
    """What is made of Python's numbers stays on the CPU: some constructors read it back."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        data = args[0] if args else kwargs.get("data")
        is_number = function is torch.tensor and isinstance(data, (int, float))
        if is_number or function is torch.linspace:
            kwargs = {"device": "cpu", **kwargs}
        return function(*args, **kwargs)


class Parameter(NamedTuple):
    """A parameter of a model, and the module that owns it."""

    path: str
    name: str
    module: torch.nn.Module
    param: torch.nn.Parameter


def parameters_of(model: torch.nn.Module) -> Dict[int, Parameter]:
    """A meta model's parameters, by the storages that loads are known by."""
    return {
        param.untyped_storage()._cdata: Parameter(path, name, module, param)
        for path, module in model.named_modules()
        for name, param in module.named_parameters(recurse=False)
    }


class MetaLoad:
    """One load of a meta model: which tensors were taken, and what they wrote.

    Attributes:
        taken: names of the tensors that a parameter took.
        rearranged: names of those whose elements changed their order before.
        writes: by the parameter's storage and the place in it, how many elements were
            written, and the names of the tensors that they are of.
    """

    def __init__(self) -> None:
        self.taken: Set[str] = set()
        self.rearranged: Set[str] = set()
        self.writes: Dict[int, Dict[Any, Tuple[int, Set[str]]]] = defaultdict(dict)

    def probes(self, named_tensors: Iterable[Tuple[str, Any]]) -> Iterator:
        """For what has a shape and a dtype, what the model loads in its place."""
        for name, tensor in named_tensors:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            yield name, Probe.of(empty, {name}, self)

    def write(self, probe: "Probe", target: torch.Tensor, place: Any) -> None:
        """A copy of `probe` into `target`, or into a `place` in it."""
        numel = target.numel() if place is None else probe.numel()
        region = target.storage_offset(), place
        self.writes[target.untyped_storage()._cdata][region] = numel, probe.origins
        self.taken |= probe.origins
        if probe.is_rearranged:
            self.rearranged |= probe.origins

    def read(self, probe: "Probe") -> None:
        """Its number was asked for, which is 0."""
        self.taken |= probe.origins


class Probe(torch.Tensor):
    """A meta tensor that tells its `load` what becomes of it.

    `origins` are the names of the tensors that it is made of. `is_rearranged` says that
    its elements may be in another order than the checkpoint's.
    """

    is_rearranged = False

    # What else is asked of it costs a call of __torch_function__.
    device = torch.device("meta")

    @classmethod
    def of(cls, tensor: torch.Tensor, names: Set[str], load: MetaLoad) -> "Probe":
        probe = torch.Tensor._make_subclass(cls, tensor)
        probe.origins, probe.load, probe.source_dtype = names, load, tensor.dtype
        return probe

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is _COPY or function is _SET_ITEM:
            source = args[1] if function is _COPY else args[2]
            place = None if function is _COPY else str(args[1])
            if isinstance(source, cls):
                source.load.write(source, args[0], place)
            if not args[0].is_meta:
                return args[0]  # made on a device by name: nothing can be copied there
        if function is _ITEM:
            args[0].load.read(args[0])
            return 0.0
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        if function is _COPY or function is _SET_ITEM:
            return result
        if isinstance(result, torch.Tensor):
            derived = cls._derived(result, args)
            derived.is_rearranged |= _rearranges(function, args)
            return derived
        if type(result) in (tuple, list):
            return type(result)(cls._derived(part, args) for part in result)
        return result

    @classmethod
    def _derived(cls, result: Any, args: tuple) -> Any:
        if not isinstance(result, torch.Tensor):
            return result
        sources = [a for a in args if type(a) is cls]
        sources = sources or [a for a in args[0] if type(a) is cls]  # of torch.cat
        origins = sources[0].origins
        if len(sources) > 1:
            origins = origins.union(*(source.origins for source in sources))
        derived = cls.of(result, origins, sources[0].load)
        derived.is_rearranged = any(source.is_rearranged for source in sources)
        return derived


def _rearranges(function: Callable, args: tuple) -> bool:
    by_index = function is torch.Tensor.__getitem__ and torch.is_tensor(args[1])
    return by_index or function in _REARRANGING


_REARRANGING = {
    getattr(owner, name)
    for owner in (torch, torch.Tensor)
    for name in ("flip", "gather", "index_select", "movedim", "permute", "roll")
    + ("swapaxes", "t", "take", "transpose")
}
_REARRANGING |= {torch.Tensor.T.__get__, torch.Tensor.mT.__get__}
_COPY, _SET_ITEM = torch.Tensor.copy_, torch.Tensor.__setitem__
_ITEM = torch.Tensor.item
