"""What every draft algorithm provides, and what it gets: the contract with engine, trainer, export.

A draft model is an `nn.Module` whose `forward` is the whole loss, because FSDP2 gathers parameters
around `forward` only. The target's embedding and head are frozen, non-persistent buffers: never in
a checkpoint, never sharded, without gradients.

Shape letters: T tokens, H target hidden size, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from colospec.batch import FeatureBatch, FeatureSpec
from colospec.config import DraftConfig, Weights
from colospec.draft.public import PublicFormat
from colospec.target import Target

if TYPE_CHECKING:
    from colospec.draft.kv_cache import KVCache


@dataclass(frozen=True)
class StepContext:
    """Where in the run a micro-batch stands.

    `num_loss_tokens` is the number of True entries in the loss masks of the whole optimizer step,
    over all trainers and micro-batches; `generator`, on the CPU, feeds algorithms that sample
    (None: the global one).
    """

    step: int
    total_steps: int
    num_loss_tokens: int
    generator: torch.Generator | None = None


class LossTerms(NamedTuple):
    """What `DraftModel.forward` returns; a NamedTuple, so that FSDP2 finds the tensors in it.

    loss: float32 scalar, a sum over supervised positions: adding the gradients of all micro-batches
    and trainers gives the gradient of the whole step. Where the plan knows the divisor it is in the
    loss already (`num_loss_tokens`). Else `denominator` is the part of this micro-batch, a detached
    scalar on the device: the trainer adds up the parts of all and divides the gradients.
    metrics: name -> (sum, count), detached scalars on the features' device, to be added up before
    they are divided.
    """

    loss: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]
    denominator: Tensor | None = None


class DraftModel(nn.Module):
    """Base of all draft algorithms: the target's frozen weights, and what a subclass must define.

    Two buffers: `embedding` [V, H] and `target_head` [V, H] (None where the target ties them).
    `public` is how inference engines know it, and `more_formats` are other layouts that it can be
    exported in and started from.
    """

    public: ClassVar[PublicFormat]
    more_formats: ClassVar[tuple[PublicFormat, ...]] = ()
    config: DraftConfig

    embedding: Tensor
    target_head: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("embedding", torch.empty(0, 0), persistent=False)
        self.register_buffer("target_head", None, persistent=False)

    @classmethod
    def features(cls, config: DraftConfig, target: Target) -> FeatureSpec:
        """Return what the algorithm needs from the target; engines call it without a module."""
        raise NotImplementedError

    @classmethod
    def sizes(
        cls,
        config: DraftConfig,
        lengths: NDArray[np.int64],
        num_loss_tokens: NDArray[np.int64],
        *,
        token_budget: int,
    ) -> NDArray[np.int64]:
        """Return what each sample takes of a micro-batch's `token_budget`, [N]: at least its
        length, and more where a step on it needs more memory. Engines call it too.

        lengths, num_loss_tokens [N]: tokens of each sample, and how many are supervised.
        """
        del config, num_loss_tokens, token_budget
        return lengths

    @classmethod
    def from_config(
        cls, config: DraftConfig, target: Target, *, token_counts: np.ndarray | Tensor | None
    ) -> Self:
        """Build with fresh random weights (from torch's global generator, so seed it alike on all
        trainers) and without the target's weights; `load_target` adds those."""
        raise NotImplementedError

    def untrained(self, target: Target) -> Self:
        """Return the same draft with fresh weights, from torch's global generator."""
        fresh = type(self).from_config(self.config, target, token_counts=None)
        fresh.set_target(self.embedding, self.target_head)
        return fresh

    def forward(self, batch: FeatureBatch, context: StepContext) -> LossTerms:
        """Return loss and metrics of one micro-batch.

        `batch.tokens` is on the CPU, so that no index depends on a GPU result; `batch.features` is
        on the model's device.
        """
        raise NotImplementedError

    def load_target(self, target: Target, *, weights: Weights = Weights.pretrained) -> None:
        """Load the target's embedding and head, in the target's dtype; random ones are the same on
        every rank.

        Raises ValueError where the files do not fit config.json.
        """
        shape = (target.vocab_size, target.hidden_size)
        if weights is Weights.random:
            generator = torch.Generator().manual_seed(0)
            random = [
                torch.empty(shape, device="cpu").normal_(0.0, 0.02, generator=generator)
                for _ in range(1 if target.tied else 2)
            ]
            self.set_target(*(weight.to(target.dtype) for weight in random))
            return
        target.require_plain_head()
        loaded = [target.load_embedding()]
        if not target.tied:
            loaded.append(target.load_head())
        for name, weight in zip(("embedding", "head"), loaded, strict=False):
            if tuple(weight.shape) != shape:
                raise ValueError(
                    f"the {name} in {target.path} is {list(weight.shape)}, but config.json says "
                    f"vocab_size={shape[0]}, hidden_size={shape[1]}; the directory is damaged"
                )
        self.set_target(*(weight.to(target.dtype) for weight in loaded))

    def set_target(self, embedding: Tensor, head: Tensor | None = None) -> None:
        """Set the frozen embedding [V, H] and head [V, H]; a head of None is the embedding."""
        self.embedding = embedding
        self.target_head = head

    @property
    def frozen_head(self) -> Tensor:
        """The target's output head [V, H]."""
        return self.embedding if self.target_head is None else self.target_head


class ChainDraft(DraftModel):
    """A draft that proposes one token after another, each from its own last state."""

    def project(self, aux_hidden_states: Tensor) -> Tensor:
        """Turn the target's aux hidden states [T, A * H] into first states [T, H]."""
        raise NotImplementedError

    def decode(
        self, token_ids: Tensor, hidden: Tensor, position_ids: Tensor, cache: KVCache
    ) -> tuple[Tensor, Tensor]:
        """Append n tokens to `cache` and return what the draft predicts after each.

        token_ids [n]: token t + 1 beside hidden state t; hidden [n, H]: from `project` or an
        earlier `decode`; position_ids [n]: t. Returns logits [n, W] over the draft's vocabulary and
        the hidden states [n, H] to feed back.
        """
        raise NotImplementedError

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        """Translate draft tokens into target tokens, any shape."""
        raise NotImplementedError


Choose = Callable[[Tensor], Tensor]
"""(logits [n, V] of the next n tokens) -> those tokens, [n]"""


class BlockDraft(DraftModel):
    """A draft that proposes up to `num_drafted` tokens at once."""

    num_drafted: int

    def start(self) -> list[KVCache]:
        """Return empty caches for one sequence."""
        raise NotImplementedError

    def read(self, token_ids: Tensor, aux_hidden_states: Tensor, caches: list[KVCache]) -> None:
        """Append the target's aux hidden states [m, A * H] of the next m tokens; token_ids [m]: the
        token behind each."""
        raise NotImplementedError

    def draft(
        self, token_id: Tensor, caches: list[KVCache], *, num_tokens: int, choose: Choose
    ) -> Tensor:
        """Return `num_tokens` tokens to follow `token_id` [1], which itself is the one behind all
        that `caches` have read. The caches stay as they are.

        `choose` is given the logits of one token after another, some at a time, and says which
        they are: a greedy or random choice of the logits, or the true tokens, to see what the draft
        says then. Logits may depend on the tokens chosen before, and on nothing later.
        """
        raise NotImplementedError
