"""
ModelRunner.load_model
    why: every later weight update must leave MXFP8 layers in the form that their kernel reads
    thread: sgl-project/sglang#22484
    until: upstream has restore_weights_before_loading
"""

from typing import TYPE_CHECKING

from overlay.marks import splice

from sglang.srt.layers.quantization.mxfp8_weights import manage_mxfp8_weights

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import DeviceConfig


class ModelRunner:
    @splice
    def load_model(self):
        self.model = manage_mxfp8_weights(
            self.loader.load_model(
                model_config=self.model_config,
                device_config=DeviceConfig(self.device, self.gpu_id),
            )
        )
