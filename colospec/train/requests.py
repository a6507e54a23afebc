"""What trainer 0 asks its engine to capture beside the plan: keys of the job's store.

The plan says when a probe is due, so both sides know when to ask and when to listen; only the
tokens, which decoding makes up as it goes, must travel. Features come back through the ring.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colospec.batch import Cursor, TokenBatch
from colospec.store import JobStore


class Requests:
    """One side's view of the numbered requests of a job; both sides count alike.

    Trainer 0 calls `ask` and `finish`, each rank of its engine's replica `take`.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._number = 0

    def ask(self, token_ids: Tensor) -> TokenBatch:
        """Ask for the features of one text, token_ids [T]; return the micro-batch to expect."""
        ids = token_ids.tolist()
        return self.batch(ids, self._put(ids))

    def forget(self, tokens: TokenBatch) -> None:
        """Free what was asked for with `ask`, now that its features are here."""
        self._store.delete(f"probe/{tokens.cursor.micro_batch}")

    def finish(self, *, goes_on: bool) -> None:
        """End a probe; or say, probe or not, that training does not go on."""
        self._put(goes_on)

    def take(self, *, timeout_s: float) -> TokenBatch | bool:
        """Wait for the next request: tokens to capture, or whether training goes on.

        Raises TimeoutError naming trainer 0.
        """
        try:
            value = self._store.get_json(f"probe/{self._number}", timeout_s=timeout_s)
        except TimeoutError as error:
            raise TimeoutError(
                f"trainer 0 neither began nor went on with a probe within {timeout_s:g} s; "
                "see limit.step_s and limit.checkpoint_s"
            ) from error
        self._number += 1
        return value if isinstance(value, bool) else self.batch(value, self._number - 1)

    def _put(self, value: object) -> int:
        self._store.set_json(f"probe/{self._number}", value)
        self._number += 1
        return self._number - 1

    @staticmethod
    def batch(ids: list[int], number: int) -> TokenBatch:
        """Return the micro-batch of one text."""
        mask = torch.ones(len(ids), dtype=torch.bool)
        return TokenBatch.pack(Cursor(0, number, 0), (number,), [torch.tensor(ids)], [mask])
