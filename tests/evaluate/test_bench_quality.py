"""The quality benchmark: its target is a Qwen3, its sampler samples, and its sums are sums."""

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from colospec.evaluate.acceptance import Acceptance, Divergence, PlainOutput
from colospec.evaluate.compare import Comparison, DrafterReport
from colospec.evaluate.simulate import Simulation
from colospec.mps.errors import MpsError

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def target(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import quality_target

    return quality_target


@pytest.fixture
def model(target):
    shape = target.Shape(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_layers=3, num_heads=6,
        num_kv_heads=2, head_dim=16,
    )  # fmt: skip
    model = target.Model(shape)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=1.0 if weight.ndim == 1 else 0.0, std=0.2)
    return model.eval()


def test_its_target_has_the_logits_of_transformers(model):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    theirs = Qwen3ForCausalLM(Qwen3Config(**model.shape.config())).float().eval()
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    theirs.tie_weights()
    tokens = torch.randint(97, (2, 19))
    with torch.no_grad():
        ours = model(tokens) @ model.embed_tokens.weight.T
        torch.testing.assert_close(ours, theirs(tokens).logits, rtol=1e-4, atol=1e-3)


def test_its_loss_is_that_of_the_next_token(model):
    tokens = torch.randint(97, (3, 11))
    with torch.no_grad():
        odds = torch.log_softmax(model(tokens) @ model.embed_tokens.weight.T, -1)
        plain = [-odds[b, s, tokens[b, s + 1]] for b in range(3) for s in range(10)]
        torch.testing.assert_close(model.loss(tokens), torch.stack(plain).mean())


