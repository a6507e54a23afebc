"""The process that decodes through SGLang: a job on its input, one line of JSON per result.

    python -m colospec.engine.sglang_serving < job.json

SGLang's state is global and its memory is only given back when a process ends, so each set of
models runs in a process of its own; `colospec.evaluate.served` starts it.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import torch

from colospec.engine.sglang_args import attention_backend
from colospec.engine.sglang_imports import prepare
from colospec.engine.sglang_scheduler import UNUSED, InProcessScheduler, Sampling
from colospec.target import Target

# The version whose scheduler this drives.
VERSION = "0.5.17"
# A few steps of a small target are over sooner than a clock can tell.
MIN_TIMED_S = 1.0
# Of the memory that is free at start; the pool is sized by the prompts, not by this.
MEM_FRACTION = 0.9
RESERVE_TOKENS = 32


@dataclass(frozen=True)
class ServingJob:
    """What to decode, and with which models.

    `speculative` are arguments of SGLang that begin with `speculative_`; none decodes without a
    draft. Each of `prompts` (token ids) is decoded at each of `temperatures` with each of
    `batch_sizes` prompts at a time.
    """

    target: str
    dtype: str
    device: str
    trust_remote_code: bool
    prompts: list[list[int]]
    batch_sizes: list[int]
    temperatures: list[float]
    max_new_tokens: int
    eos_token_ids: list[int]
    speculative: dict[str, Any]


def server_args(job: ServingJob) -> dict[str, Any]:
    """Return SGLang's arguments for `job`: memory for its largest batch, graphs for each batch."""
    target = Target.load(job.target, dtype=job.dtype)
    device = torch.device(job.device)
    largest = max(job.batch_sizes)
    # Two verify steps may be under way beside the one that is being taken back.
    proposed = 4 * int(job.speculative.get("speculative_num_draft_tokens", 1))
    each = max(map(len, job.prompts)) + job.max_new_tokens + proposed + RESERVE_TOKENS
    graphs: dict[str, Any] = {"disable_cuda_graph": True}
    if device.type == "cuda":
        graphs = {"disable_prefill_cuda_graph": True, "cuda_graph_bs_decode": job.batch_sizes}
    return {
        "model_path": job.target,
        "trust_remote_code": job.trust_remote_code,
        "dtype": job.dtype,
        "device": device.type,
        "attention_backend": attention_backend(target, target.dtype, device),
        "max_total_tokens": largest * each,
        "max_running_requests": largest,
        "mem_fraction_static": MEM_FRACTION,
        "page_size": 1,
        "disable_radix_cache": True,
        "chunked_prefill_size": -1,
        "disable_custom_all_reduce": True,
        "enforce_disable_flashinfer_allreduce_fusion": True,
        "skip_tokenizer_init": True,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "random_seed": 0,
        # It would end the parent, by SIGQUIT; whoever started this has deadlines of its own.
        "watchdog_timeout": None,
        **graphs,
        **job.speculative,
    }


def run(job: ServingJob, out: TextIO) -> None:
    """Do `job`; write a line that says what was started, then a line per batch size and
    temperature.

    The prompts are repeated until they fill a batch, and decoded first reporting each step, then
    against the clock, again and again for `MIN_TIMED_S`. Both see the same batches: Triton compiles
    kernels for each power of two of their sizes, and none may be new to the clock.
    """
    device = torch.device(job.device)
    prepare(device.type, also_absent=UNUSED)
    logging.getLogger("sglang").handlers = [logging.StreamHandler()]
    arguments = server_args(job)
    scheduler = InProcessScheduler(arguments, gpu=device.index or 0)
    _write(out, {"sglang": importlib.metadata.version("sglang"), "server_args": arguments})
    for temperature in job.temperatures:
        sampling = Sampling(job.max_new_tokens, temperature, tuple(job.eos_token_ids))
        for size in job.batch_sizes:
            # A batch must be full to be one.
            prompts = job.prompts * -(-size // len(job.prompts))
            decoded, _ = scheduler.decode(prompts, sampling, concurrency=size, each_step=True)
            num_tokens, seconds = 0, 0.0
            while seconds < MIN_TIMED_S:
                timed, took = scheduler.decode(prompts, sampling, concurrency=size, each_step=False)
                num_tokens += sum(len(chunk) for one in timed for chunk in one.chunks)
                seconds += took
            _write(
                out,
                {
                    "temperature": temperature,
                    "batch_size": size,
                    "requests": [asdict(one) for one in decoded[: len(job.prompts)]],
                    "num_timed_tokens": num_tokens,
                    "seconds": seconds,
                },
            )


def _write(out: TextIO, line: dict[str, Any]) -> None:
    out.write(json.dumps(line) + "\n")
    out.flush()


def main() -> None:
    """Read the job from the standard input; results alone go to the standard output."""
    code = 1
    try:
        with os.fdopen(os.dup(1), "w") as out:
            # Whatever SGLang or a compiler prints belongs to the log.
            os.dup2(2, 1)
            job = ServingJob(**json.load(sys.stdin))
            run(job, out)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        # SGLang's threads would keep the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
