"""x @ W^T for an MXFP8 weight as its checkpoint has it: Triton kernels.

Codes are decoded in registers, by integer operations where a GPU has no e4m3. A few
rows of x are sums in fp32; more are a product on tensor cores, whose K is split among
programs until the GPU is full. The last program of a tile to arrive adds up what
all have found, in the order of K, so that the same input gives the same output.
"""

import functools
from typing import Dict, NamedTuple, Tuple

import torch
import triton
import triton.language as tl

GROUP = tl.constexpr(32)  # elements along K that share a scale
MAX_PARTS = 8  # of K
STREAMS = 16  # that can run split products at a time without a launch to zero counters
COUNTERS = 4096  # tiles that can be split along K in one launch


def _unpack(shift: int, mask: int, ulp: int, carry: int, spread: int) -> str:
    """PTX that makes four codes, $2, 16-bit floats in lo and hi, too small by a power of 2.

    A code is sign-extended to 16 bits and shifted, so that its exponent and mantissa end
    in those of the float. Adding one ulp carries out of a NaN code only, and the carry,
    spread over the exponent, makes a NaN.
    """
    lines = [".reg .b32 lo, hi, t;"]
    for half, selector in (("lo", "0x9180"), ("hi", "0xb3a2")):
        lines += [
            f"prmt.b32 {half}, $2, 0, {selector};",
            f"shl.b32 {half}, {half}, {shift};",
            f"and.b32 {half}, {half}, {mask * 0x10001};",
            f"add.u32 t, {half}, {ulp * 0x10001};",
            f"and.b32 t, t, {carry * 0x10001};",
            f"mad.lo.u32 {half}, t, {spread}, {half};",
        ]
    return "\n".join(lines)


_UNPACK_BF16 = _unpack(4, 0x87F0, 0x10, 0x800, 15)  # value * 2^-120
_UNPACK_FP16 = _unpack(7, 0xBF80, 0x80, 0x4000, 1)  # value * 2^-8
_LIFT = """.reg .b32 lift, zero;
mov.b32 lift, 0x7b807b80;
mov.b32 zero, 0x80008000;
fma.rn.bf16x2 lo, lo, lift, zero;
fma.rn.bf16x2 hi, hi, lift, zero;
"""
_NATIVE = """.reg .b16 a, b, p, q;
.reg .f32 f, g;
.reg .b32 x, lo, hi, zero;
mov.b32 zero, 0x80008000;
mov.b32 {a, b}, $2;
cvt.rn.f16x2.e4m3x2 x, a;
mov.b32 {p, q}, x;
cvt.f32.f16 f, p;
cvt.f32.f16 g, q;
cvt.rn.bf16x2.f32 lo, g, f;
cvt.rn.f16x2.e4m3x2 x, b;
mov.b32 {p, q}, x;
cvt.f32.f16 f, p;
cvt.f32.f16 g, q;
cvt.rn.bf16x2.f32 hi, g, f;
"""
# The scales of four codes come as $3 to $6, each twice in 32 bits; a pair shares one.
_SCALE_BF16 = "fma.rn.bf16x2 $0, lo, $3, zero;\nfma.rn.bf16x2 $1, hi, $5, zero;"
_SCALE_FP16 = "mul.f16x2 $0, lo, $3;\nmul.f16x2 $1, hi, $5;"
VALUES_ASM = tl.constexpr(
    "{" + _UNPACK_BF16 + _LIFT + "mov.b32 $0, lo;\nmov.b32 $1, hi;}"
)
NATIVE_VALUES_ASM = tl.constexpr(
    "{.reg .b16 a, b;\nmov.b32 {a, b}, $2;\n"
    "cvt.rn.f16x2.e4m3x2 $0, a;\ncvt.rn.f16x2.e4m3x2 $1, b;}"
)
BF16_ASM = tl.constexpr("{" + _UNPACK_BF16 + _LIFT + _SCALE_BF16 + "}")
FP16_ASM = tl.constexpr("{" + _UNPACK_FP16 + _SCALE_FP16 + "}")
NATIVE_BF16_ASM = tl.constexpr("{" + _NATIVE + _SCALE_BF16 + "}")
SCALED = tl.constexpr("=r,=r,r,r,r,r,r")


