"""Prompts for evaluation, from the same files that training reads.

What of a row is the prompt: all of `prompt`; the first tokens of `text`; all of a chat, without the
assistant message that it may end with, and with the generation prompt of the chat template.
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
from colospec.data.template import no_template

log = logging.getLogger(__name__)


def read_prompts(
    path: Path, tokenizer: Any, *, num_prompts: int | None, prompt_tokens: int = 64
) -> list[Tensor]:
    """Return the first `num_prompts` prompts (None: all) as token ids [n] on the CPU.

    `prompt_tokens` is how much of a `text` row is prompt. Rows that cannot be read are skipped and
    counted. Raises ValueError for files that cannot be read or hold no prompt.
    """
    if num_prompts is not None and num_prompts < 1:
        raise ValueError(f"{num_prompts} prompts are too few to measure anything; take at least 1")
    prompts: list[Tensor] = []
    reasons: list[str] = []
    for row in _rows(path):
        if num_prompts is not None and len(prompts) == num_prompts:
            break
        try:
            token_ids = _encode(row, tokenizer, prompt_tokens)
        except Rejected as rejected:
            reasons.append(rejected.detail)
            continue
        if token_ids:
            prompts.append(torch.tensor(token_ids))
        else:
            reasons.append("no token in it")
    if not prompts:
        raise ValueError(
            f"{path} holds no prompt ({len(reasons)} rows skipped"
            + (f", the first: {reasons[0]}" if reasons else "")
            + "); give rows with prompt, text or messages"
        )
    if reasons:
        log.warning(
            "%s: %d rows are no prompts and were skipped, the first: %s",
            path, len(reasons), reasons[0],
        )  # fmt: skip
    return prompts


def _rows(path: Path) -> Iterator[Any]:
    for chunk in read_chunks(find_files(path, setting="--prompts"), setting="--prompts"):
        for _, row in chunk.parsed():
            yield row


def _encode(row: Any, tokenizer: Any, prompt_tokens: int) -> list[int]:
    if isinstance(row, Rejected):
        raise row
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        return list(tokenizer(row["prompt"])["input_ids"])
    parsed = parse_row(row, is_prompt=True)
    if isinstance(parsed, Text):
        return list(tokenizer(parsed.text)["input_ids"])[:prompt_tokens]
    text = _render(parsed, tokenizer)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _render(chat: Chat, tokenizer: Any) -> str:
    """Return the chat as the model gets it; raises Rejected where the template refuses it."""
    if not tokenizer.chat_template:
        raise no_template(tokenizer)
    try:
        return str(
            tokenizer.apply_chat_template(
                chat.messages, tools=chat.tools, add_generation_prompt=True, tokenize=False
            )
        )
    except Exception as error:  # a template is a program: a row may make it raise anything
        detail = f"the chat template refuses it: {type(error).__name__}: {error}"
        raise Rejected(Reason.wrong_roles, detail) from None
