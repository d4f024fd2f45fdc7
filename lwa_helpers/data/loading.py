"""The dataset that the settings name."""

from __future__ import annotations

from dataclasses import replace

from lwa_helpers.config import DataConfig
from lwa_helpers.data.amazon import load_amazon
from lwa_helpers.data.interactions import Interactions
from lwa_helpers.data.movielens import load_movielens
from lwa_helpers.data.titles import mend_title
from lwa_helpers.errors import LwaError
from lwa_helpers.paths import ROOT


def load_data(config: DataConfig) -> Interactions:
    """Return the dataset that the settings name: "movielens" or an Amazon category under root.

    A relative root starts at the checkout. MovieLens has only one form, leave-one-out with the whole catalogue: k_core
    does not apply to it.

    Raises:
        LwaError: if the settings ask for another split of MovieLens.
    """
    if config.name != "movielens":
        return load_amazon(ROOT / config.root, config.name, config.k_core, config.split, config.title_limit)
    if config.split != "last_out":
        raise LwaError(f"data.split={config.split!r}: movielens is split leave-one-out; set data.split to last_out")
    data, limit = load_movielens(), config.title_limit
    shortened = sum("shortened_titles" in mend_title(title, limit)[1] for title in data.items.title)
    return replace(data, title_limit=limit, report=data.report | {"shortened_titles": shortened})
