"""The arithmetic that benchmarks count, against sums made by hand for Qwen3-8B."""

import json
import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import flops
from benchmarks.flops import Drafted, Supervised
from colospec.batch import Cursor, TokenBatch
from colospec.draft.alignment import unroll
from colospec.draft.dspark.config import MarkovHeadType
from colospec.draft.eagle3.config import Alignment
from colospec.target import Target
from colospec.train.find_target import CONFIGS
from tests.draft.cases import context, make_config, make_draft, make_inputs, make_target

LENGTH = 2048
TTT = 7


@pytest.fixture(scope="module")
def qwen():
    return Target.from_config(CONFIGS, json.loads((CONFIGS / "Qwen3-8B.json").read_text()))


def test_parameters_are_those_of_the_published_model(qwen):
    assert flops.layer_parameters(qwen) * qwen.num_layers == pytest.approx(6.946e9, rel=1e-3)
    assert flops.draft_layer_parameters(qwen) == pytest.approx(218.1e6, rel=1e-3)


def test_a_prefill_of_2048_tokens(qwen):
    assert flops.prefill(qwen, [LENGTH]) / 1e12 == pytest.approx(29.7, abs=0.05)


@pytest.mark.parametrize(
    ("vocabulary", "frozen", "train", "teacher"),
    [(32000, False, 31.3, 2.55), (None, False, 73.5, 2.55), (None, True, 55.7, 2.55)],
)
def test_a_training_step_of_one_sample(qwen, vocabulary, frozen, train, teacher):
    every = Supervised(LENGTH, TTT * LENGTH)
    total = flops.eagle3(
        qwen, [LENGTH], supervised=every, ttt_length=TTT, draft_vocab_size=vocabulary,
        frozen_head=frozen,
    )  # fmt: skip
    assert total / 1e12 == pytest.approx(train + teacher, abs=0.1)


def test_packed_documents_cost_what_they_cost_alone(qwen):
    lengths = [random.randint(3, 900) for _ in range(5)]
    assert flops.prefill(qwen, lengths) == pytest.approx(
        sum(flops.prefill(qwen, [length]) for length in lengths)
    )


def test_supervised_positions_are_those_that_the_draft_computes():
    lengths = [random.randint(0, 40) for _ in range(12)]
    tokens = TokenBatch.pack(
        Cursor(0, 0, 0),
        range(len(lengths)),
        [torch.zeros(n, dtype=torch.int64) for n in lengths],
        [torch.ones(n, dtype=torch.bool) for n in lengths],
    )
    rows = unroll(tokens, ttt_length=TTT, alignment=Alignment.exact)
    counted = Supervised.of(lengths, ttt_length=TTT)
    assert counted == Supervised(len(rows.teacher_rows), sum(rows.sizes))


@pytest.mark.parametrize(("valid", "total"), [(1.0, 71.5), (0.7, 50.4)])
def test_a_dflash_step_of_one_sample(qwen, valid, total):
    blocks = int(512 * valid)
    drafted = Drafted(LENGTH, blocks * 16, blocks * 16 * (LENGTH // 2 + 16), blocks * 16)
    step = flops.dflash(qwen, drafted, num_layers=5, num_aux=5)
    assert step / 1e12 == pytest.approx(total, rel=0.02)


ATTENTION = {
    torch.ops.aten.bmm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
}


def added(_, a, b, **__):
    return 2 * a[0] * a[1] * b[1]


CASES = {
    "dflash": {"num_anchors": 20, "block_size": 8},
    "domino": {"num_anchors": 20, "block_size": 8, "gru_hidden_dim": 256, "emb_dim": 128},
    "dspark": {"num_anchors": 20, "block_size": 7, "markov_rank": 128},
    "dspark-rnn": {
        "num_anchors": 20, "block_size": 7, "markov_rank": 128,
        "markov_head_type": MarkovHeadType.rnn,
    },
    "peagle": {"num_depths": 5, "keep_ratio": 0.8, "draft_vocab_size": 500},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_step_computes_what_the_formula_says_and_no_more(monkeypatch, name):
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    target = make_target(
        hidden_size=256, vocab_size=1000, head_dim=32, intermediate_size=512,
        num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip
    config = make_config(name.split("-")[0], **CASES[name])
    draft = make_draft(config, target, generator=generator, dtype=torch.float32)
    lengths = [random.randint(30, 90) for _ in range(4)] + [1, 2, 3]
    batch = make_inputs(lengths, config, target, generator=generator, dtype=torch.float32)

    # torch 2.11 does not count products that are added in place.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as counter:
        draft(batch, context(seed=0)).loss.backward()

    work = flops.step(config, target, batch.tokens)
    assert work.counts["supervised_positions"] > 20
    assert 20 < work.counts.get("blocks", 21) <= 4 * 20 + 1
    assert counter.get_total_flops() == pytest.approx(work.flop, rel=0.1)
    # The plain path pads attention's products, which are all of these.
    found = counter.get_flop_counts()["Global"]
    padded = sum(flop for op, flop in found.items() if op in ATTENTION)
    monkeypatch.setattr(flops, "ATTENTION", 0.0)
    rest = flops.step(config, target, batch.tokens).flop
    assert counter.get_total_flops() - padded == pytest.approx(rest, rel=0.02)
