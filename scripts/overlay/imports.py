"""Merges an overlay's module-level imports into upstream's, and tidies the result.

An import of the overlay is added only if the merged text uses it, next to upstream's
import from the same module, else after the imports that open the file; isort then puts
it in its place. Upstream's imports that the merge left unused are removed, those unused
before stay. `from __future__` is never merged: it would change what upstream's own
annotations are.
"""

import ast
from dataclasses import dataclass, field
from typing import Iterator

import black
import isort
import libcst as cst
from overlay.statements import Unplaced, canonical, is_docstring, leaves, source

_ISORT = isort.Config(profile="black", known_first_party=frozenset({"sglang"}))
_IGNORED = ("__future__", "overlay.marks")


@dataclass(frozen=True)
class Import:
    """One imported name: `from module import name as alias`, or without a module
    `import name as alias`."""

    module: str
    name: str
    alias: str = ""

    @property
    def binds(self) -> str:
        return self.alias or (self.name if self.module else self.name.split(".")[0])

    def __str__(self) -> str:
        start = f"from {self.module} import" if self.module else "import"
        return f"{start} {self.name}" + (f" as {self.alias}" if self.alias else "")


TYPE_CHECKING = Import("typing", "TYPE_CHECKING")


@dataclass
class Wanted:
    """What an overlay imports: at run time, for type checking, and from itself."""

    runtime: list[Import] = field(default_factory=list)
    typing: list[Import] = field(default_factory=list)
    relied_on: list[str] = field(default_factory=list)


def split(body, module: str) -> tuple[Wanted, list[cst.BaseStatement]]:
    """An overlay's imports, and its other statements without the docstring."""
    wanted, rest = Wanted(), []
    for at, statement in enumerate(body):
        if at == 0 and is_docstring(statement):
            continue
        if _is_typing_block(statement):
            found = [i for inner in statement.body.body for i in _imports(inner)]
            wanted.relied_on += [i.name for i in found if i.module == module]
            wanted.typing += [i for i in found if i.module != module]
        elif found := _imports(statement):
            wanted.runtime += [i for i in found if i.module not in _IGNORED]
        else:
            rest.append(statement)
    return wanted, rest


def bound(body) -> set[str]:
    """The names that the imports of a module's body bind."""
    return {i.binds for line, _ in _import_lines(body) for i in _imports(line)}


def merge(upstream: cst.Module, merged: cst.Module, wanted: Wanted) -> cst.Module:
    """`merged` with the wanted imports that it uses and without those of `upstream`
    that it no longer does. Raises Unplaced where upstream imports another thing by the
    same name."""
    used, have, typed, conditional = _used(merged.code), set(), set(), set()
    for line, holder in _import_lines(upstream.body):
        place = typed if _is_typing_block(holder) else conditional
        (have if holder is line else place).update(_imports(line))
    runtime = [i for i in wanted.runtime if i.binds in used and i not in have]
    typing = [i for i in wanted.typing if i.binds in used and i not in have | typed]
    if typing and TYPE_CHECKING not in have:
        runtime.append(TYPE_CHECKING)
    for new in runtime + typing:
        for other in have | typed | conditional:
            if other.binds == new.binds and other != new and other.module:
                raise Unplaced(f"has `{other}`, the overlay `{new}`")
    unused = _used(upstream.code) - used - {i.binds for i in runtime}
    gone = {i for i in have | typed | conditional if i.binds in unused}
    gone |= typed & set(runtime)
    body = [kept for s in merged.body if (kept := _without(s, gone)) is not None]
    for new in runtime:
        body.insert(_place(body, new.module), cst.parse_statement(str(new)))
    if typing:
        _add_typing(body, [cst.parse_statement(str(new)) for new in typing])
    return merged.with_changes(body=body)


def tidy(upstream: str, merged: str) -> str:
    """The merged text in upstream's lint format, as far as upstream's text is."""
    if merged == upstream:
        return merged
    for formatted in (
        lambda text: isort.code(text, config=_ISORT),
        lambda text: black.format_str(text, mode=black.Mode()),
    ):
        tidied = formatted(merged)
        if tidied != merged and formatted(upstream) == upstream:
            merged = tidied
    return merged


def _imports(statement: cst.BaseStatement) -> list[Import]:
    if not isinstance(statement, cst.SimpleStatementLine) or len(statement.body) > 1:
        return []
    if not isinstance(statement.body[0], (cst.Import, cst.ImportFrom)):
        return []
    node = ast.parse(canonical(statement)).body[0]
    module = ""
    if isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
    return [Import(module, alias.name, alias.asname or "") for alias in node.names]


def _import_lines(body) -> Iterator[tuple[cst.BaseStatement, cst.BaseStatement]]:
    """A module's import lines, each with the `if` or `try` around it, or itself."""
    for statement in body:
        for line in leaves(statement):
            if _imports(line):
                yield line, statement


def _is_typing_block(statement) -> bool:
    return isinstance(statement, cst.If) and source(statement.test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    )


def _used(text: str) -> set[str]:
    """The names that a text reads, also in annotations that are strings."""
    names, trees = set(), [ast.parse(text)]
    while trees:
        for node in ast.walk(trees.pop()):
            if isinstance(node, ast.Name):
                names.add(node.id)
            for note in (getattr(node, a, None) for a in ("annotation", "returns")):
                for part in ast.walk(note) if note else ():
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        trees += _parsed(part.value)
    return names


def _parsed(text: str) -> list[ast.AST]:
    """A string in an annotation may be a name, or words for `Literal` and `Annotated`."""
    try:
        return [ast.parse(text, mode="eval")]
    except SyntaxError:
        return []


def _without(statement, gone: set[Import]):
    """A statement without these imports; None where nothing is left of it."""
    for line, _ in _import_lines([statement]):
        present = _imports(line)
        kept = [i not in gone for i in present]
        if all(kept):
            continue
        if not any(kept):
            new = cst.RemoveFromParent()
        else:
            names = [a for a, keep in zip(line.body[0].names, kept) if keep]
            names[-1] = names[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
            new = line.deep_replace(
                line.body[0], line.body[0].with_changes(names=names)
            )
        if line is statement:
            return None if not any(kept) else new
        statement = statement.deep_replace(line, new)
    if (
        isinstance(statement, cst.If)
        and not statement.orelse
        and not statement.body.body
    ):
        return None
    return statement


def _place(body: list, module: str) -> int:
    """Where to import from a module: after its own import, else after the first ones."""
    opening, place = True, 0
    for at, statement in enumerate(body):
        found = _imports(statement)
        if module and module in [i.module for i in found]:
            return at + 1
        opening = opening and bool(found or is_docstring(statement))
        place = at + 1 if opening else place
    return place


def _add_typing(body: list, lines: list) -> None:
    """Adds to the module's `if TYPE_CHECKING:`, or opens one after the first imports."""
    for at, statement in enumerate(body):
        if _is_typing_block(statement):
            block = statement.body.with_changes(body=[*statement.body.body, *lines])
            body[at] = statement.with_changes(body=block)
            return
    block = cst.If(cst.Name("TYPE_CHECKING"), cst.IndentedBlock(lines))
    blank = [cst.EmptyLine(indent=False)]
    body.insert(_place(body, ""), block.with_changes(leading_lines=blank))
