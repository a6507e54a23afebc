"""The demo: a small real target made on this machine, a draft for it, and what the draft gains.

No download: the target is a Qwen3 of two million parameters, trained for about a minute on the one
text that every machine with Python has, the sources of the standard library. Its draft learns from
text that the target writes itself, as drafts for large targets do. All of it is built once and kept
in the user's cache; any number of processes may ask for it at the same time.

    python -m colospec.demo                       # target, data, training, report
    python -m colospec.demo --report RUN_DIR      # the report of a finished run
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import logging
import os
import platform
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from colospec.config import CONF_DIR
from colospec.log import console, to_console
from colospec.target import Target

# Not __name__, which is __main__ for `python -m colospec.demo`.
log = logging.getLogger("colospec.demo")

VOCAB_SIZE = 2048
NUM_STEPS = 400
MAX_SECONDS = 75.0
BATCH_SIZE = 8
WINDOW = 256
MATRIX_LEARNING_RATE = 0.03
LEARNING_RATE = 0.01
WARMUP_STEPS = 20
RACE_STEPS = 3
NUM_HELD_OUT_FILES = 40
NUM_TOKENIZER_FILES = 200
NUM_TRAIN_ROWS = 4000
NUM_EVAL_ROWS = 64
PIECE_CHARS = (300, 1000)
NUM_WRITTEN_ROWS = 1280
WRITTEN_BATCH = 640
WRITTEN_TOKENS = (16, 112)  # given, and written behind them
WRITTEN_TEMPERATURE = 0.7
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Folders that hold tables and grammars, and those that many systems leave out.
TABLES = ("encodings", "lib2to3", "pydoc_data")
OPTIONAL = ("ensurepip", "idlelib", "site-packages", "tkinter", "turtledemo")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class DemoData:
    """JSON Lines files of `text` rows; the evaluation rows come from files held out of training."""

    train_path: Path
    eval_path: Path


def target_config() -> dict[str, Any]:
    """Return the target's config.json, as known without building it."""
    return dict(_config().to_dict())


def target_directory(cache_dir: Path | str | None = None) -> Path:
    """Return where the target is, or will be, for this version of the recipe and of Python."""
    return _version_directory(cache_dir) / "target"


def is_built(cache_dir: Path | str | None = None) -> bool:
    """Tell whether `ensure_target` would return at once."""
    return target_directory(cache_dir).is_dir()


def ensure_target(cache_dir: Path | str | None = None, *, num_steps: int = NUM_STEPS) -> Path:
    """Return the directory of the demo target, after building it if it is not there yet.

    Processes that ask at the same time wait for the one that builds. Training stops after
    `num_steps`, or MAX_SECONDS if the machine is too slow for that.
    """
    path = target_directory(cache_dir)

    def build(directory: Path) -> None:
        train, held_out = _sources()
        tokenizer = _train_tokenizer(train[:NUM_TOKENIZER_FILES])
        tokenizer.save_pretrained(directory)
        transformers_logging.disable_progress_bar()
        model = _train(_encode(tokenizer, train), _encode(tokenizer, held_out), num_steps)
        model.save_pretrained(directory)

    _build_once(path, build, "the demo target (about a minute, once per machine)")
    return path


def ensure_data(cache_dir: Path | str | None = None) -> DemoData:
    """Return the demo's data files, after writing them if they are not there yet."""
    path = _version_directory(cache_dir) / "data"

    def build(directory: Path) -> None:
        train, held_out = _sources()
        rng = random.Random(0)
        _write_rows(directory / "train.jsonl", train, NUM_TRAIN_ROWS, rng)
        _write_rows(directory / "eval.jsonl", held_out, NUM_EVAL_ROWS, rng)

    _build_once(path, build, "the demo data")
    return DemoData(path / "train.jsonl", path / "eval.jsonl")


def ensure_written(cache_dir: Path | str | None = None) -> Path:
    """Return a JSON Lines file of `text` rows that the target wrote, after making it if it is not
    there yet: each continues the first tokens of a training row.

    A draft learns more from them than from the training text itself. Of that a target so small
    knows little, so most next tokens of the text are noise to whoever predicts the target.
    """
    recipe = (NUM_WRITTEN_ROWS, WRITTEN_BATCH, WRITTEN_TOKENS, WRITTEN_TEMPERATURE)
    version = hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]
    path = _version_directory(cache_dir) / f"written-{version}"

    def build(directory: Path) -> None:
        from colospec.data.encode import load_tokenizer
        from colospec.evaluate.continuation import continue_prompts

        target = Target.load(ensure_target(cache_dir))
        tokenizer = load_tokenizer(target.path)
        lines = ensure_data(cache_dir).train_path.read_text().splitlines()
        rows = tokenizer([json.loads(line)["text"] for line in lines])["input_ids"]
        given, num_tokens = WRITTEN_TOKENS
        prompts = [row[:given] for row in rows if len(row) >= given][:NUM_WRITTEN_ROWS]
        written = continue_prompts(
            target,
            torch.tensor(prompts),
            num_tokens=num_tokens,
            temperature=WRITTEN_TEMPERATURE,
            batch_size=WRITTEN_BATCH,
            seed=0,
            device=torch.device("cpu"),
        )
        with (directory / "train.jsonl").open("w") as out:
            for text in tokenizer.batch_decode(written, clean_up_tokenization_spaces=False):
                out.write(json.dumps({"text": text}) + "\n")

    _build_once(path, build, "text that the demo target writes (half a minute, once per machine)")
    return path / "train.jsonl"


