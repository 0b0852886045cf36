"""Upstream's releases: what upstream.toml pins, the wheels, and checkouts of the source."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "python/sglang/"


class ReleaseError(Exception):
    """A release, wheel or checkout that is not what it should be."""


@dataclass
class Tree:
    """A folder like the root of sglang's repository; of a wheel, with the package only."""

    path: Path
    label: str
    version: str  # that it is at or after, or "" where nothing says so
    wheel: Path | None = None
    unpacked: tempfile.TemporaryDirectory | None = None

    def read(self, path: str) -> bytes | None:
        file = self.path / path
        return file.read_bytes() if file.is_file() else None

    def copy_package(self, folder: Path, changed: dict[str, bytes]) -> None:
        """Copies `python/sglang` to a folder, with other contents for some files."""
        shutil.copytree(self.path / "python", folder / "python", dirs_exist_ok=True)
        write(folder, changed)


def write(folder: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def checkout(path: Path) -> Tree:
    """A working tree of sglang's repository. Raises ReleaseError for another folder."""
    parts = (PACKAGE, "python/pyproject.toml", "test")
    if missing := [part for part in parts if not (path / part).exists()]:
        raise ReleaseError(f"{path} is no checkout of sglang: no {', '.join(missing)}")
    describe = ["git", "-C", str(path), "describe", "--tags", "--always"]
    told = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    found = re.match(r"v(\d[\w.]*)", told)
    return Tree(path, f"upstream {told or 'checkout'}", found[1] if found else "")


def fetch(version: str, config: dict, cache: Path) -> Tree:
    """A release: from the cache, if the wheel there has the pinned sha256, or the index."""
    tags = "py3", f"cp3{sys.version_info.minor}"
    for wheel in (w for t in tags for w in cache.glob(f"sglang-{version}-{t}-*.whl")):
        if not (problem := _problem(wheel, version, config)):
            return _unpacked(wheel, version)
        print(f"{problem}: fetching it again", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        if not (new := download(version, Path(folder))):
            raise ReleaseError(f"sglang {version} could not be fetched")
        if problem := _problem(new, version, config):
            raise ReleaseError(f"{problem}, as the package index has it")
        return _unpacked(new.replace(cache / new.name), version)


def download(version: str, folder: Path) -> Path | None:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps"]
    pip += ["--only-binary=:all:", "--dest", str(folder), f"sglang=={version}"]
    subprocess.run(pip, stdout=2)  # stdout is for the patch
    return next(folder.glob("*.whl"), None)


def _problem(wheel: Path, version: str, config: dict) -> str:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    pinned = config["release"]
    if version == pinned["version"] and digest not in pinned["sha256"]:
        return f"{wheel}: sha256 is {digest}, not upstream.toml's"
    return "" if zipfile.is_zipfile(wheel) else f"{wheel} is damaged"


def _unpacked(wheel: Path, version: str) -> Tree:
    folder = tempfile.TemporaryDirectory()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(Path(folder.name, "python"))
    return Tree(Path(folder.name), f"upstream {version}", version, wheel, folder)


def repack(tree: Tree, changed: dict[str, bytes], config: dict, folder: Path) -> Path:
    """Writes upstream's wheel with the changed files, our version and our pins. The same
    changes give the same bytes."""
    version = f"{tree.version}+mxfp8.{config['release']['patch']}"
    numbers = (*map(int, tree.version.split(".")), version.split("+")[1])
    with tempfile.TemporaryDirectory() as unpacked:
        tree.copy_package(Path(unpacked), changed)
        top = Path(unpacked, "python")
        (top / "sglang/_version.py").write_text(
            f"__version__ = version = {version!r}\n"
            f"__version_tuple__ = version_tuple = {numbers!r}\n"
        )
        info = top / f"sglang-{tree.version}.dist-info"
        info = info.rename(top / f"sglang-{version}.dist-info")
        text = pinned((info / "METADATA").read_text(), config["requires"], "METADATA")
        text, count = re.subn(r"(?m)^Version: \S+$", f"Version: {version}", text)
        if count != 1:
            raise ReleaseError(f"METADATA has {count} lines `Version: `")
        (info / "METADATA").write_text(text)
        pack = [sys.executable, "-m", "wheel", "pack", str(top), "-d", str(folder)]
        fixed_date = os.environ | {"SOURCE_DATE_EPOCH": "315532800"}
        subprocess.run(pack, check=True, env=fixed_date, stdout=2)
    return folder / tree.wheel.name.replace(tree.version, version)


def pinned(text: str, requires: dict[str, list[str]], where: str) -> str:
    """`text` with the second version of each package for the first; ReleaseError where it
    does not pin one of them, once."""
    for name, (old, new) in requires.items():
        pin = rf"\b{name}==({re.escape(old)}|{re.escape(new)})(?![\w.])"
        text, count = re.subn(pin, f"{name}=={new}", text)
        if count != 1:
            raise ReleaseError(f"{where} pins {name} {count} times to {old} or {new}")
    return text
