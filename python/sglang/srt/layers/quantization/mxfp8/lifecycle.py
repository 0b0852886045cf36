"""A model's MXFP8 layers across its life: loading, updating, saving.

Weights are written while layers are in checkpoint form, and read by kernels in kernel
form. Two things change the form model-wide: the end of every load and update, and
`mxfp8_checkpoint_form`, for code that reads or writes parameters past their loaders.
"""

import functools
import itertools
import logging
from contextlib import contextmanager
from typing import Callable, Dict, Iterable, List, Optional, Tuple

import torch

from sglang.srt.configs.load_config import LoadConfig, LoadFormat
from sglang.srt.distributed import get_pp_group
from sglang.srt.environ import envs
from sglang.srt.layers.quantization.mxfp8.agreement import (
    UpdateRefused,
    agree_to_write,
    shorten,
)
from sglang.srt.layers.quantization.mxfp8.finite import refuse_non_finite
from sglang.srt.layers.quantization.mxfp8.headers import reads_files, with_mxfp8_names
from sglang.srt.layers.quantization.mxfp8.names import (
    refuse_bad_kv_scales,
    refuse_old_kv_scales,
    remake_kv_floats,
)
from sglang.srt.layers.quantization.mxfp8.routing import (
    Mxfp8LinearChoice,
    mxfp8_kernels_missing,
)
from sglang.srt.layers.quantization.mxfp8.scale_layout import ANY_M
from sglang.srt.layers.quantization.mxfp8.self_check import checked
from sglang.srt.layers.quantization.mxfp8.update_check import (
    ACCEPT_UNCHECKED,
    UpdateCheck,
    is_mxfp8_expert,
    refuse_as_values,
    refuse_experts,
    refuse_twice,
)
from sglang.srt.layers.quantization.mxfp8.weights import (
    Mxfp8LinearWeights,
    check_parameters,
    deferred_processing,
    mxfp8_weights_of,
    name_mxfp8_weights,
)
from sglang.srt.layers.utils import copy_or_rebind_param
from sglang.srt.model_loader.utils import post_load_weights
from sglang.srt.utils import log_info_on_rank0

logger = logging.getLogger(__name__)

# DeepSeek's loaders hold one half of a fused layer until the other comes, in the same
# request; the second is fused below the first.
_FIRST_HALF, _SECOND_HALF = "q_a_proj", "kv_a_proj_with_mqa"
_OTHER_HALF = {_FIRST_HALF: _SECOND_HALF, _SECOND_HALF: _FIRST_HALF}
_FUSED_HALVES = "fused_qkv_a_proj_with_mqa"


def load_served_model(loader, model_config, device_config) -> torch.nn.Module:
    """`loader.load_model`, then every MXFP8 layer in kernel form, for good.

    While the loader runs, layers stay in checkpoint form, whatever it does: most
    formats write through the parameters' loaders, some write raw bytes. Afterwards
    `model.load_weights` checks an update as a whole before it writes (UpdateCheck), and
    ends with the layers that it wrote in kernel form again. Other models are returned
    as the loader made them.

    Raises ValueError naming the tensors that a checkpoint did not fill; RuntimeError
    for a layer that cannot be prepared. Logs once what runs where, and why.
    """
    with deferred_processing():
        model = loader.load_model(
            model_config=model_config, device_config=device_config
        )
    layers = name_mxfp8_weights(model)
    if not is_mxfp8_model(model):
        return model
    _refuse_unsupported(loader, layers)
    _check_all_written(layers)
    check_parameters(model)
    for weights in layers:
        weights.release()
    _all_to_kernel_form(layers)
    model = checked(model)
    _log_backends(layers)
    model.mxfp8_remake_derived = functools.partial(
        _remake_derived, model, model_config, model.load_weights
    )
    check = update_check_of(model_config, model)
    if check is not None:
        check.follow(model)
    model.load_weights = _managed(model, check, layers)
    return model


def is_mxfp8_model(model: torch.nn.Module) -> bool:
    """Whether any of the model's linears or experts are in MXFP8."""
    methods = (getattr(module, "quant_method", None) for module in model.modules())
    configs = (getattr(method, "quant_config", None) for method in methods)
    return any(getattr(config, "use_mxfp8", False) for config in configs)


