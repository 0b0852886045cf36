"""One run: a server is launched, warmed up, measured and stopped."""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from evidence import (
    Bench,
    Case,
    Gsm8k,
    Launch,
    Plan,
    Server,
    Updates,
    bench_file,
    dump,
    installed_digest,
    read,
    read_lines,
)
from serving import machine
from serving.plan import grid_for
from serving.process import RunFailed
from serving.process import Server as RunningServer
from serving.process import free_port, running_server

GSM8K = Path(__file__).with_name("gsm8k.py")
# sglang's kernels and CUDA graphs need a GPU; memory is left for others.
CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native"),
    *("--sampling-backend", "pytorch", "--disable-overlap-schedule"),
    *("--max-total-tokens", "8192"),
)
WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class Session:
    """What all runs of one session share.

    Attributes:
        model: the path or name that the server is given.
        questions: GSM8K's file.
        environment: this session's line in environments.jsonl, from 0.
        env: of every program that is started.
        port: the servers', None for a free one each time.
        say: prints a line of progress.
    """

    plan: Plan
    model: str
    questions: Path
    environment: int
    env: Mapping[str, str]
    port: int | None
    say: Callable[[str], None]


def measure(session: Session, repeat: int, server: Server, folder: Path) -> None:
    """Make the run in `folder`, which is new. Raises RunFailed."""
    plan, env = session.plan, {**session.env, **server.env}
    flags = (*(CPU_FLAGS if plan.rehearsal else ()), *server.flags)
    arguments = [
        *(sys.executable, "-m", "sglang.launch_server"),
        *("--model-path", session.model, "--tp", str(plan.tp), *flags),
    ]
    folder.mkdir(parents=True)
    started, port = machine.now(), session.port or free_port()
    with contextlib.ExitStack() as stack:
        with session_step(session, "the server starts"):
            running = stack.enter_context(running_server(arguments, env, port, folder))
        launch = Launch(
            server=server.name,
            repeat=repeat,
            environment=session.environment,
            flags=flags,
            env=server.env,
            started=started,
            ready_s=round(running.ready_s, 3),
            routing=running.routing(),
        )
        (folder / "launch.json").write_text(dump(launch) + "\n")
        ask_everything(session, running, env, folder)
    if installed_digest() != plan.revision.wheel:
        raise RunFailed("another sglang was installed while this run was made")
    (folder / "done").touch()


def ask_everything(
    session: Session, server: RunningServer, env: Mapping[str, str], folder: Path
) -> None:
    """Warm up, and make all measurements of one run.

    Accuracy comes after the updates, so that it is that of updated weights.
    """
    plan = session.plan
    with session_step(session, "warm-up"):
        for case in plan.cases:
            warm_up(server, case, max(plan.concurrencies))
    for case, concurrency in itertools.product(plan.cases, plan.concurrencies):
        with session_step(session, f"{case.name}, concurrency {concurrency}") as note:
            row = bench(session, server, case, concurrency, env, folder)
            note(
                f"{row.total_throughput:.1f} tokens/s, first token after "
                f"{row.median_ttft_ms:.0f} ms"
            )
    with session_step(session, f"weight updates ({plan.updates})") as note:
        seconds = [update(server, session.model) for _ in range(plan.updates)]
        (folder / "updates.json").write_text(dump(Updates(tuple(seconds))) + "\n")
        note(", ".join(f"{s:.2f} s" for s in seconds))
    if plan.gsm8k:
        with session_step(session, "GSM8K") as note:
            right = gsm8k(session, server, env, folder)
            note(f"{right.correct} of {right.questions} right")


@contextlib.contextmanager
def session_step(session: Session, name: str) -> Iterator[Callable[[str], None]]:
    """Say how long a step took, and what it notes."""
    start = time.monotonic()
    notes: list[str] = []
    yield notes.append
    results = "".join(f": {note}" for note in notes)
    session.say(f"{name}{results} ({time.monotonic() - start:.0f} s)")


def warm_up(server: RunningServer, case: Case, batch: int) -> None:
    """One batch of the case's shape, so that what is made on first use is there."""
    ids = [[(i + j) % 1000 + 100 for j in range(case.input_len)] for i in range(batch)]
    tokens = min(case.output_len, WARM_UP_TOKENS)
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    server.post("/generate", {"input_ids": ids, "sampling_params": sampling})


def bench(
    session: Session,
    server: RunningServer,
    case: Case,
    concurrency: int,
    env: Mapping[str, str],
    folder: Path,
) -> Bench:
    """One run of bench_serving, with as many tokens as the case says in each request."""
    grid = grid_for(session.plan.rehearsal)
    requests, output = grid.requests(concurrency), bench_file(case.name, concurrency)
    command = [
        *(sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang"),
        *("--base-url", server.url, "--model", session.model),
        *("--dataset-name", "random-ids", "--tokenize-prompt"),
        *("--random-input-len", str(case.input_len)),
        *("--random-output-len", str(case.output_len), "--random-range-ratio", "1"),
        *("--num-prompts", str(requests), "--max-concurrency", str(concurrency)),
        *("--warmup-requests", str(grid.warmup_requests), "--flush-cache"),
        *("--tag", "rehearsal" if session.plan.rehearsal else "measured"),
        *("--disable-tqdm", "--output-file", str(folder / output)),
    ]
    log = (folder / output).with_suffix(".log")
    server.run(command, env, log)
    row = read_lines(Bench, folder / output)[0]
    if row.completed != requests:
        raise RunFailed(f"{log}: {row.completed} of {requests} requests succeeded")
    return row


def update(server: RunningServer, model: str) -> float:
    """Seconds until the server has loaded the same weights again."""
    start = time.perf_counter()
    answer = server.post("/update_weights_from_disk", {"model_path": model})
    if answer.get("success") is not True:
        raise RunFailed(f"the weight update was refused: {answer.get('message')}")
    return round(time.perf_counter() - start, 6)


def gsm8k(
    session: Session, server: RunningServer, env: Mapping[str, str], folder: Path
) -> Gsm8k:
    asked = session.plan.gsm8k
    tokens = grid_for(session.plan.rehearsal).answer_tokens
    numbers = (asked.questions, asked.shots, tokens)
    command = [sys.executable, GSM8K, server.port, session.questions, *numbers]
    output = folder / "gsm8k.json"
    server.run([*map(str, command), str(output)], env, folder / "gsm8k.log")
    return read(Gsm8k, output)
