"""Which SGLang the engine runs with: a supported version, stock or with our patch, nothing else."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

# sha256 of each file that third_party/sglang_patch changes: as released, and patched.
FILES: dict[str, dict[str, tuple[str, str]]] = {
    "0.5.17": {
        "sglang/srt/configs/qwen3_asr.py": (
            "3ce79252169d974a777a3c7226d6a4186696143c0d1fd039f19249b10cd1d719",
            "25dbc515527e5cc42490ebee476d382a458508d868dfe5a0113eafc603bc6088",
        ),
        "sglang/srt/layers/attention/vision.py": (
            "5df6b0a4c65ab83f9275379bad2630e9dd82944a0849058a315ba72270fabe71",
            "ccb2a6b3bd6acd0f5c1bb5fa9adc1836ea0310f353899ec6b85e87a70d219f17",
        ),
        "sglang/srt/layers/quantization/fp8_utils.py": (
            "208134faa8f92a3606e9e1ddc102e2017268cfb4d1162cfa1f32cd2fcd42812b",
            "4c7f0542fedf6bcb9b83923633b3a351ce0768cd80521e17fc2424d38c781da9",
        ),
        "sglang/srt/layers/sampler.py": (
            "6b727fcde1724924c71c1148d89005500195527e827fe7ec8d51eef43d92a762",
            "cb8833f305e2bfa69578078e79f0c4d06a409c6e1715a2cb06c56f734addf430",
        ),
    },
    "0.5.16": {
        "sglang/srt/configs/qwen3_asr.py": (
            "3ce79252169d974a777a3c7226d6a4186696143c0d1fd039f19249b10cd1d719",
            "25dbc515527e5cc42490ebee476d382a458508d868dfe5a0113eafc603bc6088",
        ),
        "sglang/srt/layers/attention/vision.py": (
            "07f62a3183ea0e2e2ab95d6c8f3774c25ef9c28ee704d68307842a82f4c46f66",
            "efa02dc7c9774eae8534e66b5cc97afef3af0590b7184a5f768c866747620904",
        ),
        "sglang/srt/layers/sampler.py": (
            "b7ee4f148f6a4df3ed295649bbd299a33613522e6b2c0c9bc6296f58ad5809d8",
            "5562cc28df1264bd75e5c5d9684fcbe3515f7b91123fe86321d8d8d8a1038789",
        ),
    },
}
INSTALL = "make install-gpu in a clone, or pip install sglang==0.5.17"
APPLY = "python third_party/sglang_patch/apply.py apply"


def check_installation() -> str:
    """Return the version of the installed SGLang, "0.5.17" or "0.5.17 (patched)".

    Raises RuntimeError, with what to type, where there is none, for another version, and for files
    that are neither as released nor patched.
    """
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise RuntimeError(
            f"engine=sglang needs the package sglang: {INSTALL}; or run the target through "
            "transformers with engine=hf"
        )
    return check_files(Path(spec.origin).parent.parent, importlib.metadata.version("sglang"))


def check_files(site: Path, version: str) -> str:
    """Check the SGLang of `version` that lies in the directory `site`; as `check_installation`."""
    reinstall = f"pip install --force-reinstall --no-deps sglang=={next(iter(FILES))}"
    if version not in FILES:
        raise RuntimeError(
            f"engine=sglang works with SGLang {' and '.join(FILES)}, and {version} is installed in "
            f"{site}; {reinstall}, or set engine=hf"
        )
    states = {name: _state(site / name, hashes) for name, hashes in FILES[version].items()}
    changed = [name for name, state in states.items() if state == "changed"]
    if changed:
        raise RuntimeError(
            f"{site / changed[0]} is neither as SGLang {version} released it nor as our patch "
            f"leaves it; pip install --force-reinstall --no-deps sglang=={version}"
        )
    if len(set(states.values())) > 1:
        raise RuntimeError(f"the patch of SGLang {version} in {site} is half applied; {APPLY}")
    return version if "stock" in states.values() else f"{version} (patched)"


def _state(file: Path, hashes: tuple[str, str]) -> str:
    if not file.is_file():
        return "changed"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    names = dict(zip(hashes, ("stock", "patched"), strict=True))
    return names.get(digest, "changed")
