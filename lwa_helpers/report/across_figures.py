"""The figures of a study: what its points say, side by side. They keep the rules of `figures`."""

from __future__ import annotations

from itertools import cycle

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lwa_helpers.report.figures import METRIC, draw_intervals
from lwa_helpers.report.style import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, figure, look, plain_ticks
from lwa_helpers.report.tables import require

LINES = [(BLUE, "-"), (VERMILION, "--"), (GREEN, "-."), (PURPLE, ":"), (ORANGE, "-"), (SKY, "--"), (BLACK, "-.")]


def fisher_profiles(frame: pd.DataFrame) -> Figure:
    """Draw how each teacher's Fisher trace is spread over its depth: one line per teacher, 1 where it is even.

    Args:
        frame: columns teacher, depth (per cent of all layers) and share (times that of an even spread).

    Returns:
        The figure.
    """
    require(frame, ["teacher", "depth", "share"], "figure fisher_profiles")
    fig = figure("column", 1.95 + 0.16 * -(-frame["teacher"].nunique() // 2))
    ax = fig.subplots()
    ax.axhline(1, color=BLACK, linewidth=0.6)
    for (name, part), (color, linestyle) in zip(frame.groupby("teacher", sort=False), cycle(LINES)):
        ax.plot(part["depth"], part["share"], color=color, linestyle=linestyle, label=name)
    ax.set(xlabel="Depth (% of the layers)", ylabel="Fisher trace (even: 1)", xlim=(0, 100), yscale="log")
    plain_ticks(ax.yaxis)
    ax.grid(True, axis="y")
    fig.legend(loc="outside lower center", ncols=2, frameon=False)
    return fig


def ablations_forest(frame: pd.DataFrame) -> Figure:
    """Draw each ablation of a study in a panel: the difference of each arm to the panel's reference.

    Args:
        frame: columns ablation, reference, arm, difference, low and high.

    Returns:
        The figure.
    """
    require(frame, ["ablation", "reference", "arm", "difference", "low", "high"], "figure ablations_forest")
    groups = [part.iloc[::-1] for _, part in frame.groupby("ablation", sort=False)]
    heights = [len(part) + 1.2 for part in groups]
    fig = figure("column", 0.5 + 0.165 * sum(heights))
    axes = fig.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, part in zip(axes, groups):
        draw_intervals(ax, part["difference"], part["low"], part["high"], [look(arm) for arm in part["arm"]])
        ax.set_ylim(-0.6, len(part) - 0.4)
        ax.set_title(f"{part['ablation'].iloc[0]}: against {part['reference'].iloc[0]}", loc="left")
    axes[-1].set_xlabel(f"{METRIC} difference")
    axes[-1].xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
    return fig
