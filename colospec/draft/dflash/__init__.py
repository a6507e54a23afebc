"""DFlash, a few layers that draft a block of tokens at once."""

from colospec.draft.catalog import Algorithm
from colospec.draft.dflash.config import DFlashConfig

ALGORITHM = Algorithm(config=DFlashConfig, model="colospec.draft.dflash.model:DFlash")
