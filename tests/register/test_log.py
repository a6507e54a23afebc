"""What we say is seen, whatever other packages do to logging."""

import subprocess
import sys

PROGRAM = """
import logging, sys
from pathlib import Path
from colospec import log

log.setup(Path(sys.argv[1]), rank=int(sys.argv[2]))
# What serving engines and libraries do when they are imported or started.
logging.basicConfig(level=logging.ERROR, force=True)
logging.getLogger().setLevel(logging.CRITICAL)
logging.getLogger("colospec").info("step 7 is done")
logging.getLogger("colospec.train.report").info("loss 1.25")
logging.getLogger("colospec.engine").warning("slow")
"""


def words_of(tmp_path, rank):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(rank)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, (tmp_path / "log" / f"rank{rank}.log").read_text()


def test_settings_of_other_loggers_do_not_silence_ours(tmp_path):
    console, file = words_of(tmp_path, 0)
    for text in ("step 7 is done", "loss 1.25", "warning: slow"):
        assert console.count(text) == 1
    for text in ("step 7 is done", "loss 1.25", "slow"):
        assert file.count(text) == 1


def test_other_ranks_write_to_their_own_files_only(tmp_path):
    console, file = words_of(tmp_path, 3)
    assert console == ""
    assert "loss 1.25" in file
