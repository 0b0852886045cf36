"""Asks the update check before a checkpoint or an update of an MXFP8 model is written."""

import functools
import logging
from typing import Callable, List, Optional, Tuple

import torch

from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.distributed import get_pp_group, get_tp_group
from sglang.srt.environ import envs
from sglang.srt.layers.quantization.mxfp8.agreement import (
    UpdateRefused,
    agree_to_write,
    run_weight_update,
)
from sglang.srt.layers.quantization.mxfp8.headers import reads_files
from sglang.srt.layers.quantization.mxfp8.meta import build_on_meta
from sglang.srt.layers.quantization.mxfp8.release import with_mxfp8_names
from sglang.srt.layers.quantization.mxfp8.update_check import (
    ACCEPT_UNCHECKED,
    UpdateCheck,
)
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from sglang.srt.runtime_context import get_model

logger = logging.getLogger(__name__)


def is_mxfp8_model(model: torch.nn.Module) -> bool:
    """Whether any of the model's modules is in MXFP8."""
    methods = (getattr(module, "quant_method", None) for module in model.modules())
    configs = (getattr(method, "quant_config", None) for method in methods)
    return any(getattr(config, "use_mxfp8", False) for config in configs)


def checks_checkpoint(get_all_weights: Callable) -> Callable:
    """Wraps the reading of a checkpoint for a model that is built: raises UpdateRefused
    before anything is read if the files do not fill the model."""

    @functools.wraps(get_all_weights)
    def run(loader, model_config, model):
        if _is_checked(loader, model):
            check = _make_check(loader, model_config, model)
            _check_files(check, loader, model_config, model)
            model.mxfp8_update_check = check
        return get_all_weights(loader, model_config, model)

    return run


def _is_checked(loader, model: torch.nn.Module) -> bool:
    if not is_mxfp8_model(model) or not reads_files(loader.load_config):
        return False
    if getattr(model, "secondary_weights", ()):
        logger.warning("MXFP8 weights of several sources are not checked")
        return False
    if envs.SGLANG_MXFP8_ACCEPT_UNCHECKED.get():
        logger.warning(ACCEPT_UNCHECKED)
        return False
    return True


def _make_check(loader, model_config, model: torch.nn.Module) -> UpdateCheck:
    from sglang.srt.model_loader import loader as loaders

    not_needed = [RadixAttention]  # a KV cache's scales have a default
    if model_config.is_draft_model:
        not_needed.append(VocabParallelEmbedding)  # the target's
    if not model_config.is_generation:
        not_needed.append(ParallelLMHead)  # never run

    def build() -> torch.nn.Module:
        quant_config = loaders._get_quantization_config(
            model_config, loader.load_config
        )
        return build_on_meta(
            loaders._initialize_model, model_config, loader.load_config, quant_config
        )

    is_part = model_config.is_draft_model or get_pp_group().world_size > 1
    return UpdateCheck(build, is_part=is_part, not_needed=tuple(not_needed))


def _check_files(
    check: UpdateCheck,
    loader,
    model_config,
    model: torch.nn.Module,
    is_update: bool = False,
    name_filter: Optional[Callable[[str], bool]] = None,
) -> None:
    source = loader.Source.init_new(model_config, model)
    draft = loader.load_config.draft_model_idx

    def rename(named):
        if draft is not None:
            named = loader._filter_mtp_weights(named, source.prefix, draft)
        return with_mxfp8_names(named)

    check.files(
        *_files_of(loader, source),
        model=model if is_update else None,
        rename=rename,
        name_filter=name_filter,
    )


def _files_of(loader, source) -> Tuple[List[str], bool]:
    """A checkpoint's files, and whether they are safetensors."""
    from sglang.srt.model_loader.weight_utils import maybe_add_mtp_safetensors

    with get_model().override(model_checksum=None):  # the load verifies it
        folder, files, use_safetensors = loader._prepare_weights(
            source.model_or_path,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
    if use_safetensors:
        files = maybe_add_mtp_safetensors(
            files,
            folder,
            "model.safetensors.index.json",
            source.model_config.hf_config,
        )
    return files, use_safetensors


def checks_updates(load_model: Callable) -> Callable:
    """Wraps a loader: from then on `model.load_weights` checks what it is given first,
    on all ranks, but for files that `checks_disk_update` has checked."""

    @functools.wraps(load_model)
    def run(loader, **configs):
        model = load_model(loader, **configs)
        check = getattr(model, "mxfp8_update_check", None)
        if check is not None:
            check.follow(model)
            model.mxfp8_takes_checked_files = False
            model.load_weights = _checked(model, check)
        return model

    return run


def _checked(model: torch.nn.Module, check: UpdateCheck) -> Callable:
    load_weights = model.load_weights

    @functools.wraps(load_weights)
    def run(weights, *args, **kwargs):
        if not model.mxfp8_takes_checked_files:
            weights = list(weights)
            agree_to_write(_refusal_of(check.tensors, model, weights))
        return load_weights(weights, *args, **kwargs)

    return run


def _refusal_of(check: Callable, *args) -> Optional[Exception]:
    try:
        check(*args)
    except Exception as refusal:
        return refusal
    return None


def agrees(update: Callable) -> Callable:
    """Wraps a WeightUpdater's update: (success, message) is the same on all ranks."""

    @functools.wraps(update)
    def run(updater, *args, **kwargs):
        bound = functools.partial(update, updater, *args, **kwargs)
        if not hasattr(updater.get_model(), "mxfp8_update_check"):
            return bound()
        return run_weight_update(get_tp_group().cpu_group, bound)

    return run


def checks_disk_update(update: Callable) -> Callable:
    """Wraps an update from disk: files that the model would not take are refused on all
    ranks, by their headers. Within it, the model takes its tensors unchecked."""

    @functools.wraps(update)
    def run(updater, model_path, load_format, weight_name_filter=None, **kwargs):
        model = updater.get_model()
        check = getattr(model, "mxfp8_update_check", None)
        bound = functools.partial(
            update, updater, model_path, load_format, weight_name_filter, **kwargs
        )
        if check is None:
            return bound()

        def look() -> None:
            _check_folder(updater, check, model_path, load_format, weight_name_filter)

        agree_to_write(_refusal_of(look))
        model.mxfp8_takes_checked_files = True
        try:
            return bound()
        finally:
            model.mxfp8_takes_checked_files = False

    return run


def _check_folder(updater, check, model_path, load_format, name_filter) -> None:
    from sglang.srt.model_loader.loader import get_model_loader

    config, model = updater.model_config, updater.get_model()
    loader = get_model_loader(LoadConfig(load_format=load_format), config)
    if not reads_files(loader.load_config):
        raise UpdateRefused(f"load format {load_format} cannot be checked; use auto")
    served, config.model_path = config.model_path, model_path
    try:
        _check_files(check, loader, config, model, True, name_filter)
    finally:
        config.model_path = served
