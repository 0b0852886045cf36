"""Which kernel runs an MXFP8 linear layer: decided here, and nowhere else.

Once per server, `resolve_mxfp8_linear_backend` turns the server flag, the environment
and the device into Mxfp8LinearOptions. Once per layer, `select_mxfp8_linear_backend`
turns those and the layer's shape into an Mxfp8LinearChoice. A call is left with one
comparison: M <= choice.max_m_8x4.
"""

import logging
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import List, Mapping, Optional, Tuple

import torch
from packaging.version import Version

from sglang.srt.environ import envs
from sglang.srt.layers.quantization.mxfp8 import shapes
from sglang.srt.layers.quantization.mxfp8.numerics import GROUP_SIZE
from sglang.srt.layers.quantization.mxfp8.scale_layout import (
    CONFIG_DIR,
    TunedLayer,
    flashinfer_version,
    max_m_8x4,
    parse_sf_layout,
    tuned_layers,
)
from sglang.srt.layers.quantization.mxfp8.weight_only import max_m_fused
from sglang.srt.utils import (
    get_device_capability,
    get_device_name,
    is_cuda,
    is_flashinfer_available,
    is_sm100_supported,
    log_info_on_rank0,
)

logger = logging.getLogger(__name__)

MIN_FLASHINFER = "0.6.7"
_WEIGHT_ONLY_NOTE = (
    "No MXFP8 product runs on this device: MXFP8 linear layers multiply 16-bit "
    "activations by weights that are decoded on the fly (weight_only)."
)


class Mxfp8LinearBackend(Enum):
    """What one MXFP8 linear layer runs on; in the order in which one stands in for
    another."""

    FLASHINFER_TRTLLM = "flashinfer_trtllm"
    FLASHINFER_CUTLASS = "flashinfer_cutlass"
    TRITON = "triton"
    WEIGHT_ONLY = "weight_only"

    def is_flashinfer_trtllm(self) -> bool:
        return self == Mxfp8LinearBackend.FLASHINFER_TRTLLM

    def is_flashinfer(self) -> bool:
        return self in _FLASHINFER_GPUS

    def is_triton(self) -> bool:
        return self == Mxfp8LinearBackend.TRITON

    def is_weight_only(self) -> bool:
        return self == Mxfp8LinearBackend.WEIGHT_ONLY


_FALLBACKS = tuple(Mxfp8LinearBackend)
TRTLLM, CUTLASS, TRITON, WEIGHT_ONLY = _FALLBACKS
# Compute capabilities that FlashInfer's mm_mxfp8 declares, 0.6.7.post3.
_FLASHINFER_GPUS = {
    TRTLLM: {(10, 0): "SM100", (10, 3): "SM103"},
    CUTLASS: {(10, 0): "SM100", (10, 3): "SM103", (11, 0): "SM110"},
}


@dataclass(frozen=True)
class Mxfp8LinearOptions:
    """What this server can run, and what it was asked for.

    Attributes:
        preferred: the backend that a layer gets if it can.
        available: all that run here, emulated ones included; weight_only is the last.
        is_auto: the flag left the backend open, so a tuned table may choose it.
        forced: (pattern, backend), the first match wins over everything else.
        sf_layout: "auto", "8x4" or "128x4".
        tuned: by (N, K).
    """

    preferred: Mxfp8LinearBackend
    available: Tuple[Mxfp8LinearBackend, ...]
    is_auto: bool = False
    forced: Tuple[Tuple[str, Mxfp8LinearBackend], ...] = ()
    sf_layout: str = "auto"
    tuned: Mapping[Tuple[int, int], TunedLayer] = field(default_factory=dict)

    def unmatched_patterns(self, prefixes: List[str]) -> List[str]:
        """Patterns of SGLANG_MXFP8_LINEAR_BACKEND that no layer's prefix matches."""
        return [
            pattern
            for pattern, _ in self.forced
            if not any(_matches(prefix, pattern) for prefix in prefixes)
        ]


@dataclass(frozen=True)
class Mxfp8LinearChoice:
    """What one layer runs on.

    Attributes:
        reason: why it is not the preferred backend, or "".
        max_m_8x4: calls with M up to it use 8x4 activation scales; 0 for none.
        max_m_fused: calls of weight_only with M up to it decode in the product.
    """

    backend: Mxfp8LinearBackend
    reason: str = ""
    max_m_8x4: int = 0
    max_m_fused: int = 0