def check_mxfp8_checkpoint(loader, model_config, model: torch.nn.Module) -> None:
    """Before the files of an MXFP8 model are read: raise ValueError, naming a tensor, if
    the model, which is built, would not take them. Reads their headers only."""
    if not is_mxfp8_model(model) or not reads_files(loader.load_config):
        return
    check = update_check_of(model_config, model)
    if check is not None:
        check.source(loader, loader.Source.init_new(model_config, model))


def update_check_of(model_config, model) -> Optional[UpdateCheck]:
    """The check of a model that is built, made once; None where it is given up."""
    if envs.SGLANG_MXFP8_ACCEPT_UNCHECKED.get():
        logger.warning(ACCEPT_UNCHECKED)
        return None
    if not hasattr(model, "mxfp8_update_check"):
        is_stage = get_pp_group().world_size > 1
        model.mxfp8_update_check = UpdateCheck(
            lambda: model.mxfp8_twin(), model_config, is_stage
        )
    return model.mxfp8_update_check


class AgreedWeights(itertools.chain):
    """A checkpoint's tensors, checked by its files' headers before they are read."""


def check_mxfp8_disk_update(
    model: torch.nn.Module,
    model_config,
    get_model_loader: Callable,
    model_path: str,
    load_format: str,
    name_filter: Optional[Callable[[str], bool]] = None,
) -> Optional[str]:
    """Why the MXFP8 model will not be updated from `model_path`; None if it may be.

    Reads the files' headers only.
    """
    if not is_mxfp8_model(model):
        return None

    def check_files() -> None:
        loader = get_model_loader(LoadConfig(load_format=load_format), model_config)
        if not reads_files(loader.load_config):
            raise UpdateRefused(
                f"load format {load_format} cannot update a served MXFP8 model; use auto"
            )
        source = loader.Source.init_new(model_config, model)
        source.model_or_path = model_path
        check = update_check_of(model_config, model)
        if check is not None:
            taken = check.source(loader, source, model, name_filter)
            if name_filter is None:
                refuse_old_kv_scales(model, taken)

    try:
        agree_to_write(check_files)
    except UpdateRefused as error:
        return f"Refused to update weights from {model_path}: {error}. Nothing was written."
    return None


@contextmanager
def mxfp8_checkpoint_form(model: torch.nn.Module):
    """Within it, the model's MXFP8 parameters hold the checkpoint's bytes.

    For code that reads or writes parameters past their loaders. Ends in kernel form.
    """
    layers = mxfp8_weights_of(model)
    _wait_for_streams(layers)
    try:
        for weights in layers:
            weights.hold()
        _wait_for_streams(layers)
        yield
    finally:
        for weights in layers:
            weights.release()
        _all_to_kernel_form(layers)


def in_mxfp8_checkpoint_form(function: Callable) -> Callable:
    """Run a method of the owner of a model in `mxfp8_checkpoint_form`."""

    @functools.wraps(function)
    def run(owner, *args, **kwargs):
        with mxfp8_checkpoint_form(owner.model):
            return function(owner, *args, **kwargs)

    return run


def as_mxfp8_raw_loader(custom_loader: Callable) -> Callable:
    """A --custom-weight-loader that may write parameters past their loaders."""

    def load(model: torch.nn.Module, named_tensors) -> None:
        if not is_mxfp8_model(model):
            return custom_loader(model, named_tensors)
        named_tensors = list(named_tensors)
        agree_to_write(_refuse_raw, model, named_tensors)
        with mxfp8_checkpoint_form(model):
            custom_loader(model, named_tensors)
            model.mxfp8_remake_derived()

    return load


def load_mxfp8_tensors_directly(
    model: torch.nn.Module, named_tensors: Iterable[Tuple[str, torch.Tensor]]
) -> None:
    """Copy tensors into the parameters of the same names, past the loaders.

    Names are those of sglang's parameters (fused, this rank's shard); an MXFP8
    parameter takes its own dtype or the same bytes. Raises UpdateRefused, before
    anything is written, for an unknown name, another shape, or other bytes.
    """
    named_tensors, writes = list(with_mxfp8_names(named_tensors)), []

    def check() -> None:
        _refuse_raw(model, named_tensors)
        writes.extend(_direct_writes(model, named_tensors))

    agree_to_write(check)
    with mxfp8_checkpoint_form(model):
        for name, tensor in writes:
            module, _, short = name.rpartition(".")
            copy_or_rebind_param(model.get_submodule(module), short, tensor)
        model.mxfp8_remake_derived()


