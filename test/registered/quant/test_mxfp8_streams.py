"""MXFP8 weights that loader threads write on CUDA streams of their own.

Nobody waits for such a copy but the layer that is about to move. Every stream here is
kept busy first, so that what does not wait comes too early each time.
"""

import contextlib
import unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch

from sglang.srt.layers.linear import MergedColumnParallelLinear
from sglang.srt.layers.quantization.mxfp8 import lifecycle, weights
from sglang.srt.layers.quantization.mxfp8.layout import unswizzle_scale_
from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.mxfp8_utils import as_served, mxfp8_linear, random_mxfp8, same_bytes
from sglang.test.test_utils import CustomTestCase

register_cuda_ci(est_time=40, suite="stage-b-test-small-1-gpu")

CYCLES = 200_000_000  # of a GPU's clock: a tenth of a second
K, WIDTHS = 512, [256, 256]
NAMES = ("weight", "weight_scale_inv")


class Model(torch.nn.Module):
    """One merged linear, whose parts and scales are each loaded on another stream."""

    def __init__(self, cycles):
        super().__init__()
        self.cycles = cycles
        with torch.device("cuda"):
            self.proj = mxfp8_linear(WIDTHS, K, cls=MergedColumnParallelLinear)

    def load_weights(self, weights):
        for name, tensor in weights:
            _, shard, name = name.split(".")
            param = getattr(self.proj, name)
            self.on_another_stream(param.weight_loader, param, tensor, int(shard))

    def write_past_the_loaders(self, weights):
        for name, tensor in weights:
            _, shard, name = name.split(".")
            part = getattr(self.proj, name).data.split(WIDTHS)[int(shard)]
            self.on_another_stream(part.copy_, tensor)

    def on_another_stream(self, write, *args):
        """As a loader's thread does: it ends before the GPU has begun."""

        def run():
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(self.cycles)
                write(*args)

        with ThreadPoolExecutor(1) as pool:
            pool.submit(run).result()


def tensors(seed):
    """Two parts of the linear, by checkpoint name."""
    parts = [random_mxfp8(n, K, 2 * seed + i)[1:] for i, n in enumerate(WIDTHS)]
    return {
        f"proj.{shard}.{name}": tensor.cuda()
        for shard, part in enumerate(parts)
        for name, tensor in zip(NAMES, part)
    }


@contextlib.contextmanager
def slow_restores():
    def unswizzle(*args):
        torch.cuda._sleep(CYCLES)
        unswizzle_scale_(*args)

    with mock.patch.object(weights, "unswizzle_scale_", unswizzle):
        yield


@unittest.skipUnless(torch.cuda.is_available(), "needs a CUDA device")
class TestStreams(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        # A kernel that is loaded or compiled at its first launch gives a stream time.
        cls.start(cycles=0).load_weights(tensors(1).items())

    @classmethod
    def start(cls, cycles=CYCLES):
        return as_served(Model(cycles), tensors(0).items())

    def assert_holds(self, model, seed):
        torch.cuda.synchronize()
        model.proj.mxfp8_weights.to_checkpoint_form()
        torch.cuda.synchronize()
        for name, tensor in tensors(seed).items():
            _, shard, name = name.split(".")
            held = getattr(model.proj, name).data.split(WIDTHS)[int(shard)]
            self.assertTrue(same_bytes(held, tensor), f"{name} of part {shard}")

    def test_a_start(self):
        self.assert_holds(self.start(), 0)

    def test_an_update(self):
        model = self.start()
        model.load_weights(tensors(1).items())
        self.assert_holds(model, 1)

    def test_a_second_thread_waits_until_the_first_has_restored_the_layer(self):
        model = self.start(cycles=0)
        with slow_restores():
            model.load_weights(tensors(1).items())
        self.assert_holds(model, 1)

    def test_raw_writes_before_and_after(self):
        for cycles, restores in ((CYCLES, contextlib.nullcontext), (0, slow_restores)):
            model = self.start(cycles)
            with self.subTest(cycles=cycles), restores():
                load = lifecycle.as_mxfp8_raw_loader(Model.write_past_the_loaders)
                load(model, tensors(1).items())
                self.assert_holds(model, 1)


if __name__ == "__main__":
    unittest.main()
