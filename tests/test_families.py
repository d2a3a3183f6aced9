"""The README's table of families: what the package has, and that it is all that Transformers has."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import FAMILIES, auto_classes

import hf_asentmax
from hf_asentmax.configuration_asentmax import CONFIG_CLASSES
from hf_asentmax.families import family_table

README = Path(__file__).resolve().parent.parent / "README.md"


def test_families_table_of_the_readme_is_the_generated_one() -> None:
    table = README.read_text(encoding="utf-8").split("\n## Families\n\n")[1].split("\n\n")[0]
    assert table == family_table(), "put what family_table() returns into README.md"


def test_families_table_has_a_row_for_each_family_with_a_note() -> None:
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in family_table().splitlines()[2:]]
    assert (
        [row[1] for row in rows] == [f"`{family}`" for family in FAMILIES] == [f"`{name}`" for name in CONFIG_CLASSES]
    )
    assert all(len(row) == 5 and all(row) for row in rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_each_class_that_transformers_has(family: str) -> None:
    """A class that a later Transformers adds for a family is to be added here too, with its place in the table."""
    names = CONFIG_CLASSES[family].class_names()
    assert list(names) == [auto.__name__ for auto in auto_classes(family)]
    for name in names.values():
        assert name in hf_asentmax.__all__
        assert getattr(hf_asentmax, name).config_class is CONFIG_CLASSES[family]
