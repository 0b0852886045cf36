"""Llama's loaders keep the scales of MXFP8 checkpoints, byte for byte."""

import unittest
from itertools import product

import torch
from transformers import LlamaConfig

from sglang.srt.environ import envs
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.layer_ut_utils import init_single_process_dist
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="base-a-test-cpu")


class TestLlamaMxfp8Scales(CustomTestCase):
    def test_scales_keep_their_bytes(self):
        init_single_process_dist()
        sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
        config = LlamaConfig(num_hidden_layers=1, num_attention_heads=1, **sizes)
        quant_config = Fp8Config(True, weight_block_size=[1, 32], use_mxfp8=True)
        want = torch.randint(100, 120, (64, 2), dtype=torch.uint8)
        for v2, dtype in product((False, True), (torch.uint8, torch.float8_e8m0fnu)):
            model = LlamaForCausalLM(config, quant_config)
            layer, scales = model.model.layers[0], []
            for name in ("self_attn.v_proj", "mlp.down_proj"):
                name = f"model.layers.0.{name}.weight_scale_inv"
                scales.append((name, want.view(dtype)))
            with envs.SGLANG_ENABLE_WEIGHT_LOADER_V2.override(v2):
                model.load_weights(scales)
            for linear in (layer.self_attn.qkv_proj, layer.mlp.down_proj):
                with self.subTest(v2=v2, dtype=dtype, linear=linear):
                    got = linear.weight_scale_inv[-64:]
                    self.assertEqual(got.tolist(), want.tolist())


if __name__ == "__main__":
    unittest.main()
