"""How many rows have logits at a time: no tensor as large as all logits ever exists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

# Most elements of a [rows, vocabulary] tensor. Two of them live at a time on a GPU, in the type of
# the head, and about four on a CPU. A GPU needs more rows to hide the traffic of the head's
# gradient.
MAX_ELEMENTS = {"cpu": 2**23, "cuda": 2**28}
# Where the frozen head's products are all that a chunk's rows are for: the fewer rows, the less of
# a GPU do the products fill.
WIDE_ELEMENTS = {"cpu": 2**23, "cuda": 5 * 2**27}
CHUNK_TOKENS = {"cpu": 2048, "cuda": 8192}


def chunks(
    num_rows: int,
    *,
    width: int,
    chunk_tokens: int | None,
    device: torch.device,
    max_elements: Mapping[str, int] = MAX_ELEMENTS,
) -> Iterator[slice]:
    """Split rows so that a [chunk, width] tensor has at most `max_elements` elements, by type of
    device, and a chunk at most `chunk_tokens` rows; None is CHUNK_TOKENS of the device."""
    wanted = chunk_tokens or CHUNK_TOKENS[device.type]
    size = max(1, min(wanted, max_elements[device.type] // width))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