@triton.jit
def _power_of_two(byte):
    """fp32 of a scale byte, 2^(byte - 127); 255 is NaN."""
    bits = tl.maximum(byte << 23, 1 << 22) + ((byte + 1) >> 8)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _values(codes, DECODE: tl.constexpr):
    """fp32 of e4m3 codes in uint8."""
    if DECODE == "plain":
        code = codes.to(tl.int32)
        exponent = (code >> 3) & 15
        mantissa = (code & 7) + tl.where(exponent > 0, 8, 0)
        value = mantissa * tl.exp2(tl.maximum(exponent, 1).to(tl.float32) - 10)
        value = tl.where(code & 127 == 127, float("nan"), value)
        return tl.where(code > 127, -value, value)
    elif DECODE == "native":
        return tl.inline_asm_elementwise(
            NATIVE_VALUES_ASM, "=r,=r,r", [codes], tl.float16, True, 4
        ).to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            VALUES_ASM, "=r,=r,r", [codes], tl.bfloat16, True, 4
        ).to(tl.float32)


@triton.jit
def _weights(codes, byte, dtype: tl.constexpr, DECODE: tl.constexpr):
    """Codes [..., K] times their scales, int32 [..., K / 32], rounded to `dtype`."""
    if DECODE == "plain":
        scale = _power_of_two(byte)
    elif dtype == tl.bfloat16:
        bits = tl.maximum(byte << 7, 1 << 6) + ((byte + 1) >> 8)
        scale = bits * 0x10001
    else:
        # 2^(byte - 119) in fp16: subnormal below byte 105, infinite from 135.
        normal = tl.minimum((byte - 104) << 10, 31 << 10)
        small = (1 << tl.maximum(byte - 95, 0)) - tl.where(byte < 95, 1, 0)
        bits = tl.where(byte < 105, small, normal) + ((byte + 1) >> 8)
        scale = bits * 0x10001
    scale = tl.expand_dims(scale, -1)
    scale = tl.broadcast_to(scale, byte.shape + [GROUP]).reshape(codes.shape)
    asm: tl.constexpr = NATIVE_BF16_ASM if DECODE == "native" else BF16_ASM
    if DECODE == "plain":
        return _values(codes, DECODE) * scale
    elif dtype == tl.float16:
        return tl.inline_asm_elementwise(
            FP16_ASM, SCALED, [codes, scale], tl.float16, True, 4
        )
    else:
        return tl.inline_asm_elementwise(
            asm, SCALED, [codes, scale], tl.bfloat16, True, 4
        )


@triton.jit
def _finish(sums, at, inside, place, counter):
    """Store a tile of sums; with several parts, the last one stores the sum of all."""
    SIZE: tl.constexpr = sums.numel
    dtype = at.dtype.element_ty
    parts = tl.num_programs(1)
    if parts == 1:
        tl.store(at, sums.to(dtype), mask=inside)
    else:
        part = tl.program_id(1)
        tl.store(place + part * SIZE, sums)
        tl.debug_barrier()
        if tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1:
            # Past the L1 cache, which may hold what another launch has left there.
            total = tl.load(place, cache_modifier=".cg")
            for other in range(1, parts):
                total += tl.load(place + other * SIZE, cache_modifier=".cg")
            tl.store(at, total.to(dtype), mask=inside)
            tl.store(counter, 0)