def mxfp8_kernels_missing(backend: Mxfp8LinearBackend) -> str:
    """What this machine lacks to run `backend`'s kernels, or ""."""
    if backend == WEIGHT_ONLY:
        too_old = is_cuda() and get_device_capability() < (8, 0)
        return "an SM80 or later GPU" if too_old else ""
    if backend == TRITON:
        runs = is_cuda() and is_sm100_supported()
        return "" if runs else "an SM100 or SM103 GPU"
    missing, gpus = [], _FLASHINFER_GPUS[backend]
    if not is_cuda() or get_device_capability() not in gpus:
        missing.append(f"an {' or '.join(gpus.values())} GPU")
    found = flashinfer_version()
    if found is None or Version(found) < Version(MIN_FLASHINFER):
        missing.append(f"flashinfer_python >= {MIN_FLASHINFER} (found {found})")
    elif is_cuda() and not is_flashinfer_available():
        missing.append("SGLANG_IS_FLASHINFER_AVAILABLE=true")
    return " and ".join(missing)


def resolve_mxfp8_linear_backend(flag: str) -> Mxfp8LinearOptions:
    """What `--fp8-gemm-backend flag` and the environment mean on this machine.

    `auto` is the first of flashinfer_trtllm, flashinfer_cutlass, triton and weight_only
    that runs here; `triton` is weight_only on a GPU without block-scaled products. Raises
    ValueError for a flag or an environment variable that means nothing for MXFP8,
    RuntimeError naming what is missing where this machine cannot run the flag.
    """
    missing = {backend: mxfp8_kernels_missing(backend) for backend in _FALLBACKS}
    emulated = envs.SGLANG_MXFP8_EMULATION.get()
    available = tuple(
        b for b in _FALLBACKS if not missing[b] or (emulated and b.is_flashinfer())
    )
    if flag not in ("auto", *(b.value for b in (TRTLLM, CUTLASS, TRITON))):
        raise ValueError(
            f"--fp8-gemm-backend={flag} has no MXFP8 linear; choose "
            "flashinfer_trtllm, flashinfer_cutlass, triton or auto, and unset "
            "SGLANG_SUPPORT_CUTLASS_BLOCK_FP8, which makes auto cutlass."
        )
    # A GPU with kernels does not emulate unless it is told what to emulate.
    runs = [b for b in _FALLBACKS if is_cuda() and not missing[b]] or available
    asked = (
        Mxfp8LinearBackend(flag) if flag != "auto" else next(iter(runs), WEIGHT_ONLY)
    )
    if flag == "triton" and missing[TRITON] and is_cuda():
        asked = WEIGHT_ONLY
    if asked not in available:
        raise _cannot_run(flag, missing[asked])
    if asked == WEIGHT_ONLY:
        log_info_on_rank0(logger, _WEIGHT_ONLY_NOTE)
    return Mxfp8LinearOptions(
        preferred=asked,
        available=available,
        is_auto=flag == "auto",
        forced=_parse_forced(envs.SGLANG_MXFP8_LINEAR_BACKEND.get(), available),
        sf_layout=parse_sf_layout(envs.SGLANG_MXFP8_TRTLLM_SF_LAYOUT.get()),
        tuned=tuned_layers(
            envs.SGLANG_MXFP8_CONFIG_DIR.get() or CONFIG_DIR,
            get_device_name() or "cpu",
            flashinfer_version(),
        ),
    )


def _cannot_run(flag: str, missing: str) -> RuntimeError:
    device = torch.cuda.get_device_name() if is_cuda() else "a device without CUDA"
    return RuntimeError(
        f"--fp8-gemm-backend={flag} cannot serve an MXFP8 model on {device}: it needs "
        f"{missing}. auto takes what runs here: weight_only, from SM80 on. To run "
        "flashinfer_trtllm or flashinfer_cutlass without the kernels, slowly, set "
        "SGLANG_MXFP8_EMULATION=1."
    )


def _parse_forced(
    text: str, available: Tuple[Mxfp8LinearBackend, ...]
) -> Tuple[Tuple[str, Mxfp8LinearBackend], ...]:
    forced = []
    choices = {backend.value: backend for backend in available}
    for item in filter(None, map(str.strip, text.split(","))):
        pattern, _, name = map(str.strip, item.partition("="))
        if name == "bf16":
            raise ValueError(
                f"SGLANG_MXFP8_LINEAR_BACKEND: {item!r} asks for a bf16 copy, which no "
                "layer has any more; weight_only computes the same from the MXFP8 bytes"
            )
        if not pattern or name not in choices:
            raise ValueError(
                f"SGLANG_MXFP8_LINEAR_BACKEND: {item!r} is not PATTERN=BACKEND with one "
                f"of the backends that run here: {', '.join(choices)}"
            )
        forced.append((pattern, choices[name]))
    return tuple(forced)


