"""The overlay's rules, one by one, on small upstream texts."""

from textwrap import dedent

import pytest
from overlay.merge import merge

MODULE = "sglang.small"


def run(upstream: str, overlay: str, ledger: str = ""):
    """Merges; the ledger has an entry for each of the words given."""
    entries = "".join(
        f"{symbol}\n    why: it is asked for\n\n" for symbol in ledger.split()
    )
    text = f'"""\n{entries}"""\n{dedent(overlay)}'
    return merge(dedent(upstream), text, MODULE, "upstream 1.0"), text


def merged(upstream: str, overlay: str, ledger: str = "") -> str:
    """The merged text, which a second merge must leave alone."""
    result, text = run(upstream, overlay, ledger)
    assert not result.errors and not result.absent
    again = merge(result.text, text, MODULE, "upstream 1.0")
    assert not again.errors and again.text == result.text
    return result.text


def errors(upstream: str, overlay: str, ledger: str = "") -> list[str]:
    result, _ = run(upstream, overlay, ledger)
    assert result.text == dedent(upstream)
    return result.errors


def check(upstream: str, overlay: str, expected: str, ledger: str = "") -> None:
    assert merged(upstream, overlay, ledger) == dedent(expected).lstrip("\n")


# Definitions


def test_adds_after_the_definition_before_it_in_the_overlay():
    upstream = "def a():\n    pass\n\n\ndef z():\n    pass\n"
    text = merged(upstream, "def a():\n    return 1\n\n\ndef b():\n    pass\n", "a")
    assert (
        text
        == "def a():\n    return 1\n\n\ndef b():\n    pass\n\n\ndef z():\n    pass\n"
    )


def test_adds_before_the_next_one_that_upstream_has():
    text = merged(
        "import os\n\n\nA = os\n\n\ndef z():\n    pass\n",
        "N = 1\n\ndef z():\n    return N\n",
        "z",
    )
    assert text.index("A = os") < text.index("N = 1") < text.index("def z")


def test_adds_to_the_end_without_a_neighbour():
    assert (
        merged("A = 1\n", "def b():\n    pass\n") == "A = 1\n\n\ndef b():\n    pass\n"
    )


def test_replaces_where_it_stands_with_upstreams_comment():
    check(
        """
        A = 1

        # How b works.
        def b():
            return 1


        C = b()
        """.lstrip("\n"),
        "def b():\n    return 2\n",
        """
        A = 1


        # How b works.
        def b():
            return 2


        C = b()
        """.replace("A = 1\n\n\n", "A = 1\n\n"),
        "b",
    )


def test_brings_its_own_comment():
    text = merged("# Old.\nA = 1\nB = 2\n", "# New.\nB = 3\n", "B")
    assert text == "# Old.\nA = 1\n# New.\nB = 3\n"


@pytest.mark.parametrize("block", ["if x:", "try:"])
def test_replaces_inside_a_block(block):
    tail = (
        "except ImportError:\n    f = None\n"
        if block == "try:"
        else "else:\n    g = 1\n"
    )
    upstream = f"x = 1\n{block}\n\n    def f():\n        return 1\n\n{tail}"
    if block == "try:":
        assert errors(upstream, "def f():\n    return 2\n", "f") == [
            "upstream 1.0: `f` is defined 2 times"
        ]
    else:
        text = merged(upstream, "def f():\n    return 2\n", "f")
        assert text == upstream.replace("return 1", "return 2")


def test_annotated_assignment_replaces():
    assert merged("A: int = 1\nB = 2\n", "A: int = 5\n", "A") == "A: int = 5\nB = 2\n"


def test_merges_a_class_member_by_member():
    check(
        """
        class C(Base):
            \"\"\"Old.\"\"\"

            A = 1

            def f(self):
                return 1

            def g(self):
                return 2
        """.lstrip("\n"),
        """
        class C:
            \"\"\"New.\"\"\"

            B = 2

            def f(self):
                return 3

            def h(self):
                return 4
        """,
        """
        class C(Base):
            \"\"\"New.\"\"\"

            A = 1
            B = 2

            def f(self):
                return 3

            def h(self):
                return 4

            def g(self):
                return 2
        """,
        "C C.f",
    )


