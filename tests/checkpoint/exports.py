"""A small target, an EAGLE-3 draft for it, and its export: what the tests of exports share."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

from colospec.checkpoint.export import export_draft
from colospec.draft import registry
from colospec.draft.eagle3.config import Eagle3Config
from colospec.target import Target

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


def make_draft(target, **settings):
    config = Eagle3Config(**({"draft_vocab_size": W} | settings))
    counts = np.random.default_rng().integers(0, 1000, V)
    return config, registry.build(config, target, token_counts=counts)


def export(draft, config, target, directory, **options):
    facts = {"steps": 7, "data_fingerprint": "f00d|x", "metrics": {"train/loss": 1.25}}
    export_draft(
        draft.state_dict(), directory, config=config, target=target, facts=facts, **options
    )
