"""A small project in a temporary folder, with notebooks that the real runner executes."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
import yaml

from lwa_helpers import paths
from lwa_helpers.pipeline import code_digest, readme

PARAMETERS = 'profile = "smoke"\noverrides = {}'
FIRST = """
import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
from lwa_helpers.pipeline.run import Run
run = Run.open("01_first", profile=profile, overrides=overrides)
run.save_json("squares", [n * n for n in range(run.config.data.max_items)])
figure, axes = plt.subplots()
axes.plot(run.load_json("squares"))
run.save_figure(figure, "squares", caption="Squares.", alt="A rising curve.")
import pandas
run.save_table(pandas.DataFrame({"n": [1]}), "squares", caption="One.")
run.number("LargestSquare", run.load_json("squares")[-1], "{:,}")
run.finish()
"""
SECOND = """
from lwa_helpers.pipeline.run import Run
run = Run.open("02_second", profile=profile, overrides=overrides)
run.save_json("total", sum(run.load_json("squares")))
run.number("Total", run.load_json("total"))
run.verdict("H1", "supported", "Squares add up.", figure="squares")
run.finish()
"""
ACROSS = """
from lwa_helpers.pipeline.points import distinct, read_points
from lwa_helpers.pipeline.run import Run
run = Run.open("06_across", profile=profile, overrides=overrides, study=study)
points = read_points(run)
totals = {point.unit.title: point.value("Total") for point in points}
run.save_json("totals", totals)
run.save_json("read", [run.input(f"{point.unit.name}/data/squares.json").read_text() for point in points])
run.save_json("own", list(distinct(points, "01", "no_frame")))
run.number("Widest", max(totals.values()))
assert {point.outcome("H1") for point in points} == {"supported"} and points[0].value("Absent") is None
run.finish()
"""
POINTS = {
    "narrow": {"data.max_items": 5},
    "wide": {"data.max_items": 7},
    "long": {"data.max_items": 5, "teacher.epochs": 2.0},
}
STUDY = {"profile": "smoke", "notebooks": ["01", "02"], "seeds": [0], "points": POINTS}


def write_notebook(path: Path, *cells: str, parameters: str | None = PARAMETERS, prose: str = "Question") -> Path:
    """Write a notebook: prose, a tagged parameters cell unless it is None, then the code cells."""
    book = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    book.cells = [nbformat.v4.new_markdown_cell(prose)]
    if parameters is not None:
        book.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    book.cells += [nbformat.v4.new_code_cell(cell.strip()) for cell in cells]
    nbformat.write(book, path)
    return path


def make_project(root: Path) -> Path:
    """Lay out a checkout with two notebooks, of which the second reads what the first saves."""
    for folder in ("notebooks", "paper"):
        (root / folder).mkdir(parents=True)
    write_notebook(root / "notebooks/01_first.ipynb", FIRST)
    write_notebook(root / "notebooks/02_second.ipynb", SECOND)
    for name in ("constraints.txt", "embedded.txt"):
        (root / name).write_text("numpy==2.4.6\n")
    (root / "paper/PROFILE").write_text("paper\n")
    claim = {"claim": "Squares add up", "notebook": "02_second", "figure": "squares", "measured": "{H1}: {Total}"}
    (root / "paper/claims.yaml").write_text(yaml.safe_dump([claim]))
    (root / "README.md").write_text(f"# Tiny\n{readme.START}\n{readme.END}\n")
    return root


def point_paths_at(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Make this process and the kernels that it starts take `root` for the checkout."""
    patch.setenv("LWA_ROOT", str(root))
    patch.setenv("LWA_CACHE", str(root / ".cache"))
    folders = {
        "NOTEBOOKS": "notebooks",
        "FIGURES": "figures",
        "PAPER": "paper",
        "RESULTS": "results",
        "STUDIES": "results/studies",
        "CACHE": ".cache",
    }
    for name, folder in {"ROOT": ".", "DATASET": "dataset", **folders}.items():
        patch.setattr(paths, name, (root / folder).resolve())
    code_digest.module_tree.cache_clear()


def write_study(root: Path, content: dict) -> str:
    """Write a study's file. Returns its path."""
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def comparing_study(root: Path) -> str:
    """Add a notebook that compares points, and write a study of three points with titles. Returns its path."""
    parameters = 'profile = "smoke"\noverrides = {}\nstudy = ""'
    write_notebook(root / "notebooks/06_across.ipynb", ACROSS, parameters=parameters)
    points = {name: {"title": f"The {name}"} | settings for name, settings in POINTS.items()}
    return write_study(root, STUDY | {"notebooks": ["01", "02", "06"], "points": points})
