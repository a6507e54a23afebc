"""From nothing to served drafts: a target, its own text, Eagle3 and DFlash on it, what both gain.

    python benchmarks/bench_quality.py --work DIR            # one GPU, about ten minutes
    python benchmarks/bench_quality.py --tiny                # this machine's CPU, two minutes

The phases: text (files of this machine, some held out; a tokenizer), target (a Qwen3 of about 100
million parameters), samples (what the target writes at temperature 0.7 behind the first tokens of
training files), one training job per draft on the same samples and as many tokens, and the
measurements: the reference loop on held-out prompts, beside untrained drafts and a bigram table,
then SGLang. A phase whose results are in DIR is not run again, so an interrupted bench goes on; a
measurement that fails is told, and left out of the record.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import quality_eval
import quality_text
import record
import torch
from quality_sizes import FULL, TINY, Sizes
from quality_target import Model, held_out_loss, sample, train

from colospec.data.encode import load_tokenizer
from colospec.evaluate.acceptance import DecodingSettings
from colospec.evaluate.drafters import most_frequent_successors
from colospec.evaluate.prompts import read_prompts
from colospec.log import console, to_console

BIGRAM_ROWS = 8192
SERVED_S = 170.0
LAST_SHARE = 0.1
TEMPERATURE = 0.7


class Bench:
    """One run in the directory `work`; every phase returns facts, kept as work/PHASE.json."""

    def __init__(self, work: Path, sizes: Sizes, *, commit: str | None = None) -> None:
        self.work, self.sizes = work, sizes
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        work.mkdir(parents=True, exist_ok=True)
        self.begin = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.origin = self.phase("origin", partial(_origin, commit))

    @property
    def left(self) -> float:
        """Seconds that are left of all."""
        return self.sizes.total_s - (time.monotonic() - self.begin)

    def tell(self, text: str) -> None:
        """Print a line with the time since the start."""
        print(f"[{time.monotonic() - self.begin:5.0f} s] {text}", flush=True)

    def phase(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a phase, or read what it gave an earlier time."""
        file = self.work / f"{name}.json"
        if file.is_file():
            self.tell(f"{name}: done before")
            facts = dict(json.loads(file.read_text()))
            self.seconds[name] = facts["seconds"]
            return facts
        begin = time.monotonic()
        facts = run()
        if torch.cuda.is_available():
            # What is done here leaves the memory to the jobs that follow.
            gc.collect()
            torch.cuda.empty_cache()
        facts["seconds"] = self.seconds[name] = round(time.monotonic() - begin, 1)
        parts = [facts, *(fact for fact in facts.values() if isinstance(fact, dict))]
        if not any("skipped" in part for part in parts):
            file.write_text(json.dumps(facts))
        shown = {k: v for k, v in facts.items() if isinstance(v, (int, float, str))}
        self.tell(f"{name}: {shown}")
        return facts

    def measured(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a phase on which no other builds; where it fails, return {"skipped": reason}."""
        try:
            return self.phase(name, run)
        except Exception as error:
            traceback.print_exc()
            self.tell(f"{name}: failed: {error}")
            return {"skipped": str(error)[:300]}

    def text(self) -> dict[str, Any]:
        """Collect the text, train the tokenizer, keep all tokens."""
        sizes = self.sizes
        texts = quality_text.collect(max_bytes=sizes.text_bytes)
        tokenizer = quality_text.train_tokenizer(
            texts.train, vocab_size=sizes.shape.vocab_size, num_bytes=sizes.tokenizer_bytes
        )
        (self.work / "target").mkdir(exist_ok=True)
        tokenizer.save_pretrained(self.work / "target")
        tokens = {
            "train": quality_text.encode(tokenizer, texts.train),
            "held_out": quality_text.encode(tokenizer, texts.held_out),
        }
        torch.save(tokens, self.work / "tokens.pt")
        prompts = quality_text.windows(
            tokens["held_out"], sizes.num_prompts, 2 * sizes.prompt_tokens, seed=1
        )
        self._write_rows("held_out.jsonl", prompts.tolist(), tokenizer)
        return {
            "train_files": len(texts.train), "held_out_files": len(texts.held_out),
            "train_bytes": sum(map(len, texts.train)),
            "train_tokens": len(tokens["train"]), "held_out_tokens": len(tokens["held_out"]),
        }  # fmt: skip

    def target(self) -> dict[str, Any]:
        """Train the target and keep it as a Hugging Face directory."""
        sizes, tokens = self.sizes, torch.load(self.work / "tokens.pt")
        torch.manual_seed(0)
        model = Model(sizes.shape).to(self.device)
        lines = iter(range(10**9))

        def tell(text: str) -> None:
            if next(lines) % 5 == 0:
                self.tell(f"target: {text}")

        facts = train(
            model, tokens["train"], seconds=sizes.target_s, batch=sizes.batch,
            length=sizes.window, tell=tell,
        )  # fmt: skip
        model.save(self.work / "target", load_tokenizer(self.work / "target"))
        windows = quality_text.windows(tokens["held_out"], 64, sizes.window, seed=2)
        size = sum(weight.numel() for weight in model.parameters())
        return {
            "parameters": size, "shape": asdict(sizes.shape),
            "held_out_loss": held_out_loss(self._load(), windows), **facts,
        }  # fmt: skip

    def samples(self) -> dict[str, Any]:
        """Let the target continue prefixes of training files; keep texts and the bigram table."""
        sizes, tokens = self.sizes, torch.load(self.work / "tokens.pt")["train"]
        tokenizer, model = load_tokenizer(self.work / "target"), self._load()
        torch.manual_seed(3)
        rows: list[list[int]] = []
        begin, longest, total = time.monotonic(), 0.0, 0
        while total < sizes.draft_tokens:
            first = time.monotonic()
            if rows and first - begin + longest / 2 > sizes.samples_s:
                break
            prompts = quality_text.windows(
                tokens, sizes.sample_batch, sizes.prompt_tokens, seed=len(rows)
            )
            drawn = sample(model, prompts, length=sizes.sample_tokens, temperature=TEMPERATURE)
            rows += [_until_end(row, sizes.prompt_tokens) for row in drawn.tolist()]
            total, longest = sum(map(len, rows)), max(longest, time.monotonic() - first)
            self.tell(f"samples: {total:,} tokens")
        self._write_rows("train.jsonl", rows, tokenizer)
        texts = [torch.tensor(row) for row in rows[:BIGRAM_ROWS]]
        pairs = [(row, torch.ones(len(row), dtype=torch.bool)) for row in texts]
        table = most_frequent_successors(pairs, vocab_size=sizes.shape.vocab_size)
        torch.save(table, self.work / "successors.pt")
        return {"rows": len(rows), "tokens": total, "temperature": TEMPERATURE}

    def draft(self, name: str) -> dict[str, Any]:
        """Train a draft in a colocated job of its own."""
        sizes, run_dir = self.sizes, self.work / f"run-{name}"
        overrides = [
            "+mode=colocate", f"draft={name}", f"target.path={self.work / 'target'}",
            f"data.path={self.work / 'train.jsonl'}", "launch.gpus=1",
            f"data.max_length={min(sizes.sample_tokens + 64, sizes.token_budget)}",
            f"data.token_budget={sizes.token_budget}",
            f"trainer.max_steps={sizes.draft_steps}", "trainer.log_interval=10",
            f"run_dir={run_dir}", *sizes.overrides[name],
        ]  # fmt: skip
        command = [sys.executable, "-m", "colospec.run", *overrides]
        log = self.work / f"run-{name}.log"
        with log.open("w") as out:
            done = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, timeout=max(self.left, 1.0),
                check=False,
            )  # fmt: skip
        if done.returncode:
            print(*log.read_text().splitlines()[-30:], sep="\n")
            raise RuntimeError(f"training {name} ended with exit code {done.returncode}")
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "train/loss" in row]
        return {
            "steps": sizes.draft_steps,
            "tokens": sizes.draft_tokens,
            "settings": list(sizes.overrides[name]),
            **_trained(rows),
            "curve": [_short(row) for row in rows],
        }

    def reference(self) -> dict[str, Any]:
        """Measure all drafts by the reference loop."""
        sizes, tokens = self.sizes, torch.load(self.work / "tokens.pt")["held_out"]
        prompts = read_prompts(
            self.work / "held_out.jsonl", load_tokenizer(self.work / "target"),
            num_prompts=sizes.num_prompts, prompt_tokens=sizes.prompt_tokens,
        )  # fmt: skip
        work = quality_eval.Work(
            self.work / "target",
            self._exports(), torch.load(self.work / "successors.pt"), list(prompts),
            self._decoding(1.0), self.device,
        )  # fmt: skip
        found = quality_eval.measure(
            work, texts=list(quality_text.windows(tokens, sizes.loss_texts, 256, seed=4)),
            num_processes=sizes.num_processes,
            limit_s=min(sizes.reference_s, self.left - SERVED_S),
        )  # fmt: skip
        for name, comparison in found.items():
            console.print(f"{name}:", comparison.table())
        return {name: comparison.to_dict() for name, comparison in found.items()}

    def served(self) -> dict[str, Any]:
        """Measure the drafts through SGLang, greedily, on some of the prompts."""
        sizes = self.sizes
        return quality_eval.through_sglang(
            self.work / "target", self._exports(), self.work / "held_out.jsonl",
            settings=self._decoding(0.0), num_prompts=sizes.served_prompts,
            prompt_tokens=sizes.prompt_tokens, out=self.work / "sglang-report.json",
            limit_s=max(self.left, 1.0),
        )  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Run all phases; return the record. One at a time: each has the machine to itself."""
        facts = {
            "text": self.phase("text", self.text),
            "target": self.phase("target", self.target),
            "samples": self.phase("samples", self.samples),
        }
        names = list(self.sizes.overrides)
        drafts = {name: self.phase(f"draft-{name}", partial(self.draft, name)) for name in names}
        reference = self.measured("reference", self.reference)
        served = self.measured("sglang", self.served)
        for name in names:
            drafts[name]["reference"] = reference.get(name, reference)
            drafts[name]["sglang"] = served.get(name, served)
        return {**facts, "drafts": drafts, "phases": self.seconds}

    def _exports(self) -> dict[str, Path]:
        return {name: self.work / f"run-{name}" / "export" for name in self.sizes.overrides}

    def _decoding(self, temperature: float) -> DecodingSettings:
        sizes = self.sizes
        return DecodingSettings(
            max_new_tokens=sizes.max_new_tokens,
            chain_length=sizes.chain_length,
            temperature=temperature,
        )

    def _load(self) -> Model:
        """Return the target as it was saved: in bfloat16 on a GPU, and not compiled."""
        from safetensors.torch import load_file

        state = load_file(self.work / "target" / "model.safetensors")
        model = Model(self.sizes.shape)
        model.load_state_dict({name.removeprefix("model."): t for name, t in state.items()})
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return model.to(self.device, dtype).eval()

    def _write_rows(self, name: str, rows: list[list[int]], tokenizer: Any) -> None:
        texts = tokenizer.backend_tokenizer.decode_batch(rows, skip_special_tokens=False)
        with (self.work / name).open("w") as out:
            out.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def _origin(commit: str | None) -> dict[str, Any]:
    return {**record.origin(commit), "versions": record.versions()}


def _until_end(row: list[int], prompt_tokens: int) -> list[int]:
    """Cut a sample behind the first end token (0) that the target wrote."""
    return row[: row.index(0, prompt_tokens) + 1] if 0 in row[prompt_tokens:] else row


def _trained(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Return how a draft's training ended, the mean of its last steps, and how fast it was."""
    last = rows[-max(1, round(LAST_SHARE * len(rows))) :]

    def mean(name: str) -> float:
        return sum(row[name] for row in last) / len(last)

    places = sum(name.startswith("train/acc_") for name in last[0])
    return {
        "train_loss": mean("train/loss"),
        "train_simulated_acceptance_length": mean("train/simulated_acceptance_length"),
        "train_accuracies": [mean(f"train/acc_{place}") for place in range(places)],
        "tokens_per_s": mean("perf/tokens_per_s"),
        "loss_tokens_per_step": mean("perf/loss_tokens_per_step"),
    }


def _short(row: dict[str, float]) -> dict[str, float]:
    """Keep what the plot shows of a line of metrics.jsonl."""
    names = [name for name in row if name.startswith(("train/loss", "train/acc_", "train/simul"))]
    return {"step": row["step"], **{name.removeprefix("train/"): row[name] for name in names}}


def main() -> None:
    """Run, and write the record."""
    parser = record.parser(__doc__, tiny="tiny sizes, on a CPU too")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the target's, samples' and drafts' training"
    )
    parser.add_argument("--work", type=Path, help="keep everything here, and go on from it")
    arguments = parser.parse_args()
    kept = arguments.work and (arguments.work / "origin.json").is_file()
    if not (arguments.tiny or kept or torch.cuda.is_available()):
        sys.exit("error: bench_quality.py needs a CUDA GPU; try --tiny on a CPU")
    to_console()
    with tempfile.TemporaryDirectory(prefix="bench-quality-") as name:
        sizes = (TINY if arguments.tiny else FULL).scaled(arguments.share)
        bench = Bench(arguments.work or Path(name), sizes, commit=arguments.commit)
        results = bench.run()
    whole = {
        "benchmark": "quality",
        **bench.origin,
        **results,
        "seconds": sum(bench.seconds.values()),
    }
    record.write(whole, arguments, name="quality-h200.json")


if __name__ == "__main__":
    main()
