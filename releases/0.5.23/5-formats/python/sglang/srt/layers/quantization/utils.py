"""
is_layer_skipped
    why: globs of an MXFP8 checkpoint's list never match, and targets have no entry
"""

from overlay.marks import prepend

from sglang.srt.layers.quantization.mxfp8.formats import LayerList, has_patterns


@prepend
def is_layer_skipped(prefix, ignored_layers, fused_mapping):
    if has_patterns(ignored_layers):
        listed = LayerList(ignored_layers, whole_parts=True, fused=fused_mapping)
        return not listed.has_layer(prefix)
