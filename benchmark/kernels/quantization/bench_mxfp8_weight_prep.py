"""Speed of MXFP8 weight preparation: checkpoint form to trtllm kernel form, and back.

Compares the in-place functions of `mxfp8_layout` with a plain copy of the same bytes and
with FlashInfer's `shuffle_matrix_a` + `shuffle_matrix_sf_a`, over the linears of two
models as sglang fuses them, and over whole models. Needs a CUDA device and Triton;
sglang need not be installed (this checkout's files are used then), nor FlashInfer.

    python benchmark/kernels/quantization/bench_mxfp8_weight_prep.py --output FILE
    python benchmark/kernels/quantization/bench_mxfp8_weight_prep.py --check
"""

import argparse
import datetime
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
import triton

# Without an installed sglang, the folders of this checkout are its (namespace) package.
sys.path.append(str(Path(__file__).resolve().parents[3] / "python"))

from sglang.srt.layers.quantization.mxfp8_layout import (
    GROUP_SIZE,
    MAX_TEMPORARY_BYTES,
    shuffle_rows_,
    swizzle_scale_,
    swizzled_scale_numel,
    unshuffle_rows_,
    unswizzle_scale_,
)

try:
    import flashinfer
except (ImportError, OSError, RuntimeError) as error:
    flashinfer, flashinfer_version = None, f"not installed ({error})"
else:
    flashinfer_version = flashinfer.__version__

MIB = 1 << 20
ROTATED_BYTES = 512 * MIB  # timed buffers, in turn: many times any GPU's L2 cache
REPLAYS = 100
FLASHINFER_REPEATS = 3  # its helpers loop over the rows on the host: 0.1 s and more
MODEL_REPEATS = 5
GUARD = 4096  # bytes before and after a checked tensor that must not change
POISON = 0xA5
BIG_WEIGHT = 64 * MIB  # from here on the targets hold, as fractions of a copy's speed
TARGET_OF_COPY, TARGET_OVER_FLASHINFER = 0.80, 100


