"""The measurements of one draft algorithm for bench_step.py, in a process of its own.

What is measured is sent at once, as ("facts", dict) and ("row", dict), so that nothing that is
known is lost with the process.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import flops
import torch
import torch.distributed as dist
from step_case import LENGTHS, TINY_LENGTHS, Case, draft_config, make_target
from step_clock import Effort, path, peak_gib, seconds, slowest
from step_parts import Parts

from colospec.draft.eagle3.model import Eagle3
from colospec.train.provenance import plain

Row = dict[str, Any]
NO_TIME = "no time was left"
STEPS_S, PART_S = 4.0, 1.5
"""For the series of a step, and of a part of one."""


@dataclass(frozen=True)
class Plan:
    """What to measure; `deadline` is a time.monotonic() behind which nothing new begins."""

    name: str
    overrides: tuple[str, ...]
    is_tiny: bool
    repeats: int
    deadline: float

    def effort(self, way: str, limit_s: float) -> Effort | None:
        """The plain path is there to compare with, and on a GPU measured once."""
        is_once = way == "plain" and way != paths()[0]
        return None if is_once else Effort(self.repeats, limit_s)


def paths() -> tuple[str, ...]:
    """Return the ways to run here: on a CPU all is plain."""
    return ("kernels", "plain") if torch.cuda.is_available() else ("plain",)


def empty_rows(name: str, ways: Sequence[str]) -> dict[str, Row]:
    """Return the row of each way, in which nothing is measured; `skipped` and `failed` say why
    something is not: its name -> the reason."""
    return {way: {"draft": name, "path": way, "skipped": {}, "failed": {}} for way in ways}


def measure_draft(plan: Plan, pipe: Connection) -> None:
    """Be the process: measure, and send what is found."""
    torch.set_num_threads(1)  # as under torchrun
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Case(
        draft_config(plan.name, plan.overrides, tiny=plan.is_tiny),
        make_target(tiny=plan.is_tiny),
        TINY_LENGTHS if plan.is_tiny else LENGTHS,
        device,
    )
    Measurement(plan, case, paths(), pipe.send).run()


@dataclass
class Measurement:
    """Fills a row for each of `ways`; `send` is told of each change."""

    plan: Plan
    case: Case
    ways: Sequence[str]
    send: Callable[[tuple[str, dict[str, Any]]], None]
    rows: dict[str, Row] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = empty_rows(self.plan.name, self.ways)
        self._parts = Parts(self.case) if isinstance(self.case.draft, Eagle3) else None

    def run(self) -> None:
        """Measure all, the draft as it is first, then sharded and with its optimizer."""
        case = self.case
        facts = self.facts()
        self.send(("facts", facts))
        for way in self.ways:
            self.attempt(way, "step", partial(self._step, way, facts["tera_flops"]))
            if self._parts is not None:
                parts = partial(self._measure_parts, self._parts, way, facts["tera_flops"])
                self.attempt(way, "parts", parts)
            if way == "kernels":
                self.attempt(way, "profile", self._profile)
        backend = "nccl" if case.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        step = case.optimizer_step()
        for way in self.ways:
            self.attempt(way, "with optimizer", partial(self._with_optimizer, way, step))
        dist.destroy_process_group()

    def facts(self) -> dict[str, Any]:
        """Return what is so on all paths: settings, sizes, operations where there is a formula."""
        case = self.case
        work = flops.step(case.config, case.target, case.tokens)
        facts = {
            "settings": plain(case.config),
            "parameters": case.num_parameters,
            "tera_flops": {} if work is None else {"step": work.flop / 1e12},
            "counts": {} if work is None else work.counts,
        }
        if self._parts is not None:
            facts["tera_flops"] |= self._parts.tera_flops()
            facts["moved_gib"] = self._parts.moved_gib()
        return facts

    def attempt(self, way: str, what: str, measure: Callable[[], Row]) -> None:
        """Add to the row of `way`. What there is no memory or time for is skipped; what fails is
        told, and the rest goes on."""
        row = self.rows[way]
        if time.monotonic() > self.plan.deadline:
            row["skipped"][what] = NO_TIME
        else:
            try:
                with path(way):
                    row.update(measure())
            except torch.OutOfMemoryError as error:
                row["skipped"][what] = str(error)[:150]
            except Exception as error:
                traceback.print_exc()
                row["failed"][what] = f"{type(error).__name__}: {str(error)[:300]}"
            if self.case.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
        self.send(("row", row))

    def _step(self, way: str, tera_flops: dict[str, float]) -> Row:
        case = self.case
        took = seconds(case.step, case.device, self.plan.effort(way, STEPS_S))
        loss, peak = peak_gib(case.loss, case.device)
        row: Row = {"step_s": took, "loss": loss, "peak_gib": peak}
        if "step" in tera_flops:
            row["step_tflop_per_s"] = tera_flops["step"] / took
        return row

    def _measure_parts(self, parts: Parts, way: str, tera_flops: dict[str, float]) -> Row:
        row: Row = {}
        for name, run in parts.runs().items():
            took = seconds(run, self.case.device, self.plan.effort(way, PART_S))
            row |= {f"{name}_s": took, f"{name}_tflop_per_s": tera_flops[name] / took}
        return row

    def _profile(self) -> Row:
        return {"kernels": slowest(self.case.step, self.case.device)}

    def _with_optimizer(self, way: str, step: Callable[[], None]) -> Row:
        case = self.case
        took = seconds(step, case.device, self.plan.effort(way, STEPS_S))
        return {
            "with_optimizer_s": took,
            "samples_per_s": case.num_samples / took,
            "with_optimizer_peak_gib": peak_gib(step, case.device)[1],
        }
