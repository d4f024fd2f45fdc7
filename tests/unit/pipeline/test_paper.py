"""The paper types no result: every number is a defined macro, every figure and table a published file."""

from __future__ import annotations

import json
import re

import pytest

from lwa_helpers.config import PROFILES
from lwa_helpers.paths import FIGURES, PAPER

pytestmark = pytest.mark.unit

SOURCE = re.sub(r"(?<!\\)%.*", "", (PAPER / "main.tex").read_text(encoding="utf-8"))
BODY = SOURCE[SOURCE.index(r"\begin{document}") :]
MACRO = re.compile(r"\\([A-Z][A-Za-z]+)\{\}")
TYPED = re.compile(r"\d*\.\d{2,}|\d+(?:\\,|~|\s)*\\%")
PREAMBLE = SOURCE[: SOURCE.index(r"\begin{document}")]
BENCHMARKS = sorted(
    set(re.findall(r"\\input\{(\w+)\}", PREAMBLE)) - {"results"}
)  # files of macros, each beside what made it
BUILD = "run `make reproduce` (it publishes the profile that paper/PROFILE names)"


def typed_results(text: str) -> list[str]:
    """Sentences that type a result: two decimals or a percentage, save the level of the intervals and what is cited."""
    sentences = re.split(r"(?<=[.;:])\s+(?=[A-Z\\(])|\n\n", text.replace(r"95\,\%", ""))
    return [s for s in sentences if TYPED.search(s) and r"\cite" not in s]


def defined_macros() -> set[str]:
    """Those of the notebooks, and those of the benchmarks, of which a run of one's own measures some itself."""
    results = PAPER / "results.tex"
    assert results.is_file(), f"paper/results.tex is missing: {BUILD}"
    text = "".join(
        file.read_text(encoding="utf-8") for file in (results, *(PAPER / f"{name}.tex" for name in BENCHMARKS))
    )
    return set(re.findall(r"\\newcommand\{\\([A-Za-z]+)\}", text))


def macros_of(name: str) -> dict[str, str]:
    """The macros that a file of the paper defines, and their text."""
    return dict(
        re.findall(r"\\newcommand\{\\([A-Za-z]+)\}\{(.*)\}", (PAPER / f"{name}.tex").read_text(encoding="utf-8"))
    )


def made(name: str) -> dict:
    """What made a file of macros."""
    return json.loads((PAPER / f"{name}.json").read_text(encoding="utf-8"))


def test_every_macro_is_defined():
    used = set(MACRO.findall(BODY))
    assert len(used) > 50
    assert not (undefined := sorted(used - defined_macros())), f"not in paper/results.tex: {undefined}"


def test_macros_end_with_braces_so_that_no_space_is_lost():
    bare = set(re.findall(r"\\([A-Z][A-Za-z]+)(?![A-Za-z]|\{\})", BODY))
    assert not bare & defined_macros() - {"LwaProfile"}


def test_figures_in_the_text_are_the_published_figures():
    used = set(re.findall(r"\\includegraphics\[[^]]*\]\{([^}]+)\}", BODY))
    published = {path.stem for path in FIGURES.glob("*.pdf")}
    assert used == published, f"only in the text {used - published}, only in figures/ {published - used}; {BUILD}"


def test_tables_in_the_text_are_the_published_tables():
    used = set(re.findall(r"\\input\{tables/([^}]+)\}", BODY))
    published = {path.stem for path in (PAPER / "tables").glob("*.tex")}
    assert used == published, f"only in the text {used - published}, only published {published - used}; {BUILD}"
    for name in used:
        assert r"\toprule" in (PAPER / "tables" / f"{name}.tex").read_text(encoding="utf-8")


def test_no_result_is_typed():
    assert typed_results(BODY) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("NDCG rises to 0.081.", True),
        (r"It keeps 96\,\% of it.", True),
        (r"It keeps 96.5\% of it.", True),
        ("It gains .035 at once.", True),
        (r"Students with 14\,\% of the parameters~\cite{xu2025slmrec} exist.", False),
        (r"Others keep 14\,\%~\cite{xu2025slmrec}. Ours keeps 15\,\% of it.", True),
        (r"Intervals are 95\,\% intervals and rise from 0.1 to 1.0.", False),
        (r"It keeps \StudentKept{}\,\% of it.", False),
    ],
)
def test_the_search_for_typed_results_finds_them(text, found):
    assert bool(typed_results(text)) is found


def test_every_figure_has_a_description_a_caption_and_its_notebook():
    figures = re.findall(r"\\begin\{figure\*?\}(.*?)\\end\{figure", BODY, re.DOTALL)
    tables = re.findall(r"\\begin\{table\*?\}(.*?)\\end\{table", BODY, re.DOTALL)
    assert len(figures) == 11 and len(tables) == 15
    assert all(r"\Description{" in figure for figure in figures)
    named = {name.replace("\\_", "_") for name in re.findall(r"\\bench\{([^}]+)\}", BODY)}
    assert named and all((PAPER.parent / "tests" / "benchmarks" / name).is_file() for name in named)
    source = re.compile(r"\\source\{0|\\bench\{[a-z\\_]+\.py\}")
    assert all(r"\caption{" in part and source.search(part) and r"\label{" in part for part in figures + tables)


def test_references_are_cited_and_citations_referenced():
    keys = re.findall(r"^@\w+\{([^,]+),", (PAPER / "references.bib").read_text(encoding="utf-8"), re.MULTILINE)
    cited = {key.strip() for group in re.findall(r"\\cite\{([^}]+)\}", BODY) for key in group.split(",")}
    assert len(keys) == len(set(keys))
    assert cited == set(keys)


def test_labels_and_references_match():
    labels = set(re.findall(r"\\label\{([^}]+)\}", BODY))
    assert set(re.findall(r"\\(?:eq)?ref\{([^}]+)\}", BODY)) <= labels


def test_the_published_profile_exists():
    assert (PAPER / "PROFILE").read_text(encoding="utf-8").strip() in PROFILES


def test_the_macros_of_office_products_are_those_of_rows_of_known_commits():
    macros, runs = macros_of("literature"), made("literature")
    assert len(runs) == 2
    for run, word in {"office2014": "OfficeFourteen", "office2018": "OfficeEighteen"}.items():
        for row in runs[run]["rows"]:
            assert re.fullmatch(r"[0-9a-f]{40}", row["commit"])
            assert macros[f"{word}{row['system'].title().replace('_', '')}Ndcg"] == f"{row['ndcg']:.4f}"


def test_the_macros_of_the_ablation_are_those_of_rows_of_known_commits():
    macros, rows = macros_of("distillation"), made("distillation")["rows"]
    assert all(re.fullmatch(r"[0-9a-f]{40}", row["commit"]) for row in rows)
    for name in ("none", "labels", "uniform"):
        found = [row["ndcg"] for row in rows if row["experiment"] == "arms" and row["arm"] == name]
        assert len(found) == int(macros["RecoveryArmsSeeds"])
        assert macros[f"Recovery{name.title()}Ndcg"] == f"{sum(found) / len(found):.3f}"
    for run in (*made("benchmarks").values(), *made("other_teachers")["runs"]):
        assert re.fullmatch(r"[0-9a-f]{40}", run["commit"]) and not run["dirty"]
