"""Tiny targets and drafters for decoding tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from colospec.draft import registry
from colospec.draft.eagle3.config import Eagle3Config
from colospec.draft.eagle3.model import Eagle3
from colospec.evaluate.acceptance import DecodingSettings, decode_plain
from colospec.evaluate.drafters import ChainDrafter, Proposal
from colospec.evaluate.sampling import Sampler
from colospec.evaluate.target_decoder import TargetDecoder
from colospec.target import Target
from tests.engine import targets

CPU = torch.device("cpu")


@dataclass
class Untrained:
    """A random target, its decoder, and a random draft for it."""

    target: Target
    decoder: TargetDecoder
    drafter: ChainDrafter


def make_untrained(path: Path, *, seed: int, family: str = "Qwen3", **changes: object) -> Untrained:
    """Save a random target, and build an untrained draft that speaks half of its vocabulary."""
    settings = {"head_dim": 12, "eos_token_id": None} | changes
    target = Target.load(targets.save(path, family, seed=seed, **settings))
    config = Eagle3Config(ttt_length=3, draft_vocab_size=max(2, target.vocab_size // 2))
    counts = torch.rand(target.vocab_size)
    model = registry.build(config, target, token_counts=counts)
    assert isinstance(model, Eagle3)
    layers = registry.features(config, target).aux_layer_ids
    return Untrained(
        target,
        TargetDecoder(target, device=CPU),
        ChainDrafter(model, layers, vocab_size=target.vocab_size),
    )


class TargetAsDrafter:
    """Proposes by running a second copy of the target: a draft that is always right."""

    aux_layer_ids: tuple[int, ...] = ()

    def __init__(self, target: Target) -> None:
        self._decoder = TargetDecoder(target, device=CPU)

    def start(self) -> None:
        pass

    def propose(
        self, token_ids: Tensor, aux: Tensor, *, num_tokens: int, sampler: Sampler
    ) -> Proposal:
        del aux
        self._decoder.start(())
        logits, _ = self._decoder.forward(token_ids)
        chosen, probabilities = [], []
        while len(chosen) < num_tokens:
            probabilities.append(sampler.probabilities(logits[-1:]))
            chosen.append(sampler.draw(probabilities[-1]))
            logits, _ = self._decoder.forward(chosen[-1])
        return Proposal(torch.cat(chosen), torch.cat(probabilities))

    def predict(self, token_ids: Tensor, aux: Tensor, *, first: int, num_tokens: int) -> Tensor:
        del aux
        self._decoder.start(())
        logits, _ = self._decoder.forward(token_ids)
        return logits.argmax(-1)[first - 1 : -1].unfold(0, num_tokens, 1)


def random_prompts(number: int, *, vocab_size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (number,), generator=generator).tolist()
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


def greedy_texts(
    models: Untrained, *, num_prompts: int, num_tokens: int
) -> list[tuple[Tensor, Tensor, int]]:
    """Let the target continue random prompts, and capture the features of it all."""
    prompts = random_prompts(num_prompts, vocab_size=models.target.vocab_size, seed=7)
    plain = decode_plain(models.decoder, prompts, DecodingSettings(max_new_tokens=num_tokens))
    texts = []
    for prompt, output in zip(prompts, plain.outputs, strict=True):
        token_ids = torch.cat([prompt, torch.tensor(output)])
        models.decoder.start(models.drafter.aux_layer_ids)
        _, aux = models.decoder.forward(token_ids)
        texts.append((token_ids, aux, len(prompt)))
    return texts
