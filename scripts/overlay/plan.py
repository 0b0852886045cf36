"""What the overlay as a whole does to a tree; nothing here writes.

An overlay file with a ledger edits upstream's file; one without is new. A wheel holds the
package only: edits of upstream's tests and pages are left out. Tests that reach into this
repository, or need a package that upstream lacks, stay here.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from overlay import ledger
from overlay.merge import merge
from overlay.release import PACKAGE, ReleaseError, Tree, substitute

OVERLAY = (PACKAGE, "test/registered/", "benchmark/kernels/")
STAYS = re.compile(r"^\s*(from|import) hypothesis\b|\bparents\[", re.MULTILINE)


@dataclass
class Change:
    """A file of the tree and what it becomes; `old` is None for a new file."""

    path: str
    old: bytes | None
    new: bytes


@dataclass
class Plan:
    """`skipped` has paths with the reason; `edited` upstream's text of every definition
    that an edit changes, by path and symbol. A tree that holds the whole overlay has
    neither changes nor errors."""

    changes: list[Change] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    edited: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def package(self) -> dict[str, bytes]:
        return {c.path: c.new for c in self.changes if c.path.startswith(PACKAGE)}


class Skipped(Exception):
    """A file that this tree leaves out, and why."""


def make_plan(root: Path, tree: Tree, config: dict) -> Plan:
    """Merges every overlay file under `root` into the tree, and collects all problems."""
    plan, absent = Plan(), []
    files = [file for folder in OVERLAY for file in (root / folder).rglob("*.py")]
    steps = [(path.relative_to(root).as_posix(), None) for path in sorted(files)]
    steps += [(edit["file"], edit) for edit in config["edit"] if not tree.wheel]
    old, new = {path: tree.read(path) for path, _ in steps}, {}
    for path, edit in steps:
        try:
            if edit:
                new[path] = _edited(edit, new.get(path, old[path]), tree.label)
            else:
                new[path], missing = _merged(root, path, old[path], tree, plan)
                absent += [f"{path}: {line}" for line in missing]
        except Skipped as reason:
            plan.skipped[path] = str(reason)
        except (ReleaseError, SyntaxError) as error:
            plan.errors += [f"{path}: {line}" for line in str(error).splitlines()]
    plan.changes = [Change(p, old[p], new[p]) for p in new if new[p] != old[p]]
    plan.errors += absent if plan.changes or plan.errors else []
    return plan


def _merged(root: Path, path: str, old: bytes | None, tree: Tree, plan: Plan):
    """The merged file, and what there was not to drop."""
    content = (root / path).read_bytes()
    is_edit = bool(ledger.parse(content.decode()))
    if path.startswith("test/") and STAYS.search(content.decode()):
        raise Skipped("it needs this repository, or hypothesis")
    if old == content or (old is None and not is_edit):
        return content, []
    if old is None and tree.wheel and not path.startswith(PACKAGE):
        raise Skipped("it edits a file that wheels lack")
    if old is None:
        raise ReleaseError(f"{tree.label} has no such file to merge into")
    if not is_edit:
        raise ReleaseError(f"{tree.label} has this file, and ours has no ledger")
    result = merge(old.decode(), content.decode(), tree.label)
    plan.edited[path] = result.edited
    if result.errors:
        raise ReleaseError("\n".join(result.errors + result.absent))
    return result.text.encode(), result.absent


def _edited(edit: dict, old: bytes | None, release: str) -> bytes:
    """The file after one anchored edit; as it is where it has what the edit brings."""
    is_page = edit["file"].startswith("docs/")
    if old is None:
        raise Skipped("no such page") if is_page else ReleaseError("no such file")
    if re.search(edit["present"], old.decode()):
        return old
    try:
        return substitute(edit["find"], edit["replace"], old.decode(), release).encode()
    except ReleaseError as error:
        raise Skipped(str(error)) if is_page else error
