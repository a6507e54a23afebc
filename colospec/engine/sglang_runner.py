"""Start SGLang's ModelRunner inside this process: its world, its memory, its weights.

SGLang takes torch.distributed's default group for its whole world. An engine replica's default
group is exactly its tp ranks, so nothing of SGLang is changed for that. Where this rank is one of
several that each run an engine of their own (mode=alternate), SGLang is shown a world of one.
"""

from __future__ import annotations

import importlib
import io
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from colospec.config import Weights
from colospec.engine.base import EngineSettings
from colospec.engine.sglang_args import forward_rows, longest_document, server_args
from colospec.target import Target

log = logging.getLogger(__name__)

DEFAULT_STD = 0.02
# What SGLang raises where it does not know a model, or knows it by an older transformers.
_REFUSALS = (
    AssertionError,
    AttributeError,
    ImportError,
    KeyError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
)
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def start_runner(settings: EngineSettings) -> Any:
    """Load the target and allocate the pools; return SGLang's ModelRunner.

    Raises ValueError for a target or settings that SGLang cannot serve here, RuntimeError where a
    second engine is started in one process or the GPU has too little memory.
    """
    parallel: Any = importlib.import_module("sglang.srt.distributed.parallel_state")
    if parallel._WORLD is not None:
        raise RuntimeError(
            "SGLang's state is global: one engine=sglang per process, and this process had one"
        )
    arguments = server_args(settings)
    with replica_world(settings.config.tp), _explained(settings):
        runner = _build(settings, arguments)
    check_windows(runner.model, settings)
    with _explained(settings):
        runner.alloc_memory_pool()
    _check_pool(runner, settings)
    with _explained(settings):
        runner.init_attention_backends()
    if settings.weights is Weights.random:
        std = settings.target.hf_config.get("initializer_range") or DEFAULT_STD
        fill_randomly(runner.model, float(std))
    return runner


