#!/usr/bin/env python3
"""Our MXFP8 quantizer and layouts against FlashInfer's own, where those can run.

On any CUDA device with nvcc and flashinfer_python 0.6.7.post3 (which builds its module at
the first call): FlashInfer's host quantizer, its shuffles, and the one approximate
instruction that its device quantizer uses. sglang need not be installed. FlashInfer's
device quantizer and its GEMMs need SM100, and are not run.

    ./benchmark/kernels/quantization/check_mxfp8_oracles.py --output FILE
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import mxfp8_timing as timing
import torch
import triton
import triton.language as tl

from sglang.srt.layers.quantization.mxfp8.layout import shuffle_rows, swizzle_scale
from sglang.srt.layers.quantization.mxfp8.numerics import quantize

GROUP = 32
LAYOUT_SHAPES = ((128, 128), (256, 512), (4096, 4096), (28672, 4096), (128, 16384))
EDGES = {
    "inf": [float("inf")],
    "-inf and 1": [float("-inf"), 1.0],
    "NaN first, then 1": [float("nan"), 1.0],
    "1, then NaN": [1.0, float("nan")],
    "NaN only": [float("nan")] * GROUP,
    "amax 448 * 2^-126 (smallest normal quotient)": [448.0 * 2.0**-126],
    "amax 2^-118 (subnormal quotient)": [2.0**-118],
    "amax 2^-126 (smallest normal)": [2.0**-126],
    "amax 2^-130 (subnormal)": [2.0**-130],
    "zeros": [0.0],
}


def verdict(what: str, is_equal: bool) -> str:
    return f"- {what}: {'equal' if is_equal else 'DIFFERENT'}"


def host_quantize(x: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashInfer's quantizer of a CPU tensor, fp32 [M, K]: bytes [M, K] and 1-D scale."""
    import flashinfer

    values, scale = flashinfer.mxfp8_quantize(
        x.contiguous(),
        sf_swizzle_layout=flashinfer.SfLayout[f"layout_{layout}"],
        enable_pdl=False,
    )
    return values.view(torch.uint8), scale


def finite_normals(dtype: torch.dtype) -> torch.Tensor:
    """Every positive finite normal value of a 2-byte dtype, as fp32."""
    values = torch.arange(0x7FFF, dtype=torch.int32).to(torch.int16).view(dtype)
    normal = values.isfinite() & (values.float() >= torch.finfo(dtype).tiny)
    return values[normal].float()


