"""Exported DSpark drafts: public names and keys, round trips, the other place of the settings."""

import json

import pytest
import torch
from safetensors.torch import load_file

from colospec.batch import Cursor, FeatureBatch, Features, TokenBatch
from colospec.checkpoint.export import load_draft
from colospec.checkpoint.warm_start import check_warm_start
from colospec.draft import registry
from colospec.draft.base import StepContext
from colospec.draft.dflash.config import DFlashConfig
from colospec.draft.dspark.config import DSparkConfig, MarkovHeadType
from tests.checkpoint.exports import H, V, export
from tests.checkpoint.test_dflash_export import GOLDEN as BACKBONE

R = 6
NESTED = (
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "target_layer_ids",
    "mask_token_id",
)
GOLDEN = {
    "vanilla": {},
    "gated": {"gate_proj.weight": [R, H + R], "gate_proj.bias": [R]},
    "rnn": {"joint_proj.weight": [3 * R, 2 * R + H], "joint_proj.bias": [3 * R]},
}


def make_draft(target, **settings):
    values = {"num_layers": 2, "block_size": 5, "num_anchors": 9, "markov_rank": R}
    config = DSparkConfig(**(values | settings))
    return config, registry.build(config, target, token_counts=None)


def rewrite(directory, change):
    file = directory / "config.json"
    contents = json.loads(file.read_text())
    change(contents)
    file.write_text(json.dumps(contents))


@pytest.mark.parametrize("with_markov", [True, False])
@pytest.mark.parametrize("kind", MarkovHeadType, ids=lambda kind: kind.value)
def test_names_shapes_and_dtypes_are_the_public_ones(target, tmp_path, kind, with_markov):
    config, draft = make_draft(
        target, markov_head_type=kind, confidence_head_with_markov=with_markov
    )
    export(draft, config, target, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        **BACKBONE,
        "markov_head.markov_w1.weight": [V, R],
        "markov_head.markov_w2.weight": [V, R],
        **{f"markov_head.{name}": shape for name, shape in GOLDEN[kind.value].items()},
        "confidence_head.proj.weight": [1, H + R if with_markov else H],
        "confidence_head.proj.bias": [1],
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_config_says_at_the_top_level_what_sglang_reads(target, tmp_path):
    config, draft = make_draft(target, mask_token_id=3, enable_confidence_head=False)
    export(draft, config, target, tmp_path / "out")
    contents = json.loads((tmp_path / "out" / "config.json").read_text())
    assert contents["architectures"] == ["Qwen3DSparkModel"]
    assert contents["model_type"] == "qwen3"
    expected = {
        "block_size": 5,
        "markov_rank": R,
        "markov_head_type": "vanilla",
        "enable_confidence_head": False,
        "confidence_head_with_markov": True,
        "mask_token_id": 3,
        "target_layer_ids": contents["dflash_config"]["target_layer_ids"],
        "num_hidden_layers": 2,
    }
    assert {key: contents[key] for key in expected} == expected
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.startswith("confidence_head") for name in names)


@pytest.mark.parametrize("kind", MarkovHeadType, ids=lambda kind: kind.value)
def test_a_loaded_draft_computes_the_same_loss(target, tmp_path, kind):
    config, draft = make_draft(target, markov_head_type=kind)
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)

    loaded = load_draft(tmp_path / "out", target)

    ids = torch.randint(V, (30,))
    tokens = TokenBatch.pack(Cursor(0, 0, 0), [0], [ids], [torch.ones(30, dtype=torch.bool)])
    batch = FeatureBatch(tokens, Features(torch.randn(30, 5 * H), torch.randn(30, H)))
    losses = []
    for model in (draft, loaded):
        model.config.num_anchors = 100
        context = StepContext(0, 1, 30, torch.Generator().manual_seed(1))
        losses.append(model(batch, context).loss.item())
    assert losses[0] == losses[1] > 0


def test_settings_below_dflash_config_are_understood(target, tmp_path):
    config, draft = make_draft(target, markov_head_type=MarkovHeadType.gated)
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)

    def nest(contents):
        inner = contents["dflash_config"] | {"projector_type": "dspark"}
        for key in NESTED:
            inner[key] = contents.pop(key)
        contents |= {"architectures": ["DSparkDraftModel"], "dflash_config": inner}

    rewrite(tmp_path / "out", nest)
    loaded = load_draft(tmp_path / "out", target)
    assert loaded.config.markov_head_type is MarkovHeadType.gated
    for name, tensor in draft.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_an_unknown_head_is_refused_by_name(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    rewrite(tmp_path / "out", lambda contents: contents.update(markov_head_type="lstm"))
    with pytest.raises(ValueError, match="lstm"):
        load_draft(tmp_path / "out", target)


def test_a_warm_start_of_dflash_is_refused(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    check_warm_start(config, tmp_path / "out", target)
    with pytest.raises(ValueError, match=r"a draft of draft=dspark, not dflash"):
        check_warm_start(DFlashConfig(num_layers=2), tmp_path / "out", target)


def test_the_card_names_the_heads_and_the_serve_command(target, tmp_path):
    config, draft = make_draft(target)
    export(draft, config, target, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# DSpark draft model for target-model" in card
    assert "--speculative-algorithm DSPARK --speculative-draft-model-path DRAFT" in card
    assert "| Markov head | vanilla, rank 6 |" in card
    assert "--speculative-dspark-block-size 5" in card


def test_sglang_is_told_to_verify_whole_blocks(target):
    config, draft = make_draft(target)
    assert draft.public.sglang_arguments(config, 5) == {
        "speculative_algorithm": "DSPARK",
        "speculative_dspark_block_size": 5,
        "speculative_num_draft_tokens": 6,
    }
    with pytest.raises(ValueError, match="--chain-length 5, not 4"):
        draft.public.sglang_arguments(config, 4)
