"""The table of families in docs/models.md, made anew for those that are used most."""

import pytest
from families import FAMILIES, MOST_USED, WHY_NOT, line, row_of, rows_in_docs


@pytest.mark.slow
@pytest.mark.parametrize("family", MOST_USED)
def test_the_table_says_what_works(family):
    assert line(row_of(family)) == rows_in_docs()[family]


def test_the_table_has_all_families():
    assert tuple(rows_in_docs()) == FAMILIES


def test_the_table_says_why_something_does_not_work():
    rows = rows_in_docs()
    assert {family for family, row in rows.items() if "| no |" in row} == WHY_NOT.keys()
    assert all(reason in rows[family] for family, reason in WHY_NOT.items())
