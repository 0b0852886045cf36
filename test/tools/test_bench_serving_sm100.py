"""scripts/bench_serving_sm100.py without sglang's server: plans, refusals, resuming."""

import argparse
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import bench_serving_sm100 as script
import psutil
import pytest
import serving.session as session
from evidence import Environment, Gpu, Launch, ResultsError, Revision, dump, load_plan
from serving import machine, prepare, process
from serving.plan import differences, grid_for, make_plan
from serving.process import RunFailed, running_server, stop_leftover
from serving.progress import Progress, duration, seconds_left

SCRIPT = Path(script.__file__)
REVISION = Revision("a" * 40, False, "b" * 64)
B200 = Gpu("NVIDIA B200", "1", 183359.0, 1965.0, 3996.0, 1000.0)


def plan(**changes):
    settings = dict(rehearsal=True, model="tiny", tp=1, revision=REVISION)
    settings |= dict(gsm8k=("questions.jsonl", 24), environ={})
    return make_plan(**settings | changes)


# --- Arguments -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--model is needed, or --rehearse"),
        (["--rehearse", "--model", "m"], "--rehearse has its own model"),
        (["--rehearse", "--tp", "2"], "--rehearse has its own model"),
        (["--rehearse", "--backends", "triton"], "has no emulation"),
        (["--rehearse", "--backends", "cublas"], "invalid choice: 'cublas'"),
        (["--rehearse", "--concurrency", "0"], "invalid positive value: '0'"),
        (["--rehearse", "--port", "70000"], "invalid port value"),
        (["--rehearse", "--gsm8k", "none.jsonl"], "none.jsonl is no file"),
        (["--model", "/no/such/model"], "/no/such/model has no config.json"),
        (
            ["--model", "m", "--", "--port", "1"],
            "--port cannot be given to the servers",
        ),
        (["--model", "m", "--", "--tp=8"], "--tp cannot be given to the servers"),
        (["--model", "m", "--backends", *["triton"] * 2], "each name once"),
    ],
)
def test_wrong_arguments_are_found_before_anything_is_installed(arguments, words):
    # -S: a Python without packages, as on a fresh machine.
    command = [sys.executable, "-S", SCRIPT, *arguments]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert told.returncode == 2
    assert words in told.stderr
    assert "Traceback" not in told.stderr


def test_model_must_be_mxfp8(tmp_path):
    config = tmp_path / "config.json"
    config.write_text("{}")
    assert "is not in MXFP8; convert it" in script.model_problem(str(tmp_path), [])
    assert script.model_problem(str(tmp_path), ["--quantization", "mxfp8"]) == ""
    config.write_text('{"quantization_config": {"quant_method": "mxfp8"}}')
    assert script.model_problem(str(tmp_path), []) == ""
    assert script.model_problem("Qwen/Qwen3-8B", []) == ""


