"""Tables of docs/heads.md as cases of tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "heads.md"
Cell = tuple[str, str, str]  # row, column, text


def read_table(name: str) -> list[Cell]:
    """Every cell of the table between <!-- name:begin --> and <!-- name:end -->."""
    page = PAGE.read_text(encoding="utf-8")
    lines = page.partition(f"<!-- {name}:begin -->")[2].partition(f"<!-- {name}:end -->")[0].strip().splitlines()
    first, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [(row[0], column, cell) for row in rows for column, cell in zip(first[1:], row[1:], strict=True)]


def pytest_configure(config: pytest.Config) -> None:
    """Declare the mark."""
    config.addinivalue_line("markers", "page_table(name): runs for row, column and cell of a table of docs/heads.md.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with the mark once for every cell."""
    for mark in metafunc.definition.iter_markers("page_table"):
        cells = [pytest.param(*cell, id=" ".join(cell[:2])) for cell in read_table(*mark.args)]
        metafunc.parametrize(("row", "column", "cell"), cells)


@pytest.fixture
def page_table() -> Callable[[str], list[Cell]]:
    """The cells of a table, by its name."""
    return read_table
