"""Prove that matrix products are right on this GPU before a run trusts it.

With some shares of the SMs (mps.*_threads) the bfloat16 products of cuBLAS are wrong: 40 % off in
some shapes, NaN in others, right in the rest, as seen on an H200. So several shapes are tried,
those of the model among them, and for each the three products that training makes of it.

Shapes: a linear layer takes x [M, K] to x @ w.T [M, N] with a weight w [N, K].
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from colospec.target import Target

Shape = tuple[int, int, int]
"""M, K, N."""
ALWAYS: tuple[Shape, ...] = ((512, 1024, 1024), (4096, 4096, 4096))
# Rounding to bfloat16 makes 0.0017.
MAX_ERROR = 1e-2
_BLOCK = 64
# A vocabulary head is used in chunks.
_HEAD_TOKENS = 8192
_WHOLE = 2**29  # multiplications; above, one entry of each tile of _BLOCK x _BLOCK is compared


def check_products(device: torch.device, shapes: Sequence[Shape] = ()) -> None:
    """Try bfloat16 products of some standard shapes and of `shapes` on `device`.

    Random inputs, anew in each call, from a generator of its own: torch's generators are left as
    they are. Raises RuntimeError that names the shape, the error and what to change.
    """
    for shape in dict.fromkeys((*ALWAYS, *shapes)):
        check_shape(device, shape)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the shares of memory are for the models


def check_shape(device: torch.device, shape: Shape) -> None:
    """Try the three products of one linear layer: its output and both of its gradients."""
    m, k, n = shape
    random = torch.Generator(device).manual_seed(int.from_bytes(os.urandom(7)))

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=random, device=device, dtype=torch.bfloat16)

    x, w, g = normal(m, k), normal(n, k), normal(m, n)
    products = (("output", x, w.T), ("input gradient", g, w), ("weight gradient", g.T, x))
    for name, left, right in products:
        error = relative_error(left, right, left @ right)
        if not error <= MAX_ERROR:  # NaN is not
            raise RuntimeError(_wrong(device, shape, name, error))


def relative_error(left: Tensor, right: Tensor, product: Tensor) -> float:
    """Return the Frobenius norm of `product` - left @ right, as a share of the right one's.

    Compared on the CPU in float64: all entries of a small product, one random entry in each tile of
    64 x 64 of a large one. NaN if any entry of `product` is not finite.
    """
    if not bool(torch.isfinite(product).all()):
        return float("nan")
    m, n = product.shape
    if m * n * left.shape[1] > _WHOLE:
        rows, columns = _one_per_block(m, product.device), _one_per_block(n, product.device)
        left, right = left.index_select(0, rows), right.index_select(1, columns)
        product = product.index_select(0, rows).index_select(1, columns)
    wanted = left.cpu().double() @ right.cpu().double()
    return float((product.cpu().double() - wanted).norm() / wanted.norm())


def model_shapes(
    target: Target, *, tokens: int, tp: int = 1, draft_vocab_size: int | None = None
) -> list[Shape]:
    """Return the shapes of a model's own linear layers over `tokens` tokens.

    `tp` ranks share the target's layers. `draft_vocab_size` is the width of the draft's head; None
    is the target's vocabulary.
    """
    width, heads = target.hidden_size, target.num_attention_heads * target.head_dim
    kv_heads = max(target.num_key_value_heads // tp, 1) * target.head_dim
    inner = target.intermediate_size // tp
    return [
        (tokens, width, heads // tp + 2 * kv_heads),
        (tokens, heads // tp, width),
        (tokens, width, 2 * inner),
        (tokens, inner, width),
        (min(tokens, _HEAD_TOKENS), width, draft_vocab_size or target.vocab_size),
    ]


def _one_per_block(length: int, device: torch.device) -> Tensor:
    """Return one random index of each block of 64, the last one cut off at `length`."""
    starts = torch.arange(0, length, _BLOCK)
    offset = torch.tensor([int.from_bytes(os.urandom(2)) % _BLOCK for _ in starts])
    return (starts + offset).clamp(max=length - 1).to(device)


def _wrong(device: torch.device, shape: Shape, name: str, error: float) -> str:
    m, k, n = shape
    where = "this CPU"
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        where = f"{facts.name} with {facts.multi_processor_count} SMs"
    cap = os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")
    fix = "the GPU, its driver or cuBLAS is at fault, as nothing caps the SMs; try another GPU"
    if cap is not None:
        fix = (
            f"the cap of {cap} % on the SMs selects a faulty kernel: set "
            "mps.trainer_threads=null and mps.engine_threads=null, and unset "
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
        )
    return (
        f"bfloat16 products are wrong on {where}: the {name} of a linear layer [{m}, {k}] -> "
        f"[{m}, {n}] has a relative error of {error:.3g} (healthy: 0.002, limit {MAX_ERROR:g}); "
        f"{fix}"
    )
