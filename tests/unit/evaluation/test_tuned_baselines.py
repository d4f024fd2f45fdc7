"""The baselines of the main table, tuned with their grids."""

import pytest
from tiny_lm import office_config

from lwa_helpers.data.loading import load_data
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.baselines import EASE
from lwa_helpers.evaluation.sasrec import ESASRec, SASRec
from lwa_helpers.evaluation.tuned_baselines import tuned_baselines

pytestmark = pytest.mark.unit


def test_grids_follow_the_settings_and_names_choose(tmp_path):
    sasrec = {"evaluation__sasrec_dropouts": [0.1, 0.4], "evaluation__sasrec_epochs": 1}
    config = office_config(tmp_path / "office", **sasrec)
    data = load_data(config.data)
    found = tuned_baselines(data, config.evaluation, 3, ("ease", "sasrec", "esasrec"))
    assert [type(each.best) for each in found.values()] == [EASE, SASRec, ESASRec]
    assert found["ease"].tried.l2.tolist() == [100.0, 300.0, 1000.0]
    for name in ("sasrec", "esasrec"):
        tried = found[name].tried[["dropout", "learning_rate", "seed", "max_epochs", "dim"]]
        assert tried.values.tolist() == [[0.1, 3e-3, 3, 1, 64], [0.4, 3e-3, 3, 1, 64]]
    with pytest.raises(LwaError, match="unknown baselines .'bpr'.: choose among popularity"):
        tuned_baselines(data, config.evaluation, 0, ("bpr",))


def test_the_settings_list_the_baselines_and_sizes_are_tried_too(tmp_path):
    chosen = {"evaluation__baselines": ["ease", "sasrec"], "evaluation__sasrec_dims": [8, 16]}
    config = office_config(tmp_path / "office", evaluation__sasrec_epochs=1, **chosen)
    data = load_data(config.data)
    found = tuned_baselines(data, config.evaluation, 0)
    assert list(found) == ["ease", "sasrec"] and found["sasrec"].tried.dim.tolist() == [8, 16]
    assert found["sasrec"].best.item_vectors.shape == (8, found["sasrec"].settings["dim"])
    config = office_config(tmp_path / "office", evaluation__baselines=["ease", "bpr"])
    with pytest.raises(LwaError, match="unknown baselines .'bpr'"):
        tuned_baselines(data, config.evaluation, 0)


def test_a_smoke_run_has_a_baseline_of_each_kind(tmp_path):
    config = office_config(tmp_path / "office", evaluation__sasrec_epochs=1)
    found = tuned_baselines(load_data(config.data), config.evaluation, 0)
    assert list(found) == ["popularity", "recent_popularity", "itemknn", "ease", "sasrec"]
