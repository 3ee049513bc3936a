"""The page of pitfalls keeps its word: thirty rows, places that exist, tests that name their
pitfall."""
import ast, importlib, re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT/"nbs"/"pitfalls.qmd").read_text("utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.splitlines() if re.match(r"\| \d", line)]
NUMBERS = re.compile(r"Pitfalls? (\d+(?:(?:,| and) \d+)*)")


def marked(docstring):
    "The pitfalls that a docstring names: 'Pitfall 7: …', 'Pitfalls 18 and 23: …'."
    return {int(n) for found in NUMBERS.findall(docstring) for n in re.findall(r"\d+", found)}


def names_in(path):
    "Test name → the pitfalls that its docstring names."
    tree = ast.parse(path.read_text("utf-8"))
    return {node.name: marked(ast.get_docstring(node) or "") for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


TESTS = {path.name: names_in(path) for path in (ROOT/"tests").glob("test_*.py")}


def test_there_are_thirty():
    "A row that is lost, doubled or broken by a stray `|` is seen."
    assert [int(row[0]) for row in ROWS] == list(range(1, 31))
    assert all(len(row) == 5 and all(row) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_pitfall_has_its_test_and_its_place(row):
    "A test or a function that was renamed or removed, or a test that guards something else."
    file, _, name = row[4].strip("`").partition("::")
    assert name in TESTS[file], f"tests/{file} has no {name}"
    assert int(row[0]) in TESTS[file][name], f"{name} does not say 'Pitfall {row[0]}: …'"
    for place in re.findall(r"`([\w.]+)`", row[3]):
        module, _, function = place.partition(".")
        assert hasattr(importlib.import_module(f"vcb_nb.{module}"), function), place


def test_no_test_names_a_pitfall_that_is_not_there():
    named = {n for tests in TESTS.values() for numbers in tests.values() for n in numbers}
    assert named == set(range(1, 31))
