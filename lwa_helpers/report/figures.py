"""The paper's figures.

Each function draws one saved frame, computes nothing new, and returns a Figure of exact ACM width. If the frame has no
rows or lacks a column, the function raises an LwaError that says so and names the missing column.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lwa_helpers.errors import LwaError
from lwa_helpers.report.style import (
    BLACK,
    BLUE,
    GREY,
    HEATMAP,
    PLAIN,
    Label,
    Look,
    figure,
    look,
    place_labels,
    plain_ticks,
)
from lwa_helpers.report.tables import require

METRIC = "NDCG@10"
# Offsets of a label from its point or from the end of its line, in points.
BESIDE = [(5, 0), (-5, 0), (5, 7), (-5, 7), (5, -7), (-5, -7), (5, 14), (-5, 14), (5, -14), (-5, -14)]
LINE_END = [(4, 0), *((4, sign * step) for step in (4, 8, 12, 16, 20) for sign in (1, -1))]


def history_lengths(frame: pd.DataFrame) -> Figure:
    """Draw a histogram of the number of interactions per user.

    Args:
        frame: column length, one row per user.

    Returns:
        The figure.
    """
    require(frame, ["length"], "figure history_lengths")
    length, median = frame["length"], frame["length"].median()
    fig, ax = _axes(height=1.55)
    bins = np.unique(np.geomspace(length.min(), length.max() + 1, 33).round()).tolist()
    ax.hist(length, bins=bins, color=BLUE, edgecolor="white", linewidth=0.3)
    ax.axvline(median, color=BLACK, linewidth=0.8, linestyle="--")
    ax.text(median * 1.05, 1, f"median {median:g}", transform=ax.get_xaxis_transform(), va="top")
    ax.set(xscale="log", xlabel="Interactions per user (log scale)", ylabel="Users")
    plain_ticks(ax.xaxis)
    return fig


def popularity_curve(frame: pd.DataFrame) -> Figure:
    """Draw the interactions of each item by its popularity rank: the long tail.

    Args:
        frame: columns rank (1 is the most popular item) and interactions.

    Returns:
        The figure.
    """
    require(frame, ["rank", "interactions"], "figure popularity_curve")
    frame = frame.sort_values("rank")
    fig, ax = _axes(height=1.55)
    ax.plot(frame["rank"], frame["interactions"], color=BLUE, drawstyle="steps-mid")
    ax.set(xscale="log", yscale="log", xlabel="Item rank by popularity", ylabel="Interactions")
    plain_ticks(ax.xaxis)
    plain_ticks(ax.yaxis)
    ax.grid(True)
    return fig


def popularity_drift(frame: pd.DataFrame) -> Figure:
    """Draw how long favourites last: the share of each period's interactions that the top tenth of the items gets.

    Args:
        frame: columns period (in order of time), own (share of the top tenth of the period itself) and before (share of
            the top tenth of the period before it).

    Returns:
        The figure.
    """
    require(frame, ["period", "own", "before"], "figure popularity_drift")
    frame = frame.sort_values("period")
    fig, ax = _axes(height=1.55)
    labels: list[Label] = []
    for column, name, color, line in (
        ("own", "of the period itself", GREY, "--"),
        ("before", "of the one before", BLUE, "-"),
    ):
        ax.plot(frame["period"], 100 * frame[column], color=color, linestyle=line)
        places = [
            (*point, dx, dy) for point in zip(frame["period"], 100 * frame[column]) for dy in (7, -7) for dx in (1, -1)
        ]
        labels.append((name, color, places))
    ax.set(xlabel="Period (equal numbers of events)", ylabel="Share of top tenth (%)", ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(True, axis="y")
    place_labels(ax, labels)
    return fig


def fisher_heatmap(frame: pd.DataFrame) -> Figure:
    """Draw the Fisher trace of each module of each layer, with one colour scale for all stages.

    Args:
        frame: columns stage (before, after), layer, module and trace (above 0).

    Returns:
        The figure.

    Raises:
        LwaError: if a trace is not above 0.
    """
    require(frame, ["stage", "layer", "module", "trace"], "figure fisher_heatmap")
    if not (frame["trace"] > 0).all():
        raise LwaError("figure fisher_heatmap: column trace must be above 0 for a logarithmic scale")
    stages, modules = list(frame["stage"].unique()), list(frame["module"].unique())
    fig = figure("text", 0.62 + 0.145 * len(modules))
    axes = fig.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    norm = LogNorm(frame["trace"].min(), frame["trace"].max())
    for ax, stage in zip(axes, stages):
        grid = frame[frame["stage"] == stage].pivot(index="module", columns="layer", values="trace").reindex(modules)
        sns.heatmap(
            grid, norm=norm, cmap=HEATMAP, cbar=False, yticklabels=[module_label(module) for module in modules], ax=ax
        )
        ax.set(title=look(stage).label, xlabel="Decoder layer", ylabel=None)
        ax.tick_params(length=0)
    axes[0].set_ylim(len(modules), 0)  # each heat map turns the axis over that all of them share
    fig.colorbar(axes[0].collections[0], ax=list(axes), label="Fisher trace", pad=0.01, aspect=12)
    return fig


def module_label(module: str) -> str:
    """Return a module's short name, e.g. "q" for "self_attn.q_proj"."""
    return module.rsplit(".", 1)[-1].replace("_proj", "").replace("layernorm", "norm").replace("_", " ")