def check_world(tp: int) -> None:
    """Raise ValueError where this rank's world has other than `tp` ranks and tp is not 1."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    if tp not in (1, size):
        raise ValueError(
            f"engine.tp={tp}, but the process group of this rank has {size} ranks; "
            f"set engine.tp={size}"
        )


def check_target(target: Target) -> None:
    """Raise ValueError for kinds of targets that the engine cannot prefill yet."""
    config, reason = target.hf_config, None
    kinds = set(config.get("layer_types") or ()) - ATTENTION
    if kinds or "mamba_d_state" in config:
        reason = f"it has layers that keep a state ({', '.join(sorted(kinds)) or 'Mamba'})"
    for name in ("rope_parameters", "rope_scaling"):
        if "mrope_section" in (config.get(name) or {}):
            reason = "its rotary embedding has three axes (M-RoPE)"
    if reason is not None:
        raise ValueError(
            f"engine=sglang cannot capture {target.path} yet, because {reason}; set engine=hf"
        )


def check_windows(model: nn.Module, settings: EngineSettings) -> None:
    """Raise ValueError where documents are longer than the target's sliding window and SGLang's
    model attends to everything: it would capture other states than the target has."""
    config = settings.target.hf_config
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if not window or config.get("use_sliding_window", True) is False:
        return
    if window >= longest_document(settings) or (kinds and "sliding_attention" not in kinds):
        return
    if not any((getattr(m, "sliding_window_size", None) or -1) > -1 for m in model.modules()):
        raise ValueError(
            f"SGLang's {type(model).__name__} ignores sliding_window={window} of "
            f"{settings.target.path}; set data.max_length={window} or engine=hf"
        )


@contextmanager
def replica_world(tp: int) -> Iterator[None]:
    """Make the default process group a world of `tp` ranks in SGLang's eyes.

    A process without a group gets one of its own.
    """
    if not dist.is_initialized():
        dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_world_size() == tp:
        yield
    else:
        with _alone():
            yield


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


@contextmanager
def _alone() -> Iterator[None]:
    """Show this rank as a world of one; groups made meanwhile have it as their only member."""
    this_rank, new_group = dist.get_rank(), dist.new_group
    names = ("get_rank", "get_world_size", "new_group")
    real = {name: getattr(dist, name) for name in names}

    def new_group_of_one(_ranks: object = None, **options: Any) -> Any:
        return new_group([this_rank], use_local_synchronization=True, **options)

    pretended = (lambda *_: 0, lambda *_: 1, new_group_of_one)
    try:
        for name, function in zip(names, pretended, strict=True):
            setattr(dist, name, function)
        yield
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


@contextmanager
def _explained(settings: EngineSettings) -> Iterator[None]:
    """Say what to do where SGLang refuses, and keep its progress bars, one a replica, off the
    console."""
    bars = io.StringIO()
    try:
        with redirect_stderr(bars):
            yield
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"the target {settings.target.path} does not fit this rank's share of "
            f"{settings.device} ({error}); raise memory.engine_fraction or engine.tp"
        ) from error
    except _REFUSALS as error:
        raise ValueError(
            f"SGLang cannot serve the target {settings.target.path} with engine.server_args="
            f"{settings.config.server_args}: {type(error).__name__}: {error}; change "
            "engine.server_args, or set engine=hf to run it through transformers"
        ) from error
    finally:
        if text := bars.getvalue().strip():
            log.debug("SGLang said: %s", text)


def _build(settings: EngineSettings, arguments: Any) -> Any:
    model_config: Any = importlib.import_module("sglang.srt.configs.model_config").ModelConfig
    state: Any = importlib.import_module(
        "sglang.srt.distributed.parallel_state_wrapper"
    ).ParallelState
    tp, tp_rank = settings.config.tp, dist.get_rank()
    gpu = (settings.device.index or 0) if settings.device.type == "cuda" else 0
    return _runner_class()(
        model_config=model_config.from_server_args(arguments),
        mem_fraction_static=arguments.mem_fraction_static,
        gpu_id=gpu,
        ps=state.trivial(
            tp_rank=tp_rank, tp_size=tp, attn_tp_rank=tp_rank, attn_tp_size=tp, gpu_id=gpu
        ),
        nccl_port=0,
        server_args=arguments,
    )


def _runner_class() -> Any:
    stock: Any = importlib.import_module("sglang.srt.model_executor.model_runner").ModelRunner

    def init_threads_binding(self: Any) -> None:
        # On a CPU the stock one demands a NUMA node for each rank.
        self.local_omp_cpuid = "all"

    return type("PrefillRunner", (stock,), {"init_threads_binding": init_threads_binding})


def _check_pool(runner: Any, settings: EngineSettings) -> None:
    """Raise RuntimeError unless one forward pass fits the pools."""
    rows = forward_rows(settings)
    requests = runner.req_to_token_pool.req_to_token.shape[0] - 1
    if runner.max_total_num_tokens < rows or requests < settings.max_sequences:
        raise RuntimeError(
            f"the KV pool of one forward pass ({rows} tokens, {settings.max_sequences} documents) "
            f"does not fit the free memory of {settings.device}: room for "
            f"{runner.max_total_num_tokens} tokens; set engine.forward_tokens or a lower "
            "data.token_budget, or raise engine.tp"
        )
    if runner.page_size != 1:
        raise ValueError(
            f"attention_backend={runner.server_args.attention_backend} needs pages of "
            f"{runner.page_size} tokens, and the engine uses pages of 1; "
            "set +engine.server_args.attention_backend=triton"
        )


def free_memory(runner: Any) -> None:
    """Empty the model and the KV pool in place: SGLang's globals keep them alive."""
    tensors: list[Any] = [*runner.model.parameters(), *runner.model.buffers()]
    for value in vars(runner.token_to_kv_pool).values():
        tensors += value if isinstance(value, list) else [value]
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            tensor.data = tensor.data.new_empty(0)


def fill_randomly(model: nn.Module, std: float) -> None:
    """Fill the parameters by name: vectors of weights 1, biases 0, matrices normal(0, `std`).

    The same name gets the same values in every process, so that replicated parameters agree.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter, std)


def _fill(name: str, parameter: torch.Tensor, std: float) -> None:
    if not parameter.is_floating_point():
        return
    if "scale" in name:
        parameter.fill_(std)
    elif parameter.dim() < 2:
        parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    else:
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        if parameter.dtype.itemsize == 1:
            # Quantised: the scales carry `std`.
            shape, device = parameter.shape, parameter.device
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
            parameter.copy_(values)
        else:
            parameter.normal_(0.0, std, generator=generator)
