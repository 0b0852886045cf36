#!/usr/bin/env python3
"""Speed of MXFP8 weight preparation: checkpoint form to trtllm kernel form, and back.

Weight and scale together, random bytes, beside a plain copy out of place and FlashInfer's
shuffle_matrix_a + shuffle_matrix_sf_a (where they run). Median of 100 replays of a CUDA
graph over buffers in turn, out of the L2 cache; TB/s counts the bytes twice, read and
written; percentages are of the slower direction. FlashInfer: median of 3 calls. A whole
model: host clock with the launches, median of 5. The bytes are compared before.

Needs a CUDA GPU, torch and Triton; sglang need not be installed.

    ./benchmark/kernels/quantization/bench_mxfp8_weight_prep.py | tee weight_prep.md
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import mxfp8_timing as timing
import torch

from sglang.srt.layers.quantization.mxfp8 import layout

MIB = 1 << 20
# The linears of one of its 36 layers.
QWEN3_8B = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)]


class Linear:
    """Random bytes of a linear: weight [N, K], and the room of its scale, 1-D."""

    def __init__(self, n: int, k: int) -> None:
        groups = k // timing.GROUP_SIZE
        room = layout.swizzled_scale_numel(n, groups)
        kind = dict(dtype=torch.uint8, device=timing.DEVICE)
        self.weight = torch.randint(256, (n, k), **kind)
        self.room = torch.randint(256, (room,), **kind)
        self.scale = self.room[: n * groups].view(n, groups)
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


def check(linear: Linear) -> int:
    """There and back, compared with the functions that make new tensors, which the tests
    compare with the formulas; returns the temporary bytes."""
    weight, scale = linear.weight.clone(), linear.scale.clone()
    temporary = temporary_bytes(linear.to_kernel_form)
    is_right = torch.equal(linear.weight, layout.shuffle_rows(weight))
    is_right &= torch.equal(linear.room, layout.swizzle_scale(scale, shuffle=True))
    temporary = max(temporary, temporary_bytes(linear.to_checkpoint_form))
    is_right &= torch.equal(linear.weight, weight) and torch.equal(linear.scale, scale)
    if not is_right:
        raise AssertionError(f"weight {list(weight.shape)}: other bytes")
    return temporary


def temporary_bytes(run: Callable[[], object]) -> int:
    """Device memory that `run` takes at its peak, beyond what was allocated before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


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
        theirs = weight(), scale().view(-1)
    except Exception:  # ninja, nvcc and the loader each have their own
        return None
    linear.to_kernel_form()
    ours = linear.weight, linear.room
    if not all(torch.equal(*pair) for pair in zip(theirs, ours)):
        raise AssertionError("FlashInfer's helpers give other bytes")
    return statistics.median(wall_ms(lambda: (weight(), scale())) for _ in range(3))


def linear_row(name: str, n: int, k: int) -> str:
    temporary, count = check(Linear(n, k)), timing.rotation(n * k)
    linears, copies = ([Linear(n, k) for _ in range(count)] for _ in range(2))
    runs = zip(("copy", "there", "back"), steps(copies, linears))
    us = timing.medians({name: timing.Work(run, count) for name, run in runs}, 100)
    moved, theirs = 2 * linears[0].nbytes, flashinfer_ms(Linear(n, k))
    slower = max(us["there"], us["back"])
    cells = [name, f"{n} x {k}", f"{n * k / MIB:.1f}"]
    cells += [f"{each:.1f} ({moved / each / 1e6:.2f})" for each in us.values()]
    cells += [f"{us['copy'] / slower:.0%}", f"{temporary / MIB:.2f}"]
    if theirs is None:
        return timing.row(*cells, "-", "-")
    return timing.row(*cells, f"{theirs:.1f}", f"{theirs * 1e3 / slower:.0f}")


def model_row() -> str:
    """Restore and re-apply a whole model; host clock, launches included."""
    shapes = QWEN3_8B * 36
    linears, copies = ([Linear(n, k) for n, k in shapes] for _ in range(2))
    times = ([wall_ms(run) for run in steps(copies, linears)] for _ in range(5))
    copied, there, back = map(statistics.median, zip(*times))
    if not all(torch.equal(a.weight, b.weight) for a, b in zip(copies, linears)):
        raise AssertionError("the weights are not restored")
    gib = sum(linear.nbytes for linear in linears) / (1 << 30)
    times = [f"{each:.2f}" for each in (copied, there, back)]
    share = f"{copied / max(there, back):.0%}"
    return timing.row("Qwen3-8B, TP 1", len(linears), f"{gib:.2f}", *times, share)


def report() -> Iterator[str]:
    yield f"# MXFP8 weight preparation\n\n{timing.environment()}\n"
    yield timing.method(__doc__)
    sizes = "linear", "N x K", "weight MiB", "copy us (TB/s)"
    titles = "to kernel form us (TB/s)", "back us (TB/s)", "of the copy's speed"
    titles += "temporary MiB", "FlashInfer ms", "times faster"
    yield f"\n{timing.head(*sizes, *titles)}"
    for shape, name in timing.SHAPES.items():
        yield linear_row(name, *shape)
        torch.cuda.empty_cache()
    titles = "model", "linears", "GiB", "copy ms", "to kernel form ms", "back ms"
    yield f"\n{timing.head(*titles, 'of the copy')}"
    yield model_row()


def main() -> None:
    parser = timing.parser(__doc__)
    parser.parse_args()
    if not timing.HAS_GPU:
        parser.error("this benchmark needs a CUDA GPU")
    for line in report():
        print(line, flush=True)


if __name__ == "__main__":
    main()
