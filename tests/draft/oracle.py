"""The Eagle3 loss written down once more: one document, one position at a time, in float64.

Shares no code with the product except its parameters.
"""

import torch


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_loss(logits, z, *, target_ids, kind, eta):
    """Loss, acceptance and hits of rows: draft logits [R, W] against target logits z [R, V]."""
    ids = torch.arange(z.shape[-1]) if target_ids is None else target_ids
    best = z.argmax(-1)
    kept = torch.isin(best, ids)
    p, p_abs = z[:, ids].softmax(-1), z.softmax(-1)[:, ids]
    log_q = logits.log_softmax(-1)
    alpha = torch.minimum(p_abs, log_q.exp()).sum(-1)
    kl = -(p * log_q).sum(-1)
    if kind == "kl":
        loss = kl
    elif kind == "lk_alpha":
        loss = -alpha.clamp(min=1e-8).log()
    else:
        mix = torch.exp(-eta * alpha.detach())
        loss = mix * kl + (1 - mix) * (1 - alpha)
    return loss * kept, alpha.detach(), ids[logits.argmax(-1)] == best


class Oracle:
    """The loss of a draft from copies of its tensors; `weights` hold the gradients."""

    def __init__(self, draft, target):
        self.config, self.target = draft.config, target
        self.weights = {
            name: parameter.detach().double().requires_grad_()
            for name, parameter in draft.named_parameters()
        }
        self.embedding, self.head = draft.embedding.double(), draft.frozen_head.double()
        self.ids = None
        if draft.d2t is not None:
            self.ids = torch.arange(len(draft.d2t)) + draft.d2t
        self.eps = target.hf_config["rms_norm_eps"]

    def norm(self, x, name):
        return rms_norm(x, self.weights[name + ".weight"], self.eps)

    def rotate(self, x, position):
        """x [heads, head_dim] at one position."""
        size = self.target.head_dim
        frequencies = 1.0 / self.target.rope_theta ** (torch.arange(0, size, 2).float() / size)
        angles = (torch.tensor(float(position)) * frequencies).repeat(2)
        left, right = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()

    def heads(self, x, name, position=None):
        out = self.weights[f"midlayer.self_attn.{name}.weight"] @ x
        out = out.view(-1, self.target.head_dim)
        return out if position is None else self.rotate(out, position)

    def project(self, aux):
        size = self.target.hidden_size
        parts = aux.double().view(-1, size)
        if self.config.fc_norm:
            parts = torch.stack([self.norm(x, f"fc_norm.{i}") for i, x in enumerate(parts)])
        return self.weights["fc.weight"] @ parts.flatten()

    def attention(self, query, keys, values, t):
        """keys[j][u]: step j, position u."""
        shown = [keys[0][u] for u in range(t + 1)] + [step[t] for step in keys[1:]]
        given = [values[0][u] for u in range(t + 1)] + [step[t] for step in values[1:]]
        group = len(query) // len(shown[0])
        k = torch.stack(shown).repeat_interleave(group, 1)
        v = torch.stack(given).repeat_interleave(group, 1)
        scores = torch.einsum("nd,snd->ns", query, k) / self.target.head_dim**0.5
        return torch.einsum("ns,snd->nd", scores.softmax(-1), v).flatten()

    def layer(self, token, hidden, keys, values, t, step):
        e = self.norm(self.embedding[token], "midlayer.input_layernorm")
        normed = self.norm(hidden, "midlayer.hidden_norm")
        u = torch.cat([e, normed])
        keys[step].append(self.heads(u, "k_proj", t + step))
        values[step].append(self.heads(u, "v_proj"))
        out = self.attention(self.heads(u, "q_proj", t + step), keys, values, t)
        hidden = normed if self.config.norm_before_residual else hidden
        hidden = hidden + self.weights["midlayer.self_attn.o_proj.weight"] @ out
        x = self.norm(hidden, "midlayer.post_attention_layernorm")
        mlp = {n: self.weights[f"midlayer.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")}
        act = torch.nn.functional.silu(mlp["gate"] @ x) * (mlp["up"] @ x)
        hidden = hidden + mlp["down"] @ act
        return self.norm(hidden, "norm") if self.config.norm_output else hidden

    def supervised(self, mask, t, step):
        if self.config.alignment.value == "eagle":
            return bool(mask[t + step])
        label = t + 2 + step
        return label < len(mask) and bool(mask[label])

    def document(self, batch):
        """Loss sum, and per step (hits, acceptance, count), of a batch of one document."""
        config, ids = self.config, batch.tokens.token_ids
        last = batch.features.last_hidden_states.double()
        hidden = [self.project(aux) for aux in batch.features.aux_hidden_states]
        keys, values, sums, total = [], [], [], torch.zeros((), dtype=torch.float64)
        for step in range(config.ttt_length):
            keys.append([])
            values.append([])
            valid = range(max(0, len(ids) - 1 - step))
            hidden = [
                self.layer(ids[t + 1 + step], hidden[t], keys, values, t, step) for t in valid
            ]
            rows = [t for t in valid if self.supervised(batch.tokens.loss_mask, t, step)]
            if not rows:
                sums.append((0.0, 0.0, 0))
                continue
            normed = [
                hidden[t] if config.norm_output else self.norm(hidden[t], "norm") for t in rows
            ]
            logits = torch.stack(normed) @ self.weights["lm_head.weight"].T
            z = torch.stack([last[t + 1 + step] for t in rows]) @ self.head.T
            loss, alpha, hits = plain_loss(
                logits, z, target_ids=self.ids, kind=config.loss.value, eta=config.lk_eta
            )
            total = total + config.step_weight_decay**step * loss.sum()
            sums.append((hits.sum().item(), alpha.sum().item(), len(rows)))
        return total, sums
