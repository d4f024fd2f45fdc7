"""The probes' seen items, with the benchmark loaded from its file."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from lwa_helpers.evaluation.metrics import ndcg_at_k
from lwa_helpers.evaluation.protocol import Cases

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def probes(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("probes")


class Fixed:
    """The same scores for everybody; knows which histories it was asked."""

    def scores(self, histories):
        self.read = histories
        return np.tile([9.0, 8, 7, 6, 5], (len(histories), 1))


def test_items_seen_before_what_is_read_are_left_out_too(probes):
    asked, system = Cases(["u", "v"], [[0, 1, 2], [1]], np.array([4, 2])), Fixed()
    read = [history[-1:] for history in asked.histories]
    got = probes.ndcg(system, asked, read)
    assert system.read == read
    np.testing.assert_allclose(got, ndcg_at_k(np.array([2, 2]), 10))
