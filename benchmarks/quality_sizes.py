"""How much of everything bench_quality.py does, on a GPU and, to try it, on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quality_target import Shape


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `*_s` are budgets in seconds.

    `reference_s` bounds the reference loop, which keeps what it has measured by then, and `total_s`
    the whole: what SGLang serves is left out where it does not suffice.
    """

    shape: Shape
    text_bytes: int
    tokenizer_bytes: int
    target_s: float
    window: int
    batch: int
    samples_s: float
    sample_batch: int
    sample_tokens: int
    prompt_tokens: int
    draft_steps: int
    token_budget: int
    overrides: dict[str, tuple[str, ...]]
    num_prompts: int
    loss_texts: int
    num_processes: int
    served_prompts: int
    max_new_tokens: int
    chain_length: int
    reference_s: float
    total_s: float

    @property
    def draft_tokens(self) -> int:
        """How many tokens each draft reads."""
        return self.draft_steps * self.token_budget

    def scaled(self, share: float) -> Sizes:
        """Return the sizes of a run that is `share` as long."""
        return replace(
            self,
            target_s=self.target_s * share,
            samples_s=self.samples_s * share,
            draft_steps=max(1, round(self.draft_steps * share)),
        )


FULL = Sizes(
    shape=Shape(16384, 768, 2560, 12, 12, 4, 64),
    text_bytes=160_000_000, tokenizer_bytes=24_000_000,
    target_s=50.0, window=1024, batch=32,
    samples_s=36.0, sample_batch=4096, sample_tokens=512, prompt_tokens=64,
    draft_steps=2000, token_budget=4096,
    overrides={
        "eagle3": ("trainer.lr=1e-3", "draft.draft_vocab_size=null"),
        "dflash": (
            "trainer.lr=1e-3", "draft.block_size=8", "draft.decay_gamma=4.0",
            "draft.num_anchors=128", "trainer.max_grad_norm=1.0", "trainer.warmup_fraction=0.04",
        ),
    },
    num_prompts=48, loss_texts=12, num_processes=12, served_prompts=8, max_new_tokens=64,
    chain_length=7, reference_s=110.0, total_s=590.0,
)  # fmt: skip
TINY = Sizes(
    shape=Shape(1024, 64, 128, 4, 4, 2, 16),
    text_bytes=2_000_000, tokenizer_bytes=500_000,
    target_s=6.0, window=128, batch=8,
    samples_s=3.0, sample_batch=32, sample_tokens=96, prompt_tokens=32,
    draft_steps=20, token_budget=512,
    overrides={
        "eagle3": ("trainer.lr=3e-3", "draft.draft_vocab_size=null", "draft.ttt_length=3"),
        "dflash": ("trainer.lr=3e-3", "draft.block_size=4", "draft.num_layers=2"),
    },
    num_prompts=4, loss_texts=2, num_processes=2, served_prompts=2, max_new_tokens=16,
    chain_length=3, reference_s=110.0, total_s=590.0,
)  # fmt: skip
