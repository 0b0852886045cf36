"""Updates of a model's weights without a server."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch

from sglang.srt.model_executor.model_runner_components import weight_updater


@contextmanager
def updater_of(model: torch.nn.Module, model_config):
    """The WeightUpdater of a model runner on a CPU."""
    nothing = mock.Mock()
    with mock.patch.multiple(
        weight_updater,
        get_model=lambda: SimpleNamespace(weight_cache_mode="off"),
        get_pp_stage_load_group=lambda: None,
    ):
        yield weight_updater.WeightUpdater(
            tp_rank=0,
            device="cpu",
            gpu_id=0,
            model_config=model_config,
            custom_weight_loaders={},
            get_model=lambda: model,
            update_model_fields=nothing,
            recapture_cuda_graph=nothing,
            get_model_runner=nothing,
        )
