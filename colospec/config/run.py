"""RunConfig: all settings of a run, and what must hold between their groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from colospec.config.data import DataConfig
from colospec.config.draft import DraftConfig
from colospec.config.engine import EngineConfig
from colospec.config.export import ExportConfig
from colospec.config.launch import LaunchConfig
from colospec.config.limit import LimitConfig
from colospec.config.memory import MemoryConfig
from colospec.config.mps import MpsConfig
from colospec.config.ranges import check_numbers
from colospec.config.ring import RingConfig
from colospec.config.target import TargetConfig
from colospec.config.topology import TopologyConfig
from colospec.config.tracker import TrackerConfig
from colospec.config.trainer import TrainerConfig


class Mode(Enum):
    """How engines and trainers share the GPUs."""

    colocate = "colocate"
    alternate = "alternate"


@dataclass
class RunConfig:
    mode: Mode = MISSING
    """Chosen with +mode=colocate or +mode=alternate."""
    run_dir: str | None = None
    """Where the run keeps everything; an existing one resumes. Null makes a new one in outputs/."""
    resume: str = "auto"
    """auto continues from the newest good checkpoint of run_dir; never refuses a run_dir that has
    one; a PATH starts from that checkpoint directory."""
    dry_run: bool = False
    """Print ranks, memory and steps, load no model, and stop."""
    seed: int = 0
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    draft: DraftConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    ring: RingConfig = field(default_factory=RingConfig)
    mps: MpsConfig = field(default_factory=MpsConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    limit: LimitConfig = field(default_factory=LimitConfig)


def check(run: RunConfig) -> None:
    """Raise ValueError for the first setting that cannot work, naming it and what to type."""
    if run.seed < 0:
        raise ValueError(f"seed={run.seed} must be at least 0")
    run.launch.check()
    run.draft.check()
    run.data.check()
    run.ring.check()
    run.mps.check()
    # `engine.check` is a setting, so this group has no method of that name.
    check_numbers(run.engine, at_least={"forward_tokens": 1, "tp": 1}, prefix="engine.")
    run.trainer.check()
    run.export.check()
    run.memory.check()
    run.limit.check()
    if run.launch.nodes > 1 and not run.run_dir:
        raise ValueError(
            f"launch.nodes={run.launch.nodes} needs run_dir=PATH on a file system "
            "that all nodes share"
        )
    if run.mode is Mode.alternate and run.engine.tp != 1:
        raise ValueError(
            f"engine.tp={run.engine.tp} does not work in mode=alternate, where every rank runs its "
            "own engine; set engine.tp=1 or use +mode=colocate"
        )
    _check_evaluation(run.data, run.trainer)


def _check_evaluation(data: DataConfig, trainer: TrainerConfig) -> None:
    for name in ("eval", "probe"):
        interval = getattr(trainer, f"{name}_interval")
        if interval and data.held_out_path is None and not data.held_out_samples:
            raise ValueError(
                f"trainer.{name}_interval={interval} has nothing to evaluate on; set "
                "data.held_out_samples=64, or data.held_out_path=FILE"
            )
        if trainer.best_metric.startswith(f"{name}/") and not interval:
            raise ValueError(
                f"trainer.best_metric={trainer.best_metric} is never measured; set "
                f"trainer.{name}_interval"
            )
        if trainer.best_metric.startswith(f"{name}/") and trainer.save_interval % interval:
            raise ValueError(
                f"trainer.best_metric={trainer.best_metric} ranks checkpoints that are measured, "
                f"every trainer.{name}_interval={interval} steps; set trainer.save_interval to a "
                "multiple of it"
            )
    room = min(data.max_length, data.token_budget // trainer.probe_prompts)
    if trainer.probe_interval and 2 * trainer.probe_tokens > room:
        raise ValueError(
            f"trainer.probe_tokens={trainer.probe_tokens} leaves no room for a prompt: the "
            f"trainer.probe_prompts={trainer.probe_prompts} texts of a probe have {room} tokens "
            f"each (data.max_length, data.token_budget); set trainer.probe_tokens={room // 2}"
        )
