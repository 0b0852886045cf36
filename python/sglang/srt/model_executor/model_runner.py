"""
ModelRunner.load_model
    why: MXFP8 layers are loaded in one form and run in another, in the same memory
    thread: sgl-project/sglang#22484
    until: upstream has restore_weights_before_loading

ModelRunner.forward
    why: a layer that an update left half rearranged would be read, by CUDA graphs too; the server stops, and says why
    until: never, as long as weights move in place

ModelRunner.update_weights_from_disk, ModelRunner._weights_served_from
    why: a checkpoint is checked before a byte is written, and a failed update rolls back to the checkpoint last served from disk, not to the new path
    until: upstream checks updates

ModelRunner.update_weights_from_distributed, ModelRunner._update_bucketed_weights_from_distributed
    why: the message of a refused update says that nothing was written
    until: upstream checks updates

ModelRunner.update_weights_from_tensor, _model_load_weights_direct
    why: direct and custom loaders write past the parameters' loaders
    until: upstream has restore_weights_before_loading

ModelRunner.configure_kv_cache_dtype
    why: an MXFP8 checkpoint of ModelOpt may declare an FP8 KV cache
    until: upstream reads these formats

ModelRunner.get_weights_by_name, ModelRunner.save_remote_model, ModelRunner.save_sharded_model, ModelRunner.check_weights, ModelRunner.send_weights_to_remote_instance
    why: what leaves the server, or is compared, is the checkpoint's bytes
    until: upstream has restore_weights_before_loading
"""

from typing import TYPE_CHECKING

from overlay.marks import decorate, prepend, splice

from sglang.srt.layers.quantization.mxfp8.agreement import what_was_written
from sglang.srt.layers.quantization.mxfp8.lifecycle import (
    AgreedWeights,
    as_mxfp8_raw_loader,
    check_mxfp8_disk_update,
    in_mxfp8_checkpoint_form,
    is_mxfp8_model,
    load_mxfp8_tensors_directly,
    load_served_model,
)
from sglang.srt.layers.quantization.mxfp8.weights import refuse_half_moved

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import (
        DefaultModelLoader,
        DeviceConfig,
        dynamic_import,
        get_model_loader,
        logger,
    )


class ModelRunner:
    @splice
    def load_model(self):
        self.model = load_served_model(
            self.loader, self.model_config, DeviceConfig(self.device, self.gpu_id)
        )

    @prepend
    def forward(self):
        refuse_half_moved()

    @prepend
    def update_weights_from_disk(self, model_path, load_format, weight_name_filter):
        refusal = check_mxfp8_disk_update(
            self.model,
            self.model_config,
            get_model_loader,
            model_path,
            load_format,
            weight_name_filter,
        )
        if refusal is not None:
            return False, refusal
        served_path = self.model_config.model_path

    @splice
    def update_weights_from_disk(self, iter, model_load_weights):
        model = model_load_weights(self.model, AgreedWeights(iter))

    @splice(within="except Exception as e")
    def update_weights_from_disk(self):
        iter = self._weights_served_from(served_path)

    def _weights_served_from(self, model_path: str):
        """What the server last read from disk, in the format in which it did."""
        logger.warning(f"Going back to {model_path}: weights pushed since are lost.")
        self.model_config.model_path = model_path
        loader = get_model_loader(self.load_config, self.model_config)
        source = DefaultModelLoader.Source.init_new(self.model_config, self.model)
        return AgreedWeights(loader._get_weights_iterator(source))

    @splice
    def update_weights_from_distributed(self):
        error_msg = f"Failed to update parameter online: {e}. {what_was_written(e)}"

    @splice
    def _update_bucketed_weights_from_distributed(self):
        error_msg = f"Failed to update parameter online: {e}. {what_was_written(e)}"

    @splice
    def update_weights_from_tensor(self):
        custom_loader = as_mxfp8_raw_loader(dynamic_import(load_format))

    @splice
    def configure_kv_cache_dtype(self, quant_config):
        kv_cache_quant_algo = getattr(
            quant_config,
            "kv_cache_quant_algo",
            getattr(self.model_config, "kv_cache_quant_algo", None),
        )

    @decorate
    @in_mxfp8_checkpoint_form
    def get_weights_by_name(self): ...

    @decorate
    @in_mxfp8_checkpoint_form
    def send_weights_to_remote_instance(self): ...

    @decorate
    @in_mxfp8_checkpoint_form
    def save_remote_model(self): ...

    @decorate
    @in_mxfp8_checkpoint_form
    def save_sharded_model(self): ...

    @decorate
    @in_mxfp8_checkpoint_form
    def check_weights(self): ...


@prepend
def _model_load_weights_direct(model, named_tensors):
    if is_mxfp8_model(model):
        load_mxfp8_tensors_directly(model, named_tensors)
        return
