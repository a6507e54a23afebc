"""Loss masks of chats: exactly what the target generates, by every kind of template."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from colospec.data.rows import Chat, Reason, Rejected, parse_row
from colospec.data.template import ChatTemplate
from tests.data import chat_tokenizers


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def chat(*messages, tools=None, flag=None):
    return parse_row({"messages": list(messages), "tools": tools, "last_turn_only": flag})


SINGLE = [turn("user", "What is the weather?"), turn("assistant", "It is sunny, yes.")]
MULTI = [
    turn("system", "The dog sleeps."),
    turn("user", "hello"),
    turn("assistant", "hello, fox!"),
    turn("user", "What is red?"),
    turn("assistant", "The dog \U0001f436"),
]
THOUGHTFUL = [
    turn("user", "hello"),
    turn("assistant", "<think>\nlazy\n</think>\n\nyes"),
    turn("user", "north?"),
    turn("assistant", "<think>\nbrown\n</think>\n\nno"),
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
AGENT = [
    turn("user", "What is the weather like in Paris?"),
    turn("assistant", "<think>tool</think>", tool_calls=[CALL]),
    turn("tool", "21 degrees"),
    turn("assistant", "<think>warm</think>It is 21 degrees."),
]


def supervised(tokenizer, sample, last_turn_only=None):
    """The supervised stretches of a chat, as text; ids are checked against transformers' own."""
    template = ChatTemplate(tokenizer, last_turn_only=last_turn_only)
    rendered = template.render(sample)
    (encoding,) = template.encode([rendered.text])
    mask = template.mask(encoding, rendered)
    ids = np.array(encoding.ids)
    expected = tokenizer.apply_chat_template(sample.messages, tools=sample.tools, return_dict=True)
    assert ids.tolist() == expected["input_ids"]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]


GOLDEN = [
    ("chatml", SINGLE, None, ["It is sunny, yes.<|im_end|>"]),
    ("chatml", MULTI, None, ["hello, fox!<|im_end|>", "The dog \U0001f436<|im_end|>"]),
    ("chatml", MULTI, True, ["The dog \U0001f436<|im_end|>"]),
    ("chatml", THOUGHTFUL, None, [m["content"] + "<|im_end|>" for m in THOUGHTFUL[1::2]]),
    ("marked", MULTI, None, ["hello, fox!<|im_end|>", "The dog \U0001f436<|im_end|>"]),
    ("marked", MULTI, True, ["The dog \U0001f436<|im_end|>"]),
    ("llama3", MULTI, None, ["hello, fox!<|eot_id|>", "The dog \U0001f436<|eot_id|>"]),
    ("llama3", SINGLE, True, ["It is sunny, yes.<|eot_id|>"]),
    ("thinking", SINGLE, None, ["<think>\n\n</think>\n\nIt is sunny, yes.<|im_end|>"]),
    ("thinking", THOUGHTFUL, None, ["<think>\nbrown\n</think>\n\nno<|im_end|>"]),
    ("thinking", THOUGHTFUL, True, ["<think>\nbrown\n</think>\n\nno<|im_end|>"]),
    ("thinking", MULTI, None, ["<think>\n\n</think>\n\nThe dog \U0001f436<|im_end|>"]),
]


@pytest.mark.parametrize(("name", "messages", "last_turn_only", "expected"), GOLDEN)
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_answers_and_end_of_turn_are_supervised_and_nothing_else(
    name, messages, last_turn_only, expected, trim_offsets
):
    tokenizer = chat_tokenizers.build(name, trim_offsets=trim_offsets)
    assert supervised(tokenizer, chat(*messages), last_turn_only) == expected


def test_a_tool_loop_keeps_its_reasoning_so_that_all_its_turns_are_supervised():
    tokenizer = chat_tokenizers.build("thinking")
    first, second = supervised(tokenizer, chat(*AGENT, tools=TOOLS))
    assert first.startswith("<think>\ntool\n</think>\n\n<tool_call>{")
    assert first.endswith("</tool_call><|im_end|>")
    assert second == "<think>\nwarm\n</think>\n\nIt is 21 degrees.<|im_end|>"


@pytest.mark.parametrize(("config", "flag", "num_turns"), [(True, False, 2), (None, True, 1)])
def test_the_flag_of_a_row_wins_over_the_setting(config, flag, num_turns):
    tokenizer = chat_tokenizers.build("chatml")
    assert len(supervised(tokenizer, chat(*MULTI, flag=flag), config)) == num_turns


def test_turns_that_the_template_rewrites_are_refused_if_all_turns_are_asked_for():
    template = ChatTemplate(chat_tokenizers.build("thinking"), last_turn_only=False)
    with pytest.raises(Rejected, match=r"rewrites earlier turns.*last_turn_only=null") as caught:
        template.spans(template.render(chat(*THOUGHTFUL)))
    assert caught.value.reason is Reason.no_exact_mask
    assert len(template.spans(template.render(chat(*SINGLE)))) == 1


