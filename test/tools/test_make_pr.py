"""scripts/make_pr.py: what it writes and refuses, on a small upstream and made-up results."""

import ast
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import evidence
import make_pr
import pytest
from overlay import release
from overlay.cli import main as patchset
from overlay.plan import overlay_files
from patchset.small_upstream import make_project, write
from pull_request import lint
from pull_request.body import flow
from pull_request.lint import LintError, make_checks, read_checks, run_checks

ROOT = Path(__file__).parents[2]
SERVERS = ("triton", "flashinfer_cutlass", "flashinfer_trtllm")
FIELDS = evidence.Bench.__dataclass_fields__
GPU = dict(name="MADE-UP GPU", driver="1", memory_mib=1, sm_clock_mhz=1)
GPU |= dict(mem_clock_mhz=1, power_limit_w=1)

TOML = """
[release]
version = "1.0"
sha256 = "{sha256}"
patch = 3

[requires]

[commit]
subject = "Teach the package a trick"
body = "It was asked for."
name = "nobody"
email = "nobody@localhost"

[[edit]]
file = "docs/options.md"
find = '(?m)^(\\| `--gemm` \\| `a`, )(?:`b`, )?'
replace = '\\1`b`, '

[pr]
title = "Teach the package a trick"
branch = "trick"
motivation = "It was asked\\nfor."
elsewhere = "- nowhere"

[[pr.commits]]
subject = "Add the trick"
body = "Nobody calls it\\nyet."
files = ["python/sglang/trick.py"]

[[pr.commits]]
subject = "Use the trick"
body = "By default."
files = ["python/*", "docs/*"]

[[pr.commits]]
subject = "Test the trick"
body = "A test."
files = ["*"]

[[lint.repos]]
repo = "https://github.com/PyCQA/isort"
rev = "7.0.0"
hooks = [{ id = "isort" }]

[[lint.repos]]
repo = "https://github.com/codespell-project/codespell"
rev = "v2.4.1"
hooks = [{ id = "codespell" }]

[lint.setup]
".isort.cfg" = "[settings]\\nprofile = black\\n"
"""
PACKAGE = {
    "sglang/core.py": "CHOICES = ['a']\n\n\ndef run(x):\n    return x\n",
    "sglang/_version.py": "__version__ = version = '1.0'\n"
    "__version_tuple__ = version_tuple = (1, 0)\n",
}
WHEEL = PACKAGE | {
    "sglang-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: sglang\nVersion: 1.0\n",
    "sglang-1.0.dist-info/RECORD": "",
}
OVERLAY = {
    "python/sglang/core.py": '"""\nrun\n    why: tricks are\n        asked for\n'
    '    thread: org/repo#7\n"""\n\nfrom overlay.marks import prepend\n\n\n'
    "@prepend\ndef run(x):\n    x = x + 1\n",
    "python/sglang/trick.py": '"""The trick."""\n\nVALUE = 1\n',
    "test/registered/test_trick.py": '"""Tests the trick."""\n',
}
CHECKOUT = {f"python/{name}": text for name, text in PACKAGE.items()} | {
    "docs/options.md": "| option | choices |\n| --- | --- |\n| `--gemm` | `a`, `c` |\n",
    ".isort.cfg": "[settings]\nprofile = black\n",
}


