"""Train the demo's target in about a minute, on any CPU."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from colospec.demo.recipe import (
    BATCH_SIZE,
    LEARNING_RATE,
    MATRIX_LEARNING_RATE,
    MAX_SECONDS,
    RACE_STEPS,
    WARMUP_STEPS,
    WINDOW,
    qwen3_config,
)

log = logging.getLogger(__name__)


def train_model(tokens: Tensor, held_out: Tensor, num_steps: int) -> Any:
    """Train the target on random windows of `tokens` [N]."""
    from transformers import Qwen3ForCausalLM

    generator = torch.Generator().manual_seed(0)
    tell = _teller(num_steps)
    with _fastest() as race, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(qwen3_config())
        optimizers = _optimizers(model)
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        begin, step, progress = time.monotonic(), 0, 0.0
        while progress < 1.0:
            decay = min(1.0, (step + 1) / WARMUP_STEPS) * (1.0 - progress)
            batch = _windows(tokens, BATCH_SIZE, generator)
            with race(step):
                model(input_ids=batch, labels=batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer, rate in zip(optimizers, rates, strict=True):
                    optimizer.param_groups[0]["lr"] = rate * decay
                    optimizer.step()
                    optimizer.zero_grad()
            step += 1
            progress = max(step / num_steps, (time.monotonic() - begin) / MAX_SECONDS)
            tell(progress)
        seconds = time.monotonic() - begin
        model.eval()
        with torch.no_grad():
            batch = _windows(held_out, 2 * BATCH_SIZE, generator)
            loss = model(input_ids=batch, labels=batch).loss.item()
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    log.info(
        "demo target: %.1f million parameters, %d steps in %.0f s, loss on held-out files %.2f",
        *(size, step, seconds, loss),
    )
    if step < num_steps:
        log.warning(
            "the demo target had time for %d of %d steps, as this machine is slow or busy: what "
            "drafts gain on so plain a target is not what the README shows; delete demo-* in the "
            "cache (~/.cache/colospec) to build it again",
            step, num_steps,
        )  # fmt: skip
    return model


def _optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers, AdamW for the rest.

    In the same time Muon came to a loss of 3.8 where AdamW alone came to 4.3.
    """
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    known = set(map(id, matrices))
    rest = [weight for weight in model.parameters() if id(weight) not in known]
    return [
        torch.optim.Muon(matrices, MATRIX_LEARNING_RATE, weight_decay=0.0),
        torch.optim.AdamW(rest, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _windows(tokens: Tensor, number: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(tokens) - WINDOW, (number, 1), generator=generator)
    return tokens[starts + torch.arange(WINDOW)]


@contextmanager
def _fastest() -> Iterator[Callable[[int], AbstractContextManager[None]]]:
    """Give a context for each training step that runs it the way that is fastest here.

    The first steps try the ways in turn. bfloat16 doubles the speed of CPUs that have it and ruins
    that of others. torchrun gives each rank one thread, but the other ranks are waiting for this
    one, so all cores are ours; where other programs keep them busy, though, threads that wait for
    each other are slower than one alone, by a factor of hundreds.
    """
    before = torch.get_num_threads()
    num_cores = min(4, len(os.sched_getaffinity(0)))
    ways = [(num, low) for num in sorted({1, num_cores}) for low in (False, True)]
    seconds = dict.fromkeys(ways, 0.0)

    @contextmanager
    def race(step: int) -> Iterator[None]:
        trial = step // RACE_STEPS
        way = ways[trial] if trial < len(ways) else min(ways, key=seconds.__getitem__)
        torch.set_num_threads(way[0])
        begin = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16, enabled=way[1]):
            yield
        # The first step with a new way also makes its kernels.
        if trial < len(ways) and step % RACE_STEPS:
            seconds[way] += time.monotonic() - begin

    try:
        yield race
    finally:
        torch.set_num_threads(before)


def _teller(num_steps: int) -> Callable[[float], None]:
    """Return a function that logs the finished share, four times in all."""
    begin, shown = time.monotonic(), [0.0]

    def tell(share: float) -> None:
        if shown[0] + 0.25 <= share < 1.0:
            shown[0] = share
            left = (time.monotonic() - begin) * (1 / share - 1)
            log.info("demo target: %.0f%% of %d steps, %.0f s left", 100 * share, num_steps, left)

    return tell
