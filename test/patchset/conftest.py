import pytest
from small_upstream import CHECKOUT, OVERLAY, TOML, UPSTREAM, make_project, write


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path / "project", OVERLAY, UPSTREAM, TOML)


@pytest.fixture
def checkout(tmp_path):
    """A checkout of "upstream", with a test, a pyproject and a page of documentation."""
    root = tmp_path / "checkout"
    package = {f"python/{k}": v for k, v in UPSTREAM.items() if "dist-info" not in k}
    write(root, package | CHECKOUT)
    return root
