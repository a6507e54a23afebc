"""How much memory the whole draft takes at a real vocabulary, by counting live bytes."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from colospec.config import Weights
from colospec.draft import registry
from tests.draft.cases import context, make_batch, make_config, make_target

TOKENS, VOCABULARY, HIDDEN = 4096, 151_936, 256
LIMIT_BYTES = 1.25e9


class LiveBytes(TorchDispatchMode):
    """Count the bytes of storages that operations create and that are still alive, and note the
    largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        return out

    def note(self, tensor):
        self.largest = max(self.largest, tensor.numel())
        storage = tensor.untyped_storage()
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, size)

    def forget(self, size):
        self.live -= size


def measure(*, ttt_length, draft_vocab_size, num_tokens, hidden_size=HIDDEN):
    """Run forward and backward; return peak bytes without weights and gradients, and the largest
    number of elements."""
    torch.manual_seed(0)
    target = make_target(
        hidden_size=hidden_size,
        vocab_size=VOCABULARY,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=4 * hidden_size,
    )
    config = make_config(
        ttt_length=ttt_length, draft_vocab_size=draft_vocab_size, chunk_tokens=2048
    )
    counts = torch.randint(0, 99, (VOCABULARY,))
    draft = registry.build(config, target, token_counts=counts, weights=Weights.random)
    lengths = [num_tokens - 900, 600, 300]
    batch = make_batch(
        lengths,
        target,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float32,
        density=2.0,
    )
    gc.collect()
    with LiveBytes() as count:
        terms = draft(batch, context(num_tokens))
        terms.loss.backward()
    assert sum(c.item() for n, (_, c) in terms.metrics.items() if n[:4] == "acc_") > num_tokens
    gradient_bytes = sum(p.grad.untyped_storage().nbytes() for p in draft.parameters())
    return count.peak - gradient_bytes, count.largest


@pytest.mark.parametrize("draft_vocab_size", [None, 32_000])
def test_no_tensor_has_the_size_of_all_logits(draft_vocab_size):
    peak, largest = measure(
        ttt_length=2, draft_vocab_size=draft_vocab_size, num_tokens=1024, hidden_size=128
    )

    assert largest < 1024 * VOCABULARY / 4
    assert peak < LIMIT_BYTES


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("draft_vocab_size", [None, 32_000])
def test_peak_memory_of_seven_steps_stays_below_the_limit(draft_vocab_size):
    peak, largest = measure(ttt_length=7, draft_vocab_size=draft_vocab_size, num_tokens=TOKENS)

    assert largest < TOKENS * VOCABULARY / 4
    assert peak < LIMIT_BYTES
