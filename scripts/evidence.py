"""The results folder that bench_serving_sm100.py fills: its schema and its reader.

plan.json             what is to be run; written first, never changed
environments.jsonl    a line for each session that measured
runs/R-SERVER/        one launch of a server, R the repeat from 1: launch.json,
                      server.log, bench-CASE-cC.jsonl as bench_serving wrote it,
                      gsm8k.json, updates.json, and done when it is complete
kernels.jsonl         what bench_mxfp8_linear.py wrote
"""

import csv
import hashlib
import importlib.metadata
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import (
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

SCHEMA = 1
DISTRIBUTION = "sglang"
T = TypeVar("T")


class ResultsError(Exception):
    """A results folder that is not what it should be; names the file and the cause."""


schema = dataclass(
    frozen=True,
    config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False),
)


@schema
class Revision:
    """What was measured: the commit, uncommitted changes, the wheel's digest."""

    git: str
    dirty: bool
    wheel: str


@schema
class Server:
    """A server to measure: its name, and what its launch adds."""

    name: str
    flags: tuple[str, ...]
    env: dict[str, str]


@schema
class Case:
    """A shape of requests, in tokens."""

    name: str
    input_len: PositiveInt
    output_len: PositiveInt


@schema
class Gsm8kPlan:
    """The first `questions` of a file, the first `shots` of it shown as examples."""

    questions: PositiveInt
    shots: NonNegativeInt
    file: str


@schema
class Plan:
    schema: Literal[1]
    rehearsal: bool
    model: str
    tp: PositiveInt
    repeats: PositiveInt
    revision: Revision
    servers: tuple[Server, ...]
    cases: tuple[Case, ...]
    concurrencies: tuple[PositiveInt, ...]
    gsm8k: Gsm8kPlan | None
    updates: NonNegativeInt

    def runs(self) -> Iterator[tuple[int, Server]]:
        """(repeat, server) in the order of running: each repeat starts one further on,
        so that no server is always the first on a cold machine."""
        for repeat in range(1, self.repeats + 1):
            first = (repeat - 1) % len(self.servers)
            for server in self.servers[first:] + self.servers[:first]:
                yield repeat, server


@schema
class Gpu:
    """A GPU as nvidia-smi found it; None where it does not say."""

    name: str
    driver: str
    memory_mib: float | None
    sm_clock_mhz: float | None
    mem_clock_mhz: float | None
    power_limit_w: float | None


@schema
class Environment:
    started: str
    gpu: tuple[Gpu, ...]
    cpu: str
    cores: PositiveInt
    python: str
    versions: dict[str, str]
    cuda: str | None
    command: str


@schema
class Launch:
    """`routing` is the server's line on what its MXFP8 layers run on, or ""."""

    server: str
    repeat: PositiveInt
    environment: NonNegativeInt
    flags: tuple[str, ...]
    env: dict[str, str]
    started: str
    ready_s: NonNegativeFloat
    routing: str


@schema
class Gsm8k:
    """Counts, their share, and the seconds that all answers took."""

    questions: PositiveInt
    correct: NonNegativeInt
    invalid: NonNegativeInt
    accuracy: NonNegativeFloat
    seconds: NonNegativeFloat


@schema
class Updates:
    seconds: tuple[NonNegativeFloat, ...]


@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class Bench:
    """What bench_serving says of one case at one concurrency: tokens or requests per
    second, and milliseconds. The rest of its line is in the file."""

    completed: PositiveInt
    duration: NonNegativeFloat
    max_concurrency: PositiveInt
    random_input_len: PositiveInt
    random_output_len: PositiveInt
    total_input_tokens: PositiveInt
    total_output_tokens: PositiveInt
    request_throughput: NonNegativeFloat
    input_throughput: NonNegativeFloat
    output_throughput: NonNegativeFloat
    total_throughput: NonNegativeFloat
    mean_ttft_ms: NonNegativeFloat
    median_ttft_ms: NonNegativeFloat
    p99_ttft_ms: NonNegativeFloat
    mean_tpot_ms: NonNegativeFloat
    median_tpot_ms: NonNegativeFloat
    p99_tpot_ms: NonNegativeFloat
    median_itl_ms: NonNegativeFloat
    p99_itl_ms: NonNegativeFloat
    median_e2e_latency_ms: NonNegativeFloat


@schema
class Kernel:
    """One timing of bench_mxfp8_linear.py: `us` are microseconds, one a repetition."""

    part: Literal["quantize", "gemm", "linear", "copy", "bf16_gemm"]
    backend: Literal["flashinfer_trtllm", "flashinfer_cutlass", "triton", "torch"]
    layout: Literal["8x4", "128x4"] | None
    m: PositiveInt
    n: PositiveInt | None
    k: PositiveInt | None
    us: tuple[NonNegativeFloat, ...]
    bytes: NonNegativeInt | None
    flops: NonNegativeInt | None
    device: str
    rehearsal: bool


@schema
class Run:
    """A complete run; `bench` is by (case's name, concurrency)."""

    path: Path
    launch: Launch
    bench: dict[tuple[str, int], Bench]
    gsm8k: Gsm8k | None
    updates: tuple[float, ...]


@schema
class Results:
    """What a folder holds. `missing` are the planned runs that are not complete."""

    path: Path
    plan: Plan
    environments: tuple[Environment, ...]
    runs: tuple[Run, ...]
    missing: tuple[str, ...]
    kernels: tuple[Kernel, ...] = field(default=())


