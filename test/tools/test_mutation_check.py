"""test/mutations.toml fits our code: each text is there once, and its tests are."""

import importlib.util
from pathlib import Path

import mutation_check


def test_each_mutation_fits_the_installed_code_once():
    package = Path(importlib.util.find_spec("sglang").origin).parent
    mutations = mutation_check.read_mutations()
    assert len(mutations) >= 40
    for name, mutation in mutations.items():
        assert not mutation_check.misfit(package, mutation), name
        source = (package / mutation["file"]).read_text()
        mutated = source.replace(mutation["find"], mutation["replace"])
        assert mutated != source, name
        compile(mutated, mutation["file"], "exec")
        tests = mutation["tests"][0].partition("::")[0]
        assert (mutation_check.TESTS / tests).is_file(), name
