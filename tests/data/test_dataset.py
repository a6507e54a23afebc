"""Tokenised datasets: the right tokens from every kind of file, made once, opened at once."""

import json
import time

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from colospec.batch import Cursor, TokenBatch
from colospec.config import DataConfig
from colospec.data import dataset as dataset_module
from colospec.data.dataset import Dataset, prepare
from colospec.data.encode import load_tokenizer
from tests.data import rows

VOCAB_SIZE = 400


@pytest.fixture
def open_data(tmp_path, tokenizer_dirs):
    def open_data(path, tokenizer="chatml", vocab_size=VOCAB_SIZE, **settings):
        config = DataConfig(path=str(path), **{"num_workers": 1, **settings})
        return prepare(
            config,
            tokenizer_path=tokenizer_dirs[tokenizer],
            vocab_size=vocab_size,
            cache_dir=tmp_path / "cache",
        )

    return open_data


def reference(tokenizer, row):
    """A row's tokens and mask by transformers alone (its template marks the answers)."""
    if "text" in row:
        ids = tokenizer(row["text"])["input_ids"]
        return ids, [1] * len(ids)
    both = tokenizer.apply_chat_template(
        rows.as_messages(row), return_dict=True, return_assistant_tokens_mask=True
    )
    return both["input_ids"], both["assistant_masks"]


def assert_same_samples(dataset, expected):
    assert len(dataset) == len(expected)
    for index, (ids, mask) in enumerate(expected):
        tokens, loss_mask = dataset.sample(index)
        assert tokens.tolist() == ids
        assert loss_mask.tolist() == [bool(bit) for bit in mask]
        assert dataset.lengths[index] == len(ids)
        assert dataset.num_loss_tokens[index] == sum(mask)


@pytest.mark.parametrize("kind", ["lines", "array", "object", "lines named json"])
@pytest.mark.parametrize("tokenizer", ["chatml", "marked"])
def test_mixed_rows_have_the_tokens_and_masks_of_transformers(
    tmp_path, tokenizer_dirs, open_data, kind, tokenizer
):
    data = rows.mixed(150, seed=len(kind))
    path = tmp_path / ("rows.jsonl" if kind == "lines" else "rows.json")
    if kind.startswith("lines"):
        rows.write_lines(path, data)
    else:
        path.write_text(json.dumps(data if kind == "array" else {"data": data}, indent=1))
    marked = AutoTokenizer.from_pretrained(tokenizer_dirs["marked"])
    assert_same_samples(open_data(path, tokenizer), [reference(marked, row) for row in data])


def test_special_tokens_are_added_to_text_only(tmp_path, tokenizer_dirs, open_data):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    data = [{"text": "hello fox"}, {"messages": turns}]
    path = rows.write_lines(tmp_path / "rows.jsonl", [*data, *data])
    words = AutoTokenizer.from_pretrained(tokenizer_dirs["words"])
    dataset = open_data(path, "words")
    bos = words.convert_tokens_to_ids("<|begin_of_text|>")
    for index in (0, 2):
        assert dataset.sample(index)[0].tolist() == [bos, *words.encode("hello fox")[-2:]]
        assert bos not in dataset.sample(index + 1)[0]


@pytest.mark.parametrize("kind", ["parquet", "directory", "saved", "saved splits", "arrow"])
def test_tables_give_the_same_samples_as_lines(tmp_path, open_data, kind):
    import datasets

    data = [{"messages": row, "id": n} for n, row in enumerate(_chats(700))]
    data[5]["last_turn_only"] = True
    table = datasets.Dataset.from_list(data)
    path = tmp_path / "table"
    if kind == "parquet":
        path = path.with_suffix(".parquet")
        table.to_parquet(path)
    elif kind == "directory":
        path.mkdir()
        table.select(range(300)).to_parquet(path / "a.parquet")
        rows.write_lines(path / "b.jsonl", data[300:])
        (path / "README.md").write_text("not data")
    elif kind == "saved":
        table.save_to_disk(path, num_shards=3)
    elif kind == "saved splits":
        splits = {"train": table, "test": table.select(range(4))}
        datasets.DatasetDict(splits).save_to_disk(path)
    else:
        table.save_to_disk(path)
        (path,) = path.glob("*.arrow")
    lines = open_data(rows.write_lines(tmp_path / "rows.jsonl", data))
    tables = open_data(path)
    assert len(tables) == 700
    for index in range(700):
        for one, other in zip(lines.sample(index), tables.sample(index), strict=True):
            assert torch.equal(one, other)


