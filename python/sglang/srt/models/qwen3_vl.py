"""
Qwen3VLForConditionalGeneration.load_weights
    why: it passed over "model.visual.", as transformers has called the vision tower since 4.52, and left that tower unwritten
    until: upstream renames it, as its qwen3_vl_moe does
"""

from overlay.marks import prepend


class Qwen3VLForConditionalGeneration:
    @prepend
    def load_weights(self, weights):
        weights = (
            (
                (f"visual.{name.removeprefix('model.visual.')}", tensor)
                if name.startswith("model.visual.")
                else (name, tensor)
            )
            for name, tensor in weights
        )
