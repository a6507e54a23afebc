"""The README says what is so: its tables come from result files, its commands and files exist."""

import importlib.util
import re
from pathlib import Path

from colospec.config import CONF_DIR

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_result_files(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.draw(README) == README, "python benchmarks/tables.py redraws README.md"


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)`", README)) <= targets


def test_modules_that_are_run_exist():
    for name in set(re.findall(r"python -m (colospec[\w.]*)", README)):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name


def test_modes_are_those_of_the_configuration():
    modes = {path.stem for path in (CONF_DIR / "mode").glob("*.yaml")}
    assert set(re.findall(r"\| `\+mode=(\w+)` \|", README)) == modes
