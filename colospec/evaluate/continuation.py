"""Text that the target writes itself: a batch of prompts continued by sampling.

Drafts learn more from it than from text of others: it is what they will have to predict, and its
tokens are as certain as the target is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colospec.config import Weights
from colospec.engine.pretrained import load_model
from colospec.evaluate.decoder import eos_token_ids
from colospec.target import Target


def continue_prompts(
    target: Target,
    prompts: Tensor,
    *,
    num_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> list[list[int]]:
    """Continue prompts [N, n] by up to `num_tokens` sampled tokens each; returns N rows of token
    ids, prompts included, each ended by the target's first end-of-text token if it has written one.

    The same seed, batch size and machine give the same rows; torch's random state stays as it was.
    """
    model = load_model(
        target, dtype=target.dtype, weights=Weights.pretrained, trust_remote_code=False,
        device=device,
    )  # fmt: skip
    stops, rows = eos_token_ids(target), []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for part in torch.split(prompts.to(device), batch_size):
            with torch.inference_mode():
                drawn = model.generate(
                    part,
                    attention_mask=torch.ones_like(part),
                    max_new_tokens=num_tokens,
                    do_sample=True,
                    temperature=temperature,
                    top_k=0,
                    top_p=1.0,
                )
            rows += [_until(row, part.shape[1], stops) for row in drawn.tolist()]
    return rows


def _until(row: list[int], first: int, stops: frozenset[int]) -> list[int]:
    """Cut `row` behind the first of `stops` from place `first` on."""
    place = next((i for i, token in enumerate(row[first:], first) if token in stops), len(row))
    return row[: place + 1]
