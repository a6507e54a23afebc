"""Numbers that settings may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType


def check_numbers(
    settings: object,
    *,
    at_least: Mapping[str, float] = MappingProxyType({}),
    above_zero: Sequence[str] = (),
    at_most_one: Sequence[str] = (),
    prefix: str = "",
) -> None:
    """Raise ValueError for the first setting, by its name, that is out of its range.

    A setting that is None passes. `at_most_one` are those in [0, 1]; `prefix` stands before the
    names in messages.
    """
    for name, low in at_least.items():
        value = getattr(settings, name)
        if value is not None and not value >= low:
            raise ValueError(f"{prefix}{name}={value} must be at least {low:g}")
    for name in above_zero:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ValueError(f"{prefix}{name}={value} must be above 0")
    for name in at_most_one:
        value = getattr(settings, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{prefix}{name}={value} must be in [0, 1]")
