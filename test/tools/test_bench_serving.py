"""scripts/bench_serving.py without sglang's servers: failures, and what it writes."""

import re

import bench_serving
import pytest
from bench_serving import Failed, describe, parse_arguments, write_environment


def test_servers_and_what_does_not_come_from_the_shell(monkeypatch):
    for name in (*bench_serving.OURS, "SGLANG_MXFP8_CONFIG_DIR"):
        monkeypatch.setenv(name, "x")
    flags = "r --model m --bf16-model b --servers auto triton -- --x"
    session = parse_arguments(flags.split())
    assert session.arguments == ["--x"]
    assert session.servers == ["bf16", "auto", "triton"]
    assert not set(bench_serving.OURS) & set(session.env)
    assert session.env["SGLANG_MXFP8_CONFIG_DIR"] == "x"


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    session = parse_arguments([str(tmp_path), *"--model m --bf16-model b".split()])
    session.servers, session.repeats = ["bf16", "auto"], 2
    made, failed = [], tmp_path / "1-auto" / "failed.txt"

    def measure(_, server, folder):
        folder.mkdir(exist_ok=True)
        made.append(folder.name)
        if made.count("1-auto") == 1 and folder.name == "1-auto":
            raise Failed("no memory\nits log")

    with monkeypatch.context() as patch:
        patch.setattr(bench_serving, "measure", measure)
        assert bench_serving.measure_all(session) == ["FAILED: 1-auto: no memory"]
        assert made == ["1-bf16", "1-auto", "2-auto", "2-bf16"]
        assert failed.read_text() == "no memory\nits log\n"
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
    write_environment(path, describe(session, ["a GPU"]))
    assert re.search(r"(?<!\w)[/~]", path.read_text()) is None
    session.repeats = 9
    write_environment(path, describe(session, ["a GPU"]))
    with pytest.raises(Failed, match=r"\n  gpus: \['a GPU'\] there, \['B'\] here$"):
        write_environment(path, describe(session, ["B"]))
