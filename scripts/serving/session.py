"""A session: measures what is not yet in the results folder, and makes the report."""

import argparse
import contextlib
import fcntl
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

from evidence import (
    Environment,
    Gpu,
    Launch,
    Plan,
    ResultsError,
    Server,
    dump,
    load_plan,
    read,
    read_lines,
    run_name,
)
from serving import finish, machine, prepare
from serving.measure import Session, measure
from serving.plan import differences, make_plan
from serving.process import RunFailed, check_port, stop_leftover
from serving.progress import Progress, say

REHEARSAL = (
    "REHEARSAL on a CPU, FlashInfer's kernels emulated in torch: it shows that every step "
    "works, and says nothing about speed. triton is left out: its MXFP8 kernel has no "
    "emulation."
)


def run(args: argparse.Namespace, root: Path) -> int:
    """All of it; returns the exit status: 0, 1 after a failure, 128 + a signal's number."""
    stop_on_signals()
    default = "rehearsal" if args.rehearse else f"{Path(args.model).name}-tp{args.tp}"
    folder = (args.results or root / ".cache" / "evidence" / default).resolve()
    if args.rehearse:
        say(REHEARSAL)
    try:
        env = prepare.program_environment(args.rehearse, root, os.environ)
        gpus = () if args.rehearse else machine.visible_gpus()
        if not args.rehearse:
            prepare.check_gpus(args, gpus, env)
        with locked(folder):
            failures = measure_and_report(args, root, folder, gpus, env)
    except (ResultsError, RunFailed, OSError) as error:
        say(f"bench_serving_sm100.py: {error}")
        return 1
    except SystemExit as stop:
        say("Interrupted; the same command goes on from here.")
        return stop.code
    for failure in failures:
        say(f"FAILED: {failure}")
    if failures:
        say("The same command tries again what failed, and nothing else.")
    if args.rehearse:
        say(REHEARSAL)
    print(f"Results: {folder}")
    return 1 if failures else 0


def stop_on_signals() -> None:
    """The first signal ends the session, and what it started; the others wait."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, _) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in numbers:
        # nohup means it.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made if there is none, for this session alone."""
    if folder.exists() and not folder.is_dir():
        raise ResultsError(f"{folder} is no folder")
    folder.mkdir(parents=True, exist_ok=True)
    others = {path.name for path in folder.iterdir()}
    if "plan.json" not in others and others - {"session.lock", prepare.QUESTIONS}:
        raise ResultsError(f"{folder} has files in it, but no plan.json of a session")
    with (folder / "session.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResultsError(f"another session measures into {folder}") from None
        yield


def measure_and_report(
    args: argparse.Namespace,
    root: Path,
    folder: Path,
    gpus: tuple[Gpu, ...],
    env: Mapping[str, str],
) -> list[str]:
    """Returns what failed."""
    if args.port:
        check_port(args.port)
    if prepare.built_from_another_tree(root):
        say(
            "WARNING: the installed sglang is not built from this tree as it is now, and "
            "make_pr.py will refuse the results. ./scripts/setup.sh builds it."
        )
    questions = prepare.get_questions(args.gsm8k, args.rehearse, root, folder)
    count = len((folder / prepare.QUESTIONS).read_bytes().splitlines())
    plan = agree_on_plan(folder, new_plan(args, root, (questions, count)))
    failures = measure_all(args, folder, plan, gpus, env)
    failures += finish.measure_kernels(root, folder, plan.rehearsal, env)
    failures += finish.make_report(root, folder)
    if not failures:
        failures = finish.make_pull_request(root, folder, plan.rehearsal)
    return failures


def new_plan(args: argparse.Namespace, root: Path, gsm8k: tuple[str, int]) -> Plan:
    return make_plan(
        rehearsal=args.rehearse,
        model=Path(args.model).name if Path(args.model).exists() else args.model,
        tp=args.tp,
        revision=machine.revision(root),
        gsm8k=gsm8k,
        environ=os.environ,
        servers=args.backends,
        concurrencies=args.concurrency,
        repeats=args.repeats,
        arguments=args.server_arguments,
    )


def agree_on_plan(folder: Path, new: Plan) -> Plan:
    """The folder's plan, written now if there is none. Raises ResultsError for another."""
    path = folder / "plan.json"
    if not path.exists():
        prepare.replace_file(path, f"{dump(new)}\n".encode())
        return new
    old = load_plan(folder)
    differ = differences(old, new)
    if differ:
        lines = "\n".join(f"  - {line}" for line in differ)
        raise ResultsError(
            f"{folder} has results of another plan:\n{lines}\n"
            "Give another folder, or what was given there."
        )
    return old


def measure_all(
    args: argparse.Namespace,
    folder: Path,
    plan: Plan,
    gpus: tuple[Gpu, ...],
    env: Mapping[str, str],
) -> list[str]:
    """Make the runs that are not complete. Returns what failed."""
    runs = list(plan.runs())
    paths = [folder / "runs" / run_name(repeat, server.name) for repeat, server in runs]
    complete = [path for path in paths if (path / "done").exists()]
    say(f"{len(runs)} runs into {folder}; {len(complete)} are complete")
    if len(complete) == len(runs):
        return []
    progress = Progress([run_seconds(path) for path in complete], len(runs))
    session = Session(
        plan=plan,
        model=(
            str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
        ),
        questions=folder / prepare.QUESTIONS,
        environment=add_environment(folder, machine.environment(command(), gpus)),
        env=env,
        port=args.port,
        say=progress.line,
    )
    failures = []
    for number, ((repeat, server), path) in enumerate(zip(runs, paths, strict=True), 1):
        if path not in complete:
            progress.begin(path.name, number)
            failures += measure_one(session, repeat, server, path)
            progress.end(succeeded=(path / "done").exists())
    return failures


def measure_one(session: Session, repeat: int, server: Server, path: Path) -> list[str]:
    """One run, in a new folder. Returns why it failed; the others go on."""
    set_aside(path, session.say)
    try:
        measure(session, repeat, server, path)
        return []
    except (RunFailed, ResultsError) as error:
        session.say(f"FAILED: {error}\n")
        return [f"{path.name}: {str(error).splitlines()[0]} (logs: {path})"]


def set_aside(path: Path, tell) -> None:
    """Keep what an unfinished run left under another name, and stop its server."""
    if stop_leftover(path):
        tell("stopped the server that a killed session left")
    if path.exists():
        taken = len(list(path.parent.glob(f"{path.name}.interrupted-*")))
        path.rename(path.with_name(f"{path.name}.interrupted-{taken + 1}"))


def run_seconds(path: Path) -> float:
    """How long a complete run took."""
    started = datetime.fromisoformat(read(Launch, path / "launch.json").started)
    return max(1.0, (path / "done").stat().st_mtime - started.timestamp())


def add_environment(folder: Path, environment: Environment) -> int:
    """Add a line to environments.jsonl; returns its number, from 0."""
    path = folder / "environments.jsonl"
    known = read_lines(Environment, path) if path.exists() else ()
    lines = "".join(f"{dump(line)}\n" for line in (*known, environment))
    prepare.replace_file(path, lines.encode())
    return len(known)


def command() -> str:
    """As it was typed, but for the place of the repository."""
    return shlex.join(["scripts/bench_serving_sm100.py", *sys.argv[1:]])
