"""Mistakes that can be told from the source alone."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "colospec"
COLLECTIVES = {
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all",
    "all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather",
    "gather_object", "irecv", "isend", "monitored_barrier", "recv", "recv_object_list", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send",
    "send_object_list",
}  # fmt: skip


def uses(names):
    """Each place where torch.distributed's functions `names` are used: (file, node, call)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        modules = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name.startswith("torch.distributed")
        }
        calls = {node.func: node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in names:
                if ast.unparse(node.value) in modules:
                    yield str(path.relative_to(PACKAGE)), node, calls.get(node)
            elif isinstance(node, ast.ImportFrom) and node.module == "torch.distributed":
                found = names & {alias.name for alias in node.names}
                assert not found, f"{path}: use dist.{found} so that this test sees it"


def group_of(call):
    return next((ast.unparse(k.value) for k in call.keywords if "group" in k.arg), None)


def test_collectives_are_the_trainers_own_or_the_checkpoint_threads():
    found = list(uses(COLLECTIVES))
    assert {file for file, _, _ in found} == {
        "checkpoint/peers.py",
        "train/evaluation.py",
        "train/frozen.py",
        "train/optim.py",
        "train/probe.py",
        "train/produce.py",  # of an engine: the ranks of its replica
        "train/stop.py",
        "train/trainer.py",
    }
    for file, _, call in found:
        if file == "checkpoint/peers.py":
            assert group_of(call) == "self.group"
        elif call is not None:
            assert group_of(call) is None, "the trainers are the default group"


def test_process_groups_are_made_in_three_places():
    groups = {file for file, _, _ in uses({"init_process_group", "new_group", "split_group"})}
    assert groups == {"engine/sglang_runner.py", "train/trainer.py", "world.py"}


def test_every_checkpoint_call_names_a_group_or_works_alone():
    found = list(uses({"save", "load", "async_save"}))
    assert {file for file, _, _ in found} == {"checkpoint/state.py"}
    for _, _, call in found:
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert words.get("process_group") == "group" or words["no_dist"] == "True"


def optional_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = [r.split("=")[0].split(">")[0] for extra in extras.values() for r in extra]
    return {name.replace("-", "_") for name in names} | {"torch.utils.tensorboard"}


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_optional_packages_are_imported_only_by_the_function_that_uses_them(path):
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name not in optional_packages()
            assert name.split(".")[0] not in optional_packages()


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("torch.compile", "shapes differ in every step, and compiling them costs seconds each"),
        ("flex_attention", "it recompiles with the number of queries and has no CPU backward"),
        ("pkill", "processes of other jobs and users would die as well"),
        ("killall", "processes of other jobs and users would die as well"),
        ("pgrep", "another user's process would be taken for ours"),
        ("new_group = ", "torch.distributed is used as it is, not patched"),
    ],
)
def test_nothing_uses(word, why):
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "launch").rglob("*.sh"), ROOT / "Makefile"]
    if word == "new_group = ":
        # In alternate mode SGLang starts in a world of N trainers, and is shown one of one.
        files.remove(PACKAGE / "engine" / "sglang_runner.py")
    assert not [file for file in files if word in file.read_text()], why
