"""The server's process and the programs that ask it: started, watched and stopped."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import requests

HOST = "127.0.0.1"
START_LIMIT_S = 3600
STOP_LIMIT_S = 20
ROUTING_LINE = re.compile(r"MXFP8 linear layers: .*")
ERROR_LINE = re.compile(r"^[\w.]*(Error|Exception|: error): .*", re.MULTILINE)


class RunFailed(Exception):
    """A run that cannot be finished; the others can."""


class Server:
    """A running server, with the log that it writes."""

    def __init__(self, process: subprocess.Popen, port: int, log: Path):
        self.process, self.log = process, log
        self.port, self.url = port, f"http://{HOST}:{port}"
        self.ready_s = 0.0

    def check(self) -> None:
        """Raises RunFailed once the server has stopped."""
        if self.process.poll() is not None:
            raise RunFailed(
                f"the server stopped with exit status {self.process.returncode}\n"
                f"{log_end(self.log)}"
            )

    def wait_until_ready(self) -> None:
        start = time.monotonic()
        while not self._is_healthy():
            self.check()
            if time.monotonic() - start > START_LIMIT_S:
                raise RunFailed(
                    f"the server was not ready after {START_LIMIT_S} s\n"
                    f"{log_end(self.log)}"
                )
            time.sleep(0.5)
        self.ready_s = time.monotonic() - start

    def _is_healthy(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=10).status_code == 200
        except requests.RequestException:
            return False

    def routing(self) -> str:
        """What the server says its MXFP8 layers run on, or ""."""
        line = ROUTING_LINE.search(self.log.read_text(errors="replace"))
        return line.group() if line else ""

    def post(self, path: str, body: dict) -> dict:
        """The server's answer, or RunFailed."""
        try:
            response = requests.post(f"{self.url}{path}", json=body, timeout=3600)
        except requests.RequestException as error:
            self.check()
            raise RunFailed(f"POST {path}: {error}\n{log_end(self.log)}") from error
        if response.status_code != 200:
            raise RunFailed(
                f"POST {path}: {response.status_code} {response.text[:1000]}\n"
                f"{log_end(self.log)}"
            )
        return response.json()

    def run(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        """Run a program that asks the server. Raises RunFailed if either one fails."""
        with log.open("w") as output:
            program = subprocess.Popen(
                command,
                cwd=log.parent,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                while program.poll() is None:
                    self.check()
                    time.sleep(0.2)
            finally:
                program.kill()
                program.wait()
        if program.returncode != 0:
            raise RunFailed(
                f"{log.name} ends with exit status {program.returncode}\n"
                f"{log_end(log)}"
            )


@contextlib.contextmanager
def running_server(
    arguments: Sequence[str], env: Mapping[str, str], port: int, folder: Path
) -> Iterator[Server]:
    """A server with its log in `folder`, in a session of its own, ready; then stopped.

    `arguments` go to sglang.launch_server. Raises RunFailed where it does not start.
    """
    check_port(port)
    command = [*arguments, "--host", HOST, "--port", str(port)]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _remember(process.pid, folder)
        server = Server(process, port, folder / "server.log")
        server.wait_until_ready()
        yield server
    finally:
        stop_group(process.pid)
        process.wait()
        (folder / "server.pid").unlink(missing_ok=True)


def check_port(port: int) -> None:
    with socket.socket() as client:
        if client.connect_ex((HOST, port)) == 0:
            raise RunFailed(f"port {port} is in use; choose another one with --port")


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return listener.getsockname()[1]


def _remember(pid: int, folder: Path) -> None:
    """For a session that goes on after this one was killed."""
    created = psutil.Process(pid).create_time()
    (folder / "server.pid").write_text(json.dumps({"pid": pid, "created": created}))


def stop_leftover(folder: Path) -> bool:
    """Stop the server of a killed session that wrote to `folder`; was there one?

    Nothing else is stopped: the process must be the one that was started then.
    """
    try:
        left = json.loads((folder / "server.pid").read_text())
        found = psutil.Process(left["pid"])
        if found.create_time() != left["created"]:
            return False
    except (OSError, ValueError, psutil.NoSuchProcess):
        return False
    stop_group(left["pid"])
    return True


def stop_group(group: int) -> None:
    """End all processes of a group, which is gone afterwards."""
    deadline = time.monotonic() + STOP_LIMIT_S
    try:
        os.killpg(group, signal.SIGTERM)
        while time.monotonic() < deadline:
            if not _is_alive(group):
                return
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _is_alive(group: int) -> bool:
    """Has the group a process that runs? A zombie is waiting for its parent only."""
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            is_zombie = process.info["status"] == psutil.STATUS_ZOMBIE
            if not is_zombie and os.getpgid(process.pid) == group:
                return True
    return False


def log_end(log: Path, lines: int = 20) -> str:
    """The end of a log and the errors in it, in lines that can be read."""
    text = log.read_text(errors="replace")
    end = [line[:300] for line in text.splitlines()[-lines:]]
    errors = dict.fromkeys(match.group()[:1000] for match in ERROR_LINE.finditer(text))
    shown = [*end, *(["Errors in it:", *list(errors)[-3:]] if errors else [])]
    return "\n".join([f"The end of {log}:", *(f"  | {line}" for line in shown)])
