"""Load the target through transformers: the whole model, or the part that makes hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from colospec.config import Weights
from colospec.target import Target

RANDOM_SEED = 0


def load_model(
    target: Target,
    *,
    dtype: torch.dtype,
    weights: Weights,
    trust_remote_code: bool,
    device: torch.device,
) -> Any:
    """Return the frozen causal language model, in eval mode, with its stock attention.

    Random weights are the same in every process. Raises ValueError where transformers cannot build
    or load it.
    """
    # Several ranks would draw their bars over each other.
    transformers_logging.disable_progress_bar()
    try:
        if weights is Weights.random:
            model = _random(target, dtype, trust_remote_code, device)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                target.path, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError) as error:
        hint = (
            ""
            if trust_remote_code
            else "; if it brings its own code, target.trust_remote_code=true"
        )
        raise ValueError(f"cannot load the target {target.path}: {error}{hint}") from error
    return model.to(device).eval().requires_grad_(False)


def load_body(
    target: Target,
    *,
    dtype: torch.dtype,
    weights: Weights,
    trust_remote_code: bool,
    device: torch.device,
) -> nn.Module:
    """Return the decoder alone: embedding, layers and final norm; the head's memory is freed."""
    model = load_model(
        target, dtype=dtype, weights=weights, trust_remote_code=trust_remote_code, device=device
    )
    body = model.get_decoder()
    assert isinstance(body, nn.Module)
    return body


def _random(
    target: Target, dtype: torch.dtype, trust_remote_code: bool, device: torch.device
) -> Any:
    config = AutoConfig.from_pretrained(target.path, trust_remote_code=trust_remote_code)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(RANDOM_SEED)
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
