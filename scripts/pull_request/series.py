"""The commits of a pull request, made in a git repository without touching its work tree.

Everything is made with an index and an object store of our own, beside the repository's;
only the finished branch is written into it.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path

from evidence import Results
from overlay import diff
from overlay.plan import Change
from overlay.release import PACKAGE, Config
from pull_request.check import PrError

USER = ("user.name", "user.email")
USERS = ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM")


@dataclass(frozen=True)
class Part:
    """One commit of the series: its subject, what it says of the whole, the reasons
    file by file (paragraphs), and the files that it changes."""

    subject: str
    body: str
    reasons: str
    changes: tuple[Change, ...]

    @property
    def message(self) -> str:
        return f"{self.subject}\n\n{self.body}\n\n{self.reasons}\n"


def split(
    changes: Iterable[Change], commits: list[dict], root: Path, config: Config
) -> tuple[Part, ...]:
    """The changes by commit: each takes the files that match its patterns and that no
    commit before it took. Commits without files are left out."""
    left, parts = list(changes), []
    for commit in commits:
        own = [c for c in left if any(fnmatch(c.path, f) for f in commit["files"])]
        left = [change for change in left if change not in own]
        if own:
            words = {"subject": commit["subject"], "body": commit["body"].strip()}
            named = replace(config, commit=config.commit | words)
            start = f"{words['subject']}\n\n{words['body']}\n\n"
            reasons = diff.message(own, root, named).removeprefix(start).strip()
            parts.append(Part(**words, reasons=reasons, changes=tuple(own)))
    if left:
        paths = ", ".join(change.path for change in left)
        raise PrError(f"upstream.toml's [[pr.commits]] have no place for {paths}")
    return tuple(parts)


class Repository:
    """git in one repository, with an index of its own and no work tree."""

    def __init__(self, path: Path, scratch: Path):
        self.path, self.scratch = path, scratch
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in USERS or not name.startswith("GIT_")
        }
        self.environment = {**kept, "GIT_INDEX_FILE": str(scratch / "index")}

    def divert(self) -> None:
        """From here on new objects go to the scratch folder, and not into this
        repository, until `keep`."""
        own = self.path / self("rev-parse", "--git-path", "objects").decode().strip()
        (self.scratch / "objects").mkdir()
        self.environment["GIT_OBJECT_DIRECTORY"] = str(self.scratch / "objects")
        self.environment["GIT_ALTERNATE_OBJECT_DIRECTORIES"] = str(own.resolve())

    def keep(self) -> None:
        for name in ("GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES"):
            self.environment.pop(name, None)

    def __call__(self, *arguments: str, stdin: bytes = b"") -> bytes:
        done = self.run(*arguments, stdin=stdin)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            raise PrError(f"git {arguments[0]} in {self.path}: {said}")
        return done.stdout

    def run(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess:
        return subprocess.run(
            ["git", "-c", "core.autocrlf=false", *arguments],
            cwd=self.path,
            env=self.environment,
            input=stdin,
            capture_output=True,
            check=False,
        )

    def text(self, *arguments: str) -> str:
        """What git prints; "" if it fails."""
        done = self.run(*arguments)
        return "" if done.returncode else done.stdout.decode().strip()

    def identify(self, name: str, email: str, when: datetime) -> None:
        """Who commits, and when."""
        for role in ("AUTHOR", "COMMITTER"):
            self.environment[f"GIT_{role}_NAME"] = name
            self.environment[f"GIT_{role}_EMAIL"] = email
            self.environment[f"GIT_{role}_DATE"] = f"@{int(when.timestamp())} +0000"

    def commit(self, base: str | None, files: dict[str, bytes], message: str) -> str:
        """A commit of these files on top of `base`; no branch holds it yet."""
        self("read-tree", base or "--empty")
        for path, content in files.items():
            entry = self.text("ls-files", "--stage", "--", path).split()
            mode = entry[0] if entry else "100644"
            blob = self("hash-object", "-w", "--stdin", stdin=content).decode().strip()
            self("update-index", "--add", "--cacheinfo", f"{mode},{blob},{path}")
        tree = self("write-tree").decode().strip()
        parent = ["-p", base] if base else []
        commit = self("commit-tree", tree, *parent, stdin=message.encode())
        return commit.decode().strip()


class Commit:
    """The HEAD of a checkout of sglang: a tree as scripts/overlay reads it."""

    is_checkout = True

    def __init__(self, repository: Repository):
        self.repository = repository
        self.head = repository.text("rev-parse", "--verify", "HEAD^{commit}")
        if not repository.text("ls-tree", "--full-tree", "HEAD", PACKAGE):
            raise PrError(
                f"{repository.path} is no git checkout of sglang: its HEAD has no "
                f"{PACKAGE}"
            )

    @property
    def label(self) -> str:
        described = self.repository.text("describe", "--tags", "--always", "HEAD")
        return f"upstream {described}"

    def read(self, path: str) -> bytes | None:
        done = self.repository.run("cat-file", "blob", f"{self.head}:{path}")
        return None if done.returncode else done.stdout


class Series:
    """The commits of the pull request, in the checkout's repository or, against a
    release, in one of their own."""

    def __init__(
        self,
        tree,
        parts: tuple[Part, ...],
        results: Results,
        config: Config,
        scratch: Path,
    ):
        self.parts = parts
        if isinstance(tree, Commit):
            self.repository = tree.repository
        else:
            self.repository = Repository(scratch / "release", scratch)
            self.repository.path.mkdir()
            self.repository("init", "--quiet")
        self._identify(results, config)
        if tree.is_checkout:
            self.repository.divert()
        self.base = tree.head if tree.is_checkout else self._base(tree.label)
        self.tip = self._commit()

    def _commit(self) -> str:
        tip = self.base
        for part in self.parts:
            files = {change.path: change.new for change in part.changes}
            tip = self.repository.commit(tip, files, part.message)
        return tip

    @property
    def paths(self) -> list[str]:
        return [change.path for part in self.parts for change in part.changes]

    def _base(self, label: str) -> str:
        """A commit of the release's files, as far as they change."""
        changes = [change for part in self.parts for change in part.changes]
        old = {c.path: c.old for c in changes if c.old is not None}
        return self.repository.commit(None, old, label)

    def _identify(self, results: Results, config: Config) -> None:
        """As git is configured; at the time of the last measurement, so that the same
        results give the same commits."""
        name, email = (self.repository.text("config", k) for k in USER)
        self.has_author = bool(name and email)
        if not self.has_author:
            name, email = config.commit["name"], config.commit["email"]
        started = results.environments[-1].started
        try:
            when = datetime.fromisoformat(started)
        except ValueError as error:
            raise PrError(f"environments.jsonl: {started!r} is no time") from error
        self.repository.identify(name, email, when)

    def export(self, directory: Path, settings: dict[str, str]) -> Path:
        """The tip's files in a folder that is a repository too, as linters expect, with
        those of `settings` that are not there."""
        directory.mkdir()
        self.repository("read-tree", self.tip)
        self.repository("checkout-index", "--all", f"--prefix={directory}/")
        for name, text in settings.items():
            if not (directory / name).exists():
                (directory / name).write_text(text.lstrip())
        Repository(directory, directory)("init", "--quiet")
        return directory

    def patches(self) -> dict[str, bytes]:
        """By file name, as `git am` takes them."""
        with tempfile.TemporaryDirectory() as directory:
            self.repository(
                "format-patch", f"{self.base}..{self.tip}", "--quiet", "--zero-commit",
                "--no-signature", "--full-index", "--output-directory", directory,
            )  # fmt: skip
            return {p.name: p.read_bytes() for p in sorted(Path(directory).iterdir())}

    def check_branch(self, name: str) -> None:
        """Raises PrError where the branch cannot be made, or is of other commits."""
        if not self.has_author:
            raise PrError(
                f"git has no author for commits in {self.repository.path}: set "
                "user.name and user.email with git config"
            )
        self.repository("check-ref-format", "--branch", name)
        there = self.repository.text("rev-parse", "--verify", f"refs/heads/{name}")
        if there not in ("", self.tip):
            raise PrError(
                f"{self.repository.path} has a branch {name} of other commits: delete "
                "or rename it, or give another name with --branch"
            )

    def make_branch(self, name: str) -> None:
        """Make the commits in the repository itself, and a branch of them."""
        self.repository.keep()
        ref = f"refs/heads/{name}"
        if not self.repository.text("rev-parse", "--verify", ref):
            tip = self._commit()
            self.repository("update-ref", ref, tip, "0" * len(tip))
