"""The compiled kernels of block drafters against the plain path in float64, and that they compile
once.

Float64 takes the plain path on the GPU too, so it is the reference there.
"""

import pytest
import torch

from colospec.draft.block_attention import block_attention
from tests.draft.block_cases import make_blocks, make_leaves
from tests.draft.numerics import agree, backward
from tests.gpu.machine import needs_gpus

pytestmark = [pytest.mark.gpu, needs_gpus(1)]

BF16 = torch.bfloat16
ROUNDINGS = 2**-7


@pytest.fixture
def seed():
    return torch.seed() % 2**31


def attend(blocks, window):
    def call(query, key, value, own_key, own_value):
        return block_attention(query, (key, value), (own_key, own_value), blocks, window=window)

    return call


def some_lengths(count, longest):
    return torch.randint(1, longest, (count,)).tolist()


@pytest.mark.parametrize("window", [None, 2, 60, 300])
@pytest.mark.parametrize(("size", "num_anchors"), [(7, 400), (8, 20), (16, 512), (16, 3), (150, 9)])
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [
        ((8, 2), 128, BF16), ((4, 4), 64, BF16), ((6, 2), 96, BF16), ((20, 1), 16, BF16),
        ((2, 1), 256, BF16), ((4, 2), 64, torch.float32), ((4, 2), 8, torch.float16),
    ],
    ids=str,
)  # fmt: skip
def test_block_attention(seed, window, size, num_anchors, heads, head_dim, dtype):
    torch.manual_seed(seed)
    lengths = [1, 600, 2, *some_lengths(3, 400)]
    blocks = make_blocks(lengths, size=size, num_anchors=num_anchors)
    blocks = blocks.to(torch.device("cuda"))
    leaves = make_leaves(blocks, heads, head_dim, dtype, device="cuda")

    agree(attend(blocks, window), leaves, 1e-5 if dtype is torch.float32 else 2 * ROUNDINGS)


def test_block_attention_of_the_8b_shape_and_that_it_repeats_itself(seed):
    torch.manual_seed(seed)
    blocks = make_blocks([2048, 700, 1, 33], size=16, num_anchors=512, density=2.0)
    blocks = blocks.to(torch.device("cuda"))
    leaves = make_leaves(blocks, (32, 8), 128, BF16, device="cuda")

    agree(attend(blocks, None), leaves, 2 * ROUNDINGS)

    found, again = (backward(attend(blocks, None), leaves) for _ in range(2))
    pairs = zip([*found[0], *found[1]], [*again[0], *again[1]], strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_large_scores_stay_finite():
    blocks = make_blocks([300], size=16, num_anchors=90).to(torch.device("cuda"))
    leaves = make_leaves(blocks, (4, 2), 64, BF16, device="cuda")
    leaves[0] *= 300

    found, grads = backward(attend(blocks, None), leaves)

    assert all(tensor.isfinite().all() for tensor in (*found, *grads))


def compiled():
    """How many variants of all kernels this process has compiled."""
    from colospec.draft.kernels import block_attention as forward
    from colospec.draft.kernels import block_attention_backward as back

    functions = [forward._forward_kernel, back._query_kernel, back._context_kernel]
    functions.append(back._own_kernel)
    return sum(len(cache[0]) for f in functions for cache in f.device_caches.values())


def test_other_lengths_and_anchors_compile_nothing_new(seed):
    torch.manual_seed(seed)

    def step(lengths, num_anchors):
        blocks = make_blocks(lengths, size=8, num_anchors=num_anchors, density=2.0)
        blocks = blocks.to(torch.device("cuda"))
        backward(attend(blocks, None), make_leaves(blocks, (4, 2), 64, BF16, device="cuda"))

    step([40, 1, 70], 9)
    before = compiled()
    for _ in range(20):
        step(some_lengths(3, 200), int(torch.randint(1, 100, ())))
    step([3], 1)
    step([16, 16], 16)
    step([1], 1)

    assert compiled() == before
