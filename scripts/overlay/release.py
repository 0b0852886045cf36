"""Upstream's releases: what upstream.toml pins, the wheels, and checkouts of the source.

A tree, wheel or checkout, answers `read` by paths from the root of sglang's repository.
"""

import base64
import hashlib
import io
import re
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "python/sglang/"


class ReleaseError(Exception):
    """A release, wheel or checkout that is not what it should be."""


@dataclass(frozen=True)
class Config:
    """upstream.toml, by section."""

    release: dict
    requires: dict
    commit: dict
    edits: list

    @property
    def version(self) -> str:
        return f"{self.release['version']}+mxfp8.{self.release['patch']}"


def load_config(root: Path) -> Config:
    data = tomllib.loads((root / "upstream.toml").read_text())
    return Config(data["release"], data["requires"], data["commit"], data["edit"])


@dataclass
class Wheel:
    """A release as its wheel has it: the package only, no tests and no documentation."""

    path: Path
    version: str
    is_checkout = False

    @property
    def label(self) -> str:
        return f"upstream {self.version}"

    def read(self, path: str) -> bytes | None:
        if not path.startswith(PACKAGE):
            return None
        with zipfile.ZipFile(self.path) as archive:
            try:
                return archive.read(path.removeprefix("python/"))
            except KeyError:
                return None


@dataclass
class Checkout:
    """A working tree of sglang's repository."""

    path: Path
    is_checkout = True

    def __post_init__(self) -> None:
        if not (self.path / PACKAGE).is_dir():
            raise ReleaseError(f"{self.path} is not a checkout of sglang: no {PACKAGE}")

    @property
    def label(self) -> str:
        describe = ["git", "-C", str(self.path), "describe", "--tags", "--always"]
        told = subprocess.run(describe, capture_output=True, text=True)
        return f"upstream {told.stdout.strip() or 'checkout'}"

    def read(self, path: str) -> bytes | None:
        file = self.path / path
        return file.read_bytes() if file.is_file() else None


def fetch(version: str, config: Config, cache: Path) -> Wheel:
    """The wheel of a release, from the cache or the package index. The pinned release's
    must have its sha256."""
    found = sorted(cache.glob(f"sglang-{version}-*.whl"))
    if not found:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps"]
        pip += ["--only-binary=:all:", "--dest", str(cache), f"sglang=={version}"]
        if subprocess.run(pip, stdout=2).returncode:  # stdout is for the patch
            raise ReleaseError(f"sglang {version} could not be fetched")
        found = sorted(cache.glob(f"sglang-{version}-*.whl"))
    wheel = found[0]
    if version == config.release["version"]:
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != config.release["sha256"]:
            raise ReleaseError(f"{wheel}: sha256 is {digest}, not upstream.toml's")
    return Wheel(wheel, version)


def repack(
    wheel: Wheel, changed: dict[str, bytes], config: Config, output: Path
) -> Path:
    """Writes upstream's wheel with the changed files, our version and our pins."""
    old, new = f"sglang-{wheel.version}", f"sglang-{config.version}"
    files = _members(wheel.path)
    for path, content in changed.items():
        files[path.removeprefix("python/")] = content
    _edit_versions(files, f"{old}.dist-info/METADATA", wheel.version, config)
    files = {
        n.replace(f"{old}.dist-info/", f"{new}.dist-info/"): files[n] for n in files
    }
    del files[f"{new}.dist-info/RECORD"]
    files = {n: files[n] for n in sorted(files, key=lambda n: ".dist-info/" in n)}
    files[f"{new}.dist-info/RECORD"] = _record(files, f"{new}.dist-info/RECORD")
    output.mkdir(parents=True, exist_ok=True)
    target = output / wheel.path.name.replace(old, new)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(
                name
            )  # its date is fixed, so the wheel is reproducible
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o100644 << 16
            archive.writestr(info, content)
    target.write_bytes(buffer.getvalue())
    return target


def substitute(pattern: str, replacement: str, text: str, where: str) -> str:
    """`text` with the pattern's one match replaced; ReleaseError if there is not one."""
    found = len(re.findall(pattern, text))
    if found != 1:
        raise ReleaseError(
            f"{where} has {found or 'no'} match for `{pattern}`, not one"
        )
    return re.sub(pattern, replacement, text)


def _members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {
            i.filename: archive.read(i) for i in archive.infolist() if not i.is_dir()
        }


def _edit_versions(files: dict, metadata: str, version: str, config: Config) -> None:
    ours = config.version
    numbers = ", ".join(
        [*config.release["version"].split("."), repr(ours.split("+")[1])]
    )
    edits = [
        (metadata, rf"(?m)^Version: {re.escape(version)}$", f"Version: {ours}"),
        ("sglang/_version.py", r"(?m)^(__version__ = .*)'.*'$", rf"\g<1>'{ours}'"),
        (
            "sglang/_version.py",
            r"(?m)^(__version_tuple__ = .*)\(.*\)$",
            rf"\1({numbers})",
        ),
    ]
    for name, pin in config.requires.items():
        edits.append(
            (
                metadata,
                rf"(?m)^Requires-Dist: {name}==\S+$",
                f"Requires-Dist: {name}=={pin}",
            )
        )
    for file, pattern, replacement in edits:
        text = files[file].decode()
        files[file] = substitute(pattern, replacement, text, file).encode()


def _record(files: dict[str, bytes], own_name: str) -> bytes:
    lines = []
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
        quoted = f'"{name}"' if "," in name else name
        lines.append(f"{quoted},sha256={digest.decode()},{len(content)}\n")
    return "".join([*lines, f"{own_name},,\n"]).encode()
