"""The overlay's rules, one by one, on small upstream texts."""

from textwrap import dedent

import pytest
from overlay.merge import merge


def run(upstream: str, overlay: str, ledger: str = ""):
    """Merges; the ledger has an entry for each of the words given."""
    entries = "".join(f"{word}\n    why: asked for\n\n" for word in ledger.split())
    text = f'"""\n{entries}"""\n{dedent(overlay)}'
    return merge(dedent(upstream), text, "upstream 1.0"), text


def merged(upstream: str, overlay: str, ledger: str = "") -> str:
    """The merged text, which a second merge must leave alone."""
    result, text = run(upstream, overlay, ledger)
    assert not result.errors and not result.absent
    again = merge(result.text, text, "upstream 1.0")
    assert not again.errors and again.text == result.text and not again.edited
    return result.text


def errors(upstream: str, overlay: str, ledger: str = "") -> list[str]:
    result, _ = run(upstream, overlay, ledger)
    assert result.text == dedent(upstream)
    told = result.errors + result.absent
    return [error.removeprefix("upstream 1.0: ") for error in told]


def function(mark: str, body: str) -> str:
    return f"@{mark}\ndef f():\n" + "".join(
        f"    {line}\n" for line in body.split("\n")
    )


PASS, ONE, TWO = "pass", "return 1", "return 2"
DEF = "def {}():\n    {}\n".format


@pytest.mark.parametrize(
    "upstream, overlay, ledger, expected",
    [
        pytest.param(
            f"{DEF('a', PASS)}\n\n{DEF('z', PASS)}",
            f"{DEF('a', ONE)}\n\n{DEF('b', PASS)}",
            "a",
            f"{DEF('a', ONE)}\n\n{DEF('b', PASS)}\n\n{DEF('z', PASS)}",
            id="new, behind the one before it",
        ),
        pytest.param(
            f"import os\n\nA = os\n\n\n{DEF('z', PASS)}",
            f"N = 1\n\n{DEF('z', 'return N')}",
            "z",
            f"import os\n\nA = os\n\n\nN = 1\n\n\n{DEF('z', 'return N')}",
            id="new, before the next one",
        ),
        pytest.param(
            "A = 1\n",
            DEF("b", PASS),
            "",
            f"A = 1\n\n\n{DEF('b', PASS)}",
            id="new, alone",
        ),
        pytest.param(
            'if __name__ == "__main__":\n    print()\n',
            DEF("b", PASS),
            "",
            DEF("b", PASS) + '\n\nif __name__ == "__main__":\n    print()\n',
            id="new, not behind main",
        ),
        pytest.param(
            f"A = 1\n\n# How b works.\n{DEF('b', ONE)}\n\nC = b()\n",
            DEF("b", TWO),
            "b",
            f"A = 1\n\n# How b works.\n{DEF('b', TWO)}\n\nC = b()\n",
            id="replaced under upstream's comment",
        ),
        pytest.param(
            "# Old.\nA = 1\nB: int = 2\n",
            "# New.\nB: int = 3\n",
            "B",
            "# Old.\nA = 1\n# New.\nB: int = 3\n",
            id="replaced with its own comment",
        ),
        pytest.param(
            "x = 1\nif x:\n\n    def f():\n        return 1\n\nelse:\n    g = 1\n",
            'def f():\n    """Two\n    lines."""\n    return """a\n  b"""\n',
            "f",
            'x = 1\nif x:\n\n    def f():\n        """Two\n        lines."""\n'
            '        return """a\n  b"""\n\nelse:\n    g = 1\n',
            id="replaced inside a block, strings as they are",
        ),
        pytest.param(
            "class C(int):\n    A = 1\n\n    def f(self):\n        return 1\n\n"
            "    def g(self):\n        return 2\n",
            "class C:\n    B = 2\n\n    def f(self):\n        return 3\n\n"
            "    def h(self):\n        return 4\n",
            "C.f",
            "class C(int):\n    A = 1\n    B = 2\n\n    def f(self):\n        return 3\n\n"
            "    def h(self):\n        return 4\n\n    def g(self):\n        return 2\n",
            id="a class, member by member",
        ),
    ],
)
def test_definitions(upstream, overlay, ledger, expected):
    assert merged(upstream, overlay, ledger) == expected


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
        (
            "splice(within='for j in x')",
            "z = 7",
            "# Why.\n        z = 1",
            "# Why.\n        z = 7",
        ),
        (
            "splice(within='for j in x')",
            "# So.\n    z = 7",
            "# Why.\n        z = 1",
            "# So.\n        z = 7",
        ),
        ("splice(within='except ValueError as e')", "z = 7", "z = 4", "z = 7"),
        ("drop", "if x.b: ...", "    elif x.b:\n        y = 2\n", ""),
        ("drop", "parser.add('--one')", '    parser.add("--one", kind=1)\n', ""),
    ],
)
def test_marks(mark, body, old, new):
    assert FUNCTION.count(old) == 1
    result, text = run(FUNCTION, function(mark, body), "f")
    assert not result.errors and result.text == FUNCTION.replace(old, new)
    assert result.edited == {"f": FUNCTION}
    again = merge(result.text, text, "upstream 1.0")
    assert not again.errors and again.text == result.text


