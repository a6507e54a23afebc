"""The same prompts through SGLang, with the exported draft and without one, beside our own loop."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from colospec.checkpoint.public import CONFIG
from colospec.draft.base import DraftModel
from colospec.engine.sglang_install import check_installation
from colospec.engine.sglang_serving import VERSION, ServingJob
from colospec.evaluate.acceptance import (
    Acceptance,
    DecodingSettings,
    decode_speculatively,
    looping_share,
)
from colospec.evaluate.decoder import eos_token_ids
from colospec.evaluate.drafters import Drafter, GreedyProposals
from colospec.evaluate.served import Served, serve
from colospec.evaluate.target_decoder import TargetDecoder
from colospec.target import Target

log = logging.getLogger(__name__)

AGREEMENT = 0.03
MIN_CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Pair:
    """One batch size and temperature, with the draft and without it."""

    batch_size: int
    drafted: Acceptance
    plain: Acceptance

    @property
    def speedup(self) -> float:
        """Tokens per second relative to no draft."""
        return self.drafted.tokens_per_s / self.plain.tokens_per_s

    @property
    def num_lossless(self) -> int:
        """Prompts whose output is the same with and without the draft."""
        return len(same_outputs(self.drafted, self.plain))


@dataclass(frozen=True)
class ThroughSglang:
    """What SGLang measured, in the order in which it was measured."""

    drafted: Served
    plain: Served

    @property
    def pairs(self) -> list[Pair]:
        """One per temperature and batch size."""
        runs = zip(self.drafted.runs, self.plain.runs, strict=True)
        return [Pair(a.batch_size, a.acceptance, b.acceptance) for a, b in runs]

    def greedy(self) -> list[Pair]:
        """Return the pairs at temperature 0."""
        return [pair for pair in self.pairs if pair.drafted.temperature == 0]

    def to_dict(self, greedy: Acceptance, sampled: Acceptance | None) -> dict[str, Any]:
        """Return all numbers, ready for JSON; `greedy` and `sampled` as in `table`."""
        return {
            "sglang": self.drafted.version,
            "server_args": self.drafted.server_args,
            "runs": [_numbers(pair, greedy) for pair in self.pairs],
            "loop_with_greedy_proposals": sampled and sampled.to_dict(None),
        }

    def table(self, name: str, greedy: Acceptance, sampled: Acceptance | None) -> Table:
        """Return the table that a terminal shows for the draft `name`, beside what our loop
        measured: greedily, and sampled with greedy proposals, as SGLang's are."""
        loop = {one.temperature: one for one in (greedy, sampled) if one}
        table = Table(
            title=f"{name} through SGLang {self.drafted.version}",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            caption="loop: our own, proposing greedily as SGLang does; on same text: loop / length "
            "(prompts); exact: texts that do not depend on the draft",
        )
        names = ("batch", "T", "loop", "length", "on same text", "exact")
        for name in (*names, "tok/s", "no draft", "speedup"):
            table.add_column(name, justify="right", no_wrap=True)
        for pair in self.pairs:
            drafted, plain = pair.drafted, pair.plain
            table.add_row(
                str(pair.batch_size),
                f"{drafted.temperature:g}",
                f"{loop[drafted.temperature].acceptance_length:.2f}",
                f"{drafted.acceptance_length:.2f}",
                "-" if drafted.temperature else _on_same_text(drafted, greedy),
                "-" if drafted.temperature else f"{pair.num_lossless} of {len(plain.outputs)}",
                f"{drafted.tokens_per_s:.0f}",
                f"{plain.tokens_per_s:.0f}",
                f"{pair.speedup:.2f}",
            )
        return table


def check_machine(target: Target, device: torch.device) -> None:
    """Raise ValueError or RuntimeError where SGLang cannot decode with `target` on `device`, before
    anything is loaded."""
    is_cuda = device.type == "cuda" and torch.cuda.is_available()
    if not is_cuda or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        raise RuntimeError(
            "--through sglang needs a CUDA GPU of compute capability 9.0 or more (H100, H200, "
            f"...), and the device is {torch.cuda.get_device_name(device) if is_cuda else device}; "
            "--through loop measures acceptance without one"
        )
    if target.dtype not in DTYPES:
        raise ValueError(
            f"--through sglang: its kernels do not compute in {target.dtype}, the dtype of "
            f"{target.path}; add --dtype bfloat16"
        )
    try:
        installed = check_installation()
    except RuntimeError as error:
        raise RuntimeError(f"--through sglang: {error}") from None
    if installed.split()[0] != VERSION:
        raise RuntimeError(
            f"--through sglang drives the scheduler of SGLang {VERSION}, and {installed} is "
            f"installed; pip install --force-reinstall --no-deps sglang=={VERSION}"
        )


