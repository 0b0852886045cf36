"""scripts/evidence.py: what it reads, and what it refuses and says why."""

import base64
import hashlib
import json
import zipfile
from pathlib import Path

import evidence
import pytest
from evidence import ResultsError, load_results
from hypothesis import given
from hypothesis import strategies as st

PLAN = {
    "schema": 1,
    "rehearsal": True,
    "model": "tiny",
    "tp": 1,
    "repeats": 2,
    "revision": {"git": "a" * 40, "dirty": False, "wheel": "b" * 64},
    "servers": [
        {"name": name, "flags": ["--fp8-gemm-backend", name], "env": {}}
        for name in ("triton", "flashinfer_cutlass", "flashinfer_trtllm")
    ],
    "cases": [{"name": "prefill", "input_len": 64, "output_len": 2}],
    "concurrencies": [1, 8],
    "gsm8k": {"questions": 3, "shots": 2, "file": "questions.jsonl"},
    "updates": 2,
}
ENVIRONMENT = {
    "started": "2026-01-01T00:00:00+00:00",
    "gpu": [],
    "cpu": "a CPU",
    "cores": 2,
    "python": "3.12.0",
    "versions": {"sglang": "0.5.9+mxfp8.1"},
    "cuda": None,
    "command": "bench",
}
GSM8K = dict(questions=3, correct=1, invalid=0, accuracy=1 / 3, seconds=2.5)
KERNEL = dict(
    part="gemm", backend="flashinfer_trtllm", layout="8x4", m=1, n=256, k=512,
    us=[1.5, 2], bytes=3, flops=4, device="cpu", rehearsal=True,
)  # fmt: skip


def bench_row(concurrency: int, **changes) -> dict:
    names = evidence.Bench.__dataclass_fields__
    lengths = dict(random_input_len=64, random_output_len=2)
    # bench_serving spells an unlimited rate so.
    others = dict(request_rate=float("inf"), max_concurrency=concurrency)
    return {**dict.fromkeys(names, 3), **lengths, **others, **changes}


def write(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_run(root: Path, repeat: int, server: str) -> Path:
    folder = root / "runs" / f"{repeat}-{server}"
    launch = dict(server=server, repeat=repeat, environment=0, flags=[], env={})
    times = dict(started="2026-01-01T00:00:00+00:00", ready_s=4, routing="")
    write(folder / "launch.json", launch | times)
    for concurrency in PLAN["concurrencies"]:
        row = bench_row(concurrency)
        write(folder / f"bench-prefill-c{concurrency}.jsonl", row)
    write(folder / "gsm8k.json", GSM8K)
    write(folder / "updates.json", {"seconds": [1, 2.5]})
    (folder / "done").touch()
    return folder


@pytest.fixture
def results(tmp_path) -> Path:
    """A complete results folder."""
    write(tmp_path / "plan.json", PLAN)
    write(tmp_path / "environments.jsonl", ENVIRONMENT, ENVIRONMENT)
    for repeat in (1, 2):
        for server in PLAN["servers"]:
            write_run(tmp_path, repeat, server["name"])
    write(tmp_path / "kernels.jsonl", KERNEL)
    return tmp_path


def refusal(root: Path) -> str:
    with pytest.raises(ResultsError) as caught:
        load_results(root)
    return str(caught.value).replace(f"{root}/", "")


def test_a_complete_folder(results):
    loaded = load_results(results)
    assert loaded.missing == ()
    names = [f"{run.launch.repeat}-{run.launch.server}" for run in loaded.runs]
    assert names == [
        "1-triton",
        "1-flashinfer_cutlass",
        "1-flashinfer_trtllm",
        "2-flashinfer_cutlass",
        "2-flashinfer_trtllm",
        "2-triton",
    ]
    run = loaded.runs[0]
    assert list(run.bench) == [("prefill", 1), ("prefill", 8)]
    assert run.bench["prefill", 8].max_concurrency == 8
    assert (run.gsm8k.correct, run.updates) == (1, (1, 2.5))
    assert loaded.kernels[0].us == (1.5, 2)
    assert len(loaded.environments) == 2


def test_what_is_not_done_is_missing(results):
    (results / "runs" / "2-triton" / "done").unlink()
    (results / "kernels.jsonl").unlink()
    loaded = load_results(results)
    assert loaded.missing == ("2-triton",)
    assert len(loaded.runs) == 5
    assert loaded.kernels == ()


def test_what_is_not_planned_may_be_absent(results):
    write(results / "plan.json", {**PLAN, "gsm8k": None, "updates": 0})
    for name in ("gsm8k.json", "updates.json"):
        for path in results.rglob(name):
            path.unlink()
    run = load_results(results).runs[0]
    assert (run.gsm8k, run.updates) == (None, ())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"schema": 2}, "plan.json: schema: Input should be 1"),
        ({"repeats": 0}, "plan.json: repeats: Input should be greater than 0"),
        ({"repeats": "3"}, "plan.json: repeats: Input should be a valid integer"),
        ({"extra": 1}, "plan.json: extra: Unexpected"),
        ({"rehearsal": None}, "plan.json: rehearsal: "),
        ({"cases": [{"name": "a"}]}, "plan.json: cases.0.input_len: Field required"),
        ({"updates": 3}, "updates.json: 2 updates, plan.json says 3"),
        ({"concurrencies": [1, 4]}, "bench-prefill-c4.jsonl: cannot be read"),
    ],
)
def test_plans_that_do_not_fit(results, change, words):
    write(results / "plan.json", PLAN | change)
    assert words in refusal(results)


