"""Numbers, text and frames as LaTeX: nothing untrusted gets through unescaped, nothing missing becomes a number."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest

from lwa_helpers.errors import LwaError
from lwa_helpers.report.tables import (
    booktabs,
    bounds,
    escape,
    format_number,
    interval,
    macro_name,
    results_tex,
    verdict_macros,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("Tom & Jerry (100%)", r"Tom \& Jerry (100\%)"),
        ("a_b#1 $5 {x}", r"a\_b\#1 \$5 \{x\}"),
        ("~^\\", r"\textasciitilde{}\textasciicircum{}\textbackslash{}"),
        (r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("two\nlines\tand\u202e more\x00", "two lines and  more "),
        ("Amélie “é” – 中", "Amélie “é” – ?"),
        ('<b>|"', r"\textless{}b\textgreater{}\textbar{}\textquotedbl{}"),
    ],
)
def test_escape(text, latex):
    assert escape(text) == latex


def test_escaped_text_has_no_live_special_left():
    every = "".join(map(chr, range(0x20, 0x3000)))
    bare = re.sub(r"\\text[a-z]+\{\}|\\ensuremath\{\\?[a-z-]+\}|\\[&%$#_{}]", "", escape(every))
    assert not set(bare) & set("\\&%$#_{}~^")


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (0.06125, "{:.3f}", "0.061"),
        (-0.0034, "{:.3f}", "$-$0.003"),
        (1682, "{:,}", "1,682"),
        (0.924, "{:.1%}", r"92.4\%"),
        (np.float32(2.5), "{:.1f}", "2.5"),
        (np.int64(7), "{}", "7"),
        (0.01, "{:+.2f}", "+0.01"),
    ],
)
def test_format_number(value, spec, text):
    assert format_number(value, spec) == text


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, "0.5", True, np.nan, pd.NA])
def test_what_is_not_a_finite_number_is_refused(value):
    with pytest.raises(LwaError, match="not a finite number"):
        format_number(value)


def test_intervals():
    assert interval(0.0612, 0.05, 0.0701) == "0.061 [0.050, 0.070]"
    assert bounds(-0.5, 0.5, "{:.1f}") == "[$-$0.5, 0.5]"
    with pytest.raises(LwaError, match="backwards"):
        bounds(0.2, 0.1)
    with pytest.raises(LwaError, match="finite"):
        interval(0.1, math.nan, 0.2)


FRAME = pd.DataFrame(
    {
        "system": ["A & B", "x_y", "off", None],
        "ndcg": [0.06, 0.05, None, 0.06],
        "ndcg_low": [0.05, 0.04, None, 0.055],
        "ndcg_high": [0.07, 0.06, None, 0.065],
        "ms": [3.0, 1.0, 2.0, 4.0],
    },
    index=[5, 5, 6, 7],
)


def test_booktabs_table():
    formats, best = {"ndcg": "{:.2f}", "ms": "{:.0f}"}, {"ndcg": "max", "ms": "min"}
    latex = booktabs(FRAME, formats, best=best, headers={"ndcg": "NDCG_10"})
    assert latex.splitlines() == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"system & NDCG\_10 & ms \\",
        r"\midrule",
        r"A \& B & \textbf{0.06} {\scriptsize [0.05, 0.07]} & 3 \\",
        r"x\_y & 0.05 {\scriptsize [0.04, 0.06]} & \textbf{1} \\",
        r"off & -- & 2 \\",
        r"-- & \textbf{0.06} {\scriptsize [0.06, 0.07]} & 4 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_table_errors_name_the_cause():
    with pytest.raises(LwaError, match="missing column mrr"):
        booktabs(FRAME, {"mrr": "{}"})
    with pytest.raises(LwaError, match="no rows"):
        booktabs(FRAME.iloc[:0], {"ndcg": "{}"})
    with pytest.raises(LwaError, match="finite"):
        booktabs(pd.DataFrame({"n": [math.inf]}), {"n": "{}"})


def test_results_tex():
    text = results_tex({"B": "1,682", "A": r"92.4\%"}, "quick profile\ncommit abc")
    assert text == "% quick profile\n% commit abc\n\\newcommand{\\A}{92.4\\%}\n\\newcommand{\\B}{1,682}\n"


@pytest.mark.parametrize("name", ["Ndcg10", "a_b", "", "A B", "é"])
def test_macro_names_are_letters_only(name):
    with pytest.raises(LwaError, match="letters only"):
        results_tex({name: "1"}, "h")


@pytest.mark.parametrize("value", ["", " ", None, 0.5, "50 %", "a}{b", "{", "x #1", "two\nlines"])
def test_macro_values_are_finished_latex(value):
    with pytest.raises(LwaError, match="macro A"):
        results_tex({"A": value}, "h")


def test_verdict_macros():
    sentence = "The gain is 0.1% (n_users = 943)."
    recorded = {"H3": {"outcome": "undecided", "sentence": sentence, "figure": "ablation_forest"}}
    macros = {"HThreeVerdict": "undecided", "HThreeSentence": r"The gain is 0.1\% (n\_users = 943)."}
    assert verdict_macros(recorded) == macros
    assert r"\newcommand{\HThreeSentence}{The gain" in results_tex(verdict_macros(recorded), "h")
    with pytest.raises(LwaError, match="H9 is unknown"):
        verdict_macros({"H9": recorded["H3"]})


def test_macro_names_have_letters_only_and_differ_where_words_do():
    assert macro_name("office_2014", "drop_block") == "OfficeTwoZeroOneFourDropBlock"
    assert macro_name("teachers", "teacher+sasrec") == "TeachersTeacherSasrec"
    assert macro_name("steps", "15>8") == "StepsOneFiveEight"
