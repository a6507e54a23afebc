"""From YAML to a RunConfig: where the files are, and what Hydra makes of them."""

from __future__ import annotations

from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from colospec.config.mistakes import refuse_unknown
from colospec.config.run import RunConfig, check

_PACKAGE = Path(__file__).parent.parent
CONF_DIR = _PACKAGE / "conf"
if not CONF_DIR.is_dir():
    CONF_DIR = _PACKAGE.parent / "conf"


def register() -> None:
    """Make the schema known to Hydra; config.yaml names it in its defaults list. The settings of
    draft algorithms are registered by `colospec.draft.catalog`."""
    ConfigStore.instance().store(name="schema", node=RunConfig)


def modes() -> list[str]:
    """Return the names that +mode= accepts."""
    return sorted(path.stem for path in (CONF_DIR / "mode").glob("*.yaml"))


def load(cfg: DictConfig) -> RunConfig:
    """Turn the composed config into a checked RunConfig.

    Raises ValueError naming the setting and the fix: no mode, an unknown setting, or values that
    cannot work together.
    """
    if OmegaConf.is_missing(cfg, "mode"):
        choices = " or ".join(f"+mode={name}" for name in modes())
        raise ValueError(f"no mode chosen; add {choices}")
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(f"{missing[0]} has no value; add {missing[0]}=...")
    refuse_unknown(cfg)
    run = OmegaConf.to_object(cfg)
    assert isinstance(run, RunConfig)
    check(run)
    return run
