"""The mutants of ``tests/mutants.py`` fit the code: whoever rewrites a mutant's line rewrites the mutant too."""

import pytest
from mutants import MUTANTS, ROOT, Mutant


def test_names_are_unique() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names)) >= 30


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_text_occurs_once_and_the_tests_exist(mutant: Mutant) -> None:
    assert (ROOT / "fa" / mutant.file).read_text().count(mutant.text) == 1
    assert mutant.wrong != mutant.text and mutant.tests
    for test in mutant.tests.split():
        file, name = test.partition("[")[0].split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test
