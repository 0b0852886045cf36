"""scripts/bench_serving.py without sglang's servers: failures, and what it writes."""

import re

import bench_serving
import pytest
from bench_serving import Failed, parse_arguments


def test_servers_and_what_does_not_come_from_the_shell(monkeypatch, tmp_path, capsys):
    for name in (*bench_serving.OURS, "SGLANG_MXFP8_CONFIG_DIR"):
        monkeypatch.setenv(name, "x")
    session = parse_arguments(["r", "--model", "m", "--", "--x"])
    assert session.arguments == ["--x"]
    assert not set(bench_serving.OURS) & set(session.env)
    assert session.env["SGLANG_MXFP8_CONFIG_DIR"] == "x"
    assert "bf16" not in session.servers and "auto" not in session.servers
    flags = "r --model m --bf16-model b --servers auto triton"
    assert parse_arguments(flags.split()).servers == ["bf16", "auto", "triton"]
    with pytest.raises(SystemExit):
        parse_arguments(["r", "--rehearse", "--model", str(tmp_path / "none")])
    assert "none: ./scripts/serve.sh --ask" in capsys.readouterr().err


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    session = parse_arguments([str(tmp_path), *"--model m --bf16-model b".split()])
    session.servers, session.repeats = ["bf16", "auto"], 2
    made, failing = [], {"1-auto"}

    def measure(_, server, folder):
        made.append(folder.name)
        folder.mkdir(exist_ok=True)
        if folder.name in failing:
            raise Failed("no memory\nits log")

    with monkeypatch.context() as patch:
        patch.setattr(bench_serving, "measure", measure)
        assert bench_serving.measure_all(session) == ["FAILED: 1-auto: no memory"]
        assert made == ["1-bf16", "1-auto", "2-auto", "2-bf16"]
        failed = tmp_path / "1-auto" / "failed.txt"
        assert failed.read_text() == "no memory\nits log\n"
        failing.clear()
        assert bench_serving.measure_all(session) == []
        assert not failed.exists()
    # Of a run that is finished no server is started.
    for case in session.cases:
        for n in session.concurrency:
            (tmp_path / "1-auto" / f"{case}-c{n}.jsonl").touch()
    (tmp_path / "1-auto" / "updated.json").touch()
    bench_serving.measure(session, "auto", tmp_path / "1-auto")


def test_another_machine_is_refused_by_name_and_no_path_is_written(tmp_path):
    path = tmp_path / "environment.json"
    session = parse_arguments([str(tmp_path), "--model", "/some/model", "--", "--x=/a"])
    session.env["SGLANG_A"] = "/some/place:~/other/place"
    bench_serving.write_environment(path, bench_serving.describe(session, ["a GPU"]))
    assert re.search(r"(?<!\w)[/~]", path.read_text()) is None
    session.repeats = 9
    bench_serving.write_environment(path, bench_serving.describe(session, ["a GPU"]))
    with pytest.raises(Failed, match=r"\n  gpus: \['a GPU'\] there, \['B'\] here$"):
        bench_serving.write_environment(path, bench_serving.describe(session, ["B"]))
