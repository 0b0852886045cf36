"""Merges one overlay file into upstream's file of the same path, by name.

`merge` knows text only: no files, no releases. The rules, scope by scope (the module,
then the body of each class that both sides have):

- A definition (def, class, `NAME = ...`, `NAME: T = ...`) that upstream has, also inside
  an `if` or `try`, is replaced where it stands, decorators included; comments above it stay
  unless the overlay brings its own. A class that both have is merged member by member; where the
  overlay repeats its bases or decorators, they must be upstream's.
- One that upstream lacks goes after the definition before it in the overlay, or before
  the next one that upstream has, or to the end, but not
  behind `if __name__ == "__main__"`. A new class-level assignment goes after
  the assignments that open the class.
- Decorators from marks.py edit a function or class that upstream has (statements.py).
- `NAME += [...]` adds to upstream's list what it lacks.
- Imports are merged (imports.py). `if TYPE_CHECKING:` imports from the module itself
  name what the overlay relies on; they are checked and left out.

Every edit finds itself in its own result, so merging twice gives the same text. `@drop`
cannot: what it finds absent is reported apart, since only the caller, who sees all
files, can tell a merged tree from one that lacks it.
"""

import ast
import re
from dataclasses import dataclass, field

import libcst as cst
from overlay import imports, ledger, statements
from overlay.statements import Absent, Unplaced, canonical, in_place_of, source

_PURPOSE = {
    "append": "append to",
    "decorate": "decorate",
    "drop": "drop",
    "prepend": "prepend to",
    "splice": "splice into",
    "+=": "add to",
}
_MAIN = "if __name__ == '__main__'"


@dataclass
class Merge:
    """`text` is upstream's source with the overlay in it. It stands only without
    `errors`, and without `absent` (what there was not to drop) unless no file of the
    overlay changes anything."""

    text: str
    errors: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)


def merge(upstream: str, overlay: str, module: str = "", release: str = "") -> Merge:
    """Merges two source texts. `module` is the dotted name both are imported by;
    `release` names `upstream` in errors."""
    result = Merge(upstream)
    old, new = cst.parse_module(upstream), cst.parse_module(overlay)
    wanted, definitions = imports.split(new.body, module)
    scope = _Scope(list(old.body), "", release, result)
    try:
        entries = ledger.parse(overlay).symbols
    except ValueError as error:
        result.errors.append(str(error))
        return result
    for name in wanted.relied_on:
        if not scope.find(name) and name not in imports.bound(old.body):
            result.errors.append(
                f"{release} has no `{name}`, which the overlay relies on"
            )
    scope.merge(definitions)
    for symbol in sorted(scope.touched - entries):
        result.errors.append(f"the ledger has no entry for `{symbol}`")
    for symbol in sorted(entries - scope.seen):
        result.errors.append(f"the ledger's `{symbol}` is not in the overlay")
    try:
        merged = imports.merge(old, old.with_changes(body=scope.body), wanted)
    except Unplaced as error:
        result.errors.append(f"{release} {error}")
    if not result.errors:
        result.text = imports.tidy(upstream, merged.code)
    return result