def _refuse_raw(model: torch.nn.Module, named_tensors: list) -> None:
    """Raise ValueError for what may not be written past the parameters' loaders."""
    for path, module in model.named_modules():
        if any(is_mxfp8_expert(module, p) for p in module.parameters(recurse=False)):
            refuse_experts(n for n, _ in named_tensors if n.startswith(f"{path}."))
    refuse_twice(named_tensors)
    refuse_bad_kv_scales(model, named_tensors)
    refuse_non_finite(named_tensors)


def _direct_writes(
    model: torch.nn.Module, named_tensors: Iterable[Tuple[str, torch.Tensor]]
) -> Iterable[Tuple[str, torch.Tensor]]:
    parameters = dict(model.named_parameters())
    owners = {id(w.layer.weight): w for w in mxfp8_weights_of(model)}
    owners |= {id(w.layer.weight_scale_inv): w for w in owners.values()}
    for name, tensor in named_tensors:
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name}")
        param = parameters[name]
        if param.shape != tensor.shape:
            raise ValueError(f"{name} is {list(param.shape)}, got {list(tensor.shape)}")
        if id(param) in owners:
            short = name.rpartition(".")[2]
            tensor = owners[id(param)].as_bytes_of(param, short, tensor)
        refuse_as_values(name, tensor.dtype, param.dtype)
        yield name, tensor.to(param.device, param.dtype)


def _remake_derived(model: torch.nn.Module, model_config, load_weights) -> None:
    """After raw writes: a model keeps its KV cache's scales as numbers, too, and an MLA
    model keeps weights made of kv_b_proj's."""
    remake_kv_floats(model)
    if any(w.name.split(".")[-1] == "kv_b_proj" for w in mxfp8_weights_of(model)):
        owners = [m for m in model.modules() if hasattr(m, "post_load_weights")]
        for owner in owners:
            post_load_weights(owner, model_config)
        if not owners:
            load_weights(())  # Kimi-Linear makes them at the end of every load


def _managed(
    model: torch.nn.Module,
    check: Optional[UpdateCheck],
    layers: List[Mxfp8LinearWeights],
) -> Callable:
    load_weights = model.load_weights

    @functools.wraps(load_weights)
    def load_checked_weights(weights, *args, **kwargs):
        _wait_for_streams(layers)
        try:
            if not isinstance(weights, AgreedWeights):
                weights = list(with_mxfp8_names(weights))
                weights += _other_halves(model, dict(weights))
                agree_to_write(check and check.tensors, model, weights)
            return load_weights(weights, *args, **kwargs)
        finally:
            _all_to_kernel_form(layers)

    return load_checked_weights


def _other_halves(
    model: torch.nn.Module, sent: Dict[str, torch.Tensor]
) -> List[Tuple[str, torch.Tensor]]:
    """What DeepSeek's loaders miss beside a half of a fused layer: the served other half,
    as checkpoint bytes under its checkpoint name."""
    found, fused = [], {}
    for name, tensor in sent.items():
        module, _, parameter = name.rpartition(".")
        parent, _, half = module.rpartition(".")
        other = f"{parent}.{_OTHER_HALF.get(half)}.{parameter}"
        if half not in _OTHER_HALF or other in sent:
            continue
        fused = fused or {
            _from_its_number(path): layer
            for path, layer in model.named_modules()
            if path.endswith(_FUSED_HALVES)
        }
        layer = fused.get(_from_its_number(f"{parent}.{_FUSED_HALVES}"))
        if hasattr(layer, parameter):
            if hasattr(layer, "mxfp8_weights"):
                layer.mxfp8_weights.to_checkpoint_form()
            whole, rows = getattr(layer, parameter).data, len(tensor)
            served = whole[rows:] if half == _FIRST_HALF else whole[:-rows]
            found.append((other, served.clone()))
    return found


def _from_its_number(name: str) -> str:
    """A layer's name where a checkpoint and the model agree."""
    _, layers, rest = name.rpartition("layers.")
    return layers + rest


def _wait_for_streams(layers: List[Mxfp8LinearWeights]) -> None:
    """A forward pass or a loader on another stream may still read or write what is about
    to move."""
    if layers and layers[0].layer.weight.is_cuda:
        torch.cuda.synchronize(layers[0].layer.weight.device)


