"""What this machine has: its GPUs and versions, and what it cannot run."""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pynvml
from evidence import Environment, Gpu, ResultsError, Revision, installed_digest

PACKAGES = (
    *("sglang", "flashinfer_python", "flashinfer_cubin", "torch", "triton"),
    *("sgl-kernel", "transformers"),
)
# Asked in a process of its own: a CUDA context would stay on the GPU that is measured.
ASK_FOR_KERNELS = """
import json, sys
from sglang.srt.layers.quantization.mxfp8_routing import (
    Mxfp8LinearBackend, mxfp8_kernels_missing,
)
names = json.loads(sys.argv[1])
print(json.dumps({n: mxfp8_kernels_missing(Mxfp8LinearBackend(n)) for n in names}))
"""


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, as they are now; () without a driver."""
    try:
        with _nvml():
            return tuple(_gpu(handle) for handle in _visible_handles())
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return ()


@contextlib.contextmanager
def _nvml() -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _visible_handles() -> Iterable[Any]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        for index in range(pynvml.nvmlDeviceGetCount()):
            yield pynvml.nvmlDeviceGetHandleByIndex(index)
        return
    # CUDA, too, stops at the first name that means nothing.
    for name in visible.split(","):
        try:
            if name.strip().isdigit():
                yield pynvml.nvmlDeviceGetHandleByIndex(int(name))
            else:
                yield pynvml.nvmlDeviceGetHandleByUUID(name.strip())
        except pynvml.NVMLError:
            return


def _gpu(handle: Any) -> Gpu:
    return Gpu(
        name=pynvml.nvmlDeviceGetName(handle),
        driver=pynvml.nvmlSystemGetDriverVersion(),
        memory_mib=_ask(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**20),
        sm_clock_mhz=_ask(
            lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
        ),
        mem_clock_mhz=_ask(
            lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)
        ),
        power_limit_w=_ask(
            lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
        ),
    )


def _ask(question: Callable[[], float]) -> float | None:
    try:
        return float(question())
    except pynvml.NVMLError:
        return None


def environment(command: str, gpus: tuple[Gpu, ...]) -> Environment:
    """This machine, as a session that measures on `gpus` finds it."""
    return Environment(
        started=now(),
        gpu=gpus,
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        versions={name: v for name in PACKAGES if (v := _version(name))},
        cuda=_cuda_version() if gpus else None,
        command=command,
    )


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if "model name" in line)
    return next(names, platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_version() -> str:
    """The newest CUDA that the driver runs."""
    with _nvml():
        version = pynvml.nvmlSystemGetCudaDriverVersion_v2()
    return f"{version // 1000}.{version % 1000 // 10}"


def revision(root: Path) -> Revision:
    """The commit of `root`, and the digest of the sglang that will be measured."""
    git = _git(root, "rev-parse", "HEAD")
    dirty = _git(root, "status", "--porcelain") != ""
    return Revision(git or "unknown", dirty, installed_digest())


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    told = subprocess.run(command, check=False, capture_output=True, text=True)
    return told.stdout.strip() if told.returncode == 0 else None


def missing_kernels(backends: Iterable[str], env: Mapping[str, str]) -> dict[str, str]:
    """What this machine lacks, by --fp8-gemm-backend, for those that it cannot run.

    Asks the code that decides it in the server. Raises ResultsError if that fails.
    """
    names = json.dumps(sorted(set(backends)))
    command = [sys.executable, "-W", "ignore", "-c", ASK_FOR_KERNELS, names]
    told = subprocess.run(
        command, check=False, capture_output=True, text=True, env=dict(env)
    )
    if told.returncode != 0:
        raise ResultsError(
            f"sglang cannot be imported here:\n{told.stderr[-2000:].strip()}"
        )
    answers = json.loads(told.stdout.splitlines()[-1])
    return {name: missing for name, missing in answers.items() if missing}
