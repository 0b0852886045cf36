"""The overlay's changes as a patch for upstream, made by git in a repository of its own."""

import os
import subprocess
import tempfile
import textwrap
from pathlib import Path

from overlay import ledger
from overlay.plan import Change
from overlay.release import Config


def patch(changes: list[Change], root: Path, config: Config) -> bytes:
    """A `git am`-able patch. The same changes give the same bytes, save for the author,
    who is git's configured user if there is one."""
    name, email = (_configured(f"user.{key}") for key in ("name", "email"))
    name, email = name or config.commit["name"], email or config.commit["email"]
    with tempfile.TemporaryDirectory() as directory:
        git = _Git(Path(directory), name, email, config.commit["date"])
        git("init", "--quiet")
        git.commit({c.path: c.old for c in changes if c.old is not None}, "base")
        git.commit({c.path: c.new for c in changes}, message(changes, root, config))
        return git(
            "format-patch", "-1", "--stdout", "--no-signature", "--zero-commit",
            "--full-index", "--keep-subject",
        )  # fmt: skip


def message(changes: list[Change], root: Path, config: Config) -> str:
    """Subject and PR body: the reasons in the ledgers, file by file."""
    parts = [config.commit["subject"], config.commit["body"].strip()]
    for change in sorted(changes, key=_rank):
        overlay = root / change.path
        text = (
            overlay.read_text() if overlay.suffix == ".py" and overlay.exists() else ""
        )
        book = ledger.parse(text)
        lines = [change.path + (" (new)" if change.old is None else "")]
        lines += _wrap(book.prose.partition("\n\n")[0], "  ")
        edits = [edit for edit in config.edits if edit["file"] == change.path]
        for why in dict.fromkeys(edit.get("why", "") for edit in edits):
            lines += _wrap(why, "- ")
        for entry in book.entries:
            thread = f" ({entry.thread})" if entry.thread else ""
            lines += _wrap(f"{', '.join(entry.symbols)}: {entry.why}{thread}", "- ")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _rank(change: Change) -> tuple:
    """Edited files, new modules, tests, benchmarks."""
    outside = not change.path.startswith("python/sglang/srt/")
    return (
        change.path.startswith("benchmark/"),
        outside,
        change.old is None,
        change.path,
    )


def _wrap(text: str, bullet: str) -> list[str]:
    return textwrap.wrap(
        text, 72, initial_indent=bullet, subsequent_indent="  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _configured(key: str) -> str:
    told = subprocess.run(["git", "config", key], capture_output=True, text=True)
    return told.stdout.strip()


class _Git:
    """git in one directory, deaf to the user's configuration."""

    def __init__(self, directory: Path, name: str, email: str, date: str):
        self.directory = directory
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("GIT_")},
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
        }
        for role in ("AUTHOR", "COMMITTER"):
            self.environment[f"GIT_{role}_NAME"] = name
            self.environment[f"GIT_{role}_EMAIL"] = email
            self.environment[f"GIT_{role}_DATE"] = date

    def __call__(self, *arguments: str, stdin: bytes = b"") -> bytes:
        done = subprocess.run(
            ["git", *arguments],
            cwd=self.directory,
            env=self.environment,
            input=stdin,
            stdout=subprocess.PIPE,
            check=True,
        )
        return done.stdout

    def commit(self, files: dict[str, bytes], text: str) -> None:
        for path, content in files.items():
            file = self.directory / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        self("add", "--force", ".")
        self("commit", "--quiet", "--allow-empty", "--file=-", stdin=text.encode())
