"""Exported drafts: public names, bit-identical round trips, damaged and foreign files."""

import json
import logging
import os
import resource
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from colospec.batch import Cursor, FeatureBatch, Features, TokenBatch
from colospec.checkpoint.dcp import Checkpointer
from colospec.checkpoint.export import export_draft, load_draft, load_weights, main
from colospec.checkpoint.warm_start import check_warm_start
from colospec.draft import registry
from colospec.draft.base import StepContext
from colospec.draft.eagle3.config import Eagle3Config
from colospec.target import Target
from colospec.train.provenance import plain
from tests.ranks import RankError, run_ranks

H, HEADS, KV_HEADS, HEAD_DIM, MLP, V, W, LAYERS = 16, 4, 2, 6, 24, 50, 20, 8

# The public tensors of an EAGLE-3 draft with 3 aux layers, spelled out.
GOLDEN = {
    "fc.weight": [H, 3 * H],
    "midlayer.hidden_norm.weight": [H],
    "midlayer.input_layernorm.weight": [H],
    "midlayer.post_attention_layernorm.weight": [H],
    "midlayer.self_attn.q_proj.weight": [HEADS * HEAD_DIM, 2 * H],
    "midlayer.self_attn.k_proj.weight": [KV_HEADS * HEAD_DIM, 2 * H],
    "midlayer.self_attn.v_proj.weight": [KV_HEADS * HEAD_DIM, 2 * H],
    "midlayer.self_attn.o_proj.weight": [H, HEADS * HEAD_DIM],
    "midlayer.mlp.gate_proj.weight": [MLP, H],
    "midlayer.mlp.up_proj.weight": [MLP, H],
    "midlayer.mlp.down_proj.weight": [H, MLP],
    "norm.weight": [H],
    "lm_head.weight": [W, H],
    "t2d": [V],
    "d2t": [W],
}


def make_target(directory, **changes):
    directory.mkdir(exist_ok=True)
    config = {
        "model_type": "qwen3",
        "hidden_size": H,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": MLP,
        "vocab_size": V,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    } | changes
    (directory / "config.json").write_text(json.dumps(config))
    vocab = config["vocab_size"]
    weights = {
        "model.embed_tokens.weight": torch.randn(vocab, config["hidden_size"]),
        "lm_head.weight": torch.randn(vocab, config["hidden_size"]),
    }
    save_file(weights, directory / "model.safetensors")
    return Target.load(directory)


@pytest.fixture
def target(tmp_path):
    return make_target(tmp_path / "target-model")


def make_draft(target, **settings):
    config = Eagle3Config(**({"draft_vocab_size": W} | settings))
    counts = np.random.default_rng().integers(0, 1000, V)
    return config, registry.build(config, target, token_counts=counts)


def export(draft, config, target, directory, **options):
    facts = {"steps": 7, "data_fingerprint": "f00d|x", "metrics": {"train/loss": 1.25}}
    export_draft(
        draft.state_dict(), directory, config=config, target=target, facts=facts, **options
    )


