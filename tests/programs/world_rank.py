"""A rank that joins the job and then behaves as told: `world_rank.py RANK:ACTION ...`.

Actions: late=S, absent (fail before joining), raise, differ, kill, stop, hang (in C).
Other ranks wait in a receive that never comes, or end at once with `--finish`.
"""

import ctypes
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from colospec import log
from colospec.config import LimitConfig, Mode
from colospec.topology import build
from colospec.world import open_world


def main():
    actions = dict(word.split(":", 1) for word in sys.argv[1:] if ":" in word)
    rank = int(os.environ["RANK"])
    action = actions.get(str(rank), "")
    topology = build(
        Mode.colocate,
        world_size=int(os.environ["WORLD_SIZE"]),
        local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        visible_gpus=0,
    )
    log.to_console()
    if action.startswith("late="):
        time.sleep(float(action.removeprefix("late=")))
    if action == "absent":
        time.sleep(3)
        sys.exit("failed while it imported")
    limit = LimitConfig(start_s=40, load_s=40, step_s=4)
    with open_world(topology, limit) as world:
        sys.stderr.write(f"began {rank} pid {os.getpid()}\n")
        if action == "raise":
            raise ValueError("boom in start-up")
        world.agree("configuration", "other" if action == "differ" else "same")
        world.join_role()
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == world.place.world_size
        world.barrier("joined")
        world.phase("train", limit.step_s if action == "hang" else 60)
        sys.stderr.write(f"joined {rank} pid {os.getpid()}\n")
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if action == "hang":
            ctypes.CDLL(None).sleep(60)
        if "--finish" not in sys.argv:
            while not world.stop_requested:
                # Blocked in C for long: only the watchdog can end this rank.
                world.store.set("alive", b"1")
                ctypes.CDLL(None).usleep(30_000_000 if "--blocked" in sys.argv else 50_000)
            sys.stderr.write(f"rank {rank} saw the request to stop\n")
            sys.stderr.write(f"rank {rank}: foreign {world.is_stop_foreign}\n")


if __name__ == "__main__":
    main()
