"""
_initialize_model
    why: which layers are in MXFP8 is said by a checkpoint's names, which the model is asked for; ModelOpt and compressed-tensors call an MXFP8 scale weight_scale
    until: upstream reads these formats

DefaultModelLoader._get_all_weights
    why: a checkpoint that does not fit is refused by the name of its tensor, before it is read
    until: upstream checks checkpoints

DefaultModelLoader._get_weights_iterator
    why: NaN in an MXFP8 tensor is refused by its name, as its file is read
    until: upstream checks checkpoints
"""

from overlay.marks import decorate, prepend

from sglang.srt.layers.quantization.mxfp8.finite import reads_finite_weights
from sglang.srt.layers.quantization.mxfp8.names import takes_mxfp8_names


@decorate
@takes_mxfp8_names(lambda *configs: get_model_loader(*configs))
def _initialize_model(): ...


class DefaultModelLoader:
    @decorate
    @reads_finite_weights
    def _get_weights_iterator(self): ...

    @prepend
    def _get_all_weights(self, model_config, model):
        from sglang.srt.layers.quantization.mxfp8.lifecycle import (
            check_mxfp8_checkpoint,
        )

        check_mxfp8_checkpoint(self, model_config, model)
