"""EAGLE-3, one decoder layer that is unrolled on itself."""

from colospec.draft.catalog import Algorithm
from colospec.draft.eagle3.config import Eagle3Config

ALGORITHM = Algorithm(config=Eagle3Config, model="colospec.draft.eagle3.model:Eagle3")