def test_fresh_machine_is_set_up_and_the_same_arguments_go_on_in_venv(tmp_path):
    scripts = tmp_path / "scripts"
    shutil.copytree(SCRIPT.parent / "serving", scripts / "serving")
    shutil.copy(SCRIPT, scripts)
    (scripts / "setup.sh").write_text(f"""set -euo pipefail
ensure_uv() {{ :; }}
get_default_model() {{ echo model; }}
setup() {{
    mkdir -p {tmp_path}/.venv/bin
    printf '#!/bin/sh\\necho "venv: $*"\\n' > {tmp_path}/.venv/bin/python
    chmod +x {tmp_path}/.venv/bin/python
}}
""")
    command = [sys.executable, "-S", scripts / SCRIPT.name, "--rehearse", "a folder"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    venv = f"venv: {scripts / SCRIPT.name} --rehearse a folder"
    assert told.stdout.splitlines() == ["model", venv]
    (scripts / "setup.sh").write_text("setup() { return 3; }")
    told = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert told.returncode == 1
    assert "the set-up failed" in told.stderr


# --- The plan --------------------------------------------------------------------------


def test_every_repeat_has_every_server_and_another_first():
    order = list(plan(repeats=4).runs())
    names = [server.name for server in plan().servers]
    assert "triton" not in names and len(names) == 4
    firsts = []
    for repeat in range(1, 5):
        row = [server.name for r, server in order if r == repeat]
        assert sorted(row) == sorted(names)
        firsts.append(row[0])
    assert sorted(firsts) == sorted(names)
    assert [repeat for repeat, _ in order] == sorted(repeat for repeat, _ in order)


def test_full_plan_has_both_layouts_and_both_cases():
    full = plan(rehearsal=False, arguments=["--mem-fraction-static", "0.8"])
    servers = {server.name: server for server in full.servers}
    assert list(servers) == list(script.SERVERS)
    assert servers["triton"].flags == (
        *("--fp8-gemm-backend", "triton"),
        *("--mem-fraction-static", "0.8"),
    )
    layout = "SGLANG_MXFP8_TRTLLM_SF_LAYOUT"
    assert servers["flashinfer_trtllm_8x4"].env == {layout: "8x4"}
    assert servers["flashinfer_trtllm_128x4"].env == {layout: "128x4"}
    assert servers["flashinfer_trtllm"].env == {}
    assert [case.input_len > case.output_len for case in full.cases] == [True, False]
    assert full.gsm8k.questions == 24
    assert grid_for(False).requests(1) >= 8
    assert grid_for(False).requests(512) >= 4 * 512


def test_what_the_shell_says_of_sglang_is_in_the_plan_but_not_what_is_compared():
    environ = {
        "SGLANG_MXFP8_TRTLLM_SF_LAYOUT": "8x4",
        "SGLANG_MXFP8_LINEAR_BACKEND": "*=bf16",
        "SGLANG_MXFP8_EMULATION": "1",
        "SGLANG_MXFP8_CONFIG_DIR": "tables",
        "HOME": "home",
    }
    full = plan(rehearsal=False, environ=environ)
    assert full.servers[0].env == {"SGLANG_MXFP8_CONFIG_DIR": "tables"}
    assert "SGLANG_MXFP8_TRTLLM_SF_LAYOUT" not in full.servers[2].env
    assert plan().servers[0].env["SGLANG_MXFP8_EMULATION"] == "1"
    root = Path("root")
    started = prepare.program_environment(False, root, environ)
    assert started == {"HOME": "home"}
    rehearsed = prepare.program_environment(True, root, environ)
    assert rehearsed["CUDA_VISIBLE_DEVICES"] == ""
    assert rehearsed["PYTHONPATH"] == "root/scripts/cpu_stand_ins"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"repeats": 2}, ["repeats: 1 there, 2 here"]),
        ({"model": "big"}, ["model: tiny there, big here"]),
        ({"concurrencies": [8]}, ["concurrencies: [1, 2] there, [8] here"]),
        (
            {"revision": Revision("c" * 40, True, "d" * 64)},
            ["wheel: bbbbbbbbbbbb there, dddddddddddd here"],
        ),
        ({"revision": Revision("c" * 40, True, "b" * 64)}, []),
        ({"concurrencies": [2, 1, 1]}, []),
        (
            {"environ": {"SGLANG_X": "1"}, "servers": ["flashinfer_cutlass"]},
            ["SGLANG_X of flashinfer_cutlass: nothing there, 1 here"],
        ),
    ],
)
def test_differences(changes, words):
    servers = changes.get("servers")
    found = differences(plan(servers=servers), plan(**changes))
    assert found == words


def test_another_plan_is_refused_with_the_difference(tmp_path):
    first = session.agree_on_plan(tmp_path, plan())
    assert session.agree_on_plan(tmp_path, plan()) == first == load_plan(tmp_path)
    with pytest.raises(ResultsError, match="- repeats: 1 there, 2 here"):
        session.agree_on_plan(tmp_path, plan(repeats=2))
    assert load_plan(tmp_path) == first


# --- Progress --------------------------------------------------------------------------


def test_estimate(capsys):
    assert seconds_left([100, 200], runs_left=3, spent=50) == 400
    assert seconds_left([100], runs_left=1, spent=500) == 0
    assert duration(42) == "42 s"
    assert duration(600) == "10 min"
    assert duration(7500) == "2 h 5 min"
    progress = Progress([], 2)
    progress.begin("1-triton", 1)
    progress.line("warm-up")
    progress.end(succeeded=True)
    progress.begin("1-flashinfer_cutlass", 2)
    progress.line("warm-up")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "[1/2] 1-triton: warm-up"
    assert second == "[2/2] 1-flashinfer_cutlass: warm-up; all runs: about 0 s left"


