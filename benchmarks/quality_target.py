"""The target of bench_quality.py: a Qwen3 in plain torch, that is trained and that writes text.

Tensor names are those of Qwen3ForCausalLM with tied embeddings; the tests compare its logits with
transformers'. Shape letters: B sequences, S tokens, D head size, L cached tokens.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

THETA = 10000.0
EPS = 1e-6
MAX_POSITIONS = 4096
MATRIX_LEARNING_RATE = 0.02
LEARNING_RATE = 0.003
WARMUP_SHARE = 0.03
Cache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    """Sizes of the target."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        from transformers import Qwen3Config

        config = Qwen3Config(
            architectures=["Qwen3ForCausalLM"],
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rms_norm_eps=EPS,
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
            dtype="bfloat16",
        )
        return dict(config.to_dict())


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input, as autocast and the fused kernel want it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Self-attention with normed queries and keys, over a cache where there is one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        width, kv_width = (n * shape.head_dim for n in (shape.num_heads, shape.num_kv_heads))
        self.q_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden_size, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, EPS)
        self.k_norm = RMSNorm(shape.head_dim, EPS)

    def forward(
        self, x: Tensor, table: Tensor, cache: tuple[Tensor, Tensor] | None, length: int
    ) -> Tensor:
        """Attend from x [B, S, H], which follows `length` cached tokens; S is 1 behind any."""
        split = (*x.shape[:2], -1, self.head_dim)
        query = _rotate(self.q_norm(self.q_proj(x).view(split)), table).transpose(1, 2)
        key = _rotate(self.k_norm(self.k_proj(x).view(split)), table).transpose(1, 2)
        value = self.v_proj(x).view(split).transpose(1, 2)
        if cache is not None:
            end = length + x.shape[1]
            for kept, new in zip(cache, (key, value), strict=True):
                kept[:, :, length:end] = new
            key, value = (kept[:, :, :end] for kept in cache)
        if length:
            # One new token each: the heads that share a key-value head become its queries.
            grouped = query.reshape(len(x), key.shape[1], -1, self.head_dim)
            out = F.scaled_dot_product_attention(grouped, key, value).view_as(query)
        else:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, EPS)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, EPS)
        self.mlp = MLP(shape)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        cache: tuple[Tensor, Tensor] | None = None,
        length: int = 0,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), table, cache, length)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Model(nn.Module):
    """The decoder; its head is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, EPS)
        depth = 1 / math.sqrt(2 * shape.num_layers)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 * (depth if last else 1.0))

    def forward(self, tokens: Tensor, cache: Cache | None = None, length: int = 0) -> Tensor:
        """Return the normed last states [B, S, H] of tokens [B, S] that follow `length` others."""
        x = self.embed_tokens(tokens)
        table = _table(length, tokens.shape[1], self.shape.head_dim, x)
        for number, layer in enumerate(self.layers):
            x = layer(x, table, cache[number] if cache else None, length)
        return self.norm(x)  # type: ignore[no-any-return]

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the mean loss of predicting tokens [B, S], each from those before it."""
        logits = self(tokens)[:, :-1] @ self.embed_tokens.weight.T
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def save(self, directory: Path, tokenizer: Any) -> None:
        """Write a Hugging Face directory, in bfloat16."""
        from safetensors.torch import save_file

        tokenizer.save_pretrained(directory)
        state = {
            f"model.{name}": value.detach().to("cpu", torch.bfloat16).contiguous()
            for name, value in self.state_dict().items()
        }
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(self.shape.config(), indent=2))


def train(
    model: Model,
    tokens: Tensor,
    *,
    seconds: float,
    batch: int,
    length: int,
    tell: Callable[..., None],
) -> dict[str, Any]:
    """Train for `seconds`, on windows of `tokens` [N] in random order; return the curve.

    Muon for the matrices of the layers, AdamW for the rest; bfloat16 under autocast.
    """
    device = model.norm.weight.device
    if device.type == "cuda":
        for layer in model.layers:
            layer.compile(dynamic=False)
    optimizers = _optimizers(model)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    count = (len(tokens) - 1) // length
    generator = torch.Generator().manual_seed(0)
    order, curve, step = torch.empty(0, dtype=torch.int64), [], 0
    begin = time.monotonic()
    progress = 0.0
    while progress < 1.0:
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        chosen, order = order[:batch], order[batch:]
        rows = tokens[chosen[:, None] * length + torch.arange(length)].long()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model.loss(rows.to(device, non_blocking=True))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        decay = min(1.0, progress / WARMUP_SHARE + 0.02) * (1.0 - progress)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * decay
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 20 == 1:
            curve.append((step, round(loss.item(), 4)))
            tell(f"step {step}, loss {curve[-1][1]:.3f}")
        progress = (time.monotonic() - begin) / seconds
    spent = round(time.monotonic() - begin, 1)
    return {"steps": step, "tokens": step * batch * length, "train_s": spent, "curve": curve}


@torch.no_grad()
def held_out_loss(model: Model, windows: Tensor) -> float:
    """Return the mean loss on windows [n, S]."""
    device = model.norm.weight.device
    with torch.autocast(device.type, torch.bfloat16):
        losses = [model.loss(part.to(device)).item() for part in windows.split(8)]
    return sum(losses) / len(losses)


@torch.inference_mode()
def sample(model: Model, prompts: Tensor, *, length: int, temperature: float) -> Tensor:
    """Continue prompts [B, S] to `length` tokens each; returns [B, length] on the CPU."""
    device, dtype, shape = model.norm.weight.device, model.norm.weight.dtype, model.shape
    size = (len(prompts), shape.num_kv_heads, length, shape.head_dim)
    cache = [
        (
            torch.empty(size, dtype=dtype, device=device),
            torch.empty(size, dtype=dtype, device=device),
        )
        for _ in model.layers
    ]
    tokens = torch.empty(len(prompts), length, dtype=torch.int64, device=device)
    known = prompts.shape[1]
    tokens[:, :known] = prompts.to(device)
    first = 0
    # Not cuDNN's attention: it would build a plan for every length.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        for end in range(known, length):
            states = model(tokens[:, first:end], cache, first)[:, -1]
            odds = torch.softmax((states @ model.embed_tokens.weight.T).float() / temperature, -1)
            tokens[:, end] = odds.div_(torch.empty_like(odds).exponential_()).argmax(-1)
            first = end
    return tokens.cpu()


def _optimizers(model: Model) -> list[torch.optim.Optimizer]:
    matrices = [weight for weight in model.layers.parameters() if weight.ndim == 2]
    known = set(map(id, matrices))
    rest = [weight for weight in model.parameters() if id(weight) not in known]
    return [
        torch.optim.Muon(matrices, MATRIX_LEARNING_RATE, weight_decay=0.0),
        torch.optim.AdamW(rest, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _table(first: int, number: int, head_dim: int, like: Tensor) -> Tensor:
    """Return cosines and sines [2, number, 1, D] of positions from `first` on."""
    places = torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32) / head_dim
    positions = torch.arange(first, first + number, device=like.device, dtype=torch.float32)
    angles = (positions[:, None] * THETA**-places).repeat(1, 2)[:, None]
    return torch.stack([angles.cos(), angles.sin()]).to(like.dtype)


def _rotate(x: Tensor, table: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * table[0].to(x.dtype) + torch.cat([-right, left], -1) * table[1].to(x.dtype)
