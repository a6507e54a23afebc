"""`export.*`: the directory that serving engines load."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from colospec.config.dtype import Dtype


class ExportFormat(Enum):
    """Layout of the exported draft: sglang is also read by vLLM, speculators by vLLM alone."""

    sglang = "sglang"
    speculators = "speculators"


@dataclass
class ExportConfig:
    format: ExportFormat = ExportFormat.sglang
    dtype: Dtype = Dtype.bfloat16
    """Type of the weights in the file; float16 for targets that run in it, never auto."""

    def check(self) -> None:
        """Raise ValueError for the first setting that cannot work."""
        if self.dtype is Dtype.auto:
            raise ValueError("export.dtype=auto does not exist; use bfloat16, float16 or float32")
