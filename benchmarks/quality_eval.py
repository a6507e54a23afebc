"""How good the drafts of bench_quality.py are: by the reference loop, and through SGLang.

The reference loop decodes one sequence at a time, and its time goes into starting kernels. So the
prompts are dealt out, two by two, to processes that share the GPU through MPS, and what they
counted is added up. It runs in float32, where no two logits tie.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.pool import AsyncResult
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
from colospec.evaluate.drafters import BigramDrafter, Drafter, open_drafter
from colospec.evaluate.simulate import Simulation
from colospec.evaluate.target_decoder import TargetDecoder
from colospec.mps.control import PIPE_VARIABLE
from colospec.mps.errors import MpsError
from colospec.mps.gpus import VISIBLE_VARIABLE, uuid_list, visible
from colospec.mps.start import start_keeper, stop_all_of
from colospec.target import Target

CPU = torch.device("cpu")
BIGRAM = "bigram table"
TRAINED, UNTRAINED = "trained draft", "untrained draft"
CHUNK = 2
LOSS_THREADS = 4


@dataclass(frozen=True)
class Work:
    """What is measured: the drafts in `exports`, by name, on `prompts` [n] each."""

    target: Path
    exports: dict[str, Path]
    successors: Tensor
    prompts: list[Tensor]
    settings: DecodingSettings
    device: torch.device

    def chunks(self) -> list[Work]:
        """Return the work in parts of a few prompts, each with random numbers of its own."""
        return [
            replace(
                self,
                prompts=self.prompts[first : first + CHUNK],
                settings=replace(self.settings, seed=self.settings.seed + first),
            )
            for first in range(0, len(self.prompts), CHUNK)
        ]


def measure(
    work: Work, *, texts: Sequence[Tensor], num_processes: int, limit_s: float
) -> dict[str, Comparison]:
    """Compare each draft, an untrained one of its kind and the bigram table on the same prompts.

    `texts` [n] each give the held-out losses. What is not measured after `limit_s` seconds is left
    out: prompts from the end of the list, or the losses. Raises RuntimeError where not even the
    first prompts are done by then.
    """
    deadline = time.monotonic() + limit_s
    context = multiprocessing.get_context("spawn")
    with (
        _sharing(work.device) as environment,
        context.Pool(num_processes, _begin, (environment,)) as pool,
    ):
        pending = pool.apply_async(_losses, (work, list(texts)))
        parts = _until(deadline, [pool.apply_async(_measure, (one,)) for one in work.chunks()])
        losses = _until(deadline, [pending])
    if not parts:
        raise RuntimeError(f"the reference loop measured no {CHUNK} prompts in {limit_s:.0f} s")
    return split(merge(parts), list(work.exports), losses[0] if losses else {})


def split(
    whole: Comparison, drafts: Sequence[str], losses: dict[str, float]
) -> dict[str, Comparison]:
    """Return the reports of each draft with its losses, and the bigram table beside each."""
    parts = {}
    for draft in drafts:
        reports = {
            kind: replace(whole.drafters[_name(draft, kind)], loss=losses.get(_name(draft, kind)))
            for kind in (TRAINED, UNTRAINED)
        }
        parts[draft] = Comparison(whole.plain, {**reports, BIGRAM: whole.drafters[BIGRAM]})
    return parts


def merge(parts: Sequence[Comparison]) -> Comparison:
    """Add up what was counted on different prompts."""
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
        reports[name] = DrafterReport(
            simulation=_simulation([one.simulation for one in some]),
            greedy=_acceptance([one.greedy for one in some], sizes),
            sampled=_acceptance(sampled, sizes) if sampled else None,
        )
    return Comparison(plain, reports)


def through_sglang(
    target: Path, exports: dict[str, Path], prompts: Path, *, settings: DecodingSettings,
    num_prompts: int, prompt_tokens: int, out: Path, limit_s: float,
) -> dict[str, Any]:  # fmt: skip
    """Run `python -m colospec.evaluate --through sglang` greedily; return its report of each of
    `exports`, by name, or why there is none, as {"skipped": reason}."""
    if not torch.cuda.is_available():
        return {"skipped": "no CUDA GPU"}
    out.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "colospec.evaluate", "--through", "sglang",
        "--target", str(target), "--draft", *map(str, exports.values()),
        "--prompts", str(prompts),
        "--num-prompts", str(num_prompts), "--prompt-tokens", str(prompt_tokens),
        "--max-new-tokens", str(settings.max_new_tokens),
        "--chain-length", str(settings.chain_length), "--json", str(out),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        said = (late.stderr or b"").decode(errors="replace").strip()  # bytes here, even for text
        lines = [*said.splitlines(), f"no answer within {limit_s:.0f} s"]
        print(*lines[-15:], sep="\n")
    else:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        if done.returncode:
            print(*lines[-15:], sep="\n")
    if not out.is_file():
        return {"skipped": lines[-1][:300]}
    # The report grows draft by draft, and what it has by now counts.
    found = json.loads(out.read_text())["drafters"].values()
    return {
        name: one if "through_sglang" in one else {"skipped": lines[-1][:300]}
        for name, one in zip(exports, found, strict=True)
    }


@contextmanager
def _sharing(device: torch.device) -> Iterator[dict[str, str]]:
    """Yield the environment in which processes share the GPU; its MPS daemon ends afterwards."""
    if device.type != "cuda":
        yield {}
        return
    try:
        uuids = uuid_list(visible()[:1])
        started = start_keeper(os.getpid(), gpus=uuids)
        environment = {PIPE_VARIABLE: str(started.pipe), VISIBLE_VARIABLE: uuids}
    except MpsError as error:
        print(f"without MPS: {error}", flush=True)
        environment = {}
    try:
        yield environment
    finally:
        try:
            stop_all_of(os.getpid())
        except MpsError as error:
            print(error, flush=True)


def _begin(environment: dict[str, str]) -> None:
    """Prepare a process, before CUDA starts in it."""
    os.environ.update(environment)
    torch.set_num_threads(1)


def _until(deadline: float, results: Sequence[AsyncResult[Any]]) -> list[Any]:
    """Return the results up to the first that is not there at the deadline."""
    done = []
    for result in results:
        try:
            done.append(result.get(max(0.0, deadline - time.monotonic())))
        except multiprocessing.TimeoutError:
            break
    return done


def _measure(work: Work) -> Comparison:
    target = _target(work.target)
    drafters: dict[str, Drafter] = {}
    for draft, export in work.exports.items():
        for kind, model in _models(export, work.target).items():
            drafters[_name(draft, kind)] = open_drafter(model.to(work.device), target)
    drafters[BIGRAM] = BigramDrafter(work.successors.to(work.device))
    return compare(_decoder(work.target, work.device), drafters, work.prompts, work.settings)


def _losses(work: Work, texts: Sequence[Tensor]) -> dict[str, float]:
    """Return the losses on held-out text, by draft and kind; on the CPU."""
    torch.set_num_threads(min(LOSS_THREADS, os.cpu_count() or 1))
    target, losses = _target(work.target), {}
    for draft, export in work.exports.items():
        models = _models(export, work.target)
        engine = open_engine(
            EngineConfig(name="hf"), target, registry.features(models[TRAINED].config, target),
            weights=Weights.pretrained, trust_remote_code=False, device=CPU,
            max_tokens=max(map(len, texts)), max_sequences=1,
        )  # fmt: skip
        for kind, model in models.items():
            losses[_name(draft, kind)] = held_out_loss(model, engine, texts)
    torch.set_num_threads(1)
    return losses


@cache
def _target(path: Path) -> Target:
    return Target.load(path, dtype="float32")


@cache
def _decoder(path: Path, device: torch.device) -> TargetDecoder:
    return TargetDecoder(_target(path), device=device)


@cache
def _models(export: Path, target: Path) -> dict[str, DraftModel]:
    trained = load_draft(export, _target(target))
    torch.manual_seed(1)
    return {TRAINED: trained, UNTRAINED: trained.untrained(_target(target))}


def _name(draft: str, kind: str) -> str:
    return f"{draft}, {kind}"


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
