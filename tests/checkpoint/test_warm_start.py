"""Training that starts from an exported draft: other programs' names, whose vocabulary it gets."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from colospec.checkpoint.export import load_draft, load_weights
from colospec.checkpoint.warm_start import check_warm_start, start_from
from colospec.config import ExportFormat, InitVocab
from colospec.draft import registry
from colospec.draft.dflash.config import DFlashConfig
from colospec.draft.eagle3.config import Eagle3Config
from tests.checkpoint.exports import LAYERS, H, V, W, export, make_target


def counts_of(*token_ids):
    """Counts that choose these tokens before all others."""
    counts = np.zeros(V, np.int64)
    counts[list(token_ids)] = 100
    return counts


def make_draft(target, counts, **settings):
    config = Eagle3Config(**({"draft_vocab_size": W} | settings))
    return config, registry.build(config, target, token_counts=counts)


def random_counts():
    return np.random.default_rng().integers(1, 1000, V)


def label_rows(draft, offset):
    """Make every row of the head say its target token, plus `offset`."""
    ids = torch.arange(V) if draft.target_ids is None else draft.target_ids
    with torch.no_grad():
        draft.lm_head.weight[:] = ids[:, None].float() + offset


def rewrite(directory, change, more=()):
    """Rename the tensors of an export; None removes one; `more` are added."""
    file = directory / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(file).items()}
    tensors.pop(None, None)
    save_file(tensors | dict(more), file)


def start(draft, directory, target, vocab=InitVocab.keep, counts=None):
    token_counts = random_counts() if counts is None else counts
    start_from(draft, directory, target, vocab=vocab, token_counts=token_counts)


def assert_same(draft, other, but=()):
    for name, tensor in draft.state_dict().items():
        if name not in but:
            assert torch.equal(other.state_dict()[name], tensor), name


@pytest.mark.parametrize("form", ExportFormat)
def test_a_draft_starts_from_an_export_of_either_format(target, tmp_path, form):
    config, draft = make_draft(target, random_counts(), fc_norm=True)
    export(draft, config, target, tmp_path / "out", format=form, dtype=torch.float32)
    _, fresh = make_draft(target, random_counts(), fc_norm=True)
    start(fresh, tmp_path / "out", target)
    assert_same(draft, fresh)


NAMES = [
    ("midlayer.", "layers.0."),
    ("fc_norm.0.", "aux_norm_low."),
    ("fc_norm.1.", "aux_norm_mid."),
    ("fc_norm.2.", "aux_norm_high."),
]


@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_of_other_programs_and_the_targets_own_tensors_are_understood(
    target, tmp_path, caplog, prefix
):
    caplog.set_level(logging.INFO)
    config, draft = make_draft(target, random_counts(), fc_norm=True)
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)

    def theirs(name):
        for ours, other in NAMES:
            name = name.replace(ours, other)
        return name if name in ("lm_head.weight", "d2t", "t2d") else prefix + name

    rewrite(tmp_path / "out", theirs, {"embed_tokens.weight": target.load_embedding().bfloat16()})
    _, fresh = make_draft(target, random_counts(), fc_norm=True)

    start(fresh, tmp_path / "out", target)

    assert_same(draft, fresh)
    assert "left out, as the target's own: embed_tokens.weight" in caplog.text
    assert "trained" not in caplog.text


def test_an_embedding_that_is_not_the_targets_is_left_out_with_a_warning(target, tmp_path, caplog):
    config, draft = make_draft(target, random_counts())
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)
    rewrite(tmp_path / "out", str, {"embed_tokens.weight": torch.randn(V, H)})
    start(draft, tmp_path / "out", target)
    assert "embed_tokens.weight was trained on and is not the target's" in caplog.text
    assert torch.equal(draft.embedding, target.load_embedding())


def test_a_head_that_is_not_the_targets_is_left_out_with_a_warning(target, tmp_path, caplog):
    config = DFlashConfig(num_layers=1, block_size=4)
    draft = registry.build(config, target, token_counts=None)
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)
    rewrite(tmp_path / "out", str, {"lm_head.weight": target.load_head()})
    start(draft, tmp_path / "out", target)
    assert "trained" not in caplog.text
    rewrite(tmp_path / "out", str, {"lm_head.weight": torch.randn(V, H)})
    start(draft, tmp_path / "out", target)
    assert "lm_head.weight was trained on and is not the target's" in caplog.text


def test_missing_and_unexpected_tensors_are_listed(target, tmp_path):
    config, draft = make_draft(target, random_counts())
    export(draft, config, target, tmp_path / "out")
    rewrite(tmp_path / "out", lambda name: name.replace("hidden_norm", "other_norm"))
    with pytest.raises(
        ValueError,
        match=r"missing: midlayer\.hidden_norm\.weight; unexpected: midlayer\.other_norm\.weight",
    ):
        start(draft, tmp_path / "out", target)


@pytest.mark.parametrize("contents", ["eagle_config", "eagle_aux_hidden_state_layer_ids"])
def test_layer_ids_mean_the_same_wherever_they_stand(target, tmp_path, contents):
    config, draft = make_draft(target, random_counts(), aux_layer_ids=[0, 2, 5])
    export(draft, config, target, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    known = json.loads(file.read_text())
    for key in {"eagle_config", "eagle_aux_hidden_state_layer_ids"} - {contents}:
        del known[key]
    file.write_text(json.dumps(known))
    check_warm_start(config, tmp_path / "out", target)
    assert load_draft(tmp_path / "out", target).config.aux_layer_ids == [0, 2, 5]


def test_a_config_without_layer_ids_means_the_default_of_engines(target, tmp_path):
    # SGLang and vLLM read the inputs of layers 2, L // 2 and L - 3.
    config, draft = make_draft(target, random_counts(), aux_layer_ids=[1, LAYERS // 2 - 1, 4])
    export(draft, config, target, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    known = json.loads(file.read_text())
    del known["eagle_config"], known["eagle_aux_hidden_state_layer_ids"]
    file.write_text(json.dumps(known))
    check_warm_start(config, tmp_path / "out", target)


# --- the rotary embedding

DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}
ROPES = [DEFAULT, LLAMA3, YARN, DEFAULT | {"partial_rotary_factor": 0.67}]
OTHERS = [
    *ROPES,
    DEFAULT | {"rope_theta": 1e6},
    LLAMA3 | {"factor": 32.0},
    YARN | {"attention_factor": 1.5},
]


def spell(rope, spelling):
    """The fields of config.json by which one of the generations of transformers says `rope`."""
    if spelling == "new":
        return {"rope_parameters": rope}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    share = scaling.pop("partial_rotary_factor", None)
    if spelling == "type":
        scaling["type"] = scaling.pop("rope_type")
    fields = {
        "rope_theta": int(rope["rope_theta"]),
        "rope_scaling": None if len(scaling) == 1 else scaling,
    }
    return fields | ({"partial_rotary_factor": share} if share else {})


def respell(directory, fields):
    """Let an export say these fields of rope and no others."""
    file = directory / "config.json"
    contents = json.loads(file.read_text())
    layer = contents.get("transformer_layer_config", contents)
    for key in ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"):
        layer.pop(key, None)
    layer.update(fields)
    file.write_text(json.dumps(contents))


def exported(target, directory, kind, form):
    if kind == "dflash":
        config = DFlashConfig(num_layers=1, block_size=4)
        draft = registry.build(config, target, token_counts=None)
    else:
        config, draft = make_draft(target, random_counts())
    export(draft, config, target, directory, format=form)
    return config


@pytest.mark.parametrize("spelling", ["old", "type", "new"])
@pytest.mark.parametrize("form", ExportFormat)
@pytest.mark.parametrize("kind", ["eagle3", "dflash"])
def test_a_draft_rotates_like_its_target_in_whatever_spelling(tmp_path, kind, form, spelling):
    for number, rope in enumerate(ROPES):
        target = make_target(tmp_path / f"target{number}", rope_parameters=rope)
        out = tmp_path / f"out{number}"
        config = exported(target, out, kind, form)
        check_warm_start(config, out, target)
        respell(out, spell(rope, spelling))
        check_warm_start(config, out, target)


@pytest.mark.parametrize("spelling", ["old", "type", "new"])
@pytest.mark.parametrize("form", ExportFormat)
@pytest.mark.parametrize("kind", ["eagle3", "dflash"])
def test_a_draft_that_rotates_otherwise_is_refused(tmp_path, kind, form, spelling):
    for number, rope in enumerate(ROPES):
        target = make_target(tmp_path / f"target{number}", rope_parameters=rope)
        out = tmp_path / f"out{number}"
        config = exported(target, out, kind, form)
        for other in (one for one in OTHERS if one != rope):
            respell(out, spell(other, spelling))
            with pytest.raises(ValueError, match=r"is for another target than .*: rope ") as error:
                check_warm_start(config, out, target)
            theirs, ours = str(error.value).split(", expected ")
            for said, meant in ((theirs, other), (ours, rope)):
                assert f"'rope_type': '{meant['rope_type']}'" in said
                assert f"'rope_theta': {float(meant['rope_theta'])}" in said
                for key in ("factor", "attention_factor", "partial_rotary_factor"):
                    assert (f"'{key}': {meant.get(key)}" in said) == (key in meant)


@pytest.mark.parametrize("form", ExportFormat)
def test_a_draft_that_says_nothing_of_its_rotation_is_taken_for_the_targets(tmp_path, form):
    target = make_target(tmp_path / "target", rope_parameters=LLAMA3)
    config = exported(target, tmp_path / "out", "eagle3", form)
    for fields in ({}, {"rope_scaling": None}, {"rope_theta": None, "rope_parameters": None}):
        respell(tmp_path / "out", fields)
        check_warm_start(config, tmp_path / "out", target)
    # A base without scaling is the unscaled form to every engine.
    respell(tmp_path / "out", {"rope_theta": 5e5})
    with pytest.raises(ValueError, match=r"rope \{'rope_type': 'default'.*expected .*llama3"):
        check_warm_start(config, tmp_path / "out", target)


def test_a_form_of_rotation_that_is_unknown_here_is_refused_by_its_name(target, tmp_path):
    config = exported(target, tmp_path / "out", "eagle3", ExportFormat.sglang)
    respell(tmp_path / "out", {"rope_scaling": {"rope_type": "longrope"}})
    with pytest.raises(ValueError, match=r"out/config.json cannot be read .*rope_type=longrope"):
        check_warm_start(config, tmp_path / "out", target)


def test_the_draft_of_a_target_with_several_kinds_of_layers_is_its_own(tmp_path):
    rope = {"full_attention": DEFAULT, "sliding_attention": DEFAULT | {"rope_theta": 1e4}}
    target = make_target(tmp_path / "target", rope_parameters=rope)
    config = exported(target, tmp_path / "out", "eagle3", ExportFormat.sglang)
    check_warm_start(config, tmp_path / "out", target)


# --- the vocabulary


def test_keep_takes_the_drafts_own_vocabulary_and_says_what_it_covers(target, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config, draft = make_draft(target, counts_of(*range(10, 10 + W)))
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)
    _, fresh = make_draft(target, random_counts())
    # A quarter of the supervised tokens is outside.
    counts = counts_of(1, 12, 14, 16)
    start(fresh, tmp_path / "out", target, counts=counts)
    assert_same(draft, fresh)
    assert "kept its vocabulary of 20 tokens, 75.00% of the supervised tokens" in caplog.text
    assert "trainer.init_vocab=rebuild would give 100.00%" in caplog.text


@pytest.mark.parametrize("form", ExportFormat)
def test_rebuild_moves_rows_to_their_tokens_and_starts_new_ones_from_the_target(
    target, tmp_path, form
):
    config, draft = make_draft(target, counts_of(*range(0, 2 * W, 2)))
    label_rows(draft, 1000)
    export(draft, config, target, tmp_path / "out", format=form, dtype=torch.float32)
    _, fresh = make_draft(target, counts_of(*range(15, 15 + W)))

    start(fresh, tmp_path / "out", target, InitVocab.rebuild)

    assert fresh.target_ids.tolist() == list(range(15, 15 + W))
    head = target.load_head()
    for row, token in zip(fresh.lm_head.weight, range(15, 15 + W), strict=True):
        known = token % 2 == 0 and token < 2 * W
        assert torch.equal(row, torch.full((H,), 1000.0 + token) if known else head[token])
    assert_same(draft, fresh, but=("lm_head.weight", "d2t", "t2d"))


@pytest.mark.parametrize(("there", "here"), [(W, 30), (30, W), (W, None), (None, W)])
def test_rebuild_changes_the_size_of_the_vocabulary(target, tmp_path, there, here):
    config, draft = make_draft(target, random_counts(), draft_vocab_size=there)
    label_rows(draft, 1000)
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)
    _, fresh = make_draft(target, random_counts(), draft_vocab_size=here)
    with pytest.raises(ValueError, match=r"proposes \d+ tokens.*trainer\.init_vocab=rebuild"):
        start(fresh, tmp_path / "out", target)

    start(fresh, tmp_path / "out", target, InitVocab.rebuild)

    known = set(range(V)) if there is None else set(draft.target_ids.tolist())
    ids = list(range(V)) if here is None else fresh.target_ids.tolist()
    head = target.load_head()
    for row, token in zip(fresh.lm_head.weight, ids, strict=True):
        assert torch.equal(row, torch.full((H,), 1000.0 + token) if token in known else head[token])


def test_a_file_without_t2d_gets_it_from_d2t(target, tmp_path):
    config, draft = make_draft(target, random_counts())
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)
    rewrite(tmp_path / "out", lambda name: None if name == "t2d" else name)
    _, fresh = make_draft(target, random_counts())
    load_weights(fresh, tmp_path / "out")
    assert_same(draft, fresh)


def test_a_d2t_of_token_ids_is_understood_where_t2d_shows_it(target, tmp_path):
    config, draft = make_draft(target, random_counts())
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)
    assert not torch.equal(draft.target_ids, draft.d2t)
    rewrite(tmp_path / "out", str, {"d2t": draft.target_ids})
    _, fresh = make_draft(target, random_counts())
    load_weights(fresh, tmp_path / "out")
    assert_same(draft, fresh)


@pytest.mark.parametrize("shift", [-1, V])
def test_a_d2t_that_leads_outside_the_vocabulary_is_refused(target, tmp_path, shift):
    config, draft = make_draft(target, counts_of(*range(W)))
    export(draft, config, target, tmp_path / "out")
    rewrite(tmp_path / "out", lambda name: None if name == "t2d" else name)
    rewrite(tmp_path / "out", str, {"d2t": draft.d2t + shift})
    with pytest.raises(ValueError, match=r"d2t leads outside the target's 50 tokens"):
        load_weights(draft, tmp_path / "out")


def test_a_whole_vocabulary_without_a_head_has_the_targets(target, tmp_path):
    config, draft = make_draft(target, None, draft_vocab_size=None)
    label_rows(draft, 1000)
    export(draft, config, target, tmp_path / "out", dtype=torch.float32)
    rewrite(tmp_path / "out", lambda name: None if name == "lm_head.weight" else name)
    loaded = load_draft(tmp_path / "out", target)
    assert torch.equal(loaded.lm_head.weight, target.load_head())
    assert_same(draft, loaded, but=("lm_head.weight",))


def test_a_pruned_vocabulary_without_a_head_is_refused(target, tmp_path):
    config, draft = make_draft(target, random_counts())
    export(draft, config, target, tmp_path / "out")
    rewrite(tmp_path / "out", lambda name: None if name == "lm_head.weight" else name)
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        load_draft(tmp_path / "out", target)


def test_a_warm_start_from_a_draft_with_other_inputs_is_refused(target, tmp_path):
    config, draft = make_draft(target, random_counts())
    export(draft, config, target, tmp_path / "out")
    check_warm_start(config, tmp_path / "out", target)
    with pytest.raises(ValueError, match=r"trainer\.init_from=.*draft\.norm_output: False -> True"):
        check_warm_start(replace(config, norm_output=True), tmp_path / "out", target)
