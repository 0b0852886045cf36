#!/usr/bin/env python3
"""Speed of MXFP8 weight preparation: checkpoint form to trtllm kernel form, and back.

Compares the in-place functions of layout with a plain copy of the same bytes and
with FlashInfer's shuffle_matrix_a + shuffle_matrix_sf_a (where they run), over the linears
of two models as sglang fuses them, and over whole models; the bytes are compared with the
formulas before. Needs a CUDA GPU and Triton.

    ./benchmark/kernels/quantization/bench_mxfp8_weight_prep.py --output FILE
    ./benchmark/kernels/quantization/bench_mxfp8_weight_prep.py --check
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import mxfp8_timing as timing
import torch

from sglang.srt.layers.quantization.mxfp8 import layout

MIB = 1 << 20
GUARD = 4096  # bytes around a weight and its scale that must not change
METHOD = (
    "Weight and scale together, random bytes. Median of 100 replays of a CUDA graph over "
    "buffers in turn, out of the L2 cache; TB/s counts the bytes twice, read and written. "
    "The copy is out of place; percentages are of the slower direction. FlashInfer: median "
    "of 3 calls. Whole models: host clock with the launches, median of 5."
)


class Linear:
    """Random bytes of a linear, guarded: weight [N, K], the room of its scale, 1-D."""

    def __init__(self, n: int, k: int) -> None:
        room = layout.swizzled_scale_numel(n, k // timing.GROUP_SIZE)
        sizes = [GUARD, n * k, GUARD, room, GUARD]
        kind = dict(dtype=torch.uint8, device=timing.DEVICE)
        parts = torch.randint(256, (sum(sizes),), **kind).split(sizes)
        self.weight, self.room, self.guards = parts[1].view(n, k), parts[3], parts[::2]
        self.scale = self.room[: n * k // timing.GROUP_SIZE].view(n, -1)
        self.nbytes = n * k + room

    def to_kernel_form(self) -> None:
        layout.swizzle_scale_(self.room, *self.scale.shape, True)
        layout.shuffle_rows_(self.weight)

    def to_checkpoint_form(self) -> None:
        layout.unswizzle_scale_(self.room, *self.scale.shape, True)
        layout.unshuffle_rows_(self.weight)

    def copy_from(self, other: "Linear") -> None:
        self.weight.copy_(other.weight)
        self.room.copy_(other.room)


def steps(copies: list[Linear], linears: list[Linear]) -> list[Callable[[], None]]:
    """A copy of the linears, both directions in place."""
    return [
        partial(timing.each, Linear.copy_from, [*zip(copies, linears)]),
        partial(timing.each, Linear.to_kernel_form, [*zip(linears)]),
        partial(timing.each, Linear.to_checkpoint_form, [*zip(linears)]),
    ]


def shuffled(matrix: torch.Tensor) -> torch.Tensor:
    """The formula for one row: where it goes within its block of 32."""
    blocks = matrix.view(-1, 32, matrix.shape[1])
    out = torch.empty_like(blocks)
    for row in range(32):
        out[:, row % 4 * 8 + row // 4] = blocks[:, row]
    return out.view_as(matrix)


def swizzled(scale: torch.Tensor) -> torch.Tensor:
    """The formula for one byte of a shuffled scale in 128x4 tiles; the padding is 0."""
    row, group = (torch.arange(size, device=scale.device) for size in scale.shape)
    row, tiles = row[:, None], -(-scale.shape[1] // 4)
    tile = row // 128 * tiles + group // 4
    out = scale.new_zeros(layout.swizzled_scale_numel(*scale.shape))
    at = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
    out[at] = shuffled(scale)
    return out


def check(linear: Linear) -> int:
    """Forth and back: the formulas' bytes, and no other; returns the temporary bytes."""
    weight, scale = linear.weight.clone(), linear.scale.clone()
    guards = [guard.clone() for guard in linear.guards]
    temporary = temporary_bytes(linear.to_kernel_form)
    slabs = max(1, 256 * MIB // (32 * weight.shape[1])) * 32  # rows, for little memory
    pairs = [*zip(linear.weight.split(slabs), map(shuffled, weight.split(slabs)))]
    pairs += [(linear.room, swizzled(scale))]
    is_right = all(torch.equal(*pair) for pair in pairs)
    temporary = max(temporary, temporary_bytes(linear.to_checkpoint_form))
    pairs = (linear.weight, weight), (linear.scale, scale), *zip(linear.guards, guards)
    is_restored = all(torch.equal(*pair) for pair in pairs)
    # The allocator may round a request up by 1 MiB.
    if not is_right or not is_restored or temporary > layout.MAX_TEMPORARY_BYTES + MIB:
        found = (
            f"right: {is_right}, restored: {is_restored}, {temporary} temporary bytes"
        )
        raise AssertionError(f"weight {list(weight.shape)}: {found}")
    return temporary


def temporary_bytes(run: Callable[[], object]) -> int:
    """Device memory that `run` takes at its peak, beyond what was allocated before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def check_shapes() -> Iterator[str]:
    for n in (32, 64, 96, 160, 224, 1056):
        for k in (32, 96, 160, 512, 576, 4096, 4128):
            check(Linear(n, k))
    yield "42 shapes: as the formulas, in place, both ways, guards intact"
    # More than 2^31 bytes, and more than 2^31 of the kernel's 8-byte words.
    for n, k in ((32 * 16385, 4128), (32 * 32769, 16416)):
        yield f"[{n}, {k}]: right; {check(Linear(n, k)) / MIB:.1f} MiB temporary memory"
        torch.cuda.empty_cache()


def wall_ms(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def flashinfer_ms(linear: Linear) -> float | None:
    """Median of FlashInfer's helpers; None where they do not run."""
    try:
        import flashinfer

        weight = partial(flashinfer.shuffle_matrix_a, linear.weight, 128)
        scale = partial(flashinfer.shuffle_matrix_sf_a, linear.scale, 128)
        is_right = torch.equal(weight(), shuffled(linear.weight))
        is_right &= torch.equal(scale().view(-1), swizzled(linear.scale))
    except Exception:  # ninja, nvcc and the loader each have their own
        return None
    if not is_right:
        raise AssertionError("FlashInfer's helpers give other bytes than the formulas")
    return statistics.median(wall_ms(lambda: (weight(), scale())) for _ in range(3))


def linear_row(name: str, n: int, k: int) -> str:
    temporary, count = check(Linear(n, k)), timing.rotation(n * k)
    linears, copies = ([Linear(n, k) for _ in range(count)] for _ in range(2))
    runs = zip(("copy", "forth", "back"), steps(copies, linears))
    us = timing.medians({name: timing.Work(run, count) for name, run in runs}, 100)
    moved, theirs = 2 * linears[0].nbytes, flashinfer_ms(Linear(n, k))
    slower = max(us["forth"], us["back"])
    return timing.row(
        *(name, f"{n} x {k}", f"{n * k / MIB:.1f}", f"{timing.floor_us(moved):.1f}"),
        *(f"{each:.1f} ({moved / each / 1e6:.2f})" for each in us.values()),
        *(f"{us['copy'] / slower:.0%}", f"{temporary / MIB:.2f}"),
        *(
            ["-", "-"]
            if theirs is None
            else [f"{theirs:.1f}", f"{theirs * 1e3 / slower:.0f}"]
        ),
    )


def model_row(name: str, tp: int) -> str:
    """Restore and re-apply a whole model; host clock, launches included."""
    shapes = [*timing.linears(name, tp).values()] * timing.MODELS[name][0]
    linears, copies = ([Linear(n, k) for n, k in shapes] for _ in range(2))
    times = ([wall_ms(run) for run in steps(copies, linears)] for _ in range(5))
    copied, forth, back = map(statistics.median, zip(*times))
    if not all(torch.equal(a.weight, b.weight) for a, b in zip(copies, linears)):
        raise AssertionError(f"{name}: the weights are not restored")
    gib = sum(linear.nbytes for linear in linears) / (1 << 30)
    times = [f"{each:.2f}" for each in (copied, forth, back)]
    share = f"{copied / max(forth, back):.0%}"
    return timing.row(f"{name}, TP {tp}", len(linears), f"{gib:.2f}", *times, share)


def report() -> Iterator[str]:
    yield f"# MXFP8 weight preparation\n\n{timing.environment()}\n\n{METHOD}"
    titles = "to kernel form us (TB/s)", "back us (TB/s)", "of the copy's speed"
    titles += "temporary MiB", "FlashInfer ms", "times faster"
    sizes = "linear", "N x K", "weight MiB", "floor us", "copy us (TB/s)"
    for name in timing.MODELS:
        for tp in (1, 8):
            yield f"\n## {name}, TP {tp}\n\n{timing.head(*sizes, *titles)}"
            for linear, shape in timing.linears(name, tp).items():
                yield linear_row(linear, *shape)
                torch.cuda.empty_cache()
    titles = "model", "linears", "GiB", "copy ms", "to kernel form ms", "back ms"
    yield f"\n## Whole models\n\n{timing.head(*titles, 'of the copy')}"
    yield model_row("Qwen3-8B", 1)
    torch.cuda.empty_cache()
    yield model_row("Llama-3-70B", 8)


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--check", action="store_true", help="only check many shapes")
    parser.add_argument("--output", type=Path, help="also write what is printed here")
    args = parser.parse_args()
    if not timing.HAS_GPU:
        parser.error("this benchmark needs a CUDA GPU")
    timing.report(check_shapes() if args.check else report(), args.output)


if __name__ == "__main__":
    main()