@pytest.mark.parametrize(
    "name, rows, words",
    [
        ("bench-prefill-c8.jsonl", [], "c8.jsonl: 0 lines instead of one"),
        ("bench-prefill-c8.jsonl", [bench_row(8)] * 2, "2 lines instead of one"),
        ("bench-prefill-c8.jsonl", [bench_row(1)], "measured (64, 2, 1), which"),
        (
            "bench-prefill-c8.jsonl",
            [bench_row(8, median_ttft_ms=float("nan"))],
            "c8.jsonl, line 1: median_ttft_ms: Input should be a finite number",
        ),
        ("bench-prefill-c8.jsonl", [{"a": 1}], "line 1: completed: Field required"),
        ("gsm8k.json", [GSM8K | {"correct": -1}], "gsm8k.json: correct: "),
        ("updates.json", [{"seconds": [1]}], "1 updates, plan.json says 2"),
        ("launch.json", [{}], "launch.json: server: Field required"),
        ("../../environments.jsonl", [], "environments.jsonl has no line 1"),
        ("../../kernels.jsonl", [KERNEL | {"us": "1"}], "kernels.jsonl, line 1: us: "),
        ("../../kernels.jsonl", [KERNEL | {"rehearsal": False}], "rehearsal True"),
    ],
)
def test_files_that_do_not_fit(results, name, rows, words):
    write(results / "runs" / "1-triton" / name, *rows)
    assert words in refusal(results)


def test_a_run_in_the_place_of_another(results):
    runs = results / "runs"
    launch = (runs / "2-triton" / "launch.json").read_text()
    (runs / "1-triton" / "launch.json").write_text(launch)
    assert refusal(results) == "runs/1-triton/launch.json: it is of another run"


def test_no_json_and_no_folder(results, tmp_path):
    (results / "plan.json").write_text('{"schema": 1,')
    assert refusal(results).startswith("plan.json: Invalid JSON: EOF")
    (results / "plan.json").write_bytes(b"\xff")
    assert refusal(results).startswith("plan.json: cannot be read: ")
    assert "plan.json: cannot be read: " in refusal(tmp_path / "no such folder")


def test_dump_is_what_is_read(results):
    plan = evidence.load_plan(results)
    (results / "plan.json").write_text(evidence.dump(plan))
    assert evidence.load_plan(results) == plan
    assert "\n" not in evidence.dump(plan)


# --- The digest ------------------------------------------------------------------------


def record_of(files: dict[str, bytes]) -> str:
    """RECORD as wheels have it."""
    lines = [
        f"{name},sha256={encoded(data)},{len(data)}" for name, data in files.items()
    ]
    return "\n".join([*lines, "sglang-1.dist-info/RECORD,,"])


def encoded(data: bytes) -> str:
    digest = hashlib.sha256(data).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


FILES = {"sglang/a.py": b"a = 1\n", "sglang/b,c.py": b"", "other/x.py": b"x"}


@given(
    files=st.dictionaries(
        st.sampled_from(["sglang/a.py", "sglang/b.py", "sglang/c/d.py"]),
        st.binary(max_size=3),
        min_size=1,
    ),
    data=st.data(),
)
def test_digest_depends_on_the_package_only(files, data):
    digest = evidence.record_digest(record_of(files))
    shuffled = dict(data.draw(st.permutations(list(files.items()))))
    added = {"bin/sglang": b"#!", "sglang-1.dist-info/METADATA": b"1"}
    compiled = "\nsglang/__pycache__/a.pyc,,"
    assert evidence.record_digest(record_of(shuffled | added) + compiled) == digest
    name = data.draw(st.sampled_from(list(files)))
    changed = files | {name: files[name] + b"x"}
    assert evidence.record_digest(record_of(changed)) != digest


def make_wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        quoted = record_of(files).replace("sglang/b,c.py", '"sglang/b,c.py"')
        archive.writestr("sglang-1.dist-info/RECORD", quoted)
    return path


def install(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    metadata = folder / "sglang-1.dist-info" / "METADATA"
    metadata.write_text("Name: sglang\nVersion: 1\n")


def test_wheel_and_installation_have_the_same_digest(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "sglang.whl", FILES)
    install(wheel, tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert evidence.installed_digest() == evidence.wheel_digest(wheel)
    (tmp_path / "site" / "other" / "x.py").write_text("changed")
    assert evidence.installed_digest() == evidence.wheel_digest(wheel)


def test_an_installation_that_was_changed(tmp_path, monkeypatch):
    install(make_wheel(tmp_path / "sglang.whl", FILES), tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    (tmp_path / "site" / "sglang" / "a.py").write_text("a = 2\n")
    with pytest.raises(ResultsError, match="sglang/a.py was changed after"):
        evidence.installed_digest()
    (tmp_path / "site" / "sglang" / "a.py").unlink()
    with pytest.raises(ResultsError, match="sglang/a.py cannot be read"):
        evidence.installed_digest()


def test_what_is_no_wheel(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w"):
        pass
    with pytest.raises(ResultsError, match="a.whl: no wheel: it has 0 RECORD files"):
        evidence.wheel_digest(tmp_path / "a.whl")
    (tmp_path / "b.whl").write_text("text")
    with pytest.raises(ResultsError, match="b.whl: no wheel: "):
        evidence.wheel_digest(tmp_path / "b.whl")
    with pytest.raises(ResultsError, match="lists no file of sglang/"):
        evidence.record_digest("other/x.py,sha256=a,1")
