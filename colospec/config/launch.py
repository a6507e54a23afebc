"""`launch.*`: how torchrun is started."""

from __future__ import annotations

from dataclasses import dataclass

from colospec.config.ranges import check_numbers


@dataclass
class LaunchConfig:
    """Only for `python -m colospec.run`, which starts torchrun; torchrun's own flags win."""

    gpus: str = "auto"
    """GPUs per node to use: a number, or auto (all visible ones; 1 where there is none)."""
    nodes: int = 1
    """Number of nodes. Above 1, run the same command on every node with `rdzv_endpoint` set."""
    rdzv_endpoint: str | None = None
    """HOST:PORT of the first node; needed when nodes > 1."""
    max_restarts: int = 0
    """How often torchrun restarts a failed job; it resumes from the last checkpoint."""

    def check(self) -> None:
        """Raise ValueError for the first setting that cannot work."""
        check_numbers(self, prefix="launch.", at_least={"max_restarts": 0, "nodes": 1})
        if self.nodes > 1 and not self.rdzv_endpoint:
            raise ValueError(
                f"launch.nodes={self.nodes} needs launch.rdzv_endpoint=HOST:PORT, "
                "an address of the first node"
            )
        if self.nodes > 1 and self.max_restarts:
            raise ValueError(
                f"launch.max_restarts={self.max_restarts} works on one node; with launch.nodes="
                f"{self.nodes} set launch.max_restarts=0 and start the same command again"
            )
        if self.gpus != "auto" and not (self.gpus.isdigit() and int(self.gpus) > 0):
            raise ValueError(f"launch.gpus={self.gpus} must be auto or a number from 1")
