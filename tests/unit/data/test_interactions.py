"""MovieLens, the Interactions contract and the text of titles."""

from __future__ import annotations

import unicodedata
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwa_helpers.assets import embedded_file
from lwa_helpers.config import TITLE_LIMIT, load_config
from lwa_helpers.data.interactions import COLUMNS, PARTS, Interactions
from lwa_helpers.data.loading import load_data
from lwa_helpers.data.movielens import load_movielens
from lwa_helpers.data.prompts import Prompt, load_templates, prompt_for
from lwa_helpers.data.titles import clean_title, distinct_titles, mend_title
from lwa_helpers.errors import LwaError


@pytest.fixture(scope="module")
def movielens() -> Interactions:
    return load_movielens()


def frame(*rows) -> pd.DataFrame:
    users, items = [row[0] for row in rows], [row[1] for row in rows]
    return pd.DataFrame({"user_id": users, "parent_asin": items, "rating": np.nan, "timestamp": np.arange(len(rows))})


def tiny(titles=("Pen", "Ink", None), **parts) -> Interactions:
    items = pd.DataFrame({"parent_asin": ["p", "i", "x"], "title": pd.Series(titles, dtype=object)})
    chosen = {"train": frame(("u", "p"), ("v", "x")), "valid": frame(("u", "i")), "test": frame(("w", "p"), ("u", "x"))}
    return Interactions("tiny", items=items, **(chosen | parts))


def test_movielens_against_the_raw_lines(movielens):
    raw = defaultdict(list)
    lines = embedded_file("ml-100k.inter").read_text().splitlines()[1:]
    for n, line in enumerate(lines):
        user, item, rating, time = line.split("\t")
        raw[user].append((int(time), n, item, float(rating)))
    assert len(raw) == 943 and len(lines) == 100_000
    whole = {user: [item for _, _, item, _ in sorted(rows)] for user, rows in raw.items()}
    assert movielens.histories("test") == {user: items[:-1] for user, items in whole.items()}
    assert movielens.targets("test") == {user: items[-1:] for user, items in whole.items()}
    assert movielens.histories("valid") == movielens.targets("train") == {u: items[:-2] for u, items in whole.items()}
    assert movielens.targets("valid") == {user: items[-2:-1] for user, items in whole.items()}
    first = movielens.train.iloc[0]
    assert (first.user_id, first.parent_asin, first.timestamp) == ("1", min(raw["1"])[2], min(raw["1"])[0])
    assert [len(movielens.part(p)) for p in PARTS] == [98_114, 943, 943]
    films = embedded_file("ml-100k.item").read_text(encoding="utf-8").splitlines()[1:]
    assert movielens.item_ids == [film.split("\t")[0] for film in films]


def test_movielens_types_and_titles(movielens):
    for part in PARTS:
        one = movielens.part(part)
        assert list(one.columns) == list(COLUMNS)
        assert one.timestamp.dtype == np.int64 and one.rating.dtype == np.float64
        assert all(isinstance(value, str) for value in one.user_id) and one.rating.between(1, 5).all()
    title = dict(zip(movielens.item_ids, movielens.items.title))
    assert title["1"] == "Toy Story"
    assert {title["218"], title["673"]} == {"Cape Fear (1991)", "Cape Fear (1962)"}
    assert (title["573"], title["670"]) == ("Body Snatchers (1993)", "Body Snatchers (1993) (2)")
    assert len(set(title.values())) == 1682 and movielens.titles == [clean_title(t) for t in title.values()]


def test_load_data_names_movielens_and_refuses_another_split():
    assert load_data(load_config("smoke").data).name == "movielens"
    with pytest.raises(LwaError, match="last_out"):
        load_data(load_config("smoke", {"data.split": "timestamp"}).data)


def test_histories_and_targets_hand_worked():
    data = tiny()
    assert data.histories("test") == {"w": [], "u": ["p", "i"]} and data.targets("test") == {"w": ["p"], "u": ["x"]}
    assert data.histories("valid") == {"u": ["p"]} and data.histories("train") == {"u": [], "v": []}
    assert data.titles == ["Pen", "Ink", "Item x"]
    with pytest.raises(LwaError, match="'dev'"):
        data.histories("dev")


