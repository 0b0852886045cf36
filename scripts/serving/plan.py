"""What is measured: the servers, the grid, and whether a plan is still the same."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evidence import Case, Gsm8kPlan, Plan, Revision, Server, dump
from serving.backends import EMULATED, LAYOUT, SERVERS

# What the servers differ in must not come from the shell.
OURS = {LAYOUT, "SGLANG_MXFP8_LINEAR_BACKEND", "SGLANG_MXFP8_EMULATION"}
EMULATION = {
    "SGLANG_MXFP8_EMULATION": "1",
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    # Threads that wait for each other crawl as soon as another program runs.
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Grid:
    """How much is measured where the user does not say.

    Attributes:
        waves: requests per unit of concurrency, but at least `least_requests`.
        questions: of GSM8K; None for all.
        answer_tokens: the most tokens of an answer.
        warmup_requests: those of bench_serving, before each of its runs.
    """

    servers: tuple[str, ...]
    cases: tuple[Case, ...]
    concurrencies: tuple[int, ...]
    repeats: int
    waves: int
    least_requests: int
    warmup_requests: int
    updates: int
    questions: int | None
    shots: int
    answer_tokens: int

    def requests(self, concurrency: int) -> int:
        return max(self.least_requests, self.waves * concurrency)


FULL = Grid(
    servers=tuple(SERVERS),
    cases=(Case("prefill", 4096, 64), Case("decode", 128, 1024)),
    concurrencies=(1, 8, 32, 128, 512),
    repeats=3,
    waves=4,
    least_requests=8,
    warmup_requests=1,
    updates=5,
    questions=None,
    shots=5,
    answer_tokens=512,
)
REHEARSAL = Grid(
    servers=EMULATED,
    cases=(Case("prefill", 64, 2), Case("decode", 16, 6)),
    concurrencies=(1, 2),
    repeats=1,
    waves=1,
    least_requests=2,
    warmup_requests=0,
    updates=1,
    questions=3,
    shots=2,
    answer_tokens=16,
)


def grid_for(rehearsal: bool) -> Grid:
    return REHEARSAL if rehearsal else FULL


def make_plan(
    *,
    rehearsal: bool,
    model: str,
    tp: int,
    revision: Revision,
    gsm8k: tuple[str, int],
    environ: Mapping[str, str],
    servers: Sequence[str] | None = None,
    concurrencies: Sequence[int] | None = None,
    repeats: int | None = None,
    arguments: Sequence[str] = (),
) -> Plan:
    """The plan of a session; what is None comes from the grid.

    Args:
        gsm8k: name and number of questions of the file.
        environ: the shell's; what of it concerns sglang goes into the plan.
        arguments: the user's own, for every server.
    """
    grid = grid_for(rehearsal)
    shell = {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith("SGLANG_") and name not in OURS
    }
    common = {**shell, **EMULATION} if rehearsal else shell
    file, questions = gsm8k
    return Plan(
        schema=1,
        rehearsal=rehearsal,
        model=model,
        tp=tp,
        repeats=repeats or grid.repeats,
        revision=revision,
        servers=tuple(
            make_server(name, common, arguments) for name in servers or grid.servers
        ),
        cases=grid.cases,
        concurrencies=tuple(sorted(set(concurrencies or grid.concurrencies))),
        gsm8k=Gsm8kPlan(min(questions, grid.questions or questions), grid.shots, file),
        updates=grid.updates,
    )


def make_server(name: str, env: Mapping[str, str], arguments: Sequence[str]) -> Server:
    backend, own_env = SERVERS[name]
    flags = ("--fp8-gemm-backend", backend, *arguments)
    return Server(name, flags, {**env, **own_env})


def differences(old: Plan, new: Plan) -> list[str]:
    """A line for each thing that two plans do not agree in.

    The commit is no part of it while the measured wheel is the same.
    """
    was, now = _leaves(old), _leaves(new)
    return [
        f"{name}: {was.get(name, 'nothing')} there, {now.get(name, 'nothing')} here"
        for name in {**was, **now}
        if was.get(name) != now.get(name)
    ]


def _leaves(plan: Plan) -> dict[str, str]:
    data = json.loads(dump(plan))
    data["wheel"] = data.pop("revision")["wheel"][:12]
    servers = {server.pop("name"): server for server in data.pop("servers")}
    # Their order is compared, too: it is the order of running.
    data["servers"] = ", ".join(servers)
    for name, server in servers.items():
        data[f"flags of {name}"] = " ".join(server["flags"])
        for variable, value in server["env"].items():
            data[f"{variable} of {name}"] = value
    return {name: str(value) for name, value in data.items()}
