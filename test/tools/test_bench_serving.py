"""scripts/bench_serving.py without sglang's servers: refusals, failures, what it writes."""

import re

import bench_serving
import pytest
from bench_serving import Failed


def parse(*arguments: str):
    return bench_serving.parse_arguments([*arguments])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("r", "--model is needed, or --rehearse"),
        ("r --model m --servers cublas", "there is no 'cublas'"),
        ("r --model m --servers bf16", "bf16 needs --bf16-model"),
        ("r --rehearse --concurrency 0", "begin at 1"),
        ("r --rehearse --model none", "none is missing: ./scripts/serve.sh"),
        ("r --rehearse --gsm8k none.jsonl", "none.jsonl is no file"),
    ],
)
def test_wrong_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit):
        parse(*arguments.split())
    assert words in capsys.readouterr().err


def test_servers_and_what_does_not_come_from_the_shell(monkeypatch):
    for name in (*bench_serving.OURS, "SGLANG_MXFP8_CONFIG_DIR"):
        monkeypatch.setenv(name, "x")
    session = parse("r", "--model", "m")
    assert not set(bench_serving.OURS) & set(session.env)
    assert session.env["SGLANG_MXFP8_CONFIG_DIR"] == "x"
    names = [name for name in bench_serving.SERVERS if name not in ("bf16", "auto")]
    assert session.servers == names
    assert parse("r", "--model", "m", "--bf16-model", "b").servers == ["bf16", *names]
    chosen = parse("r", "--model", "m", "--servers", "auto,triton", "--", "--x")
    assert chosen.servers == ["auto", "triton"] and chosen.arguments == ["--x"]


@pytest.mark.parametrize(
    "arguments, gpus, words",
    [
        ("r --model m --tp 2", ["an H100"], "2 GPUs needed, 1 visible"),
        ("r --model m --servers triton", ["an H100"], "needs an SM100"),
        ("r --rehearse --servers triton", [], "needs an SM100"),
    ],
)
def test_a_machine_without_the_kernels_is_refused(arguments, gpus, words):
    session = parse(*arguments.split())
    session.env["PYTHONPATH"] = bench_serving.EMULATION["PYTHONPATH"]
    with pytest.raises(Failed, match=f"{words}[^$]*--rehearse runs"):
        bench_serving.check_machine(session, gpus)


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    session = parse(
        str(tmp_path), *"--rehearse --repeats 2 --servers bf16,auto".split()
    )
    made, failing = [], {"1-auto"}

    def measure(_, server, folder):
        made.append(folder.name)
        folder.mkdir(exist_ok=True)
        if folder.name in failing:
            raise Failed("no memory\nits log")

    monkeypatch.setattr(bench_serving, "measure", measure)
    assert bench_serving.measure_all(session) == ["FAILED: 1-auto: no memory"]
    assert made == ["1-bf16", "1-auto", "2-auto", "2-bf16"]
    failed = tmp_path / "1-auto" / "failed.txt"
    assert failed.read_text() == f"{bench_serving.REHEARSAL}\nno memory\nits log\n"
    failing.clear()
    assert bench_serving.measure_all(session) == []
    assert not failed.exists()


def test_another_machine_is_refused_by_name_and_no_path_is_written(tmp_path):
    path = tmp_path / "environment.json"
    session = parse(str(tmp_path), "--model", "/some/model", "--", "--x=/a/b")
    session.env["SGLANG_A"] = "/some/place:~/other/place"
    bench_serving.write_environment(path, bench_serving.describe(session, ["a GPU"]))
    assert re.search(r"(?<!\w)[/~]", path.read_text()) is None
    session.repeats = 9
    bench_serving.write_environment(path, bench_serving.describe(session, ["a GPU"]))
    with pytest.raises(Failed, match=r"\n  gpus: \['a GPU'\] there, \['B'\] here$"):
        bench_serving.write_environment(path, bench_serving.describe(session, ["B"]))
