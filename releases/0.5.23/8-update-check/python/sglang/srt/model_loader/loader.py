"""
DefaultModelLoader.load_model, DefaultModelLoader._get_all_weights
    why: a parameter that no tensor fills is served as it was allocated
"""

from overlay.marks import decorate

from sglang.srt.layers.quantization.mxfp8.checked_loads import (
    checks_checkpoint,
    checks_updates,
)


class DefaultModelLoader:
    @decorate
    @checks_updates
    def load_model(self): ...

    @decorate
    @checks_checkpoint
    def _get_all_weights(self): ...