def _all_to_kernel_form(layers: List[Mxfp8LinearWeights]) -> None:
    """Every layer that can be; then the first error, if any."""
    _wait_for_streams(layers)
    errors = []
    for weights in layers:
        try:
            weights.to_kernel_form()
        except Exception as error:
            errors.append(error)
    _wait_for_streams(layers)
    if errors:
        raise errors[0]


def _refuse_unsupported(loader, layers: List[Mxfp8LinearWeights]) -> None:
    """Raise RuntimeError for loads and offloads that cannot keep a layer's kernel form."""
    from sglang.srt.utils.offloader import NoopOffloader, get_offloader

    first = "The model"
    if layers:
        first = f"{layers[0].name} ({layers[0].backend.value})"
    if loader.load_config.load_format == LoadFormat.FLASH_RL:
        raise RuntimeError(
            f"{first}: --load-format flash_rl keeps FP8 copies of its own. Use "
            "--load-format auto with --quantization mxfp8, which quantizes bf16 updates."
        )
    if loader.load_config.remote_instance_weight_loader_transfer_engine is not None:
        raise RuntimeError(
            f"{first}: a transfer engine reads weights as the kernels see them. Use "
            "--remote-instance-weight-loader-backend nccl."
        )
    padded = [weights for weights in layers if weights.exceeds_its_parameters()]
    if padded and not isinstance(get_offloader(), NoopOffloader):
        raise RuntimeError(
            f"{padded[0].name} ({padded[0].backend.value}): its kernel form does not fit "
            "its parameters, and offload moves parameters only. Serve without "
            "--cpu-offload-gb and --offload-group-size, or list the layer in "
            "modules_to_not_convert."
        )


def _check_all_written(layers: List[Mxfp8LinearWeights]) -> None:
    """Loads past the loaders (dummy, sharded state) write no layer, and are left alone."""
    if not any(weights.loaded for weights in layers):
        return
    missing = [f"{w.name}.{name}" for w in layers for name in w.unwritten()]
    if missing:
        raise ValueError(
            f"the checkpoint did not fill {len(missing)} MXFP8 tensors: "
            f"{shorten(missing)}. Check that it has a scale beside every quantized "
            "weight, and that its quantization config lists the layers that are kept in "
            "bf16."
        )


def _log_backends(layers: List[Mxfp8LinearWeights]) -> None:
    if not layers:
        return
    emulated = [
        weights.backend
        for weights in layers
        if weights.backend.is_flashinfer() and mxfp8_kernels_missing(weights.backend)
    ]
    if emulated:
        logger.warning(
            f"The MXFP8 kernels of {emulated[0].value} cannot run here: they are "
            "emulated in torch (SGLANG_MXFP8_EMULATION=1), slowly."
        )
    groups: Dict[Mxfp8LinearChoice, List[Mxfp8LinearWeights]] = {}
    for weights in layers:
        groups.setdefault(weights.choice, []).append(weights)
    parts = [_describe(choice, members) for choice, members in groups.items()]
    log_info_on_rank0(logger, f"MXFP8 linear layers: {'; '.join(parts)}")
    options = layers[0].layer.quant_method.mxfp8_options
    unmatched = options.unmatched_patterns([w.layer.prefix for w in layers])
    if unmatched:
        log_info_on_rank0(
            logger,
            "SGLANG_MXFP8_LINEAR_BACKEND: no MXFP8 layer of this model matches "
            f"{', '.join(unmatched)}",
        )


def _describe(choice: Mxfp8LinearChoice, members: List[Mxfp8LinearWeights]) -> str:
    kinds = dict.fromkeys(
        f"{w.name.split('.')[-1]} {list(w.layer.weight.shape)}" for w in members
    )
    listed = ", ".join(kinds)
    because = f" since {choice.reason}" if choice.reason else ""
    runs_on = f"{choice.backend.value}{_scale_layout(choice)}"
    return f"{len(members)} on {runs_on} ({listed}){because}"


def _scale_layout(choice: Mxfp8LinearChoice) -> str:
    if not choice.backend.is_flashinfer_trtllm():
        return ""
    if choice.max_m_8x4 == 0:
        return ", 128x4 scales"
    if choice.max_m_8x4 == ANY_M:
        return ", 8x4 scales"
    return f", 8x4 scales up to M = {choice.max_m_8x4}"