def test_marked_template_that_rewrites_history_supervises_the_last_turn_only():
    tokenizer = chat_tokenizers.build("marked")
    tokenizer.chat_template = chat_tokenizers.MARKED_CHATML.replace(
        "{{ m.content }}<|im_end|>{% endgeneration %}",
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
        "<|im_end|>{% endgeneration %}",
    )
    expected = ["<think>\nbrown\n</think>\n\nno<|im_end|>"]
    assert supervised(tokenizer, chat(*THOUGHTFUL)) == expected
    assert len(supervised(tokenizer, chat(*MULTI))) == 2


def test_marks_agree_with_the_mask_of_transformers():
    tokenizer = chat_tokenizers.build("marked")
    template = ChatTemplate(tokenizer, last_turn_only=False)
    sample = chat(*SINGLE, *THOUGHTFUL)
    rendered = template.render(sample)
    expected = tokenizer.apply_chat_template(
        sample.messages, return_assistant_tokens_mask=True, return_dict=True
    )["assistant_masks"]
    mask = template.mask(template.encode([rendered.text])[0], rendered)
    assert mask.astype(int).tolist() == expected


CHATML = chat_tokenizers.build("chatml")
contents = st.text(st.characters(codec="utf-8"), max_size=30).filter(
    lambda text: text == text.lstrip()
)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(contents, contents), min_size=1, max_size=4))
@example([("e\u0301\U0001f468\u200d\U0001f469", "\U0001f436 \r\n\n")])
def test_any_content_has_the_mask_of_its_pieces_tokenised_alone(pairs):
    ids, expected, messages = [], [], []

    def add(text, is_supervised):
        piece = CHATML.encode(text, add_special_tokens=False)
        ids.extend(piece)
        expected.extend([is_supervised] * len(piece))

    for question, answer in pairs:
        messages += [turn("user", question), turn("assistant", answer)]
        add("<|im_start|>user\n" + question + "<|im_end|>\n<|im_start|>assistant\n", False)
        add(answer + "<|im_end|>", True)
        add("\n", False)
    template = ChatTemplate(CHATML, last_turn_only=None)
    rendered = template.render(chat(*messages))
    (encoding,) = template.encode([rendered.text])
    assert encoding.ids == ids
    assert template.mask(encoding, rendered).tolist() == expected


def test_prompt_and_supervised_tokens_are_what_a_generation_would_have_made():
    tokenizer = chat_tokenizers.build("thinking")
    template = ChatTemplate(tokenizer, last_turn_only=None)
    for messages in (SINGLE, MULTI, THOUGHTFUL, AGENT):
        sample = chat(*messages)
        rendered = template.render(sample)
        (encoding,) = template.encode([rendered.text])
        first = int(np.flatnonzero(template.mask(encoding, rendered))[-1])
        while template.mask(encoding, rendered)[first - 1]:
            first -= 1
        prompt = tokenizer.apply_chat_template(
            sample.messages[:-1], add_generation_prompt=True, return_dict=True
        )
        assert encoding.ids[:first] == prompt["input_ids"]


def test_template_whose_prompt_is_not_how_answers_begin_is_a_clear_error():
    with pytest.raises(ValueError, match=r"cannot be masked exactly.*\{% generation %\}"):
        ChatTemplate(chat_tokenizers.build("unmaskable"), last_turn_only=None)


def test_template_that_opens_a_thought_supervises_the_rows_that_have_one():
    tokenizer = chat_tokenizers.build("opened")
    question, answer = SINGLE
    thoughtful = chat(question, {**answer, "reasoning_content": "lazy"})
    assert supervised(tokenizer, thoughtful) == ["lazy\n</think>\n\nIt is sunny, yes.<|im_end|>"]
    with pytest.raises(Rejected, match="half in and half out") as caught:
        supervised(tokenizer, chat(*SINGLE))
    assert caught.value.reason is Reason.no_exact_mask


def test_missing_chat_template_is_a_clear_error():
    with pytest.raises(ValueError, match=r"no chat template.*chat_template\.jinja"):
        ChatTemplate(chat_tokenizers.build("none"), last_turn_only=None)


def test_a_token_across_the_border_of_an_answer_is_refused():
    tokenizer = chat_tokenizers.build("chatml")
    template = ChatTemplate(tokenizer, last_turn_only=None)
    rendered = template.render(chat(turn("user", "hello"), turn("assistant", "\n\n no")))
    with pytest.raises(Rejected, match="half in and half out") as caught:
        template.mask(template.encode([rendered.text])[0], rendered)
    assert caught.value.reason is Reason.no_exact_mask


def test_end_token_that_swallows_the_newline_is_supervised():
    tokenizer = chat_tokenizers.build_greedy_end()
    assert supervised(tokenizer, chat(*MULTI)) == [
        "hello, fox!<|end|>",
        "The dog \U0001f436<|end|>",
    ]


def test_tokenizer_that_drops_white_space_has_exact_masks():
    tokenizer = chat_tokenizers.build_word_level()
    assert supervised(tokenizer, chat(*MULTI[:3])) == ["[UNK] [UNK] <|im_end|>"]


def test_what_the_template_refuses_is_a_row_with_wrong_roles():
    template = ChatTemplate(chat_tokenizers.build("strict"), last_turn_only=None)
    with pytest.raises(Rejected, match="roles must alternate") as caught:
        template.render(Chat([SINGLE[0], *SINGLE], None, None))
    assert caught.value.reason is Reason.wrong_roles
