"""
take_e8m0_bytes, Fp8LinearMethod.create_fp8_weight_
    why: a float8_e8m0fnu scale is copied into its uint8 parameter by value: 2**-12 becomes 0
"""

import torch
from overlay.marks import prepend


def take_e8m0_bytes(weight_loader):
    """Wraps a loader: an E8M0 scale reaches a uint8 parameter as its bytes."""

    def load(param, loaded_weight, *args, **kwargs):
        if (param.dtype, loaded_weight.dtype) == (torch.uint8, torch.float8_e8m0fnu):
            loaded_weight = loaded_weight.view(torch.uint8)
        return weight_loader(param, loaded_weight, *args, **kwargs)

    return load


class Fp8LinearMethod:
    @prepend
    def create_fp8_weight_(use_mxfp8, weight_loader):
        if use_mxfp8:
            weight_loader = take_e8m0_bytes(weight_loader)
