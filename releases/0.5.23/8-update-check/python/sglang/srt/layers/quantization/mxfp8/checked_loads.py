"""Asks the update check before an MXFP8 model is written, from files or from memory."""

import functools
import logging
from contextvars import ContextVar
from typing import Callable

import torch

from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.environ import envs
from sglang.srt.layers.quantization.mxfp8.agreement import (
    CannotCheck,
    UpdateRefused,
    agree_to_write,
    run_weight_update,
)
from sglang.srt.layers.quantization.mxfp8.headers import reads_files, with_mxfp8_names
from sglang.srt.layers.quantization.mxfp8.meta import build_on_meta
from sglang.srt.runtime_context import get_parallel

logger = logging.getLogger(__name__)

_files_are_checked = ContextVar("_files_are_checked", default=False)


def checks_checkpoint(get_all_weights: Callable) -> Callable:
    """Wraps the reading of a checkpoint for a model that is built: raises UpdateRefused
    before anything is read if the files do not fill the model."""

    @functools.wraps(get_all_weights)
    def run(loader, model_config, model):
        try:
            check = _make_check(loader, model_config, model)
            if check is not None:
                check.source(loader, loader.Source.init_new(model_config, model))
                model.mxfp8_update_check = check
        except CannotCheck as error:
            logger.warning(f"MXFP8 weights are loaded and updated unchecked: {error}")
        return get_all_weights(loader, model_config, model)

    return run


def _make_check(loader, model_config, model: torch.nn.Module):
    """The UpdateCheck of a model that is built; None if it is not checked."""
    from sglang.srt.layers.quantization.mxfp8.update_check import (
        ACCEPT_UNCHECKED,
        UpdateCheck,
    )
    from sglang.srt.model_loader import loader as loaders

    load_config = loader.load_config
    # Other quantizations may have layers in MXFP8 beside their own.
    if model_config.quantization != "mxfp8" or not reads_files(load_config):
        return None
    if type(loader) is not loaders.DefaultModelLoader:
        return None
    if getattr(model, "secondary_weights", ()):
        logger.warning("MXFP8 weights of several sources are not checked")
        return None
    if envs.SGLANG_MXFP8_ACCEPT_UNCHECKED.get():
        logger.warning(ACCEPT_UNCHECKED)
        return None

    def build() -> torch.nn.Module:
        quant_config = loaders._get_quantization_config(model_config, load_config)
        twin = build_on_meta(
            loaders._initialize_model, model_config, load_config, quant_config
        )
        twin.load_weights = _by_name(twin.load_weights)
        return twin

    return UpdateCheck(build, model_config, get_parallel().pp_size > 1)


def _by_name(load_weights: Callable) -> Callable:
    @functools.wraps(load_weights)
    def run(weights, *args, **kwargs):
        return load_weights(with_mxfp8_names(weights), *args, **kwargs)

    return run


def checks_updates(load_model: Callable) -> Callable:
    """Wraps a loader: from then on `model.load_weights` checks the tensors that it is
    given first, on all ranks, but for those of files that were checked."""

    @functools.wraps(load_model)
    def run(loader, **configs):
        model = load_model(loader, **configs)
        if hasattr(model, "mxfp8_update_check"):
            model.mxfp8_update_check.follow(model)
            model.load_weights = _checked(model)
        return model

    return run


def _checked(model: torch.nn.Module) -> Callable:
    load_weights, check = _by_name(model.load_weights), model.mxfp8_update_check

    @functools.wraps(load_weights)
    def run(weights, *args, **kwargs):
        if not _files_are_checked.get():
            weights = list(weights)
            agree_to_write(check.tensors, model, weights)
        return load_weights(weights, *args, **kwargs)

    return run


def agrees(update: Callable) -> Callable:
    """Wraps a WeightUpdater's update: (success, message) is the same on all ranks."""

    @functools.wraps(update)
    def run(updater, *args, **kwargs):
        bound = functools.partial(update, updater, *args, **kwargs)
        is_checked = hasattr(updater.get_model(), "mxfp8_update_check")
        # Elastic EP, which alone has a filter or None, reads again what a rank lacks, on
        # that rank alone.
        if not is_checked or "weight_name_filter" in kwargs:
            return bound()
        return run_weight_update(get_parallel().tp_group.cpu_group, bound)

    return run


def checks_files(update: Callable) -> Callable:
    """Wraps an update from disk: files that the model would not take are refused by their
    headers, on all ranks. Within it the model takes their tensors unchecked."""

    @functools.wraps(update)
    def run(updater, model_path, load_format, **kwargs):
        is_checked = hasattr(updater.get_model(), "mxfp8_update_check")
        if is_checked and "weight_name_filter" not in kwargs:
            agree_to_write(_check_files, updater, model_path, load_format)
        token = _files_are_checked.set(True)
        try:
            return update(updater, model_path, load_format, **kwargs)
        finally:
            _files_are_checked.reset(token)

    return run


def _check_files(updater, model_path: str, load_format: str) -> None:
    from sglang.srt.model_loader.loader import get_model_loader

    config, model = updater.model_config, updater.get_model()
    loader = get_model_loader(LoadConfig(load_format=load_format), config)
    if not reads_files(loader.load_config):
        raise UpdateRefused(f"load format {load_format} cannot be checked; use auto")
    source = loader.Source.init_new(config, model)
    source.model_or_path = model_path
    model.mxfp8_update_check.source(loader, source, model)
