"""Start training from a draft that was exported by colospec or another program.

The pruned vocabulary is the draft's own (keep), or that of the data to train on (rebuild): then the
rows of its head move to their tokens, and new tokens start from the target's rows.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from colospec.checkpoint.export import WEIGHTS, load_weights, read_tensors
from colospec.checkpoint.public import read_public
from colospec.config import DraftConfig, InitVocab
from colospec.draft.base import DraftModel
from colospec.draft.public import MAPPING, PublicFormat, Shapes
from colospec.target import Target

log = logging.getLogger(__name__)
_HEAD = "lm_head.weight"


def start_from(
    draft: DraftModel,
    directory: Path,
    target: Target,
    *,
    vocab: InitVocab,
    token_counts: np.ndarray | Tensor,
) -> None:
    """Overwrite the weights of `draft` (with the target's frozen ones) by those in `directory`.

    `token_counts` [V] counts the supervised tokens of the data. Raises ValueError if it is another
    draft than `draft`, listing what differs, or tensors are missing, unexpected or wrong.
    """
    config, form = check_warm_start(draft.config, directory, target)
    theirs = form.tensor_shapes(config, target)
    ours = {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()}
    if vocab is InitVocab.rebuild and _HEAD in theirs:
        _load_rebuilt(draft, read_tensors(directory / WEIGHTS, theirs, form), ours)
    else:
        _check_vocab_size(theirs, ours, directory)
        load_weights(draft, directory)
    log.info("trainer.init_from=%s: %s", directory, _vocab_report(draft, vocab, token_counts))
    _warn_of_trained_tensors(draft, directory / WEIGHTS, form)


def check_warm_start(
    config: DraftConfig, directory: Path, target: Target
) -> tuple[DraftConfig, PublicFormat]:
    """Return settings and format of the draft in `directory`; raise ValueError if it fits `config`
    by its shapes alone: with other aux layers or norms its weights would be fed with what they were
    not trained on."""
    theirs, form = read_public(directory, target)
    if theirs.algorithm != config.algorithm:
        raise ValueError(
            f"trainer.init_from={directory} is a draft of draft={theirs.algorithm}, not "
            f"{config.algorithm}; choose draft={theirs.algorithm}"
        )
    there, here = form.inputs(theirs, target), form.inputs(config, target)
    pairs = {key: (there[key], value) for key, value in here.items()}
    different = [f"draft.{key}: {p[0]} -> {p[1]}" for key, p in pairs.items() if p[0] != p[1]]
    if different:
        raise ValueError(
            f"trainer.init_from={directory} is another draft: {'; '.join(different)}. "
            "Use its values"
        )
    return theirs, form


def _check_vocab_size(theirs: Shapes, ours: Shapes, directory: Path) -> None:
    sizes = [shapes.get(_HEAD, (0,))[0] for shapes in (theirs, ours)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"trainer.init_from={directory} proposes {sizes[0]} tokens, this draft {sizes[1]}; set "
            f"draft.draft_vocab_size={sizes[0]}, or trainer.init_vocab=rebuild"
        )


def _load_rebuilt(draft: DraftModel, state: dict[str, Tensor], ours: Shapes) -> None:
    """Load `state`, with the head's rows at the places that their tokens have in `draft`."""
    own = draft.state_dict()
    head = own[_HEAD].detach().clone()
    num_target = len(draft.frozen_head)
    if _HEAD in state:
        place = torch.full((num_target,), -1, dtype=torch.int64)
        theirs = _target_ids(state.get("d2t"), num_target)
        place[theirs] = torch.arange(len(theirs))
        rows = place[_target_ids(own.get("d2t"), num_target).cpu()]
        known = (rows >= 0).to(head.device)
        head[known] = state[_HEAD][rows[rows >= 0]].to(head.device, head.dtype)
    kept = {name: state.get(name, own[name]) for name in ours if name not in MAPPING}
    draft.load_state_dict(own | kept | {_HEAD: head})


def _target_ids(d2t: Tensor | None, num_target: int) -> Tensor:
    """Return the target token of each draft token."""
    if d2t is None:
        return torch.arange(num_target)
    return d2t + torch.arange(len(d2t), device=d2t.device)


def _vocab_report(draft: DraftModel, vocab: InitVocab, token_counts: np.ndarray | Tensor) -> str:
    """Say how much of the data the vocabulary covers, and the best one of its size would."""
    d2t = draft.state_dict().get("d2t")
    if d2t is None:
        return "it has the target's vocabulary"
    counts = torch.as_tensor(token_counts, device="cpu").double()
    total = max(1.0, float(counts.sum()))
    covered = float(counts[_target_ids(d2t, len(counts)).cpu()].sum()) / total
    best = float(counts.topk(len(d2t)).values.sum()) / total
    text = f"vocabulary of {len(d2t):,} tokens, {covered:.2%} of the supervised tokens"
    if vocab is InitVocab.rebuild:
        return f"rebuilt its {text}"
    return f"kept its {text}; trainer.init_vocab=rebuild would give {best:.2%}"


def _warn_of_trained_tensors(draft: DraftModel, file: Path, form: PublicFormat) -> None:
    """Warn if what is left out of the file, an embedding or a head, is not the target's own."""
    frozen = {"embed_tokens.weight": draft.embedding, _HEAD: draft.frozen_head}
    with safe_open(file, framework="pt") as weights:
        names = [name for name in weights.keys() if form.tensor_name(name) is None]  # noqa: SIM118
        if names:
            log.info("trainer.init_from: left out, as the target's own: %s", ", ".join(names))
        for name in names:
            own = frozen.get(name.removeprefix("model."))
            if own is None:
                continue
            theirs = weights.get_tensor(name)
            if theirs.shape != own.shape or not torch.equal(theirs, own.to("cpu", theirs.dtype)):
                log.warning(
                    "trainer.init_from: its %s was trained on and is not the target's, which is "
                    "used instead: expect it to be worse at first", name,
                )  # fmt: skip
