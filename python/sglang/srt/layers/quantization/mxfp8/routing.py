"""Which kernel runs an MXFP8 linear layer: decided here, and nowhere else.

Once per server, `resolve_mxfp8_linear_backend` turns the server flag, the environment
and the device into Mxfp8LinearOptions. Once per layer, `select_mxfp8_linear_backend`
turns those and the layer's shape into an Mxfp8LinearChoice. A call is left with one
comparison: M <= choice.max_m_8x4.
"""

import importlib.metadata
import json
import logging
import os
import re
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Dict, List, Mapping, Optional, Tuple

import torch
from packaging.version import Version

from sglang.srt.environ import envs
from sglang.srt.layers.quantization.mxfp8 import shapes
from sglang.srt.layers.quantization.mxfp8.numerics import GROUP_SIZE
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
ANY_M = 2**31 - 1
# Where 8x4 activation scales are faster, by `_max_m_8x4`.
MAX_N_8X4, MAX_M_8X4 = 2560, 128
SF_LAYOUTS = ("auto", "8x4", "128x4")
_WEIGHT_ONLY_NOTE = (
    "No MXFP8 product runs on this device: MXFP8 linear layers multiply 16-bit "
    "activations by weights that are decoded on the fly (weight_only)."
)
CONFIG_DIR = os.path.join(
    os.path.dirname(os.path.dirname(__file__)), "configs", "mxfp8"
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
class TunedLayer:
    """What was measured to be fastest for one shape on one GPU.

    Attributes:
        max_m_8x4: the largest M for which the 8x4 activation-scale layout was faster.
        backend: that of the layer, or None to leave it to the flag.
    """

    max_m_8x4: int
    backend: Optional[Mxfp8LinearBackend] = None


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


def flashinfer_version() -> Optional[str]:
    try:
        return importlib.metadata.version("flashinfer_python")
    except importlib.metadata.PackageNotFoundError:
        return None


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
        sf_layout=_parse_sf_layout(envs.SGLANG_MXFP8_TRTLLM_SF_LAYOUT.get()),
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


def _parse_sf_layout(text: str) -> str:
    if text not in SF_LAYOUTS:
        raise ValueError(
            f"SGLANG_MXFP8_TRTLLM_SF_LAYOUT={text!r} is none of {', '.join(SF_LAYOUTS)}"
        )
    return text


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
    elif options.is_auto and tuned and tuned.backend in options.available:
        first = tuned.backend
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
        max_m_8x4=_max_m_8x4(options, backend, n, options.tuned.get((n, k))),
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


def _max_m_8x4(
    options: Mxfp8LinearOptions,
    backend: Mxfp8LinearBackend,
    n: int,
    tuned: Optional[TunedLayer],
) -> int:
    """The largest M for which trtllm's activation scales are 8x4.

    By default MAX_M_8X4 for N <= MAX_N_8X4 and 0 otherwise: on a GB200, 8x4 was faster for
    (N, K) = (2304, 8192) and (2560, 8192) up to M = 128, and 128x4 for N >= 8192 at every
    M (vllm-project/vllm#52275). Between 2560 and 8192 nothing is published, and sglang's
    128x4 stays.
    """
    # FlashInfer then expects the weight's scale in the 8x4 layout's length.
    if backend != TRTLLM or n % 128 != 0 or options.sf_layout == "128x4":
        return 0
    if options.sf_layout == "8x4":
        return ANY_M
    if tuned:
        return tuned.max_m_8x4
    return MAX_M_8X4 if n <= MAX_N_8X4 else 0


def config_file(device_name: str) -> str:
    """Name of the file that holds the tuned table of a GPU."""
    return f"device_name={device_name.replace(' ', '_')}.json"


@lru_cache(maxsize=None)
def tuned_layers(
    directory: str, device_name: str, flashinfer: Optional[str]
) -> Mapping[Tuple[int, int], TunedLayer]:
    """The table that tune_mxfp8_layout.py measured on this GPU, by (N, K).

    Empty without one; a wrong or stale one is ignored with a warning.
    """
    path = os.path.join(directory, config_file(device_name))
    if not os.path.exists(path):
        if directory != CONFIG_DIR:
            logger.warning(f"SGLANG_MXFP8_CONFIG_DIR has no {path}")
        return {}
    try:
        with open(path) as file:
            layers = parse_table(json.load(file), device_name, flashinfer)
    except Exception as error:  # whatever a file that is no table raises
        logger.warning(
            f"Ignored the tuned MXFP8 table {path}: {error}. Measure it again with "
            "tune_mxfp8_layout.py, or remove it."
        )
        return {}
    logger.info(f"MXFP8 linear layers of {len(layers)} shapes are tuned by {path}")
    return layers


def parse_table(
    table: dict, device_name: str, flashinfer: Optional[str]
) -> Dict[Tuple[int, int], TunedLayer]:
    """A table of tune_mxfp8_layout.py, by (N, K). Raises ValueError, or what a wrong type
    or a missing key raises, unless it is one of this GPU and FlashInfer version."""
    if table.get("rehearsal"):
        raise ValueError("it is a rehearsal, and measured no kernel of FlashInfer")
    for key, here in (("device_name", device_name), ("flashinfer", flashinfer)):
        if table[key] != here:
            raise ValueError(f"it is for {key} {table[key]!r}, this is {here!r}")
    layers = {}
    for shape, entry in table["layers"].items():
        match = re.fullmatch(r"N=(\d+),K=(\d+)", shape)
        if match is None:
            raise ValueError(f"{shape!r} is not N=...,K=...")
        layer = TunedLayer(**entry)
        if type(layer.max_m_8x4) is not int or layer.max_m_8x4 < 0:
            raise ValueError(f"{shape}: max_m_8x4 is {layer.max_m_8x4!r}")
        if layer.backend is not None:
            backend = Mxfp8LinearBackend(layer.backend)
            if not backend.is_flashinfer():
                raise ValueError(f"{shape}: backend is {layer.backend!r}")
            layer = TunedLayer(layer.max_m_8x4, backend)
        layers[int(match[1]), int(match[2])] = layer
    return layers
