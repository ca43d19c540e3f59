"""recipes/ESTIMATORS.md: every number on it is what its code prints."""

import doctest
from pathlib import Path


def test_the_page_prints_what_it_shows():
    page = Path(__file__).parents[1] / "recipes" / "ESTIMATORS.md"
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.failed == 0 and result.attempted > 0
