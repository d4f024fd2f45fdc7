"""The baselines of the main table, tuned with their grids."""

import pytest
from tiny_lm import office

from lwa_helpers.config import load_config
from lwa_helpers.data import load_data
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation import EASE, SASRec, tuned_baselines

pytestmark = pytest.mark.unit


def test_grids_follow_the_settings_and_names_choose(tmp_path):
    where = {"data.name": "Office_Products", "data.root": str(office(tmp_path / "office")), "data.split": "file", "data.k_core": 0}
    config = load_config("smoke", where | {"evaluation.sasrec_dropouts": [0.1, 0.4], "evaluation.sasrec_epochs": 1})
    data = load_data(config.data)
    found = tuned_baselines(data, config.evaluation, 3, ("ease", "sasrec"))
    assert [type(each.best) for each in found.values()] == [EASE, SASRec]
    assert found["ease"].tried.l2.tolist() == [100.0, 300.0, 1000.0]
    tried = found["sasrec"].tried[["dropout", "learning_rate", "seed", "max_epochs"]]
    assert tried.values.tolist() == [[0.1, 3e-3, 3, 1], [0.4, 3e-3, 3, 1]]
    assert list(tuned_baselines(data, config.evaluation, 0)) == ["popularity", "recent_popularity", "itemknn", "ease", "sasrec"]
    with pytest.raises(LwaError, match="unknown baselines .'bpr'.: choose among popularity"):
        tuned_baselines(data, config.evaluation, 0, ("bpr",))
