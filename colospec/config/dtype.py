"""The floating-point types that settings name."""

from __future__ import annotations

from enum import Enum


class Dtype(Enum):
    """Floating-point type, by torch's name; auto takes what the model's config.json says."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
