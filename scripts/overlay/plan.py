"""What the overlay as a whole does to a tree; nothing here writes.

An overlay file with a ledger edits upstream's file; one without is a file that upstream
does not have. The wheel holds the package only, so against it the edits of upstream's
tests and documentation are left out.
"""

import difflib
from dataclasses import dataclass, field
from pathlib import Path

import libcst as cst
from overlay import ledger
from overlay.merge import merge
from overlay.release import PACKAGE, Config, ReleaseError, substitute

OVERLAY = (PACKAGE, "test/registered/", "benchmark/kernels/")


@dataclass
class Change:
    """A file of the tree and what it becomes; `old` is None for a new file."""

    path: str
    old: bytes | None
    new: bytes

    @property
    def counts(self) -> tuple[int, int]:
        """Lines added and removed."""
        old = (self.old or b"").decode().splitlines()
        lines = list(difflib.unified_diff(old, self.new.decode().splitlines(), n=0))[2:]
        return sum(l[0] == "+" for l in lines), sum(l[0] == "-" for l in lines)


@dataclass
class Plan:
    changes: list[Change] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def is_applied(self) -> bool:
        """Whether the tree already holds the whole overlay."""
        return not self.changes and not self.errors


def overlay_files(root: Path) -> list[str]:
    return sorted(
        file.relative_to(root).as_posix()
        for directory in OVERLAY
        for file in (root / directory).rglob("*.py")
    )


def make_plan(root: Path, tree, config: Config, only: str = "") -> Plan:
    """Merges every overlay file under `root` into the tree, and collects all problems.
    `only` narrows it to the paths that start so."""
    plan, absent, same = Plan(), [], 0
    release = tree.label
    edits = config.edits if tree.is_checkout else []
    steps = [(path, _merged) for path in overlay_files(root)]
    steps += [(edit["file"], _edited(edit)) for edit in edits]
    steps = [step for step in steps if step[0].startswith(only)]
    pending: dict[str, Change] = {}
    for path, step in steps:
        old = pending[path].new if path in pending else tree.read(path)
        try:
            new, missing = step(root, path, old, tree, release)
        except (ReleaseError, SyntaxError, cst.ParserSyntaxError) as error:
            plan.errors += [f"{path}: {line}" for line in str(error).splitlines()]
            continue
        absent += [f"{path}: {line}" for line in missing]
        if new is None:
            plan.skipped.append(path)
        elif new == old:
            same += 1
        else:
            original = pending[path].old if path in pending else old
            pending[path] = Change(path, original, new)
    plan.changes = list(pending.values())
    if plan.changes or plan.errors:
        plan.errors += absent
    if plan.errors and same and tree.is_checkout:
        plan.errors.append(
            f"{same} of {len(steps)} edits are already in this tree: if it was patched "
            "in part, restore it first"
        )
    return plan


def _merged(root: Path, path: str, old: bytes | None, tree, release: str):
    """One overlay file's result, None if this tree leaves it out, and what is absent."""
    content = (root / path).read_bytes()
    if old == content:
        return content, []
    is_edit = bool(ledger.parse(content.decode()).entries)
    if old is None and not is_edit:
        return content, []
    if old is None and not tree.is_checkout and not path.startswith(PACKAGE):
        return None, []
    if old is None:
        raise ReleaseError(f"{release} has no such file to merge into")
    if not is_edit:
        raise ReleaseError(f"{release} has this file, and the overlay's has no ledger")
    module = path.removeprefix("python/").removesuffix(".py").replace("/", ".")
    result = merge(old.decode(), content.decode(), module, release)
    if result.errors:
        raise ReleaseError("\n".join(result.errors + result.absent))
    return result.text.encode(), result.absent


def _edited(edit: dict):
    """The step of one anchored edit from upstream.toml; a missing page is left out."""

    def step(root: Path, path: str, old: bytes | None, tree, release: str):
        if old is None and path.startswith("docs/"):
            return None, []
        if old is None:
            raise ReleaseError(f"{release} has no such file")
        try:
            text = substitute(edit["find"], edit["replace"], old.decode(), release)
        except ReleaseError:
            if path.startswith("docs/"):
                return None, []
            raise
        return text.encode(), []

    return step
