import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "scripts")]

from small_upstream import CHECKOUT, OVERLAY, TOML, UPSTREAM, write  # noqa: E402


@pytest.fixture
def project(tmp_path):
    """A repository with an overlay, and upstream's wheel in its cache."""
    root = tmp_path / "project"
    write(root, OVERLAY)
    (root / ".cache").mkdir()
    wheel = root / ".cache/sglang-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in UPSTREAM.items():
            archive.writestr(name, text)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (root / "upstream.toml").write_text(TOML.format(sha256=sha256))
    return root


@pytest.fixture
def checkout(tmp_path):
    """A checkout of "upstream", with a test, a pyproject and a page of documentation."""
    root = tmp_path / "checkout"
    package = {f"python/{k}": v for k, v in UPSTREAM.items() if "dist-info" not in k}
    write(root, package | CHECKOUT)
    return root
