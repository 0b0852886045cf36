"""What the overlay as a whole does to a tree; nothing here writes.

Its parts (stack.py) are applied one on another. A file with a ledger edits upstream's, one
without is new. Of a wheel, edits of upstream's tests and pages are left out. Tests that
reach into this repository stay here.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from overlay import ledger
from overlay.merge import merge
from overlay.release import PACKAGE, ReleaseError, Tree, substitute
from overlay.stack import Part

STAYS = ".parents["  # a path to the root


@dataclass
class Change:
    """A file of the tree and what it becomes; `old` is None for a new file."""

    path: str
    old: bytes | None
    new: bytes


@dataclass
class Plan:
    """`steps` has the changes of each part, `changes` those of all together; `absent` what
    there was not to drop, an error unless the tree holds the overlay already; `skipped` paths
    with the reason; `edited` upstream's text of what an edit changes, by path and symbol.
    """

    changes: list[Change] = field(default_factory=list)
    steps: list[tuple[Part, list[Change]]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    edited: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def package(self) -> dict[str, bytes]:
        return {c.path: c.new for c in self.changes if c.path.startswith(PACKAGE)}


class Skipped(Exception):
    """A file that this tree leaves out, and why."""


def make_plan(parts: list[Part], tree: Tree) -> Plan:
    """Merges every file of the parts into the tree, and collects all problems."""
    plan, files = Plan(), {}
    for part in parts:
        changes = _step(part, tree, files, plan)
        files |= {change.path: change.new for change in changes}
        plan.steps.append((part, changes))
    was = {path: tree.read(path) for path in files}
    plan.changes = [Change(p, was[p], files[p]) for p in files if files[p] != was[p]]
    plan.errors += plan.absent if plan.changes or plan.errors else []
    return plan


def _step(part: Part, tree: Tree, files: dict[str, bytes], plan: Plan) -> list[Change]:
    """The changes of one part, where the parts before it have left `files`."""
    steps = [(path, None) for path in part.files]
    steps += [(edit["file"], edit) for edit in part.edits if not tree.wheel]
    old = {path: files.get(path, tree.read(path)) for path, _ in steps}
    new = {}
    for path, edit in steps:
        try:
            if edit:
                new[path] = _edited(edit, new.get(path, old[path]), tree.label)
            else:
                new[path] = _merged(part.files[path], path, old[path], tree, plan)
        except Skipped as reason:
            plan.skipped[path] = str(reason)
        except (ReleaseError, SyntaxError) as error:
            plan.errors += [f"{path}: {line}" for line in str(error).splitlines()]
    return [Change(p, old[p], new[p]) for p in new if new[p] != old[p]]


def _merged(file: Path, path: str, old: bytes | None, tree: Tree, plan: Plan) -> bytes:
    content = file.read_bytes()
    is_edit = bool(ledger.parse(content.decode()))
    if path.startswith("test/") and STAYS in content.decode():
        raise Skipped("it needs this repository")
    if old == content or (old is None and not is_edit):
        return content
    if old is None and tree.wheel and not path.startswith(PACKAGE):
        raise Skipped("it edits a file that wheels lack")
    if old is None:
        raise ReleaseError(f"{tree.label} has no such file to merge into")
    if not is_edit:
        raise ReleaseError(f"{tree.label} has this file, and ours has no ledger")
    result = merge(old.decode(), content.decode(), tree.label)
    plan.edited[path] = result.edited | plan.edited.get(path, {})  # upstream's own
    plan.absent += [f"{path}: {line}" for line in result.absent]
    if result.errors:
        raise ReleaseError("\n".join(result.errors))
    return result.text.encode()


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
