"""Random targets, drafts and packed batches that the draft tests share."""

from itertools import pairwise
from pathlib import Path

import torch

from colospec.batch import Cursor, FeatureBatch, Features, TokenBatch
from colospec.draft.base import StepContext
from colospec.draft.eagle3.config import Eagle3Config
from colospec.draft.eagle3.model import Eagle3
from colospec.target import Target


def make_target(*, hidden_size=16, vocab_size=40, num_layers=8, tied=False, **settings):
    values = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "vocab_size": vocab_size,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_theta": 500.0,
        "tie_word_embeddings": tied,
        "dtype": "float32",
    }
    return Target.from_config(Path("/target"), {**values, **settings})


def make_config(**settings):
    values = {"ttt_length": 4, "draft_vocab_size": None, "chunk_tokens": 5}
    return Eagle3Config(**{**values, **settings})


def make_draft(config, target, *, generator, dtype=torch.float64, scale=0.3):
    """Build a draft with weights large enough for every part to matter."""
    counts = torch.randint(0, 9, (target.vocab_size,), generator=generator)
    draft = Eagle3.from_config(config, target, token_counts=counts).to(dtype)
    for parameter in draft.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (noise * scale + float(parameter.dim() == 1)).to(dtype)
    shape = (target.vocab_size, target.hidden_size)
    embedding, head = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    draft.set_target(embedding, None if target.tied else head)
    return draft


def make_batch(lengths, target, *, num_aux=3, generator, dtype=torch.float64, density=0.7):
    """Pack documents of `lengths` with random tokens, masks and features."""
    ids = [torch.randint(0, target.vocab_size, (n,), generator=generator) for n in lengths]
    masks = [torch.rand(n, generator=generator) < density for n in lengths]
    tokens = TokenBatch.pack(Cursor(0, 0, 0), range(len(lengths)), ids, masks)
    size = target.hidden_size

    def states(width):
        return torch.randn(tokens.num_tokens, width, generator=generator, dtype=dtype)

    return FeatureBatch(tokens, Features(states(num_aux * size), states(size)))


def documents(batch):
    """Cut a packed batch into one batch for each document."""
    tokens, features = batch.tokens, batch.features
    borders = tokens.cu_seqlens.tolist()
    for start, end in pairwise(borders):
        part = slice(start, end)
        yield FeatureBatch(
            TokenBatch.pack(
                tokens.cursor, (start,), [tokens.token_ids[part]], [tokens.loss_mask[part]]
            ),
            Features(features.aux_hidden_states[part], features.last_hidden_states[part]),
        )


def context(num_loss_tokens):
    return StepContext(step=0, total_steps=1, num_loss_tokens=num_loss_tokens)


def gradients(draft, *batches, num_loss_tokens):
    """Return loss and gradients by name, summed over `batches`."""
    draft.zero_grad()
    total = 0.0
    for batch in batches:
        terms = draft(batch, context(num_loss_tokens))
        terms.loss.backward()
        total += terms.loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in draft.named_parameters()}
