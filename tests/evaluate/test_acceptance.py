"""Speculative decoding: what it may never change, and what it must count."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

from colospec.evaluate.acceptance import (
    DecodingSettings,
    decode_plain,
    decode_speculatively,
    looping_share,
)
from colospec.evaluate.drafters import BigramDrafter, Drafter
from colospec.evaluate.sampling import Sampler
from tests.evaluate.models import (
    CPU,
    TargetAsDrafter,
    Untrained,
    make_untrained,
    random_prompts,
)


def drafters(models: Untrained, seed: int) -> dict[str, Drafter]:
    vocab_size = models.target.vocab_size
    table = torch.randint(vocab_size, (vocab_size,), generator=torch.Generator().manual_seed(seed))
    return {
        "untrained": models.drafter,
        "bigram": BigramDrafter(table),
        "target": TargetAsDrafter(models.target),
    }


def test_plain_decoding_is_that_of_transformers(untrained: Untrained, random_seed: int) -> None:
    prompts = random_prompts(3, vocab_size=untrained.target.vocab_size, seed=random_seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(untrained.target.path)

    plain = decode_plain(untrained.decoder, prompts, DecodingSettings(max_new_tokens=15))

    for prompt, output, gaps in zip(prompts, plain.outputs, plain.top2_gaps, strict=True):
        expected = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=15,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        # Where the two largest logits are this close, rounding may choose.
        sure = next((i for i, gap in enumerate(gaps) if gap < 1e-3), len(gaps))
        assert output[:sure] == expected[0, len(prompt) :].tolist()[:sure]


@pytest.mark.parametrize("name", ["untrained", "bigram", "target"])
@pytest.mark.parametrize("family", ["Qwen3", "Mistral"])
def test_greedy_output_equals_plain_decoding(
    tmp_path: Path, name: str, family: str, random_seed: int
) -> None:
    changes = {"sliding_window": 6} if family == "Mistral" else {}
    models = make_untrained(tmp_path, seed=random_seed, family=family, **changes)
    prompts = random_prompts(4, vocab_size=models.target.vocab_size, seed=random_seed)
    settings = DecodingSettings(max_new_tokens=24, chain_length=4)
    plain = decode_plain(models.decoder, prompts, settings)

    result = decode_speculatively(
        models.decoder, drafters(models, random_seed)[name], prompts, settings, plain=plain
    )

    assert result.divergences is not None
    assert all(divergence.top2_gap < 1e-3 for divergence in result.divergences)
    assert [len(output) for output in result.outputs] == [24] * 4
    assert 1.0 <= result.acceptance_length <= 5.0
    assert result.num_target_forwards == result.num_steps + len(prompts)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_draft_that_is_the_target_gets_full_acceptance(
    untrained: Untrained, temperature: float, random_seed: int
) -> None:
    prompts = random_prompts(3, vocab_size=untrained.target.vocab_size, seed=random_seed)
    settings = DecodingSettings(max_new_tokens=21, chain_length=4, temperature=temperature)

    result = decode_speculatively(
        untrained.decoder, TargetAsDrafter(untrained.target), prompts, settings
    )

    # The rounding of differently shaped batches may cost an acceptance now and then.
    assert result.acceptance_length > 4.5
    assert result.conditional_rates[0] > 0.9


def test_sampled_pairs_follow_the_targets_distribution(tmp_path: Path, random_seed: int) -> None:
    """Two tokens of a vocabulary of four, enumerated: chi-square against the exact odds."""
    models = make_untrained(tmp_path, seed=random_seed, vocab_size=4, num_hidden_layers=1)
    prompt = torch.tensor([1, 3])
    temperature, number = 3.0, 1200
    settings = DecodingSettings(
        max_new_tokens=3, chain_length=2, temperature=temperature, seed=random_seed
    )
    expected = pair_odds(models, prompt, temperature)

    result = decode_speculatively(models.decoder, models.drafter, [prompt] * number, settings)

    # The first token is the target's own; the two behind it went through verification.
    pairs = Counter((output[1], output[2]) for output in result.outputs)
    chi_square = sum(
        (pairs[pair] - number * odds) ** 2 / (number * odds) for pair, odds in expected.items()
    )
    # 15 degrees of freedom: above 60 once in three million runs.
    assert chi_square < 60
    assert 0 < result.num_reached[0] < result.num_steps


def pair_odds(
    models: Untrained, prompt: torch.Tensor, temperature: float
) -> dict[tuple[int, int], float]:
    """Enumerate all three-token continuations with transformers; sum over the first token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        models.target.path, dtype=torch.float64
    )
    grid = torch.cartesian_prod(*[torch.arange(4)] * 3)
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(64, -1), grid], dim=1)).logits
    odds = torch.softmax(logits[:, 1:4] / temperature, dim=-1).gather(2, grid[:, :, None])
    joint = odds.squeeze(2).prod(1).view(4, 4, 4).sum(0)
    return {(a, b): float(joint[a, b]) for a in range(4) for b in range(4)}


@pytest.mark.parametrize("sure", [False, True])
def test_verification_turns_any_draft_into_the_target(sure: bool, random_seed: int) -> None:
    generator = torch.Generator().manual_seed(random_seed)
    p, q = torch.rand(2, 6, dtype=torch.float64, generator=generator).softmax(-1)
    if sure:
        q = torch.nn.functional.one_hot(torch.tensor(2), 6).double()
    sampler = Sampler(1.0, seed=random_seed, device=CPU)
    counts = torch.zeros(6, dtype=torch.float64)
    number = 6000
    for _ in range(number):
        proposed = sampler.draw(q[None])
        kept, bonus = sampler.verify(proposed, q[None], torch.stack([p, p]))
        counts[proposed if kept else bonus] += 1

    # 5 degrees of freedom: above 40 once in seven million runs.
    assert ((counts - number * p) ** 2 / (number * p)).sum() < 40


