"""What the update check needs of this release: each has its own file of these names."""

import re
from typing import Iterable, List, Tuple

import torch

from sglang.srt.runtime_context import get_model

# Not those of a KV cache, which some models ignore.
IS_SCALE = re.compile(r"\bweight_scales?(_inv|_2)?$")
# What experts need after a write is done at the end of every session.
ANY_EXPERT_UPDATE = True

Weights = Iterable[Tuple[str, torch.Tensor]]


def name_mxfp8_weights(model: torch.nn.Module) -> List:
    """No objects that watch over the layers: here, layers own their parameters."""
    return []


def refuse_bad_kv_scales(model: torch.nn.Module, weights: Weights) -> None:
    """Scales of the KV cache are taken as upstream's models take them."""


def prepare_weights(loader, source):
    """A checkpoint's folder, files and whether they are safetensors, of no checksum: the
    load verifies that itself."""
    with get_model().override(model_checksum=None):
        return loader._prepare_weights(
            source.model_or_path,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