def git(where: Path, *arguments: str) -> str:
    run = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", *arguments]
    done = subprocess.run(run, cwd=where, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def state(root: Path) -> dict[str, bytes]:
    """All that a folder holds, git's own files too."""
    files = (file for file in sorted(root.rglob("*")) if file.is_file())
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(autouse=True)
def no_identity(monkeypatch):
    """git as on a fresh machine."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


@pytest.fixture
def project(tmp_path) -> Path:
    return make_project(tmp_path / "project", OVERLAY, WHEEL, TOML)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout of upstream, with local changes that are nobody's business."""
    root = tmp_path / "checkout"
    write(root, CHECKOUT)
    git(root, "init", "-q", "-b", "main")
    git(root, "add", "--all")
    git(root, "commit", "-q", "-m", "base")
    git(root, "tag", "v1.0")
    git(root, "config", "user.name", "A Person")
    git(root, "config", "user.email", "person@localhost")
    write(root, {"python/sglang/core.py": "local = 1\n", "untracked": "local"})
    write(root, {"staged": "local"})
    git(root, "add", "staged")
    return root


@pytest.fixture
def results(project, tmp_path) -> Path:
    """A complete folder of made-up results, of the wheel that the project makes."""
    patchset(["wheel", "--output", str(tmp_path / "wheel")], project)
    (wheel,) = (tmp_path / "wheel").iterdir()
    return made_up(tmp_path / "results", evidence.wheel_digest(wheel))


def made_up(root: Path, digest: str) -> Path:
    servers = [{"name": name, "flags": [], "env": {}} for name in SERVERS]
    plan = dict(schema=1, rehearsal=False, model="MADE-UP", tp=1, repeats=2)
    plan |= dict(revision={"git": "a" * 40, "dirty": False, "wheel": digest})
    plan |= dict(cases=[{"name": "prefill", "input_len": 16, "output_len": 8}])
    plan |= dict(servers=servers, concurrencies=[1], updates=2)
    plan |= dict(gsm8k={"questions": 10, "shots": 2, "file": "questions.jsonl"})
    environment = dict(started="2026-11-01T10:00:00+00:00", gpu=[GPU], cpu="c", cores=2)
    environment |= dict(python="3.12", versions={"sglang": "1"}, cuda=None, command="x")
    write_json(root / "plan.json", plan)
    write_json(root / "environments.jsonl", environment)
    for repeat in (1, 2):
        for name in SERVERS:
            write_run(root / "runs" / f"{repeat}-{name}", repeat, name)
    write(root, {"report.md": "# Report\n", "plots/ttft.png": ""})
    return root


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value) + "\n")


def write_run(folder: Path, repeat: int, server: str) -> None:
    launch = dict(server=server, repeat=repeat, environment=0, flags=[], env={})
    launch |= dict(started="2026-11-01T10:00:00+00:00", ready_s=1, routing="")
    row = dict.fromkeys(FIELDS, 3) | dict(random_input_len=16, random_output_len=8)
    gsm8k = dict(questions=10, correct=8, invalid=0, accuracy=0.8, seconds=3)
    write_json(folder / "launch.json", launch)
    write_json(folder / "bench-prefill-c1.jsonl", row | dict(max_concurrency=1))
    write_json(folder / "gsm8k.json", gsm8k)
    write_json(folder / "updates.json", {"seconds": [0.5, 0.75]})
    (folder / "done").touch()


def change(path: Path, **values) -> None:
    write_json(path, json.loads(path.read_text()) | values)


def rehearsed(results: Path) -> Path:
    change(results / "plan.json", rehearsal=True)
    change(results / "environments.jsonl", gpu=[])
    return results


def run(project: Path, results: Path, *arguments) -> int:
    return make_pr.main([str(results), *map(str, arguments)], project)


@pytest.fixture
def refused(project, results, capsys):
    """refused(*arguments): runs it, checks that nothing is written; returns the error."""

    def refused(*arguments) -> str:
        before = state(results)
        assert run(project, results, *arguments) == 1
        assert state(results) == before
        told = capsys.readouterr().err
        assert told.endswith("nothing is written\n") and "Traceback" not in told
        return told

    return refused


def test_branch_and_folder(project, checkout, results, capsys):
    git_before = {"HEAD", "index", "config"}
    before = state(checkout)
    assert run(project, results, "--tree", checkout) == 0
    assert "branch trick" in capsys.readouterr().out
    after = state(checkout)
    assert not before.keys() - after.keys()
    changed = {name for name, content in before.items() if after[name] != content}
    assert not changed and git_before <= {n.removeprefix(".git/") for n in before}
    added = after.keys() - before.keys()
    assert all(n.startswith((".git/objects/", ".git/refs/heads/trick", ".git/logs/"))
               for n in added)  # fmt: skip
    log = git(checkout, "log", "--reverse", "--format=%s|%an|%ae|%cI", "main..trick")
    assert [line.split("|") for line in log.splitlines()] == [
        [subject, "A Person", "person@localhost", "2026-11-01T10:00:00+00:00"]
        for subject in ("Add the trick", "Use the trick", "Test the trick")
    ]
    show = lambda path: git(checkout, "show", f"trick:{path}")
    assert "x = x + 1" in show("python/sglang/core.py")  # HEAD's, not the work tree's
    assert "local" not in show("python/sglang/core.py")
    assert "| `a`, `b`, `c` |" in show("docs/options.md")
    message = git(checkout, "log", "-1", "--format=%B", "trick~1")
    assert "By default." in message and "- run: tricks are asked for" in message
    assert "(org/repo#7)" in message
    files = sorted(path.name for path in (results / "pr").iterdir())
    assert files[0].startswith("0001-Add-the-trick") and len(files) == 5
    assert (results / "pr/title.txt").read_text() == "Teach the package a trick\n"


