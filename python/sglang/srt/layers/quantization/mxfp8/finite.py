"""Which bytes of a checkpoint or an update are no numbers."""

import functools
from collections import defaultdict
from typing import Callable, Dict, Iterable, Iterator, Tuple

import torch


def refuse_non_finite(
    named_tensors: Iterable[Tuple[str, torch.Tensor]], quantizes: bool = False
) -> None:
    """Raise ValueError, by its name, for a tensor that holds NaN or infinity.

    That is a NaN code in e4m3 (or its bytes), the byte 255 in an E8M0 scale and, if the
    model `quantizes` what it loads, NaN or infinity in 16 bits or more. Reads an
    e4m3 tensor twice and others once, and waits for a GPU once.
    """
    found: Dict[torch.device, list] = defaultdict(list)
    for name, tensor in named_tensors:
        if tensor.numel() and not tensor.is_meta:
            for byte, forbidden in _telling_bytes(name, tensor, quantizes):
                found[tensor.device].append((name, forbidden, byte))
    for entries in found.values():
        values = torch.stack([byte for *_, byte in entries]).tolist()
        for (name, forbidden, _), value in zip(entries, values):
            if value == forbidden:
                raise ValueError(f"{name} holds NaN or infinity, which no weight is")


def reads_finite_weights(get_weights_iterator: Callable) -> Callable:
    """Refuse what is not finite in an MXFP8 checkpoint, tensor by tensor as it is read."""

    @functools.wraps(get_weights_iterator)
    def read(loader, source, **kwargs):
        weights = get_weights_iterator(loader, source, **kwargs)
        if getattr(source.model_config, "quantization", None) != "mxfp8":
            return weights
        return _finite(weights)

    return read


def _finite(named_tensors: Iterable[Tuple[str, torch.Tensor]]):
    for named in named_tensors:
        refuse_non_finite([named])
        yield named


def _telling_bytes(
    name: str, tensor: torch.Tensor, quantizes: bool
) -> Iterator[Tuple[torch.Tensor, int]]:
    """Pairs of a byte that says it all, on the tensor's device, and what it must not be."""
    last = name.rpartition(".")[2]
    is_bytes = tensor.dtype == torch.uint8 and last == "weight"
    if tensor.dtype == torch.float8_e4m3fn or is_bytes:
        # The two NaN codes are the greatest byte, without and with a sign.
        yield tensor.view(torch.uint8).amax(), 0xFF
        yield tensor.view(torch.int8).amax().view(torch.uint8), 0x7F
    elif tensor.dtype.itemsize == 1 and (
        "_scale" in last or tensor.dtype == torch.float8_e8m0fnu
    ):
        yield tensor.view(torch.uint8).amax(), 0xFF
    elif quantizes and tensor.is_floating_point():
        low, high = torch.aminmax(tensor)
        finite = low.isfinite() & high.isfinite()
        yield finite.logical_not().view(torch.uint8), 1
