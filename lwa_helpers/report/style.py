"""One look for all figures: ACM widths, embedded TrueType fonts, one colour, marker and line style per method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from lwa_helpers.errors import LwaError

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

COLUMN_IN = 3.3368  # acmart sigconf: \columnwidth
TEXT_IN = 7.0056  # acmart sigconf: \textwidth
WIDTHS = {"column": COLUMN_IN, "text": TEXT_IN}
HEATMAP = "cividis"
PLAIN = FuncFormatter(lambda value, _: f"{value:,.10g}".replace("-", "−"))
# Text, colour, and the places to try: x and y in data coordinates, dx and dy in points.
Label = tuple[str, str, Sequence[tuple[float, float, float, float]]]

# Okabe & Ito, "Color universal design" (2008); grey added for controls.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE, GREY = "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#767676"

RC_PARAMS: dict[RcKeyType, Any] = {
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "figure.dpi": 200,
    "savefig.dpi": 300,
    "savefig.bbox": "standard",
    "font.family": "DejaVu Sans",  # ships with matplotlib, so every machine draws the same
    "mathtext.fontset": "dejavusans",
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.grid": False,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Look:
    """How one method appears in every figure and table.

    Attributes:
        label: its name in print.
        color: hexadecimal colour.
        marker: matplotlib's marker of its points.
        linestyle: matplotlib's style of its lines.
    """

    label: str
    color: str
    marker: str = "o"
    linestyle: str = "-"


LOOKS = {
    # layer weightings, and arms without one
    "uniform": Look("Uniform", BLACK, "o", "-"),
    "linear": Look("Linear", SKY, "^", "--"),
    "exponential": Look("Exponential", PURPLE, "v", "-."),
    "schedule": Look("Schedule 0.1–1.0", GREEN, "D", ":"),
    "fisher": Look("Fisher", VERMILION, "s", "-"),
    "fisher_x_depth": Look("Fisher × depth", ORANGE, "P", "--"),
    "softmax_fisher": Look("Softmax Fisher", BLUE, "h", "-."),
    "fisher_ahead": Look("Fisher ahead", GREEN, "<", "-"),
    "inverse_fisher": Look("Inverse Fisher", VERMILION, "X", ":"),
    "shuffled_fisher": Look("Shuffled Fisher", GREY, "*", "--"),
    "none": Look("No hidden term", GREY, "d", "-"),
    "ce_only": Look("Labels only (CE)", GREY, "p", ":"),
    "labels": Look("Labels only (CE)", GREY, "p", ":"),
    # systems and kinds of systems
    "teacher": Look("Teacher, tuned", BLUE, "o", "-"),
    "student": Look("Student, distilled", VERMILION, "s", "-"),
    "co_taught": Look("Student, co-taught", ORANGE, "P", "--"),
    "ensemble": Look("Ensemble of scores", GREEN, "h", ":"),
    "zero_shot": Look("Teacher, zero-shot", SKY, "o", "--"),
    "local": Look("Local model", BLUE, "o", "-"),
    "ollama": Look("Ollama model", PURPLE, "D", "-"),
    "baseline": Look("Baseline", GREY, "X", ":"),
    "popularity": Look("Popularity", GREY, "X", ":"),
    "recent_popularity": Look("Recent popularity", GREY, "P", ":"),
    "itemknn": Look("ItemKNN", ORANGE, "v", "--"),
    "ease": Look("EASE", GREEN, "^", "--"),
    "sasrec": Look("SASRec", PURPLE, "D", "-."),
    "esasrec": Look("eSASRec", PURPLE, "p", ":"),
    # whose layers a student keeps
    "first": Look("First", BLACK, "o"),
    "last": Look("Last", BLACK, "o"),
    "random": Look("Random", GREY, "*"),
    "greedy": Look("Greedy", BLACK, "o"),
    "first_last": Look("First and last", BLACK, "o"),
    "drop_block": Look("Without a block", BLACK, "o"),
    "top_fisher": Look("Top Fisher", VERMILION, "s"),
    # ways to rank
    "naive": Look("Title by title", GREY, "X", ":"),
    "title": Look("Title head", BLUE, "o", "-"),
    "search": Look("Title search", SKY, "^", "-."),
    "item": Look("Item head", VERMILION, "s", "--"),
    "smollm2-135m": Look("SmolLM2-135M", BLUE, "o", "-"),
    "gemma3-270m": Look("Gemma-3-270M", GREEN, "^", "-"),
    # scores of a layer's importance
    "fisher_empirical": Look("Fisher, empirical", VERMILION, "s"),
    "fisher_sampled": Look("Fisher, sampled labels", ORANGE, "P"),
    "fisher_per_parameter": Look("Fisher per parameter", VERMILION, "s"),
    "fisher_weight_squared": Look("Fisher × weight²", ORANGE, "P"),
    "block_influence": Look("Block influence", BLUE, "o"),
    "angular_distance": Look("Angular distance", SKY, "^"),
    "magnitude": Look("Weight magnitude", GREY, "d"),
    "taylor": Look("Taylor", PURPLE, "v"),
    "squared_batch_gradient": Look("Squared batch gradient", BLACK, "p"),
    "depth": Look("Depth alone", BLACK, "X"),
    # before and after tuning
    "before": Look("Before tuning", SKY, "o", "--"),
    "after": Look("After tuning", BLUE, "s", "-"),
    # parts of the distillation loss
    "loss": Look("Total", BLACK, "o", "-"),
    "ce": Look("Cross-entropy", ORANGE, "^", "--"),
    "kl": Look("KL to teacher", BLUE, "s", "-."),
    "hidden": Look("Hidden states", VERMILION, "D", ":"),
    "valid": Look("Validation", GREEN, "v", "-"),
}


def use_style() -> None:
    """Set matplotlib's defaults for the paper; `figure` calls this."""
    mpl.rcParams.update(RC_PARAMS)


