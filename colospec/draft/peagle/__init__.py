"""P-EAGLE, EAGLE-3 that drafts all its tokens in one pass."""

from colospec.draft.catalog import Algorithm
from colospec.draft.peagle.config import PEagleConfig

ALGORITHM = Algorithm(config=PEagleConfig, model="colospec.draft.peagle.model:PEagle")