def _version_directory(cache_dir: Path | str | None) -> Path:
    recipe = (
        _config().to_json_string(use_diff=False),
        (NUM_STEPS, BATCH_SIZE, WINDOW, MATRIX_LEARNING_RATE, LEARNING_RATE),
        (CHAT_TEMPLATE, SPECIAL_TOKENS, TABLES, OPTIONAL),
        (NUM_HELD_OUT_FILES, NUM_TOKENIZER_FILES, NUM_TRAIN_ROWS, NUM_EVAL_ROWS, PIECE_CHARS),
        platform.python_version(),
    )
    version = hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]
    if cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache_dir = Path(home) / "colospec"
    return Path(cache_dir) / f"demo-{version}"


def _build_once(path: Path, build: Callable[[Path], None], what: str) -> None:
    """Make `path` by `build(temporary directory)`, unless it is there."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock"), what):
        if path.is_dir():
            return
        for leftover in path.parent.glob(f".{path.name}-*"):
            shutil.rmtree(leftover)
        log.info("building %s in %s", what, path.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        build(temporary)
        temporary.chmod(0o755)  # mkdtemp's is private, but a cache may be shared
        temporary.rename(path)


@contextmanager
def _locked(file: Path, what: str) -> Iterator[None]:
    """Hold an exclusive lock; the kernel frees it however a process ends."""
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process, which is building %s", what)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _config() -> Any:
    # Imported where they are used: every rank imports this module, few build the demo.
    from transformers import Qwen3Config

    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        dtype="float32",
    )


def _sources() -> tuple[list[Path], list[Path]]:
    """Return the standard library's files in a fixed random order: for training, and held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in root.rglob("*.py") if _is_code(file.relative_to(root)))
    random.Random(0).shuffle(files)
    return files[NUM_HELD_OUT_FILES:], files[:NUM_HELD_OUT_FILES]


def _is_code(file: Path) -> bool:
    return not any("test" in part or part in TABLES + OPTIONAL for part in file.parts)


def _train_tokenizer(files: list[Path]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(file) for file in files], trainer)
    end, _, end_of_turn = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, extra_special_tokens=[end_of_turn]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _encode(tokenizer: Any, files: list[Path]) -> Tensor:
    """Return all files as one row of tokens [N], each file ended by <|endoftext|>."""
    texts = [file.read_text(errors="ignore") + SPECIAL_TOKENS[0] for file in files]
    rows = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([token for row in rows for token in row.ids])