def select_mxfp8_linear_backend(
    options: Mxfp8LinearOptions, n: int, k: int, dtype: torch.dtype, prefix: str = ""
) -> Mxfp8LinearChoice:
    """What the layer `prefix` runs on.

    Args:
        n, k: output and input size of this rank's weight [N, K].
        dtype: the model's activation dtype.

    Raises ValueError where SGLANG_MXFP8_LINEAR_BACKEND names a backend for the layer
    that does not take it, and for K % 32 != 0, which is no MXFP8.
    """
    if k % GROUP_SIZE != 0:
        raise ValueError(
            f"{prefix} [{n}, {k}]: MXFP8 needs K % {GROUP_SIZE} == 0 on every rank. List "
            "the layer in modules_to_not_convert, or serve with a smaller --tp."
        )
    tuned = options.tuned.get((n, k))
    first, reasons = options.preferred, []
    forced = next((p for p in options.forced if _matches(prefix, p[0])), None)
    if forced is not None:
        pattern, first = forced
        reasons.append(f"SGLANG_MXFP8_LINEAR_BACKEND has {pattern}={first.value}")
    elif options.is_auto and (measured := _measured_backend(options, tuned)):
        first = measured
        reasons.append("the tuned table of this GPU says so")
    if first == options.preferred:
        reasons.clear()
    backend, refusals = _first_that_takes(first, options.available, n, k, dtype)
    if forced is not None and backend != first:
        raise ValueError(
            f"SGLANG_MXFP8_LINEAR_BACKEND has {forced[0]}={first.value}, but {prefix} "
            f"[{n}, {k}] cannot run on it: {'; '.join(refusals)}"
        )
    return _choice(options, backend, n, k, "; ".join(reasons + refusals))


def _measured_backend(
    options: Mxfp8LinearOptions, tuned: Optional[TunedLayer]
) -> Optional[Mxfp8LinearBackend]:
    names = {backend.value: backend for backend in options.available}
    return names.get(tuned.backend) if tuned else None


def _max_m_8x4(
    options: Mxfp8LinearOptions, backend: Mxfp8LinearBackend, n: int, k: int
) -> int:
    if backend != TRTLLM:
        return 0
    return max_m_8x4(n, options.sf_layout, options.tuned.get((n, k)))


def choice_after(
    options: Mxfp8LinearOptions,
    failed: Mxfp8LinearBackend,
    n: int,
    k: int,
    dtype: torch.dtype,
    prefix: str,
    reason: str,
) -> Mxfp8LinearChoice:
    """What the layer runs on instead of a backend that is wrong for that reason.

    Raises RuntimeError where the flag or SGLANG_MXFP8_LINEAR_BACKEND named that backend,
    and for the last one.
    """
    forced = any(_matches(prefix, pattern) for pattern, _ in options.forced)
    named = forced or (failed == options.preferred and not options.is_auto)
    if named or failed == _FALLBACKS[-1]:
        raise RuntimeError(
            f"{reason}. Serve with --fp8-gemm-backend auto, or name another backend for "
            "the layer in SGLANG_MXFP8_LINEAR_BACKEND"
        )
    following = _FALLBACKS[_FALLBACKS.index(failed) + 1]
    backend, refusals = _first_that_takes(following, options.available, n, k, dtype)
    return _choice(options, backend, n, k, "; ".join([reason, *refusals]))


def _choice(
    options: Mxfp8LinearOptions,
    backend: Mxfp8LinearBackend,
    n: int,
    k: int,
    reason: str,
) -> Mxfp8LinearChoice:
    return Mxfp8LinearChoice(
        backend,
        reason,
        max_m_8x4=_max_m_8x4(options, backend, n, k),
        max_m_fused=max_m_fused(n, k) if backend == WEIGHT_ONLY else 0,
    )


def _matches(prefix: str, pattern: str) -> bool:
    """`down_proj`, `mlp.*`, `model.layers.0.*`: a glob of the prefix's last parts."""
    return fnmatchcase(f".{prefix}", f"*.{pattern}")


def _first_that_takes(
    first: Mxfp8LinearBackend,
    available: Tuple[Mxfp8LinearBackend, ...],
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tuple[Mxfp8LinearBackend, List[str]]:
    refusals: List[str] = []
    for backend in _FALLBACKS[_FALLBACKS.index(first) :]:
        if backend not in available:
            continue
        refusal = shapes.refusal(backend.value, n, k, dtype)
        if refusal is None:
            return backend, refusals
        if refusal not in refusals:
            refusals.append(refusal)
    return WEIGHT_ONLY, refusals
