"""The DSpark loss written down once more: one block, one slot at a time, in float64."""

import torch
import torch.nn.functional as F

from tests.draft import dflash_oracle


class Oracle(dflash_oracle.Oracle):
    """Loss sum, denominator and metrics of given anchors; `weights` hold the gradients."""

    def states(self, ids, aux, anchor):
        context = [self.norm(self.weights["fc.weight"] @ x.double(), "hidden_norm") for x in aux]
        tokens = [int(ids[anchor])] + [self.mask_id] * (self.config.block_size - 1)
        states = [self.embedding[token] for token in tokens]
        for number in range(self.config.num_layers):
            states = self.layer(number, states, context, anchor)
        return [self.norm(x, "norm") for x in states]

    def latent(self, embed, x, state):
        kind, rank = self.config.markov_head_type.value, self.config.markov_rank
        if kind == "vanilla":
            return embed, state
        if kind == "gated":
            name = "markov_head.gate_proj"
            gate = self.weights[name + ".weight"] @ torch.cat([x, embed])
            return torch.sigmoid(gate + self.weights[name + ".bias"]) * embed, state
        name = "markov_head.joint_proj"
        joint = self.weights[name + ".weight"] @ torch.cat([state, embed, x])
        joint = joint + self.weights[name + ".bias"]
        gate, candidate, out = joint[:rank], joint[rank : 2 * rank], joint[2 * rank :]
        gate = torch.sigmoid(gate)
        return out.tanh(), gate * state + (1 - gate) * candidate.tanh()

    def logits(self, states, previous):
        """Corrected logits of slots that follow `previous` tokens, and their embeddings."""
        state = torch.zeros(self.config.markov_rank, dtype=torch.float64)
        found = []
        for x, token in zip(states, previous, strict=False):
            embed = self.weights["markov_head.markov_w1.weight"][int(token)]
            latent, state = self.latent(embed, x, state)
            bias = self.weights["markov_head.markov_w2.weight"] @ latent
            found.append((self.head @ x + bias, embed))
        return found

    def confidence(self, x, embed):
        config = self.config
        features = torch.cat([x, embed]) if config.confidence_head_with_markov else x
        name = "confidence_head.proj"
        return self.weights[name + ".weight"][0] @ features + self.weights[name + ".bias"][0]

    def document(self, batch, anchors):
        """Loss sum, and the metrics as (sum, count) by name."""
        config, ids, mask = self.config, batch.tokens.token_ids, batch.tokens.loss_mask
        last = batch.features.last_hidden_states.double()
        total, sums = torch.zeros((), dtype=torch.float64), {}

        def add(name, value, weight=1.0):
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + float(torch.as_tensor(value).detach()) * weight, old[1] + weight)

        for anchor in anchors:
            states = self.states(ids, batch.features.aux_hidden_states, anchor)
            gained, alive = 1.0, 1.0
            for slot, (z, embed) in enumerate(self.logits(states, ids[anchor:])):
                place = anchor + slot + 1
                if place >= len(ids) or not mask[place]:
                    break
                gamma = config.decay_gamma or float("inf")
                weight = 2.718281828459045 ** (-slot / gamma)
                target = self.head @ last[place - 1]
                ce = -z.log_softmax(-1)[ids[place]]
                distance = (z.softmax(-1) - target.softmax(-1)).abs().sum()
                accepted = float(1 - distance.detach() / 2)
                loss = config.ce_weight * ce + config.l1_weight * distance
                if config.enable_confidence_head:
                    sure = self.confidence(states[slot], embed)
                    error = F.binary_cross_entropy_with_logits(
                        sure, torch.tensor(accepted).double()
                    )
                    loss = loss + config.confidence_weight * error
                    add("confidence", error, weight)
                    add("confidence_error", abs(float(sure.detach().sigmoid()) - accepted), weight)
                total = total + weight * loss
                add("loss", loss, weight)
                add("cross_entropy", ce, weight)
                add("distance", distance, weight)
                add("teacher_agreement", z.argmax() == target.argmax())
                add(f"acc_{slot}", z.argmax() == ids[place])
                add(f"acceptance_rate_{slot}", accepted)
                alive *= accepted
                gained += alive
            add("tau_probabilistic", gained)
        return total, sums
