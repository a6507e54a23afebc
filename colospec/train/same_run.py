"""Whether a checkpoint belongs to the run that wants to go on from it."""

from __future__ import annotations

from typing import Any

from colospec.config import RunConfig
from colospec.train.provenance import plain

# What may differ when a run goes on: where, how long and how often, but not what is learnt.
_MAY_CHANGE = {
    "mode", "run_dir", "resume", "dry_run", "launch", "topology", "tracker", "limit", "memory",
    "ring", "engine", "mps", "data.path", "data.held_out_path", "data.cache_dir",
    "data.num_workers", "data.max_filtered_fraction", "draft.chunk_tokens", "draft.max_blocks",
    "trainer.max_steps", "trainer.epochs", "trainer.log_interval", "trainer.save_interval",
    "trainer.keep", "trainer.best_metric", "trainer.accumulation", "trainer.max_skipped_steps",
    "trainer.init_from", "trainer.init_vocab", "trainer.eval_interval", "trainer.probe_interval",
    "trainer.probe_prompts", "trainer.probe_tokens", "trainer.probe_alarm", "export",
}  # fmt: skip


def check_same_run(run: RunConfig, saved: dict[str, Any], digest: str, saved_digest: str) -> None:
    """Raise ValueError listing the settings in which a checkpoint's run differs from this one."""
    now = plain(run)
    different = []
    for group, value in now.items():
        old = saved.get(group)
        if group in _MAY_CHANGE or old == value:
            continue
        if not isinstance(value, dict) or not isinstance(old, dict):
            different.append(f"{group}: {old} -> {value}")
            continue
        for key in sorted(value.keys() | old.keys()):
            name = f"{group}.{key}"
            if name not in _MAY_CHANGE and old.get(key) != value.get(key):
                different.append(f"{name}: {old.get(key)} -> {value.get(key)}")
    if not different and digest != saved_digest:
        different.append("the data itself, or draft.max_blocks (its plan has another digest)")
    if different:
        raise ValueError(
            "the checkpoint in run_dir is of another run; these differ: "
            + "; ".join(different)
            + ". Use the old values, or another run_dir"
        )
