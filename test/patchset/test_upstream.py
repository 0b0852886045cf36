"""The overlay itself on the real releases: wheel, patch, lint, and newer releases."""

import hashlib
import re
import shutil
import subprocess
import sys
from base64 import urlsafe_b64encode
from collections import Counter
from csv import reader
from email import message_from_bytes
from io import StringIO
from zipfile import ZipFile

import pytest
from overlay import diff, release
from overlay.cli import main
from overlay.plan import make_plan
from small_upstream import ROOT, commit, git, snapshot, write

CONFIG = release.load_config(ROOT)
GEMM_TEST = "test/registered/quant/test_fp8_blockwise_gemm.py"
UPSTREAM_TREE = {  # of the shape of upstream's files, which the wheel lacks
    GEMM_TEST: "import unittest\n\n"
    "from sglang.test.ci.ci_register import register_cuda_ci\n\n"
    'register_cuda_ci(est_time=100, suite="of-upstream")\n\n\n'
    "class TestBlockFP8(unittest.TestCase):\n"
    "    def test_it(self):\n        pass\n\n\n"
    'if __name__ == "__main__":\n    unittest.main()\n',
    "python/pyproject.toml": '[project]\nname = "sglang"\ndependencies = [\n'
    '  "flashinfer_python==0.6.3", # in step with jit-cache\n'
    '  "flashinfer_cubin==0.6.3",\n  "torch==2.9.1",\n]\n',
    "docs/advanced_features/server_arguments.md": "| Argument | Options |\n| --- | --- |\n"
    "| `--fp4-gemm-backend` | `auto`, `flashinfer_trtllm`, `cutlass` |\n"
    "| `--fp8-gemm-backend` | `auto`, `flashinfer_trtllm`, `cutlass` |\n",
    "docs/advanced_features/quantization.md": "### `--fp8-gemm-backend`\n\n"
    "| Backend | Hardware | Description |\n| --- | --- | --- |\n"
    "| `flashinfer_trtllm` | SM100 | |\n\n### `--fp4-gemm-backend`\n\n"
    "| Backend | Hardware | Description |\n| --- | --- | --- |\n"
    "| `flashinfer_trtllm` | SM100 | |\n",
}


@pytest.fixture(scope="module")
def wheel():
    return release.fetch(CONFIG.release["version"], CONFIG, ROOT / ".cache")


@pytest.fixture(scope="module")
def plan(wheel):
    plan = make_plan(ROOT, wheel, CONFIG)
    assert not plan.errors
    return plan


@pytest.fixture(scope="module")
def upstream(plan, tmp_path_factory):
    """A checkout with those of upstream's files that the overlay changes."""
    root = tmp_path_factory.mktemp("checkout")
    files = {c.path: c.old.decode() for c in plan.changes if c.old is not None}
    write(root, files | UPSTREAM_TREE)
    commit(root)
    return root


@pytest.fixture
def checkout(upstream, tmp_path):
    shutil.copytree(upstream, tmp_path / "sglang")
    return tmp_path / "sglang"


def test_patch_restores_and_gives_the_merged_bytes(plan, checkout, tmp_path):
    before = snapshot(checkout)
    patch = tmp_path / "release.patch"
    patch.write_bytes(diff.patch(plan.changes, ROOT, CONFIG))
    git(checkout, "apply", "--check", str(patch))
    git(checkout, "am", str(patch))
    assert snapshot(checkout) == before | {c.path: c.new for c in plan.changes}
    git(checkout, "apply", "--reverse", str(patch))
    assert snapshot(checkout) == before


def test_wheel_is_what_its_record_says(plan, wheel, tmp_path):
    changed = {
        c.path: c.new for c in plan.changes if c.path.startswith(release.PACKAGE)
    }
    built = release.repack(wheel, changed, CONFIG, tmp_path)
    assert built.name == f"sglang-{CONFIG.version}-py3-none-any.whl"
    with ZipFile(built) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    info = f"sglang-{CONFIG.version}.dist-info"
    record = list(reader(StringIO(files[f"{info}/RECORD"].decode())))
    assert {name for name, _, _ in record} == set(files)
    for name, digest, size in record[:-1]:
        sha256 = hashlib.sha256(files[name]).digest()
        assert digest == f"sha256={urlsafe_b64encode(sha256).decode().rstrip('=')}"
        assert int(size) == len(files[name])
    metadata = message_from_bytes(files[f"{info}/METADATA"])
    assert metadata["Version"] == CONFIG.version
    requires = metadata.get_all("Requires-Dist")
    for name, version in CONFIG.requires.items():
        assert f"{name}=={version}" in requires
    with ZipFile(wheel.path) as archive:
        kept = {n for n in archive.namelist() if ".dist-info/" not in n}
        kept -= {path.removeprefix("python/") for path in changed} | {
            "sglang/_version.py"
        }
        assert all(archive.read(name) == files[name] for name in kept)


