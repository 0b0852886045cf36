"""A small project to merge: an overlay, its upstream.toml, and a wheel of "upstream"."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

from overlay.cli import main

ROOT = Path(__file__).resolve().parents[2]
CORE = "python/sglang/core.py"
WHEEL = ".cache/sglang-1.0-py3-none-any.whl"

TOML = """
[release]
version = "1.0"
sha256 = ["{sha256}"]
patch = 3

[requires]
flashinfer_python = ["1.0", "2.0"]

[commit]
subject = "Teach the package a trick"
body = "It was asked for."
name = "nobody"
email = "nobody@localhost"
date = "2026-01-01T00:00:00Z"
"""

UPSTREAM = {
    "sglang/_version.py": "",
    "sglang/__init__.py": "",
    "sglang/core.py": "CHOICES = ['a']\n\n\ndef run(x):\n    return x\n",
    "sglang/other.py": "def helper():\n    return 1\n\n\ndef kept():\n    return 2\n",
    "sglang/data, with comma.json": "{}\n",
    "sgl_kernel.py": "",  # the real one takes seconds to import
    "sglang-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: sglang\nVersion: 1.0\n"
    "Requires-Dist: flashinfer_python==1.0\n",
    "sglang-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
    "Tag: py3-none-any\n",
    "sglang-1.0.dist-info/RECORD": "",
}

OVERLAY = {
    CORE: '"""\nrun, CHOICES\n    why: b is faster\n    thread: org/repo#7\n'
    '    until: b is everywhere\n"""\n\nfrom overlay.marks import prepend\n\n'
    'CHOICES = ["a", "b"]\n\n\n@prepend\ndef run(x):\n    x = x + 1\n',
    "python/sglang/other.py": '"""\nhelper\n    why: b has its own\n"""\n\n'
    "from overlay.marks import drop\n\n\n@drop\ndef helper(): ...\n",
    "python/sglang/trick.py": '"""The trick."""\n\nVALUE = 1\n',
    "test/registered/test_core.py": '"""\nTestB\n    why: covers b\n"""\n\n\n'
    "class TestB:\n    pass\n",
    "test/registered/test_trick.py": '"""Tests the trick."""\n',
    "test/registered/test_here.py": "Path(__file__).parents[3]\n",
}

CHECKOUT = {
    "python/pyproject.toml": '[project]\ndependencies = [\n  "flashinfer_python==1.0",\n]\n',
    "test/registered/test_core.py": "class TestA:\n    pass\n",
}


def make_project(root: Path) -> Path:
    """A repository with the overlay, and upstream's wheel in its cache; locked."""
    write(root, OVERLAY)
    (root / WHEEL).parent.mkdir()
    with zipfile.ZipFile(root / WHEEL, "w") as archive:
        for name, text in UPSTREAM.items():
            archive.writestr(name, text)
    write(root, {"upstream.toml": with_sha256(root, TOML)})
    assert main(["lock"], root) == 0
    return root


def with_sha256(root: Path, toml: str) -> str:
    digest = hashlib.sha256((root / WHEEL).read_bytes()).hexdigest()
    return toml.replace("{sha256}", digest)


def write(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def snapshot(root: Path) -> dict[str, bytes]:
    return {
        file.relative_to(root).as_posix(): file.read_bytes()
        for file in root.rglob("*")
        if file.is_file() and ".git" not in file.relative_to(root).parts
    }


def git(where: Path, *arguments, stdin: bytes | None = None) -> bytes:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", *arguments]
    options = dict(cwd=where, input=stdin, check=True)
    return subprocess.run(command, stdout=subprocess.PIPE, **options).stdout


def commit(checkout: Path) -> None:
    git(checkout, "init", "-q")
    git(checkout, "add", "--all")
    git(checkout, "commit", "-q", "-m", "base")