def _chats(num_rows):
    import random

    rng = random.Random(num_rows)
    return [rows.messages(rng) for _ in range(num_rows)]


def test_batch_is_what_packing_sample_by_sample_gives(tmp_path, open_data):
    dataset = open_data(rows.write_lines(tmp_path / "rows.jsonl", rows.mixed(50)))
    cursor = Cursor(1, 2, 3)
    for ids in ((), (7,), (3, 49, 0, 20)):
        samples = [dataset.sample(index) for index in ids]
        batch = dataset.batch(cursor, ids)
        expected = TokenBatch.pack(cursor, ids, [s[0] for s in samples], [s[1] for s in samples])
        assert batch.digest == expected.digest
        for name in ("token_ids", "position_ids", "cu_seqlens", "loss_mask"):
            one, other = getattr(batch, name), getattr(expected, name)
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        assert batch.sample_ids == ids


def test_token_counts_count_the_supervised_tokens(tmp_path, open_data):
    dataset = open_data(rows.write_lines(tmp_path / "rows.jsonl", rows.mixed(80)))
    samples = [dataset.sample(index) for index in range(len(dataset))]
    supervised = torch.cat([ids[mask] for ids, mask in samples])
    expected = torch.bincount(supervised, minlength=VOCAB_SIZE)
    assert dataset.token_counts.tolist() == expected.tolist()


def test_rows_that_cannot_be_trained_on_are_counted_and_listed(tmp_path, open_data):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    long = {"text": "fox " * 3000}
    short = {"text": "a"}
    lone = {"text": "\ud800 lone"}
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in (good, long, short, lone, {"id": 1}, good)]
    lines += ["", '{"text": ', json.dumps({"messages": [{"role": "user", "content": "a"}]})]
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    dataset = open_data(path, min_loss_tokens=2, max_filtered_fraction=0.8)
    assert len(dataset) == 2
    assert dataset.num_filtered == {
        "bad JSON": 3,
        "too long": 1,
        "nothing supervised": 1,
        "bad row": 1,
        "wrong roles": 1,
    }
    listed = [json.loads(line) for line in (dataset.directory / "filtered.jsonl").open()]
    assert [entry["row"] for entry in listed] == [2, 3, 4, 5, 8, 9, 10]
    assert {entry["file"] for entry in listed} == {"rows.jsonl"}
    assert "max_length=2048" in listed[0]["detail"]


def test_too_many_filtered_rows_are_an_error_that_says_all(tmp_path, open_data):
    path = rows.write_lines(tmp_path / "rows.jsonl", [{"text": "fox " * 3000}] * 3 + [{"a": 1}])
    with pytest.raises(ValueError, match="4 of 4 rows") as caught:
        open_data(path, max_filtered_fraction=1.0)
    message = str(caught.value)
    assert "too long 3, bad row 1" in message
    assert "raise data.max_length" in message
    assert "rows.jsonl row 1: too long" in message
    assert "filtered.jsonl" in message
    path = rows.write_lines(tmp_path / "more.jsonl", [{"text": "fox"}, {"text": "no"}, {"a": 1}])
    with pytest.raises(ValueError, match=r"max_filtered_fraction=0\.3"):
        open_data(path, max_filtered_fraction=0.3)
    assert len(open_data(path, max_filtered_fraction=0.4)) == 2


def test_a_tokenizer_of_another_target_is_an_error(tmp_path, open_data):
    path = rows.write_lines(tmp_path / "rows.jsonl", rows.mixed(20))
    with pytest.raises(ValueError, match=r"outside the vocabulary 20.*not the target's"):
        open_data(path, vocab_size=30)


def test_rewritten_history_with_all_turns_asked_for_is_filtered(tmp_path, open_data):
    chats = [{"messages": chat} for chat in _chats(40)]
    path = rows.write_lines(tmp_path / "rows.jsonl", chats)
    turns = [sum(m["role"] == "assistant" for m in row["messages"]) for row in chats]
    automatic = open_data(path, "thinking")
    assert len(automatic) == 40
    settings = {"last_turn_only": False, "max_filtered_fraction": 0.9}
    explicit = open_data(path, "thinking", **settings)
    assert explicit.num_filtered == {"no exact mask": sum(n > 1 for n in turns)}