def test_the_same_again(project, checkout, results):
    assert run(project, results, "--tree", checkout) == 0
    first, branch = state(results / "pr"), git(checkout, "rev-parse", "trick")
    assert run(project, results, "--tree", checkout) == 0
    assert state(results / "pr") == first
    assert git(checkout, "rev-parse", "trick") == branch


def test_patches_give_the_branch(project, checkout, results, tmp_path):
    assert run(project, results, "--tree", checkout) == 0
    git(tmp_path, "clone", "-q", str(checkout), "clone")
    clone = tmp_path / "clone"
    patches = sorted(map(str, (results / "pr").glob("*.patch")))
    git(clone, "am", "-q", *patches)
    trees = [git(where, "rev-parse", f"{ref}^{{tree}}")
             for where, ref in ((clone, "HEAD"), (checkout, "trick"))]  # fmt: skip
    assert trees[0] == trees[1]
    assert git(clone, "log", "-1", "--format=%s") == "Test the trick"


def test_without_a_checkout(project, checkout, results, tmp_path):
    assert run(project, results, "--output", tmp_path / "out") == 0
    assert not (results / "pr").exists()
    git(checkout, "stash", "--include-untracked")
    git(checkout, "am", "-q", *sorted(map(str, (tmp_path / "out").glob("*.patch"))))
    assert "x = x + 1" in (checkout / "python/sglang/core.py").read_text()
    body = (tmp_path / "out/body.md").read_text()
    assert "starts from upstream 1.0, where the files of this change are" in body
    assert "](../results/plots/ttft.png)" in body
    assert "- [ ] Documentation is updated\n" in body


def test_body(project, checkout, results):
    item = (
        "- [ ] Format your code with pre-commit.\n- [ ] Add unit tests\n- [ ] Dance\n"
    )
    write(checkout, {".github/pull_request_template.md": f"## Checklist\n{item}"})
    git(checkout, "add", ".github")
    git(checkout, "commit", "-q", "-m", "template", "--", ".github")
    shutil.copytree(results / "runs/1-triton", results / "runs/1-triton.interrupted-1")
    assert run(project, results, "--tree", checkout) == 0
    body = (results / "pr/body.md").read_text()
    assert re.findall(r"(?m)^## (.+)$", body) == [
        "Motivation",
        "Modifications",
        "Accuracy Tests",
        "Benchmarking and Profiling",
        "Checklist",
    ]
    for text in (
        "It was asked for.\n",
        "Nobody calls it yet.\n",
        "- `run`: tricks are asked for (org/repo#7)\n",
        "**`python/sglang/trick.py`** (new)\n\nThe trick.\n",
        "| triton | 1 | 8 of 10 |",
        "1 x MADE-UP GPU",
        f"revision {'a' * 40}, digest",
        "interrupted and not counted: 1-triton.interrupted-1",
        "/update_weights_from_disk",
        "](../plots/ttft.png)",
        "starts from upstream v1.0-1-g",
        "- [x] Format your code with pre-commit. (passed: isort (isort==7.0.0), ",
        "- [x] Add unit tests (in `test/registered`)\n- [ ] Dance\n",
    ):
        assert text in body, text
    assert "NOT the code measured" not in body and "REHEARSAL" not in body


def test_a_branch_of_other_code_than_was_measured(project, checkout, results):
    moved = PACKAGE["sglang/core.py"].replace("return x", "return x + 0")
    write(checkout, {"python/sglang/core.py": moved})
    git(checkout, "commit", "-q", "--all", "-m", "moved on")
    assert run(project, results, "--tree", checkout) == 0
    body = (results / "pr/body.md").read_text()
    assert (
        "NOT the code measured" in body and "change: `python/sglang/core.py`." in body
    )


def test_rehearsal(project, checkout, results):
    rehearsed(results)
    before = state(checkout)
    assert run(project, results, "--rehearse", "--tree", checkout) == 0
    assert state(checkout) == before
    files = state(results / "pr")
    assert len(files) == 5
    assert all(content.startswith(b"REHEARSAL") for content in files.values())
    assert (
        files["title.txt"] == b"REHEARSAL, NOT TO BE SENT: Teach the package a trick\n"
    )
    assert b"Rehearsed: sglang" in files["body.md"]
    assert b"- [ ] Accuracy and speed are measured\n" in files["body.md"]
    patch = next(results / "pr" / name for name in files if name.endswith(".patch"))
    with pytest.raises(subprocess.CalledProcessError):
        git(checkout, "am", str(patch))


