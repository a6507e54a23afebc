"""Acceptance length and speed through SGLang's own speculative decoding.

The prompts are decoded in processes that run SGLang's scheduler. This and the loop of
`colospec.evaluate.acceptance` count alike: the prefill's token belongs to no verify step, a step
that an end-of-text token cuts short counts what lies before the cut, and a step that the limit of
new tokens cuts short counts in full.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import IO, Any

from colospec.engine.sglang_serving import ServingJob
from colospec.evaluate.acceptance import Acceptance
from colospec.mps.keeper import die_with

START_S = 900.0
# For the kernels that a batch size compiles at its first step.
WARM_UP_S = 300.0
STEP_S = 0.5
LAST_LINES = 20


@dataclass(frozen=True)
class ServedRun:
    """All prompts decoded once with `batch_size` of them at a time.

    `acceptance` counts every step; its tokens and seconds are those of further runs against the
    clock. In all of them the prompts are repeated until they fill a batch.
    """

    batch_size: int
    acceptance: Acceptance


@dataclass(frozen=True)
class Served:
    """What one process measured; `server_args` are the arguments that SGLang was given."""

    version: str
    server_args: dict[str, Any]
    runs: list[ServedRun]


def serve(job: ServingJob) -> Served:
    """Run `job` in a process of its own and wait for it.

    Raises RuntimeError, with the last lines that it printed, where the process fails, takes longer
    than any serving engine should, or loses a request.
    """
    what = job.speculative.get("speculative_algorithm", "no draft")
    with (
        tempfile.TemporaryFile("w+") as log,
        tempfile.TemporaryFile("w+") as order,
        _process(job, order, log) as process,
    ):
        lines = _lines(process, _deadlines(job), f"SGLang with {what}", log)
        started = next(lines)
        runs = [_run(line, job) for line in lines]
    return Served(started["sglang"], started["server_args"], runs)


def count_steps(
    request: dict[str, Any], *, eos_token_ids: frozenset[int], num_proposed: int
) -> tuple[list[int], list[int]]:
    """Return the output of a request that reported each step, and the accepted tokens per step.

    `num_proposed` (K) tokens are proposed in each step. Raises RuntimeError for counts that
    contradict each other.
    """
    prefill, *steps = request["chunks"]
    whole = 1 + request["num_steps"] + request["num_accepted"]
    cut_off = whole - sum(map(len, request["chunks"])) if num_proposed else 0
    output, accepted = list(prefill), []
    for step in steps:
        ends = [place for place, token in enumerate(step) if token in eos_token_ids]
        gained = step[: ends[0] + 1] if ends else step
        beyond = cut_off if step is steps[-1] and not ends else 0
        output += gained
        accepted.append(len(gained) - 1 + beyond)
    if num_proposed and (
        len(steps) != request["num_steps"] or not all(0 <= n <= num_proposed for n in accepted)
    ):
        raise RuntimeError(
            f"SGLang reports {request['num_steps']} verify steps and {request['num_accepted']} "
            f"accepted tokens, but these steps of at most {num_proposed}: {accepted}"
        )
    return output, accepted


def _run(line: dict[str, Any], job: ServingJob) -> ServedRun:
    # A block counts the token that it starts from; so does the chain that is verified.
    num_proposed = int(job.speculative.get("speculative_num_draft_tokens", 1)) - 1
    result = Acceptance(num_proposed, line["temperature"])
    result.num_reached = [0] * num_proposed
    for number, request in enumerate(line["requests"]):
        _check_finished(request, number, job)
        output, accepted = count_steps(
            request, eos_token_ids=frozenset(job.eos_token_ids), num_proposed=num_proposed
        )
        result.add_prompt(output, accepted)
    result.num_tokens, result.seconds = line["num_timed_tokens"], line["seconds"]
    return ServedRun(line["batch_size"], result)


def _check_finished(request: dict[str, Any], number: int, job: ServingJob) -> None:
    length = sum(map(len, request["chunks"]))
    if request["finish"] == "stop":
        return
    if request["finish"] != "length":
        raise RuntimeError(
            f"SGLang gave up prompt {number} of {len(job.prompts[number])} tokens "
            f"({request['finish']}): {request['message'] or 'no reason given'}"
        )
    if length < job.max_new_tokens:
        raise RuntimeError(
            f"SGLang ended prompt {number} of {len(job.prompts[number])} tokens after {length} "
            f"new ones; its context has no room for --max-new-tokens {job.max_new_tokens}"
        )


def _deadlines(job: ServingJob) -> Iterator[tuple[str, float]]:
    """Yield what is waited for next, and for how many seconds at most."""
    yield "loading the models", START_S
    for temperature in job.temperatures:
        for size in job.batch_sizes:
            num_steps = 2 * job.max_new_tokens * -(-max(len(job.prompts), size) // size)
            phase = f"batch size {size}, temperature {temperature:g}"
            yield phase, WARM_UP_S + STEP_S * num_steps


@contextmanager
def _process(job: ServingJob, order: IO[str], log: IO[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start the child; whatever happens, it and all that it started are gone afterwards."""
    json.dump(asdict(job), order)
    order.seek(0)
    process = subprocess.Popen(
        [sys.executable, "-m", "colospec.engine.sglang_serving"],
        stdin=order,
        stdout=subprocess.PIPE,
        stderr=log,
        start_new_session=True,
        preexec_fn=die_with(os.getpid()),
    )
    with process:
        try:
            yield process
        finally:
            # The group outlives its leader if that left compilers behind.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _lines(
    process: subprocess.Popen[bytes],
    deadlines: Iterator[tuple[str, float]],
    name: str,
    log: IO[str],
) -> Iterator[dict[str, Any]]:
    """Yield one line of the child per deadline."""
    assert process.stdout is not None
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        for phase, seconds in deadlines:
            deadline = time.monotonic() + seconds
            while b"\n" not in pending:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise RuntimeError(
                        f"{name} did not answer within {seconds:.0f} s ({phase}); it said:\n"
                        f"{_last_words(log)}"
                    )
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    raise RuntimeError(
                        f"{name} ended with code {process.wait(timeout=60)} ({phase}); it said:\n"
                        f"{_last_words(log)}"
                    )
                pending += part
            line, pending = pending.split(b"\n", 1)
            yield json.loads(line)


def _last_words(log: IO[str]) -> str:
    log.seek(0)
    lines: Sequence[str] = log.read().splitlines()
    kept = [line for line in lines if "Ignore import error" not in line]
    return "\n".join(kept[-LAST_LINES:])