@dataclass
class _Scope:
    """The body of upstream's module, or of one of its classes, being merged."""

    body: list[cst.BaseStatement]
    prefix: str
    release: str
    result: Merge
    touched: set[str] = field(default_factory=set)  # upstream's symbols that change
    seen: set[str] = field(default_factory=set)  # all symbols of the overlay

    def merge(self, overlay: list[cst.BaseStatement]) -> None:
        overlay = [each for each in overlay if not _registers_tests(each)]
        names = [_name(statement) for statement in overlay]
        # Drops first: heads are of upstream's statements, not of what a splice adds.
        steps = sorted(enumerate(overlay), key=lambda step: _mark(step[1]) != "drop")
        once = set()
        for at, statement in steps:
            if names[at] is None:
                line = canonical(statement).splitlines()[0]
                self.result.errors.append(f"`{line}` is not a definition")
                continue
            symbol, mark = self.prefix + names[at], _mark(statement)
            self.seen.add(symbol)
            try:
                if (symbol, mark) in once and mark not in ("drop", "splice"):
                    raise Unplaced("is in the overlay twice for the same purpose")
                once.add((symbol, mark))
                self._put(names[at], statement, names[:at][::-1], names[at + 1 :])
            except Absent as error:
                dropping = mark == "drop"
                problems = self.result.absent if dropping else self.result.errors
                problems.append(f"{self.release} has no {error} to {_PURPOSE[mark]}")
            except Unplaced as error:
                self.result.errors.append(f"{self.release}: `{symbol}` {error}")

    def find(self, name: str) -> list[tuple[int, cst.BaseStatement]]:
        """The definitions of a name, with the index in the body of what holds each."""
        return [
            (at, node)
            for at, statement in enumerate(self.body)
            for node in statements.leaves(statement)
            if _name(node) == name
        ]

    def _put(self, name: str, statement, before: list, after: list) -> None:
        symbol, mark = self.prefix + name, _mark(statement)
        found = self.find(name)
        if not found and mark:
            raise Absent(f"`{symbol}`")
        if not found:
            return self._add(statement, before, after)
        if len(found) > 1:
            raise Unplaced(f"is defined {len(found)} times")
        at, old = found[0]
        if mark:
            new = _edit(old, statement, mark, symbol)
        elif isinstance(old, cst.ClassDef) and isinstance(statement, cst.ClassDef):
            new = self._merge_class(old, statement)
        else:
            new = in_place_of(old, statement)
        is_class = isinstance(new, cst.ClassDef) and isinstance(old, cst.ClassDef)
        if new is None or (source(new) != source(old) and not is_class):
            self.touched.add(symbol)
        self._replace(at, old, new)

    def _replace(self, at: int, old, new) -> None:
        if self.body[at] is not old:
            self.body[at] = self.body[at].deep_replace(
                old, cst.RemoveFromParent() if new is None else new
            )
        else:
            self.body[at : at + 1] = [] if new is None else [new]

    def _add(self, statement, before: list, after: list) -> None:
        simple = isinstance(statement, cst.SimpleStatementLine)
        if self.prefix or not simple:
            comments = [line for line in statement.leading_lines if line.comment]
            count = 0 if simple else 1 if self.prefix else 2
            blank = [cst.EmptyLine(indent=False)] * count
            statement = statement.with_changes(leading_lines=blank + comments)
        self.body.insert(self._place(simple, before, after), statement)

    def _place(self, simple: bool, before: list, after: list) -> int:
        if self.prefix and simple:
            place = 1 if self.body and statements.is_docstring(self.body[0]) else 0
            for at, statement in enumerate(self.body):
                if not isinstance(statement, cst.SimpleStatementLine):
                    break
                place = at + 1 if _name(statement) else place
            return place
        for name in before:
            if found := self.find(name):
                return found[-1][0] + 1
        for name in after:
            if found := self.find(name):
                return found[0][0]
        main = bool(self.body) and statements.head(self.body[-1]) == _MAIN
        return len(self.body) - main

    def _merge_class(self, old: cst.ClassDef, new: cst.ClassDef) -> cst.ClassDef:
        for theirs, ours in zip(_class_header(old), _class_header(new)):
            if ours and ours != theirs:
                raise Unplaced(
                    f"has {theirs or 'nothing'} where the overlay has {ours}"
                )
        symbol = self.prefix + new.name.value
        scope = _Scope(
            statements.statements(old.body),
            f"{symbol}.",
            self.release,
            self.result,
            self.touched,
            self.seen,
        )
        members = statements.statements(new.body)
        if statements.is_docstring(members[0]):
            has_one = statements.is_docstring(scope.body[0])
            if not has_one or source(scope.body[0]) != source(members[0]):
                scope.body[: int(has_one)] = members[:1]
                self.touched.add(symbol)
        scope.merge(
            [
                member
                for member in statements.without_docstring(members)
                if canonical(member) not in ("...", "pass")
            ]
        )
        return statements.with_body(old, scope.body)


