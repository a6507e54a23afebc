"""SGLang's scheduler inside this process: prompts in, tokens and acceptance counts out.

It is the scheduler that SGLang's server and its offline Engine run, with its event loop, its model
workers and its speculative decoding; only its sockets are replaced, so that it needs no tokenizer,
detokenizer or HTTP server. SGLang's state is global: one scheduler per process.
"""

from __future__ import annotations

import importlib
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from colospec.engine import sglang_imports

# What it imports and never calls: servers, and kernels of attention that no draft here uses.
UNUSED = ("setproctitle", "fastapi", "uvicorn", "uvloop", "deep_gemm")


@dataclass
class Decoded:
    """What became of one prompt.

    `chunks` are the tokens that each report brought, the prefill's one token first; what lies
    behind the limit is cut off. `num_steps` and `num_accepted` are SGLang's own counts of verify
    steps and of draft tokens accepted in them, where nothing is cut off. `finish` is "stop" for an
    end-of-text token, "length" for the limit, anything else for a failure that `message` explains.
    """

    chunks: list[list[int]] = field(default_factory=list)
    num_steps: int = 0
    num_accepted: int = 0
    finish: str | None = None
    message: str = ""


@dataclass(frozen=True)
class Sampling:
    """How to decode; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    eos_token_ids: tuple[int, ...] = ()


class InProcessScheduler:
    """Decodes sets of prompts, a fixed number of them at a time."""

    def __init__(self, server_args: dict[str, Any], *, gpu: int = 0) -> None:
        """Load the models on GPU number `gpu`, allocate the pools and capture the graphs.

        Raises what SGLang raises where it refuses them, RuntimeError where it cannot be imported.
        """
        sglang_imports.prepare(server_args["device"], also_absent=UNUSED)
        arguments: Any = importlib.import_module("sglang.srt.server_args")
        context: Any = importlib.import_module("sglang.srt.runtime_context")
        network: Any = importlib.import_module("sglang.srt.utils.network")
        settings = arguments.ServerArgs(**server_args)
        context.publish(settings, role="scheduler")
        self._requests: dict[str, Decoded] = {}
        self._waiting: list[Any] = []
        self._concurrency = 0
        self._last_report = 0.0
        ports = SimpleNamespace(nccl_port=network.get_free_port(), instance_id="")
        self._scheduler = self._open(settings, ports, gpu)

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        concurrency: int,
        each_step: bool,
    ) -> tuple[list[Decoded], float]:
        """Decode all prompts, `concurrency` of them at a time; return them and the seconds taken.

        With `each_step` every decoding step is a chunk of its own; without it a request is reported
        rarely, as a server does that does not stream.
        """
        self._requests = {str(number): Decoded() for number in range(len(prompts))}
        self._waiting = [
            self._request(str(number), prompt, sampling, each_step)
            for number, prompt in enumerate(prompts)
        ]
        self._concurrency = concurrency
        # Otherwise generation_config.json may add some that config.json does not have.
        self._scheduler.model_config.hf_eos_token_id = set(sampling.eos_token_ids)
        self._scheduler.gracefully_exit = False
        began = time.perf_counter()
        self._scheduler.run_event_loop()
        return list(self._requests.values()), self._last_report - began

    def _request(
        self, name: str, prompt: Sequence[int], sampling: Sampling, each_step: bool
    ) -> Any:
        structs: Any = importlib.import_module("sglang.srt.managers.io_struct")
        module: Any = importlib.import_module("sglang.srt.sampling.sampling_params")
        parameters = module.SamplingParams(
            max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature
        )
        parameters.normalize(None)
        return structs.TokenizedGenerateReqInput(
            rid=name,
            input_text=None,
            input_ids=array("q", prompt),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=parameters,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=each_step,
        )

    def _open(self, settings: Any, ports: Any, gpu: int) -> Any:
        module: Any = importlib.import_module("sglang.srt.managers.scheduler")

        def init_ipc_channels(scheduler: Any, _ports: Any) -> None:
            out = SimpleNamespace(send_output=self._receive)
            scheduler.ipc_channels = SimpleNamespace(
                recv_from_tokenizer=None,
                recv_from_rpc=None,
                send_to_tokenizer=out,
                send_to_detokenizer=out,
                send_metrics_from_scheduler=None,
            )
            scheduler.recv_from_tokenizer = None
            scheduler.load_snapshot_writer = None

        def init_request_receiver(scheduler: Any) -> None:
            scheduler.request_receiver = SimpleNamespace(recv_requests=self._next_requests)

        without_sockets: Any = type(
            "SchedulerWithoutSockets",
            (module.Scheduler,),
            {
                "init_ipc_channels": init_ipc_channels,
                "init_request_receiver": init_request_receiver,
            },
        )
        return without_sockets(
            settings,
            ports,
            gpu_id=gpu,
            tp_rank=0,
            moe_ep_rank=0,
            pp_rank=0,
            attn_cp_rank=0,
            moe_dp_rank=0,
            dp_rank=None,
        )

    def _next_requests(self) -> list[Any]:
        """Answer the event loop, which asks before each step."""
        unfinished = sum(one.finish is None for one in self._requests.values())
        free = self._concurrency - (unfinished - len(self._waiting))
        given, self._waiting = self._waiting[:free], self._waiting[free:]
        # The loop may still have to take back a step that it began before the last request ended.
        if not unfinished and self._scheduler.last_batch is None:
            self._scheduler.gracefully_exit = True
        return given

    def _receive(self, output: Any, _request: Any = None) -> None:
        self._last_report = time.perf_counter()
        for place, name in enumerate(output.rids):
            one = self._requests[name]
            one.chunks.append(list(output.output_ids[place]))
            if output.spec_verify_ct:
                one.num_steps = output.spec_verify_ct[place]
                one.num_accepted = output.spec_num_correct_drafts[place]
            if reason := output.finished_reasons[place]:
                one.finish, one.message = reason["type"], str(reason.get("message", ""))
