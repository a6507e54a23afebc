"""Apply, check or revert the patch of an installed SGLang.

    python third_party/sglang_patch/apply.py check|apply|revert [--site DIR]

Every file is checked by its sha256 before and after, and replaced as a whole: first all new files
are written beside the old ones, then each takes the old one's place. A file that is neither as
released nor patched stops everything before anything changes. If this program is killed between two
files, `check` says so, and `apply` or `revert` finishes what was begun.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
SUFFIX = ".colospec-new"
HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class PatchError(Exception):
    """What is wrong with the installation, and what to type."""


class Patch:
    """The patch of one SGLang version, and the installation in `site` that it is for."""

    def __init__(self, site: Path) -> None:
        self.site = site
        self.version = installed_version(site)
        folder = HERE / self.version
        if not folder.is_dir():
            known = sorted(path.parent.name for path in HERE.glob("*/files.json"))
            raise PatchError(
                f"there is no patch for SGLang {self.version} in {site}, only for "
                f"{', '.join(known)}; pip install --no-deps sglang=={known[-1]}"
            )
        self.hashes: dict[str, dict[str, str]] = json.loads((folder / "files.json").read_text())
        self.hunks = parse((folder / "sglang.patch").read_text())

    def states(self) -> dict[str, str]:
        """Return "stock" or "patched" for each file; raises PatchError for any other content."""
        states = {}
        for name, hashes in self.hashes.items():
            file = self.site / name
            digest = sha256(file.read_bytes()) if file.is_file() else None
            found = [state for state, expected in hashes.items() if digest == expected]
            if not found:
                raise PatchError(
                    f"{file} is neither as SGLang {self.version} released it nor patched; nothing "
                    f"was changed. Reinstall it: pip install --force-reinstall --no-deps "
                    f"sglang=={self.version}"
                )
            states[name] = found[0]
        return states

    def bring_to(self, wanted: str) -> list[str]:
        """Make every file `wanted`, "stock" or "patched"; return the names that changed."""
        changing = [name for name, state in self.states().items() if state != wanted]
        try:
            for name in changing:
                self._write_beside(name, wanted)
            for name in changing:
                file = self.site / name
                os.replace(file.with_name(file.name + SUFFIX), file)  # noqa: PTH105
        finally:
            self._remove_leftovers()
        return changing

    def _write_beside(self, name: str, wanted: str) -> None:
        file = self.site / name
        content = change(file.read_bytes(), self.hunks[name], backwards=wanted == "stock")
        if sha256(content) != self.hashes[name][wanted]:
            raise PatchError(f"the patch of {name} does not lead to the recorded file; report this")
        new = file.with_name(file.name + SUFFIX)
        with new.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        shutil.copymode(file, new)

    def _remove_leftovers(self) -> None:
        for name in self.hashes:
            file = self.site / name
            file.with_name(file.name + SUFFIX).unlink(missing_ok=True)


def installed_version(site: Path) -> str:
    """Return the version of the SGLang in `site`; raises PatchError where there is none."""
    found = list(importlib.metadata.distributions(name="sglang", path=[str(site)]))
    if not found or not (site / "sglang").is_dir():
        raise PatchError(f"no SGLang is installed in {site}; give its folder with --site DIR")
    return found[0].version


def sha256(content: bytes) -> str:
    """Return the digest in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def parse(text: str) -> dict[str, list[tuple[int, list[str]]]]:
    """Return for each file of a unified diff its hunks: first old line (from 1), and the lines."""
    hunks: dict[str, list[tuple[int, list[str]]]] = {}
    lines = iter(split_lines(text))
    name = ""
    for line in lines:
        if line.startswith("--- a/"):
            name = line.removeprefix("--- a/").strip()
            next(lines)
        elif match := HUNK.match(line):
            old, new = (int(match[i] or 1) for i in (2, 4))
            body = []
            while old > 0 or new > 0:
                body.append(next(lines))
                old -= body[-1][0] in " -"
                new -= body[-1][0] in " +"
            hunks.setdefault(name, []).append((int(match[1]), body))
    return hunks


def change(content: bytes, hunks: list[tuple[int, list[str]]], *, backwards: bool) -> bytes:
    """Return `content` after the hunks, or before them; raises PatchError where they do not fit."""
    before, after = (" +", " -") if backwards else (" -", " +")
    lines = split_lines(content.decode())
    # Line numbers are those of the stock file: what lies before a hunk must be stock.
    for first, body in hunks if backwards else reversed(hunks):
        old = [line[1:] for line in body if line[0] in before]
        new = [line[1:] for line in body if line[0] in after]
        start = first - 1
        if lines[start : start + len(old)] != old:
            raise PatchError(f"the patch does not fit at line {first}; report this")
        lines[start : start + len(old)] = new
    return "".join(lines).encode()


def split_lines(text: str) -> list[str]:
    """Split as diff does: after each newline and nowhere else."""
    return io.StringIO(text, newline="\n").readlines()


def default_site() -> Path:
    """Return the folder that this Python imports SGLang from."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise PatchError("this Python has no SGLang; install it, or give its folder with --site")
    return Path(spec.origin).parent.parent


def run(action: str, site: Path | None) -> str:
    """Do what the command line says; return the line to print."""
    patch = Patch(site or default_site())
    where = f"SGLang {patch.version} in {patch.site}"
    if action == "check":
        states = set(patch.states().values())
        if len(states) > 1:
            raise PatchError(f"{where} is half patched; run apply or revert to finish it")
        return f"{where} is {states.pop()}"
    wanted = "patched" if action == "apply" else "stock"
    changed = patch.bring_to(wanted)
    if not changed:
        return f"{where} is {wanted} already"
    return f"{where} is {wanted} now: {', '.join(changed)}"


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Patch of an installed SGLang.")
    parser.add_argument("action", choices=["check", "apply", "revert"])
    parser.add_argument("--site", type=Path, help="folder that holds the package sglang")
    arguments = parser.parse_args()
    try:
        sys.stdout.write(run(arguments.action, arguments.site) + "\n")
    except PatchError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
