"""What the update check needs of this release's MXFP8 models.

Each release has its own file of these names; nothing else in the check differs.
"""

import re
from typing import Iterable, Iterator, List, Tuple

import torch

WEIGHT, SCALE, OTHER_SCALE = "weight", "weight_scale_inv", "weight_scale"
IS_SCALE = re.compile(r"_scales?(_inv|_2)?$")
ANY_EXPERT_UPDATE = True

Weights = Iterable[Tuple[str, torch.Tensor]]


def with_mxfp8_names(weights: Weights) -> Iterator[Tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint by the names that the default loader gives them."""
    ending = f".{OTHER_SCALE}"
    for name, tensor in weights:
        yield f"{name}_inv" if name.endswith(ending) else name, tensor


def name_mxfp8_weights(model: torch.nn.Module) -> List:
    """No objects that watch over the layers: here, layers own their parameters."""
    return []


def refuse_bad_kv_scales(model: torch.nn.Module, weights: Weights) -> None:
    """Scales of the KV cache are taken as upstream's models take them."""
