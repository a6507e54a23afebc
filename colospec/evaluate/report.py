"""Report on a finished run: its draft against an untrained draft and a bigram table."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colospec import durable
from colospec.batch import FeatureSpec
from colospec.checkpoint.export import load_draft
from colospec.config import EngineConfig, Weights
from colospec.data.encode import load_tokenizer
from colospec.draft import registry
from colospec.draft.base import DraftModel
from colospec.engine.base import Engine, open_engine
from colospec.evaluate.acceptance import DecodingSettings
from colospec.evaluate.compare import Comparison, compare, held_out_loss
from colospec.evaluate.curves import draw_curves
from colospec.evaluate.drafters import (
    BigramDrafter,
    most_frequent_successors,
    open_drafter,
)
from colospec.evaluate.prompts import read_prompts
from colospec.evaluate.target_decoder import TargetDecoder
from colospec.target import Target

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
TEXT_TOKENS = 256
UNTRAINED_SEED = 1


@dataclass(frozen=True)
class ReportSettings:
    """How much to measure."""

    num_prompts: int = 16
    prompt_tokens: int = 64
    max_new_tokens: int = 64
    chain_length: int = 5
    temperature: float = 1.0


@dataclass(frozen=True)
class RunReport:
    """The comparison, and the files that hold it; `curves` is None where nothing was logged."""

    comparison: Comparison
    report: Path
    curves: Path | None


def find_export(run_dir: Path) -> Path:
    """Return the draft that a run exported. Raises ValueError if there is none."""
    export = run_dir / "export"
    if not (export / "config.json").is_file():
        raise ValueError(
            f"{run_dir} has no export/config.json; give the directory of a run that ended"
        )
    return export


def report_run(
    run_dir: Path,
    target: Target,
    *,
    train_path: Path,
    eval_path: Path,
    settings: ReportSettings,
) -> RunReport:
    """Measure `run_dir`/export on prompts of `eval_path`; write report.json and curves.png there.

    `train_path` is what the bigram table is counted from. Everything runs on the CPU. Raises
    ValueError where `run_dir` has no draft for `target`.
    """
    export = find_export(run_dir)
    tokenizer = load_tokenizer(target.path)
    trained = load_draft(export, target)
    successors = _successors(train_path, tokenizer, target.vocab_size)
    models = {"trained draft": trained, "untrained draft": _untrained(trained, target)}
    engine = _open_engine(target, trained)
    texts = _prompts(eval_path, tokenizer, settings.num_prompts, TEXT_TOKENS)
    losses = {name: held_out_loss(model, engine, texts) for name, model in models.items()}
    drafters = {name: open_drafter(model, target) for name, model in models.items()}
    drafters["bigram table"] = BigramDrafter(successors)
    comparison = compare(
        TargetDecoder(target, device=CPU),
        drafters,
        _prompts(eval_path, tokenizer, settings.num_prompts, settings.prompt_tokens),
        DecodingSettings(
            max_new_tokens=settings.max_new_tokens,
            chain_length=settings.chain_length,
            temperature=settings.temperature,
        ),
        losses=losses,
    )
    return _write(run_dir, comparison)


def _write(run_dir: Path, comparison: Comparison) -> RunReport:
    report = run_dir / "report.json"
    durable.write(report, json.dumps(comparison.to_dict(), indent=2) + "\n")
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        return RunReport(comparison, report, None)
    curves = run_dir / "curves.png"
    lengths = {name: one.greedy.acceptance_length for name, one in comparison.drafters.items()}
    draw_curves(metrics, curves, real=lengths)
    return RunReport(comparison, report, curves)


def _prompts(path: Path, tokenizer: Any, number: int, num_tokens: int) -> list[Tensor]:
    return read_prompts(path, tokenizer, num_prompts=number, prompt_tokens=num_tokens)


def _successors(path: Path, tokenizer: Any, vocab_size: int) -> Tensor:
    with path.open() as lines:
        texts = [json.loads(line)["text"] for line in lines]
    rows = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
    masks = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return most_frequent_successors(list(zip(rows, masks, strict=True)), vocab_size=vocab_size)


def _untrained(trained: DraftModel, target: Target) -> DraftModel:
    """Build what the run started from: the same draft with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        return trained.untrained(target)


def _open_engine(target: Target, draft: DraftModel) -> Engine:
    spec: FeatureSpec = registry.features(draft.config, target)
    return open_engine(
        EngineConfig(name="hf"),
        target,
        spec,
        weights=Weights.pretrained,
        trust_remote_code=False,
        device=CPU,
        max_tokens=TEXT_TOKENS,
        max_sequences=1,
    )
