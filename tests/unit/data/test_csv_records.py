"""CSV files by RFC 4180, with the csv module as the oracle: whole records, and text that never becomes data."""

from __future__ import annotations

import csv
import gzip
import io
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwa_helpers import paths
from lwa_helpers.data import blocks, textfiles
from lwa_helpers.data.amazon import load_amazon
from lwa_helpers.data.repairs import Repairs
from lwa_helpers.data.textfiles import text_frames
from lwa_helpers.errors import LwaError

MS = 1_600_000_000_000
HEADER = "user_id,parent_asin,rating,timestamp,text"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")


def read(path, wanted):
    """Return the rows of a file with their line numbers, and what was counted."""
    repairs = Repairs(path)
    frame = pl.concat(list(text_frames(path, wanted, lambda *_: None, repairs)))
    return frame.rows(), repairs


VALUES = st.lists(st.sampled_from(["a", "é", ",", '"', "\n", "\r\n", " ", "\u2028", "\x85", "\x01", "v,z,5,1\n"]))
TABLES = st.integers(2, 4).flatmap(lambda n: st.lists(st.lists(VALUES.map("".join), min_size=n, max_size=n)))


@settings(max_examples=100, deadline=None)
@given(TABLES, st.sampled_from(["\n", "\r\n"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.integers(1, 80))
def test_what_the_csv_module_writes_is_read_whole_in_blocks_of_any_size(table, end, quoting, size):
    names = [f"column {n}" for n in range(len(table[0]) if table else 2)]
    file = io.StringIO()
    csv.writer(file, lineterminator=end, quoting=quoting).writerows([names, *table])
    text = file.getvalue()
    starts = [1 + text[: len(text) - len(rest)].count("\n") for rest in rests(text)][1:]
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfiles, "BLOCK_BYTES", size)
        path = Path(folder, "Toys.csv.gz")
        path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
        rows, repairs = read(path, names)
    assert [tuple(value or "" for value in row[:-1]) for row in rows] == [tuple(row) for row in table]
    assert [row[-1] for row in rows] == starts and not repairs.counts


def rests(text):
    """Yield the text from each record on, by the csv module."""
    lines = io.StringIO(text, newline="\n")
    while rest := text[lines.tell() :]:
        yield rest
        next(csv.reader(iter(lines.readline, ""), strict=True))


def load(root, text, name="Toys.csv"):
    data = text.encode()
    (root / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = load_amazon(root, "Toys", k=0)
    users = {user: [*items, *data.targets().get(user, [])] for user, items in data.histories().items()}
    return users, data.report.get("broken_lines", 0), data.warnings


TEXTS = {
    "line break": '"one\ntwo"',
    "several": '"\n\none\n"',
    "carriage returns": '"one\r\ntwo\rthree"',
    "a record": f'"good\nv,z,5.0,{MS},x"',
    "records": f'"good\nv,z,5.0,{MS},x\nv,y,5.0,{MS},x\n"',
    "a header": f'"\n{HEADER}\n"',
    "doubled quotes": f'"he said ""\nv,z,5.0,{MS},""x"""',
    "doubled quotes at the ends": '"""one\ntwo"""',
    "commas": '"a,b,""c"",\n,d"',
    "a quote in plain text": '5" wide',
    "two quotes in plain text": '5"x6" wide',
    "quotes at the end of plain text": 'wide ""',
    "a space before the quote": ' "x"',
    "a carriage return in plain text": "one\rtwo",
    "the character that stands in for breaks": '"one\x01\ntwo"',
    "nothing": "",
}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", TEXTS)
def test_no_text_loses_or_invents_a_record(tmp_path, name, end):
    rows = [f"{user},{item},5.0,{MS + n},{TEXTS[name]}" for user in "uw" for n, item in enumerate("abc")]
    users, broken, _ = load(tmp_path, end.join([HEADER, *rows]), "Toys.csv.gz")
    assert users == {"u": ["a", "b", "c"], "w": ["a", "b", "c"]} and broken == 0


def test_a_quoted_header_and_a_text_before_the_fields_that_count(tmp_path):
    text = f'"some\ntext","user_id" ,rating, parent_asin,timestamp\n"x\ny",u,5,a,{MS}\n"1,2\n",u,5,b,{MS + 1}\n'
    assert load(tmp_path, text.replace('" ,', '",'))[:2] == ({"u": ["a", "b"]}, 0)


def test_titles_over_several_lines(tmp_path):
    (tmp_path / "Toys.csv").write_text(f"user_id,parent_asin,rating,timestamp\nu,a,5,{MS}\nu,b,5,{MS}\n")
    (tmp_path / "meta_Toys.csv").write_text('parent_asin,title\na,"A, or ""B""\nin two lines"\nb,B\n')
    data = load_amazon(tmp_path, "Toys", k=0)
    assert data.items.title.tolist() == ['A, or "B"\nin two lines', "B"] and data.warnings == []
    assert data.titles == ['A, or "B" in two lines', "B"]


@pytest.mark.parametrize(
    ("record", "lines"),
    [
        ("u,z,5", 1),
        (f"u,z,5,{MS},x,y", 1),
        (f'u,z,5,{MS},"x" y', 1),
        (f'u,z,5,{MS},"x\nv,y,5,{MS},x" y', 2),
        (f'u,z,5,"x\nv,y,5,{MS},x"', 2),
        (f'u,z,5,{MS},"x\nv,y,5,{MS},""x\n","', None),
    ],
)
def test_a_broken_record_is_named_by_its_first_line_and_counted_by_its_lines(tmp_path, record, lines):
    before = f'u,a,5,{MS},"one\ntwo"'
    text = "\n".join([HEADER, before, record, f"u,b,5,{MS + 1},x", f"u,c,5,{MS + 2},x"]) + "\n"
    if lines is None:
        with pytest.raises(LwaError, match=r"Toys.csv: the record of line 4 does not end: a quote opens"):
            load(tmp_path, text)
        return
    users, broken, (told, _) = load(tmp_path, text)
    assert users == {"u": ["a", "b", "c"]} and broken == lines
    assert f"Toys.csv: {lines} broken lines, skipped (first: line 4)" in told


@pytest.mark.parametrize("cut", [f'u,b,5,{MS},"x', f'u,b,5,{MS},"x\nv,z,5,{MS},x\n', f'u,b,5,{MS},"x""\n', '"'])
def test_a_quote_that_never_closes_is_an_error_that_names_its_line(tmp_path, cut):
    with pytest.raises(LwaError, match=r"Toys.csv.gz: the record of line 4 does not end.*write \"\" for a quote"):
        load(tmp_path, f'{HEADER}\nu,a,5,{MS},"one\ntwo"\n{cut}', "Toys.csv.gz")


def test_a_quote_that_never_closes_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(textfiles, "BLOCK_BYTES", 1 << 18)
    monkeypatch.setattr(blocks, "RECORD_BYTES", 1 << 20)
    line = f"u,b,5,{MS},x\n"
    with pytest.raises(LwaError, match="the record of line 3 does not end within 1 MiB"):
        load(tmp_path, f'{HEADER}\n{line}u,a,5,{MS},"one\n' + line * 100_000)


def test_columns_that_are_there_twice_are_named(tmp_path):
    with pytest.raises(LwaError, match=r"Toys.csv has several columns named rating: keep one"):
        load(tmp_path, f"user_id,parent_asin,rating,rating,timestamp\nu,a,5,4,{MS}\n")
    other = f",user_id,,parent_asin,rating,timestamp,text,text\n0,u,x,a,5,{MS},y,z\n"
    assert load(tmp_path, other)[0] == {"u": ["a"]}
