"""Algorithms are found by their folder or by an entry point, and need no edit elsewhere."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from colospec.config import CONF_DIR
from colospec.draft import catalog, registry
from colospec.draft.base import DraftModel

OTHER = """
from dataclasses import dataclass
from colospec.config import DraftConfig
from colospec.draft.catalog import Algorithm

@dataclass
class Config(DraftConfig):
    algorithm: str = "{name}"
    width: int = 3

ALGORITHM = Algorithm(config=Config, model="{name}_package.model:Model")
"""


@pytest.fixture(autouse=True)
def fresh_catalog():
    yield
    catalog.algorithms.cache_clear()


def install(directory, name, *, package=OTHER):
    """Lay out a distribution with one entry point, as pip would; return its site directory."""
    info = directory / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[colospec.draft]\n{name} = {name}_package\n")
    (directory / f"{name}_package").mkdir()
    (directory / f"{name}_package" / "__init__.py").write_text(package.format(name=name))
    return directory


@pytest.mark.parametrize("name", sorted(catalog.algorithms()))
def test_every_folder_has_settings_a_model_a_yaml_and_its_own_name(name):
    algorithm = catalog.find(name)
    assert algorithm.config().algorithm == name
    assert algorithm.config.__module__ == f"colospec.draft.{name}.config"
    assert issubclass(registry.find(name), DraftModel)
    assert (CONF_DIR / "draft" / f"{name}.yaml").is_file()


def test_every_yaml_has_a_folder():
    assert catalog.choices() == sorted(catalog.algorithms())


def test_no_two_algorithms_write_the_same_architecture():
    writers = {}
    for algorithm in catalog.algorithms():
        for form in registry.formats(algorithm).values():
            for name in form.architectures:
                writers.setdefault(name, set()).add(algorithm)
    assert set(writers) == set(registry.architectures())
    assert [name for name, algorithms in writers.items() if len(algorithms) > 1] == []


def test_settings_are_found_without_importing_torch():
    code = (
        "import sys; from colospec.draft import catalog; catalog.register(); "
        "assert len(catalog.choices()) > 1; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_installed_algorithm_is_a_choice_like_any_other(tmp_path):
    site = install(tmp_path, "fastdraft")
    done = subprocess.run(
        [sys.executable, "-m", "colospec.run", "+mode=colocate", "draft=fastdraft",
         "draft.width=7", "--cfg", "job"],
        capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": f"{site}:{CONF_DIR.parent}", "PATH": ""},
    )  # fmt: skip
    assert "algorithm: fastdraft" in done.stdout, done.stderr
    assert "width: 7" in done.stdout


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("no_such_package", "no draft algorithm .ModuleNotFoundError"),
        ("colospec.log", "no draft algorithm .AttributeError"),
    ],
)
def test_an_entry_point_to_something_else_is_named(monkeypatch, value, says):
    point = EntryPoint("mine", value, catalog.GROUP)
    monkeypatch.setattr(catalog, "entry_points", lambda **_: [point])
    catalog.algorithms.cache_clear()
    with pytest.raises(ValueError, match=f"mine = {value}.*{says}"):
        catalog.find("mine")


def test_two_algorithms_of_one_name_are_refused(monkeypatch):
    point = EntryPoint("dflash", "colospec.draft.eagle3", catalog.GROUP)
    monkeypatch.setattr(catalog, "entry_points", lambda **_: [point])
    catalog.algorithms.cache_clear()
    with pytest.raises(ValueError, match=r"dflash = colospec.draft.eagle3.*another"):
        catalog.algorithms()
