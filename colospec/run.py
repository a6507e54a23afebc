"""The entry point, with two faces: under torchrun it works, under plain python it starts torchrun.

torchrun --nproc-per-node 8 -m colospec.run +mode=colocate          work: every rank
python -m colospec.run +mode=colocate                               launch: starts the line above
python -m colospec.run -m +mode=colocate trainer.lr=1e-4,3e-4       launch, once per job
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from colospec import config, launch, log
from colospec.config import RunConfig
from colospec.draft import catalog

if TYPE_CHECKING:
    from colospec.topology import Topology


# Once per process: all jobs of a sweep share one directory.
STARTED = time.strftime("outputs/%Y-%m-%d/%H-%M-%S")
PATIENCE_S = 30.0
"""torchrun ends all ranks at the first that fails: the others leave the one that speaks, and may
still be importing, the time to say what is wrong."""


def under_torchrun() -> bool:
    """Tell which face to show."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_rank0() -> bool:
    """True in the one process that owns the run directory and the console."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def is_first_of_node() -> bool:
    """True in the process that speaks for its node before the job has a log."""
    return not under_torchrun() or os.environ["LOCAL_RANK"] == "0"


def run_directory(chosen: str | None) -> str:
    """Return the directory of a job, or of a sweep's jobs: `run_dir`, or a new one."""
    return chosen or STARTED


def topology_of(run: RunConfig) -> Topology:
    """Place the ranks that torchrun started, or would start."""
    from colospec import topology

    visible = launch.visible_gpus()
    if under_torchrun():
        world_size, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    else:
        local = launch.ranks_per_node(run)
        world_size = local * run.launch.nodes
        if run.dry_run and run.launch.gpus != "auto":
            visible = max(visible, int(run.launch.gpus))
    return topology.build(
        run.mode,
        world_size=world_size,
        local_world_size=local,
        visible_gpus=visible,
        gpus=run.topology.gpus,
        tp=run.engine.tp,
    )


def start(cfg: DictConfig) -> float | None:
    """Run one composed job on the face that is called for; the objective of a launched one."""
    run = config.load(cfg)
    topology = topology_of(run)
    hydra_config = HydraConfig.get()
    is_sweep = hydra_config.mode is hydra.types.RunMode.MULTIRUN
    run_dir = hydra_config.runtime.output_dir if is_sweep else run_directory(run.run_dir)
    if run.dry_run:
        if is_rank0():
            from colospec import dry_run

            dry_run.show(run, topology)
        return None
    if under_torchrun():
        check_restarts(run)
        from colospec.store import StoreUnreachable
        from colospec.train.rank import run_rank

        try:
            code = run_rank(run, topology, Path(run_dir))
        except StoreUnreachable as error:
            raise launch.JobFailed(str(error)) from error
        if code:
            sys.exit(code)
        return None
    overrides = [o for o in hydra_config.overrides.task if not o.lstrip("+").startswith("sweep=")]
    return launch.launch(run, overrides, Path(run_dir))


def check_restarts(run: RunConfig) -> None:
    """Raise ValueError where torchrun's restarts cannot work."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts == 0:
        return
    if os.environ["WORLD_SIZE"] != os.environ["LOCAL_WORLD_SIZE"]:
        # Every agent counts the restarts of its own node, and the ranks would not find each other.
        raise ValueError(
            f"--max-restarts={restarts} works on one node; on several leave it out, and start the "
            "same command again"
        )
    if run.run_dir is None:
        raise ValueError(
            "with --max-restarts a restarted job must find its run directory; add run_dir=PATH"
        )


def task(cfg: DictConfig) -> float | None:
    """Run `start`, with settings' errors as one line; a sweep goes on after a failed job."""
    sys.stderr = sys.__stderr__
    log.to_console()
    try:
        return start(cfg)
    except (ValueError, launch.JobFailed) as error:
        if not is_first_of_node():
            sys.exit(f"error: {error}")  # said if the first of the node has nothing to say
        say(str(error))
        if HydraConfig.get().mode is hydra.types.RunMode.MULTIRUN:
            return math.inf
        sys.exit(2 if isinstance(error, ValueError) else 1)


def say(error: str) -> None:
    """Print an error, and leave it for torchrun's closing summary."""
    log.console.print(f"error: {error}", style="bold red", markup=False)
    if under_torchrun():
        from colospec.watchdog import record_for_torchrun

        record_for_torchrun(error)


def refuse_sweep_in_torchrun(words: list[str]) -> None:
    """Exit with the right command when a multirun was asked for inside torchrun."""
    flags = {"-m", "--multirun", "hydra.mode=MULTIRUN"}
    if not any(word in flags or word.lstrip("+").startswith("sweep=") for word in words):
        return
    rest = [word for word in words if word not in flags]
    if is_rank0():
        say(
            "a sweep cannot run inside torchrun: every job needs fresh processes. Type\n"
            f"    python -m colospec.run -m {shlex.join(rest)}"
        )
    sys.exit(2)


def main() -> None:
    """Parse the command line and run."""
    try:
        run_task()
    except SystemExit as ended:
        if ended.code and not is_first_of_node():
            time.sleep(PATIENCE_S)
        raise


def run_task() -> None:
    """Let Hydra compose the settings, and call `task` with them."""
    if under_torchrun():
        # Until the watchdog listens, a SIGINT ends a rank at once, as SIGTERM does: some imports
        # swallow KeyboardInterrupt, and the rank would wait for others that have ended.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        refuse_sweep_in_torchrun(sys.argv[1:])
        if not is_first_of_node():
            # One rank speaks for its node while the settings are composed.
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    OmegaConf.register_new_resolver("run_directory", run_directory)
    OmegaConf.register_new_resolver("drafts", lambda: ", ".join(catalog.choices()))
    config.register()
    catalog.register()
    decorate = hydra.main(
        version_base="1.3", config_path=str(config.CONF_DIR), config_name="config"
    )
    # Hydra then leaves its errors to us.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        decorate(task)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if is_first_of_node():
            say(config.explain(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