@triton.jit(do_not_specialize=["M"])
def _sum_kernel(
    # fmt: off
    x, w, s, out, M, N, K, stride_x, stride_w, stride_s, BN: tl.constexpr,
    BK: tl.constexpr, EVEN: tl.constexpr, DECODE: tl.constexpr,
    # fmt: on
):
    """One row of x and BN rows of W a program; the scale goes onto each group's sum."""
    program = tl.program_id(0)
    m = (program % M).to(tl.int64)
    n = program // M * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1).to(tl.int64)
    k = tl.arange(0, BK)
    g = tl.arange(0, BK // GROUP)
    x += m * stride_x
    w_at = w + row[:, None] * stride_w + k[None, :]
    s_at = s + row[:, None] * stride_s + g[None, :]
    sums = tl.zeros((BN, BK // GROUP), tl.float32)
    for start in range(0, K, BK):
        inside = k < (BK if EVEN else K - start)
        groups_inside = g * GROUP < (BK if EVEN else K - start)
        codes = tl.load(w_at + start, inside[None, :], 0, eviction_policy="evict_first")
        tokens = tl.load(x + start + k, inside, 0.0).to(tl.float32)
        byte = tl.load(s_at + start // GROUP, groups_inside[None, :], 0)
        terms = _values(codes, DECODE) * tokens[None, :]
        group_sums = tl.sum(terms.reshape(BN, BK // GROUP, GROUP), axis=2)
        sums += group_sums * _power_of_two(byte.to(tl.int32))
    total = tl.sum(sums, axis=1)
    tl.store(out + m * N + n, total.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _regroup_kernel(x, out, K, WIDTH, stride_x, BLOCK: tl.constexpr):
    """Rows of x, each 64 columns in the order that a left weight has; zeros up to WIDTH."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + row * stride_x + k, k < K, 0.0)
    values = values.reshape(BLOCK // 64, 4, 8, 2).permute(0, 2, 1, 3).reshape(BLOCK)
    tl.store(out + row * WIDTH + k, values, k < WIDTH)


@triton.jit(do_not_specialize=["M"])
def _dot_kernel(
    # fmt: off
    x, w, s, out, partial, counters, M, N, K, stride_x, stride_w, stride_s,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WEIGHT_LEFT: tl.constexpr,
    WARPS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, DECODE: tl.constexpr,
    # fmt: on
):
    """A [BM, BN] tile, or what a part of K adds to it, a program.

    With WEIGHT_LEFT, x comes from `_regroup_kernel`.
    """
    GROUPS: tl.constexpr = BK // GROUP
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(M, BM)
    m = tile % tiles_m * BM + tl.arange(0, BM)
    first_n = tile // tiles_m * BN
    n = first_n + tl.arange(0, BN)
    row = tl.minimum(n, N - 1).to(tl.int64)
    k = tl.arange(0, BK)[None, :]
    if WEIGHT_LEFT:
        chunk = tl.arange(0, BK // 64)[None, :, None]
        row = row[:, None, None]
        k_of_w = chunk * 64 + tl.arange(0, 64)[None, None, :]
        g = chunk * 2 + tl.arange(0, 2)[None, None, :]
        sums = tl.zeros((BN, BM), tl.float32)
    else:
        row = row[:, None]
        k_of_w = k
        g = tl.arange(0, GROUPS)[None, :]
        sums = tl.zeros((BM, BN), tl.float32)
    w_at = w + row * stride_w + k_of_w
    s_at = s + row * stride_s + g
    x_at = x + m[:, None].to(tl.int64) * stride_x + k
    rows_inside = m[:, None] < M

    blocks = tl.cdiv(K, BK)
    blocks_a_part = tl.cdiv(blocks, tl.num_programs(1))
    first = tl.program_id(1) * blocks_a_part
    last = tl.minimum(first + blocks_a_part, blocks)
    # Scales are too small for asynchronous copies: they are loaded one block ahead.
    ahead = tl.minimum(first, blocks - 1) * GROUPS
    byte = tl.load(s_at + ahead, g < K // GROUP - ahead, 0)
    for block in tl.range(first, last, num_stages=STAGES):
        start = block * BK
        left = BK if EVEN else K - start
        # x before codes: in the other order a product took up to a sixth longer.
        left_of_x = tl.cdiv(left, 64) * 64 if WEIGHT_LEFT else left
        tokens = tl.load(x_at + start, rows_inside & (k < left_of_x), 0.0)
        codes = tl.load(w_at + start, k_of_w < left, 0, eviction_policy="evict_first")
        scale = byte.to(tl.int32)
        ahead = tl.minimum(block + 1, last - 1) * GROUPS
        byte = tl.load(s_at + ahead, g < (GROUPS if EVEN else K // GROUP - ahead), 0)
        weights = _weights(codes, scale, x.dtype.element_ty, DECODE)
        tokens = tokens.to(weights.dtype)
        if WEIGHT_LEFT:
            # A thread has 16 codes next to each other of every eighth row. In this order
            # they are its part of the tensor cores' operand, and need not change places.
            weights = weights.reshape(
                BN // (16 * WARPS), 2, WARPS, 8, BK // 64, 4, 8, 2
            )
            weights = weights.permute(0, 2, 1, 3, 4, 6, 5, 7).reshape(BN, BK)
            sums = tl.dot(weights, tokens.T, sums, input_precision="ieee")
        else:
            sums = tl.dot(tokens, weights.T, sums, input_precision="ieee")
    if WEIGHT_LEFT:
        sums = sums.T
        r = tl.arange(0, BN)
        n = r // (16 * WARPS) * (2 * WARPS) + r // 8 % 2 * WARPS + r // 16 % WARPS
        n = first_n + n * 8 + r % 8
    at = out + m[:, None].to(tl.int64) * N + n[None, :]
    inner = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    place = partial + tile.to(tl.int64) * (tl.num_programs(1) * BM * BN) + inner
    _finish(sums, at, rows_inside & (n[None, :] < N), place, counters + tile)


@triton.jit
def _decode_kernel(
    # fmt: off
    w, s, out, N, K, stride_w, stride_s, BN: tl.constexpr, BK: tl.constexpr,
    DECODE: tl.constexpr,
    # fmt: on
):
    """The weights of a [BN, BK] tile a program."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    start = tl.program_id(0) * BK
    k = start + tl.arange(0, BK)
    g = start // GROUP + tl.arange(0, BK // GROUP)
    row = n[:, None].to(tl.int64)
    inside = (n[:, None] < N) & (k[None, :] < K)
    groups_inside = (n[:, None] < N) & (g[None, :] < K // GROUP)
    at = w + row * stride_w + k[None, :]
    codes = tl.load(at, mask=inside, other=0, eviction_policy="evict_first")
    byte = tl.load(s + row * stride_s + g[None, :], mask=groups_inside, other=0)
    weights = _weights(codes, byte.to(tl.int32), out.dtype.element_ty, DECODE)
    # To stay in the L2 cache until the product reads it.
    at = out + row * K + k[None, :]
    tl.store(at, weights, mask=inside, eviction_policy="evict_last")


class Tiling(NamedTuple):
    """Sizes of a program's tile, of one step along K, and how it is run and split."""

    bm: int
    bn: int
    bk: int
    weight_left: bool
    warps: int
    stages: int
    programs: float  # a multiprocessor, for which K is split
    least_k: int = 768  # of a part, whose sums go through memory


# What takes fewer than so many rows of x and codes, the first that fits, as measured on an
# H100 (mxfp8_weight_only_h100.md).
ANY = 2**63 - 1
TILINGS = (
    (17, 8 << 20, Tiling(16, 32, 128, False, 2, 3, 6, least_k=512)),
    (17, ANY, Tiling(16, 32, 128, False, 2, 3, 6)),
    (33, 8 << 20, Tiling(32, 32, 128, False, 2, 3, 4, least_k=512)),
    (33, 32 << 20, Tiling(32, 64, 128, False, 4, 3, 3)),
    (33, ANY, Tiling(32, 64, 128, True, 4, 3, 3)),
    (65, 16 << 20, Tiling(64, 32, 128, False, 4, 3, 3)),
    (65, ANY, Tiling(64, 64, 128, True, 4, 3, 3)),
    (ANY, 16 << 20, Tiling(64, 64, 128, True, 4, 3, 3)),
    (ANY, ANY, Tiling(128, 64, 64, True, 4, 3, 3)),
)
LARGE = 32 << 20  # codes; such weights have one more, above M = 128
LARGE_TILING = Tiling(256, 128, 64, True, 8, 4, 1)
LARGE_SHARED = 160 << 10  # bytes of shared memory for it, which not all GPUs have


def tiling_and_parts(
    m: int, n: int, k: int, multiprocessors: int, shared: int
) -> Tuple[Tiling, int]:
    """The tiling of a product, and into how many parts its K is split."""
    tiling = next(
        tiling for rows, codes, tiling in TILINGS if m < rows and n * k < codes
    )
    if m > 128 and n * k >= LARGE and shared >= LARGE_SHARED:
        tiling = LARGE_TILING
    tiles = triton.cdiv(m, tiling.bm) * triton.cdiv(n, tiling.bn)
    # A left weight takes so many registers that no more programs run at a time.
    most = tiling.programs * (1 if tiling.weight_left else 1.5)
    most = min(int(most * multiprocessors / tiles), k // tiling.least_k, MAX_PARTS)

    def fit(parts: int) -> Tuple[float, float]:
        """How evenly the multiprocessors are loaded, and how near to the best load."""
        programs = tiles * parts
        even = programs / triton.cdiv(programs, multiprocessors)
        return even, -abs(programs / multiprocessors - tiling.programs)

    return tiling, max(range(1, max(1, most) + 1), key=fit)


def _is_sum(m: int, n: int, k: int) -> bool:
    """Whether each row of x is a sum of its own, which reads the weight again: most of it
    from the L2 cache."""
    if m <= 2:
        return m == 1 or n <= 16384
    return m <= 4 and n <= 4096 and m * n * k <= 24 << 20


def fused(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[M, N] in x's dtype, bf16 or fp16; M, N >= 1, otherwise as `weight_only_linear`."""
    m, k = x.shape
    n = weight.shape[0]
    out = x.new_empty(m, n)
    weight = weight.view(torch.uint8)  # Triton has no e4m3 on SM80
    decode = _decoder(x.device)
    strides = weight.stride(0), scale.stride(0)
    if _is_sum(m, n, k):
        bk = next((size for size in (2048, 1024) if k % size == 0), 512)
        bn = 4 if bk == 2048 else 8
        warps = 2 if bk == 512 and m * n > 8192 else 4
        pointers, sizes = (x, weight, scale, out), (m, n, k, x.stride(0), *strides)
        _sum_kernel[(triton.cdiv(n, bn) * m,)](
            *pointers, *sizes, bn, bk, k % bk == 0, decode, num_warps=warps
        )
        return out
    tiling, parts = tiling_and_parts(m, n, k, *_multiprocessors(x.device))
    bm, bn, bk, weight_left, warps, stages, *_ = tiling
    if weight_left:
        source, x = x, x.new_empty(m, triton.cdiv(k, 64) * 64)
        _regroup_kernel[(m, triton.cdiv(k, 1024))](
            source, x, k, x.shape[1], source.stride(0), 1024
        )
    tiles = triton.cdiv(m, bm) * triton.cdiv(n, bn)
    partial = counters = out
    if parts > 1:
        partial = x.new_empty(tiles * parts * bm * bn, dtype=torch.float32)
        counters = _counters(x.device)
    tile = (bm, bn, bk, weight_left, warps, stages, k % bk == 0, decode)
    pointers = x, weight, scale, out, partial, counters
    sizes = m, n, k, x.stride(0), *strides
    _dot_kernel[(tiles, parts)](*pointers, *sizes, *tile, num_warps=warps)
    return out


def decode_into(out: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Write the decoded weight to `out`, contiguous [N, K], bf16 or fp16."""
    n, k = weight.shape
    sizes = (n, k, weight.stride(0), scale.stride(0))
    _decode_kernel[(triton.cdiv(k, 256), triton.cdiv(n, 16))](
        weight.view(torch.uint8), scale, out, *sizes, 16, 256, _decoder(out.device)
    )


@functools.cache
def _multiprocessors(device: torch.device) -> Tuple[int, int]:
    """How many there are, and the bytes of shared memory that a program can have."""
    if device.type != "cuda":  # interpreted
        return 4, LARGE_SHARED
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_block_optin


@functools.cache
def _decoder(device: torch.device) -> str:
    if device.type != "cuda":  # the interpreter knows no PTX
        return "plain"
    native = torch.cuda.get_device_capability(device) >= (8, 9)
    return "native" if native else "integer"


_STREAMS: Dict[torch.device, Dict[int, torch.Tensor]] = {}


def _counters(device: torch.device) -> torch.Tensor:
    """Zeros that a launch leaves zero, of the current stream alone.

    So launches that may overlap do not share them, unless graphs that were captured on
    one stream are replayed on two at a time.
    """
    if device.type != "cuda":
        return torch.zeros(COUNTERS, dtype=torch.int32)
    stream = torch.cuda.current_stream(device)
    if device not in _STREAMS and not torch.cuda.is_current_stream_capturing():
        rows = torch.zeros(STREAMS, COUNTERS, dtype=torch.int32, device=device)
        stream.synchronize()
        _STREAMS[device] = dict(enumerate(rows, -STREAMS))
    of_stream = _STREAMS.get(device, {})
    if stream.cuda_stream not in of_stream:
        unused = min(of_stream, default=0)
        if unused >= 0:  # none prepared, or all taken
            return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        of_stream[stream.cuda_stream] = of_stream.pop(unused)
    return of_stream[stream.cuda_stream]