def test_other_bases_are_an_error():
    assert errors("class C(A):\n    pass\n", "class C(B):\n    X = 1\n") == [
        "upstream 1.0: `C` has A where the overlay has B"
    ]


def test_enum_members_stand_together():
    upstream = "class E(Enum):\n    A = 1\n\n    def f(self):\n        return self\n"
    assert "    A = 1\n    B = 2\n\n    def f" in merged(
        upstream, "class E:\n    B = 2\n"
    )


def test_a_repeated_definition_is_ambiguous():
    upstream = "class C:\n    def p(self):\n        pass\n\n    def p(self, v):\n        pass\n"
    assert errors(upstream, "class C:\n    def p(self):\n        return 1\n") == [
        "upstream 1.0: `C.p` is defined 2 times"
    ]
    assert errors("A = 1\n", "B = 1\nB = 2\n") == [
        "upstream 1.0: `B` is in the overlay twice for the same purpose"
    ]


def test_only_definitions():
    assert errors("A = 1\n", "print(1)\n") == ["`print(1)` is not a definition"]


# Marks

FUNCTION = '''
def f(self, x):
    """Doc."""
    if x.a:
        y = 1
    elif x.b:
        y = 2
    else:
        y = 3
    parser.add("--one", kind=1)
    parser.add("--two", kind=1)
    self.z = y
'''.lstrip()


def edited(mark: str, body: str, upstream: str = FUNCTION) -> str:
    lines = "".join(f"    {line}\n" for line in dedent(body).strip().splitlines())
    return merged(upstream, f"@{mark}\ndef f():\n{lines}", "f")


def test_prepend_goes_behind_the_docstring():
    assert '    """Doc."""\n    x = 2\n    if x.a:\n' in edited("prepend", "x = 2")


def test_append_goes_to_the_end():
    assert edited("append", "x = 2") == FUNCTION + "    x = 2\n"


def test_append_behind_return_is_an_error():
    upstream = "def f():\n    return 1\n"
    assert errors(upstream, "@append\ndef f():\n    x = 1\n", "f") == [
        "upstream 1.0: `f` ends in `return` or `raise`; nothing can be appended to it"
    ]


def test_splice_by_assignment_target():
    assert edited("splice", "self.z = 9") == FUNCTION.replace(
        "self.z = y", "self.z = 9"
    )


def test_splice_by_call_and_first_literal():
    text = edited("splice", "parser.add('--two', kind=2)")
    assert text == FUNCTION.replace('"--two", kind=1', '"--two", kind=2')


@pytest.mark.parametrize("test, old", [("x.a", "y = 1"), ("x.b", "y = 2")])
def test_splice_of_a_branch_leaves_the_chain(test, old):
    text = edited("splice", f"if {test}:\n    y = 7")
    assert text == FUNCTION.replace(old, "y = 7")


def test_splice_with_branches_replaces_the_rest_of_the_chain():
    text = edited("splice", "if x.b:\n    y = 7\nelif x.c:\n    y = 8")
    assert (
        "    elif x.b:\n        y = 7\n    elif x.c:\n        y = 8\n    parser" in text
    )


def test_splice_within_says_which():
    ambiguous = "@splice\ndef f():\n    y = 7\n"
    assert errors(FUNCTION, ambiguous, "f") == [
        "upstream 1.0: `f` has 3 of `y =`; say which by `within`"
    ]
    for within, old in [("elif x.b", "y = 2"), ("else", "y = 3")]:
        text = edited(f"splice(within={within!r})", "y = 7")
        assert text == FUNCTION.replace(old, "y = 7")


def test_within_is_a_path():
    upstream = "def f():\n" + "".join(
        f"    for i in {n}:\n        with open(i):\n            x = 1\n" for n in "ab"
    )
    text = edited("splice(within=('for i in b', 'with open(i)'))", "x = 2", upstream)
    assert text == "x = 2".join(upstream.rsplit("x = 1", 1))


