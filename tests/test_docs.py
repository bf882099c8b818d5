"""What the pages of docs/ say of the tree: the tests and modules they name are there."""

import ast
import re
from pathlib import Path

import pytest
import torch
from tests.cli import test_hostile, test_hostile_files

import warploom.nn

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md")) + [ROOT / "README.md"]


def functions(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_that_a_page_names_are_there(page):
    for name in re.findall(r"`(tests/[\w/.:]+)`", page.read_text(encoding="utf-8")):
        path, _, function = name.partition("::")
        assert (ROOT / path).exists(), name
        assert not function or function in functions(ROOT / path), name


def table(page, first):
    """The rows of the tables of a page whose first cell matches, as {its first cell: the others}."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    rows = [[cell.strip("| ") for cell in row] for row in rows]
    return {row[0]: row[1:] for row in rows if re.fullmatch(first, row[0])}


def test_every_goal_has_its_row():
    assert list(table("reliability.md", r"G\d+")) == [f"G{number}" for number in range(1, 28)]


def test_every_hostile_input_is_tested_or_open():
    """Those whose row names no test are met by tests/cli/test_hostile*.py, whose cases and docstrings name them."""
    rows = table("reliability.md", r"\d+")
    assert list(rows) == [str(number) for number in range(1, 53)]
    met = {number for number, _ in test_hostile_files.REFUSED}
    for function in [*vars(test_hostile).values(), *vars(test_hostile_files).values()]:
        for first, _, last in re.findall(r"\b(\d+)( to | and )?(\d+)?", rows_of(function)):
            met |= set(range(int(first), int(last or first) + 1))
    unnamed = {int(number) for number, cells in rows.items() if not cells[-1]}
    assert unnamed <= met
    assert not {int(number) for number, cells in rows.items() if cells[-1] == "open"} & met


def test_the_modules_with_names_of_torch_are_those_of_the_page():
    named = re.findall(r"\w+", " ".join(table("dropin.md", r"`\w+`(, `\w+`)*")))
    assert sorted(named) == [name for name in warploom.nn.__all__ if hasattr(torch.nn, name)]


def rows_of(function):
    said = re.match(r"Rows? ([\d]+(?:(?: to | and |, )\d+)*)", getattr(function, "__doc__", None) or "")
    return said[1] if said else ""
