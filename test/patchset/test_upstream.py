"""The overlay itself on the real releases: patch, check, stacks, a newer release."""

import re
import shutil
from zipfile import ZipFile

import pytest
from overlay import check, diff, lock, release, stack
from overlay.cli import main
from overlay.plan import make_plan
from small_upstream import ROOT, commit, git, snapshot, write

CONFIG, PARTS = stack.read(ROOT, None, None)
RELEASE = CONFIG["release"]["version"]
STACKS = [folder.name for folder in (ROOT / "releases").iterdir()]
PACKAGE = release.PACKAGE
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
}


@pytest.fixture(scope="module")
def tree():
    return release.fetch(RELEASE, CONFIG, ROOT / ".cache")


@pytest.fixture(scope="module")
def plan(tree):
    return make_plan(PARTS, tree)


def test_checkout_with_upstreams_own_test(plan, tmp_path):
    project, checkout = tmp_path / "project", tmp_path / "sglang"
    project.mkdir()
    files = {c.path: c.old.decode() for c in plan.changes if c.old is not None}
    write(checkout, files | UPSTREAM_TREE)
    commit(checkout)
    for file in ("upstream.toml", lock.NAME):
        shutil.copy(ROOT / file, project)
    shutil.copytree(ROOT / "python", project / "python")
    write(project, {GEMM_TEST: (ROOT / GEMM_TEST).read_text()})
    patch = tmp_path / "tree.patch"
    assert main(["diff", "--tree", str(checkout), "--output", str(patch)], project) == 0
    git(checkout, "am", str(patch))
    read = lambda path: (checkout / path).read_text()
    names = re.findall(r"^(?:class (\w+)|if __name__)", read(GEMM_TEST), re.MULTILINE)
    assert names[0] == "TestBlockFP8" and names[-1] == "" and len(names) == 5
    assert read(GEMM_TEST).count("register_cuda_ci(") == 1
    assert 'suite="of-upstream"' in read(GEMM_TEST)
    for name, version in CONFIG["requires"].items():
        assert f'"{name}=={version}"' in read("python/pyproject.toml")


def test_what_others_import_from_merged_modules_is_there(plan, tree):
    """No import that the merge removed was also re-exported."""
    merged = {
        c.path.removesuffix(".py")
        .removeprefix("python/")
        .replace("/", "."): c.new.decode()
        for c in plan.changes
        if c.path.startswith(PACKAGE) and c.old is not None
    }
    with ZipFile(tree.wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith(".py")]
        texts = [archive.read(name).decode() for name in names]
    for text in texts:
        for match in re.finditer(r"from (\S+) import (\([^)]*\)|[^\n(]+)", text):
            if match[1] in merged:
                for name in re.findall(r"(\w+)(?: as \w+)?\s*(?:[,)]|$)", match[2]):
                    assert re.search(rf"\b{name}\b", merged[match[1]]), match[0]


def test_a_newer_release_is_refused_by_name(plan):
    config, [part] = stack.read(ROOT, None, None)
    part.files = {path: f for path, f in part.files.items() if "/fp8" in path}
    newer = make_plan([part], release.fetch("0.5.10.post1", config, ROOT / ".cache"))
    recorded = lock.read(ROOT)[RELEASE]
    told = "\n".join(lock.drift(newer.edited, recorded, RELEASE, lambda: plan.edited))
    for symbol in ("dispatch_w8a8_mxfp8_linear", "flashinfer_mxfp8_quantize"):
        assert re.search(rf"fp8\w*\.py: `{symbol}` is (not the one of|new here)", told)
    assert "\n+++ this tree\n" in told


@pytest.mark.parametrize("version", [RELEASE, *STACKS])
def test_check_passes_and_the_lock_is_up_to_date(version, monkeypatch, capsys):
    """But for the imports: other tests run what is merged."""
    monkeypatch.setattr(check, "interpreter", lambda root, version: None)
    assert main(["check", "--release", version]) == 0
    assert "all edits can be placed" in capsys.readouterr().out
    config, parts = stack.read(ROOT, version, None)
    edited = make_plan(parts, release.fetch(version, config, ROOT / ".cache")).edited
    assert lock.read(ROOT)[version] == lock.hashes(edited), "patchset lock"


@pytest.mark.parametrize("version", STACKS)
def test_each_pull_request_of_a_stack_applies_on_the_one_before(version, tmp_path):
    config, parts = stack.read(ROOT, version, None)
    plan = make_plan(parts, release.fetch(version, config, ROOT / ".cache"))
    write(tmp_path, {c.path: c.old.decode() for c in plan.changes if c.old})
    commit(tmp_path)
    for part, changes in plan.steps:
        git(tmp_path, "am", stdin=diff.patch(changes, part))
        assert not git(tmp_path, "status", "--porcelain")
    files = snapshot(tmp_path)
    assert files == files | {change.path: change.new for change in plan.changes}
