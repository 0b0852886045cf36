"""Which edits go with a release.

`releases/VERSION` holds a stack: a folder for each pull request, applied on the one before,
with its edits and a pr.toml: `subject`, `body`, and `new`, the new files that it brings from
the root, where they are once. Any other release gets the edits at the root, in one part.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from overlay.release import PACKAGE, ReleaseError

OVERLAY = (PACKAGE, "test/registered/", "benchmark/kernels/")


@dataclass
class Part:
    """One commit: its message, its files by the path that they get, its pins."""

    name: str
    commit: dict
    files: dict[str, Path]
    requires: dict[str, list[str]]


def read(root: Path, version: str | None, upto: int | None) -> tuple[dict, list[Part]]:
    """The release's upstream.toml and its parts, all or the first ones."""
    folder = root / "releases" / (version or "")
    load = lambda file: tomllib.loads(file.read_text())
    if not version or not folder.is_dir():
        config = load(root / "upstream.toml")
        return config, [Part("", config["commit"], _files(root), config["requires"])]
    config, parts = load(folder / "upstream.toml"), []
    for pr in sorted(folder.glob("[1-9]-*/")):
        own = load(pr / "pr.toml")
        files = {path: root / path for path in own.get("new", ())} | _files(pr)
        commit = config["commit"] | own
        parts.append(Part(pr.name, commit, files, config["requires"]))
    if upto and upto > len(parts):
        raise ReleaseError(f"{folder} has {len(parts)} pull requests, not {upto}")
    return config, parts[:upto]


def _files(root: Path) -> dict[str, Path]:
    files = [file for folder in OVERLAY for file in (root / folder).rglob("*.py")]
    return {file.relative_to(root).as_posix(): file for file in sorted(files)}
