"""What proposes tokens: a draft model with its own cache, or a bigram table as the yardstick.

Count tokens from 0. Draft position t reads the target's aux hidden states of token t and token
t + 1, and predicts token t + 2. A chain continues from there: step k reads the hidden state that
step k - 1 returned and the token that it proposed, at position t + k.

Shape letters: N tokens known, K tokens proposed, V target vocabulary, A aux layers, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from colospec.draft import registry
from colospec.draft.base import BlockDraft, ChainDraft, DraftModel
from colospec.draft.kv_cache import KVCache
from colospec.evaluate.sampling import Sampler
from colospec.target import Target


@dataclass(frozen=True)
class Proposal:
    """token_ids [K] int64; probabilities [K, V] float64, from which each token was drawn."""

    token_ids: Tensor
    probabilities: Tensor


class Drafter(Protocol):
    """Proposes continuations of one sequence at a time.

    Call order: `start`, then for each verify step `propose`. `predict` stands alone.
    """

    @property
    def aux_layer_ids(self) -> tuple[int, ...]:
        """The target layers whose outputs `propose` and `predict` want; may be none."""
        ...

    def start(self) -> None:
        """Forget the last sequence."""
        ...

    def propose(
        self, token_ids: Tensor, aux: Tensor, *, num_tokens: int, sampler: Sampler
    ) -> Proposal:
        """Propose `num_tokens` (K) tokens to follow token_ids [N], all that is known.

        aux [m, A * H] belongs to the m tokens before the last one that no earlier call has brought.
        """
        ...

    def predict(self, token_ids: Tensor, aux: Tensor, *, first: int, num_tokens: int) -> Tensor:
        """Return the greedy predictions under teacher forcing, [S, K].

        Row i, column k: for token first + i + k, in a chain whose first prediction is for token
        first + i, with the true tokens [N] fed in between; as many rows as fit. aux [N, A * H].
        """
        ...


class BigramDrafter:
    """Proposes the most frequent successor of each token: what no training is needed for."""

    aux_layer_ids: tuple[int, ...] = ()

    def __init__(self, successors: Tensor) -> None:
        """`successors` [V] int64, see `most_frequent_successors`."""
        self._successors = successors

    def start(self) -> None:
        """Nothing to forget."""

    def propose(
        self, token_ids: Tensor, aux: Tensor, *, num_tokens: int, sampler: Sampler
    ) -> Proposal:
        """Follow the table; the table is sure, so each token has probability 1."""
        del aux, sampler
        chain = self._follow(token_ids[-1:], num_tokens)[0]
        return Proposal(chain, F.one_hot(chain, len(self._successors)).double())

    def predict(self, token_ids: Tensor, aux: Tensor, *, first: int, num_tokens: int) -> Tensor:
        """Look every token up; teacher forcing makes each column one look-up."""
        del aux
        return self._successors[token_ids[first - 1 : -1]].unfold(0, num_tokens, 1)

    def _follow(self, token_ids: Tensor, num_tokens: int) -> Tensor:
        columns = [self._successors[token_ids]]
        while len(columns) < num_tokens:
            columns.append(self._successors[columns[-1]])
        return torch.stack(columns, dim=1)


def most_frequent_successors(texts: list[tuple[Tensor, Tensor]], *, vocab_size: int) -> Tensor:
    """Return, for each token, which supervised token follows it most often; [V] int64.

    Each of `texts` is (token_ids [n], loss_mask [n]). Ties go to the lowest id; a token that is
    never followed gets the most frequent token of all.
    """
    pairs = torch.cat(
        [(ids[:-1] * vocab_size + ids[1:])[mask[1:]] for ids, mask in texts if len(ids) > 1]
    )
    keys, counts = torch.unique(pairs, return_counts=True)
    before, after = keys // vocab_size, keys % vocab_size
    totals = torch.zeros(vocab_size, dtype=torch.int64).index_add_(0, after, counts)
    successors = totals.argmax().repeat(vocab_size)
    # Ascending by count, and by falling id where counts are equal: the last write is the winner.
    order = torch.argsort(counts * vocab_size + (vocab_size - 1 - after))
    for index in order.tolist():
        successors[before[index]] = after[index]
    return successors


class ChainDrafter:
    """A draft that proposes token by token, greedy or sampling, with a KV cache of its own."""

    def __init__(
        self, model: ChainDraft, aux_layer_ids: tuple[int, ...], *, vocab_size: int
    ) -> None:
        self.aux_layer_ids = aux_layer_ids
        self._model = model.eval()
        self._vocab_size = vocab_size
        self._cache = KVCache()

    def start(self) -> None:
        """Forget the last sequence."""
        self._cache = KVCache()

    @torch.inference_mode()
    def propose(
        self, token_ids: Tensor, aux: Tensor, *, num_tokens: int, sampler: Sampler
    ) -> Proposal:
        """Read what is new, then follow the chain; the chain's own entries leave the cache."""
        known = self._cache.length
        logits, hidden = self._read(token_ids[known + 1 :], aux)
        length = self._cache.length
        chosen, probabilities = [], []
        for step in range(1, num_tokens + 1):
            odds = self._over_target_vocabulary(sampler.probabilities(logits[-1:]))
            chosen.append(sampler.draw(odds))
            probabilities.append(odds)
            if step < num_tokens:
                logits, hidden = self._step(chosen[-1], hidden[-1:], length - 1 + step)
        self._cache.truncate(length)
        return Proposal(torch.cat(chosen), torch.cat(probabilities))

    @torch.inference_mode()
    def predict(self, token_ids: Tensor, aux: Tensor, *, first: int, num_tokens: int) -> Tensor:
        """Unroll from every position, the last one first, so that the cache only shrinks."""
        self.start()
        logits, hidden = self._read(token_ids[1:], aux[:-1])
        predicted = []
        for start in range(len(token_ids) - num_tokens, first - 1, -1):
            position = start - 2
            self._cache.truncate(position + 1)
            row_logits, state = logits[position : position + 1], hidden[position : position + 1]
            row = [row_logits]
            for step in range(1, num_tokens):
                fed = token_ids[start + step - 1 : start + step]
                row_logits, state = self._step(fed, state, position + step)
                row.append(row_logits)
            predicted.append(self._model.to_target_ids(torch.cat(row).argmax(-1)))
        return torch.stack(predicted[::-1])

    def _read(self, token_ids: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
        """Append positions with true features to the cache: `aux` of token t, token t + 1."""
        assert len(token_ids) == len(aux) > 0
        first = self._cache.length
        positions = torch.arange(first, first + len(aux), device=aux.device)
        return self._model.decode(token_ids, self._model.project(aux), positions, self._cache)

    def _step(self, token_id: Tensor, hidden: Tensor, position: int) -> tuple[Tensor, Tensor]:
        positions = torch.tensor([position], device=hidden.device)
        return self._model.decode(token_id, hidden, positions, self._cache)

    def _over_target_vocabulary(self, probabilities: Tensor) -> Tensor:
        """Spread [1, W] over [1, V]; tokens that the draft cannot say get 0."""
        draft_ids = torch.arange(probabilities.shape[1], device=probabilities.device)
        spread = probabilities.new_zeros(1, self._vocab_size)
        spread[:, self._model.to_target_ids(draft_ids)] = probabilities
        return spread


class GreedyProposals:
    """Another drafter, made to propose the tokens that it holds most likely, also where the target
    samples; so proposes SGLang. Verification stays exact."""

    def __init__(self, drafter: Drafter) -> None:
        self.aux_layer_ids = drafter.aux_layer_ids
        self.start = drafter.start
        self.predict = drafter.predict
        self._drafter = drafter

    def propose(
        self, token_ids: Tensor, aux: Tensor, *, num_tokens: int, sampler: Sampler
    ) -> Proposal:
        """Propose greedily, whatever `sampler` does."""
        greedy = Sampler(0.0, seed=0, device=token_ids.device)
        del sampler
        return self._drafter.propose(token_ids, aux, num_tokens=num_tokens, sampler=greedy)


class BlockDrafter:
    """A draft that proposes a block at once, greedy or sampling, with caches of its own."""

    def __init__(self, model: BlockDraft, aux_layer_ids: tuple[int, ...]) -> None:
        self.aux_layer_ids = aux_layer_ids
        self._model = model.eval()
        self._caches = model.start()

    def start(self) -> None:
        """Forget the last sequence."""
        self._caches = self._model.start()

    @torch.inference_mode()
    def propose(
        self, token_ids: Tensor, aux: Tensor, *, num_tokens: int, sampler: Sampler
    ) -> Proposal:
        """Read what is new, and draft one block behind the last token."""
        self._check(num_tokens)
        self._model.read(token_ids[self._caches[0].length + 1 :], aux, self._caches)
        assert self._caches[0].length == len(token_ids) - 1
        probabilities: list[Tensor] = []

        def choose(logits: Tensor) -> Tensor:
            probabilities.append(sampler.probabilities(logits))
            return sampler.draw(probabilities[-1])

        chosen = self._model.draft(
            token_ids[-1:], self._caches, num_tokens=num_tokens, choose=choose
        )
        return Proposal(chosen, torch.cat(probabilities))

    @torch.inference_mode()
    def predict(self, token_ids: Tensor, aux: Tensor, *, first: int, num_tokens: int) -> Tensor:
        """Draft a block behind every token from first - 1 on, telling the draft the true ones."""
        self._check(num_tokens)
        self.start()
        predicted, known = [], 0
        for start in range(first, len(token_ids) - num_tokens + 1):
            self._model.read(token_ids[known + 1 : start], aux[known : start - 1], self._caches)
            known = start - 1
            predicted.append(self._told(token_ids[start - 1 : start + num_tokens]))
        return torch.stack(predicted)

    def _told(self, token_ids: Tensor) -> Tensor:
        """Return the best token at each place behind the first of token_ids [1 + K], [K]."""
        best: list[Tensor] = []

        def choose(logits: Tensor) -> Tensor:
            first = 1 + sum(map(len, best))
            best.append(logits.argmax(-1))
            return token_ids[first : first + len(logits)]

        number = len(token_ids) - 1
        self._model.draft(token_ids[:1], self._caches, num_tokens=number, choose=choose)
        return torch.cat(best)

    def _check(self, num_tokens: int) -> None:
        most = self._model.num_drafted
        if num_tokens > most:
            raise ValueError(
                f"chain_length={num_tokens} is more than this draft's block proposes; "
                f"use at most {most}"
            )


def open_drafter(model: DraftModel, target: Target) -> Drafter:
    """Return what decodes with `model`. Raises ValueError for a kind that nothing here decodes."""
    layers = registry.features(model.config, target).aux_layer_ids
    if isinstance(model, ChainDraft):
        return ChainDrafter(model, layers, vocab_size=target.vocab_size)
    if isinstance(model, BlockDraft):
        return BlockDrafter(model, layers)
    raise ValueError(f"draft.algorithm={model.config.algorithm} has no decoding here")
