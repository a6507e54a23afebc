"""The whole Eagle3 loss against the plain oracle, packing, decoding, and a real target."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from colospec.batch import Cursor, FeatureBatch, Features, TokenBatch
from colospec.config import Weights
from colospec.draft import registry
from colospec.draft.alignment import unroll
from colospec.draft.eagle3.config import Alignment
from colospec.draft.kv_cache import KVCache
from colospec.draft.layers import eagle3_layers
from colospec.draft.settings import Loss
from colospec.target import Target
from tests.draft.cases import (
    LENGTHS,
    context,
    documents,
    gradients,
    make_batch,
    make_config,
    make_draft,
    make_target,
)
from tests.draft.oracle import Oracle


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"draft_vocab_size": 17},
        {"draft_vocab_size": 25, "loss": Loss.lk_alpha, "alignment": Alignment.eagle},
        {"draft_vocab_size": 39, "loss": Loss.lk_lambda, "norm_output": True, "fc_norm": True},
        {"norm_before_residual": True, "draft_vocab_size": 39},
        {"alignment": Alignment.eagle, "fc_norm": True, "ttt_length": 7},
        {"norm_output": True, "loss": Loss.lk_lambda, "chunk_tokens": 1000, "ttt_length": 1},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_loss_and_all_gradients_equal_the_plain_oracle(settings, seed):
    generator = torch.Generator().manual_seed(seed)
    config, target = make_config(**settings), make_target(tied=seed == 1)
    draft = make_draft(config, target, generator=generator)
    batch = make_batch(LENGTHS, target, generator=generator)

    terms, grads = gradients(draft, batch, num_loss_tokens=10)

    oracle = Oracle(draft, target)
    results = [oracle.document(part) for part in documents(batch)]
    expected = sum(total for total, _ in results) / 10
    expected.backward()
    loss = terms.loss.item()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, weight in oracle.weights.items():
        torch.testing.assert_close(grads[name], weight.grad, rtol=1e-6, atol=1e-7, msg=name)
    total, count = terms.metrics["loss"]
    assert total.item() == pytest.approx(10 * loss)
    assert count.item() == batch.tokens.loss_mask.sum().item()
    for step in range(config.ttt_length):
        hits, alpha, size = (
            sum(column) for column in zip(*(s[step] for _, s in results), strict=True)
        )
        assert [x.item() for x in terms.metrics[f"acc_{step}"]] == [hits, size]
        assert [x.item() for x in terms.metrics[f"acceptance_rate_{step}"]] == [
            pytest.approx(alpha, rel=1e-6),
            size,
        ]


def test_float32_gradients_are_close_to_the_oracle():
    generator = torch.Generator().manual_seed(5)
    config, target = make_config(draft_vocab_size=20), make_target()
    draft = make_draft(config, target, generator=generator, dtype=torch.float32)
    batch = make_batch(LENGTHS, target, generator=generator, dtype=torch.float32)

    terms, grads = gradients(draft, batch, num_loss_tokens=7)

    oracle = Oracle(draft, target)
    expected = sum(oracle.document(part)[0] for part in documents(batch)) / 7
    expected.backward()
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, weight in oracle.weights.items():
        scale = weight.grad.abs().max().item()
        torch.testing.assert_close(grads[name].double(), weight.grad, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("alignment", list(Alignment))
def test_packed_is_the_sum_of_one_by_one(alignment):
    generator = torch.Generator().manual_seed(1)
    config, target = make_config(alignment=alignment, draft_vocab_size=30), make_target()
    draft = make_draft(config, target, generator=generator)
    batch = make_batch([4, 1, 17, 2, 30], target, generator=generator)

    packed = gradients(draft, batch, num_loss_tokens=13)
    single = gradients(draft, *documents(batch), num_loss_tokens=13)

    assert packed[0].loss.item() == pytest.approx(single[0].loss.item(), rel=1e-12)
    for name, grad in packed[1].items():
        torch.testing.assert_close(grad, single[1][name], rtol=1e-9, atol=1e-12)


def test_evaluation_without_gradients_gives_the_same_loss():
    generator = torch.Generator().manual_seed(3)
    for kind in Loss:
        draft = make_draft(make_config(loss=kind), make_target(), generator=generator)
        batch = make_batch(LENGTHS, make_target(), generator=generator)

        trained = draft(batch, context(10)).loss
        with torch.no_grad():
            evaluated = draft(batch, context(10)).loss

        assert not evaluated.requires_grad
        assert evaluated.item() == pytest.approx(trained.item(), rel=1e-12)


@pytest.mark.parametrize("norm_output", [False, True])
def test_decode_unrolls_like_training(norm_output):
    generator = torch.Generator().manual_seed(4)
    config, target = make_config(norm_output=norm_output, draft_vocab_size=30), make_target()
    draft = make_draft(config, target, generator=generator)
    batch = make_batch([6, 14], target, generator=generator)
    rows = unroll(batch.tokens, ttt_length=4, alignment=Alignment.exact)
    start, position = 6, 7

    with torch.no_grad():
        trained = draft.unroll(batch, rows)
        hidden = draft.project(batch.features.aux_hidden_states[start:])
        ids, positions, cache = batch.tokens.token_ids[start:], torch.arange(13), KVCache()
        first = draft.decode(ids[1:6], hidden[:5], positions[:5], cache)[1]
        rest = draft.decode(ids[6:14], hidden[5:13], positions[5:13], cache)[1]
        torch.testing.assert_close(torch.cat([first, rest]), trained[0][start : start + 13])

        cache.truncate(position + 1)
        state = rest[position - 5 : position - 4]
        for step in range(1, 4):
            where = torch.tensor([position + step])
            token = ids[position + 1 + step : position + 2 + step]
            logits, state = draft.decode(token, state, where, cache)
            torch.testing.assert_close(state[0], trained[step][start + position])
            normed = state if norm_output else draft.norm(state)
            torch.testing.assert_close(logits, draft.lm_head(normed))
    assert cache.length == position + 4


def test_to_target_ids_follows_the_offsets():
    generator = torch.Generator().manual_seed(0)
    draft = make_draft(make_config(draft_vocab_size=10), make_target(), generator=generator)
    ids = torch.randint(0, 10, (3, 4), generator=generator)

    assert torch.equal(draft.to_target_ids(ids), draft.t2d.nonzero().squeeze(1)[ids])


def hf_target(model, directory):
    model.save_pretrained(directory)
    return Target.load(directory)


def hf_features(model, target, config, ids, mask):
    """Hidden states that transformers itself returns for one document."""
    spec = registry.features(config, target)
    with torch.no_grad():
        out = model.model(ids[None], output_hidden_states=True)
    # hidden_states[i] is the input of layer i; the last entry is after the final norm.
    aux = torch.cat([out.hidden_states[i + 1][0] for i in spec.aux_layer_ids], dim=-1)
    tokens = TokenBatch.pack(Cursor(0, 0, 0), [0], [ids], [mask])
    return FeatureBatch(tokens, Features(aux, out.last_hidden_state[0]))


@pytest.mark.parametrize(("family", "draft_vocab_size"), [("qwen3", None), ("llama", 60)])
def test_overfits_one_document_of_a_real_target(tmp_path, family, draft_vocab_size):
    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 150,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**settings, head_dim=24, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings))
    # A random target is nearly undecided between tokens; a larger norm sharpens it.
    model.model.norm.weight.data *= 4
    target = hf_target(model.float().eval(), tmp_path)
    config = make_config(draft_vocab_size=draft_vocab_size, ttt_length=5)
    ids, mask = torch.randint(0, 150, (24,)), torch.arange(24) >= 8
    batch = hf_features(model, target, config, ids, mask)
    likely = model.lm_head(batch.features.last_hidden_states).argmax(-1)
    counts = torch.bincount(likely, minlength=150)
    draft = registry.build(config, target, token_counts=counts)
    optimizer = torch.optim.Adam(draft.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=150)

    first = None
    for _ in range(150):
        optimizer.zero_grad()
        terms = draft(batch, context(int(mask.sum())))
        first = first or terms.metrics
        terms.loss.backward()
        optimizer.step()
        schedule.step()

    for step in range(5):
        hits, count = (x.item() for x in terms.metrics[f"acc_{step}"])
        assert count == 16
        assert hits == count, f"step {step}: {hits} of {count}"
        assert first[f"acc_{step}"][0] <= 2
    assert terms.metrics["loss"][0] < first["loss"][0]


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [
        (36, (1, 17, 32)),
        (28, (1, 13, 24)),
        (61, (1, 29, 57)),
        (8, (1, 3, 4)),
        (7, (1, 2, 3)),
        (6, (0, 2, 4)),
        (4, (0, 1, 2)),
        (3, (0, 1, 2)),
        (2, (0, 1)),
        (1, (0,)),
    ],
)
def test_default_aux_layers_exist_and_differ(num_layers, expected):
    target = make_target(num_layers=num_layers)

    assert eagle3_layers(None, target) == expected
    assert make_draft(
        make_config(), target, generator=torch.Generator()
    ).fc.in_features == 16 * len(expected)


def test_chosen_aux_layers_are_captured_in_ascending_order():
    spec = registry.features(make_config(aux_layer_ids=[5, 0]), make_target())

    assert spec.aux_layer_ids == (0, 5)
    assert spec.last_hidden_states
    assert spec.dtype is torch.float32


def test_a_layer_that_the_target_lacks_is_refused():
    with pytest.raises(ValueError, match=r"aux_layer_ids=\[1, 8\].*0\.\.7"):
        registry.features(make_config(aux_layer_ids=[1, 8]), make_target())


@pytest.mark.parametrize("size", [None, 40, 4000])
def test_whole_vocabulary_has_no_mapping(size):
    config = make_config(draft_vocab_size=size)
    draft = registry.build(config, make_target(), token_counts=None, weights=Weights.random)

    names = set(draft.state_dict())

    assert not names & {"t2d", "d2t", "embedding", "target_head"}
    assert draft.lm_head.weight.shape == (40, 16)


def test_state_dict_has_the_public_names_and_shapes():
    config = make_config(draft_vocab_size=10, fc_norm=True)
    target = make_target()
    draft = registry.build(config, target, token_counts=torch.arange(40), weights=Weights.random)

    shapes = {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()}

    layer, attn = "midlayer.", "midlayer.self_attn."
    assert shapes == {
        "fc.weight": (16, 48),
        **{f"fc_norm.{i}.weight": (16,) for i in range(3)},
        layer + "input_layernorm.weight": (16,),
        layer + "hidden_norm.weight": (16,),
        layer + "post_attention_layernorm.weight": (16,),
        attn + "q_proj.weight": (32, 32),
        attn + "k_proj.weight": (16, 32),
        attn + "v_proj.weight": (16, 32),
        attn + "o_proj.weight": (16, 32),
        layer + "mlp.gate_proj.weight": (24, 16),
        layer + "mlp.up_proj.weight": (24, 16),
        layer + "mlp.down_proj.weight": (16, 24),
        "norm.weight": (16,),
        "lm_head.weight": (10, 16),
        "t2d": (40,),
        "d2t": (10,),
    }
