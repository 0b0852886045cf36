"""What the overlay as a whole does to a tree; nothing here writes.

Its parts (stack.py) are applied one on another. A file with a ledger edits upstream's, one
without is new. Of a wheel, edits of upstream's tests are left out. Tests that reach into
this repository stay here.
"""

from dataclasses import dataclass, field
from pathlib import Path

from overlay import ledger
from overlay.merge import merge
from overlay.release import PACKAGE, ReleaseError, Tree, pinned
from overlay.stack import Part

PYPROJECT = "python/pyproject.toml"
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
    pins = [PYPROJECT] if part.requires and not tree.wheel else []
    old = {path: files.get(path, tree.read(path)) for path in [*part.files, *pins]}
    new = {}
    for path in old:
        try:
            if path == PYPROJECT:
                text = pinned(old[path].decode(), part.requires, tree.label)
                new[path] = text.encode()
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
