"""How good the drafts of bench_quality.py are: by the reference loop, and through SGLang.

The reference loop decodes one sequence at a time, so the prompts are dealt out to processes of one
core each, and what they counted is added up. It runs in float32, where no two logits tie.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colospec.checkpoint.export import load_draft
from colospec.config import EngineConfig, Weights
from colospec.draft import registry
from colospec.draft.base import DraftModel
from colospec.engine.base import open_engine
from colospec.evaluate.acceptance import Acceptance, DecodingSettings, PlainOutput
from colospec.evaluate.compare import Comparison, DrafterReport, compare, held_out_loss
from colospec.evaluate.decoder import TargetDecoder
from colospec.evaluate.drafters import BigramDrafter, open_drafter
from colospec.evaluate.simulate import Simulation
from colospec.target import Target

CPU = torch.device("cpu")
BIGRAM = "bigram table"


@dataclass(frozen=True)
class Work:
    """What one process does: `prompts` [n] each; `texts` [n] each for the held-out loss."""

    target: Path
    export: Path
    successors: Tensor
    prompts: list[Tensor]
    texts: list[Tensor]
    settings: DecodingSettings


def measure(
    target: Path,
    export: Path,
    *,
    successors: Tensor,
    prompts: Sequence[Tensor],
    texts: Sequence[Tensor],
    settings: DecodingSettings,
    num_processes: int,
) -> Comparison:
    """Compare the draft in `export`, an untrained one and the bigram table on `prompts`."""
    work = [
        Work(
            target, export, successors, list(prompts[number::num_processes]),
            list(texts[number::num_processes]), replace(settings, seed=settings.seed + number),
        )
        for number in range(min(num_processes, len(prompts), len(texts)))
    ]  # fmt: skip
    if len(work) == 1:
        return _measure(work[0])
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(work), context) as pool:
        return merge(list(pool.map(_measure, work)))


def merge(parts: Sequence[Comparison]) -> Comparison:
    """Add up what was counted on different prompts; a loss is the mean of theirs."""
    plain = PlainOutput(
        outputs=[row for part in parts for row in part.plain.outputs],
        top2_gaps=[row for part in parts for row in part.plain.top2_gaps],
        seconds=sum(part.plain.seconds for part in parts),
        num_forwards=sum(part.plain.num_forwards for part in parts),
    )
    sizes = [len(part.plain.outputs) for part in parts]
    reports = {}
    for name in parts[0].drafters:
        some = [part.drafters[name] for part in parts]
        sampled = [one.sampled for one in some if one.sampled is not None]
        losses = [one.loss for one in some if one.loss is not None]
        reports[name] = DrafterReport(
            simulation=_simulation([one.simulation for one in some]),
            greedy=_acceptance([one.greedy for one in some], sizes),
            sampled=_acceptance(sampled, sizes) if sampled else None,
            loss=sum(losses) / len(losses) if losses else None,
        )
    return Comparison(plain, reports)


def through_sglang(
    target: Path, export: Path, prompts: Path, *, settings: DecodingSettings, num_prompts: int,
    prompt_tokens: int, out: Path, limit_s: float,
) -> dict[str, Any]:  # fmt: skip
    """Run `python -m colospec.evaluate --through sglang` greedily; return its report, or
    why there is none, as {"skipped": reason}."""
    if not torch.cuda.is_available():
        return {"skipped": "no CUDA GPU"}
    command = [
        sys.executable, "-m", "colospec.evaluate", "--through", "sglang",
        "--target", str(target), "--draft", str(export), "--prompts", str(prompts),
        "--num-prompts", str(num_prompts), "--prompt-tokens", str(prompt_tokens),
        "--max-new-tokens", str(settings.max_new_tokens),
        "--chain-length", str(settings.chain_length), "--json", str(out),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"skipped": f"no answer within {limit_s:.0f} s"}
    if done.returncode or not out.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        print(*lines[-15:], sep="\n")
        return {"skipped": lines[-1][:300]}
    return dict(json.loads(out.read_text()))


def _measure(work: Work) -> Comparison:
    torch.set_num_threads(1)
    target = Target.load(work.target, dtype="float32")
    trained = load_draft(work.export, target)
    torch.manual_seed(1)
    models = {"trained draft": trained, "untrained draft": trained.untrained(target)}
    losses = _losses(models, target, work.texts)
    drafters: dict[str, Any] = {name: open_drafter(m, target) for name, m in models.items()}
    drafters[BIGRAM] = BigramDrafter(work.successors)
    decoder = TargetDecoder(target, device=CPU)
    return compare(decoder, drafters, work.prompts, work.settings, losses=losses)


def _losses(
    models: dict[str, DraftModel], target: Target, texts: Sequence[Tensor]
) -> dict[str, float]:
    first = next(iter(models.values()))
    engine = open_engine(
        EngineConfig(name="hf"), target, registry.features(first.config, target),
        weights=Weights.pretrained, trust_remote_code=False, device=CPU,
        max_tokens=max(map(len, texts)), max_sequences=1,
    )  # fmt: skip
    return {name: held_out_loss(model, engine, texts) for name, model in models.items()}


def _simulation(parts: Sequence[Simulation]) -> Simulation:
    number = sum(part.num_places for part in parts)
    columns = zip(*(part.accuracies for part in parts), strict=True)
    places = [part.num_places for part in parts]
    accuracies = [
        sum(a * n for a, n in zip(column, places, strict=True)) / number for column in columns
    ]
    joint = sum(part.joint_acceptance_length * part.num_places for part in parts) / number
    return Simulation(number, accuracies, joint)


def _acceptance(parts: Sequence[Acceptance], sizes: Sequence[int]) -> Acceptance:
    total = Acceptance(parts[0].chain_length, parts[0].temperature)
    total.num_reached = [0] * total.chain_length
    found, first = [], 0
    for part, size in zip(parts, sizes, strict=True):
        total.num_steps += part.num_steps
        total.num_tokens += part.num_tokens
        total.num_target_forwards += part.num_target_forwards
        total.seconds += part.seconds
        total.num_reached = [
            a + b for a, b in zip(total.num_reached, part.num_reached, strict=True)
        ]
        total.outputs += part.outputs
        found += [replace(one, prompt=one.prompt + first) for one in part.divergences or ()]
        first += size
    if parts[0].divergences is not None:
        total.divergences = found
    return total
