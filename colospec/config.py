"""RunConfig: every setting of a run, with its type, meaning and checks.

Dataclasses hold types, docs and checks; the YAML files under conf/ hold choices. `load` turns the
composed DictConfig into a RunConfig once; nothing below ever sees a DictConfig. This module imports
no torch, so that `--help` and `--cfg job` answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

CONF_DIR = Path(__file__).parent / "conf"
if not CONF_DIR.is_dir():
    CONF_DIR = Path(__file__).parent.parent / "conf"


class Mode(Enum):
    """How engines and trainers share the GPUs."""

    colocate = "colocate"
    alternate = "alternate"


class Weights(Enum):
    """Where the target's weights come from."""

    pretrained = "pretrained"
    random = "random"


class Dtype(Enum):
    """Floating-point type, by torch's name; auto takes what the model's config.json says."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class EngineCheck(Enum):
    """How an engine proves at start that it captures what it should: layers compares with the
    outputs of the model's own layers, transformers also with a second copy of the model."""

    layers = "layers"
    transformers = "transformers"


class MpsUse(Enum):
    """require fails without CUDA MPS, auto falls back to time slicing with a warning."""

    require = "require"
    auto = "auto"
    off = "off"


class RingPayload(Enum):
    """Where slots lie on a GPU: ipc in its memory, host in pinned memory; auto is ipc where CUDA
    IPC works. A CPU has host memory alone."""

    auto = "auto"
    ipc = "ipc"
    host = "host"


class RingLease(Enum):
    """view reads the slot in place until backward is done; copy copies out and frees it at once."""

    view = "view"
    copy = "copy"