# --- Refusals --------------------------------------------------------------------------


def arguments(**changes) -> argparse.Namespace:
    given = dict(
        rehearse=False, model="m", tp=1, repeats=None, backends=None, port=None,
        concurrency=None, gsm8k=None, server_arguments=[], results=None,
    )  # fmt: skip
    return argparse.Namespace(**given | changes)


def test_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(session, "stop_on_signals", lambda: None)
    monkeypatch.setattr(machine, "visible_gpus", lambda: ())
    assert session.run(arguments(results=tmp_path / "results"), tmp_path) == 1
    err = capsys.readouterr().err
    assert "no NVIDIA GPU is visible, and an SM100 or SM103 one is needed" in err
    assert "--rehearse" in err
    assert not (tmp_path / "results").exists()


def test_a_machine_without_the_kernels_asks_the_code_of_the_server(monkeypatch):
    env = prepare.program_environment(True, SCRIPT.parents[1], os.environ)
    with pytest.raises(ResultsError) as caught:
        prepare.check_gpus(arguments(backends=["flashinfer_trtllm_8x4"]), (B200,), env)
    words = "NVIDIA B200 cannot be measured: flashinfer_trtllm needs an SM100 or SM103"
    assert words in str(caught.value)
    with pytest.raises(ResultsError, match="--tp 2: only 1 GPUs are visible"):
        prepare.check_gpus(arguments(tp=2), (B200,), env)
    broken = env | {"PYTHONPATH": "", "PYTHONHOME": "/nowhere"}
    with pytest.raises(ResultsError, match="sglang cannot be imported here"):
        machine.missing_kernels(["triton"], broken)


def test_other_folders_and_other_sessions(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ResultsError, match="has files in it, but no plan.json"):
        with session.locked(tmp_path):
            pass
    with pytest.raises(ResultsError, match="notes.txt is no folder"):
        with session.locked(tmp_path / "notes.txt"):
            pass
    with session.locked(tmp_path / "new"):
        with pytest.raises(ResultsError, match="another session measures into"):
            with session.locked(tmp_path / "new"):
                pass
    with session.locked(tmp_path / "new"):
        pass


# --- The questions ---------------------------------------------------------------------

ROWS = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(6)]