class Model(NamedTuple):
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    def linears(self, tp: int) -> Dict[str, Tuple[int, int]]:
        """(N, K) of one rank's fused linears."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "qkv_proj": (qkv // tp, self.hidden),
            "o_proj": (self.hidden, self.heads * self.head_dim // tp),
            "gate_up_proj": (2 * self.intermediate // tp, self.hidden),
            "down_proj": (self.hidden, self.intermediate // tp),
        }


MODELS = {
    "Qwen3-8B": Model(36, 4096, 32, 8, 128, 12288),
    "Llama-3-70B": Model(80, 8192, 64, 8, 128, 28672),
}


class Linear:
    """Random bytes of one linear: weight [N, K], and the room of its scale, 1-D."""

    def __init__(self, n: int, k: int) -> None:
        self.n, self.groups = n, k // GROUP_SIZE
        self.weight = random_bytes(n, k)
        self.room = random_bytes(swizzled_scale_numel(n, self.groups))

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.room.nbytes

    @property
    def scale(self) -> torch.Tensor:
        return self.room[: self.n * self.groups].view(self.n, self.groups)

    def to_kernel_form(self) -> None:
        swizzle_scale_(self.room, self.n, self.groups, True)
        shuffle_rows_(self.weight)

    def to_checkpoint_form(self) -> None:
        unswizzle_scale_(self.room, self.n, self.groups, True)
        unshuffle_rows_(self.weight)

    def copy_from(self, other: "Linear") -> None:
        self.weight.copy_(other.weight)
        self.room.copy_(other.room)


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")


# What the functions must give, by the formulas for one row and for one byte.


def reference_weight(weight: torch.Tensor) -> torch.Tensor:
    blocks = weight.view(-1, 32, weight.shape[1])
    out = torch.full_like(blocks, POISON)
    for row in range(32):
        out[:, row % 4 * 8 + row // 4] = blocks[:, row]
    return out.view_as(weight)


def reference_scale(scale: torch.Tensor, shuffle: bool) -> torch.Tensor:
    if shuffle:
        scale = reference_weight(scale)
    rows, groups = scale.shape
    row = torch.arange(rows, device=scale.device)[:, None]
    group = torch.arange(groups, device=scale.device)[None, :]
    tile = row // 128 * -(-groups // 4) + group // 4
    offset = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
    out = scale.new_zeros(swizzled_scale_numel(rows, groups))
    out[offset] = scale
    return out


def same_rows(weight: torch.Tensor, original: torch.Tensor, shuffled: bool) -> bool:
    """Whether `weight` is `original` (shuffled), with little memory of its own."""
    step = max(1, 256 * MIB // (32 * weight.shape[1])) * 32
    return all(
        torch.equal(part, reference_weight(source) if shuffled else source)
        for part, source in zip(weight.split(step), original.split(step))
    )


class Guarded:
    """Bytes inside a larger buffer, `shift` bytes off its alignment."""

    def __init__(self, numel: int, shift: int = 0) -> None:
        self.buffer = random_bytes(numel + 2 * GUARD)
        self.bytes = self.buffer[GUARD + shift : GUARD + shift + numel]
        self.edges = [
            (self.buffer[: GUARD + shift], self.buffer[: GUARD + shift].clone()),
            (
                self.buffer[GUARD + shift + numel :],
                self.buffer[GUARD + shift + numel :].clone(),
            ),
        ]

    def is_intact(self) -> bool:
        return all(torch.equal(edge, before) for edge, before in self.edges)


def require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def check_weight(n: int, k: int, shift: int = 0) -> int:
    """Shuffle and restore one weight in place; returns the temporary bytes."""
    guarded = Guarded(n * k, shift)
    weight = guarded.bytes.view(n, k)
    original = weight.clone()
    where = f"weight [{n}, {k}], {shift} bytes off"
    temporary = temporary_bytes(lambda: shuffle_rows_(weight))
    require(same_rows(weight, original, shuffled=True), f"{where}: wrong shuffle")
    temporary = max(temporary, temporary_bytes(lambda: unshuffle_rows_(weight)))
    require(same_rows(weight, original, shuffled=False), f"{where}: not restored")
    require(guarded.is_intact(), f"{where}: wrote outside")
    return temporary


def check_scale(n: int, groups: int, shuffle: bool) -> int:
    """Swizzle and restore one scale in place; returns the temporary bytes."""
    guarded = Guarded(swizzled_scale_numel(n, groups))
    room = guarded.bytes
    room[n * groups :] = POISON
    original = room[: n * groups].view(n, groups).clone()
    where = f"scale [{n}, {groups}], shuffle={shuffle}"
    temporary = temporary_bytes(lambda: swizzle_scale_(room, n, groups, shuffle))
    require(
        torch.equal(room, reference_scale(original, shuffle)), f"{where}: wrong swizzle"
    )
    temporary = max(
        temporary,
        temporary_bytes(lambda: unswizzle_scale_(room, n, groups, shuffle)),
    )
    restored = room[: n * groups].view(n, groups)
    require(torch.equal(restored, original), f"{where}: not restored")
    require(guarded.is_intact(), f"{where}: wrote outside")
    return temporary


def check_flashinfer(linear: Linear) -> None:
    """FlashInfer's helpers give what the formulas give. `linear` is in checkpoint form."""
    weight, scale = run_flashinfer(linear)
    require(same_rows(weight, linear.weight, shuffled=True), "FlashInfer's weight")
    expected = reference_scale(linear.scale, shuffle=True)
    require(torch.equal(scale.view(-1), expected), "FlashInfer's scale")


def probe_flashinfer() -> None:
    """Build FlashInfer's kernel; where that fails, go on without it, and say so."""
    global flashinfer, flashinfer_version
    try:
        check_flashinfer(Linear(128, 128))
        torch.cuda.synchronize()
    except AssertionError:
        raise
    except Exception as error:  # ninja, nvcc and the loader each have their own
        print(f"FlashInfer's helpers do not run: {error}", file=sys.stderr)
        reason = str(error).strip().split("\n")[0][:200]
        flashinfer_version += f", its helpers do not run here ({reason})"
        flashinfer = None


