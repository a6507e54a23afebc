"""The P-EAGLE loss written down once more: one place, one query at a time, in float64.

Shares no code with the product except its parameters; which places learn is given.
"""

import torch
import torch.nn.functional as F

from tests.draft.oracle import rms_norm


class Oracle:
    """Loss sum and metrics of one document after another; `weights` hold the gradients."""

    def __init__(self, draft, target):
        self.config, self.target = draft.config, target
        self.mask_id, self.ids = draft.mask_token_id, draft.target_ids
        self.weights = {
            name: parameter.detach().double().requires_grad_()
            for name, parameter in draft.named_parameters()
        }
        self.embedding, self.head = draft.embedding.double(), draft.frozen_head.double()
        self.eps = target.hf_config["rms_norm_eps"]

    def norm(self, x, name):
        return rms_norm(x, self.weights[name + ".weight"], self.eps)

    def heads(self, x, name, position=None):
        out = (self.weights[name + ".weight"] @ x).view(-1, self.target.head_dim)
        if position is None:
            return out
        size = self.target.head_dim
        frequencies = 1.0 / self.target.rope_theta ** (torch.arange(0, size, 2).float() / size)
        angles = (torch.tensor(float(position)) * frequencies).repeat(2)
        left, right = out.chunk(2, -1)
        return out * angles.cos() + torch.cat([-right, left], -1) * angles.sin()

    def attention(self, query, seen):
        group = len(query) // self.target.num_key_value_heads
        k = torch.stack([key for key, _ in seen]).repeat_interleave(group, 1)
        v = torch.stack([value for _, value in seen]).repeat_interleave(group, 1)
        scores = torch.einsum("nd,snd->ns", query, k) / self.target.head_dim**0.5
        return torch.einsum("ns,snd->nd", scores.softmax(-1), v).flatten()

    def layer(self, number, states, embeds, places):
        name = f"layers.{number}"
        inputs = [self.norm(x, name + ".input_layernorm") for x in (states if number else embeds)]
        if number == 0:
            inputs = [
                torch.cat([e, self.norm(x, name + ".hidden_norm")])
                for e, x in zip(inputs, states, strict=True)
            ]
        at = name + ".self_attn"
        pairs = [
            (self.heads(x, at + ".k_proj", a + d), self.heads(x, at + ".v_proj"))
            for x, (a, d) in zip(inputs, places, strict=True)
        ]
        out = []
        for state, x, (a, d) in zip(states, inputs, places, strict=True):
            seen = [
                pair
                for pair, (b, e) in zip(pairs, places, strict=True)
                if (e == 0 and b <= a) or (b == a and e <= d)
            ]
            query = self.heads(x, at + ".q_proj", a + d)
            y = state + self.weights[at + ".o_proj.weight"] @ self.attention(query, seen)
            z = self.norm(y, name + ".post_attention_layernorm")
            gate, up, down = (
                self.weights[f"{name}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")
            )
            out.append(y + down @ (F.silu(gate @ z) * (up @ z)))
        return out

    def logits(self, ids, aux, places):
        """Draft logits at `places`, pairs of anchor and depth: all depth-0 places among them."""
        fc, mask = self.weights["fc.weight"], self.weights["mask_hidden"].flatten()
        states = [fc @ (mask if d else aux[a].double()) for a, d in places]
        embeds = [self.embedding[self.mask_id if d else int(ids[a + 1])] for a, d in places]
        for number in range(self.config.num_layers):
            states = self.layer(number, states, embeds, places)
        return [self.weights["lm_head.weight"] @ self.norm(x, "norm") for x in states]

    def document(self, batch, learning):
        """Loss sum, and [hits, acceptance, count] by depth; `learning`: pairs of place and depth,
        the place being anchor + depth."""
        ids, last = batch.tokens.token_ids, batch.features.last_hidden_states.double()
        depths = self.config.num_depths
        sums = [[0.0, 0.0, 0] for _ in range(depths)]
        total = torch.zeros((), dtype=torch.float64)
        places = [(a, 0) for a in range(len(ids) - 1)]
        places += [(o - d, d) for o, d in learning if d]
        if not learning:
            return total, sums
        logits = self.logits(ids, batch.features.aux_hidden_states, places)
        found = dict(zip(places, logits, strict=True))
        chosen = torch.arange(len(self.embedding)) if self.ids is None else self.ids
        for o, d in learning:
            z, target = found[o - d, d], self.head @ last[o + 1]
            best = int(target.argmax())
            log_q = z.log_softmax(-1)
            p = target[chosen].softmax(-1)
            if best in chosen.tolist():
                total = total - (p * log_q).sum()
            absolute = target.softmax(-1)[chosen]
            sums[d][0] += int(chosen[z.argmax()]) == best
            sums[d][1] += float(torch.minimum(absolute, log_q.detach().exp()).sum())
            sums[d][2] += 1
        return total, sums
