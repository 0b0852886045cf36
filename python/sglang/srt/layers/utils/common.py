"""
copy_or_rebind_param
    why: replace a parameter's data after loading without replacing the parameter
    until: the base is 0.5.10 or later, which has a helper of this name
"""

import torch
from torch.nn import Parameter


def copy_or_rebind_param(
    module: torch.nn.Module, name: str, new_value: torch.Tensor
) -> None:
    """Set `module.name` to `new_value`, keeping the parameter and, if it fits, its memory.

    Same shape, dtype and device: the bytes are copied in place, so that the address
    which a CUDA graph has captured stays valid. Otherwise the parameter's data is
    rebound; its identity, class and attributes stay. A missing parameter is registered.
    """
    param = module._parameters.get(name)
    if param is None:
        module.register_parameter(name, Parameter(new_value, requires_grad=False))
    elif (param.shape, param.dtype, param.device) == (
        new_value.shape,
        new_value.dtype,
        new_value.device,
    ):
        param.data.copy_(new_value)
    else:
        param.data = new_value
