"""`memory.*`: what each role may take of a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from colospec.config.ranges import check_numbers


@dataclass
class MemoryConfig:
    """Shares of each GPU's memory, enforced in each role's allocator; trainer + engine + 0.10 <= 1.
    Without effect on a CPU."""

    trainer_fraction: float = 0.45
    engine_fraction: float = 0.45

    def check(self) -> None:
        """Raise ValueError for the first setting that cannot work."""
        check_numbers(self, prefix="memory.", above_zero=("engine_fraction", "trainer_fraction"))
        if self.trainer_fraction + self.engine_fraction + 0.10 > 1.0 + 1e-9:
            raise ValueError(
                f"memory.trainer_fraction={self.trainer_fraction} + memory.engine_fraction="
                f"{self.engine_fraction} + 0.10 for the CUDA contexts is above 1; lower one of them"
            )
