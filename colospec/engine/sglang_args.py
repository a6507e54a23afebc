"""SGLang's ServerArgs for a prefill of hidden states, and which of them a user may set."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import logging
from typing import Any

import torch

from colospec.config import Weights
from colospec.engine.base import EngineSettings
from colospec.target import Target

log = logging.getLogger(__name__)

# Head sizes at which FA3 was measured; it is 1 to 7 % faster than triton there.
FA3_HEAD_DIMS = (64, 128)
FA3_DTYPES = (torch.bfloat16, torch.float16)
# Shares of free memory say nothing beside a trainer: the pool is sized by max_total_tokens.
MEM_FRACTION = 0.98

_OF_TOPOLOGY = "every engine replica is engine.tp ranks of this job and nothing else"
_NO_SERVER = "the engine has no server, scheduler or sampler"
_POOL = "the KV pool is scratch of one forward pass; data.* and engine.forward_tokens size it"
_HIDDEN = "the captured hidden states would not be those of the target"
_REFUSED = {
    "model_path": "set target.path",
    "tokenizer_path": "the engine has no tokenizer",
    "trust_remote_code": "set target.trust_remote_code",
    "dtype": "set target.dtype",
    "load_format": "set target.weights",
    "device": "the engine runs on the device of its rank; see topology.gpus",
    "base_gpu_id": "the engine runs on the device of its rank; see topology.gpus",
    "gpu_id_step": "the engine runs on the device of its rank; see topology.gpus",
    "tp_size": "set engine.tp",
    "context_length": "set data.max_length",
    "max_total_tokens": _POOL,
    "max_running_requests": "set data.max_sequences",
    "mem_fraction_static": _POOL,
    "page_size": _POOL,
    "kv_cache_dtype": _HIDDEN,
    "prefill_only_disable_kv_cache": _POOL,
    "disable_hybrid_swa_memory": _POOL,
    "enable_unified_memory": _POOL,
    "enable_page_major_kv_layout": _POOL,
    "enable_hierarchical_cache": _POOL,
    "enable_hisparse": _POOL,
    "disable_radix_cache": _POOL,
    "chunked_prefill_size": "set engine.forward_tokens",
    "disable_cuda_graph": "the shape of every forward pass is another",
    "cuda_graph_config": "the shape of every forward pass is another",
    "enable_torch_compile": "the shape of every forward pass is another",
    "disable_overlap_schedule": _NO_SERVER,
    "skip_tokenizer_init": _NO_SERVER,
    "sampling_backend": _NO_SERVER,
    "grammar_backend": _NO_SERVER,
    "host": _NO_SERVER,
    "port": _NO_SERVER,
    "nccl_port": _OF_TOPOLOGY,
    "dist_init_addr": _OF_TOPOLOGY,
    "nnodes": _OF_TOPOLOGY,
    "node_rank": _OF_TOPOLOGY,
    "use_ray": _OF_TOPOLOGY,
    "pp_size": _OF_TOPOLOGY,
    "dp_size": _OF_TOPOLOGY,
    "dcp_size": _OF_TOPOLOGY,
    "ep_size": _OF_TOPOLOGY,
    "attn_cp_size": _OF_TOPOLOGY,
    "moe_dp_size": _OF_TOPOLOGY,
    "dwdp_size": _OF_TOPOLOGY,
    "moe_dense_tp_size": _OF_TOPOLOGY,
    "enable_dp_attention": _OF_TOPOLOGY,
    "enable_dp_lm_head": _OF_TOPOLOGY,
    "enable_prefill_cp": _OF_TOPOLOGY,
    "enable_attn_tp_input_scattered": _HIDDEN,
    "elastic_ep_backend": _OF_TOPOLOGY,
    "enable_eplb": _OF_TOPOLOGY,
    "enable_pdmux": _NO_SERVER,
    "disaggregation_mode": _NO_SERVER,
    "enable_two_batch_overlap": _HIDDEN,
    "enable_single_batch_overlap": _HIDDEN,
    "disable_custom_all_reduce": "it would map memory of other processes beside CUDA MPS",
    "enable_symm_mem": "NVLink multicast must stay off beside CUDA MPS",
    "enable_torch_symm_mem": "NVLink multicast must stay off beside CUDA MPS",
    "enable_nccl_nvls": "NVLink multicast must stay off beside CUDA MPS",
    "enable_mscclpp": "it would map memory of other processes beside CUDA MPS",
    "enable_flashinfer_allreduce_fusion": _HIDDEN,
    "enforce_disable_flashinfer_allreduce_fusion": _HIDDEN,
    "enable_aiter_allreduce_fusion": _HIDDEN,
    "enable_quant_communications": _HIDDEN,
    "enable_lora": _HIDDEN,
    "lora_paths": _HIDDEN,
    "is_embedding": _HIDDEN,
}
_REFUSED_PREFIXES = {
    "speculative_": "the engine runs the target alone; evaluate decodes with a draft",
    "cuda_graph_": "the shape of every forward pass is another",
    "disaggregation_": _NO_SERVER,
    "hicache_": _POOL,
}


def server_args(settings: EngineSettings) -> Any:
    """Build ServerArgs: what `engine.server_args` says, and around it what the engine needs.

    Raises ValueError for keys that SGLang does not have (naming similar ones) or that cannot work
    here (naming the reason), and for values that SGLang refuses.
    """
    kind: Any = importlib.import_module("sglang.srt.server_args").ServerArgs
    chosen = {str(key): value for key, value in settings.config.server_args.items()}
    check_keys(chosen, {field.name for field in dataclasses.fields(kind)})
    if "attention_backend" not in chosen:
        chosen["attention_backend"] = attention_backend(
            settings.target, settings.spec.dtype, settings.device
        )
    try:
        return kind(**_needed(settings), **chosen)
    except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"SGLang refuses {settings.target.path} with engine.server_args="
            f"{settings.config.server_args}: {error}; change engine.server_args or set engine=hf"
        ) from error


def check_keys(chosen: dict[str, Any], known: set[str]) -> None:
    """Raise ValueError for the first key that is unknown to SGLang or refused here."""
    for key in chosen:
        if key not in known:
            similar = difflib.get_close_matches(key, known, n=3)
            hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
            raise ValueError(f"engine.server_args.{key} is no argument of SGLang's server{hint}")
        if reason := _reason(key):
            raise ValueError(f"engine.server_args.{key} cannot be set ({reason}); remove it")


def forward_rows(settings: EngineSettings) -> int:
    """Return the most tokens that one forward pass has."""
    whole = settings.max_tokens
    per_forward = settings.config.forward_tokens or whole
    return min(whole, max(per_forward, longest_document(settings)))


def longest_document(settings: EngineSettings) -> int:
    """Return the length in tokens that no document exceeds."""
    return min(settings.max_tokens, settings.max_length or settings.max_tokens)


def _reason(key: str) -> str | None:
    for prefix, reason in _REFUSED_PREFIXES.items():
        if key.startswith(prefix):
            return reason
    return _REFUSED.get(key)


def _needed(settings: EngineSettings) -> dict[str, Any]:
    num_requests = settings.max_sequences + 1
    return {
        "model_path": str(settings.target.path),
        "trust_remote_code": settings.trust_remote_code,
        "load_format": "dummy" if settings.weights is Weights.random else "auto",
        "dtype": str(settings.spec.dtype).removeprefix("torch."),
        "device": settings.device.type,
        "tp_size": settings.config.tp,
        "context_length": longest_document(settings),
        # SGLang takes at most half as many requests as tokens.
        "max_total_tokens": max(forward_rows(settings), 2 * num_requests),
        "max_running_requests": num_requests,
        "mem_fraction_static": MEM_FRACTION,
        "page_size": 1,
        "disable_hybrid_swa_memory": True,
        "disable_radix_cache": True,
        "chunked_prefill_size": -1,
        "disable_overlap_schedule": True,
        "disable_cuda_graph": True,
        "disable_custom_all_reduce": True,
        "enforce_disable_flashinfer_allreduce_fusion": True,
        "skip_tokenizer_init": True,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "random_seed": 0,
    }


def attention_backend(target: Target, dtype: torch.dtype, device: torch.device) -> str:
    """Return SGLang's name of the fastest attention that is known to work here."""
    if device.type == "cpu":
        return "torch_native"
    reason = _why_not_fa3(target, dtype, device)
    if reason is None:
        log.info("engine sglang: fa3 attention")
        return "fa3"
    log.info("engine sglang: triton attention, because %s", reason)
    return "triton"


def _why_not_fa3(target: Target, dtype: torch.dtype, device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"fa3 is for compute capability 9.0, and this GPU has {capability}"
    if dtype not in FA3_DTYPES:
        return f"fa3 does not compute in {dtype}"
    if target.head_dim not in FA3_HEAD_DIMS:
        return f"the head size is {target.head_dim}, and fa3 was tried with {FA3_HEAD_DIMS}"
    try:
        importlib.import_module("sgl_kernel.flash_attn")
    except (ImportError, OSError) as error:
        return f"the kernels of fa3 do not load ({error})"
    return None
