"""Turn chunks of rows into tokens and loss masks: the work of one tokenising process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colospec.data.read import Chunk
from colospec.data.rows import Chat, Reason, Rejected, parse_row
from colospec.data.template import ChatTemplate, Rendered


@dataclass(frozen=True)
class EncodeOptions:
    """What decides the tokens and masks, beside the rows and the tokenizer's files.

    See `DataConfig`; `vocab_size` is the target's.
    """

    vocab_size: int
    max_length: int
    last_turn_only: bool | None
    min_loss_tokens: int


@dataclass(frozen=True)
class Filtered:
    """A row that was left out; `row` counts from 1."""

    file: str
    row: int
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Encoded:
    """A chunk's samples end to end.

    tokens [T] int32; loss_mask [T] bool; lengths [N] int64, tokens of each sample. `share` is the
    part of the whole input that is done with this chunk.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    filtered: list[Filtered]
    share: float


@dataclass(frozen=True)
class _Document:
    """A row as text; plain text has no `rendered`."""

    row: int
    text: str
    rendered: Rendered | None


Sample = tuple[NDArray[np.int32], NDArray[np.bool_]]


class Encoder:
    """Encodes chunks with the tokenizer of a Hugging Face directory."""

    def __init__(self, tokenizer_path: Path, options: EncodeOptions) -> None:
        self._options = options
        self._tokenizer = load_tokenizer(tokenizer_path)
        self._backend = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._post_processor = self._backend.post_processor
        self._template: ChatTemplate | None = None

    def encode(self, chunk: Chunk) -> Encoded:
        """Encode a chunk; rows that cannot be trained on are listed in `filtered`.

        Raises ValueError if the chunk has chats and the tokenizer no template that works.
        """
        filtered: list[Filtered] = []
        documents = list(self._documents(chunk, filtered))
        samples: list[Sample] = []
        for document, encoding in self._tokenise(documents):
            try:
                samples.append(self._sample(document, encoding))
            except Rejected as rejected:
                filtered.append(_filtered(chunk, document.row, rejected))
        filtered.sort(key=lambda entry: entry.row)
        return Encoded(
            tokens=np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in samples)]),
            loss_mask=np.concatenate([np.empty(0, np.bool_), *(mask for _, mask in samples)]),
            lengths=np.array([len(ids) for ids, _ in samples], np.int64),
            filtered=filtered,
            share=chunk.share,
        )

    def _documents(self, chunk: Chunk, filtered: list[Filtered]) -> Iterator[_Document]:
        for number, row in chunk.parsed():
            try:
                if isinstance(row, Rejected):
                    raise row
                yield self._document(number, row)
            except Rejected as rejected:
                filtered.append(_filtered(chunk, number, rejected))

    def _document(self, number: int, row: Any) -> _Document:
        parsed = parse_row(row)
        rendered = self._chat_template().render(parsed) if isinstance(parsed, Chat) else None
        text = rendered.text if rendered else parsed.text  # type: ignore[union-attr]
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Rejected(Reason.bad_json, f"text that is no Unicode: {error}") from None
        return _Document(number, text, rendered)

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            self._template = ChatTemplate(
                self._tokenizer, last_turn_only=self._options.last_turn_only
            )
        return self._template

    def _tokenise(self, documents: list[_Document]) -> list[tuple[_Document, Any]]:
        """Pair each document with its encoding; one batch for the chats and one for the texts."""
        pairs: list[tuple[_Document, Any]] = []
        chats = [document for document in documents if document.rendered]
        texts = [document for document in documents if not document.rendered]
        if chats:
            template = self._chat_template()
            encodings = template.encode([document.text for document in chats])
            pairs += zip(chats, encodings, strict=True)
        if texts:
            self._backend.post_processor = self._post_processor
            batch = [document.text for document in texts]
            encodings = self._backend.encode_batch_fast(batch, add_special_tokens=True)
            pairs += zip(texts, encodings, strict=True)
        return sorted(pairs, key=lambda pair: pair[0].row)

    def _sample(self, document: _Document, encoding: Any) -> Sample:
        options = self._options
        ids = np.array(encoding.ids, np.int32)
        if len(ids) and (largest := int(ids.max())) >= options.vocab_size:
            detail = f"token id {largest}, but the target has {options.vocab_size}"
            raise Rejected(Reason.outside_vocabulary, detail)
        if len(ids) > options.max_length:
            detail = f"{len(ids)} tokens, data.max_length={options.max_length}"
            raise Rejected(Reason.too_long, detail)
        if document.rendered:
            mask = self._chat_template().mask(encoding, document.rendered)
        else:
            mask = np.ones(len(ids), np.bool_)
        if (count := int(mask.sum())) < max(options.min_loss_tokens, 1):
            detail = f"{count} supervised tokens, data.min_loss_tokens={options.min_loss_tokens}"
            raise Rejected(Reason.nothing_supervised, detail)
        return ids, mask


def load_tokenizer(path: Path) -> Any:
    """Load a fast tokenizer from a directory; raises ValueError where there is none."""
    # Half a second that only those who tokenise spend.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"cannot load a tokenizer from {path}: {error}; "
            "the directory needs the tokenizer.json and tokenizer_config.json of the target"
        ) from error
    if len(tokenizer) < 2:  # made by transformers for a directory without any
        raise ValueError(
            f"there is no tokenizer in {path}; put the tokenizer.json and tokenizer_config.json of "
            "the target there"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer in {path} has no fast version, which exact loss masks need; "
            "add a tokenizer.json to the directory"
        )
    return tokenizer


def _filtered(chunk: Chunk, row: int, rejected: Rejected) -> Filtered:
    return Filtered(chunk.file, row, rejected.reason, rejected.detail[:300])
