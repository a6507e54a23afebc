"""Command line of the MPS daemon: `python -m colospec.mps start|stop|status`.

A run needs none of it: it starts and stops a daemon of its own. It is for shell scripts and for
people who look. `keep` is the process that owns a daemon; `start` and runs start it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from colospec.mps import directory, gpus
from colospec.mps.control import PIPE_VARIABLE, Control
from colospec.mps.errors import MpsError
from colospec.mps.keeper import START_S, keep
from colospec.mps.start import start_keeper, stop_keeper


def main() -> int:
    """Run one command and return the exit code."""
    arguments = _parser().parse_args()
    try:
        return int(arguments.run(arguments))
    except MpsError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m colospec.mps", description=__doc__)
    root = argparse.ArgumentParser(add_help=False)
    root.add_argument(
        "--root", type=Path, default=directory.ROOT, help="where directories are made"
    )
    new = argparse.ArgumentParser(add_help=False)
    new.add_argument("--gpus", help="UUIDs, separated by commas (default: all visible GPUs)")
    new.add_argument("--start-s", type=float, default=START_S, help="seconds until it must answer")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("keep", parents=[root, new], help="own a daemon (used by start)")
    command.add_argument("--owner", type=int, required=True, help="pid with which the daemon ends")
    command.set_defaults(run=_keep)
    command = commands.add_parser(
        "start", parents=[root, new], help='eval "$(python -m colospec.mps start --owner $$)"'
    )
    command.add_argument(
        "--owner", type=int, help="pid with which the daemon ends (default: the session's leader)"
    )
    command.set_defaults(run=_start)
    command = commands.add_parser(
        "stop", parents=[root], help=f"stop the daemon that {PIPE_VARIABLE} names"
    )
    command.set_defaults(run=_stop)
    command = commands.add_parser("status", parents=[root], help="list your daemons and clients")
    command.set_defaults(run=_status)
    return parser


def _keep(arguments: argparse.Namespace) -> int:
    return keep(
        arguments.owner,
        gpus=_gpus(arguments),
        root=arguments.root,
        start_s=arguments.start_s,
    )


def _start(arguments: argparse.Namespace) -> int:
    """Print what the shell must export; only that goes to stdout."""
    owner = arguments.owner or os.getsid(0)
    uuids = _gpus(arguments)
    started = start_keeper(owner, gpus=uuids, root=arguments.root, start_s=arguments.start_s)
    sys.stdout.write(f"export {PIPE_VARIABLE}={shlex.quote(str(started.pipe))}\n")
    sys.stdout.write(f"export {gpus.VISIBLE_VARIABLE}={shlex.quote(uuids)}\n")
    started.keeper.returncode = 0  # it goes on without us: nothing to wait for
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    pipe = os.environ.get(PIPE_VARIABLE)
    if not pipe:
        raise MpsError(
            f"{PIPE_VARIABLE} is not set; `python -m colospec.mps status` lists your daemons: "
            f"type {PIPE_VARIABLE}=... before the command"
        )
    home = Path(pipe).parent
    record = directory.live(arguments.root).get(home)
    if record is None:
        raise MpsError(f"the daemon in {pipe} was not started by `python -m colospec.mps`")
    stop_keeper(home, record)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    """Print one line for each of this user's daemons."""
    found = directory.live(arguments.root)
    for home, record in found.items():
        try:
            clients = " ".join(map(str, sorted(Control(home / "pipe").clients()))) or "none"
        except MpsError as error:
            clients = f"unknown ({error})"
        sys.stdout.write(
            f"{home / 'pipe'}  daemon {record.daemon}  keeper {record.keeper}  "
            f"ends with {record.owner}  clients: {clients}\n"
        )
    if not found:
        sys.stdout.write(f"no MPS daemon of yours in {arguments.root}\n")
    return 0


def _gpus(arguments: argparse.Namespace) -> str:
    if arguments.gpus:
        return str(arguments.gpus)
    if not (found := gpus.visible()):
        raise MpsError(f"no GPU is visible ({gpus.VISIBLE_VARIABLE} is empty)")
    return gpus.uuid_list(found)


if __name__ == "__main__":
    sys.exit(main())
