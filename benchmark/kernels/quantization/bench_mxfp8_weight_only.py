#!/usr/bin/env python3
"""Speed of the weight-only MXFP8 product against bf16, and against reading the weight.

Both run as CUDA graphs over operands in turn, out of the L2 cache, on random data, taking
turns; medians of 20. Errors are against float64. Needs a CUDA GPU and Triton.

    ./benchmark/kernels/quantization/bench_mxfp8_weight_only.py > FILE
    ./benchmark/kernels/quantization/bench_mxfp8_weight_only.py --humming --m 1 16 64

The second measures humming-kernels beside them, which compiles for each shape and M.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import tune_mxfp8_layout as timing  # starts this again in .venv

# isort: split
import torch

from sglang.srt.layers.quantization.mxfp8.numerics import dequantize
from sglang.srt.layers.quantization.mxfp8.weight_only import (
    max_m_fused,
    weight_only_linear,
)

REPEATS = 20
EVERY_M = [2**power for power in range(13)]
SHAPES = {  # of a rank, as sglang fuses the linears
    "Qwen3-8B gate_up": (24576, 4096),
    "Qwen3-8B down": (4096, 12288),
    "Qwen3-8B qkv": (6144, 4096),
    "Qwen3-8B o": (4096, 4096),
    "Llama-70B gate_up": (57344, 8192),
    "Llama-70B down": (8192, 28672),
    "Llama-70B qkv": (10240, 8192),
    "Llama-70B o": (8192, 8192),
    "Qwen3-8B gate_up, TP 8": (3072, 4096),
    "Qwen3-8B down, TP 8": (4096, 1536),
    "Qwen3-8B qkv, TP 8": (768, 4096),
    "Qwen3-8B o, TP 8": (4096, 512),
    "Llama-70B gate_up, TP 8": (7168, 8192),
    "Llama-70B down, TP 8": (8192, 3584),
    "Llama-70B qkv, TP 8": (1280, 8192),
    "Llama-70B o, TP 8": (8192, 1024),
}


def operands(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.randint(113, 121, (n, k // 32), dtype=torch.uint8, device="cuda")
    return weight, scale


def bf16(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The decoded weight, a few rows at a time."""
    parts = zip(weight.split(4096), scale.split(4096))
    return torch.cat([dequantize(*part).bfloat16() for part in parts])


def humming(weight: torch.Tensor, scale: torch.Tensor) -> Callable:
    from humming.layer import HummingLayer

    config = {"quant_method": "modelopt", "quant_algo": "MXFP8"}
    n, k = weight.shape
    layer = HummingLayer(n, k, config, torch_dtype=torch.bfloat16).cuda()
    layer.load_from_tensors({"weight": weight, "weight_scale": scale})
    layer.transform()
    return layer


def medians(works: dict[str, list[Callable]]) -> dict[str, float]:
    """Microseconds of a call."""
    taken = timing.measure(works, REPEATS)
    return {name: statistics.median(us) for name, us in taken.items()}


def read_speed() -> float:
    """Bytes a microsecond of a sum over 1 GiB."""
    source = torch.ones(1 << 28, device="cuda")
    return source.nbytes / medians({"read": [source.sum]})["read"]


def relative_error(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> float:
    output = weight_only_linear(x, weight, scale, max_m_fused(*weight.shape))
    rows = slice(max(0, len(weight) - 8192), None)
    exact = x.double() @ dequantize(weight[rows], scale[rows]).double().t()
    return float((output[:, rows].double() - exact).norm() / exact.norm())


class Linear:
    """One shape: as many copies as keep the L2 cache cold, in each form."""

    def __init__(self, n: int, k: int, with_humming: bool) -> None:
        self.n, self.k = n, k
        cache = torch.cuda.get_device_properties("cuda").L2_cache_size
        count = 1 + max(1, -(-2 * cache // (n * k)))
        self.weights = [operands(n, k) for _ in range(count)]
        self.in_bf16 = [bf16(*each) for each in self.weights]
        self.peers = [humming(*each) for each in self.weights] if with_humming else []

    def microseconds(self, m: int) -> dict[str, float]:
        inputs = [
            torch.randn(m, self.k, dtype=torch.bfloat16, device="cuda")
            for _ in self.weights
        ]
        error = relative_error(inputs[0], *self.weights[0])
        if not error < 3e-3:
            raise AssertionError(f"[{self.n}, {self.k}], M = {m}: error {error}")
        ours = partial(weight_only_linear, max_m_fused=max_m_fused(self.n, self.k))
        linear = torch.nn.functional.linear
        works = {
            "ours": [partial(ours, x, *w) for x, w in zip(inputs, self.weights)],
            "bf16": [partial(linear, x, w) for x, w in zip(inputs, self.in_bf16)],
        }
        if self.peers:
            works["humming"] = [partial(p, x) for x, p in zip(inputs, self.peers)]
        return medians(works)


def table(title: str, taken: dict, cell: Callable) -> None:
    every_m = list(next(iter(taken.values())))
    print(f"\n## {title}\n")
    print(timing.head("linear", "MiB", *(f"M = {m}" for m in every_m)))
    for name, of_m in taken.items():
        n, k = SHAPES[name]
        cells = [cell(n * k, us) for us in of_m.values()]
        print(timing.row(f"{name} [{n}, {k}]", f"{n * k / 2**20:.1f}", *cells))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--humming", action="store_true")
    parser.add_argument("--m", type=int, nargs="+", default=EVERY_M)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), metavar="LINEAR")
    args = parser.parse_args()
    if not timing.HAS_GPU:
        parser.error("this benchmark needs a CUDA GPU")
    speed = read_speed()
    print(f"# Weight-only MXFP8 product\n\n{timing.environment()}\n")
    print(f"A plain read moves {speed / 1e6:.2f} TB/s.", flush=True)
    taken = {}
    for name in args.shape:
        linear = Linear(*SHAPES[name], args.humming)
        taken[name] = {m: linear.microseconds(m) for m in args.m}
        del linear
        torch.cuda.empty_cache()
    ratio = lambda codes, us: f"{us['bf16'] / us['ours']:.2f}"
    table("Times the speed of cuBLAS bf16", taken, ratio)
    table("Microseconds", taken, lambda codes, us: f"{us['ours']:.1f}")
    floor = lambda codes, us: f"{codes * 33 / 32 / speed / us['ours']:.0%}"
    table("Of the speed of a plain read of weight and scale", taken, floor)
    if args.humming:
        ratio = lambda codes, us: f"{us['humming'] / us['ours']:.2f}"
        table("Times the speed of humming", taken, ratio)


if __name__ == "__main__":
    main()
