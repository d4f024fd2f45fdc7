"""Every figure draws what its frame holds, at ACM's width, and says which column is missing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lwa_helpers.errors import LwaError
from lwa_helpers.report import across_figures, figures
from lwa_helpers.report.style import COLUMN_IN, TEXT_IN

pytestmark = pytest.mark.unit

LAYERS = pd.DataFrame(
    [
        {"stage": stage, "layer": layer, "module": module, "trace": scale * (layer + 1), "upper": layer > 2}
        for stage, scale in (("before", 1.0), ("after", 20.0))
        for module in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm")
        for layer in range(5)
    ]
).assign(standard_error=0.1)
PER_LAYER = LAYERS[LAYERS["module"] == "mlp.down_proj"]
FRAMES = {
    "history_lengths": pd.DataFrame({"length": [3, 5, 5, 8, 40, 200]}),
    "popularity_curve": pd.DataFrame({"rank": [3, 1, 2], "interactions": [1, 90, 12]}),
    "popularity_drift": pd.DataFrame({"period": [3, 2, 4], "own": [0.5, 0.6, 0.55], "before": [0.3, 0.4, 0.2]}),
    "fisher_heatmap": LAYERS,
    "fisher_layers": PER_LAYER,
    "importance_correlation": pd.DataFrame(
        {"measure": ["depth", "fisher_empirical"], "spearman": [0.4, -0.2], "low": [0.1, -0.5], "high": [0.6, 0.1]}
    ),
    "weights_by_strategy": pd.DataFrame(
        {"strategy": ["uniform"] * 2 + ["mine"] * 2, "layer": [1, 2, 1, 2], "weight": [1.0, 1.0, 0.5, 1.5]}
    ),
    "ablation_forest": pd.DataFrame(
        {"arm": ["fisher", "none"], "difference": [0.001, -0.002], "low": [-0.001, -0.004], "high": [0.003, 0.0]}
    ),
    "loss_curves": pd.DataFrame(
        {"step": [1, 2, 1, 2], "series": ["ce", "ce", "kl", "kl"], "loss": [5.0, 4.0, 1.0, 0.5]}
    ),
    "quality_vs_size": pd.DataFrame(
        {
            "system": ["teacher", "student", "popularity"],
            "parameters": [135e6, 29e6, None],
            "ndcg": [0.08, 0.075, 0.03],
            "low": [0.07, 0.065, 0.02],
            "high": [0.09, 0.085, 0.04],
        }
    ),
    "ranking_cost": pd.DataFrame(
        [
            {"system": system, "history_tokens": tokens, "items": items, "seconds": scale * items * tokens}
            for system, scale in (("naive", 1e-3), ("title", 1e-4), ("item", 1e-6))
            for tokens, items in ((110, 100), (110, 2420), (28, 100))
        ]
    ),
    "teacher_frontier": pd.DataFrame(
        {
            "teacher": ["smollm2-135m", "gemma3-270m", "slow and worse", "qwen3"],
            "latency_ms": [80.0, 150.0, 900.0, None],
            "ndcg": [0.2, 0.3, 0.25, None],
            "low": [0.1, 0.2, 0.15, None],
            "high": [0.3, 0.4, 0.35, None],
        }
    ),
}
FRAMES |= {
    "fisher_profiles": pd.DataFrame(
        [
            {"teacher": f"Teacher {i}", "depth": 20 * layer + 10, "share": 0.5 + layer / 4}
            for i in range(8)
            for layer in range(5)
        ]
    ),
    "ablations_forest": FRAMES["ablation_forest"].assign(ablation=["Weights", "Layers"], reference="uniform"),
}
COLUMNS = [(name, column) for name, frame in FRAMES.items() for column in frame]
UNUSED = {("fisher_heatmap", "standard_error"), ("fisher_heatmap", "upper"), ("fisher_layers", "module")}


def draw(name: str, frame: pd.DataFrame | None = None):
    module = across_figures if hasattr(across_figures, name) else figures
    return getattr(module, name)(FRAMES[name] if frame is None else frame)


@pytest.mark.parametrize("name", FRAMES)
def test_width_is_exact_and_everything_lies_inside(name):
    fig = draw(name)
    assert fig.get_figwidth() == (TEXT_IN if name == "fisher_heatmap" else COLUMN_IN)
    fig.draw_without_rendering()
    box = fig.get_tightbbox()
    assert box.x0 >= -0.01 and box.x1 <= fig.get_figwidth() + 0.01
    assert box.y0 >= -0.01 and box.y1 <= fig.get_figheight() + 0.01


@pytest.mark.parametrize(("name", "column"), [pair for pair in COLUMNS if pair not in UNUSED])
def test_missing_column_is_named(name, column):
    with pytest.raises(LwaError, match=f"figure {name}: missing column {column};"):
        draw(name, FRAMES[name].drop(columns=column))


@pytest.mark.parametrize("name", FRAMES)
def test_empty_frame_is_an_error(name):
    with pytest.raises(LwaError, match="no rows"):
        draw(name, FRAMES[name].iloc[:0])


@pytest.mark.parametrize("name", FRAMES)
def test_frames_are_left_as_they_were(name):
    frame = FRAMES[name].copy()
    draw(name, frame)
    pd.testing.assert_frame_equal(frame, FRAMES[name])


def test_drift_lines_are_percentages_in_order_of_time():
    own, before = draw("popularity_drift").axes[0].lines
    np.testing.assert_allclose(own.get_xydata(), [[2, 60], [3, 50], [4, 55]])
    np.testing.assert_allclose(before.get_xydata(), [[2, 40], [3, 30], [4, 20]])


def test_heatmap_cells_are_the_traces_of_their_stage():
    fig = draw("fisher_heatmap", LAYERS.sample(frac=1, random_state=0))
    cells = {ax.get_title(): ax.collections[0].get_array() for ax in fig.axes if ax.get_title()}
    for stage, title in (("before", "Before tuning"), ("after", "After tuning")):
        expected = np.tile(np.arange(1, 6) * (1.0 if stage == "before" else 20.0), (3, 1))
        np.testing.assert_allclose(cells[title].reshape(3, 5), expected)
    assert len({(ax.collections[0].norm.vmin, ax.collections[0].norm.vmax) for ax in fig.axes if ax.get_title()}) == 1


def test_heatmap_refuses_a_trace_of_zero():
    with pytest.raises(LwaError, match="above 0"):
        draw("fisher_heatmap", LAYERS.assign(trace=0.0))


def test_layer_bars_and_whiskers():
    ax = draw("fisher_layers", PER_LAYER.sample(frac=1, random_state=0)).axes[1]
    bars = ax.containers[0]
    np.testing.assert_allclose([bar.get_height() for bar in bars], [20, 40, 60, 80, 100])
    np.testing.assert_allclose([bar.get_center()[0] for bar in bars], range(5))
    segments = ax.collections[0].get_segments()
    np.testing.assert_allclose([s[1][1] - s[0][1] for s in segments], 0.2)
    shade = ax.patches[0]
    assert (shade.get_x(), shade.get_width()) == (2.5, 2.0)


def test_forest_is_sorted_and_its_intervals_are_the_frame_s():
    seeds = pd.DataFrame({"arm": ["none", "fisher"], "seed": [0, 0], "difference": [-0.003, 0.002]})
    ax = figures.ablation_forest(FRAMES["ablation_forest"], seeds).axes[0]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["No hidden term", "Fisher"]
    lines = [line.get_xydata().tolist() for line in ax.lines]
    assert [[-0.004, 0], [0.0, 0]] in lines and [[-0.001, 1], [0.003, 1]] in lines
    assert ax.lines[-1].get_xydata().tolist() == [[-0.003, -0.3], [0.002, 0.7]]


def test_weights_are_written_out():
    texts = [text.get_text() for text in draw("weights_by_strategy").axes[0].texts]
    assert texts == ["1.00", "1.00", "0.50", "1.50"]


def test_frontier_leaves_out_the_beaten_and_names_the_absent():
    ax = draw("teacher_frontier").axes[0]
    assert ax.lines[0].get_xydata().tolist() == [[80.0, 0.2], [150.0, 0.3]]
    assert "no answer here: qwen3" in ax.get_xlabel()
    absent = FRAMES["teacher_frontier"].assign(ndcg=np.nan)
    with pytest.raises(LwaError, match="no teacher answered"):
        draw("teacher_frontier", absent)


def test_system_without_parameters_is_a_line():
    ax = draw("quality_vs_size").axes[0]
    assert [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"] == [0.03]
    assert {text.get_text() for text in ax.texts} == {"Teacher, tuned", "Student, distilled", "Popularity"}


def test_students_of_several_depths_are_joined_from_the_smallest_on():
    rows = [
        ("teacher", 30, 106e6, 0.08),
        ("student", 8, 29e6, 0.075),
        ("student", 15, 53e6, 0.07),
        ("student", 2, 8e6, 0.05),
    ]
    frame = pd.DataFrame(rows, columns=["system", "layers", "parameters", "ndcg"]).assign(low=0.04, high=0.09)
    ax = draw("quality_vs_size", frame).axes[0]
    assert ax.lines[0].get_xydata().tolist() == [[8.0, 0.05], [29.0, 0.075], [53.0, 0.07]]
    assert {text.get_text() for text in ax.texts} == {"Teacher, tuned", "2 layers", "8 layers", "15 layers"}


@pytest.mark.parametrize(
    ("module", "label"),
    [("self_attn.q_proj", "q"), ("mlp.down_proj", "down"), ("post_attention_layernorm", "post attention norm")],
)
def test_module_label(module, label):
    assert figures.module_label(module) == label


def test_every_ablation_has_a_panel_with_its_arms_in_order():
    frame = FRAMES["ablation_forest"].assign(ablation="Weights", reference="uniform")
    other = frame.iloc[:1].assign(ablation="Layers", reference="first", arm="last")
    axes = draw("ablations_forest", pd.concat([frame, other])).axes
    assert [ax.get_title("left") for ax in axes] == ["Weights: against uniform", "Layers: against first"]
    labels = [[text.get_text() for text in ax.get_yticklabels()] for ax in axes]
    assert labels == [["No hidden term", "Fisher"], ["Last"]]
    assert axes[1].lines[1].get_xydata().tolist() == [[-0.001, 0], [0.003, 0]]


def test_each_teacher_has_a_line_of_its_own_look():
    ax = draw("fisher_profiles").axes[0]
    lines = ax.lines[1:]
    assert [line.get_label() for line in lines] == [f"Teacher {i}" for i in range(8)]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines[:7]}) == 7
    np.testing.assert_allclose(lines[3].get_ydata(), [0.5, 0.75, 1.0, 1.25, 1.5])