def fisher_layers(frame: pd.DataFrame) -> Figure:
    """Draw the Fisher trace of each layer, with whiskers of one standard error.

    Args:
        frame: columns stage (before, after), layer, trace, standard_error and upper (bool: whether the layer is one of
            the upper layers of H1, which are shaded).

    Returns:
        The figure.
    """
    require(frame, ["stage", "layer", "trace", "standard_error", "upper"], "figure fisher_layers")
    stages = list(frame["stage"].unique())
    fig = figure("column", 0.35 + 1.0 * len(stages))
    axes = fig.subplots(len(stages), 1, sharex=True, squeeze=False)[:, 0]
    for ax, stage in zip(axes, stages):
        part = frame[frame["stage"] == stage].sort_values("layer")
        upper = part.loc[part["upper"], "layer"]
        ax.axvspan(upper.min() - 0.5, upper.max() + 0.5, color="#EEEEEE", linewidth=0)
        ax.bar(part["layer"], part["trace"], width=0.8, color=look(stage).color)
        ax.errorbar(part["layer"], part["trace"], part["standard_error"], fmt="none", ecolor=BLACK, elinewidth=0.7)
        ax.set(ylabel="Fisher trace", xlim=(part["layer"].min() - 0.6, part["layer"].max() + 0.6))
        ax.set_ylim(0, 1.08 * (part["trace"] + part["standard_error"]).max())
        ax.set_title(look(stage).label, loc="left")
        ax.yaxis.set_major_formatter(PLAIN)
    axes[-1].set_xlabel("Decoder layer (shaded: the upper layers of H1)")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    return fig


def importance_correlation(frame: pd.DataFrame) -> Figure:
    """Draw how well each importance score predicts the measured loss when a layer is left out.

    Args:
        frame: columns measure, spearman, low and high.

    Returns:
        The figure.
    """
    require(frame, ["measure", "spearman", "low", "high"], "figure importance_correlation")
    frame = frame.sort_values("spearman")
    fig, ax = _axes(height=0.55 + 0.155 * len(frame))
    draw_intervals(ax, frame["spearman"], frame["low"], frame["high"], [look(m) for m in frame["measure"]])
    ax.set(xlim=(-1.02, 1.02), xlabel="Spearman ρ with leave-one-out loss")
    return fig


def weights_by_strategy(frame: pd.DataFrame) -> Figure:
    """Draw the weights that each strategy gives to the student's layers, with their values for up to 12 layers.

    Args:
        frame: columns strategy, layer and weight (mean 1 over the layers).

    Returns:
        The figure.
    """
    require(frame, ["strategy", "layer", "weight"], "figure weights_by_strategy")
    strategies = list(frame["strategy"].unique())
    grid = frame.pivot(index="strategy", columns="layer", values="weight").loc[strategies]
    fig, ax = _axes(height=0.5 + 0.18 * len(strategies))
    top = grid.to_numpy().max()
    mesh = ax.pcolormesh(grid.columns, range(len(strategies)), grid, cmap=HEATMAP, vmin=0, vmax=top)
    ax.set_yticks(range(len(strategies)), [look(strategy).label for strategy in strategies])
    ax.set(xlabel="Student layer", xticks=grid.columns)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.invert_yaxis()
    for row, column in np.ndindex(grid.shape if grid.shape[1] <= 12 else (0, 0)):
        weight = grid.iat[row, column]
        color = "white" if weight < 0.55 * top else "black"
        ax.text(grid.columns[column], row, f"{weight:.2f}", color=color, fontsize=6, ha="center", va="center")
    fig.colorbar(mesh, label="Weight", pad=0.02, aspect=14)
    return fig


