"""Real acceptance length: speculative decoding, run for real on one sequence at a time.

Each verify step, the drafter proposes a chain of K tokens, the target reads them all in one forward
pass, keeps the longest prefix that it agrees with, and adds one token of its own (the bonus token).

    acceptance length = (accepted tokens + 1 bonus token) / verify steps, averaged over all steps

With rejection sampling the output follows the target's distribution whatever the draft is; greedily
it is the very text that plain decoding gives, which is checked token by token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from colospec.evaluate.decoder import Decoder
from colospec.evaluate.drafters import Drafter
from colospec.evaluate.sampling import Sampler

LOOP_TOKENS = 32
LOOP_PERIOD = 16


@dataclass(frozen=True)
class DecodingSettings:
    """How to decode: `chain_length` (K) proposals per verify step; temperature 0 is greedy."""

    max_new_tokens: int = 64
    chain_length: int = 5
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Divergence:
    """Where greedy speculative output first differs from plain output.

    `top2_gap` is the difference of the target's two largest logits there, in plain decoding. A gap
    near the rounding of the target's dtype is a tie that the shape of a batch may turn; a large
    one is a bug.
    """

    prompt: int
    token: int
    plain: int
    speculative: int
    top2_gap: float


@dataclass(frozen=True)
class PlainOutput:
    """Token-by-token decoding of all prompts; gaps are per token, see `Divergence`."""

    outputs: list[list[int]]
    top2_gaps: list[list[float]]
    seconds: float
    num_forwards: int

    @property
    def num_tokens(self) -> int:
        """Tokens generated in all."""
        return sum(map(len, self.outputs))


@dataclass
class Acceptance:
    """What speculative decoding of a set of prompts gave.

    `num_reached[k]` counts verify steps that accepted more than k tokens; `per_prompt` has each
    prompt's verify steps and accepted tokens. `num_tokens` are those of the outputs, `seconds` and
    `num_target_forwards` include reading the prompts.
    """

    chain_length: int
    temperature: float
    num_steps: int = 0
    num_tokens: int = 0
    num_target_forwards: int = 0
    seconds: float = 0.0
    num_reached: list[int] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)
    per_prompt: list[tuple[int, int]] = field(default_factory=list)
    divergences: list[Divergence] | None = None

    @property
    def acceptance_length(self) -> float:
        """Mean tokens gained per verify step, the bonus token counted: 1 to K + 1."""
        return 1.0 + sum(self.cumulative_rates)

    def add_prompt(self, output: list[int], accepted: Sequence[int]) -> None:
        """Count a prompt's `output` and the accepted tokens of each of its verify steps."""
        self.outputs.append(output)
        self.per_prompt.append((len(accepted), sum(accepted)))
        self.num_steps += len(accepted)
        for number in accepted:
            for place in range(number):
                self.num_reached[place] += 1

    def length_on(self, prompts: Sequence[int]) -> float:
        """Return the acceptance length on the prompts of these numbers; 1 where they have no verify
        step."""
        steps, accepted = (sum(self.per_prompt[n][i] for n in prompts) for i in (0, 1))
        return 1.0 + accepted / max(1, steps)

    @property
    def cumulative_rates(self) -> list[float]:
        """Share of verify steps that accepted the k-th token, and so all before it."""
        return [reached / max(1, self.num_steps) for reached in self.num_reached]

    @property
    def conditional_rates(self) -> list[float]:
        """Share of verify steps that accepted the k-th token among those that accepted the ones
        before it; 0 where there was none."""
        before = [self.num_steps, *self.num_reached[:-1]]
        return [b / a if a else 0.0 for a, b in zip(before, self.num_reached, strict=True)]

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of decoding."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def is_lossless(self) -> bool | None:
        """Whether greedy output equals plain output; None if it was not compared."""
        return None if self.divergences is None else not self.divergences

    def forwards_saved(self, plain: PlainOutput) -> float:
        """Share of the target's forward passes per token that plain decoding needs and this not."""
        ours = self.num_target_forwards / self.num_tokens
        return 1 - ours / (plain.num_forwards / plain.num_tokens)

    def to_dict(self, plain: PlainOutput | None) -> dict[str, Any]:
        """Return all numbers, ready for JSON; with `plain` also the comparison with it."""
        values: dict[str, Any] = {
            "chain_length": self.chain_length,
            "temperature": self.temperature,
            "acceptance_length": self.acceptance_length,
            "conditional_rates": self.conditional_rates,
            "cumulative_rates": self.cumulative_rates,
            "num_steps": self.num_steps,
            "num_tokens": self.num_tokens,
            "num_target_forwards": self.num_target_forwards,
            "tokens_per_s": self.tokens_per_s,
            "looping_share": looping_share(self.outputs),
            "is_lossless": self.is_lossless,
            "divergences": [asdict(divergence) for divergence in self.divergences or ()],
        }
        if plain is not None:
            plain_tokens_per_s = plain.num_tokens / plain.seconds
            values |= {
                "plain_tokens_per_s": plain_tokens_per_s,
                "speedup": self.tokens_per_s / plain_tokens_per_s,
                "target_forwards_saved": self.forwards_saved(plain),
            }
        return values


