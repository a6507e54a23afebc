"""`mps.*`: how trainer and engine share a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from colospec.config.ranges import check_numbers


class MpsUse(Enum):
    """require fails without CUDA MPS, auto falls back to time slicing with a warning."""

    require = "require"
    auto = "auto"
    off = "off"


@dataclass
class MpsConfig:
    """CUDA MPS, by which trainer and engine share a GPU; without effect on a CPU and in alternate
    mode. Threads and memory limits are those of the MPS manual."""

    use: MpsUse = MpsUse.require
    trainer_priority: int = 0
    """Client priority: 0 is normal, 1 below normal."""
    engine_priority: int = 0
    trainer_threads: int | None = None
    """Cap on the share of SMs, in percent. Off: several caps make bfloat16 products wrong, and a
    run whose products are wrong does not start."""
    engine_threads: int | None = None
    limit_memory: bool = False
    """Let MPS enforce memory.*_fraction too, on all device memory of a process."""

    def check(self) -> None:
        """Raise ValueError for the first setting that cannot work."""
        priorities = ("engine_priority", "trainer_priority")
        threads = ("engine_threads", "trainer_threads")
        check_numbers(
            self,
            prefix="mps.",
            at_least=dict.fromkeys(priorities, 0) | dict.fromkeys(threads, 1),
            at_most_one=priorities,
        )
        for name in threads:
            share = getattr(self, name)
            if share is not None and share > 100:
                raise ValueError(
                    f"mps.{name}={share} is a share of the SMs in percent: at most 100"
                )