def run_name(repeat: int, server: str) -> str:
    return f"{repeat}-{server}"


def bench_file(case: str, concurrency: int) -> str:
    return f"bench-{case}-c{concurrency}.jsonl"


def load_results(path: Path) -> Results:
    """Read a results folder, complete or not. Raises ResultsError."""
    plan = load_plan(path)
    environments = read_lines(Environment, path / "environments.jsonl")
    runs, missing = [], []
    for repeat, server in plan.runs():
        folder = path / "runs" / run_name(repeat, server.name)
        if (folder / "done").exists():
            runs.append(_load_run(folder, plan, repeat, server, len(environments)))
        else:
            missing.append(folder.name)
    kernels = path / "kernels.jsonl"
    rows = read_lines(Kernel, kernels) if kernels.exists() else ()
    if any(row.rehearsal != plan.rehearsal for row in rows):
        raise ResultsError(f"{kernels}: plan.json says rehearsal {plan.rehearsal}")
    return Results(path, plan, environments, tuple(runs), tuple(missing), rows)


def load_plan(path: Path) -> Plan:
    """The plan of the results folder `path`. Raises ResultsError."""
    return read(Plan, path / "plan.json")


def _load_run(
    folder: Path, plan: Plan, repeat: int, server: Server, environments: int
) -> Run:
    launch = read(Launch, folder / "launch.json")
    if (launch.server, launch.repeat) != (server.name, repeat):
        raise ResultsError(f"{folder / 'launch.json'}: it is of another run")
    if launch.environment >= environments:
        raise ResultsError(
            f"{folder / 'launch.json'}: environments.jsonl has no line "
            f"{launch.environment + 1}"
        )
    bench = {
        (case.name, c): _load_bench(folder / bench_file(case.name, c), case, c)
        for case in plan.cases
        for c in plan.concurrencies
    }
    gsm8k = read(Gsm8k, folder / "gsm8k.json") if plan.gsm8k else None
    updates = read(Updates, folder / "updates.json").seconds if plan.updates else ()
    if len(updates) != plan.updates:
        raise ResultsError(
            f"{folder / 'updates.json'}: {len(updates)} updates, plan.json says "
            f"{plan.updates}"
        )
    return Run(folder, launch, bench, gsm8k, updates)


def _load_bench(path: Path, case: Case, concurrency: int) -> Bench:
    rows = read_lines(Bench, path)
    if len(rows) != 1:
        raise ResultsError(f"{path}: {len(rows)} lines instead of one")
    found = rows[0].random_input_len, rows[0].random_output_len, rows[0].max_concurrency
    if found != (case.input_len, case.output_len, concurrency):
        raise ResultsError(f"{path}: measured {found}, which plan.json does not say")
    return rows[0]


def read(kind: type[T], path: Path) -> T:
    """The `kind` that the JSON file `path` holds. Raises ResultsError."""
    return _parse(kind, _text(path), str(path))


def read_lines(kind: type[T], path: Path) -> tuple[T, ...]:
    """One `kind` for each line of a JSONL file. Raises ResultsError."""
    lines = enumerate(_text(path).splitlines(), 1)
    return tuple(_parse(kind, line, f"{path}, line {i}") for i, line in lines)


def dump(value: Any) -> str:
    """The JSON, on one line, of a value of this schema."""
    return TypeAdapter(type(value)).dump_json(value).decode()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeError) as error:
        raise ResultsError(f"{path}: cannot be read: {error}") from error


def _parse(kind: type[T], text: str, where: str) -> T:
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ResultsError(
            f"{where}: {f'{place}: ' if place else ''}{first['msg']}"
        ) from error


def record_digest(record: str) -> str:
    """Names the sglang/ files that a wheel's RECORD lists, by their hashes: SHA-256."""
    lines = sorted(f"{path},{hash}\n" for path, hash in _package_files(record))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def wheel_digest(wheel: Path) -> str:
    """`record_digest` of a wheel file of sglang. Raises ResultsError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith(".dist-info/RECORD")]
            if len(names) != 1:
                raise ResultsError(
                    f"{wheel}: no wheel: it has {len(names)} RECORD files"
                )
            return record_digest(archive.read(names[0]).decode())
    except (OSError, zipfile.BadZipFile) as error:
        raise ResultsError(f"{wheel}: no wheel: {error}") from error


def installed_digest() -> str:
    """`record_digest` of the sglang that this Python imports.

    Raises ResultsError without one, or where a file is not what was installed.
    """
    try:
        found = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise ResultsError("sglang is not installed: run scripts/setup.sh") from error
    record = found.read_text("RECORD") or ""
    for path, hash in _package_files(record):
        if hash != _hash(Path(found.locate_file(path))):
            raise ResultsError(
                f"{path} was changed after sglang was installed: install it again"
            )
    return record_digest(record)


def _hash(path: Path) -> str:
    """As RECORD spells it."""
    try:
        digest = hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error}") from error
    return f"sha256={urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def _package_files(record: str) -> list[tuple[str, str]]:
    """(path, hash) of sglang's own files; installers add others without a hash."""
    rows = [(row[0], row[1]) for row in csv.reader(record.splitlines()) if row]
    found = [(p, hash) for p, hash in rows if p.startswith("sglang/") and hash]
    if not found:
        raise ResultsError("sglang's RECORD lists no file of sglang/")
    return found
