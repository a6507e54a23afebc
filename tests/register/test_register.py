"""The register of known failures in CONTRIBUTING.md is whole, and names tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NUM_FAILURES, NUM_LATENT = 52, 22
TEXT = (ROOT / "CONTRIBUTING.md").read_text().partition("## Register of known failures")[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if re.match(r"\| *(\d|L)", line)
]
TESTS = sorted({name for row in ROWS for name in re.findall(r"`(tests/[^`]*)`", row[-1])})


@cache
def names_in(file):
    """Names of the test functions of a file; those of a class as Class::name."""
    names = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            names |= {f"{node.name}::{method.name}" for method in methods}
    return {name for name in names if name.rpartition("::")[2].startswith("test_")}


def test_every_failure_has_one_row():
    failures = [str(number) for number in range(1, NUM_FAILURES + 1)]
    latent = [f"L{number}" for number in range(1, NUM_LATENT + 1)]
    assert [row[0] for row in ROWS] == failures + latent


def test_every_row_says_what_went_wrong_and_what_excludes_it():
    for row in ROWS:
        assert len(row) == 3, row
        _, failure, excluded = row
        assert len(failure) > 15, row
        assert len(excluded) > 20, row


@pytest.mark.parametrize("name", TESTS)
def test_every_named_test_exists(name):
    file, _, test = name.partition("::")
    assert test in names_in(file)
