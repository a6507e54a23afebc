"""DSpark, DFlash whose tokens depend on the one before, and that knows how sure it is."""

from colospec.draft.catalog import Algorithm
from colospec.draft.dspark.config import DSparkConfig

ALGORITHM = Algorithm(config=DSparkConfig, model="colospec.draft.dspark.model:DSpark")
