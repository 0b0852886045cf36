"""
DefaultModelLoader.load_model, DefaultModelLoader._get_all_weights
    why: a parameter that no tensor fills is served as it was allocated

DefaultModelLoader._get_weights_iterator
    why: NaN in an MXFP8 tensor is refused by its name, as its file is read
"""

from overlay.marks import decorate

from sglang.srt.layers.quantization.mxfp8.checked_loads import (
    checks_checkpoint,
    checks_updates,
)
from sglang.srt.layers.quantization.mxfp8.finite import reads_finite_weights


class DefaultModelLoader:
    @decorate
    @checks_updates
    def load_model(self): ...

    @decorate
    @checks_checkpoint
    def _get_all_weights(self): ...

    @decorate
    @reads_finite_weights
    def _get_weights_iterator(self): ...
