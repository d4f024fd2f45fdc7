"""From a number of the paper back to the cell that recorded it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_project import FIRST, make_project, point_paths_at, write_notebook

from lwa_helpers import cli
from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline.publish import publish
from lwa_helpers.pipeline.reproduce import reproduce
from lwa_helpers.pipeline.trace import trace


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory):
    """A project that was run and published; its first notebook records its number in the fourth code cell that runs."""
    root = make_project(tmp_path_factory.mktemp("traced") / "project")
    whole = FIRST.split('run.number("LargestSquare"')
    last = 'run.number("LargestSquare"' + whole[1]
    interval = 'run.interval("Middle", (2.0, 1.5, 2.5), "{:.1f}")\n'
    write_notebook(root / "notebooks/01_first.ipynb", whole[0], interval + last)
    with pytest.MonkeyPatch.context() as patch:
        point_paths_at(root, patch)
        reproduce("smoke", {"data.max_items": 5})
        publish("smoke")
        yield root


def test_a_number_is_traced_to_its_cell_and_command(project: Path, capsys) -> None:
    lines = trace("LargestSquare").splitlines()
    assert lines[:2] == ["\\LargestSquare = 16", "  notebook  01_first, In [4]"]
    assert lines[2].startswith("  run       profile smoke, seed 0, cpu (")
    assert lines[-1] == "  command   lwa reproduce --profile smoke --only 01 --set data.max_items=5"
    assert trace("\\Middle").splitlines()[0] == "\\Middle = 2.0 [1.5, 2.5]"
    assert trace("Total", str(project / "results/smoke")) == trace("Total")
    assert cli.main(["trace", "Total"]) == 0
    assert capsys.readouterr().out.startswith("\\Total = 30\n  notebook  02_second, In [3]\n")


def test_an_unknown_number_offers_the_nearest(project: Path) -> None:
    with pytest.raises(LwaError, match="no number 'LargestSquares' in the published run: is it LargestSquare?"):
        trace("LargestSquares")
    with pytest.raises(LwaError, match="manifest.json does not exist: give a results folder"):
        trace("Total", str(project / "nowhere"))


def test_every_published_number_has_its_origin(project: Path) -> None:
    published = json.loads((project / "paper/numbers.json").read_text())
    assert published.keys() == {"LargestSquare", "Middle", "MiddleLow", "MiddleHigh", "Total"}
    assert all(entry["cell"] for entry in published.values())
