"""Exports in speculators' own hands: its classes load them, compute what we compute, and save."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from colospec.checkpoint.export import load_draft
from colospec.draft.base import ChainDraft
from colospec.draft.kv_cache import KVCache
from tests.checkpoint.exports import H, V, export, make_target
from tests.checkpoint.test_speculators_export import MAKERS, SPECULATORS
from tests.ranks import run_ranks


def load_in_speculators(_rank, directory, inputs):
    """Load exports by speculators' own classes, run their layers, save by its own code."""
    if importlib.util.find_spec("hs_connectors") is None:
        # Transports of its data pipeline, imported with the models.
        stub = ModuleType("hs_connectors")
        stub.__getattr__ = lambda _name: object
        sys.modules["hs_connectors"] = stub
    from speculators.config import SpeculatorModelConfig
    from speculators.model import SpeculatorModel

    found = {}
    for name in RUNS:
        config = SpeculatorModelConfig.from_pretrained(str(directory / name))
        config.transformer_layer_config._attn_implementation = "eager"
        model = SpeculatorModel.from_pretrained(str(directory / name), config=config)
        # It takes the target's embedding only where its own is NaN, but transformers 5 has put
        # uninitialized memory there.
        model._load_verifier_weights(overwrite_embed_tokens=True)
        empty = [name for name, p in model.state_dict().items() if p.isnan().any()]
        model.save_pretrained(str(directory / f"{name}-theirs"))
        with torch.no_grad():
            run = block_in_speculators if name.startswith("d") else chain_in_speculators
            logits = run(model, *inputs).numpy()
        found[name] = type(model).__name__, empty, logits
    return found


def chain_in_speculators(model, ids, aux, _tokens):
    """With masks behind the tokens, if the draft has them."""
    if hasattr(model, "mask_hidden"):
        ids = torch.cat([ids, torch.full((4,), model.config.mask_token_id)])
        aux = torch.cat([aux, model.mask_hidden.view(1, -1).expand(4, -1)])
    states = torch.cat([model.embed_tokens(ids), model.fc(aux)], dim=-1)[None]
    positions = torch.arange(len(ids))[None]
    mask = torch.full((1, 1, len(ids), len(ids)), float("-inf")).triu(1)
    table = model.rotary_emb(states, positions)
    for layer in model.layers:
        states = layer(states, attention_mask=mask, position_embeddings=table)
    return model.lm_head(model.norm(states[0]))


def block_in_speculators(model, ids, aux, tokens):
    context = model.hidden_norm(model.fc(aux))[None]
    block = torch.full((5,), model.mask_token_id)
    block[0] = tokens[0]
    states = model.embed_tokens(block)[None]
    positions = torch.arange(len(ids) + 5)
    table = model.rotary_emb(context, positions[None])
    for index, layer in enumerate(model.layers):
        hidden = torch.zeros(5, len(positions), dtype=torch.bool)
        if index in model.sliding_window_indices:
            own = positions[len(ids) :, None]
            hidden = (positions > own) | (positions <= own - model.sliding_window)
        mask = torch.zeros(5, len(positions)).masked_fill(hidden, float("-inf"))[None, None]
        states = layer(context, states, attention_mask=mask, position_embeddings=table)
    states = model.norm(states[0])
    logits = model.lm_head(states)
    if hasattr(model, "markov_head"):
        before = tokens[None, :5]
        logits += model.markov_head.block_bias(prev_token_ids=before, hidden_states=states[None])[0]
    return logits


CLASSES = {
    "eagle3": "Eagle3DraftModel",
    "dflash": "DFlashDraftModel",
    "dspark": "DSparkDraftModel",
    "peagle": "PEagleDraftModel",
}
RUNS = {
    "eagle3": {},
    "eagle3 residual": {"norm_before_residual": True, "draft_vocab_size": None},
    "dflash": {},
    "dflash sliding": {"sliding_layers": [0, 1], "sliding_window": 6},
    "dspark": {},
    "peagle": {"draft_vocab_size": None},
}


def ours(draft, ids, aux, tokens):
    """Return what our draft says after the same tokens: the first given, the others chosen."""
    if isinstance(draft, ChainDraft):
        positions = torch.arange(len(ids))
        return draft.decode(ids, draft.project(aux), positions, KVCache())[0]
    caches, said, chosen = draft.start(), [], iter(tokens[1:].split(1))
    draft.read(ids, aux, caches)

    def choose(logits):
        said.append(logits)
        return torch.cat([next(chosen) for _ in logits])

    draft.draft(tokens[:1], caches, num_tokens=draft.num_drafted, choose=choose)
    return torch.cat(said)


@pytest.mark.skipif(
    importlib.util.find_spec("speculators") is None,
    reason="wants speculators: pip install --no-deps speculators==0.9.0",
)
def test_speculators_computes_what_we_compute_and_we_load_what_it_saves(tmp_path):
    target = make_target(tmp_path / "target-model", architectures=["Qwen3ForCausalLM"])
    drafts = {}
    for name, settings in RUNS.items():
        kind = name.split()[0]
        config, draft = MAKERS[kind](target, aux_layer_ids=[1, 2, 5], **settings)
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        export(draft, config, target, tmp_path / name, format=SPECULATORS, dtype=torch.float32)
        drafts[name] = draft
    ids = torch.randint(V, (11,))
    # The token behind the last one is the first given.
    inputs = ids, torch.randn(11, 3 * H), torch.cat([ids[-1:], torch.randint(V, (5,))])

    (found,) = run_ranks(load_in_speculators, 1, tmp_path, inputs, timeout_s=120)

    for name, draft in drafts.items():
        kind, empty, logits = found[name]
        assert kind == CLASSES[name.split()[0]]
        assert empty == []
        with torch.no_grad():
            expected = ours(draft, *inputs)
        torch.testing.assert_close(torch.from_numpy(logits)[-len(expected) :], expected)
        theirs = load_draft(tmp_path / f"{name}-theirs", target)
        assert theirs.config.aux_layer_ids == [1, 2, 5]
        for key, tensor in draft.state_dict().items():
            assert torch.equal(theirs.state_dict()[key], tensor), key
