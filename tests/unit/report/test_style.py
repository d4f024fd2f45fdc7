"""Figures have ACM's widths to the thousandth of an inch, embedded TrueType fonts, and one look per method."""

from __future__ import annotations

import re

import pytest

from lwa_helpers.distillation import weighting
from lwa_helpers.distillation.weighting import LayerwiseDistillation
from lwa_helpers.errors import LwaError
from lwa_helpers.report.style import LOOKS, figure, look, place_labels

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("width", "inches"), [("column", 3.3368), ("text", 7.0056)])
def test_saved_pdf_has_the_acm_width_and_truetype_fonts_only(tmp_path, width, inches):
    fig = figure(width, 1.0)
    axes = fig.subplots()
    axes.plot([1, 2], [3, 4])
    axes.set_ylabel("a label that constrained layout must make room for")
    fig.savefig(tmp_path / "f.pdf", metadata={"CreationDate": None})
    pdf = (tmp_path / "f.pdf").read_bytes()
    x0, y0, x1, y1 = map(float, re.search(rb"/MediaBox \[([^]]+)\]", pdf).group(1).split())
    assert x1 - x0 == pytest.approx(72 * inches, abs=0.01)
    assert y1 - y0 == pytest.approx(72, abs=0.01)
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf


def test_same_figure_gives_same_bytes(tmp_path):
    for name in ("a.pdf", "b.pdf"):
        fig = figure()
        fig.subplots().plot([1, 2, 3])
        fig.savefig(tmp_path / name, metadata={"CreationDate": None})
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()


def test_unknown_width_is_an_error():
    with pytest.raises(LwaError, match="'page'.*column, text"):
        figure("page")


def test_every_built_in_strategy_has_a_look_and_no_two_share_one():
    strategies = [name for name in LayerwiseDistillation.strategies if name in LOOKS] + ["none"]
    classes = LayerwiseDistillation.__subclasses__()  # among them those of examples that ran in this process
    built_in = {c.name for c in classes if getattr(weighting, c.__name__, None) is c}
    assert built_in <= set(strategies)
    looks = [(look(name).color, look(name).marker, look(name).linestyle) for name in strategies]
    assert len(set(looks)) == len(looks)


def test_a_strategy_of_your_own_is_drawn_under_its_name():
    assert look("mine").label == "mine"


def test_names_of_points_in_one_place_do_not_overlap():
    fig = figure("column", 2.0)
    axes = fig.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    places = [(0.5, 0.5, 5, step) for step in (0, 9, -9, 18)]
    place_labels(axes, [(f"system {i}", "black", places) for i in range(4)])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
