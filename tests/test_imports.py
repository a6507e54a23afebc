"""Who may import whom: only leftward on the data line, and only what pyproject.toml declares."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "colospec"
LINE = [
    "config", "topology", "store", "signals", "watchdog", "world", "batch", "target", "mps",
    "launch", "data", "ring", "engine", "draft", "checkpoint", "evaluate", "demo", "train", "sweep",
    "dry_run", "doctor", "run",
]  # fmt: skip
FOR_ALL = {"durable", "log", "metrics"}
DISTRIBUTION = {"hydra": "hydra-core", "PIL": "pillow"}


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def station(path):
    """The place of a file on the line: its top-level folder or module."""
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "colospec":
                yield from (f"colospec.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_leftward_only(path):
    here = station(path)
    if here == "__init__":
        return
    allowed = FOR_ALL | {"_ring"}
    if here not in FOR_ALL:
        assert here in LINE, f"{here} has no place on the line: add it to LINE and CONTRIBUTING.md"
        allowed |= set(LINE[: LINE.index(here) + 1])
    for name in imported(path):
        if name.startswith("colospec."):
            assert name.split(".")[1] in allowed, f"{here} must not import {name}"


def test_imports_and_declared_dependencies_are_the_same_set():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {requirement.split(">")[0] for requirement in project["dependencies"]}
    optional = {
        r.split("=")[0].split(">")[0]
        for name in ("sglang", "tensorboard", "wandb")
        for r in project["optional-dependencies"][name]
    }
    used = {
        DISTRIBUTION.get(top, top)
        for path in sources()
        for name in imported(path)
        if (top := name.split(".")[0]) not in sys.stdlib_module_names and top != "colospec"
    }
    # These come with transformers (its fast tokenizers), and with torch for CUDA.
    used -= {"tokenizers", "triton"}
    assert used - optional == declared


def test_sglang_is_imported_by_its_own_engine_alone():
    pattern = re.compile(r'import_module\(\s*"sglang|^\s*(import|from) sglang', re.M)
    users = [p.relative_to(PACKAGE) for p in sources() if pattern.search(p.read_text())]
    assert users
    assert all(user.parent.name == "engine" and user.name.startswith("sglang") for user in users)


def test_settings_compose_without_importing_torch():
    stations = {"config", "launch", "sweep", "log", "run"}
    paths = [path for path in sources() if station(path) in stations]
    assert {station(path) for path in paths} == stations
    for path in paths:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in {"torch", "transformers"} for name in names)


def test_every_module_says_what_it_is_for():
    for path in sources():
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_a_rank_starts_without_transformers_and_the_compiler():
    """Every rank of a job pays for what it imports: a second, where nobody tokenises or decodes."""
    code = "import sys, colospec.train.rank; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"transformers", "datasets", "torch._dynamo"}
