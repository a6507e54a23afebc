"""The C protocol under the thread, address and undefined-behaviour sanitizers."""

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = Path(__file__).parents[2] / "colospec" / "csrc"
GCC = ["gcc", "-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{SOURCES}"]


def compile_with(sanitizer, program, *sources):
    command = [*GCC, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    return subprocess.run(
        [*command, "-o", program, *sources], capture_output=True, text=True, timeout=60
    )


def build(sanitizer, folder):
    """Build race.c with the sanitizer; skip where gcc lacks it."""
    empty = folder / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    if compile_with(sanitizer, folder / "empty", empty).returncode:
        pytest.skip(f"gcc -fsanitize={sanitizer} does not link: install libsanitizer for this gcc")
    program = folder / "race"
    built = compile_with(sanitizer, program, HERE / "race.c", SOURCES / "ring.c")
    assert built.returncode == 0, built.stderr
    return program


@pytest.mark.parametrize(
    ("sanitizer", "scenario"),
    [
        ("thread", "peers"),
        ("address,undefined", "peers"),
        ("address,undefined", "flips"),
    ],
)
def test_protocol_is_clean_under_the_sanitizer(sanitizer, scenario, tmp_path):
    program = build(sanitizer, tmp_path)
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [program, scenario], capture_output=True, text=True, timeout=90, env=environment
    )
    assert done.returncode == 0, done.stderr
