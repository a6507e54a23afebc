"""Real acceptance length inside training, of the draft as it is exported.

The draft is exported as at the end of a run and loaded back; trainer 0 lets it decode a few
held-out prompts by evaluate's reference loop. Where does the target come from? A second copy would
take its whole size of a GPU that is shared already (16 GiB for 8 B parameters, and more than there
is for 70 B), and a process of its own as much. But an engine that captures any text is beside
trainer 0, and the target's head is in the trainer: so each forward pass of decoding is one more
capture of the text so far, through the ring, and its logits are made here. That is quadratic in the
length of the text, which is short; it costs no memory, and the target is the very one that is
trained on. Engines know from the plan when to listen, and the trainer's steps know nothing of it.

Beside the real length stand two simulated ones, from the accuracy of the training forward pass on
the texts that were decoded: of the draft that is trained, and of the one that was loaded back. If
they differ, the export is another draft. If only the real one differs, decoding is at fault, or the
tokens of a chain depend on each other more than the simulation knows.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from colospec.batch import Cursor, FeatureBatch, Features, TokenBatch
from colospec.checkpoint.export import export_draft, load_weights
from colospec.checkpoint.public import read_config
from colospec.draft import registry
from colospec.draft.base import DraftModel
from colospec.evaluate.acceptance import Acceptance, DecodingSettings, decode_speculatively
from colospec.evaluate.captured import CapturedDecoder
from colospec.evaluate.drafters import open_drafter
from colospec.evaluate.simulate import simulated_acceptance_length
from colospec.metrics import Sums
from colospec.train.evaluation import accuracies, held_out_context, reshard
from colospec.train.fsdp import compute_dtype
from colospec.train.job import Evaluation, Job
from colospec.train.probe_target import ProbeTarget
from colospec.train.stop import StopRequestedError
from colospec.world import World

log = logging.getLogger(__name__)

TEXT_PROMPT_TOKENS = 64
"""At most so much of a text without a prompt of its own is prompt, and at most half of it."""


@dataclass(frozen=True)
class Measured:
    """Acceptance lengths, bonus token counted: of real decoding, with the standard error of that
    mean, and simulated for the draft that is trained and for the one that was loaded back."""

    real: float
    error: float
    trained: float
    exported: float

    @property
    def gap(self) -> float:
        """|real - simulated| as a share of the simulated one."""
        return abs(self.real - self.trained) / self.trained

    def alarm(self, limit: float) -> str | None:
        """Say what a gap above `limit` means; None where there is none, or where so few verify
        steps (two standard errors) do not show one."""
        if abs(self.exported - self.trained) / self.trained > limit:
            return (
                "this means an export bug: what was loaded back does not predict what the "
                "trained draft predicts"
            )
        if self.gap - 2 * self.error / self.trained > limit:
            return (
                "what was loaded back predicts as the trained draft does, so its decoding is "
                "at fault, or the tokens of a chain depend much on each other"
            )
        return None


class Probe:
    """Measures one state of the draft. Every trainer calls `run`; trainer 0 works, others wait."""

    def __init__(
        self, job: Job, world: World, target: ProbeTarget, directory: Path, facts: dict[str, Any]
    ) -> None:
        self._job, self._world, self._target = job, world, target
        self._directory, self._facts = directory, facts

    def run(
        self, draft: DraftModel, evaluation: Evaluation, *, chain_length: int
    ) -> dict[str, float]:
        """Return the metrics of the probe, equal on all trainers; warn of a gap.

        `draft` is the sharded one; its training accuracies are `chain_length` many. Raises
        StopRequestedError, on all trainers, where somebody asks to stop before decoding has ended.
        """
        began = time.monotonic()
        settings = DecodingSettings(
            max_new_tokens=self._job.run.trainer.probe_tokens,
            chain_length=min(chain_length, self._job.run.trainer.probe_tokens - 1),
        )
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = cast(dict[str, Tensor], get_model_state_dict(draft, options=options))
        batch, lengths = self._empty(), torch.zeros(3, dtype=torch.float64)
        if self._world.place.role_rank == 0:
            try:
                batch, acceptance, exported = self._decode(state, draft, evaluation, settings)
                found = (acceptance.acceptance_length, standard_error(acceptance), exported)
                lengths = torch.tensor(found, dtype=torch.float64)
            except StopRequestedError:
                shutil.rmtree(self._directory, ignore_errors=True)
        del state
        # On the CPU: the others must not spin on their GPUs, and their watchdogs have the deadline.
        dist.broadcast(lengths, src=0)
        if not lengths.any():  # a real length is at least 1
            reshard(draft)
            raise StopRequestedError
        trained = self._simulate(draft, batch, evaluation, settings, reduce=dist.all_reduce)
        reshard(draft)
        real, error, exported = lengths.tolist()
        measured = Measured(real, error, trained, exported)
        seconds = time.monotonic() - began
        if self._world.place.role_rank == 0:
            self._conclude(measured, seconds)
        return {
            "real_acceptance_length": measured.real,
            "simulated_acceptance_length": measured.trained,
            "exported_simulated_acceptance_length": measured.exported,
            "gap": measured.gap,
            "s": seconds,
        }

    def _decode(
        self,
        state: dict[str, Tensor],
        draft: DraftModel,
        evaluation: Evaluation,
        settings: DecodingSettings,
    ) -> tuple[FeatureBatch, Acceptance, float]:
        """Return the decoded texts with their features, what decoding gave, and the exported
        draft's simulated acceptance length."""
        job, device = self._job, self._world.device
        if self._world.stop_requested:
            raise StopRequestedError
        export_draft(
            state,
            self._directory,
            config=job.run.draft,
            target=job.target,
            facts=self._facts,
            format=job.run.export.format,
            dtype=getattr(torch, job.run.export.dtype.value),
        )
        model = self._load(draft)
        decoder = CapturedDecoder(
            self._capture,
            draft.frozen_head,
            target=job.target,
            aux_layer_ids=job.spec.aux_layer_ids,
        )
        prompts = probe_prompts(job, settings.chain_length)
        acceptance = decode_speculatively(
            decoder,
            open_drafter(model, job.target),
            [prompt.to(device) for prompt in prompts],
            settings,
        )
        batch = self._read(prompts, acceptance.outputs)
        self._target.finish(goes_on=True)
        exported = self._simulate(model, batch, evaluation, settings)
        return batch, acceptance, exported

    def _capture(self, token_ids: Tensor) -> Features:
        if self._world.stop_requested:
            raise StopRequestedError
        return self._target.capture(token_ids)

    def _load(self, draft: DraftModel) -> DraftModel:
        """Build the exported draft, in the type in which it is trained, on the trainer's own copy
        of the target's embedding and head."""
        job, device = self._job, self._world.device
        config = read_config(self._directory, job.target)
        # Fresh weights are drawn, and overwritten: training must not miss these numbers.
        with torch.random.fork_rng(devices=[]):
            model = registry.find(config.algorithm).from_config(
                config, job.target, token_counts=torch.zeros(job.target.vocab_size)
            )
        model.to(device)
        model.set_target(draft.embedding, draft.target_head)
        load_weights(model, self._directory)
        dtype = compute_dtype(job.run.trainer.dtype, device)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model.requires_grad_(False)

    def _read(self, prompts: list[Tensor], outputs: list[list[int]]) -> FeatureBatch:
        """Capture each prompt with its continuation, as one micro-batch: supervised are the tokens
        that a draft could have proposed, all but the first of a continuation."""
        texts = [torch.cat([p, torch.tensor(o)]) for p, o in zip(prompts, outputs, strict=True)]
        masks = [torch.arange(len(t)) > len(p) for t, p in zip(texts, prompts, strict=True)]
        captured = [self._capture(text) for text in texts]
        last = [features.last_hidden_states for features in captured]
        return FeatureBatch(
            TokenBatch.pack(Cursor(0, 0, 0), range(len(texts)), texts, masks),
            Features(
                torch.cat([features.aux_hidden_states for features in captured]),
                torch.cat(cast(list[Tensor], last)) if self._job.spec.last_hidden_states else None,
            ),
        )

    def _empty(self) -> FeatureBatch:
        """What the other trainers bring to the forward pass of the sharded draft."""
        features = Features.empty(self._job.spec, 0, self._world.device)
        return FeatureBatch(TokenBatch.pack(Cursor(0, 0, 0), (), (), ()), features)

    def _simulate(
        self,
        model: DraftModel,
        batch: FeatureBatch,
        evaluation: Evaluation,
        settings: DecodingSettings,
        *,
        reduce: Callable[[Tensor], Any] | None = None,
    ) -> float:
        sums = Sums()
        with torch.no_grad():
            sums.add(model(batch, held_out_context(self._job, evaluation, batch.tokens)).metrics)
        right = accuracies(sums.fetch(reduce=reduce))[: settings.chain_length]
        return simulated_acceptance_length(right)

    def _conclude(self, measured: Measured, seconds: float) -> None:
        trainer, step = self._job.run.trainer, self._facts["steps"]
        figures = (
            f"probe at step {step}: real acceptance length {measured.real:.2f} +- "
            f"{measured.error:.2f}, simulated {measured.trained:.2f}, of the export "
            f"{measured.exported:.2f}"
        )
        meaning = measured.alarm(trainer.probe_alarm)
        if meaning is None:
            shutil.rmtree(self._directory, ignore_errors=True)
            log.info("%s (%.1f s)", figures, seconds)
            return
        # One is enough to look at; a draft that always gives the alarm must not fill the disk.
        for older in self._directory.parent.iterdir():
            if older != self._directory:
                shutil.rmtree(older, ignore_errors=True)
        log.warning(
            "%s: %s; compare `python -m colospec.evaluate --target %s --draft %s --prompts FILE`",
            figures, meaning, self._job.target.path, self._directory,
        )  # fmt: skip


def standard_error(acceptance: Acceptance) -> float:
    """Return the standard error of the mean acceptance length, verify steps taken as independent;
    0 without any."""
    rates = acceptance.cumulative_rates
    square = sum((2 * place + 1) * rate for place, rate in enumerate(rates))
    variance = max(square - sum(rates) ** 2, 0.0)
    return math.sqrt(variance / max(acceptance.num_steps, 1))


def probe_prompts(job: Job, chain_length: int) -> list[Tensor]:
    """Return the fixed prompts [n] of a run's probes, from its first held-out samples: what comes
    before the first supervised token, or the beginning of a text that is supervised throughout.

    A prompt that would not leave room for what is decoded loses its beginning.
    """
    assert job.held_out is not None
    run, prompts = job.run, []
    room = min(run.data.max_length, run.data.token_budget // run.trainer.probe_prompts)
    most = room - run.trainer.probe_tokens - chain_length
    for index in job.held_out.sample_ids[: run.trainer.probe_prompts]:
        token_ids, mask = job.held_out.dataset.sample(index)
        length = int(mask.to(torch.int8).argmax()) or min(TEXT_PROMPT_TOKENS, len(mask) // 2)
        prompts.append(token_ids[: max(length, 1)][-most:])
    return prompts