UNUSABLE = [
    ("missing.jsonl", None, "does not exist"),
    ("rows.csv", "a,b", r"unknown extension '\.csv'.*\.jsonl"),
    ("rows.jsonl", "", "has no rows"),
    ("rows.json", "[{]", "not a readable .json file.*line 1"),
    ("rows.json", '{"data": 5}', "must hold a JSON array"),
    ("rows.parquet", "PAR1", "not a readable .parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), UNUSABLE)
def test_unusable_files_are_errors_that_name_the_path(tmp_path, open_data, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_data(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "data.path" in str(caught.value)


def test_unusable_directories_and_columns_are_errors(tmp_path, open_data):
    import datasets

    with pytest.raises(ValueError, match=r"holds no data.*subdirectories"):
        open_data(tmp_path)
    table = datasets.Dataset.from_list([{"prompt": "x"}])
    table.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"no column named messages.*it has prompt"):
        open_data(tmp_path / "rows.parquet")
    datasets.DatasetDict({"dev": table, "test": table}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="splits dev, test and no train"):
        open_data(tmp_path / "splits")


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [("none", "no chat template"), ("unmaskable", "cannot be masked exactly")],
)
def test_chats_need_a_template_that_can_be_masked(tmp_path, open_data, tokenizer, message):
    path = rows.write_lines(tmp_path / "rows.jsonl", [{"messages": chat} for chat in _chats(2)])
    with pytest.raises(ValueError, match=message):
        open_data(path, tokenizer)
    texts = rows.write_lines(tmp_path / "texts.jsonl", [{"text": "hello"}] * 3)
    assert len(open_data(texts, tokenizer)) == 3


def test_errors_name_the_setting_that_the_data_came_from(tmp_path, tokenizer_dirs):
    def open_held_out(path):
        prepare(
            DataConfig(path=str(path), num_workers=1),
            tokenizer_path=tokenizer_dirs["chatml"],
            vocab_size=400,
            cache_dir=tmp_path,
            setting="data.held_out_path",
        )

    for path in (tmp_path / "none.jsonl", rows.write_lines(tmp_path / "bad.jsonl", [{"txt": 1}])):
        with pytest.raises(ValueError, match=rf"data\.held_out_path={path}"):
            open_held_out(path)
    broken = tmp_path / "rows.json"
    for content in ("[{]", '{"data": 5}'):
        broken.write_text(content)
        with pytest.raises(ValueError, match=rf"^{broken} \(of data\.held_out_path\) "):
            open_held_out(broken)


def test_a_missing_tokenizer_is_an_error_that_names_the_directory(tmp_path):
    path = rows.write_lines(tmp_path / "rows.jsonl", [{"text": "hello"}])
    with pytest.raises(ValueError, match=r"cannot load a tokenizer from .*nowhere"):
        prepare(
            DataConfig(path=str(path)),
            tokenizer_path=tmp_path / "nowhere",
            vocab_size=9,
            cache_dir=tmp_path,
        )


def test_a_million_samples_open_in_milliseconds(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 5, 1_400_000)
    offsets = np.concatenate([[0], lengths.cumsum()])
    offsets.tofile(tmp_path / "offsets.bin")
    num_tokens = int(offsets[-1])
    np.zeros(num_tokens, np.int32).tofile(tmp_path / "tokens.bin")
    np.full(-(-num_tokens // 8), 255, np.uint8).tofile(tmp_path / "mask.bin")
    lengths.tofile(tmp_path / "num_loss_tokens.bin")
    np.zeros(4, np.int64).tofile(tmp_path / "token_counts.bin")
    counts = {"num_samples": len(lengths), "num_tokens": num_tokens, "num_filtered": {}}
    manifest = {**counts, "num_loss_tokens": num_tokens, "vocab_size": 4}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    start = time.monotonic()
    dataset = Dataset(tmp_path, fingerprint="")
    dataset.batch(Cursor(0, 0, 0), range(1_399_000, 1_400_000))
    assert time.monotonic() - start < 0.5
    assert len(dataset) == 1_400_000


def test_every_reason_has_a_remedy():
    assert set(dataset_module.REMEDIES) == set(dataset_module.Reason)


def test_a_model_directory_without_a_tokenizer_is_named(tmp_path):
    """transformers makes an empty one for it."""
    from transformers import Qwen3Config

    Qwen3Config(vocab_size=99).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"there is no tokenizer in .*model; put the tokenizer\.json"
    ):
        load_tokenizer(tmp_path / "model")
