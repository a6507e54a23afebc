"""Loading an export that is damaged, hostile, or of another target."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from colospec.checkpoint.export import load_draft
from tests.checkpoint.exports import export, make_draft, make_target


def header(text, data=b""):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw + data


def one_tensor(**facts):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | facts
    return json.dumps({"norm.weight": entry})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 99_999_999) + b"{}",
        header("{" * 100),
        header('{"a":' * 10_000),
        header(one_tensor(data_offsets=[0, 2**62]), bytes(8)),
        header(one_tensor(shape=[2**40], data_offsets=[0, 2**42]), bytes(8)),
        header(one_tensor(dtype="PICKLE"), bytes(8)),
        header(
            '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            '"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
            bytes(12),
        ),
    ],
    ids=["empty", "huge", "past the end", "json", "deep", "offsets", "bomb", "dtype", "overlap"],
)
def test_a_hostile_safetensors_file_is_an_error_that_names_it(target, tmp_path, data):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"out/model.safetensors is not a whole safetensors file"):
        load_draft(tmp_path / "out", target)


def test_random_damage_never_crashes(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    good = file.read_bytes()
    length = 8 + struct.unpack("<Q", good[:8])[0]
    generator = np.random.default_rng()
    for _ in range(100):
        data = bytearray(good)
        for position in generator.integers(0, length, 3):
            data[position] = generator.integers(256)
        file.write_bytes(data[: generator.integers(length, len(data) + 1)])
        try:
            load_draft(tmp_path / "out", target)
        except ValueError as error:
            assert "model.safetensors" in str(error)  # noqa: PT017


def test_a_file_with_integer_weights_is_refused(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"fc.weight": tensors["fc.weight"].to(torch.int8)}, file)
    with pytest.raises(ValueError, match=r"fc.weight has dtype I8, expected float32 or bfloat16"):
        load_draft(tmp_path / "out", target)


def test_a_draft_of_another_target_is_refused_with_the_differences(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    other = make_target(tmp_path / "other", vocab_size=60, num_key_value_heads=4)
    with pytest.raises(
        ValueError, match=r"vocab_size 50, expected 60; num_key_value_heads 2, expected 4"
    ):
        load_draft(tmp_path / "out", other)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{", "cannot be read"), ("[]", "cannot be read"), ("{}", "architectures=None, expected")],
)
def test_a_garbled_config_is_an_error_that_names_it(target, tmp_path, text, complaint):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"out/config.json .*{complaint}"):
        load_draft(tmp_path / "out", target)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ("manifest.json", r"is a checkpoint: .*checkpoint\.export .* out_dir`, and give out_dir"),
        ("export/config.json", "is a run directory: give .*export"),
        ("notes.txt", r"no config\.json in it$"),
    ],
)
def test_another_directory_of_a_run_is_recognised(target, tmp_path, made, says):
    (tmp_path / made).parent.mkdir(exist_ok=True)
    (tmp_path / made).write_text("{}")
    with pytest.raises(ValueError, match=rf"is no exported draft: .*{says}"):
        load_draft(tmp_path, target)