def arguments_of(model: DraftModel, directory: Path, chain_length: int) -> dict[str, Any]:
    """Return the arguments by which SGLang drafts with the export in `directory`.

    Raises ValueError for drafts, and lengths of proposals, that SGLang does not serve.
    """
    (named, *_) = json.loads((directory / CONFIG).read_text())["architectures"]
    written = model.public.architectures[0]
    if named != written:
        raise ValueError(
            f"SGLang does not load {directory}, whose architecture is {named}, not {written}; "
            "write it in SGLang's format: python -m colospec.checkpoint.export CHECKPOINT_DIR "
            "OUT_DIR --format sglang"
        )
    arguments = model.public.sglang_arguments(model.config, chain_length)
    return {**arguments, "speculative_draft_model_path": str(directory)}


def decode_through_sglang(
    target: Target,
    drafting: Mapping[str, dict[str, Any]],
    prompts: Sequence[Tensor],
    settings: DecodingSettings,
    *,
    device: torch.device,
    batch_sizes: Sequence[int],
    trust_remote_code: bool = False,
) -> Iterator[tuple[str, ThroughSglang]]:
    """Decode `prompts` ([n] token ids) greedily, and at `settings.temperature` if that is above 0.

    `drafting` is what `arguments_of` returned, by the name of the draft; one after another, each
    draft is compared with the same decoding without one. Raises RuntimeError where SGLang fails.
    """
    plain = ServingJob(
        target=str(target.path),
        dtype=str(target.dtype).removeprefix("torch."),
        device=str(device),
        trust_remote_code=trust_remote_code,
        prompts=[prompt.tolist() for prompt in prompts],
        batch_sizes=list(batch_sizes),
        temperatures=[0.0, settings.temperature] if settings.temperature else [0.0],
        max_new_tokens=settings.max_new_tokens,
        eos_token_ids=sorted(eos_token_ids(target)),
        speculative={},
    )
    log.info("starting SGLang without a draft")
    without = serve(plain)
    for name, arguments in drafting.items():
        log.info("starting SGLang with %s", name)
        yield name, ThroughSglang(serve(replace(plain, speculative=arguments)), without)


def greedily_proposed(
    decoder: TargetDecoder, drafter: Drafter, prompts: Sequence[Tensor], settings: DecodingSettings
) -> Acceptance | None:
    """Sample through our own loop with greedy proposals; None for a temperature of 0."""
    if not settings.temperature:
        return None
    prompts = [prompt.to(decoder.device) for prompt in prompts]
    return decode_speculatively(decoder, GreedyProposals(drafter), prompts, settings)


def same_outputs(one: Acceptance, other: Acceptance) -> list[int]:
    """Return the numbers of the prompts for which both gave the same text."""
    pairs = zip(one.outputs, other.outputs, strict=True)
    return [number for number, (ours, theirs) in enumerate(pairs) if ours == theirs]


def warn_if_apart(name: str, served: ThroughSglang, real: Acceptance) -> None:
    """Warn where SGLang's greedy acceptance length of the draft `name` is not that of our loop on
    the prompts for which both gave the same text: the weights are the same, and so should be what
    they accept.

    Other texts are no reason to warn: near-ties of bfloat16 turn with the shape of a batch.
    """
    for pair in served.greedy():
        same = same_outputs(pair.drafted, real)
        ours, theirs = real.length_on(same), pair.drafted.length_on(same)
        if abs(theirs / ours - 1) > AGREEMENT:
            log.warning(
                "%s: SGLang at batch size %d accepts %.3f and our loop %.3f tokens per step on the "
                "%d of %d prompts that both continue with the same text: the export may be wrong",
                *(name, pair.batch_size, theirs, ours, len(same), len(real.outputs)),
            )


def _on_same_text(drafted: Acceptance, loop: Acceptance) -> str:
    same = same_outputs(drafted, loop)
    if not same:
        return "- (0)"
    return f"{loop.length_on(same):.2f} / {drafted.length_on(same):.2f} ({len(same)})"


def _numbers(pair: Pair, loop: Acceptance) -> dict[str, Any]:
    drafted = pair.drafted
    numbers: dict[str, Any] = {}
    if not drafted.temperature:
        same = same_outputs(drafted, loop)
        numbers = {
            "num_prompts": len(drafted.outputs),
            "num_lossless": pair.num_lossless,
            "num_same_text_as_loop": len(same),
            "acceptance_length_on_same_text": drafted.length_on(same) if same else None,
            "loop_acceptance_length_on_same_text": loop.length_on(same) if same else None,
        }
    return numbers | {
        "batch_size": pair.batch_size,
        "temperature": drafted.temperature,
        "acceptance_length": drafted.acceptance_length,
        "conditional_rates": drafted.conditional_rates,
        "cumulative_rates": drafted.cumulative_rates,
        "num_steps": drafted.num_steps,
        "tokens_per_s": drafted.tokens_per_s,
        "plain_tokens_per_s": pair.plain.tokens_per_s,
        "speedup": pair.speedup,
        "looping_share": looping_share(drafted.outputs),
    }