def test_checkout_with_upstreams_own_test_and_pages(checkout, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(ROOT / "upstream.toml", project)
    shutil.copytree(ROOT / "python", project / "python")
    write(project, {GEMM_TEST: (ROOT / GEMM_TEST).read_text()})
    patch = tmp_path / "tree.patch"
    assert main(["diff", "--tree", str(checkout), "--output", str(patch)], project) == 0
    git(checkout, "am", str(patch))
    read = lambda path: (checkout / path).read_text()
    names = re.findall(r"^(?:class (\w+)|if __name__)", read(GEMM_TEST), re.MULTILINE)
    assert names == [
        "TestBlockFP8",
        "MXFP8GemmBase",
        "TestMXFP8GemmFlashinferTrtllm",
        "TestMXFP8GemmFlashinferCutlass",
        "",
    ]
    for name, version in CONFIG.requires.items():
        assert f'"{name}=={version}"' in read("python/pyproject.toml")
    assert read(GEMM_TEST).count("register_cuda_ci(") == 1
    assert 'suite="of-upstream"' in read(GEMM_TEST)
    rows = read("docs/advanced_features/server_arguments.md").splitlines()
    assert ["`flashinfer_cutlass`" in row for row in rows[2:]] == [False, True]
    fp8, fp4 = read("docs/advanced_features/quantization.md").split("### `--fp4")
    assert "| `flashinfer_cutlass` |" in fp8 and "flashinfer_cutlass" not in fp4
    patched = snapshot(checkout)
    assert main(["apply", str(checkout)], project) == 0
    assert snapshot(checkout) == patched


def lint(root, files):
    """Ruff's findings by upstream's rules, each without its place in the file."""
    rules = ["check", "--isolated", "--select=F401,F821", "--output-format=concise"]
    for path, content in files.items():
        write(root, {path: content.decode()})
    told = subprocess.run(
        [sys.executable, "-m", "ruff", *rules, "."],
        cwd=root,
        capture_output=True,
        text=True,
    ).stdout
    found = re.findall(r"^(\S+?):\d+:\d+: (\S+ .*)$", told, re.MULTILINE)
    return Counter(found)


def test_merged_files_pass_upstreams_lint(plan, tmp_path):
    import black
    from overlay.imports import tidy

    python = [c for c in plan.changes if c.path.endswith(".py")]
    before = lint(
        tmp_path / "old", {c.path: c.old for c in python if c.old is not None}
    )
    after = lint(tmp_path / "new", {c.path: c.new for c in python})
    assert not after - before
    for change in python:
        text = change.new.decode()
        assert black.format_str(text, mode=black.Mode()) == text, change.path
        assert tidy("", text) == text, change.path


def test_nothing_that_upstream_used_is_left_unused(plan, wheel):
    """No function or method that only dropped code called."""
    with ZipFile(wheel.path) as archive:
        names = [n for n in archive.namelist() if n.endswith(".py")]
        package = {f"python/{n}": archive.read(n).decode() for n in names}
    patched = package | {
        c.path: c.new.decode()
        for c in plan.changes
        if c.path.startswith(release.PACKAGE)
    }
    definitions = {
        name
        for change in plan.changes
        if change.path in package
        for name in re.findall(r"^ *(?:def|class) (\w+)", patched[change.path], re.M)
    }
    words = [
        Counter(word for text in texts.values() for word in re.findall(r"\w+", text))
        for texts in (package, patched)
    ]
    dead = [n for n in definitions if words[1][n] == 1 and words[0][n] > 1]
    assert not dead


def test_what_others_import_from_merged_modules_is_there(plan, wheel):
    """No import that the merge removed was also re-exported."""
    merged = {
        c.path.removesuffix(".py")
        .removeprefix("python/")
        .replace("/", "."): c.new.decode()
        for c in plan.changes
        if c.path.startswith(release.PACKAGE) and c.old is not None
    }
    with ZipFile(wheel.path) as archive:
        names = [n for n in archive.namelist() if n.endswith(".py")]
        texts = [archive.read(name).decode() for name in names]
    for text in texts:
        for match in re.finditer(r"from (\S+) import (\([^)]*\)|[^\n(]+)", text):
            if match[1] in merged:
                for name in re.findall(r"(\w+)(?: as \w+)?\s*(?:[,)]|$)", match[2]):
                    assert re.search(rf"\b{name}\b", merged[match[1]]), match[0]


@pytest.mark.parametrize("version", ["0.5.10.post1", "0.5.11", "0.5.16"])
def test_newer_releases_get_a_report(version, capsys):
    code = main(["check", "--release", version])
    told = capsys.readouterr().err
    assert "python/sglang/srt/layers/quantization/fp8" in told
    if code:
        assert "nothing is written" in told
        assert f"upstream {version}" in told
    assert "Traceback" not in told
