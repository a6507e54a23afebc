"""Run several drafters on the same prompts, and put their numbers side by side."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from colospec.batch import Cursor, FeatureBatch, Features, TokenBatch
from colospec.draft.base import DraftModel, StepContext
from colospec.engine.base import Engine
from colospec.evaluate.acceptance import (
    Acceptance,
    DecodingSettings,
    PlainOutput,
    decode_plain,
    decode_speculatively,
    looping_share,
)
from colospec.evaluate.drafters import Drafter
from colospec.evaluate.simulate import Simulation, simulate
from colospec.evaluate.target_decoder import TargetDecoder

log = logging.getLogger(__name__)

WARMUP_TOKENS = 8


@dataclass(frozen=True)
class DrafterReport:
    """One drafter's numbers; `sampled` only where a temperature was asked for.

    `loss` is the training loss on held-out text, per supervised token; None where there is none.
    """

    simulation: Simulation
    greedy: Acceptance
    sampled: Acceptance | None
    loss: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The reports of all drafters, and the plain greedy decoding that they are compared with."""

    plain: PlainOutput
    drafters: dict[str, DrafterReport]

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, ready for JSON."""
        return {
            "num_prompts": len(self.plain.outputs),
            "plain_tokens_per_s": self.plain.num_tokens / self.plain.seconds,
            "plain_looping_share": looping_share(self.plain.outputs),
            "drafters": {name: self._report(one) for name, one in self.drafters.items()},
        }

    def table(self) -> Table:
        """Return the table that a terminal shows."""
        first = next(iter(self.drafters.values()))
        table = Table(
            title=f"acceptance length, bonus token counted (1 to {first.greedy.chain_length + 1})",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            caption="saved: target forward passes; loops, saved, tok/s, exact: greedy",
        )
        rows = [(name, self._cells(one)) for name, one in self.drafters.items()]
        plain = self._plain_cells()
        # A column that no drafter has a number for is not shown.
        names = [name for name in plain if any(cells[name] for _, cells in rows)]
        table.add_column("drafter", no_wrap=True)
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for drafter, cells in [*rows, ("none", plain)]:
            table.add_row(drafter, *(cells[name] or "-" for name in names))
        return table

    def _cells(self, one: DrafterReport) -> dict[str, str]:
        loss = "" if one.loss is None else f"{one.loss:.2f}"
        sampled = "" if one.sampled is None else f"{one.sampled.acceptance_length:.2f}"
        return {
            "loss": loss,
            "simul.": f"{one.simulation.simulated_acceptance_length:.2f}",
            "greedy": f"{one.greedy.acceptance_length:.2f}",
            self._temperature(): sampled,
            "loops": f"{looping_share(one.greedy.outputs):.0%}",
            "saved": f"{one.greedy.forwards_saved(self.plain):.0%}",
            "tok/s": f"{one.greedy.tokens_per_s:.0f}",
            "exact": "yes" if one.greedy.is_lossless else "NO",
        }

    def _plain_cells(self) -> dict[str, str]:
        return {
            "loss": "",
            "simul.": "",
            "greedy": "1.00",
            self._temperature(): "1.00",
            "loops": f"{looping_share(self.plain.outputs):.0%}",
            "saved": "0%",
            "tok/s": f"{self.plain.num_tokens / self.plain.seconds:.0f}",
            "exact": "",
        }

    def _temperature(self) -> str:
        sampled = [one.sampled for one in self.drafters.values() if one.sampled]
        return f"T={sampled[0].temperature:g}" if sampled else "sampled"

    def _report(self, one: DrafterReport) -> dict[str, Any]:
        return {
            "loss": one.loss,
            "simulated": {
                "acceptance_length": one.simulation.simulated_acceptance_length,
                "joint_acceptance_length": one.simulation.joint_acceptance_length,
                "accuracies": one.simulation.accuracies,
                "num_places": one.simulation.num_places,
            },
            "greedy": one.greedy.to_dict(self.plain),
            "sampled": one.sampled.to_dict(None) if one.sampled else None,
        }


def compare(
    decoder: TargetDecoder,
    drafters: Mapping[str, Drafter],
    prompts: Sequence[Tensor],
    settings: DecodingSettings,
    *,
    losses: Mapping[str, float] | None = None,
) -> Comparison:
    """Measure every drafter on `prompts`, each [n] token ids: greedily, and sampled at
    `settings.temperature` if that is above 0.

    Where greedy output differs from plain decoding a warning says where, and how close a call the
    target's choice was.
    """
    prompts = [prompt.to(decoder.device) for prompt in prompts]
    greedy = replace(settings, temperature=0.0)
    # Not timed: the first calls also set up kernels.
    decode_plain(decoder, prompts[:1], replace(greedy, max_new_tokens=WARMUP_TOKENS))
    plain = decode_plain(decoder, prompts, greedy)
    reports = {}
    for name, drafter in drafters.items():
        texts = _texts(decoder, drafter, prompts, plain)
        result = decode_speculatively(decoder, drafter, prompts, greedy, plain=plain)
        _warn(name, result)
        reports[name] = DrafterReport(
            simulation=simulate(drafter, texts, chain_length=settings.chain_length),
            greedy=result,
            sampled=decode_speculatively(decoder, drafter, prompts, settings)
            if settings.temperature
            else None,
            loss=(losses or {}).get(name),
        )
    return Comparison(plain, reports)


def held_out_loss(model: DraftModel, engine: Engine, texts: Sequence[Tensor]) -> float:
    """Return the draft's training loss on texts [n] whose every token is supervised.

    One text at a time on the CPU; the mean is over tokens.
    """
    total = count = 0.0
    generator = torch.Generator().manual_seed(0)
    for token_ids in texts:
        mask = torch.ones(len(token_ids), dtype=torch.bool)
        tokens = TokenBatch.pack(Cursor(0, 0, 0), (0,), [token_ids], [mask])
        features = Features.empty(engine.spec, len(token_ids), torch.device("cpu"))
        engine.capture(tokens, features)
        with torch.no_grad():
            context = StepContext(
                step=0, total_steps=1, num_loss_tokens=len(token_ids), generator=generator
            )
            loss, number = model(FeatureBatch(tokens, features), context).metrics["loss"]
        total, count = total + float(loss), count + float(number)
    return total / count


def _texts(
    decoder: TargetDecoder, drafter: Drafter, prompts: Sequence[Tensor], plain: PlainOutput
) -> list[tuple[Tensor, Tensor, int]]:
    """Read each prompt with its plain continuation once more, for the features of all tokens."""
    texts = []
    for prompt, output in zip(prompts, plain.outputs, strict=True):
        token_ids = torch.cat([prompt, prompt.new_tensor(output)])
        decoder.start(drafter.aux_layer_ids)
        _, aux = decoder.forward(token_ids)
        texts.append((token_ids, aux, len(prompt)))
    return texts


def _warn(name: str, result: Acceptance) -> None:
    for divergence in result.divergences or ():
        log.warning(
            "%s: prompt %d differs from plain decoding at token %d (%d instead of %d; the target's "
            "two largest logits are %.2g apart)",
            *(name, divergence.prompt, divergence.token, divergence.speculative),
            *(divergence.plain, divergence.top2_gap),
        )
