"""Rows: the forms that are read, and what is wrong with the others."""

import pytest

from colospec.data.rows import Chat, Reason, Rejected, Text, drop_nulls, parse_json, parse_row

USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "yes"}


def test_sharegpt_becomes_messages():
    row = {
        "conversations": [
            {"from": "system", "value": "be short"},
            {"from": "human", "value": "hello"},
            {"from": "gpt", "value": "yes"},
        ]
    }
    expected = [{"role": "system", "content": "be short"}, USER, ASSISTANT]
    assert parse_row(row) == Chat(expected, None, None)


@pytest.mark.parametrize("name", ["gpt", "chatgpt", "bing", "bard", "assistant", "GPT"])
def test_all_names_of_assistants_are_known(name):
    row = {"conversations": [{"from": "user", "value": "hello"}, {"from": name, "value": "yes"}]}
    assert parse_row(row).messages == [USER, ASSISTANT]


def test_text_rows_stay_text():
    assert parse_row({"text": "once", "id": 3, "messages": None}) == Text("once")


def test_tools_may_be_json_text_and_flags_are_kept():
    row = {"messages": [USER, ASSISTANT], "tools": '[{"name": "f"}]', "last_turn_only": True}
    assert parse_row(row) == Chat([USER, ASSISTANT], [{"name": "f"}], True)


def test_messages_after_the_last_answer_are_cut_off():
    assert parse_row({"messages": [USER, ASSISTANT, USER]}).messages == [USER, ASSISTANT]


def test_columns_of_a_sequence_are_messages():
    row = {"conversations": {"from": ["human", "gpt"], "value": ["hello", "yes"]}}
    assert parse_row(row).messages == [USER, ASSISTANT]


def test_nulls_are_dropped_at_all_depths():
    value = {"a": None, "b": [{"c": None, "d": 1}], "e": {"f": None}}
    assert drop_nulls(value) == {"b": [{"d": 1}], "e": {}}


def test_text_parts_of_content_are_joined():
    parts = [{"type": "text", "text": "ye"}, {"type": "text", "text": "s"}]
    row = {"messages": [USER, {"role": "assistant", "content": parts}]}
    assert parse_row(row).messages == [USER, ASSISTANT]


def test_a_call_without_content_is_a_message():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert parse_row({"messages": [USER, call]}).messages[1] == {**call, "content": ""}


WRONG = [
    ([1], Reason.bad_row, "an object is needed"),
    ({"prompt": "x"}, Reason.bad_row, "fields: 'prompt'"),
    ({"text": 5}, Reason.bad_row, "text must be a string"),
    ({"messages": "hello"}, Reason.bad_row, "a list of messages"),
    ({"messages": ["hello"]}, Reason.bad_row, "a message must be an object"),
    ({"messages": [{"content": "x"}]}, Reason.bad_row, "without role or from"),
    ({"messages": [USER, {"role": "assistant"}]}, Reason.bad_row, "without content or value"),
    ({"messages": [USER, {"role": "assistant", "content": 7}]}, Reason.bad_row, "must be text"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, Reason.bad_row, "be text"),
    ({"messages": [USER, ASSISTANT], "tools": {"a": 1}}, Reason.bad_row, "list of objects"),
    ({"messages": [USER, ASSISTANT], "last_turn_only": 1}, Reason.bad_row, "true or false"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, Reason.wrong_roles, "'wizard'"),
    ({"messages": [USER]}, Reason.wrong_roles, "no assistant message"),
    ({"messages": []}, Reason.wrong_roles, "no assistant message"),
    ({"messages": [ASSISTANT, USER, ASSISTANT]}, Reason.wrong_roles, "speaks first"),
]


@pytest.mark.parametrize(("row", "reason", "detail"), WRONG)
def test_unusable_rows_are_refused_with_what_is_wrong(row, reason, detail):
    with pytest.raises(Rejected, match=detail) as caught:
        parse_row(row)
    assert caught.value.reason is reason


@pytest.mark.parametrize("line", [b"{", b"", b'"\xff"', b"[" * 100_000])
def test_bad_json_is_refused(line):
    with pytest.raises(Rejected) as caught:
        parse_json(line)
    assert caught.value.reason is Reason.bad_json
