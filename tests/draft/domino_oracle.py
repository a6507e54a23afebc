"""The Domino loss written down once more: one block, one slot at a time, in float64."""

import torch
import torch.nn.functional as F

from tests.draft import dspark_oracle


class Oracle(dspark_oracle.Oracle):
    """Loss sum and metrics of given anchors; `weights` hold the gradients."""

    def gru(self, token, state):
        width = self.config.gru_hidden_dim
        left = self.weights["prefix_gru.weight_ih_l0"] @ self.embedding[int(token)]
        right = self.weights["prefix_gru.weight_hh_l0"] @ state
        reset = torch.sigmoid(left[:width] + right[:width])
        update = torch.sigmoid(left[width : 2 * width] + right[width : 2 * width])
        new = torch.tanh(left[2 * width :] + reset * right[2 * width :])
        return (1 - update) * new + update * state

    def pairs(self, states, previous):
        """Logits without and with the correction of drafted tokens that follow `previous`."""
        config, found = self.config, []
        state = torch.zeros(config.gru_hidden_dim, dtype=torch.float64)
        slots = states if config.shift_label else states[1:]
        for place, (x, token) in enumerate(zip(slots, previous, strict=False)):
            state = self.gru(token, state)
            base = self.head @ x
            narrow = F.silu(self.weights["embed_proj.0.weight"] @ torch.cat([x, state]))
            more = self.weights["embed_proj.2.weight"] @ narrow
            found.append((base, base + more * (place >= config.pure_draft_prefix_len)))
        return found

    def document(self, batch, anchors, *, share):
        """Loss sum, and the metrics as (sum, count) by name."""
        ids, mask = batch.tokens.token_ids, batch.tokens.loss_mask
        total, sums = torch.zeros((), dtype=torch.float64), {}

        def add(name, value, weight=1.0):
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + float(value) * weight, old[1] + weight)

        for anchor in anchors:
            states = self.states(ids, batch.features.aux_hidden_states, anchor)
            alive = {"": True, "base_": True}
            gained = {"": 1, "base_": 1}
            for place, pair in enumerate(self.pairs(states, ids[anchor:])):
                asked = anchor + place + 1 < len(ids) and mask[anchor + place + 1]
                if not asked:
                    alive = dict.fromkeys(alive, False)
                    continue
                label = ids[anchor + place + 1]
                weight = 2.718281828459045 ** (-place / (self.config.decay_gamma or float("inf")))
                base, final = (-z.log_softmax(-1)[label] for z in pair)
                loss = share * base + (1 - share) * final
                total = total + weight * loss
                add("loss", loss.detach(), weight)
                for name, z in zip(("base_", ""), pair, strict=True):
                    hit = bool(z.argmax() == label)
                    add(f"{name}acc_{place}", hit)
                    alive[name] = alive[name] and hit
                    gained[name] += alive[name]
            for name, number in gained.items():
                add(f"{name}joint_acceptance_length", number)
        return total, sums