def test_results_that_are_no_evidence(refused, results):
    (results / "runs/2-triton/done").unlink()
    told = refused()
    assert "lacks 1 of its planned runs: 2-triton" in told
    assert "bench_serving_sm100.py" in told


def test_a_rehearsal_for_a_measurement(refused, results):
    assert "is no rehearsal: leave out --rehearse" in refused("--rehearse")
    rehearsed(results)
    assert "is a rehearsal, which says nothing about speed" in refused()


@pytest.mark.parametrize(
    "file, values, words",
    [
        ("plan.json", {"gsm8k": None}, "planned without GSM8K"),
        ("environments.jsonl", {"gpu": []}, "measured on no GPU"),
        ("environments.jsonl", {"started": "noon"}, "'noon' is no time"),
        ("plan.json", {"schema": 2}, "plan.json: schema"),
        ("plan.json", {"servers": [{"name": "triton", "flags": [], "env": {}}]},
         "planned without flashinfer_cutlass, flashinfer_trtllm"),
    ],
)  # fmt: skip
def test_results_of_another_kind(refused, results, file, values, words):
    change(results / file, **values)
    assert words in refused()


def test_results_of_two_gpus(refused, results):
    lines = results / "environments.jsonl"
    other = json.loads(lines.read_text()) | {"gpu": [GPU | {"name": "OTHER GPU"}]}
    lines.write_text(lines.read_text() + json.dumps(other) + "\n")
    assert "measured on MADE-UP GPU and OTHER GPU" in refused()


def test_another_revision(project, refused):
    git(project, "init", "-q")
    git(project, "add", "upstream.toml", "python")
    git(project, "commit", "-q", "-m", "one")
    trick = project / "python/sglang/trick.py"
    trick.write_text(trick.read_text().replace("1", "2"))
    told = refused()
    assert "measured another revision" in told
    assert f"measured   {'a' * 40}, digest" in told
    assert f"this tree  {git(project, 'rev-parse', 'HEAD')}-dirty, digest" in told
    assert "Check out the measured revision" in told


def test_a_report_that_is_missing_or_old(refused, results):
    os.utime(results / "report.md", (1, 1))
    assert "is older than the last run: scripts/report.py" in refused()
    (results / "report.md").unlink()
    assert "report.md: scripts/report.py" in refused()


def test_checkouts_that_do_not_fit(project, checkout, refused, tmp_path):
    git(checkout, "branch", "trick")
    before = state(checkout)
    assert "has a branch trick of other commits" in refused("--tree", checkout)
    assert "git check-ref-format" in refused("--tree", checkout, "--branch", "a..b")
    (tmp_path / "empty").mkdir()
    assert "is no git checkout of sglang" in refused("--tree", tmp_path / "empty")
    assert state(checkout) == before
    git(checkout, "config", "--unset", "user.name")
    assert "set user.name and user.email" in refused("--tree", checkout)


def test_a_checkout_that_has_it_all(project, checkout, results, refused):
    assert run(project, results, "--tree", checkout) == 0
    git(checkout, "checkout", "-q", "--force", "trick")
    assert "has the whole change already" in refused("--tree", checkout)


def test_a_commit_for_every_file(project, refused):
    toml = project / "upstream.toml"
    toml.write_text(toml.read_text().replace('files = ["*"]', "files = []"))
    assert "no place for test/registered/test_trick.py" in refused()


def test_a_folder_of_something_else(refused, tmp_path):
    write(tmp_path / "notes", {"note": "mine"})
    assert "holds no pull request" in refused("--output", tmp_path / "notes")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere"], "is no results folder: it has no plan.json"),
        (["RESULTS", "--branch", "b"], "--branch needs the --tree"),
        (["RESULTS", "--tree", "nowhere"], "--tree nowhere is no folder"),
        ([], "required"),
    ],
)
def test_usage(project, results, arguments, words, capsys):
    arguments = [str(results) if a == "RESULTS" else a for a in arguments]
    with pytest.raises(SystemExit) as exit:
        make_pr.main(arguments, project)
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