def _train(tokens: Tensor, held_out: Tensor, num_steps: int) -> Any:
    """Train the target on random windows of `tokens` [N]."""
    from transformers import Qwen3ForCausalLM

    generator = torch.Generator().manual_seed(0)
    tell = _teller(num_steps)
    with _fastest() as race, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(_config())
        optimizers = _optimizers(model)
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        begin, step, progress = time.monotonic(), 0, 0.0
        while progress < 1.0:
            decay = min(1.0, (step + 1) / WARMUP_STEPS) * (1.0 - progress)
            batch = _windows(tokens, BATCH_SIZE, generator)
            with race(step):
                model(input_ids=batch, labels=batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer, rate in zip(optimizers, rates, strict=True):
                    optimizer.param_groups[0]["lr"] = rate * decay
                    optimizer.step()
                    optimizer.zero_grad()
            step += 1
            progress = max(step / num_steps, (time.monotonic() - begin) / MAX_SECONDS)
            tell(progress)
        seconds = time.monotonic() - begin
        model.eval()
        with torch.no_grad():
            batch = _windows(held_out, 2 * BATCH_SIZE, generator)
            loss = model(input_ids=batch, labels=batch).loss.item()
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    log.info(
        "demo target: %.1f million parameters, %d steps in %.0f s, loss on held-out files %.2f",
        *(size, step, seconds, loss),
    )
    return model


def _optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers, AdamW for the rest.

    In the same time Muon came to a loss of 3.8 where AdamW alone came to 4.3.
    """
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    known = set(map(id, matrices))
    rest = [weight for weight in model.parameters() if id(weight) not in known]
    return [
        torch.optim.Muon(matrices, MATRIX_LEARNING_RATE, weight_decay=0.0),
        torch.optim.AdamW(rest, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _windows(tokens: Tensor, number: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(tokens) - WINDOW, (number, 1), generator=generator)
    return tokens[starts + torch.arange(WINDOW)]


@contextmanager
def _fastest() -> Iterator[Callable[[int], AbstractContextManager[None]]]:
    """Give a context for each training step that runs it the way that is fastest here.

    The first steps try the ways in turn. bfloat16 doubles the speed of CPUs that have it and ruins
    that of others. torchrun gives each rank one thread, but the other ranks are waiting for this
    one, so all cores are ours; where other programs keep them busy, though, threads that wait for
    each other are slower than one alone, by a factor of hundreds.
    """
    before = torch.get_num_threads()
    num_cores = min(4, len(os.sched_getaffinity(0)))
    ways = [(num, low) for num in sorted({1, num_cores}) for low in (False, True)]
    seconds = dict.fromkeys(ways, 0.0)

    @contextmanager
    def race(step: int) -> Iterator[None]:
        trial = step // RACE_STEPS
        way = ways[trial] if trial < len(ways) else min(ways, key=seconds.__getitem__)
        torch.set_num_threads(way[0])
        begin = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16, enabled=way[1]):
            yield
        # The first step with a new way also makes its kernels.
        if trial < len(ways) and step % RACE_STEPS:
            seconds[way] += time.monotonic() - begin

    try:
        yield race
    finally:
        torch.set_num_threads(before)


def _teller(num_steps: int) -> Callable[[float], None]:
    """Return a function that logs the finished share, four times in all."""
    begin, shown = time.monotonic(), [0.0]

    def tell(share: float) -> None:
        if shown[0] + 0.25 <= share < 1.0:
            shown[0] = share
            left = (time.monotonic() - begin) * (1 / share - 1)
            log.info("demo target: %.0f%% of %d steps, %.0f s left", 100 * share, num_steps, left)

    return tell


def _write_rows(path: Path, files: list[Path], number: int, rng: random.Random) -> None:
    """Write `number` pieces of the files, cut between lines, in random order."""
    pieces = [piece for file in files for piece in _pieces(file.read_text(errors="ignore"), rng)]
    rng.shuffle(pieces)
    with path.open("w") as out:
        out.writelines(json.dumps({"text": piece}) + "\n" for piece in pieces[:number])


def _pieces(text: str, rng: random.Random) -> Iterator[str]:
    piece, wanted = "", rng.randint(*PIECE_CHARS)
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= wanted:
            yield piece
            piece, wanted = "", rng.randint(*PIECE_CHARS)


def main(arguments: list[str] | None = None) -> None:
    """Run the whole demo, or report on a run that was made before."""
    parser = argparse.ArgumentParser(
        prog="python -m colospec.demo", description="Make a target, train a draft, compare."
    )
    parser.add_argument("--report", type=Path, metavar="RUN_DIR", help="only report on this run")
    parser.add_argument("overrides", nargs="*", help="settings of colospec.run, as trainer.lr=1e-3")
    options = parser.parse_args(arguments)
    to_console()
    try:
        ensure_target()
        report(options.report or _train_draft(options.overrides))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def report(run_dir: Path) -> None:
    """Evaluate the draft of a run on the demo target; print the table and where it is kept."""
    from colospec.evaluate.report import ReportSettings, report_run

    data, target = ensure_data(), Target.load(ensure_target())
    log.info("decoding held-out prompts with the trained draft, an untrained one, and a table")
    # Threads would only wait for each other in so small a model.
    torch.set_num_threads(1)
    result = report_run(
        run_dir,
        target,
        train_path=ensure_written(),
        eval_path=data.eval_path,
        settings=ReportSettings(),
    )
    console.print(result.comparison.table())
    console.print(
        "With so small a target drafting can cost more time than it saves; with a large one the "
        "saved forward passes decide."
    )
    for file in (result.report, result.curves, run_dir / "export"):
        if file is not None:
            console.print(f"wrote {file}")


def _experiment(overrides: list[str]) -> str:
    """Return the demo's settings for the chosen draft: demo_<draft>, or demo for the default."""
    given = [item.partition("=")[2] for item in overrides if item.startswith("draft=")]
    own = f"demo_{given[-1]}" if given else "demo"
    return own if (CONF_DIR / "experiment" / f"{own}.yaml").is_file() else "demo"


def _train_draft(overrides: list[str]) -> Path:
    """Train a draft in a job of its own; return the run directory."""
    given = [item.partition("=")[2] for item in overrides if item.startswith("run_dir=")]
    run_dir = Path(given[-1] if given else time.strftime("outputs/demo-%Y-%m-%d-%H-%M-%S"))
    choices = [
        "+mode=colocate",
        f"+experiment={_experiment(overrides)}",
        f"data.path={ensure_written()}",
        f"run_dir={run_dir}",
        *overrides,
    ]
    done = subprocess.run([sys.executable, "-m", "colospec.run", *choices], check=False)
    if done.returncode:
        raise RuntimeError(f"training ended with exit code {done.returncode}; see above")
    return run_dir


if __name__ == "__main__":
    main()