def write_questions(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_questions_are_kept_in_the_folder(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    given = write_questions(tmp_path / "mine.jsonl")
    assert prepare.get_questions(given, False, tmp_path, folder) == "mine.jsonl"
    assert (folder / "gsm8k.jsonl").read_text() == given.read_text()
    assert prepare.get_questions(given, False, tmp_path, folder) == "mine.jsonl"
    other = write_questions(tmp_path / "other.jsonl", ROWS[::-1])
    with pytest.raises(ResultsError, match="is not the file of"):
        prepare.get_questions(other, False, tmp_path, folder)


def test_own_questions_are_for_the_rehearsal(tmp_path):
    name = prepare.get_questions(None, True, SCRIPT.parents[1], tmp_path)
    assert name == "questions.jsonl"
    rows = [json.loads(line) for line in (tmp_path / "gsm8k.jsonl").open()]
    assert len(rows) >= 20
    for row in rows:
        steps, result = row["answer"].split("\n#### ")
        for step in steps.split(", "):
            left, right = step.split(" = ")
            assert eval(left) == int(right)
        assert right == result


@pytest.mark.parametrize(
    "rows, words",
    [
        (ROWS[:5], "5 questions; 5 are examples"),
        ([*ROWS, {"question": "1?"}], "line 7: not"),
        ([{"question": "1?", "answer": "one"}], "line 1: not"),
        ([[1]], "line 1: not"),
    ],
)
def test_files_that_are_no_gsm8k(tmp_path, rows, words):
    given = write_questions(tmp_path / "mine.jsonl", rows)
    with pytest.raises(ResultsError, match=words):
        prepare.get_questions(given, False, tmp_path, tmp_path)
    assert not (tmp_path / "gsm8k.jsonl").exists()


def test_download(tmp_path, monkeypatch):
    web, folder = tmp_path / "web", tmp_path / "results"
    web.mkdir(), folder.mkdir()
    write_questions(web / "test.jsonl")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(web))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/test.jsonl"
        monkeypatch.setattr(prepare, "GSM8K_URL", url)
        assert prepare.get_questions(None, False, tmp_path, folder) == "test.jsonl"
        with pytest.raises(ResultsError, match="404.*give the file with --gsm8k"):
            prepare.download(url + "x")
        server.shutdown()
    # Once it is there, it is not asked for again.
    assert prepare.get_questions(None, False, tmp_path, folder) == "test.jsonl"
    (folder / "gsm8k.jsonl").unlink()
    with pytest.raises(ResultsError, match="cannot be downloaded"):
        prepare.get_questions(None, False, tmp_path, folder)


# --- Servers ---------------------------------------------------------------------------

# Answers /health, and has a child that ignores SIGTERM when it is told to.
FAKE = """
import http.server, signal, subprocess, sys
print("MXFP8 linear layers: 4 on flashinfer_cutlass", flush=True)
child = "import signal, time; {}; print(flush=True); time.sleep(600)"
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
process.stdout.readline()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        self.send_response(200 if self.path == "/good" else 400); self.end_headers()
        self.wfile.write(b'{{"message": "no such path"}}')
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def start(program: str, folder: Path, port: int | None = None):
    port = port or process.free_port()
    return running_server([sys.executable, "-c", program], os.environ, port, folder)


def group_of(pid: int) -> list[psutil.Process]:
    return [
        p for p in psutil.process_iter() if is_alive(p) and os.getpgid(p.pid) == pid
    ]


def is_alive(found: psutil.Process) -> bool:
    try:
        return found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("reaction", ["pass", DEAF])
def test_a_server_and_all_its_processes_are_stopped(tmp_path, monkeypatch, reaction):
    monkeypatch.setattr(process, "STOP_LIMIT_S", 0.5)
    bystander = subprocess.Popen(["sleep", "60"])
    with start(FAKE.format(reaction), tmp_path) as server:
        pid = server.process.pid
        assert len(group_of(pid)) == 2
        assert server.ready_s > 0
        assert server.routing() == "MXFP8 linear layers: 4 on flashinfer_cutlass"
        assert server.post("/good", {}) == {"message": "no such path"}
        with pytest.raises(RunFailed, match="POST /bad: 400 .*no such path"):
            server.post("/bad", {})
    time.sleep(0.2)
    assert group_of(pid) == []
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    assert not (tmp_path / "server.pid").exists()


def test_a_server_that_does_not_start(tmp_path):
    program = "print('last words'); raise ValueError('no such flag')"
    with pytest.raises(RunFailed) as caught:
        with start(program, tmp_path):
            pass
    text = str(caught.value)
    assert text.startswith("the server stopped with exit status 1\nThe end of ")
    assert "  | last words" in text
    assert text.endswith("Errors in it:\n  | ValueError: no such flag")


def test_a_port_that_is_taken(tmp_path):
    with start(FAKE.format("pass"), tmp_path) as server:
        with pytest.raises(RunFailed, match=f"port {server.port} is in use"):
            with start(FAKE.format("pass"), tmp_path, server.port):
                pass
        assert server.process.poll() is None


def test_programs_that_fail_and_servers_that_die_under_them(tmp_path):
    with start(FAKE.format("pass"), tmp_path) as server:
        log = tmp_path / "program.log"
        server.run([sys.executable, "-c", "print(1)"], os.environ, log)
        assert log.read_text() == "1\n"
        bad = [sys.executable, "-c", "raise OSError('no disk')"]
        with pytest.raises(RunFailed, match="(?s)program.log ends with .*no disk"):
            server.run(bad, os.environ, log)
        os.kill(server.process.pid, signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(RunFailed, match="the server stopped with exit status -9"):
            server.run(["sleep", "60"], os.environ, log)
        assert time.monotonic() - begin < 30


def test_the_server_of_a_killed_session_is_stopped_and_no_other(tmp_path):
    sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
    assert not stop_leftover(tmp_path)
    created = psutil.Process(sleeper.pid).create_time()
    note = tmp_path / "server.pid"
    note.write_text(json.dumps({"pid": sleeper.pid, "created": created - 5}))
    assert not stop_leftover(tmp_path)
    assert sleeper.poll() is None
    note.write_text(json.dumps({"pid": sleeper.pid, "created": created}))
    assert stop_leftover(tmp_path)
    assert sleeper.wait(10) == -signal.SIGTERM
    assert not stop_leftover(tmp_path)


# --- Resuming --------------------------------------------------------------------------


class FakeRuns:
    """Stands in for `measure`: leaves what a run leaves, or fails as it is told to."""

    def __init__(self, monkeypatch, folder: Path):
        self.folder, self.made, self.failing = folder, [], {}
        monkeypatch.setattr(session, "measure", self)

    def __call__(self, settings, repeat, server, path):
        self.made.append(path.name)
        path.mkdir(parents=True)
        launch = Launch(
            server.name, repeat, settings.environment, (), {}, machine.now(), 1, ""
        )
        (path / "launch.json").write_text(dump(launch))
        if path.name in self.failing:
            raise self.failing[path.name]
        (path / "done").touch()

    def measure_all(self, planned) -> list[str]:
        self.made = []
        args = arguments(model=str(self.folder), port=33110)
        return session.measure_all(args, self.folder, planned, (), {})


def test_failed_runs_do_not_stop_the_others_and_are_made_again(
    tmp_path, monkeypatch, capsys
):
    runs = FakeRuns(monkeypatch, tmp_path)
    planned = plan(servers=["flashinfer_cutlass", "flashinfer_trtllm"], repeats=2)
    runs.failing = {"1-flashinfer_trtllm": RunFailed("no memory\nlog")}
    (failure,) = runs.measure_all(planned)
    assert failure.startswith("1-flashinfer_trtllm: no memory (logs: ")
    assert runs.made == [
        *("1-flashinfer_cutlass", "1-flashinfer_trtllm"),
        *("2-flashinfer_trtllm", "2-flashinfer_cutlass"),
    ]
    assert (
        "[2/4] 1-flashinfer_trtllm: FAILED: no memory\nlog\n" in capsys.readouterr().err
    )

    runs.failing = {"1-flashinfer_trtllm": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        runs.measure_all(planned)
    runs.failing = {}
    assert runs.measure_all(planned) == []
    assert runs.made == ["1-flashinfer_trtllm"]
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == [
        "1-flashinfer_cutlass",
        "1-flashinfer_trtllm",
        "1-flashinfer_trtllm.interrupted-1",
        "1-flashinfer_trtllm.interrupted-2",
        "2-flashinfer_cutlass",
        "2-flashinfer_trtllm",
    ]
    lines = (tmp_path / "environments.jsonl").read_text().splitlines()
    assert len(lines) == 3
    last = json.loads((tmp_path / "runs" / runs.made[0] / "launch.json").read_text())
    assert last["environment"] == 2

    assert runs.measure_all(planned) == [] == runs.made
    assert len((tmp_path / "environments.jsonl").read_text().splitlines()) == 3


SESSION = """
import sys, time
sys.path.insert(0, sys.argv[1])
import serving.session as session
def measure(*_):
    try:
        print("measuring", flush=True)
        time.sleep(60)
    finally:
        print("stopped", flush=True)
session.measure_and_report = measure
import argparse
args = argparse.Namespace(rehearse=True, results=session.Path(sys.argv[2]))
sys.exit(session.run(args, session.Path(sys.argv[1]).parent))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_the_session_in_order(tmp_path, number):
    def heed():
        signal.signal(number, signal.SIG_DFL)

    program = subprocess.Popen(
        [sys.executable, "-c", SESSION, str(SCRIPT.parent), str(tmp_path / "r")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
    )
    assert program.stdout.readline() == "measuring\n"
    program.send_signal(number)
    out, err = program.communicate(timeout=30)
    assert program.returncode == 128 + number
    assert out == "stopped\n"
    assert "Interrupted; the same command goes on from here." in err
    assert "Traceback" not in err


# --- This machine ----------------------------------------------------------------------


def test_environment_is_of_this_machine():
    found = machine.environment("command", ())
    assert found.versions["sglang"].startswith("0.5.9")
    assert {"torch", "flashinfer_python"} <= set(found.versions)
    assert found.cores >= 1 and found.cpu
    assert found.cuda is None
    assert isinstance(found, Environment)


def test_revision_of_a_checkout_and_of_a_copy(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    assert machine.revision(tmp_path / "none").git == "unknown"
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    clean = machine.revision(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean.git) and not clean.dirty
    (tmp_path / "new.py").touch()
    assert machine.revision(tmp_path).dirty