def test_names_shapes_and_dtypes_are_the_public_ones(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == GOLDEN
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    assert (kinds.pop("t2d"), kinds.pop("d2t")) == (torch.bool, torch.int64)
    assert set(kinds.values()) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "gone", "more"),
    [
        ({"draft_vocab_size": None}, {"t2d", "d2t"}, set()),
        ({"fc_norm": True}, set(), {f"fc_norm.{i}.weight" for i in range(3)}),
        ({"aux_layer_ids": [0, 2, 3, 5], "fc_norm": True}, set(), {"fc_norm.3.weight"}),
    ],
)
def test_options_add_and_remove_tensors(target, tmp_path, settings, gone, more):
    config, draft = make_draft(target, **settings)
    export(draft, config, target, tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert gone.isdisjoint(names)
    assert more <= names
    assert set(GOLDEN) - gone <= names


def test_engines_read_the_right_rows_of_a_pruned_vocabulary(target, tmp_path):
    config, draft = make_draft(target)
    # Every row of the head says which target token it stands for.
    with torch.no_grad():
        draft.lm_head.weight[:] = draft.target_ids[:, None].float()
    export(draft, config, target, tmp_path / "out")

    tensors = load_file(tmp_path / "out" / "model.safetensors")

    hot_token_ids = tensors["d2t"] + torch.arange(W)
    assert len(set(tensors["d2t"].tolist())) > 2
    assert torch.equal(tensors["lm_head.weight"][:, 0].long(), hot_token_ids)
    assert torch.equal(tensors["t2d"].nonzero().flatten(), hot_token_ids)


@pytest.mark.parametrize("settings", [{}, {"draft_vocab_size": None}, {"fc_norm": True}])
def test_a_loaded_draft_computes_the_same_loss(target, tmp_path, settings):
    config, draft = make_draft(target, ttt_length=3, norm_output=True, **settings)
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)

    loaded = load_draft(tmp_path / "out", target)

    ids = torch.randint(V, (12,))
    tokens = TokenBatch.pack(Cursor(0, 0, 0), [0], [ids], [torch.ones(12, dtype=torch.bool)])
    batch = FeatureBatch(tokens, Features(torch.randn(12, 3 * H), torch.randn(12, H)))
    context = StepContext(step=0, total_steps=1, num_loss_tokens=12)
    assert loaded(batch, context).loss.item() == draft(batch, context).loss.item()
    for name, tensor in draft.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_weights_of_an_export_replace_those_of_a_new_draft_with_its_vocabulary(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out", dtype=torch.float16)
    _, fresh = make_draft(target)
    load_weights(fresh, tmp_path / "out")
    assert torch.equal(fresh.d2t, draft.d2t)
    assert torch.equal(fresh.fc.weight, draft.fc.weight.half().float())


def test_config_says_what_sglang_vllm_and_transformers_read(tmp_path):
    scaling = {"rope_type": "linear", "factor": 2.0}
    target = make_target(tmp_path / "t", rope_parameters=None, rope_theta=2e4, rope_scaling=scaling)
    config, draft = make_draft(target, aux_layer_ids=[1, 3, 5], norm_output=True, ttt_length=4)
    export(draft, config, target, tmp_path / "out")
    contents = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": H,
        "target_hidden_size": H,
        "intermediate_size": MLP,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_theta": 2e4,
        "rope_scaling": scaling,
        "vocab_size": V,
        "draft_vocab_size": W,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "dtype": "bfloat16",
        "norm_output": True,
        "fc_norm": False,
        # SGLang: outputs of layers 1, 3, 5 from 0; vLLM: inputs of layers 2, 4, 6.
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
            "use_aux_hidden_state": True,
        },
        "eagle_aux_hidden_state_layer_ids": [2, 4, 6],
    }
    assert {key: contents[key] for key in expected} == expected
    assert contents["colospec"]["ttt_length"] == 4
    assert None not in (contents["rope_theta"], contents["rope_scaling"])
    parsed = LlamaConfig.from_pretrained(tmp_path / "out")
    assert parsed.rope_parameters["rope_theta"] == 2e4
    assert parsed.rope_parameters["factor"] == 2.0
    assert (parsed.head_dim, parsed.hidden_size) == (HEAD_DIM, H)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": None, "rope_theta": 3e4}, 3e4, None),
        ({"rope_parameters": None}, 1e4, None),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5, LLAMA3),
        ({"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, LLAMA3),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            1e6,
            None,
        ),
    ],
)
def test_rope_is_the_targets_in_old_and_new_spelling(tmp_path, rope, theta, scaling):
    target = make_target(tmp_path / "t", **rope)
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    contents = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (contents["rope_theta"], contents["rope_scaling"]) == (theta, scaling)
    parsed = LlamaConfig.from_pretrained(tmp_path / "out").rope_parameters
    expected = (scaling or {"rope_type": "default"}) | {"rope_theta": theta}
    assert {key: parsed[key] for key in expected} == expected


def test_the_card_names_target_data_metrics_and_serve_commands(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "target-model" in card
    assert str(tmp_path) not in card
    assert "| steps | 7 |" in card
    assert "| data fingerprint | f00d/x |" in card
    assert "| metrics: train/loss | 1.25 |" in card
    assert "--speculative-algorithm EAGLE3 --speculative-draft-model-path DRAFT" in card
    assert "--speculative-num-steps 3 --speculative-eagle-topk 1" in card
    assert '{"method": "eagle3", "model": "DRAFT", "num_speculative_tokens": 3}' in card


def break_missing(state):
    del state["norm.weight"]


def break_unexpected(state):
    state["embed_tokens.weight"] = torch.ones(V, H)


def break_shape(state):
    state["fc.weight"] = state["fc.weight"][:, :-1]


def break_dtype(state):
    state["d2t"] = state["d2t"].to(torch.int32)


def break_nan(state):
    state["norm.weight"] = state["norm.weight"] * float("nan")


def break_overflow(state):
    state["norm.weight"] = state["norm.weight"] * 1e39


def break_mapping(state):
    state["d2t"] = state["d2t"] + torch.arange(W)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (break_missing, "missing: norm.weight"),
        (break_unexpected, "unexpected: embed_tokens.weight"),
        (break_shape, r"fc.weight has shape \[16, 47\], expected \[16, 48\]"),
        (break_dtype, "d2t has dtype int32, expected int64"),
        (break_nan, "norm.weight has NaN or Inf in torch.bfloat16"),
        (break_overflow, "norm.weight has NaN or Inf in torch.bfloat16"),
        (break_mapping, "d2t and t2d disagree"),
    ],
)
def test_a_wrong_state_is_refused_and_the_export_before_it_stays(
    target, tmp_path, fault, complaint
):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    state = draft.state_dict()
    fault(state)
    with pytest.raises(ValueError, match=complaint):
        export_draft(state, tmp_path / "out", config=config, target=target, facts={})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "out.tmp").exists()


