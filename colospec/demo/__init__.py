"""The demo: a small real target made on this machine, a draft for it, and what the draft gains.

No download: the target is a Qwen3 of two million parameters, trained for about a minute on the one
text that every machine with Python has, the sources of the standard library. Its draft learns from
text that the target writes itself, as drafts for large targets do. All of it is built once and kept
in the user's cache; any number of processes may ask for it at the same time.
"""

from colospec.demo.target import ensure_target, is_built, target_config, target_directory
from colospec.demo.text import DemoData, ensure_data, ensure_written

__all__ = [
    "DemoData",
    "ensure_data",
    "ensure_target",
    "ensure_written",
    "is_built",
    "target_config",
    "target_directory",
]
