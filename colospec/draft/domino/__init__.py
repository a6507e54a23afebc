"""Domino, DFlash whose logits are corrected by all tokens of the block before."""

from colospec.draft.catalog import Algorithm
from colospec.draft.domino.config import DominoConfig

ALGORITHM = Algorithm(config=DominoConfig, model="colospec.draft.domino.model:Domino")
