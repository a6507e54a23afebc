"""Prompts for evaluation, from the same files that training reads.

What of a row is the prompt: all of `prompt`; the first tokens of `text`; of a chat, everything
before its last assistant message, with the generation prompt of the chat template.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colospec.data.read import find_files, read_chunks
from colospec.data.rows import Chat, Reason, Rejected, Text, parse_row

log = logging.getLogger(__name__)


def read_prompts(
    path: Path, tokenizer: Any, *, num_prompts: int | None, prompt_tokens: int = 64
) -> list[Tensor]:
    """Return the first `num_prompts` prompts (None: all) as token ids [n] on the CPU.

    `prompt_tokens` is how much of a `text` row is prompt. Rows that cannot be read are skipped and
    counted. Raises ValueError for files that cannot be read or hold no prompt.
    """
    prompts: list[Tensor] = []
    num_skipped = 0
    for row in _rows(path):
        if num_prompts is not None and len(prompts) == num_prompts:
            break
        try:
            token_ids = _encode(row, tokenizer, prompt_tokens)
        except Rejected as rejected:
            log.debug("%s: a row is no prompt: %s", path, rejected)
            token_ids = []
        if token_ids:
            prompts.append(torch.tensor(token_ids))
        else:
            num_skipped += 1
    if not prompts:
        raise ValueError(
            f"{path} holds no prompt ({num_skipped} rows skipped); give rows with prompt, text or "
            "messages"
        )
    if num_skipped:
        log.warning("%s: %d rows are no prompts and were skipped", path, num_skipped)
    return prompts


def _rows(path: Path) -> Iterator[Any]:
    for chunk in read_chunks(find_files(path)):
        for _, row in chunk.parsed():
            yield row


def _encode(row: Any, tokenizer: Any, prompt_tokens: int) -> list[int]:
    if isinstance(row, Rejected):
        raise row
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        return list(tokenizer(row["prompt"])["input_ids"])
    parsed = parse_row(row)
    if isinstance(parsed, Text):
        return list(tokenizer(parsed.text)["input_ids"])[:prompt_tokens]
    text = _render(parsed, tokenizer)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _render(chat: Chat, tokenizer: Any) -> str:
    """Return the chat up to its last answer; raises Rejected where the template refuses it."""
    try:
        return str(
            tokenizer.apply_chat_template(
                chat.messages[:-1], tools=chat.tools, add_generation_prompt=True, tokenize=False
            )
        )
    except Exception as error:  # a template is a program: a row may make it raise anything
        if not tokenizer.chat_template:
            raise
        detail = f"the chat template refuses it: {type(error).__name__}: {error}"
        raise Rejected(Reason.wrong_roles, detail) from None
