"""The DFlash loss written down once more: one block, one slot at a time, in float64.

Shares no code with the product except its parameters; anchors are given.
"""

import torch

from tests.draft.oracle import rms_norm


class Oracle:
    """Loss sum and denominator of given anchors; `weights` hold the gradients."""

    def __init__(self, draft, target):
        self.config, self.target, self.mask_id = draft.config, target, draft.mask_token_id
        self.weights = {
            name: parameter.detach().double().requires_grad_()
            for name, parameter in draft.named_parameters()
        }
        self.embedding, self.head = draft.embedding.double(), draft.frozen_head.double()
        self.eps = target.hf_config["rms_norm_eps"]

    def norm(self, x, name):
        return rms_norm(x, self.weights[name + ".weight"], self.eps)

    def rotate(self, x, position):
        size = self.target.head_dim
        frequencies = 1.0 / self.target.rope_theta ** (torch.arange(0, size, 2).float() / size)
        angles = (torch.tensor(float(position)) * frequencies).repeat(2)
        left, right = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()

    def heads(self, x, name, norm=None, position=None):
        out = (self.weights[name + ".weight"] @ x).view(-1, self.target.head_dim)
        return out if norm is None else self.rotate(self.norm(out, norm), position)

    def key_value(self, x, name, position):
        key = self.heads(x, f"{name}.k_proj", f"{name}.k_norm", position)
        return position, key, self.heads(x, f"{name}.v_proj")

    def attention(self, query, seen):
        group = len(query) // self.target.num_key_value_heads
        k = torch.stack([key for _, key, _ in seen]).repeat_interleave(group, 1)
        v = torch.stack([value for _, _, value in seen]).repeat_interleave(group, 1)
        scores = torch.einsum("nd,snd->ns", query, k) / self.target.head_dim**0.5
        return torch.einsum("ns,snd->nd", scores.softmax(-1), v).flatten()

    def layer(self, number, states, context, anchor):
        name = f"layers.{number}.self_attn"
        window = self.config.sliding_window if number in self.config.sliding_layers else None
        normed = [self.norm(x, f"layers.{number}.input_layernorm") for x in states]
        own = [self.key_value(x, name, anchor + k) for k, x in enumerate(normed)]
        before = [self.key_value(x, name, t) for t, x in enumerate(context[:anchor])]
        out = []
        for slot, x in enumerate(normed):
            position = anchor + slot
            seen = before + own
            if window is not None:
                seen = [one for one in seen if position - window < one[0] <= position]
            query = self.heads(x, f"{name}.q_proj", f"{name}.q_norm", position)
            out.append(
                states[slot] + self.weights[f"{name}.o_proj.weight"] @ self.attention(query, seen)
            )
        return [y + self.mlp(number, y) for y in out]

    def mlp(self, number, y):
        x = self.norm(y, f"layers.{number}.post_attention_layernorm")
        gate, up, down = (
            self.weights[f"layers.{number}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")
        )
        return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))

    def block(self, ids, mask, aux, anchor):
        """Cross entropies by slot 1..b-1 (None where nothing is supervised), and hits."""
        context = [self.norm(self.weights["fc.weight"] @ x.double(), "hidden_norm") for x in aux]
        tokens = [int(ids[anchor])] + [self.mask_id] * (self.config.block_size - 1)
        states = [self.embedding[token] for token in tokens]
        for number in range(self.config.num_layers):
            states = self.layer(number, states, context, anchor)
        losses, hits = [], []
        for slot in range(1, self.config.block_size):
            place = anchor + slot
            if place >= len(ids) or not mask[place]:
                losses.append(None)
                hits.append(False)
                continue
            logits = self.head @ self.norm(states[slot], "norm")
            losses.append(-logits.log_softmax(-1)[ids[place]])
            hits.append(bool(logits.argmax() == ids[place]))
        return losses, hits

    def weigh(self, losses):
        """Weights of one block's slots, and what it adds to the denominator."""
        config = self.config
        if config.objective.value == "decay":
            gamma = config.decay_gamma or float("inf")
            weights = [
                0.0 if x is None else 2.718281828459045 ** (-k / gamma)
                for k, x in enumerate(losses)
            ]
            return weights, sum(weights)
        prefix, running = [], 1.0
        for x in losses:
            if x is not None:
                q = float(torch.exp(-x.detach()))
                running *= (1 - config.dpace_alpha) * q + config.dpace_alpha
            prefix.append(0.0 if x is None else running)
        return [0.0 if x is None else sum(prefix[k:]) for k, x in enumerate(losses)], 1.0

    def document(self, batch, anchors):
        """Loss sum, denominator, and (hits, count) by slot of one document's anchors."""
        ids, mask = batch.tokens.token_ids, batch.tokens.loss_mask
        total, denominator = torch.zeros((), dtype=torch.float64), 0.0
        counts = [[0, 0] for _ in range(self.config.block_size - 1)]
        for anchor in anchors:
            losses, hits = self.block(ids, mask, batch.features.aux_hidden_states, anchor)
            weights, part = self.weigh(losses)
            denominator += part
            for slot, (loss, weight, hit) in enumerate(zip(losses, weights, hits, strict=True)):
                if loss is not None:
                    total = total + weight * loss
                    counts[slot][0] += hit
                    counts[slot][1] += 1
        return total, denominator, counts
