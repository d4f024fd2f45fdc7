"""The result: its arithmetic, its errors, its files, and when enough examples have been seen."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from fisher_models import batch, build, layers_of

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.calculator import FisherInformationCalculator
from lwa_helpers.fisher.convergence import convergence_curve, examples_needed, split_half_spearman
from lwa_helpers.fisher.kfac import kfac_effective_ranks
from lwa_helpers.fisher.losses import next_token_nll
from lwa_helpers.fisher.result import Column, FisherResult


@pytest.fixture
def hand():
    """Two layers, three columns, four examples."""
    columns = [Column(0, "a", 2), Column(0, "b", 3), Column(1, "a", 10)]
    traces = np.array([[1.0, 2.0, 5.0], [3.0, 0.0, 5.0], [1.0, 4.0, 9.0], [3.0, 2.0, 1.0]])
    return FisherResult(traces, columns, "empirical", "module")


def test_hand_worked_values(hand):
    np.testing.assert_array_equal(hand.per_example, [[3, 5], [3, 5], [5, 9], [5, 1]])
    np.testing.assert_array_equal(hand.per_layer, [4, 5])
    np.testing.assert_allclose(hand.per_layer_per_parameter, [0.8, 0.5])
    np.testing.assert_allclose(hand.standard_error, [np.sqrt(4 / 3) / 2, np.sqrt(32 / 3) / 2])
    frame = hand.to_frame()
    assert list(frame) == ["layer", "module", "trace", "n_parameters", "trace_per_parameter", "standard_error"]
    assert frame["trace"].tolist() == [2, 2, 5] and frame["trace_per_parameter"].tolist() == [1, 2 / 3, 0.5]
    groups = hand.by_group(["x", "x", "y", "y"])
    assert groups[["group", "layer", "trace", "n_examples"]].values.tolist() == [
        ["x", 0, 3, 2],
        ["x", 1, 5, 2],
        ["y", 0, 5, 2],
        ["y", 1, 5, 2],
    ]
    with pytest.raises(LwaError, match="3 group labels for 4 examples"):
        hand.by_group([1, 2, 3])


def test_standard_error_agrees_with_repeated_subsampling():
    rng = np.random.default_rng(0)
    population = rng.gamma(2.0, 3.0, size=(200_000, 2))
    columns = [Column(0, "", 1), Column(1, "", 1)]
    results = [FisherResult(rng.choice(population, 100, axis=0), columns, "empirical", "layer") for _ in range(400)]
    spread = np.std([result.per_layer for result in results], axis=0)
    np.testing.assert_allclose(np.mean([result.standard_error for result in results], axis=0), spread, rtol=0.1)


def test_one_example_has_no_standard_error(hand):
    single = FisherResult(hand.traces[:1], hand.columns, "empirical", "module")
    assert np.isnan(single.standard_error).all() and single.per_layer.tolist() == [3, 5]


@pytest.mark.parametrize("granularity", ["layer", "module", "head", "parameter"])
def test_save_and_load(tmp_path, granularity):
    model = build("llama")
    result = FisherInformationCalculator(granularity=granularity).calculate(model, [batch(lengths=(6, 8))])
    result.save(tmp_path / "scores")
    again = FisherResult.load(tmp_path / "scores.safetensors")
    np.testing.assert_array_equal(again.traces, result.traces)
    assert (again.columns, again.estimator, again.granularity) == (result.columns, result.estimator, granularity)
    pd.testing.assert_frame_equal(again.to_frame(), result.to_frame())
    assert again.diagonal.keys() == result.diagonal.keys()
    assert all(torch.equal(value, again.diagonal[name]) for name, value in result.diagonal.items())
    assert json.loads((tmp_path / "scores.json").read_text())["n_examples"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.json", "scores.safetensors"]


def test_load_refuses_what_does_not_belong_together(tmp_path, hand):
    with pytest.raises(LwaError, match="does not exist"):
        FisherResult.load(tmp_path / "absent")
    hand.save(tmp_path / "one")
    hand.traces = hand.traces + 1
    hand.save(tmp_path / "two")
    (tmp_path / "two.safetensors").replace(tmp_path / "one.safetensors")
    with pytest.raises(LwaError, match="is not the file that one.json describes"):
        FisherResult.load(tmp_path / "one")
    (tmp_path / "one.json").write_text("[]")
    with pytest.raises(LwaError, match="not the description"):
        FisherResult.load(tmp_path / "one")


def test_fisher_times_weight_squared_does_not_change_when_weights_are_rescaled():
    rows = batch(lengths=(6, 8))
    model = build("llama").double()
    calculator = FisherInformationCalculator(granularity="parameter")
    before = calculator.calculate(model, [rows])
    with torch.no_grad():  # the same function: the value path is scaled up and the output path down
        attention = layers_of(model)[1].self_attn
        for parameter in attention.v_proj.parameters():
            parameter.mul_(8)
        attention.o_proj.weight.div_(8)
    after = calculator.calculate(model, [rows])
    assert abs(after.per_layer[1] / before.per_layer[1] - 1) > 1
    np.testing.assert_allclose(after.per_layer_weighted, before.per_layer_weighted, rtol=1e-6)
    expected = sum(
        float((value * attention.get_parameter(name.split("self_attn.")[1]).detach().double() ** 2).sum())
        for name, value in after.diagonal.items()
        if name.startswith("1.self_attn")
    )
    frame = after.to_frame()
    own = frame[(frame["layer"] == 1) & frame["module"].str.startswith("self_attn")]
    assert own["fisher_weight2"].sum() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(LwaError, match="needs the diagonal"):
        _ = FisherInformationCalculator().calculate(model, [rows]).per_layer_weighted


def test_convergence_and_the_stopping_rule(caplog):
    caplog.set_level("INFO", logger="lwa_helpers")
    rng = np.random.default_rng(0)
    clear, noise = np.arange(1.0, 9.0), rng.normal(size=(400, 8))
    curve = convergence_curve(clear + 2 * noise)
    assert curve["n_examples"].is_monotonic_increasing and curve["n_examples"].iloc[-1] == 400
    needed = examples_needed(curve, 0.95)
    assert 8 < needed <= 400 and (curve.loc[curve["n_examples"] >= needed, "spearman"] >= 0.95).all()
    assert split_half_spearman(clear + 0 * noise) == pytest.approx(1.0)
    assert abs(split_half_spearman(noise)) < 0.5 and examples_needed(convergence_curve(noise)) is None
    assert examples_needed(pd.DataFrame({"n_examples": [4, 8, 16], "spearman": [0.96, 0.9, 0.97]})) == 16
    model = build("llama", num_hidden_layers=4)
    seen = []

    def dataset():
        for seed in range(100):
            seen.append(seed)
            yield batch(lengths=(8, 8), seed=seed)

    result = FisherInformationCalculator(stop_at=0.8).calculate(model, dataset())
    assert result.n_examples == 2 * len(seen) < 200
    assert f"after {result.n_examples} examples" in caplog.text
    assert split_half_spearman(result.per_example) >= 0.8


def test_effective_ranks_from_eigenvalues():
    model = build("gpt2").double().eval()
    rows = batch(lengths=(7, 5))
    frame = kfac_effective_ranks(model, [rows, rows], layers=[1])
    seen = {}
    c_fc = layers_of(model)[1].mlp.c_fc
    c_fc.register_forward_hook(
        lambda _m, args, out: (seen.update(a=args[0].detach()), out.register_hook(lambda g: seen.update(b=g)))[0]
    )
    next_token_nll(model, rows).sum().backward()
    b = seen["b"].flatten(0, 1)
    used = b.abs().sum(1) > 0
    for column, side in (("input_rank", seen["a"].flatten(0, 1)[used]), ("gradient_rank", b[used])):
        values = torch.linalg.eigvalsh(side.T @ side)
        rank = float(values.sum() ** 2 / values.square().sum())
        assert frame.loc[frame["module"] == "mlp.c_fc", column].item() == pytest.approx(rank, rel=1e-9)
    assert set(frame["layer"]) == {1} and len(frame) == 4
