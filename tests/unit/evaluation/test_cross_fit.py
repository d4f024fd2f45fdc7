"""Recommenders that speak of each user from a fit on others, how sure they may be, and their scores as one."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import kendalltau
from tiny_interactions import interactions, random_interactions

from lwa_helpers.evaluation.baselines import EASE, tune
from lwa_helpers.evaluation.calibration import Calibration, calibrated, ensemble, fitted_scale
from lwa_helpers.evaluation.cross_fit import CrossFitted
from lwa_helpers.evaluation.protocol import Cases, cases


class Seen:
    """Knows which users' rows it was fitted on, and says how many these were."""

    def __init__(self, data):
        self.data, self.users = data, set(data.train.user_id)

    def scores(self, histories):
        return np.full((len(histories), len(self.data.item_ids)), float(len(self.users)))


@pytest.mark.parametrize("folds", [2, 3, 7])
def test_each_user_is_answered_by_the_fit_that_has_not_seen_them(folds):
    data = random_interactions(0, users=17)
    fitted = CrossFitted.of(Seen, data, seed=0, folds=folds)
    users = sorted(set(data.train.user_id))
    assert len(fitted.models) == folds and set(fitted.fold) == set(users)
    sizes = np.bincount(list(fitted.fold.values()), minlength=folds)
    assert sizes.max() - sizes.min() <= 1 and sizes.sum() == 17
    for user in users:
        (model,) = [model for model in fitted.models if user not in model.users]
        assert fitted.models[fitted.fold[user]] is model
    for place, model in enumerate(fitted.models):
        mine = {user for user in users if fitted.fold[user] != place}
        assert model.users == mine
        rows = data.train[data.train.user_id.isin(mine)]
        assert model.data.train.reset_index(drop=True).equals(rows.reset_index(drop=True))
        assert model.data.valid is data.valid and model.data.item_ids == data.item_ids


def test_scores_come_in_the_order_asked_for_and_strangers_are_answered_by_the_first_fit():
    data = random_interactions(1, users=20)
    fitted = CrossFitted.of(lambda part: EASE(5.0).fit(part), data, seed=3)
    asked = cases(data)
    order = np.random.default_rng(0).permutation(len(asked.targets))
    users = [asked.user_ids[row] for row in order] + ["stranger"]
    histories = [asked.histories[row] for row in order] + [[1, 2]]
    got = fitted.scores(histories, users)
    for row, (user, history) in enumerate(zip(users, histories)):
        want = fitted.models[fitted.fold.get(user, 0)].scores([history])[0]
        np.testing.assert_array_equal(got[row], want)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(got, fitted.models[0].scores(histories))


def test_each_fold_is_a_fit_of_its_own_not_one_model_fitted_over():
    data = random_interactions(1, users=20)
    fitted = CrossFitted.of(lambda part: EASE(5.0).fit(part), data, seed=3)
    a, b = (model.scores([[0, 1]])[0] for model in fitted.models)
    assert not np.allclose(a, b)
    rows = data.train[data.train.user_id.map(fitted.fold) == 1]
    alone = EASE(5.0).fit(replace(data, train=rows))
    np.testing.assert_allclose(a, alone.scores([[0, 1]])[0], atol=1e-10)


def test_who_is_in_which_fold_follows_the_seed():
    data = random_interactions(0, users=30)
    first, again, other = (CrossFitted.of(Seen, data, seed).fold for seed in (0, 0, 1))
    assert first == again != other


def test_one_that_has_learnt_its_users_by_heart_does_so_no_longer():
    """A model that scores what it was fitted on highest gives targets of its own users away; cross-fitted it cannot."""

    class ByHeart(Seen):
        def scores(self, histories):
            own = {tuple(items[:-1]): items[-1] for items in self.sequences().values()}
            rows = np.zeros((len(histories), len(self.data.item_ids)))
            for row, history in enumerate(histories):
                if (target := own.get(tuple(history))) is not None:
                    rows[row, target] = 1
            return rows

        def sequences(self):
            index = {item: place for place, item in enumerate(self.data.item_ids)}
            return {u: [index[i] for i in rows] for u, rows in self.data.train.groupby("user_id").parent_asin}

    data = interactions({f"u{n}": [n % 7, (n * 3) % 7, n % 5, (n + 1) % 7] for n in range(20)}, 7, held_out=0)
    whole = ByHeart(data)
    histories = [items[:-1] for items in whole.sequences().values()]
    assert whole.scores(histories).any(1).all()
    fitted = CrossFitted.of(ByHeart, data, seed=0)
    assert not fitted.scores(histories, list(whole.sequences())).any(1).all()


# How sure


def test_calibration_by_hand():
    """Two users; the target is first among the unseen items of one and second for the other, a seen item above it."""
    scores = np.array([[3.0, 1.0, 0.0], [2.2, 2.1, 2.0]])
    asked = Cases(["a", "b"], [[], [0]], np.array([0, 2]))
    scale, weight = calibrated(scores, asked)
    assert weight == pytest.approx((1 + 1 / np.log2(3)) / 2)
    assert scale == fitted_scale(scores, asked.targets)

    def likelihood(s):
        p = np.exp(s * scores)
        return np.log(p[[0, 1], asked.targets] / p.sum(1)).sum()

    assert 0.1 < scale < 10 and likelihood(scale) >= max(likelihood(scale * 0.98), likelihood(scale * 1.02))


def test_an_ensemble_by_hand():
    """Weights 1 and 3; scale 2 of log-probabilities squares them. p = (.8, .2); q = (.2, .6), squared (.1, .9)."""
    one, two = np.log([[0.8, 0.2]]), np.log([[0.2, 0.6]])
    calibration = {"a": Calibration(1.0, 0.1), "b": Calibration(2.0, 0.3), "c": Calibration(9.0, 9.0)}
    got = ensemble({"a": one, "b": two}, calibration)
    np.testing.assert_allclose(got, 0.25 * np.array([[0.8, 0.2]]) + 0.75 * np.array([[0.1, 0.9]]))
    np.testing.assert_allclose(ensemble({"b": two}, {"b": Calibration(1.0, 0.3)}), [[0.25, 0.75]])
    large = ensemble({"a": one * 1e4}, {"a": Calibration(1.0, 1.0)})
    assert np.isfinite(large).all() and large.sum() == pytest.approx(1)


def test_an_ensemble_of_one_ranks_as_it_does():
    scores = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    got = ensemble({"a": scores}, {"a": Calibration(0.7, 0.2)})
    assert all(kendalltau(a, b).statistic == pytest.approx(1) for a, b in zip(scores, got))


def test_a_tuned_baseline_is_fitted_on_each_half_with_its_settings():
    data = random_interactions(5)
    histories, users = [[0, 1], [2]], data.train.user_id.unique()[:2].tolist()
    found = tune(EASE, {"l2": [5.0, 500.0]}, data, budget=2)
    want = CrossFitted.of(lambda part: EASE(found.settings["l2"]).fit(part), data, seed=3)
    got = found.cross_fitted(data, seed=3)
    assert got.fold == want.fold
    np.testing.assert_array_equal(got.scores(histories, users), want.scores(histories, users))