def _edit(old, edit, mark: str, symbol: str):
    """Upstream's definition after one marked edit; None where it is dropped."""
    if mark == "+=":
        return _extend(old, edit)
    if mark == "drop" and statements.is_ellipsis(edit.body):
        return None
    if not isinstance(old, cst.FunctionDef) or not isinstance(edit, cst.FunctionDef):
        raise Unplaced(f"is not a function to {_PURPOSE[mark]}")
    try:
        if mark in ("drop", "splice"):
            return getattr(statements, mark)(old, edit, _within(edit))
        return getattr(statements, mark)(old, edit)
    except Absent as error:
        raise Absent(f"{error} in `{symbol}`") from None


def _extend(old, edit: cst.SimpleStatementLine):
    """Upstream's list with the elements that it lacks, laid out as its own."""
    theirs, ours = getattr(old.body[0], "value", None), edit.body[0].value
    if not isinstance(theirs, cst.List) or not isinstance(ours, cst.List):
        raise Unplaced("is not a list literal on both sides")
    present = {canonical(element.value) for element in theirs.elements}
    new = [e.value for e in ours.elements if canonical(e.value) not in present]
    if not new:
        return old
    elements = [*theirs.elements, *map(cst.Element, new)]
    last = len(theirs.elements) - 1
    between = theirs.lbracket.whitespace_after  # a line each, or all on one line
    between = cst.SimpleWhitespace(" ") if between.empty else between
    for at in range(max(last, 0), len(elements) - 1):
        comma = cst.Comma(whitespace_after=between)
        elements[at] = elements[at].with_changes(comma=comma)
    bracket = theirs.rbracket
    if last >= 0:
        elements[-1] = elements[-1].with_changes(comma=theirs.elements[last].comma)
        end = bracket.whitespace_before
        if isinstance(end, cst.ParenthesizedWhitespace) and end.first_line.comment:
            comma = cst.Comma(
                whitespace_after=end.with_changes(last_line=between.last_line)
            )
            elements[last] = elements[last].with_changes(comma=comma)
            end = end.with_changes(first_line=cst.TrailingWhitespace())
            bracket = bracket.with_changes(whitespace_before=end)
    extended = theirs.with_changes(elements=elements, rbracket=bracket)
    return old.deep_replace(theirs, extended)


def _registers_tests(statement: cst.BaseStatement) -> bool:
    """`register_cuda_ci(...)` of a test file: upstream's file has its own."""
    return re.match(r"register_\w+_ci\(", canonical(statement)) is not None


def _name(statement) -> str | None:
    """The name that a statement defines, if it is a definition."""
    if isinstance(statement, (cst.FunctionDef, cst.ClassDef)):
        return statement.name.value
    if not isinstance(statement, cst.SimpleStatementLine) or len(statement.body) > 1:
        return None
    match statement.body[0]:
        case cst.Assign(targets=[cst.AssignTarget(target=cst.Name(value=name))]):
            return name
        case cst.AnnAssign(target=cst.Name(value=name)):
            return name
        case cst.AugAssign(target=cst.Name(value=name), operator=cst.AddAssign()):
            return name
    return None


def _mark(statement) -> str | None:
    """The mark of an overlay's statement: a decorator from marks.py, or "+="."""
    for decorator in getattr(statement, "decorators", ()):
        callee = decorator.decorator
        callee = callee.func if isinstance(callee, cst.Call) else callee
        if isinstance(callee, cst.Name) and callee.value in _PURPOSE:
            return callee.value
    simple = isinstance(statement, cst.SimpleStatementLine)
    return "+=" if simple and isinstance(statement.body[0], cst.AugAssign) else None


def _within(edit: cst.FunctionDef) -> tuple[str, ...]:
    for decorator in edit.decorators:
        if isinstance(decorator.decorator, cst.Call):
            for argument in decorator.decorator.args:
                value = ast.literal_eval(source(argument.value))
                return (value,) if isinstance(value, str) else tuple(value)
    return ()


def _class_header(node: cst.ClassDef) -> tuple[str, str]:
    return (
        ", ".join(source(argument.value) for argument in (*node.bases, *node.keywords)),
        ", ".join(source(d.decorator) for d in node.decorators),
    )