def look(name: str) -> Look:
    """Return the fixed look of a known method; any other, such as your own strategy, is black under its own name."""
    return LOOKS.get(name, Look(str(name), BLACK, ".", "-"))


def figure(width: str = "column", height: float = 2.0) -> Figure:
    """Return an empty figure with the exact width of one ACM column or of the full text.

    The figure is not registered with pyplot, so it need not be closed and a notebook shows it only once.

    Args:
        width: "column" or "text".
        height: in inches.

    Raises:
        LwaError: if the width is unknown.
    """
    if width not in WIDTHS:
        raise LwaError(f"figure width {width!r} is unknown: use one of {', '.join(WIDTHS)}")
    use_style()
    return Figure(figsize=(WIDTHS[width], height), layout="constrained")


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers such as 0.01, 1, 10 or 1,000 instead of powers of ten.

    An axis that spans less than two decades has ticks at 2 and 5 times the powers as well.
    """
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axis.set_major_formatter(PLAIN)
    axis.set_minor_formatter(NullFormatter())


def place_labels(ax: Axes, labels: Sequence[Label]) -> None:
    """Write each label at the one of its places where it covers the fewest lines and other labels.

    Args:
        ax: axes with all lines drawn and their scales and limits set.
        labels: the labels in the order in which they are placed.
    """
    fig = ax.figure
    assert isinstance(fig, Figure)  # `figure` makes no subfigures
    fig.draw_without_rendering()
    drawn = [line.get_path().interpolated(20).transformed(line.get_transform()) for line in ax.lines]
    taken: list[Bbox] = []
    for text, color, places in labels:
        trials: list[tuple[int, int, Annotation, Bbox]] = []
        for x, y, dx, dy in places:
            side = "left" if dx > 0 else "right"
            align: dict[str, Any] = {"ha": side, "va": "center", "fontsize": 7, "in_layout": False}
            label = ax.annotate(text, (x, y), (dx, dy), textcoords="offset points", color=color, **align)
            box = label.get_window_extent()
            cost = 9 * sum(box.overlaps(other) for other in taken) + sum(path.intersects_bbox(box) for path in drawn)
            high_enough = ax.bbox.y0 <= box.y0 and box.y1 <= ax.bbox.y1
            inside = high_enough and ax.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1
            trials.append((cost + 20 * (not inside), len(trials), label, box))
        _, _, kept, box = min(trials, key=lambda trial: trial[:2])
        for *_, label, _ in trials:
            if label is not kept:
                label.remove()
        taken.append(box)