class Schedule(Enum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


class ExportFormat(Enum):
    """Layout of the exported draft: sglang is also read by vLLM, speculators by vLLM alone."""

    sglang = "sglang"
    speculators = "speculators"


class InitVocab(Enum):
    """Pruned vocabulary of a draft that training starts from: keep its own, or rebuild it from the
    supervised tokens of this data."""

    keep = "keep"
    rebuild = "rebuild"


class TrackerName(Enum):
    """Where metrics go beside metrics.jsonl."""

    none = "none"
    tensorboard = "tensorboard"
    wandb = "wandb"


@dataclass
class TopologyConfig:
    gpus: list[int] | None = None
    """Which GPUs of a node to use, by index; all that the ranks need, from 0, if null."""


@dataclass
class LaunchConfig:
    """Only for `python -m colospec.run`, which starts torchrun; torchrun's own flags win."""

    gpus: str = "auto"
    """GPUs per node to use: a number, or auto (all visible ones; 1 where there is none)."""
    nodes: int = 1
    """Number of nodes. Above 1, run the same command on every node with `rdzv_endpoint` set."""
    rdzv_endpoint: str | None = None
    """HOST:PORT of the first node; needed when nodes > 1."""
    max_restarts: int = 0
    """How often torchrun restarts a failed job; it resumes from the last checkpoint."""


@dataclass
class TargetConfig:
    path: str | None = None
    """Hugging Face directory of the target model, or a repository id that the local Hugging Face
    cache holds; null is the built-in demo target."""
    weights: Weights = Weights.pretrained
    """random runs any target from its config.json alone (benchmarks)."""
    dtype: Dtype = Dtype.auto
    """Type in which the target runs and in which features travel."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model directory. Off unless you ask for it."""


@dataclass
class DraftConfig:
    """What every draft algorithm has; each algorithm adds its own."""

    algorithm: str = MISSING
    """Its name: that of its folder in colospec/draft, or of an entry point."""
    aux_layer_ids: list[int] | None = None
    """Target layers whose outputs feed the draft, 0-based; null is the algorithm's own choice."""

    def check(self) -> None:
        """Raise ValueError for the first setting that cannot work."""
        ids = self.aux_layer_ids
        if ids is not None and (not ids or len(set(ids)) != len(ids) or min(ids) < 0):
            raise ValueError(
                f"draft.aux_layer_ids={ids} must be distinct layers of the target, from 0; "
                "null takes the default"
            )


@dataclass
class DataConfig:
    path: str | None = None
    """A .json, .jsonl or .parquet file, a directory of them, or a Hugging Face datasets directory;
    null is the built-in demo text."""
    max_length: int = 2048
    """Longest sample in tokens; longer ones are filtered out and counted."""
    token_budget: int = 8192
    """Tokens per micro-batch: sizes ring slots, KV pool and activations. At least max_length."""
    max_sequences: int = 128
    """Most samples in one micro-batch."""
    last_turn_only: bool | None = None
    """Supervise only the last assistant turn; null decides per sample: on for templates that drop
    the reasoning of earlier turns. A row's own `last_turn_only` wins."""
    min_loss_tokens: int = 1
    """Samples with fewer supervised tokens are filtered out and counted."""
    max_filtered_fraction: float = 0.5
    """More filtered rows than this is an error."""
    num_workers: int | None = None
    """Processes that tokenise; null is one per core."""
    cache_dir: str | None = None
    """Where tokenised data is kept; null is $XDG_CACHE_HOME/colospec."""
    held_out_path: str | None = None
    """Samples to evaluate on, in the forms of `path`; null takes them from `path`. What of `path`
    equals one of them is not trained on."""
    held_out_samples: int = 0
    """Most samples to evaluate on, drawn by the data's fingerprint alone; 0 is all of
    held_out_path, and none of `path`."""


@dataclass
class RingConfig:
    num_slots: int = 3
    """Micro-batches that an engine may be ahead of its trainer."""
    lease: RingLease = RingLease.view
    payload: RingPayload = RingPayload.auto


@dataclass
class MpsConfig:
    """CUDA MPS, by which trainer and engine share a GPU; without effect on a CPU and in alternate
    mode. Threads and memory limits are those of the MPS manual."""

    use: MpsUse = MpsUse.require
    trainer_priority: int = 0
    """Client priority: 0 is normal, 1 below normal."""
    engine_priority: int = 0
    trainer_threads: int | None = None
    """Cap on the share of SMs, in percent. Off: several caps make bfloat16 products wrong, and a
    run whose products are wrong does not start."""
    engine_threads: int | None = None
    limit_memory: bool = False
    """Let MPS enforce memory.*_fraction too, on all device memory of a process."""


@dataclass
class EngineConfig:
    name: str = "auto"
    """hf, sglang, or one that `module` registers; auto is sglang on CUDA and hf on a CPU."""
    module: str | None = None
    """Python module to import first: it registers an engine (colospec.engine.base.register)."""
    tp: int = 1
    """Tensor-parallel size of one engine replica; it divides the number of engine ranks."""
    forward_tokens: int | None = None
    """Most tokens in one forward pass of the target; longer micro-batches run in several, split
    between documents. Null runs a micro-batch at once."""
    check: EngineCheck = EngineCheck.layers
    server_args: dict[str, Any] = field(default_factory=dict)
    """Passed to SGLang's ServerArgs as they are: +engine.server_args.attention_backend=triton."""


@dataclass
class TrainerConfig:
    lr: float = 1e-4
    min_lr: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.5
    schedule: Schedule = Schedule.cosine
    warmup_fraction: float = 0.015
    """Share of all steps over which the learning rate rises from 0."""
    decay_fraction: float = 0.2
    """wsd: share of all steps, at the end, over which it falls to min_lr."""
    epochs: int = 1
    max_steps: int | None = None
    """Stop after this many optimizer steps; null trains for `epochs`."""
    accumulation: int = 1
    """Micro-batches per trainer and optimizer step."""
    dtype: Dtype = Dtype.auto
    """Type of the draft's computation; auto is bfloat16 on CUDA and float32 on the CPU. Master
    weights, optimizer state and losses are float32 in any case."""
    deterministic: bool = False
    """Use deterministic kernels alone: the same seed gives the same losses, more slowly."""
    log_interval: int = 10
    save_interval: int = 0
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = 2
    """Checkpoints to keep, beside the best one."""
    best_metric: str = "train/loss"
    """The checkpoint with the lowest value of it is kept; a name ending in _length: the highest."""
    max_skipped_steps: int = 5
    """Consecutive steps with NaN or Inf gradients (skipped on all ranks) before the run fails."""
    init_from: str | None = None
    """Exported draft directory to start from; null starts from random weights."""
    init_vocab: InitVocab = InitVocab.keep
    """init_from: whose pruned vocabulary the draft gets; rows of the head that the exported draft
    does not have start from the target's."""
    eval_interval: int = 0
    """Steps between evaluations on the held-out samples, and one at the end; 0 makes none."""
    probe_interval: int = 0
    """Steps between probes, and one at the end: the draft is exported, loaded back, and decodes
    held-out prompts for real; 0 makes none."""
    probe_prompts: int = 4
    """Held-out samples whose beginnings are the prompts of a probe."""
    probe_tokens: int = 32
    """Tokens that a probe decodes for each prompt."""
    probe_alarm: float = 0.1
    """Gap between real and simulated acceptance length, as a share of the simulated one, above
    which a probe warns."""


@dataclass
class ExportConfig:
    format: ExportFormat = ExportFormat.sglang
    dtype: Dtype = Dtype.bfloat16
    """Type of the weights in the file; float16 for targets that run in it, never auto."""


@dataclass
class TrackerConfig:
    name: TrackerName = TrackerName.none
    project: str = "colospec"


@dataclass
class MemoryConfig:
    """Shares of each GPU's memory, enforced in each role's allocator; trainer + engine + 0.10 <= 1.
    Without effect on a CPU."""

    trainer_fraction: float = 0.45
    engine_fraction: float = 0.45


@dataclass
class LimitConfig:
    """Longest time, in seconds, that a rank may spend in a phase before the job is ended."""

    start_s: float = 600.0
    """Until all ranks have joined."""
    load_s: float = 1800.0
    """Until data and models are loaded (the demo target is built in this phase)."""
    step_s: float = 300.0
    """Waiting for the other role; twice as long for a rank that finishes no micro-batch at all."""
    checkpoint_s: float = 900.0
    """Without a committed checkpoint while the end of the run waits for one; for a whole probe."""


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


def register() -> None:
    """Make the schema known to Hydra; config.yaml names it in its defaults list. The settings of
    draft algorithms are registered by `colospec.draft.catalog`."""
    ConfigStore.instance().store(name="schema", node=RunConfig)


def modes() -> list[str]:
    """Return the names that +mode= accepts."""
    return sorted(path.stem for path in (CONF_DIR / "mode").glob("*.yaml"))


def load(cfg: DictConfig) -> RunConfig:
    """Turn the composed config into a checked RunConfig.

    Raises ValueError naming the setting and the fix for a missing mode or values that cannot work
    together.
    """
    if OmegaConf.is_missing(cfg, "mode"):
        choices = " or ".join(f"+mode={name}" for name in modes())
        raise ValueError(f"no mode chosen; add {choices}")
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(f"{missing[0]} has no value; add {missing[0]}=...")
    run = OmegaConf.to_object(cfg)
    assert isinstance(run, RunConfig)
    check(run)
    return run


def check(run: RunConfig) -> None:
    """Raise ValueError for the first setting that cannot work, naming it and what to type."""
    check_numbers(run, at_least=dict(_AT_LEAST), above_zero=_ABOVE_ZERO, at_most_one=_AT_MOST_ONE)
    data, trainer, memory = run.data, run.trainer, run.memory
    if data.token_budget < data.max_length:
        raise ValueError(
            f"data.token_budget={data.token_budget} is less than data.max_length="
            f"{data.max_length}: the longest sample would fit no micro-batch; "
            f"set data.token_budget={data.max_length} or lower data.max_length"
        )
    if trainer.min_lr > trainer.lr:
        raise ValueError(f"trainer.min_lr={trainer.min_lr} is above trainer.lr={trainer.lr}")
    if len(trainer.betas) != 2 or not all(0 <= beta < 1 for beta in trainer.betas):
        raise ValueError(f"trainer.betas={trainer.betas} must be two numbers in [0, 1)")
    if memory.trainer_fraction + memory.engine_fraction + 0.10 > 1.0 + 1e-9:
        raise ValueError(
            f"memory.trainer_fraction={memory.trainer_fraction} + memory.engine_fraction="
            f"{memory.engine_fraction} + 0.10 for the CUDA contexts is above 1; lower one of them"
        )
    if trainer.dtype is Dtype.float16:
        raise ValueError("trainer.dtype=float16 would need loss scaling; use bfloat16 or float32")
    if run.export.dtype is Dtype.auto:
        raise ValueError("export.dtype=auto does not exist; use bfloat16, float16 or float32")
    if run.seed < 0:
        raise ValueError(f"seed={run.seed} must be at least 0")
    if run.launch.nodes > 1 and not run.launch.rdzv_endpoint:
        raise ValueError(
            f"launch.nodes={run.launch.nodes} needs launch.rdzv_endpoint=HOST:PORT, "
            "an address of the first node"
        )
    if run.launch.nodes > 1 and run.launch.max_restarts:
        raise ValueError(
            f"launch.max_restarts={run.launch.max_restarts} works on one node; with launch.nodes="
            f"{run.launch.nodes} set launch.max_restarts=0 and start the same command again"
        )
    if run.launch.nodes > 1 and not run.run_dir:
        raise ValueError(
            f"launch.nodes={run.launch.nodes} needs run_dir=PATH on a file system "
            "that all nodes share"
        )
    if run.launch.gpus != "auto" and not (run.launch.gpus.isdigit() and int(run.launch.gpus) > 0):
        raise ValueError(f"launch.gpus={run.launch.gpus} must be auto or a number from 1")
    for name in ("mps.trainer_threads", "mps.engine_threads"):
        threads = attrgetter(name)(run)
        if threads is not None and threads > 100:
            raise ValueError(f"{name}={threads} is a share of the SMs in percent: at most 100")
    if run.mode is Mode.alternate and run.engine.tp != 1:
        raise ValueError(
            f"engine.tp={run.engine.tp} does not work in mode=alternate, where every rank runs its "
            "own engine; set engine.tp=1 or use +mode=colocate"
        )
    _check_evaluation(run)
    run.draft.check()


def _check_evaluation(run: RunConfig) -> None:
    data, trainer = run.data, run.trainer
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


_AT_LEAST: tuple[tuple[str, float], ...] = (
    ("data.held_out_samples", 0),
    ("data.max_length", 4),
    ("data.max_sequences", 1),
    ("data.min_loss_tokens", 1),
    ("data.max_filtered_fraction", 0),
    ("data.num_workers", 1),
    ("engine.forward_tokens", 1),
    ("engine.tp", 1),
    ("launch.max_restarts", 0),
    ("launch.nodes", 1),
    ("mps.engine_priority", 0),
    ("mps.engine_threads", 1),
    ("mps.trainer_priority", 0),
    ("mps.trainer_threads", 1),
    ("ring.num_slots", 1),
    ("trainer.accumulation", 1),
    ("trainer.epochs", 1),
    ("trainer.eval_interval", 0),
    ("trainer.keep", 1),
    ("trainer.log_interval", 1),
    ("trainer.lr", 0),
    ("trainer.max_skipped_steps", 1),
    ("trainer.max_steps", 1),
    ("trainer.min_lr", 0),
    ("trainer.probe_interval", 0),
    ("trainer.probe_prompts", 1),
    ("trainer.probe_tokens", 2),
    ("trainer.save_interval", 0),
    ("trainer.weight_decay", 0),
)
_ABOVE_ZERO = (
    "limit.checkpoint_s",
    "limit.load_s",
    "limit.start_s",
    "limit.step_s",
    "memory.engine_fraction",
    "memory.trainer_fraction",
    "trainer.eps",
    "trainer.max_grad_norm",
    "trainer.probe_alarm",
)
_AT_MOST_ONE = (
    "data.max_filtered_fraction",
    "mps.engine_priority",
    "mps.trainer_priority",
    "trainer.decay_fraction",
    "trainer.warmup_fraction",
)


def check_numbers(
    settings: object,
    *,
    at_least: Mapping[str, float] = MappingProxyType({}),
    above_zero: Sequence[str] = (),
    at_most_one: Sequence[str] = (),
    prefix: str = "",
) -> None:
    """Raise ValueError for the first setting, by its dotted name, that is out of its range.

    A setting that is None passes. `at_most_one` are those in [0, 1]; `prefix` stands before the
    names in messages.
    """
    for name, low in at_least.items():
        value = attrgetter(name)(settings)
        if value is not None and not value >= low:
            raise ValueError(f"{prefix}{name}={value} must be at least {low:g}")
    for name in above_zero:
        value = attrgetter(name)(settings)
        if value is not None and not value > 0:
            raise ValueError(f"{prefix}{name}={value} must be above 0")
    for name in at_most_one:
        value = attrgetter(name)(settings)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{prefix}{name}={value} must be in [0, 1]")
