"""One row of a dataset: which forms we read, and why a row is left out.

Forms, by field: `messages` [{role, content, ...}] with an optional row-level `tools`, ShareGPT's
`conversations` [{from, value}], or plain `text`. Each may carry `last_turn_only` (bool).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

FIELDS = ("messages", "conversations", "text")
COLUMNS = (*FIELDS, "tools", "last_turn_only")
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
}
Message = dict[str, Any]


class Reason(StrEnum):
    """Why a row is not trained on."""

    bad_json = "bad JSON"
    bad_row = "bad row"
    wrong_roles = "wrong roles"
    no_exact_mask = "no exact mask"
    outside_vocabulary = "outside the vocabulary"
    too_long = "too long"
    nothing_supervised = "nothing supervised"


class Rejected(Exception):
    """A row that cannot be trained on, and what is wrong with it."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Text:
    """A plain document: every token is supervised."""

    text: str


@dataclass(frozen=True)
class Chat:
    """A conversation that ends with an assistant message, or, of a prompt, before one.

    `last_turn_only` is the row's own flag, None where it has none.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    last_turn_only: bool | None


def parse_json(line: bytes | str) -> Any:
    """Parse one line of JSON; raises Rejected."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Rejected(Reason.bad_json, str(error)) from None


def parse_row(row: Any, *, is_prompt: bool = False) -> Text | Chat:
    """Recognise a row by its fields; raises Rejected.

    Messages after the last assistant message are cut off: nothing in them is supervised, and no
    supervised token can see them. Of a prompt, the last assistant message is cut off instead where
    it is the last of all, and none is needed.
    """
    if not isinstance(row, dict):
        raise Rejected(Reason.bad_row, f"an object is needed, not {_show(row)}")
    field = next((field for field in FIELDS if row.get(field) is not None), None)
    if field is None:
        names = ", ".join(map(repr, row)) or "none"
        raise Rejected(Reason.bad_row, f"no messages, conversations or text; fields: {names}")
    if field == "text":
        if not isinstance(row["text"], str):
            raise Rejected(Reason.bad_row, f"text must be a string, not {_show(row['text'])}")
        return Text(row["text"])
    flag = row.get("last_turn_only")
    if flag is not None and not isinstance(flag, bool):
        raise Rejected(Reason.bad_row, f"last_turn_only must be true or false, not {_show(flag)}")
    messages = [_message(turn) for turn in _turns(row[field])]
    kept = _unanswered(messages) if is_prompt else _check_roles(messages)
    return Chat(kept, _tools(row.get("tools")), flag)


def drop_nulls(value: Any) -> Any:
    """Drop null fields of objects, at all depths.

    Arrow gives every object of a column all the fields that any of them has, as null.
    """
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value


def _turns(turns: Any) -> list[Any]:
    """Return the list of turns; a dict of equally long columns is one too (datasets' Sequence)."""
    if isinstance(turns, dict):
        columns = [column for column in turns.values() if isinstance(column, list)]
        if len(columns) == len(turns) and len({len(column) for column in columns}) == 1:
            return [dict(zip(turns, turn, strict=True)) for turn in zip(*columns, strict=True)]
    if not isinstance(turns, list):
        raise Rejected(Reason.bad_row, f"a list of messages is needed, not {_show(turns)}")
    return turns


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise Rejected(Reason.bad_row, f"a message must be an object, not {_show(turn)}")
    name = turn.get("role", turn.get("from"))
    if not isinstance(name, str):
        raise Rejected(Reason.bad_row, f"a message without role or from: {_show(turn)}")
    if name.lower() not in ROLES:
        raise Rejected(Reason.wrong_roles, f"unknown role {_show(name)}")
    message = {
        key: value
        for key, value in turn.items()
        if value is not None and key not in ("role", "from", "value")
    }
    if "content" not in message and turn.get("value") is not None:
        message["content"] = turn["value"]
    if "content" not in message and "tool_calls" not in message:
        raise Rejected(Reason.bad_row, f"a message without content or value: {_show(turn)}")
    return {**message, "role": ROLES[name.lower()], "content": _text(message.get("content", ""))}


def _text(content: Any) -> str:
    """Return a message's content; a list of text parts is joined (few templates know lists)."""
    texts: list[str] = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise Rejected(Reason.bad_row, f"content must be text, not {_show(content)}")
        texts.append(text)
    return "".join(texts)


def _unanswered(messages: list[Message]) -> list[Message]:
    """Return the messages that wait for an answer."""
    kept = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if not kept:
        raise Rejected(Reason.wrong_roles, "no message before the assistant's")
    return kept


def _check_roles(messages: list[Message]) -> list[Message]:
    """Return the messages up to the last assistant's."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise Rejected(Reason.wrong_roles, "no assistant message")
    if next(role for role in roles if role not in ("system", "developer")) == "assistant":
        raise Rejected(Reason.wrong_roles, "the assistant speaks first")
    return messages[: len(roles) - roles[::-1].index("assistant")]


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return the tools' schemas; JSON text of them is read too."""
    if isinstance(tools, str):
        tools = parse_json(tools) if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Rejected(Reason.bad_row, f"tools must be a list of objects, not {_show(tools)}")
    return tools


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