def test_upstreams_checks_stop_it(project, checkout, results, refused):
    write(checkout, {lint.CONFIG: CONFIG})
    git(checkout, "add", lint.CONFIG)
    git(checkout, "commit", "-q", "-m", "hooks", "--", lint.CONFIG)
    before = state(checkout)
    told = refused("--tree", checkout)
    assert "black-jupyter (black[jupyter]==26.1.0):" in told
    assert '+CHOICES = ["a"]' in told
    assert state(checkout) == before


CONFIG = """
exclude: ^docs/
repos:
  - repo: https://github.com/psf/black
    rev: 26.1.0
    hooks:
      - id: black-jupyter
  - repo: https://github.com/astral-sh/ruff-pre-commit
    rev: v0.15.1
    hooks:
      - id: ruff
        args: [--select=F401]
        files: ^python/
        exclude: __init__[.]py$
  - repo: https://github.com/pre-commit/mirrors-clang-format
    rev: v20
    hooks:
      - id: clang-format
"""


def test_hooks_as_pre_commit_reads_them():
    checks = read_checks(CONFIG, "here")
    black, ruff = checks.hooks
    assert black.requirement == "black[jupyter]==26.1.0"
    assert ruff.requirement == "ruff==0.15.1"
    assert ruff.command == ("ruff", "check", "--force-exclude", "--select=F401")
    assert checks.others == ("clang-format",)
    paths = ["python/a.py", "python/__init__.py", "test/a.py", "docs/a.py", "a.md"]
    taken = [[hook.takes(path) for path in paths] for hook in checks.hooks]
    assert taken == [[True, True, True, False, False], [True, *[False] * 4]]


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [", "here is not YAML"),
        ("[]", "here cannot be read as pre-commit does"),
        ("repos: []", "here has none of the hooks black"),
        (CONFIG.replace("^python/", "("), "here cannot be read as pre-commit does"),
    ],
)
def test_hooks_that_cannot_be_read(text, words):
    with pytest.raises(LintError, match=words):
        read_checks(text, "here")


def test_failing_checks_say_why(tmp_path):
    checks = make_checks(tomllib.loads(TOML)["lint"], "here")
    write(tmp_path, {"a.py": "import b\nimport a\n", "a.md": "teh\n", "b.py": ""})
    with pytest.raises(LintError) as caught:
        run_checks(checks, tmp_path, ["a.py", "a.md", "b.py"])
    told = str(caught.value)
    assert "isort (isort==7.0.0):" in told and "+import a\n import b" in told
    assert "codespell (codespell==2.4.1):" in told and "a.md:1: teh ==> the" in told
    run_checks(checks, tmp_path, ["b.py"])


def test_a_linter_that_cannot_be_fetched(tmp_path):
    checks = make_checks(tomllib.loads(TOML)["lint"], "here")
    hook = replace(checks.hooks[0], requirement="isort==0.0.0.1")
    write(tmp_path, {"a.py": ""})
    with pytest.raises(LintError, match="isort"):
        run_checks(replace(checks, hooks=(hook,)), tmp_path, ["a.py"])


def test_flow():
    text = "one\ntwo\n\n- three\n  four\n  --five\n- six\n"
    assert flow(text) == "one two\n\n- three four --five\n- six"


def commit_of(path: str) -> int:
    commits = tomllib.loads((ROOT / "upstream.toml").read_text())["pr"]["commits"]
    takes = [any(fnmatch.fnmatch(path, f) for f in c["files"]) for c in commits]
    return takes.index(True)


def test_no_commit_imports_what_a_later_one_adds():
    paths = overlay_files(ROOT)
    modules = {
        path.removeprefix("python/").removesuffix(".py").replace("/", "."): path
        for path in paths
        if path.startswith(release.PACKAGE)
    }
    pairs = [
        (path, modules[name])
        for path in paths
        for name in imported((ROOT / path).read_text())
        if name in modules
    ]
    assert len(pairs) > 30
    assert not [(a, b) for a, b in pairs if commit_of(a) < commit_of(b) and is_new(b)]


def imported(text: str):
    """The modules that a text imports, also inside functions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_new(path: str) -> bool:
    return not re.match(r'"""\n[\w.]+.*\n    why: ', (ROOT / path).read_text())


def test_the_script_runs_on_its_own():
    script = ROOT / "scripts/make_pr.py"
    told = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, check=True
    )
    assert "make_pr.py RESULTS [--tree CHECKOUT]" in told.stdout
