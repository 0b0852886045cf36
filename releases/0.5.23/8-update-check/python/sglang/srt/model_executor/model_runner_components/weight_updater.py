"""
WeightUpdater.update_weights_from_disk, WeightUpdater.load_weights_from_distributed, WeightUpdater.update_weights_from_tensor, WeightUpdater.update_weights_from_ipc
    why: an update that one rank cannot take was written on the others, and in part on it
"""

from overlay.marks import decorate, splice

from sglang.srt.layers.quantization.mxfp8.agreement import what_was_written
from sglang.srt.layers.quantization.mxfp8.checked_loads import agrees, checks_files


class WeightUpdater:
    @decorate
    @agrees
    @checks_files
    def update_weights_from_disk(self): ...

    @decorate
    @agrees
    def load_weights_from_distributed(self): ...

    @splice
    def load_weights_from_distributed(self):
        error_msg = f"Failed to update parameter online: {e}. {what_was_written(e)}"

    @decorate
    @agrees
    def update_weights_from_tensor(self): ...

    @decorate
    @agrees
    def update_weights_from_ipc(self): ...