def decode_plain(
    target: Decoder, prompts: Sequence[Tensor], settings: DecodingSettings
) -> PlainOutput:
    """Decode one token per forward pass. Each prompt is token ids [n] on the target's device."""
    outputs, gaps = [], []
    first_forward = target.num_forwards
    begin = time.perf_counter()
    for number, prompt in enumerate(prompts):
        sampler = _sampler(settings, number, target)
        target.start(())
        logits, _ = target.forward(prompt)
        output: list[int] = []
        gap: list[float] = []
        while True:
            token = sampler.draw(sampler.probabilities(logits[-1:]))
            top2 = logits[-1].topk(2).values
            output.append(int(token))
            gap.append(float(top2[0] - top2[1]))
            if len(output) >= settings.max_new_tokens or output[-1] in target.eos_token_ids:
                break
            logits, _ = target.forward(token)
        outputs.append(output)
        gaps.append(gap)
    seconds = time.perf_counter() - begin
    return PlainOutput(outputs, gaps, seconds, target.num_forwards - first_forward)


def decode_speculatively(
    target: Decoder,
    drafter: Drafter,
    prompts: Sequence[Tensor],
    settings: DecodingSettings,
    *,
    plain: PlainOutput | None = None,
) -> Acceptance:
    """Decode with proposals of `drafter`; compare with `plain` if given (greedy only).

    A prompt's random numbers depend on the seed and the prompt's place alone. Raises ValueError for
    a prompt without tokens and for settings that mean nothing.
    """
    _check(prompts, settings)
    result = Acceptance(settings.chain_length, settings.temperature)
    result.num_reached = [0] * settings.chain_length
    first_forward = target.num_forwards
    begin = time.perf_counter()
    for number, prompt in enumerate(prompts):
        output, accepted = _decode_one(target, drafter, prompt, settings, number)
        result.add_prompt(output[: settings.max_new_tokens], accepted)
    result.seconds = time.perf_counter() - begin
    result.num_target_forwards = target.num_forwards - first_forward
    result.num_tokens = sum(map(len, result.outputs))
    if plain is not None and settings.temperature == 0:
        result.divergences = list(_divergences(result.outputs, plain))
    return result


def _decode_one(
    target: Decoder,
    drafter: Drafter,
    prompt: Tensor,
    settings: DecodingSettings,
    number: int,
) -> tuple[list[int], list[int]]:
    """Decode one prompt; return its output, which may overshoot max_new_tokens, and the accepted
    tokens of each verify step."""
    sampler = _sampler(settings, number, target)
    drafter.start()
    target.start(drafter.aux_layer_ids)
    logits, aux = target.forward(prompt)
    known = torch.cat([prompt, sampler.draw(sampler.probabilities(logits[-1:]))])
    output = known[len(prompt) :].tolist()
    accepted = []
    while len(output) < settings.max_new_tokens and output[-1] not in target.eos_token_ids:
        proposal = drafter.propose(known, aux, num_tokens=settings.chain_length, sampler=sampler)
        logits, aux = target.forward(torch.cat([known[-1:], proposal.token_ids]))
        num_kept, bonus = sampler.verify(
            proposal.token_ids, proposal.probabilities, sampler.probabilities(logits)
        )
        target.truncate(len(known) + num_kept)
        aux = aux[: num_kept + 1]
        gained = [*proposal.token_ids[:num_kept].tolist(), int(bonus)]
        # The last step counts in full, as in engines: what follows the limit ends nothing.
        within = gained[: settings.max_new_tokens - len(output)]
        ends = [place for place, token in enumerate(within) if token in target.eos_token_ids]
        gained = gained[: ends[0] + 1] if ends else gained
        known = torch.cat([known, known.new_tensor(gained)])
        output += gained
        accepted.append(len(gained) - 1)
    return output, accepted


def looping_share(outputs: Sequence[Sequence[int]]) -> float:
    """Return the share of outputs that end in a loop, which any drafter predicts.

    An output loops if each of its last 32 tokens equals the token p places before it, for some
    period p of at most 16. Outputs shorter than 32 + p tokens cannot loop.
    """
    return sum(map(_loops, outputs)) / max(1, len(outputs))


def _loops(output: Sequence[int]) -> bool:
    return any(
        len(output) >= LOOP_TOKENS + period
        and output[-LOOP_TOKENS:] == output[-LOOP_TOKENS - period : -period]
        for period in range(1, LOOP_PERIOD + 1)
    )


def _divergences(outputs: Sequence[list[int]], plain: PlainOutput) -> list[Divergence]:
    """Find the first difference of each prompt; what follows it is another text."""
    found = []
    for prompt, (ours, theirs) in enumerate(zip(outputs, plain.outputs, strict=True)):
        pairs = enumerate(zip(ours, theirs, strict=False))
        place = next((place for place, (a, b) in pairs if a != b), None)
        if place is not None:
            gap = plain.top2_gaps[prompt][place]
            found.append(Divergence(prompt, place, theirs[place], ours[place], gap))
    return found


def _sampler(settings: DecodingSettings, number: int, target: Decoder) -> Sampler:
    seed = settings.seed * 1_000_003 + number
    return Sampler(settings.temperature, seed=seed, device=target.device)


def _check(prompts: Sequence[Tensor], settings: DecodingSettings) -> None:
    for name in ("chain_length", "max_new_tokens"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}={getattr(settings, name)} must be at least 1")
    if empty := [number for number, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"prompts {empty} have no tokens; remove them from the prompts file")
