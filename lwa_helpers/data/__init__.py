"""Raw reviews to interactions, prompts and windows."""

from __future__ import annotations

from lwa_helpers.config import DataConfig
from lwa_helpers.data.interactions import Interactions
from lwa_helpers.data.movielens import load_movielens

__all__ = ["Interactions", "load_amazon", "load_data", "load_movielens"]


def load_amazon(*args, **kwargs) -> Interactions:
    from lwa_helpers.data.amazon import load_amazon

    return load_amazon(*args, **kwargs)


def load_data(config: DataConfig) -> Interactions:
    """Return the dataset that the settings name."""
    from lwa_helpers.paths import ROOT

    if config.name == "movielens":
        return load_movielens()
    return load_amazon(ROOT / config.root, config.name, k=config.k_core, split=config.split)