def test_interactions_refuse_strangers_repeats_and_missing_columns():
    with pytest.raises(LwaError, match="'q'"):
        tiny(test=frame(("u", "q")))
    with pytest.raises(LwaError, match="rating"):
        tiny(valid=frame(("u", "i")).drop(columns="rating"))
    items = pd.DataFrame({"parent_asin": ["p", "p"], "title": ["a", "b"]})
    with pytest.raises(LwaError, match="twice"):
        Interactions("t", frame(("u", "p")), frame(), frame(), items)


def test_hash_sees_every_part_of_the_contents():
    hashes = [
        tiny().sha256,
        tiny(titles=("Pen", "Ink", "")).sha256,
        tiny(titles=("Pen", "Inks", None)).sha256,
        tiny(valid=frame(("v", "i"))).sha256,
        tiny(test=frame(("u", "x"), ("w", "p"))).sha256,
        tiny(valid=frame(("u", "i")).assign(rating=1.0)).sha256,
        tiny(valid=frame(("u", "i")).assign(timestamp=7)).sha256,
    ]
    assert tiny().sha256 == hashes[0]
    assert len(set(hashes[:1] + hashes[2:])) == 6


@given(st.text(max_size=400))
def test_clean_title_is_one_printable_line(text):
    clean = clean_title(text)
    assert len(clean) <= TITLE_LIMIT and clean == " ".join(clean.split())
    assert not any(unicodedata.category(c).startswith(("C", "Zl", "Zp")) for c in clean)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  Pens &amp; Ink,\t12&quot;\n", 'Pens & Ink, 12"'),
        ("a\u202eevil\u202c b\u200b\x07", "aevil b"),
        ("line\u2028break&#10;again\r\nend", "line break again end"),
        ("Caf\u00e9 \u2013 20 \u00b5m \U0001f600", "Caf\u00e9 \u2013 20 \u00b5m \U0001f600"),
        ("&nbsp;\u200b ", ""),
        ("H<SUB>2</sub>O &lt;br/&gt;a < b > c <3, <10 ft>, <a href='x'>", "H 2 O a < b > c <3, <10 ft>,"),
        ("Scotch\u00c2\u00ae tape", "Scotch\u00c2\u00ae tape"),
        ("ab " * 100, ("ab " * 67).strip()),
        ("x" * 300, "x" * 200),
    ],
)
def test_clean_title_hand_worked(raw, clean):
    assert clean_title(raw) == clean


def test_what_was_mended_in_a_title_is_named():
    assert mend_title(" Pens \n\u00e9 & Ink") == ("Pens \u00e9 & Ink", [])
    flaws = ["html_titles", "unprintable_titles", "shortened_titles"]
    assert mend_title("&amp;\u202e" + "x" * 300) == ("&" + "x" * 199, flaws)


@pytest.mark.parametrize(
    ("limit", "title"), [(26, "Big Green Pens, Box of 12,"), (25, "Big Green Pens, Box of"), (5, "Big")]
)
def test_a_title_over_the_limit_ends_at_a_space(limit, title):
    whole = "Big Green Pens, Box of 12, Fine Point"
    assert mend_title(whole, limit) == (title, ["shortened_titles"]) and mend_title(whole, len(whole)) == (whole, [])


def test_the_title_limit_of_movielens_is_counted(movielens):
    given = load_config("smoke", {"data.title_limit": 20}).data
    data, whole = load_data(given), movielens.titles
    assert max(map(len, data.titles)) <= 24 and len(set(data.titles)) == len(whole)  # " (2)" may follow
    assert data.report["shortened_titles"] == sum(len(title) > 20 for title in movielens.items.title) > 100
    assert load_data(load_config("smoke").data).titles == whole


@given(st.lists(st.sampled_from(["a", "b", "a (2)", "a (3)", "a (2) (2)", ""]), max_size=9))
def test_distinct_titles_are_distinct_and_keep_first_occurrences(titles):
    distinct = distinct_titles(titles)
    assert len(set(distinct)) == len(titles)
    for place, title in enumerate(titles):
        if title not in titles[:place]:
            assert distinct[place] == title


def test_templates():
    templates = load_templates()
    assert {"movielens", "amazon"} <= set(templates)
    assert prompt_for("movielens") == templates["movielens"] and prompt_for("All_Beauty") == templates["amazon"]
    for wrong in ({"header": ""}, {"header": "Seen:"}, {"header": "Seen; ", "separator": "; "}):
        with pytest.raises(LwaError):
            Prompt(**wrong)