def test_splice_keeps_the_comment_and_indentation():
    upstream = "def f(x):\n    if x:\n        # Why.\n        y = 1\n"
    assert edited("splice", "y = [\n    2,\n    3,\n]", upstream) == (
        "def f(x):\n    if x:\n        # Why.\n        y = [\n            2,\n"
        "            3,\n        ]\n"
    )


def test_splice_of_a_call_keeps_the_arguments_that_it_does_not_name():
    upstream = "def f(p):\n    p.add(\n        '--one', kind=1, help='a'\n    )\n"
    text = edited("splice", "p.add('--one', ..., help='b')", upstream)
    assert text == upstream.replace("'a'", "'b'")


def test_decorate():
    text = edited("decorate\n@traced", "...")
    assert text.startswith("@traced\ndef f(")


def test_splice_within_an_except():
    upstream = (
        "def f():\n    try:\n        x = 1\n    except A as e:\n        x = 2\n"
        "    except B:\n        x = 3\n"
    )
    text = edited('splice(within="except A as e")', "x = 4", upstream)
    assert text == upstream.replace("x = 2", "x = 4")


def dropped(upstream: str, overlay: str, ledger: str = "f") -> str:
    """The merged text; a second merge finds nothing to drop and changes nothing."""
    result, text = run(upstream, overlay, ledger)
    assert not result.errors and not result.absent
    again = merge(result.text, text, MODULE, "upstream 1.0")
    assert again.absent and again.text == result.text
    return result.text


@pytest.mark.parametrize(
    "head, expected",
    [
        ("if x.a: ...", '    """Doc."""\n    if x.b:\n        y = 2\n    else:\n'),
        ("if x.b: ...", "        y = 1\n    else:\n        y = 3\n"),
        ("self.z = ...", 'parser.add("--two", kind=1)\n'),
        ('parser.add("--one")', '        y = 3\n    parser.add("--two"'),
    ],
)
def test_drop_of_a_statement_or_branch(head, expected):
    assert expected in dropped(FUNCTION, f"@drop\ndef f():\n    {head}\n")


def test_drop_of_a_test_leaves_what_else_holds():
    upstream = (
        "def f(x):\n    if x:\n        y = 1\n    else:\n        y = 2\n        z = 3\n"
    )
    text = dropped(upstream, "@drop\ndef f():\n    if x: ...\n")
    assert text == "def f(x):\n    y = 2\n    z = 3\n"


def test_drop_of_a_function_and_of_a_class():
    upstream = "def f():\n    pass\n\n\nclass C:\n    pass\n\n\nA = 1\n"
    overlay = "@drop\ndef f(): ...\n\n\n@drop\nclass C: ...\n"
    assert dropped(upstream, overlay, "f C").strip() == "A = 1"


def test_what_a_branch_moves_is_dropped_before_it_is_put():
    upstream = "def f(x):\n    if x.a:\n        y = 1\n    elif x.b:\n        y = 2\n"
    overlay = """
    @prepend
    def f(x):
        if x.b:
            return

    @drop
    def f(x):
        if x.b: ...
    """
    text = merged(upstream, overlay, "f")
    assert (
        text == "def f(x):\n    if x.b:\n        return\n    if x.a:\n        y = 1\n"
    )


def test_what_is_not_there_is_named():
    overlay = "class C:\n    @prepend\n    def g(self):\n        x = 1\n"
    assert errors("class C:\n    pass\n", overlay, "C.g") == [
        "upstream 1.0 has no `C.g` to prepend to"
    ]
    assert errors(FUNCTION, "@splice\ndef f():\n    nope = 1\n", "f") == [
        "upstream 1.0 has no `nope =` in `f` to splice into"
    ]
    assert errors("A = 1\n", "B += [1]\n", "B") == ["upstream 1.0 has no `B` to add to"]
    result, _ = run(FUNCTION, "@drop\ndef g(): ...\n", "g")
    assert (result.errors, result.absent) == ([], ["upstream 1.0 has no `g` to drop"])


