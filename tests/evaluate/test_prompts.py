"""Which part of a row is the prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from colospec.data.encode import load_tokenizer
from colospec.evaluate.prompts import read_prompts
from tests import tiny
from tests.data import chat_tokenizers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(tiny.write_target(tmp_path_factory.mktemp("target"), num_layers=1))


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_text_rows_give_their_first_tokens(tmp_path: Path, tokenizer: Any) -> None:
    text = "def prompt(number):\n    return number + 1\n" * 5
    file = write(tmp_path / "rows.jsonl", [{"text": text}, {"text": "x"}])

    first, second = read_prompts(file, tokenizer, num_prompts=None, prompt_tokens=7)

    assert first.tolist() == tokenizer(text)["input_ids"][:7]
    assert second.tolist() == tokenizer("x")["input_ids"]


def test_prompt_rows_are_taken_whole(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "rows.jsonl", [{"prompt": "import os\n" * 30}])

    (prompt,) = read_prompts(file, tokenizer, num_prompts=3, prompt_tokens=4)

    assert tokenizer.decode(prompt) == "import os\n" * 30


def test_chats_end_with_the_generation_prompt(tmp_path: Path, tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": "the answer"},
    ]
    file = write(tmp_path / "rows.jsonl", [{"messages": messages}])

    (prompt,) = read_prompts(file, tokenizer, num_prompts=1)

    text = tokenizer.decode(prompt)
    assert text.endswith("second<|im_end|>\n<|im_start|>assistant\n")
    assert "one" in text
    assert "the answer" not in text


@pytest.mark.parametrize(
    "earlier",
    [[], [{"role": "user", "content": "first"}, {"role": "assistant", "content": "one"}]],
    ids=["a question alone", "a question after an answer"],
)
def test_a_question_that_nobody_has_answered_is_the_prompt(
    tmp_path: Path, tokenizer: Any, earlier: list[dict[str, str]]
) -> None:
    messages = [*earlier, {"role": "user", "content": "and the moon"}]
    file = write(tmp_path / "rows.jsonl", [{"messages": messages}])

    (prompt,) = read_prompts(file, tokenizer, num_prompts=1)

    text = tokenizer.decode(prompt)
    assert text.endswith("and the moon<|im_end|>\n<|im_start|>assistant\n")
    assert ("one" in text) == bool(earlier)


def test_files_and_numbers_that_cannot_work_are_named(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"--prompts=.*nowhere does not exist; set --prompts to"):
        read_prompts(tmp_path / "nowhere", tokenizer, num_prompts=None)
    with pytest.raises(ValueError, match="-1 prompts are too few"):
        read_prompts(tmp_path, tokenizer, num_prompts=-1)


def test_bad_rows_are_skipped_and_counted(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "good"}\n{broken\n{"text": ""}\n{"other": 1}\n')

    prompts = read_prompts(file, tokenizer, num_prompts=None)

    assert len(prompts) == 1
    assert "3 rows" in caplog.text


def test_chats_that_the_template_refuses_are_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    rows = [{"messages": [user, user, answer]}, {"messages": [user, answer]}]
    file = write(tmp_path / "rows.jsonl", rows)

    prompts = read_prompts(file, chat_tokenizers.build("strict"), num_prompts=None)

    assert len(prompts) == 1
    assert "1 rows" in caplog.text


def test_tokenizer_without_a_chat_template_is_an_error(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    file = write(tmp_path / "rows.jsonl", [{"messages": messages}])

    with pytest.raises(ValueError, match="chat_template"):
        read_prompts(file, chat_tokenizers.build("none"), num_prompts=None)


def test_file_without_prompts_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "rows.jsonl", [{"text": ""}])

    with pytest.raises(ValueError, match=r"holds no prompt \(1 rows skipped, the first: no tok"):
        read_prompts(file, tokenizer, num_prompts=2)