def test_same_seed_samples_the_same_text(untrained: Untrained) -> None:
    prompts = random_prompts(2, vocab_size=untrained.target.vocab_size, seed=3)

    def sample(seed: int) -> list[list[int]]:
        settings = DecodingSettings(max_new_tokens=16, temperature=1.0, seed=seed)
        return decode_speculatively(untrained.decoder, untrained.drafter, prompts, settings).outputs

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_output_ends_at_the_end_token(tmp_path: Path, random_seed: int) -> None:
    models = make_untrained(tmp_path / "a", seed=random_seed)
    prompts = random_prompts(3, vocab_size=models.target.vocab_size, seed=random_seed)
    settings = DecodingSettings(max_new_tokens=20, chain_length=3)
    free = decode_plain(models.decoder, prompts, settings)
    end = free.outputs[0][9]

    models.decoder.eos_token_ids = frozenset({end})
    plain = decode_plain(models.decoder, prompts, settings)
    result = decode_speculatively(
        models.decoder, TargetAsDrafter(models.target), prompts, settings, plain=plain
    )

    assert plain.outputs[0] == free.outputs[0][: free.outputs[0].index(end) + 1]
    for ours, theirs, gaps in zip(result.outputs, plain.outputs, plain.top2_gaps, strict=True):
        assert ours == theirs or min(gaps) < 1e-3
        assert end not in ours[:-1]


@pytest.mark.parametrize("place", [5, 6, 7, 8])
def test_an_end_token_shortens_the_last_step_up_to_the_limit_only(
    tmp_path: Path, place: int
) -> None:
    models = make_untrained(tmp_path / "a", seed=3)
    prompts = random_prompts(30, vocab_size=models.target.vocab_size, seed=3)
    texts = decode_plain(models.decoder, prompts, DecodingSettings(max_new_tokens=9)).outputs
    # The first token, and two steps of four: the second one goes two beyond the limit.
    settings = DecodingSettings(max_new_tokens=7, chain_length=3)
    fitting = [n for n, text in enumerate(texts) if text[place] not in text[:place]]
    assert fitting
    for number in fitting:
        models.decoder.eos_token_ids = frozenset({texts[number][place]})
        drafter = TargetAsDrafter(models.target)
        result = decode_speculatively(models.decoder, drafter, [prompts[number]], settings)
        assert result.outputs == [texts[number][: min(place + 1, 7)]]
        accepted = 3 if place >= 7 else place - 5
        assert result.num_reached == [1 + int(accepted > at) for at in range(3)]


def test_divergence_names_token_and_gap(untrained: Untrained) -> None:
    prompts = random_prompts(1, vocab_size=untrained.target.vocab_size, seed=5)
    settings = DecodingSettings(max_new_tokens=8)
    plain = decode_plain(untrained.decoder, prompts, settings)
    true_token = plain.outputs[0][4]
    plain.outputs[0][4] = true_token + 1

    result = decode_speculatively(
        untrained.decoder, untrained.drafter, prompts, settings, plain=plain
    )

    assert result.is_lossless is False
    assert result.divergences is not None
    (divergence,) = result.divergences
    assert (divergence.token, divergence.speculative) == (4, true_token)
    assert divergence.top2_gap == plain.top2_gaps[0][4]


def test_rates_multiply_to_the_acceptance_length(untrained: Untrained, random_seed: int) -> None:
    prompts = random_prompts(3, vocab_size=untrained.target.vocab_size, seed=random_seed)
    settings = DecodingSettings(max_new_tokens=20, chain_length=3, temperature=2.0)

    result = decode_speculatively(untrained.decoder, untrained.drafter, prompts, settings)

    product = 1.0
    for conditional, cumulative in zip(
        result.conditional_rates, result.cumulative_rates, strict=True
    ):
        product *= conditional
        assert product == pytest.approx(cumulative)
    accepted = sum(result.num_reached)
    assert result.acceptance_length == pytest.approx(1 + accepted / result.num_steps)


@pytest.mark.parametrize(
    ("output", "loops"),
    [
        ([1, 2, 3] * 20, True),
        ([9] * 33, True),
        ([9] * 32, False),
        (list(range(40)), False),
        (list(range(50)) + [4, 5] * 17, True),
        ([4, 5] * 30 + [6], False),
        (list(range(16)) * 3, True),
        (list(range(17)) * 3, False),
    ],
)
def test_looping_is_a_short_cycle_at_the_end(output: list[int], loops: bool) -> None:
    assert looping_share([output]) == float(loops)


def test_settings_that_mean_nothing_are_refused(untrained: Untrained) -> None:
    with pytest.raises(ValueError, match="chain_length=0"):
        decode_speculatively(
            untrained.decoder, untrained.drafter, [], DecodingSettings(chain_length=0)
        )
    with pytest.raises(ValueError, match=r"prompts \[0\] have no tokens"):
        decode_speculatively(
            untrained.decoder,
            untrained.drafter,
            [torch.empty(0, dtype=torch.int64)],
            DecodingSettings(),
        )
    with pytest.raises(ValueError, match="temperature=-1"):
        Sampler(-1.0, seed=0, device=CPU)
