"""Every setting of a run, with its type, meaning and checks: a module for each group.

Dataclasses hold types, docs and checks; the YAML files under conf/ hold choices. `load` turns the
composed DictConfig into a RunConfig once; nothing below ever sees a DictConfig. Nothing here
imports torch, so that `--help` and `--cfg job` answer at once.
"""

from colospec.config.compose import CONF_DIR, load, modes, register
from colospec.config.data import DataConfig
from colospec.config.draft import DraftConfig
from colospec.config.dtype import Dtype
from colospec.config.engine import EngineCheck, EngineConfig
from colospec.config.export import ExportConfig, ExportFormat
from colospec.config.launch import LaunchConfig
from colospec.config.limit import LimitConfig
from colospec.config.memory import MemoryConfig
from colospec.config.mistakes import explain
from colospec.config.mps import MpsConfig, MpsUse
from colospec.config.ranges import check_numbers
from colospec.config.ring import RingConfig, RingLease, RingPayload
from colospec.config.run import Mode, RunConfig, check
from colospec.config.target import TargetConfig, Weights
from colospec.config.topology import TopologyConfig
from colospec.config.tracker import TrackerConfig, TrackerName
from colospec.config.trainer import InitVocab, Schedule, TrainerConfig

__all__ = [
    "CONF_DIR",
    "DataConfig",
    "DraftConfig",
    "Dtype",
    "EngineCheck",
    "EngineConfig",
    "ExportConfig",
    "ExportFormat",
    "InitVocab",
    "LaunchConfig",
    "LimitConfig",
    "MemoryConfig",
    "Mode",
    "MpsConfig",
    "MpsUse",
    "RingConfig",
    "RingLease",
    "RingPayload",
    "RunConfig",
    "Schedule",
    "TargetConfig",
    "TopologyConfig",
    "TrackerConfig",
    "TrackerName",
    "TrainerConfig",
    "Weights",
    "check",
    "check_numbers",
    "explain",
    "load",
    "modes",
    "register",
]
