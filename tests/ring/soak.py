"""Kill one side of a ring at a random moment, again and again; the other must notice in order.

    python tests/ring/soak.py 1000     # prints figures; exits 1 if a promise was broken

A survivor must see the death within a second, have everything that was published, in order and
whole, and leave nothing in /dev/shm.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_S = 1.0
DEAD = 2  # _ring.DEAD


@dataclass
class Figures:
    """What a soak saw; times are from the SIGKILL to the survivor's report, in seconds."""

    detection_s: list[float] = field(default_factory=list)
    slots: int = 0
    lost_or_wrong: int = 0
    misjudged: int = 0
    leftovers: int = 0
    leaked_fds: int = 0

    @property
    def is_clean(self):
        return (
            not (self.lost_or_wrong or self.misjudged or self.leftovers or self.leaked_fds)
            and max(self.detection_s) < LIMIT_S
        )

    def __str__(self):
        ordered = sorted(self.detection_s)
        p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
        return (
            f"kills {len(ordered)}; slots read {self.slots}; lost, torn or out of order "
            f"{self.lost_or_wrong}; survivors that saw no death {self.misjudged}; "
            f"detection ms p50 {statistics.median(ordered) * 1e3:.1f}, p99 {p99 * 1e3:.1f}, "
            f"max {ordered[-1] * 1e3:.1f}; left in /dev/shm {self.leftovers}; "
            f"leaked file descriptors {self.leaked_fds}"
        )


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.ring.peer", *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


def start_pair(num_slots=3, fail_after=-1):
    """Return (engine, trainer) processes that are attached to each other and at work."""
    engine = start("engine", num_slots, fail_after)
    offer = json.loads(engine.stdout.readline())
    trainer = start("trainer", offer["pid"], *offer["files"], num_slots)
    trainer.stdout.readline()
    engine.stdin.write(f"{trainer.pid}\n")
    engine.stdin.flush()
    return engine, trainer


def kill_one(figures):
    """Start a pair, kill a random side after a random time, and hear the other."""
    pair = start_pair(num_slots=random.randint(1, 4))
    try:
        victim, survivor = random.sample(pair, 2)
        time.sleep(random.random() * 0.02)
        victim.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        line = survivor.communicate(timeout=30)[0]
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    report = json.loads(line or "{}")
    if report.get("status") != DEAD:
        figures.misjudged += 1
        return
    figures.detection_s.append(report["at"] - killed)
    if report["side"] == "trainer":
        figures.slots += report["count"]
        figures.lost_or_wrong += report["lost"] + report["wrong"]


def names(directory):
    """The files of `directory`, without those that other users of torch on this host come by."""
    return {path.name for path in Path(directory).iterdir() if not path.name.startswith("torch_")}


def soak(num_kills):
    """Kill `num_kills` times; return the figures."""
    figures = Figures()
    shm, fds = names("/dev/shm"), names("/proc/self/fd")
    for _ in range(num_kills):
        kill_one(figures)
    # Ours would bear our name; other programs may come and go meanwhile.
    figures.leftovers = sum("colospec" in name for name in names("/dev/shm") - shm)
    figures.leaked_fds = len(names("/proc/self/fd") - fds)
    return figures


if __name__ == "__main__":
    result = soak(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    print(result)  # noqa: T201
    sys.exit(0 if result.is_clean else 1)
