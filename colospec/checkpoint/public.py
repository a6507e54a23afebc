"""The public EAGLE-3 format: config.json and the tensors that SGLang and vLLM load.

Tensor names are those of the draft module. The target's embedding is not written: engines share the
target's own. Engines skip tensors that they do not know without a word, so the list is exact.

Layer ids appear twice in config.json. In `eagle_config`, which SGLang reads, layer i means the
output of decoder layer i from 0, as everywhere in colospec. At the top level, which vLLM reads,
number j means the input of layer j, so it is one more.

Shape letters: A aux layers, D hidden size of draft and target, I MLP width, N and M heads and
key-value heads, V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import colospec
from colospec.config import DraftConfig, Eagle3Config
from colospec.draft import registry
from colospec.target import Target

ARCHITECTURE = "LlamaForCausalLMEagle3"
CONFIG = "config.json"
FLOATS = ("float32", "bfloat16", "float16")
_EXACT_DTYPES = {"t2d": ("bool",), "d2t": ("int64",)}


def eagle3(config: DraftConfig) -> Eagle3Config:
    """Return `config` if it has this format. Raises ValueError for another algorithm."""
    if not isinstance(config, Eagle3Config):
        raise ValueError(f"draft.algorithm={config.algorithm} has no export format, only eagle3")
    return config


def tensor_shapes(config: Eagle3Config, target: Target) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the public format, by name."""
    num_aux = len(registry.features(config, target).aux_layer_ids)
    hidden, vocab = target.hidden_size, target.vocab_size
    mlp = config.intermediate_size or target.intermediate_size
    query = target.num_attention_heads * target.head_dim
    key = target.num_key_value_heads * target.head_dim
    draft_vocab = _draft_vocab_size(config, target)
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, num_aux * hidden),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "midlayer.self_attn.q_proj.weight": (query, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (key, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (key, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, query),
        "midlayer.mlp.gate_proj.weight": (mlp, hidden),
        "midlayer.mlp.up_proj.weight": (mlp, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, mlp),
        "norm.weight": (hidden,),
        "lm_head.weight": (draft_vocab, hidden),
    }
    if config.fc_norm:
        shapes |= {f"fc_norm.{i}.weight": (hidden,) for i in range(num_aux)}
    if draft_vocab < vocab:
        shapes |= {"t2d": (vocab,), "d2t": (draft_vocab,)}
    return shapes


def check_tensors(
    tensors: dict[str, tuple[tuple[int, ...], str]],
    expected: dict[str, tuple[int, ...]],
    where: str,
) -> None:
    """Compare (shape, torch's name of the dtype) by tensor name with the expected shapes.

    Raises ValueError that lists all missing, unexpected and wrong tensors.
    """
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    faults = [f"missing: {', '.join(missing)}"] if missing else []
    faults += [f"unexpected: {', '.join(unexpected)}"] if unexpected else []
    for name in sorted(expected.keys() & tensors.keys()):
        shape, dtype = tensors[name]
        if shape != expected[name]:
            faults.append(f"{name} has shape {list(shape)}, expected {list(expected[name])}")
        dtypes = _EXACT_DTYPES.get(name, FLOATS)
        if dtype not in dtypes:
            faults.append(f"{name} has dtype {dtype}, expected {' or '.join(dtypes)}")
    if faults:
        raise ValueError(f"{where} is not the draft of this target; {'; '.join(faults)}")


def check_values(tensors: dict[str, Tensor], where: str) -> None:
    """Raise ValueError for NaN or Inf, and for a vocabulary mapping that contradicts itself."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: {name} has NaN or Inf in {tensor.dtype}")
    if "d2t" in tensors:
        offsets, chosen = tensors["d2t"].cpu(), tensors["t2d"].cpu()
        if not torch.equal(torch.arange(len(offsets)) + offsets, chosen.nonzero().flatten()):
            raise ValueError(
                f"{where}: d2t and t2d disagree; draft token i must be target token i + d2t[i], "
                "ascending, and t2d must be True for just these"
            )


def write_config(
    directory: Path, config: Eagle3Config, target: Target, dtype: torch.dtype
) -> dict[str, Any]:
    """Write `directory`/config.json and return its contents."""
    hf, layers = target.hf_config, registry.features(config, target).aux_layer_ids
    contents = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_size": target.hidden_size,
        "target_hidden_size": target.hidden_size,
        "intermediate_size": config.intermediate_size or target.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": target.num_attention_heads,
        "num_key_value_heads": target.num_key_value_heads,
        "head_dim": target.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "max_position_embeddings": hf.get("max_position_embeddings", 2048),
        **_rope(target),
        "vocab_size": target.vocab_size,
        "draft_vocab_size": _draft_vocab_size(config, target),
        "tie_word_embeddings": False,
        **{key: hf.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "norm_output": config.norm_output,
        "fc_norm": config.fc_norm,
        "num_aux_hidden_states": len(layers),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": list(layers),
            "use_aux_hidden_state": True,
        },
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in layers],
        "colospec": {"version": colospec.__version__, "ttt_length": config.ttt_length},
    }
    (directory / CONFIG).write_text(json.dumps(contents, indent=2) + "\n")
    return contents


def read_config(directory: Path, target: Target) -> Eagle3Config:
    """Read `directory`/config.json as a draft for `target`.

    Raises ValueError if it is none, or is one for another target, listing what differs.
    """
    file = directory / CONFIG
    try:
        contents = json.loads(file.read_text())
        architectures = contents.get("architectures")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if architectures != [ARCHITECTURE]:
        raise ValueError(f"{file} has architectures={architectures}, expected [{ARCHITECTURE!r}]")
    eagle_config = contents.get("eagle_config") or {}
    config = Eagle3Config(
        aux_layer_ids=eagle_config.get("eagle_aux_hidden_state_layer_ids"),
        ttt_length=contents.get("colospec", {}).get("ttt_length", Eagle3Config.ttt_length),
        draft_vocab_size=contents.get("draft_vocab_size"),
        intermediate_size=contents.get("intermediate_size"),
        norm_output=bool(contents.get("norm_output", False)),
        fc_norm=bool(contents.get("fc_norm", False)),
    )
    facts = {
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "num_attention_heads": target.num_attention_heads,
        "num_key_value_heads": target.num_key_value_heads,
        "head_dim": target.head_dim,
        "num_hidden_layers": 1,
        "rms_norm_eps": float(target.hf_config.get("rms_norm_eps", 1e-6)),
        "rope_theta": target.rope_theta,
    }
    different = [
        f"{key} {contents[key]}, expected {value}"
        for key, value in facts.items()
        if contents.get(key, value) != value
    ]
    if different:
        raise ValueError(f"{file} is for another target than {target.path}: {'; '.join(different)}")
    return config


def _draft_vocab_size(config: Eagle3Config, target: Target) -> int:
    return min(config.draft_vocab_size or target.vocab_size, target.vocab_size)


def _rope(target: Target) -> dict[str, Any]:
    """Return the target's rope fields in the spellings of transformers 4 and 5, for all engines."""
    hf = target.hf_config
    rope = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
    # Targets that mix layer types keep one dict per type; the draft attends to everything.
    rope = rope.get("full_attention", rope)
    theta = float(rope.get("rope_theta") or target.rope_theta)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    fields = {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {**scaling, "rope_type": kind},
        "rope_parameters": {**scaling, "rope_type": kind, "rope_theta": theta},
    }
    if partial := rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor"):
        fields["partial_rotary_factor"] = partial
    return fields