def ablation_forest(frame: pd.DataFrame, seeds: pd.DataFrame | None = None, reference: str = "uniform") -> Figure:
    """Draw each arm's paired difference to a reference arm with its interval over users, the best arm on top.

    Args:
        frame: columns arm, difference, low and high.
        seeds: columns arm, seed and difference; adds one small tick per seed.
        reference: name of the reference.

    Returns:
        The figure.
    """
    require(frame, ["arm", "difference", "low", "high"], "figure ablation_forest")
    frame = frame.sort_values("difference").reset_index(drop=True)
    fig, ax = _axes(height=0.6 + 0.165 * len(frame))
    draw_intervals(ax, frame["difference"], frame["low"], frame["high"], [look(arm) for arm in frame["arm"]])
    if seeds is not None:
        require(seeds, ["arm", "seed", "difference"], "figure ablation_forest (seeds)")
        row = {arm: position for position, arm in enumerate(frame["arm"])}
        ax.plot(seeds["difference"], seeds["arm"].map(row) - 0.3, "|", color=GREY, markersize=3.5, markeredgewidth=0.8)
    ax.set(xlabel=f"{METRIC} difference to {reference}", ylim=(-0.6, len(frame) - 0.4))
    ax.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
    return fig


def loss_curves(frame: pd.DataFrame) -> Figure:
    """Draw the distillation loss and its parts over the steps of training.

    Args:
        frame: columns step, series (loss, ce, kl, hidden or valid) and loss.

    Returns:
        The figure.
    """
    require(frame, ["step", "series", "loss"], "figure loss_curves")
    fig, ax = _axes(height=2.0)
    ends: list[Label] = []
    for series, part in frame.sort_values("step").groupby("series", sort=False):
        style = look(series)
        ax.plot(part["step"], part["loss"], color=style.color, linestyle=style.linestyle)
        ends.append((style.label, style.color, [(*part[["step", "loss"]].iloc[-1], *offset) for offset in LINE_END]))
    first, last = frame["step"].min(), frame["step"].max()
    ax.set(xlabel="Optimiser step", ylabel="Loss (log scale)", yscale="log", xlim=(first, last + 0.38 * (last - first)))
    ax.set_xticks([tick for tick in MaxNLocator(5, integer=True).tick_values(first, last) if first <= tick <= last])
    ax.grid(True, axis="y")
    plain_ticks(ax.yaxis)
    place_labels(ax, ends)
    return fig


def quality_vs_size(frame: pd.DataFrame) -> Figure:
    """Draw quality against the number of parameters, with 95 % intervals.

    Args:
        frame: columns system, parameters, ndcg, low and high. A system with a missing number of parameters is a
            horizontal line in its own style. Several rows of the system "student" are joined by a line, and each is
            labelled with its number of layers, from the column layers.

    Returns:
        The figure.
    """
    require(frame, ["system", "parameters", "ndcg", "low", "high"], "figure quality_vs_size")
    sized = frame.dropna(subset="parameters")
    fig, ax = _axes(height=2.1)
    students = sized[sized["system"] == "student"].sort_values("parameters")
    names = pd.Series("", index=sized.index)
    if len(students) > 1:
        names = students["layers"].map("{:.0f} layers".format).reindex(sized.index, fill_value="")
        ax.plot(students["parameters"] / 1e6, students["ndcg"], color=look("student").color, linewidth=0.8, zorder=1)
    labels = _scatter(ax, sized["parameters"] / 1e6, sized, sized["system"])
    labels = [(name or text, color, places) for name, (text, color, places) in zip(names, labels)]
    left, right = ax.get_xlim()
    for name, ndcg in frame.loc[frame["parameters"].isna(), ["system", "ndcg"]].itertuples(index=False):
        style = look(name)
        ax.axhline(ndcg, color=style.color, linestyle=style.linestyle, linewidth=0.8)
        places = [(x, ndcg, dx, dy) for x, dx in ((right, -1), (left, 1)) for dy in (5, -5)]
        labels.append((style.label, style.color, places))
    ax.set(xlabel="Parameters (millions, log scale)", ylabel=METRIC)
    place_labels(ax, labels)
    return fig


