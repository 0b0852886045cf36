"""The overlay itself on the real releases: patch, check, stacks, a newer release."""

import re
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
NOT_IN_WHEELS = {  # of the shape of upstream's files
    "test/registered/quant/test_fp8_blockwise_gemm.py": "class TestBlockFP8:\n    pass\n",
    "python/pyproject.toml": "[project]\ndependencies = [\n"
    '  "flashinfer_python==0.6.3", # in step with jit-cache\n'
    '  "flashinfer_cubin==0.6.3",\n  "torch==2.9.1",\n]\n',
}


@pytest.fixture(scope="module")
def tree():
    return release.fetch(RELEASE, CONFIG, ROOT / ".cache")


@pytest.fixture(scope="module")
def plan(tree):
    return make_plan(PARTS, tree)


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


@pytest.mark.parametrize("version", [RELEASE, *STACKS])
def test_patches_apply_to_a_checkout_one_on_another(version, tmp_path):
    config, parts = stack.read(ROOT, version, None)
    plan = make_plan(parts, release.fetch(version, config, ROOT / ".cache"))
    write(tmp_path, {c.path: c.old.decode() for c in plan.changes if c.old})
    write(tmp_path, NOT_IN_WHEELS)
    commit(tmp_path)
    plan = make_plan(parts, release.checkout(tmp_path))
    assert not plan.errors
    for part, changes in plan.steps:
        git(tmp_path, "am", stdin=diff.patch(changes, part))
        assert not git(tmp_path, "status", "--porcelain")
    files = snapshot(tmp_path)
    assert files == files | {change.path: change.new for change in plan.changes}
    if version == RELEASE:
        assert NOT_IN_WHEELS.keys() <= {change.path for change in plan.changes}
