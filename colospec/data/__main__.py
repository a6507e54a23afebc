"""Tokenise ahead of a run, without GPUs: `python -m colospec.data PATH --tokenizer DIR`.

A run with the same settings then finds the tokenised data in the cache and starts at once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from colospec import log
from colospec.config import DataConfig
from colospec.data.dataset import Dataset, describe, prepare
from colospec.data.pack import Plan
from colospec.target import Target


def main() -> int:
    """Tokenise, print what came of it, and return the exit code."""
    arguments = parser().parse_args()
    log.to_console()
    config = config_from(arguments)
    try:
        config.check()
        dataset = prepare(
            config,
            tokenizer_path=arguments.tokenizer,
            vocab_size=arguments.vocab_size or Target.load(arguments.tokenizer).vocab_size,
            progress=log.is_terminal(),
        )
        text = summary(dataset, config)
    except (ValueError, RuntimeError) as error:
        log.console.print(f"error: {error}", style="red", markup=False)
        return 1
    sys.stdout.write(text)
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the command line; its defaults are those of `DataConfig`."""
    default = DataConfig()
    parser = argparse.ArgumentParser("python -m colospec.data", description=__doc__)
    add = parser.add_argument
    add("path", metavar="PATH", help="as data.path")
    add("--tokenizer", metavar="DIR", type=Path, required=True, help="directory of the target")
    add("--vocab-size", type=int, help="of the target (default: from DIR/config.json)")
    add("--max-length", type=int, default=default.max_length, help="as data.max_length")
    add("--token-budget", type=int, help="as data.token_budget; only for the fill rate")
    add("--max-sequences", type=int, default=default.max_sequences, help="likewise")
    add("--min-loss-tokens", type=int, default=default.min_loss_tokens)
    add(
        "--last-turn-only",
        action=argparse.BooleanOptionalAction,
        help="as data.last_turn_only; neither form: decided per sample",
    )
    add("--max-filtered-fraction", type=float, default=default.max_filtered_fraction)
    add("--num-workers", type=int, help="as data.num_workers")
    add("--cache-dir", metavar="DIR", help="as data.cache_dir")
    return parser


def config_from(arguments: argparse.Namespace) -> DataConfig:
    """Return the settings as a run would have them."""
    budget = arguments.token_budget or max(DataConfig.token_budget, arguments.max_length)
    return DataConfig(
        path=arguments.path,
        max_length=arguments.max_length,
        token_budget=budget,
        max_sequences=arguments.max_sequences,
        last_turn_only=arguments.last_turn_only,
        min_loss_tokens=arguments.min_loss_tokens,
        max_filtered_fraction=arguments.max_filtered_fraction,
        num_workers=arguments.num_workers,
        cache_dir=arguments.cache_dir,
    )


def summary(dataset: Dataset, config: DataConfig) -> str:
    """Return what a user wants to know of a tokenised dataset."""
    plan = Plan(
        dataset.lengths,
        dataset.num_loss_tokens,
        seed=0,
        token_budget=config.token_budget,
        max_sequences=config.max_sequences,
        fingerprint=dataset.fingerprint,
    )
    supervised = int(dataset.num_loss_tokens.sum())
    mean = dataset.num_tokens / len(dataset)
    facts = {
        "samples": f"{len(dataset):,}",
        "left out": describe(dataset.num_filtered),
        "tokens": f"{dataset.num_tokens:,} (mean {mean:.0f}, longest {dataset.lengths.max():,})",
        "supervised": f"{supervised:,} ({supervised / dataset.num_tokens:.1%})",
        "fill rate": f"{plan.fill_rate():.1%} of {config.token_budget:,} tokens a micro-batch",
        "micro-batches": f"{plan.estimate_steps(1, 1):,} an epoch; draft.max_blocks can make more",
        "directory": str(dataset.directory),
    }
    return "".join(f"{name:<15}{value}\n" for name, value in facts.items())


if __name__ == "__main__":
    sys.exit(main())
