"""The patch of SGLang against the files of the released wheels."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from colospec.engine import sglang_install

FOLDER = Path(__file__).parent.parent / "third_party" / "sglang_patch"
APPLY = FOLDER / "apply.py"
VERSIONS = sorted(path.parent.name for path in FOLDER.glob("*/files.json"))


def names(version: str) -> list[str]:
    return sorted(json.loads((FOLDER / version / "files.json").read_text()))


@pytest.fixture(scope="session")
def wheels() -> dict[str, Path]:
    """The released wheels by version, downloaded once per machine."""
    default = Path.home() / ".cache"
    cache = Path(os.environ.get("XDG_CACHE_HOME", default)) / "colospec" / "wheels"
    cache.mkdir(parents=True, exist_ok=True)
    found = {}
    for version in VERSIONS:
        if not list(cache.glob(f"sglang-{version}-*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            done = subprocess.run(
                [*command, f"sglang=={version}", "--dest", str(cache)],
                capture_output=True,
                text=True,
                timeout=240,
            )
            if done.returncode:
                reason = done.stderr.strip().splitlines()[-1]
                pytest.skip(f"wants a package index with sglang {version}: {reason}")
        (found[version],) = cache.glob(f"sglang-{version}-*.whl")
    return found


@pytest.fixture(params=VERSIONS)
def site(request: pytest.FixtureRequest, wheels: dict[str, Path], tmp_path: Path) -> Path:
    """A folder of packages with the files of one release that the patch is about."""
    version = request.param
    with zipfile.ZipFile(wheels[version]) as wheel:
        for name in [*names(version), f"sglang-{version}.dist-info/METADATA"]:
            wheel.extract(name, tmp_path)
    return tmp_path


def run(action: str, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(APPLY), action, "--site", str(site)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def content(site: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(site)): path.read_bytes() for path in site.rglob("*") if path.is_file()
    }


def version_of(site: Path) -> str:
    return next(site.glob("*.dist-info")).name.removesuffix(".dist-info").removeprefix("sglang-")


def test_apply_patches_every_file_and_revert_restores_every_byte(site: Path) -> None:
    before = content(site)
    assert "is stock" in run("check", site).stdout

    done = run("apply", site)
    assert done.returncode == 0, done.stderr
    after = content(site)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == set(names(version_of(site)))
    assert before.keys() == after.keys()
    assert "is patched" in run("check", site).stdout

    assert run("revert", site).returncode == 0
    assert content(site) == before


def test_patched_files_compile_and_let_the_absent_package_be_absent(site: Path) -> None:
    assert run("apply", site).returncode == 0
    for name in names(version_of(site)):
        text = (site / name).read_text()
        compile(text, name, "exec")
        assert "    try:\n        from flashinfer" in text or "exist_ok=True)" in text


def test_a_second_apply_changes_nothing(site: Path) -> None:
    run("apply", site)
    times = {path: path.stat().st_mtime_ns for path in site.rglob("*.py")}
    again = run("apply", site)
    assert again.returncode == 0
    assert "already" in again.stdout
    assert times == {path: path.stat().st_mtime_ns for path in site.rglob("*.py")}


@pytest.mark.parametrize("action", ["apply", "revert", "check"])
def test_a_damaged_file_is_refused_and_nothing_changes(site: Path, action: str) -> None:
    if action == "revert":
        run("apply", site)
    damaged = site / random.choice(names(version_of(site)))
    data = bytearray(damaged.read_bytes())
    data[random.randrange(len(data))] ^= 1
    damaged.write_bytes(data)
    before = content(site)

    done = run(action, site)

    assert done.returncode == 1
    assert str(damaged) in done.stderr
    assert "--force-reinstall" in done.stderr
    assert content(site) == before


def test_a_kill_leaves_whole_files_and_the_next_run_finishes(site: Path) -> None:
    stock = content(site)
    run("apply", site)
    patched = content(site)
    for renames in range(len(names(version_of(site))) + 1):
        run("revert", site)
        _kill_before_rename(site, renames, stock, patched)


def _kill_before_rename(
    site: Path, renames: int, stock: dict[str, bytes], patched: dict[str, bytes]
) -> None:
    version = version_of(site)
    program = f"""
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("apply", {str(APPLY)!r})
apply = importlib.util.module_from_spec(spec)
spec.loader.exec_module(apply)
replace, done = os.replace, []
def dying(old, new):
    if len(done) == {renames}:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(replace(old, new))
os.replace = dying
apply.run("apply", apply.Path({str(site)!r}))
"""
    killed = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    everything = renames == len(names(version))
    assert killed.returncode == (0 if everything else -signal.SIGKILL)

    now = content(site)
    assert all(now[name] in (stock[name], patched[name]) for name in stock)
    state = run("check", site)
    if 0 < renames < len(names(version)):
        assert state.returncode == 1
        assert "half patched" in state.stderr
        with pytest.raises(RuntimeError, match=r"half applied; python .*apply\.py apply"):
            sglang_install.check_files(site, version)
    finish = random.choice(["apply", "revert"])
    assert run(finish, site).returncode == 0
    assert content(site) == (patched if finish == "apply" else stock)


def test_another_version_is_refused_by_name(tmp_path: Path) -> None:
    info = tmp_path / "sglang-0.4.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.4.1\n")
    (tmp_path / "sglang").mkdir()
    done = run("apply", tmp_path)
    assert done.returncode == 1
    assert "no patch for SGLang 0.4.1" in done.stderr
    assert "0.5.17" in done.stderr


def test_a_folder_without_sglang_is_refused(tmp_path: Path) -> None:
    done = run("check", tmp_path)
    assert done.returncode == 1
    assert "--site DIR" in done.stderr


def test_the_engine_accepts_stock_and_patched_files_and_no_others(site: Path) -> None:
    version = version_of(site)
    assert sglang_install.check_files(site, version) == version
    run("apply", site)
    assert sglang_install.check_files(site, version) == f"{version} (patched)"
    (site / names(version)[0]).write_text("")
    with pytest.raises(RuntimeError, match=rf"force-reinstall --no-deps sglang=={version}"):
        sglang_install.check_files(site, version)
    with pytest.raises(RuntimeError, match=r"0\.5\.99 is installed"):
        sglang_install.check_files(site, "0.5.99")


def test_engine_and_patch_know_the_same_hashes() -> None:
    recorded = {}
    for version in VERSIONS:
        files = json.loads((FOLDER / version / "files.json").read_text())
        recorded[version] = {name: (h["stock"], h["patched"]) for name, h in files.items()}
    assert recorded == sglang_install.FILES


def test_hunks_fit_forwards_and_backwards_only_where_they_belong() -> None:
    spec = importlib.util.spec_from_file_location("apply", APPLY)
    assert spec is not None
    assert spec.loader is not None
    apply = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(apply)
    old = [f"{i} {random.random()}\n" for i in range(30)]
    new = [*old[:5], "added\n", *old[5:19], *old[21:]]
    hunks = [
        (5, [" " + old[4], "+added\n", " " + old[5]]),
        (19, [" " + old[18], "-" + old[19], "-" + old[20], " " + old[21]]),
    ]
    before, after = "".join(old).encode(), "".join(new).encode()
    assert apply.change(before, hunks, backwards=False) == after
    assert apply.change(after, hunks, backwards=True) == before
    with pytest.raises(apply.PatchError, match="does not fit"):
        apply.change(after, hunks, backwards=False)
