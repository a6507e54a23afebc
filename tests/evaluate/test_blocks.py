"""Block drafters: the same losslessness and the same counting as chains."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from colospec.config import DraftConfig
from colospec.draft import registry
from colospec.draft.dflash.config import DFlashConfig
from colospec.draft.domino.config import DominoConfig
from colospec.draft.dspark.config import DSparkConfig, MarkovHeadType
from colospec.draft.peagle.config import PEagleConfig
from colospec.evaluate.acceptance import DecodingSettings, decode_plain, decode_speculatively
from colospec.evaluate.drafters import BlockDrafter, open_drafter
from colospec.evaluate.sampling import Sampler
from colospec.evaluate.simulate import simulate
from colospec.evaluate.target_decoder import TargetDecoder
from colospec.target import Target
from tests.engine import targets
from tests.evaluate.models import CPU, random_prompts

CONFIGS: list[DraftConfig] = [
    DFlashConfig(num_layers=2, block_size=5, sliding_layers=[1], sliding_window=7),
    *(DSparkConfig(num_layers=2, block_size=4, markov_rank=8, markov_head_type=kind)
      for kind in MarkovHeadType),
    *(DominoConfig(num_layers=2, block_size=4 + (not shift), shift_label=shift, emb_dim=8)
      for shift in (True, False)),
    PEagleConfig(num_layers=2, num_depths=4, draft_vocab_size=None),
    PEagleConfig(num_layers=2, num_depths=4, draft_vocab_size=3),
]  # fmt: skip
NAMES = [
    "dflash",
    *MarkovHeadType.__members__,
    "domino",
    "domino-unshifted",
    "peagle",
    "peagle-pruned",
]
every_draft = pytest.mark.parametrize("config", CONFIGS, ids=NAMES)


def make(
    path: Path, config: DraftConfig, *, seed: int, **changes: object
) -> tuple[Target, TargetDecoder, BlockDrafter]:
    settings = {"head_dim": 12, "eos_token_id": None} | changes
    target = Target.load(targets.save(path, "Qwen3", seed=seed, **settings))
    torch.manual_seed(seed)
    model = registry.build(config, target, token_counts=torch.rand(target.vocab_size))
    for name, parameter in model.named_parameters():
        if "markov" in name or "embed_proj" in name:
            torch.nn.init.normal_(parameter)  # large enough to change what is chosen
    drafter = open_drafter(model, target)
    assert isinstance(drafter, BlockDrafter)
    return target, TargetDecoder(target, device=CPU), drafter


@every_draft
def test_greedy_output_equals_plain_decoding(
    tmp_path: Path, config: DraftConfig, random_seed: int
) -> None:
    target, decoder, drafter = make(tmp_path, config, seed=random_seed)
    prompts = random_prompts(4, vocab_size=target.vocab_size, seed=random_seed)
    settings = DecodingSettings(max_new_tokens=24, chain_length=4)
    plain = decode_plain(decoder, prompts, settings)

    result = decode_speculatively(decoder, drafter, prompts, settings, plain=plain)

    assert result.divergences is not None
    assert all(divergence.top2_gap < 1e-3 for divergence in result.divergences)
    assert 1.0 <= result.acceptance_length <= 5.0


@every_draft
def test_joint_length_is_that_of_blocks_started_at_every_place(
    tmp_path: Path, config: DraftConfig, random_seed: int
) -> None:
    _, decoder, drafter = make(tmp_path, config, seed=random_seed, vocab_size=8)
    (prompt,) = random_prompts(1, vocab_size=8, seed=random_seed)
    output = decode_plain(decoder, [prompt], DecodingSettings(max_new_tokens=20)).outputs[0]
    token_ids = torch.cat([prompt, torch.tensor(output)])
    decoder.start(drafter.aux_layer_ids)
    _, aux = decoder.forward(token_ids)
    lengths = []
    for start in range(len(prompt) + 1, len(token_ids) - 2):
        drafter.start()
        proposal = drafter.propose(
            token_ids[:start],
            aux[: start - 1],
            num_tokens=3,
            sampler=Sampler(0.0, seed=0, device=CPU),
        )
        right = proposal.token_ids == token_ids[start : start + 3]
        lengths.append(1 + int(right.long().cumprod(0).sum()))

    simulation = simulate(drafter, [(token_ids, aux, len(prompt))], chain_length=3)

    assert simulation.num_places == len(lengths)
    assert simulation.joint_acceptance_length == pytest.approx(sum(lengths) / len(lengths))


@every_draft
def test_sampled_tokens_follow_the_targets_distribution(
    tmp_path: Path, config: DraftConfig, random_seed: int
) -> None:
    """The second token of a vocabulary of four: chi-square against the exact odds."""
    _, decoder, drafter = make(
        tmp_path, config, seed=random_seed, vocab_size=4, num_hidden_layers=1
    )
    prompt, temperature, number = torch.tensor([1, 3]), 3.0, 800
    settings = DecodingSettings(
        max_new_tokens=3, chain_length=2, temperature=temperature, seed=random_seed
    )

    result = decode_speculatively(decoder, drafter, [prompt] * number, settings)

    expected = torch.zeros(4, 4, dtype=torch.float64)
    decoder.start(())
    first = torch.softmax(decoder.forward(prompt)[0][-1].double() / temperature, 0)
    for a in range(4):
        decoder.start(())
        second = decoder.forward(torch.cat([prompt, torch.tensor([a])]))[0][-1].double()
        expected[a] = number * first[a] * torch.softmax(second / temperature, 0)
    pairs = Counter((output[0], output[1]) for output in result.outputs)
    chi_square = sum(
        float((pairs[a, b] - expected[a, b]) ** 2 / expected[a, b])
        for a in range(4)
        for b in range(4)
    )
    # 15 degrees of freedom: above 60 once in three million runs.
    assert chi_square < 60
    assert 0 < result.num_reached[0] < result.num_steps


@every_draft
def test_a_chain_longer_than_the_block_is_refused(
    tmp_path: Path, config: DraftConfig, random_seed: int
) -> None:
    target, decoder, drafter = make(tmp_path, config, seed=random_seed)
    prompts = random_prompts(1, vocab_size=target.vocab_size, seed=random_seed)
    with pytest.raises(ValueError, match=r"chain_length=5 .*at most 4"):
        decode_speculatively(decoder, drafter, prompts, DecodingSettings(chain_length=5))