# Lists


@pytest.mark.parametrize(
    "old, new",
    [
        ('["a"]', '["a", "b"]'),
        ("[]", '["b"]'),
        (
            '[\n    "a",\n    "c",  # why\n]',
            '[\n    "a",\n    "c",  # why\n    "b",\n]',
        ),
    ],
)
def test_adds_to_a_list_what_it_lacks(old, new):
    assert merged(f"A = {old}\n", 'A += ["b"]\n', "A") == f"A = {new}\n"


def test_only_lists_are_added_to():
    assert errors("A = (1,)\n", "A += [2]\n", "A") == [
        "upstream 1.0: `A` is not a list literal on both sides"
    ]


# Imports


def test_imports_are_merged_and_sorted():
    check(
        "import os\n\nfrom sglang.a import b, d\n\nX = os, b, d\n",
        """
        import ast
        from __future__ import annotations

        from overlay.marks import drop
        from sglang.a import c
        from sglang.a import unused

        Y = ast, c
        """,
        "import ast\nimport os\n\nfrom sglang.a import b, c, d\n\nX = os, b, d\n\nY = ast, c\n",
    )


def test_unsorted_imports_are_left_as_they_are():
    upstream = "import sys\nimport os\n\nX = os, sys\n"
    assert merged(upstream, "import ast\n\nY = ast\n").startswith(
        "import sys\nimport os\nimport ast\n"
    )


def test_an_import_that_the_merge_left_unused_goes():
    upstream = (
        "from a import b, c\nimport d\nimport e\n\n\ndef f():\n    return b, c, d\n"
    )
    text = merged(upstream, "def f():\n    return c\n", "f")
    assert text.startswith("from a import c\nimport e\n")


def test_an_import_under_a_condition_is_not_enough():
    upstream = "import os\n\nif os:\n    from a import b\n\n    C = b\n"
    text = merged(upstream, "from a import b\n\nD = b\n")
    assert text.startswith(
        "import os\n\nfrom a import b\n\nif os:\n    from a import b\n"
    )


def test_names_in_annotations_are_used():
    upstream = 'from a import B, C\n\n\ndef f(x: "list[B]") -> C: ...\n\n\nA = B, C\n'
    assert "import B, C" in merged(upstream, "A = 1\n", "A")


def test_the_same_name_from_elsewhere_is_an_error():
    assert errors("from a import x\n\nY = x\n", "from b import x\n\nZ = x\n") == [
        "upstream 1.0 has `from a import x`, the overlay `from b import x`"
    ]


TYPING = """
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.other import T
    from sglang.small import needed


def f(x: "T"):
    return needed
"""


def test_type_checking_imports_open_a_block():
    text = merged("import os\n\nneeded = os\n", TYPING)
    assert "from typing import TYPE_CHECKING\n" in text
    assert "if TYPE_CHECKING:\n    from sglang.other import T\n" in text
    assert "sglang.small" not in text


def test_type_checking_imports_join_the_block():
    upstream = (
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n"
        "    from sglang.zoo import Z\n\nneeded: 'Z' = 1\n"
    )
    assert "    from sglang.other import T\n    from sglang.zoo import Z\n" in merged(
        upstream, TYPING
    )


def test_what_the_overlay_relies_on_must_be_there():
    assert errors("A = 1\n", TYPING) == [
        "upstream 1.0 has no `needed`, which the overlay relies on"
    ]


# The ledger


def test_the_ledger_names_what_is_touched_and_nothing_else():
    assert errors("A = 1\n", "A = 2\n") == ["the ledger has no entry for `A`"]
    assert errors("A = 1\n", "B = 2\n", "C") == [
        "the ledger's `C` is not in the overlay"
    ]
    assert merge("A = 1\n", '"""\nA\n    thread: x\n"""\nA = 2\n').errors == [
        "the ledger's entry for `A` has no `why:`"
    ]


def test_all_problems_are_told_at_once():
    assert len(errors("A = 1\n", "A = 2\nB += [1]\nprint(1)\n")) == 3
