"""Build SGLang's forward batch from packed documents, with one copy to the device.

No request, scheduler or allocator stands behind it: document b is request b + 1 (row 0 is padding),
and token t of the batch lies in slot t + 1 of the KV pool (slot 0 is padding).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

# Rows of the staging tensor start at multiples of 256 bytes, as kernels like them.
ALIGNMENT = 32


class BatchBuilder:
    """Turns token ids, positions and document lengths into a ForwardBatch of `runner`."""

    def __init__(self, runner: Any, *, max_tokens: int) -> None:
        info: Any = importlib.import_module("sglang.srt.model_executor.forward_batch_info")
        self._forward_batch: Any = info.ForwardBatch
        self._fixed = {
            "forward_mode": info.ForwardMode.EXTEND,
            "capture_hidden_mode": info.CaptureHiddenMode.NULL,
        }
        self._table: Tensor = runner.req_to_token_pool.req_to_token
        self._device = self._table.device
        size = max(max_tokens, *self._table.shape)
        self._from_1 = torch.arange(1, size + 1, device=self._device)
        self._from_1_int32 = self._from_1.to(torch.int32)
        self._no_prefix = torch.zeros(size, dtype=torch.int32, device=self._device)

    def build(self, token_ids: Tensor, position_ids: Tensor, lengths: Sequence[int]) -> Any:
        """Stage one batch: token_ids and position_ids [T] int64 on the CPU; `lengths` without 0."""
        batch_size, num_tokens, longest = len(lengths), len(token_ids), max(lengths)
        starts = [0, *accumulate(lengths[:-1])]
        seq_lens = torch.tensor(lengths)
        ids, positions, lens, begins = self._to_device(
            token_ids, position_ids, seq_lens, torch.tensor(starts)
        )
        lens_int32, begins_int32 = lens.to(torch.int32), begins.to(torch.int32)
        rows = self._table[1 : batch_size + 1, :longest]
        torch.add(begins_int32[:, None], self._from_1_int32[:longest], out=rows)
        # What lies beyond a document's length is not read, but shall be a slot of the pool.
        rows.clamp_(max=num_tokens)
        return self._forward_batch(
            **self._fixed,
            batch_size=batch_size,
            input_ids=ids,
            positions=positions,
            req_pool_indices=self._from_1[:batch_size],
            out_cache_loc=self._from_1[:num_tokens],
            seq_lens=lens,
            seq_lens_cpu=seq_lens,
            seq_lens_sum=num_tokens,
            orig_seq_lens=lens_int32,
            extend_num_tokens=num_tokens,
            extend_seq_lens=lens_int32,
            extend_seq_lens_cpu=list(lengths),
            extend_start_loc=begins_int32,
            extend_prefix_lens=self._no_prefix[:batch_size],
            extend_prefix_lens_cpu=[0] * batch_size,
            extend_logprob_start_lens_cpu=list(lengths),
            num_token_non_padded_cpu=num_tokens,
        )

    def _to_device(self, *columns: Tensor) -> list[Tensor]:
        """Copy several [n] int64 tensors in one piece, without waiting for the device.

        The pinned memory goes back to torch's allocator, which gives it out again only when the
        copy is done.
        """
        widths = [-(-len(column) // ALIGNMENT) * ALIGNMENT for column in columns]
        staging = torch.empty(
            sum(widths), dtype=torch.int64, pin_memory=self._device.type == "cuda"
        )
        for place, column in zip(torch.split(staging, widths), columns, strict=True):
            place[: len(column)] = column
        copied = torch.split(staging.to(self._device, non_blocking=True), widths)
        return [place[: len(column)] for place, column in zip(copied, columns, strict=True)]