def teacher_frontier(frame: pd.DataFrame) -> Figure:
    """Draw quality against latency, with a line through the teachers that no other beats in both.

    Args:
        frame: columns teacher, latency_ms, ndcg, low and high. A teacher that could not be asked has a missing ndcg and
            is named below the axis.

    Returns:
        The figure.

    Raises:
        LwaError: if no teacher answered.
    """
    require(frame, ["teacher", "latency_ms", "ndcg", "low", "high"], "figure teacher_frontier")
    measured = frame.dropna(subset=["latency_ms", "ndcg"]).sort_values("latency_ms")
    if measured.empty:
        raise LwaError("figure teacher_frontier: no teacher answered, so there is nothing to draw")
    absent = [look(name).label for name in frame.loc[~frame.index.isin(measured.index), "teacher"]]
    fig, ax = _axes(height=2.1)
    best = measured[measured["ndcg"] > measured["ndcg"].cummax().shift(fill_value=-np.inf)]
    ax.plot(best["latency_ms"], best["ndcg"], color=GREY, linewidth=0.8, drawstyle="steps-post", zorder=1)
    labels = _scatter(ax, measured["latency_ms"], measured, measured["teacher"])
    note = f"\nno answer here: {', '.join(absent)}" if absent else ""
    ax.set(xlabel=f"Median latency per user (ms, log scale){note}", ylabel=METRIC)
    place_labels(ax, labels)
    return fig


def ranking_cost(frame: pd.DataFrame) -> Figure:
    """Draw the time to rank for one user against history length and catalogue size, for each way to rank.

    Args:
        frame: columns system (naive, title, search, item), history_tokens, items and seconds. Each of the two panels
            varies one quantity and shows the rows in which the other has its first value.

    Returns:
        The figure.
    """
    require(frame, ["system", "history_tokens", "items", "seconds"], "figure ranking_cost")
    fig = figure("column", 1.9)
    axes = fig.subplots(1, 2, sharey=True)
    panels = ("history_tokens", "items", "History (tokens)"), ("items", "history_tokens", "Catalogue (titles)")
    for ax, (x, fixed, label) in zip(axes, panels):
        for name, part in frame[frame[fixed] == frame[fixed].iloc[0]].sort_values(x).groupby("system", sort=False):
            style = look(name)
            ax.plot(
                part[x], part["seconds"], style.marker, color=style.color, linestyle=style.linestyle, label=style.label
            )
        ax.set(xscale="log", yscale="log", xlabel=label)
        ax.grid(True, axis="y")
        plain_ticks(ax.xaxis)
    axes[0].set_ylabel("Seconds per user")
    axes[0].legend(fontsize=7)
    return fig


def _axes(height: float) -> tuple[Figure, Axes]:
    """Return a figure of one column's width and its only axes; `height` in inches."""
    fig = figure("column", height)
    return fig, fig.subplots()


def draw_intervals(ax: Axes, value: pd.Series, low: pd.Series, high: pd.Series, looks: list[Look]) -> None:
    """Draw horizontal intervals, each with a dot in a row of its own, and a vertical line at zero."""
    ax.axvline(0, color=BLACK, linewidth=0.6)
    for row, style in enumerate(looks):
        ax.plot([low.iloc[row], high.iloc[row]], [row, row], color=style.color, linewidth=1.2)
        ax.plot(value.iloc[row], row, style.marker, color=style.color)
    ax.set_yticks(range(len(looks)), [style.label for style in looks])
    ax.tick_params(axis="y", length=0)
    ax.grid(True, axis="x")
    ax.spines["left"].set_visible(False)


def _scatter(ax: Axes, x: pd.Series, frame: pd.DataFrame, names: pd.Series) -> list[Label]:
    """Draw points with vertical intervals on a logarithmic x axis with room for labels, and return the labels.

    Args:
        ax: the axes.
        x: x coordinate of each point.
        frame: columns ndcg, low and high.
        names: the method of each point.

    Returns:
        The labels, for place_labels.
    """
    labels: list[Label] = []
    for name, at, row in zip(names, x, frame[["ndcg", "low", "high"]].itertuples(index=False)):
        style = look(name)
        ax.plot([at, at], [row.low, row.high], color=style.color, linewidth=1)
        ax.plot(at, row.ndcg, style.marker, color=style.color)
        labels.append((style.label, style.color, [(at, row.ndcg, *offset) for offset in BESIDE]))
    ax.set(xscale="log", xlim=(x.min() / 2.2, x.max() * 2.2))
    ax.grid(True, axis="y")
    plain_ticks(ax.xaxis)
    return labels