def test_an_export_is_replaced_whole(target, tmp_path):
    for _ in range(2):
        config, draft = make_draft(target)
        export(draft, config, target, tmp_path / "out", dtype=torch.float32)
        assert torch.equal(
            load_file(tmp_path / "out" / "model.safetensors")["fc.weight"], draft.fc.weight
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "target-model"]


def test_a_directory_that_is_no_export_is_not_replaced(target, tmp_path):
    config, draft = make_draft(target)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    for directory in (tmp_path / "home", target.path):
        with pytest.raises(ValueError, match="not a draft that colospec exported"):
            export(draft, config, target, directory)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "precious"


def export_and_die(_rank, directory, when):
    target = Target.load(directory / "target-model")
    config, draft = make_draft(target)
    import colospec.checkpoint.export as module

    def die(*_args, **_options):
        os.kill(os.getpid(), 9)

    setattr(module, when, die)
    export(draft, config, target, directory / "out")


@pytest.mark.parametrize("when", ["save_file", "publish"])
@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_export_leaves_no_half_directory(target, tmp_path, when, exists):
    config, draft = make_draft(target)
    if exists:
        export(draft, config, target, tmp_path / "out")
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(export_and_die, 1, tmp_path, when)
    assert (tmp_path / "out").exists() == exists
    if exists:
        load_draft(tmp_path / "out", target)
    export(draft, config, target, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "target-model"]


def export_to_a_full_disk(_rank, directory):
    target = Target.load(directory / "target-model")
    config, draft = make_draft(target)
    export(draft, config, target, directory / "out")
    before = (directory / "out" / "model.safetensors").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    with pytest.raises(RuntimeError, match=r"not exported to \S+/out: .* are free on that disk"):
        export(draft, config, target, directory / "out")
    assert (directory / "out" / "model.safetensors").read_bytes() == before
    assert not (directory / "out.tmp").exists()


def test_a_full_disk_leaves_the_export_before_it(target, tmp_path):
    run_ranks(export_to_a_full_disk, 1, tmp_path)
    load_draft(tmp_path / "out", target)


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


def test_a_draft_that_reads_the_last_layer_is_exported_with_a_warning(target, tmp_path, caplog):
    config, draft = make_draft(target, aux_layer_ids=[1, 3, LAYERS - 1])
    export(draft, config, target, tmp_path / "out")
    assert "which SGLang does not capture" in caplog.text


def save_checkpoint(target, config, draft, directory, form="sglang"):
    checkpointer = Checkpointer(
        directory, group=None, rank=0, world_size=1, keep=1, best_metric="train/loss", limit_s=60
    )
    meta = {
        "run": {
            "draft": plain(config),
            "target": {"dtype": "auto"},
            "export": {"format": form, "dtype": "float16"},
        },
        "target": str(target.path),
        "facts": {"data_fingerprint": "f00d"},
    }
    state = {"model": draft.state_dict(), "optimizer": {"state": {"x": torch.ones(2)}}}
    checkpointer.save(9, state, meta, metrics={"train/loss": 0.5})
    checkpointer.wait()
    return directory / "step-000009"


def test_the_command_line_exports_a_checkpoint(target, tmp_path):
    config, draft = make_draft(target, ttt_length=5)
    checkpoint = save_checkpoint(target, config, draft, tmp_path / "run")
    command = [sys.executable, "-m", "colospec.checkpoint.export", checkpoint, tmp_path / "out"]
    done = subprocess.run(
        [*command, "--dtype", "float32"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "step 9 exported to" in done.stderr
    loaded = load_draft(tmp_path / "out", target)
    assert loaded.config.ttt_length == 5
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in draft.state_dict().items())
    assert "| step | 9 |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "layer", "dtype"),
    [
        ((), "layers.0", torch.float16),
        (("--format", "sglang", "--dtype", "bfloat16"), "midlayer", torch.bfloat16),
    ],
)
def test_the_command_line_takes_format_and_dtype_from_the_run_or_from_its_options(
    target, tmp_path, options, layer, dtype
):
    config, draft = make_draft(target)
    checkpoint = save_checkpoint(target, config, draft, tmp_path / "run", "speculators")
    main([str(checkpoint), str(tmp_path / "out"), *options])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors[f"{layer}.self_attn.q_proj.weight"].dtype == dtype


def test_the_command_line_refuses_what_is_no_checkpoint_in_one_line(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(SystemExit, match=r"error: \S+ is not a whole checkpoint .*manifest.json"):
        main([str(tmp_path), str(tmp_path / "out")])


def test_a_warm_start_from_a_draft_with_other_inputs_is_refused(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    check_warm_start(config, tmp_path / "out", target)
    with pytest.raises(ValueError, match=r"trainer\.init_from=.*draft\.norm_output: False -> True"):
        check_warm_start(replace(config, norm_output=True), tmp_path / "out", target)
