"""The demo builds its target and data once per machine, whoever asks and however often."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from colospec import demo
from colospec.demo import __main__ as command
from colospec.demo import recipe, text, training
from colospec.demo.training import train_model
from colospec.target import Target

BUILD = "import sys; from colospec import demo; print(demo.ensure_target(sys.argv[1], num_steps=2))"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that two processes filled at the same time, with a barely trained target."""
    cache = tmp_path_factory.mktemp("home") / "colospec"
    left = demo.target_directory(cache).parent / ".target-left"
    left.mkdir(parents=True)
    command = [sys.executable, "-c", BUILD, str(cache)]
    builders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [builder.communicate(timeout=120)[0].strip() for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    assert set(outputs) == {str(demo.target_directory(cache))}
    return cache


def test_concurrent_builders_leave_one_target_and_no_leftovers(cache: Path) -> None:
    parent = demo.target_directory(cache).parent

    assert sorted(path.name for path in parent.iterdir()) == ["target", "target.lock"]


def test_other_users_may_read_what_was_built(cache: Path) -> None:
    target = demo.target_directory(cache)

    assert target.stat().st_mode & 0o777 == 0o755


def test_target_is_a_loadable_model_with_the_announced_config(cache: Path) -> None:
    path = demo.ensure_target(cache)

    target = Target.load(path)
    announced = Target.from_config(path, demo.target_config())
    for name in ("hidden_size", "num_layers", "vocab_size", "dtype", "head_dim", "tied"):
        assert getattr(target, name) == getattr(announced, name)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, target.vocab_size)


def test_tokenizer_has_a_chat_template_and_round_trips(cache: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.ensure_target(cache))
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

    text = tokenizer.apply_chat_template(chat, tokenize=False)
    code = "def na\u00efve(x):\n\treturn {x: '\\n'}\n"

    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert len(tokenizer("<|im_start|>")["input_ids"]) == 1
    assert tokenizer.decode(tokenizer(code)["input_ids"]) == code
    assert tokenizer.eos_token_id == 0


def test_second_call_builds_nothing(cache: Path) -> None:
    assert demo.is_built(cache)
    before = (demo.target_directory(cache) / "model.safetensors").stat().st_mtime_ns

    path = demo.ensure_target(cache)

    assert (path / "model.safetensors").stat().st_mtime_ns == before


def test_data_is_reproducible_and_evaluation_text_is_held_out(tmp_path: Path) -> None:
    first, second = demo.ensure_data(tmp_path / "a"), demo.ensure_data(tmp_path / "b")

    train = [json.loads(line)["text"] for line in first.train_path.open()]
    held_out = [json.loads(line)["text"] for line in first.eval_path.open()]
    assert first.train_path.read_bytes() == second.train_path.read_bytes()
    assert (len(train), len(held_out)) == (recipe.NUM_TRAIN_ROWS, recipe.NUM_EVAL_ROWS)
    assert all(len(text) >= recipe.PIECE_CHARS[0] for text in train + held_out)
    assert not set(train) & set(held_out)


def test_drafts_learn_from_what_the_target_wrote(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "NUM_WRITTEN_ROWS", 6)
    monkeypatch.setattr(text, "WRITTEN_BATCH", 4)
    target = demo.ensure_target(cache)
    row = json.loads(next(demo.ensure_data(cache).train_path.open()))["text"]
    given = AutoTokenizer.from_pretrained(target)(row)["input_ids"][: recipe.WRITTEN_TOKENS[0]]

    path = demo.ensure_written(cache)

    rows = [json.loads(line)["text"] for line in path.open()]
    prefix = AutoTokenizer.from_pretrained(target).decode(given)
    assert len(rows) == 6
    assert rows[0].startswith(prefix)
    assert rows[0] != row[: len(rows[0])]
    assert demo.ensure_written(cache) == path


def test_user_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert demo.target_directory().is_relative_to(tmp_path / "colospec")
    assert not demo.is_built()


def test_training_leaves_threads_and_random_state_alone() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)

    tokens = torch.arange(3000) % recipe.VOCAB_SIZE
    train_model(tokens, tokens, num_steps=1)

    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == 1


def test_a_target_that_had_too_little_time_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training, "MAX_SECONDS", 1e-9)
    tokens = torch.arange(3000) % recipe.VOCAB_SIZE
    with caplog.at_level("WARNING", logger="colospec"):
        train_model(tokens, tokens, num_steps=1)
        assert not caplog.records
        train_model(tokens, tokens, num_steps=2)
    assert "had time for 1 of 2 steps" in caplog.text


def test_report_of_a_missing_run_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))

    with pytest.raises(SystemExit, match=r"error: .*no export/config\.json"):
        command.main(["--report", str(cache / "nothing")])
