"""`data.*`: what is trained on, how it is packed, and what is held out."""

from __future__ import annotations

from dataclasses import dataclass

from colospec.config.ranges import check_numbers


@dataclass
class DataConfig:
    path: str | None = None
    """A .json, .jsonl or .parquet file, a directory of them, or a Hugging Face datasets directory;
    null is the built-in demo text."""
    max_length: int = 2048
    """Longest sample in tokens; longer ones are filtered out and counted."""
    token_budget: int = 8192
    """Tokens per micro-batch: sizes ring slots, KV pool and activations. At least max_length."""
    max_sequences: int = 128
    """Most samples in one micro-batch."""
    last_turn_only: bool | None = None
    """Supervise only the last assistant turn; null decides per sample: on for templates that drop
    the reasoning of earlier turns. A row's own `last_turn_only` wins."""
    min_loss_tokens: int = 1
    """Samples with fewer supervised tokens are filtered out and counted."""
    max_filtered_fraction: float = 0.5
    """More filtered rows than this is an error."""
    num_workers: int | None = None
    """Most processes that tokenise, one for every 16 MiB of input; null allows one per core."""
    cache_dir: str | None = None
    """Where tokenised data is kept; null is $XDG_CACHE_HOME/colospec."""
    held_out_path: str | None = None
    """Samples to evaluate on, in the forms of `path`; null takes them from `path`. What of `path`
    equals one of them is not trained on."""
    held_out_samples: int = 0
    """Most samples to evaluate on, drawn by the data's fingerprint alone; 0 is all of
    held_out_path, and none of `path`."""

    def check(self) -> None:
        """Raise ValueError for the first setting that cannot work."""
        check_numbers(
            self,
            prefix="data.",
            at_least={
                "held_out_samples": 0,
                "max_length": 4,
                "max_sequences": 1,
                "min_loss_tokens": 1,
                "max_filtered_fraction": 0,
                "num_workers": 1,
            },
            at_most_one=("max_filtered_fraction",),
        )
        if self.token_budget < self.max_length:
            raise ValueError(
                f"data.token_budget={self.token_budget} is less than data.max_length="
                f"{self.max_length}: the longest sample would fit no micro-batch; "
                f"set data.token_budget={self.max_length} or lower data.max_length"
            )
