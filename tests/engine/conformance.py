"""What every engine must do, whatever runs the target: call `check_engine` from its own test."""

from __future__ import annotations

from collections.abc import Callable

import torch

from colospec.batch import Cursor, Features, TokenBatch
from colospec.engine.base import Engine


def random_batch(lengths: list[int], *, vocab_size: int, seed: int) -> TokenBatch:
    """Pack documents of these lengths, with random tokens."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]
    masks = [torch.ones(length, dtype=torch.bool) for length in lengths]
    return TokenBatch.pack(Cursor(0, 0, 0), range(len(lengths)), documents, masks)


def poisoned(engine: Engine, num_tokens: int, device: torch.device) -> Features:
    """Allocate views for `num_tokens` rows, full of NaN."""
    views = Features.empty(engine.spec, num_tokens, device)
    for tensor in views.tensors():
        tensor.fill_(torch.nan)
    return views


def capture(engine: Engine, tokens: TokenBatch, device: torch.device) -> Features:
    """Capture into fresh poisoned views."""
    out = poisoned(engine, tokens.num_tokens, device)
    engine.capture(tokens, out)
    return out


def tensors(features: Features) -> list[torch.Tensor]:
    """Return the views that are there."""
    both = (features.aux_hidden_states, features.last_hidden_states)
    return [view for view in both if view is not None]


def check_engine(
    engine: Engine,
    *,
    device: torch.device,
    vocab_size: int,
    longest: int,
    seed: int,
    close: Callable[[torch.Tensor, torch.Tensor], None],
) -> None:
    """Assert the contract of `Engine.capture`; `close(actual, expected)` asserts near equality."""
    _check_fills_everything_and_repeats(engine, device, vocab_size, seed)
    _check_rows_are_in_token_order(engine, device, vocab_size, seed, close)
    _check_taking_part_writes_nothing(engine, device, vocab_size, seed)
    _check_empty(engine, device)
    _check_longest(engine, device, vocab_size, longest, seed)


def _check_fills_everything_and_repeats(
    engine: Engine, device: torch.device, vocab_size: int, seed: int
) -> None:
    tokens = random_batch([5, 1, 17, 2], vocab_size=vocab_size, seed=seed)
    first = capture(engine, tokens, device)
    second = capture(engine, tokens, device)
    for view, again in zip(tensors(first), tensors(second), strict=True):
        assert view.isfinite().all()
        assert torch.equal(view, again)


def _check_rows_are_in_token_order(
    engine: Engine,
    device: torch.device,
    vocab_size: int,
    seed: int,
    close: Callable[[torch.Tensor, torch.Tensor], None],
) -> None:
    """Packing changes nothing: each document's rows are those of the document alone."""
    lengths = [9, 1, 14, 6]
    tokens = random_batch(lengths, vocab_size=vocab_size, seed=seed + 1)
    packed = capture(engine, tokens, device)
    start = 0
    for length in lengths:
        end = start + length
        mask = torch.ones(length, dtype=torch.bool)
        document = TokenBatch.pack(Cursor(0, 0, 0), (0,), [tokens.token_ids[start:end]], [mask])
        alone = capture(engine, document, device)
        for whole, part in zip(tensors(packed), tensors(alone), strict=True):
            close(whole[start:end], part)
        start = end


def _check_taking_part_writes_nothing(
    engine: Engine, device: torch.device, vocab_size: int, seed: int
) -> None:
    tokens = random_batch([7, 3], vocab_size=vocab_size, seed=seed + 3)
    before = capture(engine, tokens, device)
    copies = [view.clone() for view in tensors(before)]
    other = random_batch([10], vocab_size=vocab_size, seed=seed + 4)
    engine.capture(other, None)
    for view, copy in zip(tensors(before), copies, strict=True):
        assert torch.equal(view, copy)


def _check_empty(engine: Engine, device: torch.device) -> None:
    engine.capture(TokenBatch.pack(Cursor(0, 0, 0), (), [], []), poisoned(engine, 0, device))


def _check_longest(
    engine: Engine, device: torch.device, vocab_size: int, longest: int, seed: int
) -> None:
    tokens = random_batch([longest], vocab_size=vocab_size, seed=seed + 2)
    for view in tensors(capture(engine, tokens, device)):
        assert view.isfinite().all()
