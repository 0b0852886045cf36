"""The overlay's rules, one by one, on small upstream texts."""

from textwrap import indent

import pytest
from overlay.merge import merge
from overlay.source import Unplaced


def run(upstream: str, overlay: str, ledger: str | None = None):
    """Merges twice; the ledger names these words, or else what is edited. The second merge
    must leave the text of the first alone."""
    if ledger is None:
        ledger = " ".join(merge(upstream, overlay, "").edited)
    entries = "".join(f"{word}\n    why: asked for\n\n" for word in ledger.split())
    overlay = f'"""\n{entries}"""\n{overlay}'
    result = merge(upstream, overlay, "upstream 1.0")
    if result.errors or result.absent:
        assert result.text == upstream
    else:
        again = merge(result.text, overlay, "upstream 1.0")
        assert not again.errors and again.text == result.text and not again.edited
    return result


def errors(upstream: str, overlay: str, ledger: str | None = None) -> list[str]:
    result = run(upstream, overlay, ledger)
    told = result.errors + result.absent
    return [error.removeprefix("upstream 1.0: ") for error in told]


def code(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def function(mark: str, body: str) -> str:
    return f"@{mark}\ndef f():\n{indent(body, '    ')}\n"


# Upstream, overlay, expected; blank lines do not count.
DEFINITIONS = {
    "new, behind the one before it": (
        "def a(): pass\ndef z(): pass",
        "def a(): return 1\ndef b(): pass",
        "def a(): return 1\ndef b(): pass\ndef z(): pass",
    ),
    "new, before the next one": (
        "import os\nA = os\ndef z(): pass",
        "N = 1\ndef z(): return N",
        "import os\nA = os\nN = 1\ndef z(): return N",
    ),
    "new, not behind main": (
        "if __name__ == '__main__':\n    print()",
        "def b(): pass",
        "def b(): pass\nif __name__ == '__main__':\n    print()",
    ),
    "replaced under upstream's comment": (
        "A = 1\n# How b works.\ndef b(): return 1\nC = b()",
        "def b(): return 2",
        "A = 1\n# How b works.\ndef b(): return 2\nC = b()",
    ),
    "replaced with its own comment": (
        "# Old.\nA = 1\nB: int = 2",
        "# New.\nB: int = 3",
        "# Old.\nA = 1\n# New.\nB: int = 3",
    ),
    "replaced inside a block, strings as they are": (
        "x = 1\nif x:\n    def f(): return 1\nelse:\n    g = 1",
        'def f():\n    return """a\n  b"""',
        'x = 1\nif x:\n    def f():\n        return """a\n  b"""\nelse:\n    g = 1',
    ),
    "a class, member by member": (
        "class C(int):\n    A = 1\n    def f(self): 1\n    def g(self): 2",
        "class C:\n    B = 2\n    def f(self): 3\n    def h(self): 4",
        "class C(int):\n    A = 1\n    B = 2\n    def f(self): 3\n    def h(self): 4\n"
        "    def g(self): 2",
    ),
    "dropped": (
        "def f(): pass\nclass C: pass\nA = 1",
        "@drop\ndef f(): ...\n@drop\nclass C: ...",
        "A = 1",
    ),
    "a branch that moves": (
        "def f(x):\n    if x.a:\n        return 1\n    elif x.b:\n        return 2",
        function("prepend", "if x.b:\n    return") + function("drop", "if x.b: ..."),
        "def f(x):\n    if x.b:\n        return\n    if x.a:\n        return 1",
    ),
    "imports, merged and sorted": (
        "import os\n\nfrom sglang.a import b, d\n\nX = os, b, d\n",
        "import ast\nfrom __future__ import annotations\nfrom sglang.a import c, unused\n"
        "from overlay.marks import drop\nif x:\n    from sglang.small import X\n"
        "Y = ast, c, X",
        "import ast\nimport os\nfrom sglang.a import b, c, d\nX = os, b, d\n"
        "Y = ast, c, X",
    ),
    "imports, left unsorted": (
        "import sys\nimport os\nX = os, sys",
        "import ast\nY = ast",
        "import sys\nimport os\nimport ast\nX = os, sys\nY = ast",
    ),
    "imports, unused ones go": (
        "import d\nfrom a import b, c\n\n\ndef f():\n    return b, c, d\n",
        "def f():\n    return c",
        "from a import c\ndef f():\n    return c",
    ),
    "imports, one under a condition is not enough": (
        "import os\n\nif os:\n    from a import b\n\n    C = b\n",
        "from a import b\nD = b",
        "import os\nfrom a import b\nif os:\n    from a import b\n    C = b\nD = b",
    ),
    "imports, used by annotations": (
        'from a import B, C\n\n\ndef f(x: "list[B]") -> C: ...\n\n\nA = B, C\n',
        "A = 1",
        'from a import B, C\ndef f(x: "list[B]") -> C: ...\nA = 1',
    ),
}


@pytest.mark.parametrize(
    "upstream, overlay, new", DEFINITIONS.values(), ids=DEFINITIONS
)
def test_definitions(upstream, overlay, new):
    result = run(upstream, overlay)
    assert not result.errors and not result.absent
    assert code(result.text) == code(new)


FUNCTION = '''
def f(self, x, parser):
    """Doc."""
    if x.a:
        y = 1
    elif x.b:
        y = 2
    else:
        y = 3
    parser.add("--one", kind=1)
    parser.add("--two", kind=1)
    for i in x:
        z = 1
    for j in x:
        # Why.
        z = 1
    try:
        self.z = y
    except ValueError as e:
        z = 4
'''.lstrip()


@pytest.mark.parametrize(
    "mark, body, old, new",
    [
        ("prepend", "x = 2", '"""Doc."""\n', '"""Doc."""\n    x = 2\n'),
        ("append", "x = 2", "z = 4\n", "z = 4\n    x = 2\n"),
        ("decorate\n@staticmethod", "...", "def f(", "@staticmethod\ndef f("),
        ("splice", "self.z = 9", "self.z = y", "self.z = 9"),
        ("splice", "parser.add('--two')", '"--two", kind=1', '"--two"'),
        ("splice", "if x.a:\n        y = 7", "y = 1", "y = 7"),
        ("splice", "if x.b:\n        y = 7", "y = 2", "y = 7"),
        (
            "splice",
            "if x.b:\n    y = 7\nelif x.c:\n    y = 8",
            "        y = 2\n    else:\n        y = 3",
            "        y = 7\n    elif x.c:\n        y = 8",
        ),
        ("splice(within='if x.b')", "y = 7", "y = 2", "y = 7"),
        ("splice(within='else of if x.b')", "y = 7", "y = 3", "y = 7"),
        ("splice(within='for j in x')", "z = 7", "Why.\n        z = 1", "Why.\n        z = 7"),
        ("splice(within='for j in x')", "# So.\nz = 7", "Why.\n        z = 1", "So.\n        z = 7"),
        ("splice(within='except ValueError as e')", "z = 7", "z = 4", "z = 7"),
        ("drop", "if x.b: ...", "    elif x.b:\n        y = 2\n", ""),
        ("drop", "parser.add('--one')", '    parser.add("--one", kind=1)\n', ""),
    ],
)  # fmt: skip
def test_marks(mark, body, old, new):
    assert FUNCTION.count(old) == 1
    result = run(FUNCTION, function(mark, body))
    assert not result.errors and result.text == FUNCTION.replace(old, new)
    assert result.edited == {"f": FUNCTION}


TWICE = "class C:\n    def p(self): 1\n    def p(self, v): 2\n"


@pytest.mark.parametrize(
    "upstream, overlay, expected",
    [
        (FUNCTION, function("splice", "y = 7"), "`f` has 3 `y =`; say which by `within`"),
        (FUNCTION, function("splice", "q = 7"), "`f` has no `q =`"),
        (FUNCTION, function("splice(within='for i in x')", "y = 7"), "`f` has no `y =` within `for i in x`"),
        (FUNCTION, function("drop", "if x.a: ..."), "`f` has `else` behind `if x.a`: splice it"),
        (FUNCTION, function("drop", "q = 1"), "`f` has no `q =`"),
        (FUNCTION, function("drop(within='for i in x')", "z = 1"), "`f` expected an indented block"),
        ("def f():\n    return 1\n", function("append", "x = 1"), "`f` ends in `return` or `raise`; nothing can be appended to it"),
        ("g = 1\n", function("prepend", "x = 1"), "`f` is not there to prepend"),
        ("f = 1\n", function("prepend", "x = 1"), "`f` is not a function to prepend"),
        ("A = 1\n", "f = 2\nf = 3\n", "`f` is in the overlay twice"),
        ("A = 1\n", "f = 2\nprint(f)\n", "`None` `print(f)` is not a definition"),
        (TWICE, "f = 1\nclass C:\n    def p(self): 3\n", "`C.p` is defined 2 times"),
        ("A = 1\n", "f = q\n", "upstream 1.0 has no `q`, which the overlay uses"),
        ("from a import x\n\nY = x\n", "from b import x\n\nf = x\n", "has `from a import x`, the overlay `from b import x`"),
    ],
)  # fmt: skip
def test_what_cannot_be_placed(upstream, overlay, expected):
    [told] = errors(upstream, overlay)
    assert told.startswith(expected)


def test_the_ledger_names_what_is_touched_and_nothing_else():
    assert errors("A = 1\n", "A = 2\n", "") == ["the ledger has no entry for `A`"]
    unused = ["the ledger's `C` is not in the overlay"]
    assert errors("A = 1\n", "B = 2\n", "C") == unused
    with pytest.raises(Unplaced, match="the ledger's entry for `A` has no `why:`"):
        merge("A = 1\n", '"""\nA\n    thread: x\n"""\nA = 2\n', "")
    # All problems are told at once.
    assert (
        len(errors("A = 1\n", "A = 2\n@drop\ndef x(): ...\nprint(1)\nf = z", "")) == 4
    )
