"""What the update check needs of this release: each has its own file of these names."""

from sglang.srt.layers.quantization.mxfp8.names import IS_SCALE, refuse_bad_kv_scales
from sglang.srt.layers.quantization.mxfp8.weights import name_mxfp8_weights
from sglang.srt.server_args import get_global_server_args

# Experts are rearranged at load, and again only after a whole update from disk.
ANY_EXPERT_UPDATE = False


def prepare_weights(loader, source):
    """A checkpoint's folder, files and whether they are safetensors, of no checksum: the
    load verifies that itself."""
    args = get_global_server_args()
    checksum, args.model_checksum = args.model_checksum, None
    try:
        return loader._prepare_weights(
            source.model_or_path, source.revision, source.fall_back_to_pt
        )
    finally:
        args.model_checksum = checksum


__all__ = [
    "ANY_EXPERT_UPDATE",
    "IS_SCALE",
    "name_mxfp8_weights",
    "prepare_weights",
    "refuse_bad_kv_scales",
]
