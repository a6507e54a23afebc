"""Token-exact loss masks of chats: what the target itself would have generated, and nothing else.

Of every assistant turn the answer and its end-of-turn token are supervised; the generation prompt
before them and white space after them are not. Two ways to find the characters:

* A template with `{% generation %}` blocks says it itself; its blocks are taken as they are.
* Otherwise the conversation is rendered up to the turn, once with the generation prompt and once
  with the turn. Where each rendering is a prefix of the next one and of the whole, what lies
  between them is the turn. Where not, the turn has no exact mask, and none is made up.

Templates of reasoning models rewrite history: they drop the reasoning of earlier turns. Such turns
are not what the target generated, so that they cannot be supervised; the last turn can.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colospec.data.rows import Chat, Message, Reason, Rejected

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]
Tools = list[dict[str, Any]] | None

QUESTION = {"role": "user", "content": "Which way?"}
ANSWER = {"role": "assistant", "content": "North, and then left."}
# A prompt that opens a thought is the beginning only of answers that have one.
PROBES = [
    Chat([QUESTION, answer], tools=None, last_turn_only=True)
    for answer in (ANSWER, {**ANSWER, "reasoning_content": "The moss says north."})
]


@dataclass(frozen=True)
class Rendered:
    """A chat as text; `blocks` are its generation blocks, None if the template marks none.

    A `Span` is the (start, end) of some characters.
    """

    chat: Chat
    text: str
    blocks: list[Span] | None


def no_template(tokenizer: Any) -> ValueError:
    """Return the error of a tokenizer without a chat template, where the data has chats."""
    return ValueError(
        f"the tokenizer in {tokenizer.name_or_path} has no chat template, but the data has "
        "chats: put the chat_template.jinja of the target's instruct version there, or "
        "give rows with text"
    )


class ChatTemplate:
    """The chat template of a fast Hugging Face tokenizer.

    `last_turn_only` None decides per chat: only the last turn where the template rewrites an
    earlier one, else all. A chat's own flag wins. Raises ValueError where the tokenizer has no chat
    template, or one that cannot be masked exactly.
    """

    def __init__(self, tokenizer: Any, *, last_turn_only: bool | None) -> None:
        if not tokenizer.chat_template:
            raise no_template(tokenizer)
        self._tokenizer = tokenizer
        self._last_turn_only = last_turn_only
        self._special_tokens = tokenizer.special_tokens_map
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        # Tokens such as Phi's <|end|> that take the white space after them along.
        self._greedy_ids = [index for index, token in added.items() if token.rstrip]
        self._check()

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Tokenise rendered chats, without adding special tokens, to `tokenizers.Encoding`s."""
        backend = self._tokenizer.backend_tokenizer
        # A byte-level post-processor may trim the white space off a token's characters.
        backend.post_processor = None
        return backend.encode_batch(texts, add_special_tokens=False)  # type: ignore[no-any-return]

    def render(self, chat: Chat) -> Rendered:
        """Render a whole chat; raises Rejected where the template refuses it."""
        template = self._tokenizer.get_chat_template(tools=chat.tools)
        is_marked = GENERATION_BLOCK.search(template) is not None
        text, blocks = self._render(chat.messages, chat.tools, blocks=is_marked)
        return Rendered(chat, text, blocks if is_marked else None)

    def spans(self, rendered: Rendered) -> list[Span]:
        """Find the characters to supervise, in order; raises Rejected."""
        only_last = rendered.chat.last_turn_only
        if only_last is None:
            only_last = self._last_turn_only
        find = self._find_turns if rendered.blocks is None else self._find_marked_turns
        *earlier, last = find(rendered, only_last=bool(only_last))
        if last is None:
            raise Rejected(
                Reason.no_exact_mask, "the generation prompt is not how the answer begins"
            )
        exact = [span for span in earlier if span is not None]
        if len(exact) == len(earlier):
            return [*exact, last]
        if only_last is None:
            return [last]
        raise Rejected(
            Reason.no_exact_mask,
            "the template rewrites earlier turns (it drops their reasoning); "
            "set data.last_turn_only=null, or true",
        )

    def mask(self, encoding: Any, rendered: Rendered) -> NDArray[np.bool_]:
        """Return which tokens [T] of an encoded chat are supervised; raises Rejected.

        A token is supervised where its first character is. One that lies across a border (a
        tokenizer may merge the prompt's last characters with the answer's first) has no exact mask.
        """
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int64)
        starts, ends = offsets[0::2], offsets[1::2]
        mask = np.zeros(len(starts), np.bool_)
        for start, end in self.spans(rendered):
            mask |= (starts >= start) & (starts < end)
            across = (starts < start) & (ends > start)
            across_end = (starts < end) & (ends > end)
            if across_end.any() and rendered.text[end : ends[across_end].max()].isspace():
                across_end &= ~np.isin(encoding.ids, self._greedy_ids)
            across |= across_end
            if across.any():
                first = int(across.argmax())
                token = rendered.text[starts[first] : ends[first]]
                raise Rejected(
                    Reason.no_exact_mask, f"the token {token!r} is half in and half out of a turn"
                )
        return mask

    def _check(self) -> None:
        """Raise ValueError if no simple chat has an exact mask, be it with reasoning or without."""
        details: list[str] = []
        for probe in PROBES:
            try:
                rendered = self.render(probe)
                self.mask(self.encode([rendered.text])[0], rendered)
            except Rejected as rejected:
                # Others may be special to the probe, say a template that demands a system turn.
                if rejected.reason is Reason.no_exact_mask:
                    details.append(rejected.detail)
        if len(details) == len(PROBES):
            raise ValueError(
                f"the chat template in {self._tokenizer.name_or_path} cannot be masked "
                f"exactly: {details[0]}; put {{% generation %}} ... {{% endgeneration %}} "
                "around the answer in it"
            )

    def _find_turns(self, rendered: Rendered, *, only_last: bool) -> list[Span | None]:
        """Return the span of each assistant turn, None where it is not exact."""
        messages, tools = rendered.chat.messages, rendered.chat.tools
        spans: list[Span | None] = []
        for turn in _assistant_turns(messages)[-1 if only_last else 0 :]:
            prompt = self._render(messages[:turn], tools, generation_prompt=True)[0]
            done = rendered.text
            if turn < len(messages) - 1:
                done = self._render(messages[: turn + 1], tools)[0]
            is_exact = done.startswith(prompt) and rendered.text.startswith(done)
            end = max(len(done.rstrip()), len(prompt))
            spans.append((len(prompt), end) if is_exact else None)
        return spans

    def _find_marked_turns(self, rendered: Rendered, *, only_last: bool) -> list[Span | None]:
        """Do the same by the blocks; a turn is exact if it was the same when it was the last."""
        messages, tools, blocks = rendered.chat.messages, rendered.chat.tools, rendered.blocks
        turns = _assistant_turns(messages)
        if blocks is None or len(blocks) != len(turns):
            raise Rejected(
                Reason.no_exact_mask,
                f"the template made {len(blocks or [])} generation blocks of {len(turns)} turns",
            )
        if only_last:
            return [blocks[-1]]
        spans: list[Span | None] = []
        for turn, (start, end) in zip(turns[:-1], blocks[:-1], strict=True):
            done, ending = self._render(messages[: turn + 1], tools, blocks=True)
            is_exact = bool(ending) and done[slice(*ending[-1])] == rendered.text[start:end]
            spans.append((start, end) if is_exact else None)
        return [*spans, blocks[-1]]

    def _render(
        self,
        messages: list[Message],
        tools: Tools,
        *,
        generation_prompt: bool = False,
        blocks: bool = False,
    ) -> tuple[str, list[Span]]:
        """Return the text, and the spans of its generation blocks if asked for; raises Rejected."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self._tokenizer.get_chat_template(tools=tools),
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=blocks,
                **self._special_tokens,
            )
        except Exception as error:  # a template is a program: a row may make it raise anything
            detail = f"the chat template refuses it: {type(error).__name__}: {error}"
            raise Rejected(Reason.wrong_roles, detail) from None
        return texts[0], spans[0] if blocks else []


def _assistant_turns(messages: list[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]
