"""Who learns from whom: the index maps of training-time test for one packed micro-batch.

Count positions from 0 inside a document of length L. At TTT step k the draft at position t reads
token x[t + 1 + k] and stands for what the target knows after it, so its teacher is target row
j = t + 1 + k and its label is x[j + 1]. Whether a teacher row is supervised depends on j alone, and
step k exists for it where t = j - 1 - k is not before the document. So everything follows from the
list of supervised teacher rows, each of which serves all steps.

All of it is computed on the CPU and copied once: no shape depends on a GPU result.

Shape letters: T tokens, K TTT steps, Q teacher rows, P supervised positions of all steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from colospec.batch import TokenBatch
from colospec.draft.eagle3.config import Alignment


@dataclass(frozen=True)
class Unroll:
    """The index maps, in packed coordinates; int64.

    input_ids [K, T]: the token that each position reads at each step (past the end of a document:
    its last token, never supervised). position_ids [T].
    teacher_rows [Q]: ascending.
    positions, slots [P]: step after step, ascending within a step: which position, and which entry
    of `teacher_rows` teaches it.
    counts [K, Q + 1], on the CPU: how many of the first i teacher rows step k uses.
    """

    input_ids: Tensor
    position_ids: Tensor
    teacher_rows: Tensor
    positions: Tensor
    slots: Tensor
    counts: Tensor

    @property
    def sizes(self) -> list[int]:
        """Number of supervised positions of each step; they add up to P."""
        return [int(count) for count in self.counts[:, -1]]

    def to(self, device: torch.device) -> Unroll:
        """Copy all but `counts` to `device`, without waiting for it."""
        return Unroll(
            to_device(self.input_ids, device),
            to_device(self.position_ids, device),
            to_device(self.teacher_rows, device),
            to_device(self.positions, device),
            to_device(self.slots, device),
            self.counts,
        )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`; from pageable memory a copy to a GPU would wait for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def unroll(tokens: TokenBatch, *, ttt_length: int, alignment: Alignment) -> Unroll:
    """Build the index maps; the tensors of `tokens` are on the CPU.

    `exact` supervises a teacher row j whose label x[j + 1] is in the loss mask. `eagle` looks at
    loss_mask[j - 1] as the published EAGLE code does, but never past the end of a document.
    """
    borders = tokens.cu_seqlens.to(torch.int64)
    lengths = borders.diff()
    start = borders[:-1].repeat_interleave(lengths)
    last = borders[1:].repeat_interleave(lengths) - 1
    rows = torch.arange(tokens.num_tokens)
    offset = rows - start
    if alignment is Alignment.exact:
        supervised = (rows < last) & tokens.loss_mask.roll(-1)
    else:
        supervised = tokens.loss_mask.roll(1)
    teacher_rows = (supervised & (offset >= 1)).nonzero().squeeze(1)

    steps = torch.arange(ttt_length)[:, None]
    used = offset[teacher_rows] >= steps + 1
    step, slots = used.nonzero(as_tuple=True)
    counts = torch.zeros(ttt_length, len(teacher_rows) + 1, dtype=torch.int64)
    counts[:, 1:] = used.cumsum(1)
    return Unroll(
        input_ids=tokens.token_ids[torch.minimum(rows + 1 + steps, last)],
        position_ids=tokens.position_ids,
        teacher_rows=teacher_rows,
        positions=teacher_rows[slots] - 1 - step,
        slots=slots,
        counts=counts,
    )