def run_flashinfer(linear: Linear) -> Tuple[torch.Tensor, torch.Tensor]:
    return (
        flashinfer.shuffle_matrix_a(linear.weight, 128),
        flashinfer.shuffle_matrix_sf_a(linear.scale, 128),
    )


def check() -> None:
    """Kernel against formula over many shapes; raises AssertionError at a difference."""
    shapes = [
        (32 * blocks, k)
        for blocks in (1, 2, 3, 5, 7, 33)
        for k in (32, 96, 160, 512, 576, 4096, 4128)
    ]
    for n, k in shapes:
        require(check_weight(n, k) == 0, f"[{n}, {k}] took temporary memory")
        for shuffle in (False, True):
            check_scale(n, k // GROUP_SIZE, shuffle)
    for n, k, shift in ((96, 33, 0), (96, 1, 0), (96, 160, 1), (96, 576, 8)):
        check_weight(n, k, shift)  # what the kernel does not take
    for n, groups in ((1, 1), (40, 3), (127, 5), (200, 128)):
        check_scale(n, groups, shuffle=False)
    print(f"{len(shapes)} shapes: as the formulas, in place, both ways, guards intact")
    # More than 2^31 bytes, and more than 2^31 of the kernel's 8-byte words.
    for n, k in ((32 * 16385, 4128), (32 * 32769, 16416)):
        needed = n * k * 21 // 10 + 2048 * MIB
        if torch.cuda.mem_get_info()[0] < needed:
            print(f"[{n}, {k}]: not checked, needs {needed / MIB:.0f} MiB")
            continue
        require(check_weight(n, k) == 0, f"[{n}, {k}] took temporary memory")
        torch.cuda.empty_cache()
        temporary = check_scale(n, k // GROUP_SIZE, shuffle=True)
        # The allocator may round a request up by 1 MiB.
        require(temporary <= MAX_TEMPORARY_BYTES + MIB, "too much temporary memory")
        torch.cuda.empty_cache()
        print(
            f"[{n}, {k}] ({n * k} bytes): right; temporary memory 0 for the weight, "
            f"{temporary / MIB:.1f} MiB for the scale"
        )


def temporary_bytes(run: Callable[[], object]) -> int:
    """Device memory that `run` takes at its peak, beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def replay_seconds(run: Callable[[], None]) -> float:
    """Median device time of `run`, replayed as a CUDA graph; runs it REPLAYS + 4 times."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        graph.replay()
    return event_seconds(graph.replay, REPLAYS)


def event_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time between CUDA events around `run`."""
    events = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def wall_seconds(run: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Result(NamedTuple):
    """Seconds per linear, and the bytes that a copy of it reads (and writes)."""

    n: int
    k: int
    nbytes: int
    copy: float
    shuffle_copy: float  # copy of the weight alone
    shuffle: float  # the weight alone
    apply: float
    restore: float
    temporary: int
    flashinfer: Optional[float]
    flashinfer_temporary: Optional[int]

    @property
    def of_copy(self) -> float:
        return self.copy / max(self.apply, self.restore)

    @property
    def over_flashinfer(self) -> float:
        return self.flashinfer / self.apply


def measure(n: int, k: int) -> Result:
    """Check one linear, time it over rotated buffers, and check what the timing left."""
    check_weight(n, k)
    check_scale(n, k // GROUP_SIZE, shuffle=True)
    count = max(2, -(-ROTATED_BYTES // (n * k)))
    linears = [Linear(n, k) for _ in range(count)]
    copies = [Linear(n, k) for _ in range(count)]
    pairs = list(zip(copies, linears))
    require(linears[0].scale.numel() == linears[0].room.numel(), "a padded scale")

    def copy_weights():
        for copy, linear in pairs:
            copy.weight.copy_(linear.weight)

    def copy_all():
        for copy, linear in pairs:
            copy.copy_from(linear)

    def shuffle():
        for linear in linears:
            shuffle_rows_(linear.weight)

    def unshuffle():
        for linear in linears:
            unshuffle_rows_(linear.weight)

    def apply():
        for linear in linears:
            linear.to_kernel_form()

    def restore():
        for linear in linears:
            linear.to_checkpoint_form()

    runs = (copy_all, copy_weights, shuffle, unshuffle, apply, restore)
    seconds = {run.__name__: replay_seconds(run) / count for run in runs}
    # As often forth as back, so every byte is where it was when it was copied.
    for copy, linear in pairs:
        require(torch.equal(copy.weight, linear.weight), "timed runs lost the weight")
        require(torch.equal(copy.room, linear.room), "timed runs lost the scale")

    linear, theirs, their_temporary = linears[0], None, None
    if flashinfer is not None:
        check_flashinfer(linear)
        theirs = event_seconds(lambda: run_flashinfer(linear), FLASHINFER_REPEATS)
        their_temporary = temporary_bytes(lambda: run_flashinfer(linear))
    temporary = max(
        temporary_bytes(linear.to_kernel_form),
        temporary_bytes(linear.to_checkpoint_form),
    )
    return Result(
        n,
        k,
        linear.nbytes,
        seconds["copy_all"],
        seconds["copy_weights"],
        max(seconds["shuffle"], seconds["unshuffle"]),
        seconds["apply"],
        seconds["restore"],
        temporary,
        theirs,
        their_temporary,
    )


LINEAR_HEAD = """\
| linear | N x K | weight MiB | copy us (TB/s) | to kernel form us (TB/s) | back us (TB/s) | of the copy's speed | row shuffle alone | temporary MiB | FlashInfer ms | times faster | FlashInfer result + temporary MiB |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def linear_row(name: str, result: Result) -> str:
    def rate(seconds: float) -> str:
        return f"{seconds * 1e6:.1f} ({2 * result.nbytes / seconds / 1e12:.2f})"

    cells = [
        name,
        f"{result.n} x {result.k}",
        f"{result.n * result.k / MIB:.1f}",
        rate(result.copy),
        rate(result.apply),
        rate(result.restore),
        f"{result.of_copy:.0%}",
        f"{result.shuffle_copy / result.shuffle:.0%}",
        f"{result.temporary / MIB:.2f}",
    ]
    if result.flashinfer is None:
        cells += ["-", "-", "-"]
    else:
        cells += [
            f"{result.flashinfer * 1e3:.1f}",
            f"{result.over_flashinfer:.0f}",
            f"{result.flashinfer_temporary / MIB:.1f}",
        ]
    return "| " + " | ".join(cells) + " |"


MODEL_HEAD = """\
| model | linears | GiB | copy ms | to kernel form ms | back ms | of the copy's speed | temporary MiB | FlashInfer s (computed) |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def model_row(name: str, model: Model, tp: int, flashinfer: Optional[float]) -> str:
    """Restore and re-apply a whole model; host clock, launches included."""
    shapes = list(model.linears(tp).values()) * model.layers
    linears = [Linear(n, k) for n, k in shapes]
    copies = [Linear(n, k) for n, k in shapes]

    def copy():
        for target, linear in zip(copies, linears):
            target.copy_from(linear)

    def apply():
        for linear in linears:
            linear.to_kernel_form()

    def restore():
        for linear in linears:
            linear.to_checkpoint_form()

    temporary = temporary_bytes(lambda: (copy(), apply(), restore()))
    times = []
    for repeat in range(MODEL_REPEATS):
        forth = wall_seconds(apply)
        if repeat == 0:
            for target, linear in zip(copies, linears):
                right = same_rows(linear.weight, target.weight, shuffled=True)
                expected = reference_scale(target.scale, shuffle=True)
                require(right and torch.equal(linear.room, expected), f"{name}: wrong")
        back = wall_seconds(restore)
        for target, linear in zip(copies, linears):
            right = torch.equal(linear.weight, target.weight)
            require(
                right and torch.equal(linear.room, target.room), f"{name}: not restored"
            )
        times.append((wall_seconds(copy), forth, back))
    copied, forth, back = (statistics.median(column) for column in zip(*times))
    cells = [
        f"{name}, TP {tp} (one rank)",
        f"{len(linears)}",
        f"{sum(linear.nbytes for linear in linears) / (1 << 30):.2f}",
        f"{copied * 1e3:.2f}",
        f"{forth * 1e3:.2f}",
        f"{back * 1e3:.2f}",
        f"{copied / max(forth, back):.0%}",
        f"{temporary / MIB:.2f}",
        "-" if flashinfer is None else f"{flashinfer * model.layers:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def report() -> Iterator[str]:
    """The lines of the result file, as they are measured."""
    properties = torch.cuda.get_device_properties(0)
    yield "# MXFP8 weight preparation\n"
    yield f"Command: `python {Path(__file__).name} --output FILE`, {datetime.date.today()}\n"
    yield f"- GPU: {properties.name}, driver {driver_version()}"
    yield f"- torch {torch.__version__}, Triton {triton.__version__}"
    yield f"- FlashInfer: {flashinfer_version}\n"
    yield (
        "Weight and scale together, random bytes, both forms compared with the formulas "
        "(and with FlashInfer's output) before timing, and with a copy after it. Times "
        f"are the median of {REPLAYS} replays of a CUDA graph over buffers of at least "
        f"{ROTATED_BYTES // MIB} MiB in turn (L2: {properties.L2_cache_size // MIB} MiB), "
        "per linear; TB/s counts the bytes of weight and scale twice, read and written. "
        "The copy is out of place. Percentages are of the slower direction. "
        f"FlashInfer: median of {FLASHINFER_REPEATS} calls, CUDA events.\n"
    )
    results: List[Result] = []
    flashinfer_seconds: Dict[Tuple[str, int], Optional[float]] = {}
    for name, model in MODELS.items():
        for tp in (1, 8):
            yield f"## {name}, TP {tp}\n"
            yield LINEAR_HEAD
            theirs = []
            for linear, (n, k) in model.linears(tp).items():
                result = measure(n, k)
                torch.cuda.empty_cache()
                results.append(result)
                theirs.append(result.flashinfer)
                yield linear_row(linear, result)
            yield ""
            flashinfer_seconds[name, tp] = None if None in theirs else sum(theirs)
    yield "## Whole models\n"
    yield (
        "Host clock with the launches, a synchronized device before and after, median of "
        f"{MODEL_REPEATS}. FlashInfer's column is the sum of the calls above.\n"
    )
    yield MODEL_HEAD
    for name, tp in (("Qwen3-8B", 1), ("Llama-3-70B", 8)):
        yield model_row(name, MODELS[name], tp, flashinfer_seconds[name, tp])
        torch.cuda.empty_cache()
    yield "\n## Targets (for an H200)\n"
    slowest = min(r.of_copy for r in results if r.n * r.k >= BIG_WEIGHT)
    yield (
        f"- at least {TARGET_OF_COPY:.0%} of the copy's speed for weights of "
        f"{BIG_WEIGHT // MIB} MiB and more: {slowest:.0%} at least, "
        f"{'met' if slowest >= TARGET_OF_COPY else 'NOT met'}"
    )
    if flashinfer is not None:
        least = min(r.over_flashinfer for r in results)
        yield (
            f"- at least {TARGET_OVER_FLASHINFER} times as fast as FlashInfer's helpers: "
            f"{least:.0f} times at least, "
            f"{'met' if least >= TARGET_OVER_FLASHINFER else 'NOT met'}"
        )
    temporary = max(r.temporary for r in results)
    yield (
        f"- at most {MAX_TEMPORARY_BYTES // MIB} MiB of temporary memory: "
        f"{temporary / MIB:.2f} MiB at most"
    )


def driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.split("\n")[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only check many shapes")
    parser.add_argument(
        "--output", type=Path, help="also write the tables to this file"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    torch.manual_seed(0)
    if flashinfer is not None:
        probe_flashinfer()
    if args.check:
        check()
        return
    lines = []
    for line in report():
        print(line, flush=True)
        lines.append(line)
        if args.output:  # as it grows: a run that is cut off leaves what it has
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
