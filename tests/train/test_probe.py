"""The probe measures what is exported, and says so when that is another draft."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from colospec import topology
from colospec.batch import TokenBatch
from colospec.checkpoint.export import load_draft
from colospec.config import DataConfig, Mode, RunConfig, TargetConfig, TrainerConfig
from colospec.draft.base import StepContext
from colospec.draft.eagle3.config import Eagle3Config
from colospec.evaluate.acceptance import Acceptance
from colospec.train import probe as probe_module
from colospec.train.evaluation import reshard
from colospec.train.job import Evaluation, Job
from colospec.train.probe import Measured, Probe, probe_prompts, standard_error
from colospec.train.probe_target import LocalTarget
from colospec.train.produce import load_engine
from colospec.train.requests import Requests
from colospec.train.trainer import Trainer
from tests import tiny
from tests.ranks import run_ranks

CHAIN = 3
EVALUATION = Evaluation(epoch=0, step=6, bins=(), num_loss_tokens=1, has_probe=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("probe")
    return RunConfig(
        mode=Mode.alternate,
        run_dir=str(root / "run"),
        target=TargetConfig(path=str(tiny.write_target(root / "target", num_layers=3))),
        draft=Eagle3Config(ttt_length=CHAIN, draft_vocab_size=300, aux_layer_ids=[0, 1]),
        data=DataConfig(
            path=str(tiny.write_data(root / "train.jsonl", num_rows=80)),
            cache_dir=str(root / "cache"),
            max_length=300, token_budget=600, num_workers=1, held_out_samples=9,
        ),
        trainer=TrainerConfig(lr=3e-3, max_steps=9, probe_interval=3, probe_prompts=3,
                              probe_tokens=24),
    )  # fmt: skip


def learn(trainer, batch, steps):
    """Overfit the draft to the texts of a probe."""
    for step in range(steps):
        context = StepContext(step, steps, int(batch.tokens.loss_mask.sum()))
        trainer.draft(batch, context).loss.backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()


def probe_a_learnt_draft(_rank, run, root):
    """Probe a draft that is good at the prompts: exported rightly, then with wrong rows."""
    places = topology.build(run.mode, world_size=1, local_world_size=1, visible_gpus=0).places
    device = torch.device("cpu")
    beats = SimpleNamespace(beat=lambda: None)
    world = SimpleNamespace(
        place=places[0], device=device, limit=run.limit, watchdog=beats, stop_requested=False
    )
    job = Job.load(run, num_trainers=1, progress=False)
    trainer = Trainer(job, world, Path(run.run_dir))
    target = LocalTarget(load_engine(job, world), device)
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    probe_module.log.addHandler(handler)
    probe_module.log.setLevel(logging.INFO)

    def run_probe(name):
        probe = Probe(job, world, target, root / name, {"steps": 6})
        return probe.run(trainer.draft, EVALUATION, chain_length=CHAIN)

    before = torch.get_rng_state()
    first = run_probe("first")
    assert torch.equal(before, torch.get_rng_state()), "training's random numbers are its own"
    prompts = probe_prompts(job, CHAIN)
    probe = Probe(job, world, target, root / "texts", {"steps": 6})
    outputs = greedy(target, prompts, trainer.draft.frozen_head, run.trainer.probe_tokens)
    learn(trainer, probe._read(prompts, outputs), 120)
    right = run_probe("right")
    export = probe_module.export_draft

    def export_wrong_rows(state, *args, **kwargs):
        export({**state, "lm_head.weight": state["lm_head.weight"].roll(1, 0)}, *args, **kwargs)

    probe_module.export_draft = export_wrong_rows
    wrong = run_probe("wrong")
    load_draft(root / "wrong", job.target)
    run_probe("wrong again")
    reshard(trainer.draft)
    return first, right, wrong, messages, sorted(p.name for p in root.iterdir())


def greedy(target, prompts, head, number):
    """Continue the prompts one token at a time."""
    outputs = []
    for prompt in prompts:
        text = prompt
        for _ in range(number):
            last = target.capture(text).last_hidden_states[-1]
            text = torch.cat([text, (head @ last).argmax()[None]])
        outputs.append(text[len(prompt) :].tolist())
    return outputs


def test_an_export_with_wrong_rows_is_an_alarm_and_a_right_one_is_not(run, tmp_path):
    ((first, right, wrong, messages, left),) = run_ranks(
        probe_a_learnt_draft, 1, run, tmp_path, timeout_s=120
    )
    assert first["real_acceptance_length"] < 1.6
    assert right["simulated_acceptance_length"] > 2.5
    assert right["real_acceptance_length"] > 2.2
    assert right["exported_simulated_acceptance_length"] == pytest.approx(
        right["simulated_acceptance_length"], rel=0.1
    )
    assert wrong["simulated_acceptance_length"] == right["simulated_acceptance_length"], (
        "the trained draft is the same"
    )
    assert wrong["real_acceptance_length"] < 1.6
    assert wrong["gap"] > 0.3
    assert ["export bug" in message for message in messages] == [False, False, True, True]
    assert "colospec.evaluate --target" in messages[2]
    assert left == ["wrong again"], "of what gave alarms, the newest is kept"


@pytest.mark.parametrize(
    ("measured", "says"),
    [
        (Measured(2.0, 0.1, 2.1, 2.1), None),
        (Measured(2.0, 0.0, 2.5, 2.5), "decoding"),
        (Measured(2.0, 0.2, 2.5, 2.5), None),
        (Measured(1.0, 0.0, 2.5, 1.0), "export bug"),
        (Measured(2.0, 0.0, 2.0, 1.5), "export bug"),
        (Measured(1.0, 0.0, 1.0, 1.0), None),
    ],
)
def test_the_alarm_tells_an_export_from_decoding_and_from_chance(measured, says):
    meaning = measured.alarm(0.1)
    assert meaning is None if says is None else says in meaning


def test_the_standard_error_is_that_of_the_lengths_of_all_steps():
    lengths = torch.randint(0, 4, (50,))
    reached = [int((lengths > place).sum()) for place in range(3)]
    acceptance = Acceptance(3, 0.0, num_steps=50, num_reached=reached)
    expected = float(lengths.double().std(correction=0)) / 50**0.5
    assert standard_error(acceptance) == pytest.approx(expected)
    assert standard_error(Acceptance(3, 0.0, num_reached=[0, 0, 0])) == 0


def test_prompts_are_held_out_beginnings_that_leave_room_to_decode(run):
    job = Job.load(run, num_trainers=1, progress=False)
    few = replace(job, run=replace(run, data=replace(run.data, token_budget=300)))
    for these in (job, few):
        prompts = probe_prompts(these, CHAIN)
        assert len(prompts) == 3
        room = min(300, these.run.data.token_budget // 3) - 24 - CHAIN
        for prompt, index in zip(prompts, job.held_out.sample_ids, strict=False):
            text = job.held_out.dataset.sample(index)[0]
            begin = text[: max(1, min(64, len(text) // 2))]
            assert 1 <= len(prompt) <= room
            assert prompt.tolist() == begin[-room:].tolist()


class Store:
    """A job's store that is a dict."""

    def __init__(self):
        self.keys = {}

    def set_json(self, key, value):
        self.keys[key] = value

    def get_json(self, key, *, timeout_s):
        if key not in self.keys:
            raise TimeoutError(f"nobody set {key!r} within {timeout_s:g} s")
        return self.keys[key]

    def delete(self, key):
        self.keys.pop(key, None)


def test_requests_arrive_in_order_with_the_micro_batch_that_the_trainer_expects():
    store = Store()
    trainer, engines = Requests(store), [Requests(store), Requests(store)]
    texts = [torch.randint(99, (n,)) for n in (3, 1, 7)]
    expected = [trainer.ask(texts[0]), trainer.ask(texts[1])]
    trainer.finish(goes_on=True)
    expected.append(trainer.ask(texts[2]))
    trainer.finish(goes_on=False)
    for engine in engines:
        taken = [engine.take(timeout_s=1) for _ in range(5)]
        assert [taken[2], taken[4]] == [True, False]
        batches = [one for one in taken if isinstance(one, TokenBatch)]
        assert [b.digest for b in batches] == [b.digest for b in expected]
        assert [b.token_ids.tolist() for b in batches] == [t.tolist() for t in texts]
    with pytest.raises(TimeoutError, match="trainer 0 neither began nor went on"):
        engines[0].take(timeout_s=0.01)
    for tokens in expected:
        trainer.forget(tokens)
    assert list(store.keys.values()) == [True, False], "texts do not pile up in the store"
