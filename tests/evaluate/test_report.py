"""Reports on exported drafts: the command line, the files, and what they say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from colospec.checkpoint.export import export_draft
from colospec.draft import registry
from colospec.draft.eagle3.config import Eagle3Config
from colospec.evaluate import __main__ as command
from colospec.evaluate.curves import draw_curves
from colospec.evaluate.report import ReportSettings, report_run
from colospec.target import Target
from tests import tiny


@dataclass
class Run:
    directory: Path
    target: Target
    data: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Fake nothing but the training: a random draft, exported as a run does."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("run")
    target = Target.load(tiny.write_target(root / "target"))
    data = tiny.write_data(root / "rows.jsonl", num_rows=30)
    config = Eagle3Config(ttt_length=2, draft_vocab_size=200)
    model = registry.build(config, target, token_counts=torch.rand(target.vocab_size))
    export_draft(
        model.state_dict(),
        root / "export",
        config=config,
        target=target,
        facts={},
        dtype=torch.float32,
    )
    lines = [
        {"step": step, "train/loss": 5 / step, "train/acc_0": 0.1 * step, "train/acc_1": 0.05}
        for step in (1, 2, 3)
    ]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Run(root, target, data)


def test_report_compares_three_drafters_and_writes_files(run: Run) -> None:
    settings = ReportSettings(num_prompts=2, prompt_tokens=8, max_new_tokens=6, chain_length=2)

    result = report_run(
        run.directory, run.target, train_path=run.data, eval_path=run.data, settings=settings
    )

    report = json.loads(result.report.read_text())
    assert set(report["drafters"]) == {"trained draft", "untrained draft", "bigram table"}
    for name, drafter in report["drafters"].items():
        assert 1.0 <= drafter["greedy"]["acceptance_length"] <= 3.0
        assert 1.0 <= drafter["sampled"]["acceptance_length"] <= 3.0
        assert drafter["sampled"]["temperature"] == 1.0
        assert drafter["greedy"]["tokens_per_s"] > 0
        assert len(drafter["simulated"]["accuracies"]) == 2
        assert (drafter["loss"] is None) == (name == "bigram table")
    assert result.curves is not None
    assert result.curves.read_bytes().startswith(b"\x89PNG")
    assert result.comparison.table().row_count == 4


def test_report_without_an_export_says_what_to_give(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no export/config\.json"):
        report_run(
            tmp_path,
            run.target,
            train_path=run.data,
            eval_path=run.data,
            settings=ReportSettings(),
        )


def test_command_prints_a_table_and_writes_json(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"

    command.main(
        [
            *("--target", str(run.target.path), "--draft", str(run.directory / "export")),
            *("--prompts", str(run.data), "--num-prompts", "2", "--max-new-tokens", "6"),
            *("--chain-length", "3", "--temperature", "0.7", "--json", str(out)),
            *("--device", "cpu"),
        ]
    )

    report = json.loads(out.read_text())
    assert report["settings"]["chain_length"] == 3
    assert report["num_prompts"] == 2
    assert report["drafters"]["export"]["sampled"]["temperature"] == 0.7
    shown = capfd.readouterr().err
    assert "acceptance length" in shown
    assert "T=0.7" in shown
    assert "loss" not in shown


def test_the_table_has_no_column_of_what_was_not_measured(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    command.main(
        [
            *("--target", str(run.target.path), "--draft", str(run.directory / "export")),
            *("--prompts", str(run.data), "--num-prompts", "1", "--max-new-tokens", "8"),
            *("--device", "cpu"),
        ]
    )

    header = next(line for line in capfd.readouterr().err.splitlines() if "drafter" in line)
    assert header.split() == ["drafter", "simul.", "greedy", "loops", "saved", "tok/s", "exact"]


def test_command_ends_with_the_error_and_no_traceback(run: Run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .*config\.json"):
        command.main(
            [
                *("--target", str(run.target.path), "--draft", str(tmp_path)),
                *("--prompts", str(run.data), "--device", "cpu"),
            ]
        )


def test_curves_of_an_empty_log_are_an_error(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "perf/tokens_per_s": 3}\n')

    with pytest.raises(ValueError, match="train/loss"):
        draw_curves(metrics, tmp_path / "curves.png")


def test_curves_show_what_was_measured_on_held_out_samples(tmp_path: Path) -> None:
    metrics, image = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    rows = [
        {"step": step, "train/loss": 3 / step, "train/simulated_acceptance_length": 1.0 + step}
        for step in (1, 2)
    ]
    measured = [{"step": 1, "eval/loss": 4.0}, {"step": 2, "probe/real_acceptance_length": 2.0}]
    images = []
    for lines in (rows, rows + measured):
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        draw_curves(metrics, image)
        images.append(image.read_bytes())
    assert images[0] != images[1]