def groups_by_amax(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[.., 32]: every normal value as a group's amax, with random neighbours below it."""
    amax = finite_normals(dtype)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(len(amax), GROUP, generator=generator) * 2 - 1
    # From the same binade down to far below it, so that every rounding is met.
    depth = torch.randint(0, 20, x.shape, generator=generator)
    x = (x * amax[:, None] * torch.exp2(-depth.float())).to(dtype).float()
    x[:, seed % GROUP] = amax
    x[x.abs() < torch.finfo(torch.float32).tiny] = 0.0  # the device flushes subnormals
    return x


def all_values_below(amax: float, dtype: torch.dtype) -> torch.Tensor:
    """[.., 32]: groups of this amax that hold every normal value up to it, both signs."""
    values = finite_normals(dtype)
    values = values[values <= amax]
    values = torch.cat([values, -values])
    values = torch.nn.functional.pad(values, (0, -len(values) % (GROUP - 1)))
    rows = values.view(-1, GROUP - 1)
    return torch.cat([torch.full((len(rows), 1), amax), rows], 1)


def normal_quotient(x: torch.Tensor) -> torch.Tensor:
    """Rows whose amax / 448 is normal; below, host and device differ (see the edges)."""
    return x[x.abs().amax(1) / 448 >= torch.finfo(torch.float32).tiny]


def compare_values() -> Iterator[str]:
    """Values and linear scales, bit for bit; yields a line per set of groups."""
    amaxes = [f * 2.0**e for e in (-14, -3, 0, 9) for f in (1, 1.5, 1.75, 1.9921875)]
    for dtype in (torch.bfloat16, torch.float16):
        neighbours = [groups_by_amax(dtype, seed) for seed in range(8)]
        below = [all_values_below(amax, dtype) for amax in amaxes]
        for name, sets in (
            ("every normal amax, 8 sets of neighbours", neighbours),
            ("every normal value below 16 amaxes", below),
        ):
            groups = normal_quotient(torch.cat(sets))
            expected, expected_scale = host_quantize(groups, "linear")
            values, scale = quantize(groups)
            wrong = (values.view(torch.uint8) != expected).any(1)
            wrong |= scale.view(-1) != expected_scale
            what = f"{dtype}, {name}, {len(groups)} groups, {int(wrong.sum())} differ"
            yield verdict(what, not wrong.any())


def compare_128x4() -> Iterator[str]:
    for m, k in ((1, 32), (5, 288), (128, 128), (129, 4096), (300, 2880)):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        expected, expected_scale = host_quantize(x, "128x4")
        values, scale = quantize(x)
        scale = swizzle_scale(scale)
        # FlashInfer's host form leaves the padding as it was allocated.
        real = swizzle_scale(torch.ones(m, k // GROUP, dtype=torch.uint8)).bool()
        same = torch.equal(values.view(torch.uint8), expected)
        same &= len(scale) == len(expected_scale)
        same &= torch.equal(scale[real], expected_scale[real])
        yield verdict(f"[{m}, {k}], 128x4 scale", same)


def edges() -> Iterator[str]:
    """A table: what the host form and ours, which follows the device's source, give."""
    titles = "group (the rest is zero)", "host: scale, first values"
    yield timing.head(*titles, "ours: scale, first values")
    for name, head in EDGES.items():
        x = torch.zeros(1, GROUP)
        x[0, : len(head)] = torch.tensor(head)
        cells = []
        for values, scale in (host_quantize(x, "linear"), quantize(x)):
            first = values.view(torch.float8_e4m3fn)[0, :2].float().tolist()
            cells.append(f"{scale.view(-1)[0]}, {first}")
        yield timing.row(name, *cells)


def compare_layouts() -> Iterator[str]:
    """FlashInfer's shuffles on the device, random bytes."""
    import flashinfer

    torch.manual_seed(0)
    for n, k in LAYOUT_SHAPES:
        weight, scale = (
            torch.randint(256, (n, columns), dtype=torch.uint8, device="cuda")
            for columns in (k, k // GROUP)
        )
        pairs = {
            "shuffle_matrix_a": (
                flashinfer.shuffle_matrix_a(weight, 128),
                shuffle_rows(weight),
            ),
            "shuffle_matrix_sf_a": (
                flashinfer.shuffle_matrix_sf_a(scale, 128, num_elts_per_sf=GROUP),
                swizzle_scale(scale, shuffle=True),
            ),
            "block_scale_interleave": (
                flashinfer.block_scale_interleave(scale),
                swizzle_scale(scale),
            ),
        }
        for name, (theirs, ours) in pairs.items():
            same = torch.equal(theirs.view(torch.uint8).view(-1), ours.view(-1))
            yield verdict(f"{name}, [{n}, {k}]", same)


@triton.jit
def _reciprocal_kernel(x, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size)
    result = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;",
        "=f,f",
        [value],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )
    tl.store(out + at, result, mask=at < size)


def approximate_reciprocal(x: torch.Tensor) -> torch.Tensor:
    """rcp.approx.ftz.f32 of each fp32 value, on the device."""
    out = torch.empty_like(x)
    _reciprocal_kernel[(triton.cdiv(x.numel(), 256),)](x, out, x.numel(), BLOCK=256)
    return out


def compare_reciprocals() -> Iterator[str]:
    theirs = approximate_reciprocal(torch.tensor([448.0], device="cuda")).cpu()
    ours = torch.tensor([1.0 / 448.0], dtype=torch.float32)
    yield verdict("rcp.approx.ftz(448) and 1/448 rounded", torch.equal(theirs, ours))
    # 448 * 2^n decides between two scales: its product must be the power of two itself.
    powers = torch.exp2(torch.arange(-117, 119, dtype=torch.float32))
    same = torch.equal(448.0 * powers * ours, powers)
    yield verdict("448 * 2^n times it and 2^n for n in -117..118", same)
    powers = torch.exp2(torch.arange(-126, 128, dtype=torch.float32)).cuda()
    exact = torch.exp2(-torch.arange(-126, 128, dtype=torch.float64)).float()
    exact[exact < torch.finfo(torch.float32).tiny] = 0.0
    same = torch.equal(approximate_reciprocal(powers).cpu(), exact)
    yield verdict("rcp.approx.ftz of 2^-126..2^127 and the exact one, flushed", same)


def report(differences: list[str]) -> Iterator[str]:
    """The lines of the result; `differences` gets those that are different."""
    yield f"# MXFP8 quantization and layouts against FlashInfer's own\n\n{timing.environment()}\n"
    yield "- Run: FlashInfer's host quantizer, its shuffles, and one instruction."
    yield "- Not run: FlashInfer's device quantizer and its GEMMs, which need SM100."
    for title, lines in (
        ("Host quantizer, values and scales, bit for bit", compare_values()),
        ("Host quantizer, 128x4 scales", compare_128x4()),
        ("Edges: host and device code differ, and ours follows the device's", edges()),
        ("Shuffles on the device", compare_layouts()),
        ("The approximate reciprocal", compare_reciprocals()),
    ):
        yield f"\n## {title}\n"
        for line in lines:
            differences += [line] if "DIFFERENT" in line else []
            yield line


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--output", type=Path, help="also write what is printed here")
    args = parser.parse_args()
    if not timing.HAS_GPU:
        parser.error("this check needs a CUDA GPU, and FlashInfer")
    differences: list[str] = []
    timing.report(report(differences), args.output)
    if differences:
        sys.exit(f"{len(differences)} comparisons failed")


if __name__ == "__main__":
    main()