def test_a_continuation_has_the_tokens_of_plain_decoding(target, model):
    prompts = torch.randint(97, (4, 7))
    # So cold that each draw is the most likely token.
    drawn = target.sample(model, prompts, length=15, temperature=1e-7)
    known = prompts
    with torch.no_grad():
        while known.shape[1] < 15:
            logits = model(known)[:, -1] @ model.embed_tokens.weight.T
            known = torch.cat([known, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(drawn, known)


def test_draws_follow_the_models_distribution(target, model):
    prompt = torch.randint(97, (1, 5))
    drawn = target.sample(model, prompt.expand(20_000, -1), length=6, temperature=2.0)[:, -1]
    with torch.no_grad():
        logits = model(prompt)[0, -1] @ model.embed_tokens.weight.T
    share = torch.bincount(drawn, minlength=97) / len(drawn)
    assert (share - torch.softmax(logits / 2.0, -1)).abs().sum() < 0.12


def test_parts_of_a_measurement_add_up(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import quality_eval

    def part(reached, steps, places, accuracy, divergences):
        greedy = Acceptance(
            2, 0.0, num_steps=steps, num_tokens=10, num_target_forwards=steps + 1, seconds=0.5,
            num_reached=reached, outputs=[[1] * 10], divergences=divergences,
        )  # fmt: skip
        plain = PlainOutput([[1] * 10], [[0.1] * 10], seconds=2.0, num_forwards=10)
        simulation = Simulation(places, [accuracy, accuracy], 1 + accuracy)
        return Comparison(plain, {"draft": DrafterReport(simulation, greedy, None)})

    found = Divergence(prompt=0, token=3, plain=1, speculative=2, top2_gap=0.1)
    whole = quality_eval.merge([part([3, 1], 4, 10, 0.5, []), part([1, 1], 6, 30, 0.9, [found])])
    one = whole.drafters["draft"]
    assert one.greedy.acceptance_length == pytest.approx(1 + (4 + 2) / 10)
    assert one.greedy.divergences == [Divergence(1, 3, 1, 2, 0.1)]
    assert one.greedy.num_target_forwards == 12
    assert one.simulation.accuracies == pytest.approx([0.8, 0.8])
    assert one.simulation.joint_acceptance_length == pytest.approx(1.8)
    assert len(whole.plain.outputs) == 2
    assert whole.plain.num_forwards == 20


def test_each_draft_gets_its_own_reports_and_losses_and_the_bigram_table(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import quality_eval

    def report(length):
        return DrafterReport(Simulation(9, [0.5], length), Acceptance(1, 0.0), None)

    names = [f"{draft}, {kind} draft" for draft in ("a", "b") for kind in ("trained", "untrained")]
    lengths = {name: 1.0 + number for number, name in enumerate([*names, "bigram table"])}
    plain = PlainOutput([[1]], [[0.1]], seconds=1.0, num_forwards=1)
    whole = Comparison(plain, {name: report(length) for name, length in lengths.items()})
    parts = quality_eval.split(whole, ["a", "b"], {"a, trained draft": 7.0})
    assert {name: list(part.drafters) for name, part in parts.items()} == {
        name: ["trained draft", "untrained draft", "bigram table"] for name in ("a", "b")
    }
    found = [
        one.simulation.joint_acceptance_length
        for part in parts.values()
        for one in part.drafters.values()
    ]
    assert found == [1.0, 2.0, 5.0, 3.0, 4.0, 5.0]
    losses = [one.loss for part in parts.values() for one in part.drafters.values()]
    assert losses == [7.0, None, None, None, None, None]


def test_what_is_not_measured_at_the_deadline_is_left_out_from_the_first_such_part_on(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import quality_eval

    release = threading.Event()
    with ThreadPool(4) as pool:
        slow = pool.apply_async(release.wait, (60,))
        parts = [pool.apply_async(abs, (-1,)), slow, pool.apply_async(abs, (-3,))]
        began = time.monotonic()
        assert quality_eval._until(began + 0.3, parts) == [1]
        assert time.monotonic() - began < 10
        release.set()
        assert quality_eval._until(time.monotonic() + 30, parts) == [1, True, 3]


def test_processes_that_share_a_gpu_get_a_daemon_that_ends_with_the_measurement(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import quality_eval

    stopped = []
    pipe, device = Path(f"/run/{uuid.uuid4()}"), torch.device("cuda")
    gpus = [SimpleNamespace(uuid="GPU-7"), SimpleNamespace(uuid="GPU-8")]
    monkeypatch.setattr(quality_eval, "visible", lambda: gpus)
    monkeypatch.setattr(quality_eval, "stop_all_of", stopped.append)
    started = []

    def start(owner, gpus):
        started.append((owner, gpus))
        return SimpleNamespace(pipe=pipe)

    monkeypatch.setattr(quality_eval, "start_keeper", start)
    with quality_eval._sharing(device) as environment:
        assert environment == {
            "CUDA_MPS_PIPE_DIRECTORY": str(pipe), "CUDA_VISIBLE_DEVICES": "GPU-7",
        }  # fmt: skip
        assert not stopped
    assert (started, stopped) == ([(os.getpid(), "GPU-7")], [os.getpid()])


def test_without_mps_the_processes_share_the_gpu_all_the_same(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import quality_eval

    def missing():
        raise MpsError("no nvidia-smi here")

    monkeypatch.setattr(quality_eval, "visible", missing)
    with quality_eval._sharing(torch.device("cuda")) as environment:
        assert environment == {}
    assert "without MPS: no nvidia-smi here" in capsys.readouterr().out


def test_a_measurement_that_fails_is_told_and_tried_again_by_the_next_run(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_quality

    def fails():
        raise RuntimeError("no room")

    bench = bench_quality.Bench(tmp_path, bench_quality.TINY)
    assert bench.measured("reference", fails) == {"skipped": "no room"}
    assert bench.measured("served", lambda: {"a": {"skipped": "no time"}, "b": {"length": 1}})
    assert "reference: failed: no room" in capsys.readouterr().out
    again = bench_quality.Bench(tmp_path, bench_quality.TINY)
    assert again.measured("reference", lambda: {"length": 2.5})["length"] == 2.5
    assert again.measured("served", lambda: {"length": 1.5})["length"] == 1.5
    assert bench_quality.Bench(tmp_path, bench_quality.TINY).measured("served", fails)["length"]


@pytest.mark.slow
def test_the_benchmark_goes_from_text_to_measured_drafts_and_on_from_what_it_kept(tmp_path):
    command = [sys.executable, BENCHMARKS / "bench_quality.py", "--tiny", "--work", tmp_path / "w"]
    out = tmp_path / "quality-tiny.json"
    for _ in range(2):
        done = subprocess.run(
            [*command, "--out", out], capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("done before") >= 7
    record = json.loads(out.read_text())
    assert set(record["drafts"]) == {"eagle3", "dflash"}
    for draft in record["drafts"].values():
        names = set(draft["reference"]["drafters"])
        assert names == {"trained draft", "untrained draft", "bigram table"}
        assert draft["reference"]["drafters"]["trained draft"]["greedy"]["is_lossless"]
        assert draft["curve"][-1]["step"] == draft["steps"]
        assert "skipped" in draft["sglang"] or torch.cuda.is_available()


def test_the_table_has_a_row_for_each_draft_and_what_sglang_gave(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import quality_table

    def drafter(length, loss):
        part = {"acceptance_length": length}
        return {"simulated": part, "greedy": part, "sampled": part, "loss": loss}

    served = {
        "greedy": {"acceptance_length": 2.25},
        "through_sglang": {
            "runs": [
                {
                    "temperature": temperature,
                    "batch_size": size,
                    "acceptance_length": 2.0 + temperature,
                    "tokens_per_s": 1500.0 * size,
                    "plain_tokens_per_s": 1000.0 * size,
                }
                for temperature in (0.0, 1.0)
                for size in (1, 8)
            ]
        },
    }
    reference = {
        "num_prompts": 7, "plain_looping_share": 0.25,
        "drafters": {
            "trained draft": drafter(2.5, 3.0), "untrained draft": drafter(1.0, 9.0),
            "bigram table": drafter(1.5, None),
        },
    }  # fmt: skip
    draft = {"steps": 12, "tokens": 5e6, "reference": reference}
    record = {
        "machine": {"gpu": "a GPU"}, "seconds": 300.0, "commit": "abc",
        "target": {"parameters": 1e8, "tokens": 4e7, "train_s": 80.0},
        "samples": {"tokens": 9e6, "temperature": 0.7},
        "drafts": {
            "eagle3": draft | {"sglang": served}, "dflash": draft | {"sglang": {"skipped": ""}},
        },
    }  # fmt: skip
    assert quality_table.quality_table(tmp_path) is None
    (tmp_path / "quality-gpu.json").write_text(json.dumps(record))
    head, rule, *rows = quality_table.quality_table(tmp_path).splitlines()
    assert {row.count("|") for row in (head, rule, *rows[:5])} == {head.count("|")}
    assert "| tokens/s at 1, 8 |" in head
    assert rows[0] == (
        "| eagle3 | 12 | 3.00 | 2.50 | 2.50 | 2.50 | 2.00 (2.25) | 1,500 / 12,000 | 1,000 / 8,000 |"
    )
    assert rows[1].startswith("| eagle3, untrained | 0 | 9.00 | 1.00 |")
    assert rows[2].endswith("| 2.50 | - | - | - |")
    assert rows[4].startswith("| bigram table | - | - | 1.50 |")
    for name in record["drafts"]:
        record["drafts"][name] = draft | {"sglang": served, "reference": {"skipped": "failed"}}
    (tmp_path / "quality-gpu.json").write_text(json.dumps(record))
    _, _, first, *_ = quality_table.quality_table(tmp_path).splitlines()
    assert first.startswith("| eagle3 | 12 | - | - | - | - | 2.00 (2.25) |")