def test_drop_of_a_function_and_a_class_and_of_what_a_branch_moves():
    upstream = "def f():\n    pass\n\n\nclass C:\n    pass\n\n\nA = 1\n"
    overlay = "@drop\ndef f(): ...\n\n\n@drop\nclass C: ...\n"
    assert merged(upstream, overlay, "f C").strip() == "A = 1"
    upstream = (
        "def f(x):\n    if x.a:\n        return 1\n    elif x.b:\n        return 2\n"
    )
    overlay = function("prepend", "if x.b:\n        return")
    overlay += function("drop", "if x.b: ...")
    assert merged(upstream, overlay, "f") == (
        "def f(x):\n    if x.b:\n        return\n    if x.a:\n        return 1\n"
    )


TWICE = (
    "class C:\n    def p(self):\n        pass\n\n    def p(self, v):\n        pass\n"
)


@pytest.mark.parametrize(
    "upstream, overlay, expected",
    [
        (FUNCTION, function("splice", "y = 7"), "`f` has 3 `y =`; say which by `within`"),
        (FUNCTION, function("splice", "q = 7"), "`f` has no `q =`"),
        (FUNCTION, function("splice(within='for i in x')", "y = 7"), "`f` has no `y =` within `for i in x`"),
        (FUNCTION, function("drop", "if x.a: ..."), "`f` has `else` behind `if x.a`: splice it"),
        (FUNCTION, function("drop", "q = 1"), "`f` has no `q =`"),
        (FUNCTION, function("drop(within='for i in x')", "z = 1"), "`f` unexpected indent|`f` expected an indented block"),
        ("def f():\n    return 1\n", function("append", "x = 1"), "`f` ends in `return` or `raise`; nothing can be appended to it"),
        ("g = 1\n", function("prepend", "x = 1"), "`f` is not there to prepend"),
        ("f = 1\n", function("prepend", "x = 1"), "`f` is not a function to prepend"),
        ("A = 1\n", "f = 2\nf = 3\n", "`f` is in the overlay twice"),
        ("A = 1\n", "f = 2\nprint(f)\n", "`None` `print(f)` is not a definition"),
        (TWICE, "f = 1\nclass C:\n    def p(self):\n        return 1\n", "`C.p` is defined 2 times"),
        ("A = 1\n", "f = q\n", "upstream 1.0 has no `q`, which the overlay uses"),
        ("from a import x\n\nY = x\n", "from b import x\n\nf = x\n", "has `from a import x`, the overlay `from b import x`"),
    ],
)  # fmt: skip
def test_what_cannot_be_placed(upstream, overlay, expected):
    [told] = [e for e in errors(upstream, overlay, "f") if "ledger" not in e]
    assert any(told.startswith(each) for each in expected.split("|"))


def test_the_ledger_names_what_is_touched_and_nothing_else():
    assert errors("A = 1\n", "A = 2\n") == ["the ledger has no entry for `A`"]
    assert errors("A = 1\n", "B = 2\n", "B C") == [
        "the ledger's `C` is not in the overlay"
    ]
    assert merge("A = 1\n", '"""\nA\n    thread: x\n"""\nA = 2\n', "").errors == [
        ": the ledger's entry for `A` has no `why:`"
    ]
    assert len(errors("A = 1\n", "A = 2\n@drop\ndef x(): ...\nprint(1)\nf = z")) == 4


@pytest.mark.parametrize(
    "upstream, overlay, ledger, start",
    [
        pytest.param(
            "import os\n\nfrom sglang.a import b, d\n\nX = os, b, d\n",
            "import ast\nfrom __future__ import annotations\n\nfrom sglang.a import c, unused\n"
            "from overlay.marks import drop\n\nif x:\n    from sglang.small import X\n\nY = ast, c, X\n",
            "",
            "import ast\nimport os\n\nfrom sglang.a import b, c, d\n\nX = os, b, d\n",
            id="merged and sorted",
        ),
        pytest.param(
            "import sys\nimport os\n\nX = os, sys\n",
            "import ast\n\nY = ast\n",
            "",
            "import sys\nimport os\nimport ast\n",
            id="left unsorted",
        ),
        pytest.param(
            "import d\nfrom a import b, c\n\n\ndef f():\n    return b, c, d\n",
            "def f():\n    return c\n",
            "f",
            "from a import c\n",
            id="unused ones go",
        ),
        pytest.param(
            "import os\n\nif os:\n    from a import b\n\n    C = b\n",
            "from a import b\n\nD = b\n",
            "",
            "import os\n\nfrom a import b\n\nif os:\n    from a import b\n",
            id="one under a condition is not enough",
        ),
        pytest.param(
            'from a import B, C\n\n\ndef f(x: "list[B]") -> C: ...\n\n\nA = B, C\n',
            "A = 1\n",
            "A",
            "from a import B, C\n",
            id="used by annotations",
        ),
    ],
)
def test_imports(upstream, overlay, ledger, start):
    assert merged(upstream, overlay, ledger).startswith(start)
