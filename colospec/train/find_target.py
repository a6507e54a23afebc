"""Where the target is: a directory, the local Hugging Face cache, or one made for random weights.

Nothing is ever downloaded. With target.weights=random a target is its config.json alone; that of
the models under conf/target comes with the package. Every reader after this sees a directory.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import tempfile
from pathlib import Path

from colospec import demo
from colospec.config import CONF_DIR, TargetConfig, Weights
from colospec.data.cache import default_root
from colospec.target import missing_files

log = logging.getLogger(__name__)

CONFIGS = CONF_DIR / "target" / "configs"
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def target_directory(config: TargetConfig) -> Path:
    """Return the Hugging Face directory that `config` means; the demo target is built if need be.

    Raises ValueError, saying what to type, for a repository that is not in the local cache.
    """
    if config.path is None:
        return demo.ensure_target()
    path = Path(config.path).expanduser()
    is_repository = not path.exists() and REPOSITORY.fullmatch(config.path) is not None
    if config.weights is Weights.random:
        return _random_target(config.path if is_repository else None, path)
    if not is_repository:
        return path
    cached = _cached(config.path)
    missing = ["config.json"] if cached is None else missing_files(cached)
    if cached is None or missing:
        raise ValueError(
            f"target.path={config.path} is no directory here, and the Hugging Face cache lacks "
            f"{missing[0]} of it; type `hf download {config.path}`, or set target.path=/dir, or "
            "target.weights=random to measure speed"
        )
    return cached


def _random_target(repository: str | None, path: Path) -> Path:
    """Return a directory with the config.json and a tokenizer."""
    if repository is None:
        source, name = path / "config.json", path.resolve().name
        if any(path.glob("tokenizer*")) or not source.is_file():
            return path
    else:
        source, name = CONFIGS / f"{Path(repository).name}.json", Path(repository).name
        if not source.is_file():
            cached = _cached(repository)
            if cached is None:
                known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.json")))
                raise ValueError(
                    f"target.path={repository} is no directory here, and its config.json is "
                    f"neither in the Hugging Face cache nor among those that come with colospec "
                    f"({known}); type `hf download {repository} config.json`"
                )
            source = cached / "config.json"
    log.info("target %s: random weights; text is tokenised byte by byte", name)
    return _make_random_target(source.read_bytes(), name)


def _make_random_target(config: bytes, name: str) -> Path:
    """Write config.json and a tokenizer into the user's cache, once per machine and content."""
    digest = hashlib.sha256(config + CHAT_TEMPLATE.encode()).hexdigest()[:12]
    path = default_root() / "targets" / f"{name}-random-{digest}"
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        (temporary / "config.json").write_bytes(config)
        _write_byte_tokenizer(temporary)
        temporary.chmod(0o755)  # mkdtemp's is private, but a cache may be shared
        temporary.rename(path)
    except OSError:
        # Another process was faster; a directory that is not empty cannot be replaced.
        if not path.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _write_byte_tokenizer(directory: Path) -> None:
    """Save a tokenizer of one token per byte: with random weights any ids will do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end, _, end_of_turn = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end_of_turn,
        pad_token=end,
        extra_special_tokens=list(SPECIAL_TOKENS),
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def _cached(repository: str) -> Path | None:
    """Return the newest snapshot of a repository in the local Hugging Face cache, if any."""
    from transformers.utils import cached_file

    try:
        file = cached_file(repository, "config.json", local_files_only=True)
    except OSError:
        return None
    return None if file is None else Path(file).parent
