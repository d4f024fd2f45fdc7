"""Dirty files: each flaw is a clear error or a counted repair with one warning."""

from __future__ import annotations

import gzip
import json
import os
import warnings

import polars as pl
import pytest

from lwa_helpers import paths
from lwa_helpers.data import download, textfiles
from lwa_helpers.data.amazon import load_amazon
from lwa_helpers.errors import LwaError

MS = 1_600_000_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")


def line(user="u", item="a", rating=5.0, time=MS, **more) -> str:
    return json.dumps({"user_id": user, "parent_asin": item, "rating": rating, "timestamp": time} | more)


def load(root, lines, items=("a", "b", "c"), **kwargs):
    """Write the lines as they are, load, and return the data and the texts of the warnings."""
    content = b"".join((one if isinstance(one, bytes) else one.encode()) + b"\n" for one in lines)
    (root / "Toys.jsonl").write_bytes(content)
    (root / "meta_Toys.jsonl").write_text("".join(json.dumps({"parent_asin": i, "title": i}) + "\n" for i in items))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_amazon(root, "Toys", k=0, **kwargs)
    return data, [str(one.message) for one in caught]


BROKEN = ['{"user_id": "u"', "null", "5", "[1, 2]", "{'user_id': u}", "<html>", "[" * 9999]
BROKEN += [line() + line(), line()[:-1] + ",}"]


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_lines_are_skipped_counted_and_named_once(tmp_path, broken):
    lines = [line(item="a"), "", line(item="b"), broken, line(item="c"), broken]
    data, warned = load(tmp_path, lines)
    assert data.report["broken_lines"] == 2 and data.report["interactions"] == 3
    assert len(warned) == 1 and "Toys.jsonl: 2 broken lines" in warned[0] and "first: line 4" in warned[0]
    again, warned_again = load(tmp_path, lines)
    assert warned_again == warned and again.report == data.report


def test_line_numbers_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(textfiles, "BLOCK_BYTES", 100)
    data, (warning,) = load(tmp_path, [line(user=f"u{n}") for n in range(50)] + ["oops"] + [line(user="z")])
    assert "first: line 51" in warning and data.report["rows"] == 51


@pytest.mark.parametrize(
    ("bad", "problem", "rows"),
    [
        (line(user=None), "rows_without_ids", 1),
        (line(item=""), "rows_without_ids", 1),
        ('{"rating": 1.0}', "rows_without_ids", 1),
        (line(item="b", time=None), "rows_without_time", 1),
        (line(item="b", time="yesterday"), "rows_without_time", 1),
        (line(item="b", time=1.5), "rows_without_time", 1),
        (line(item="b", time=10**30), "rows_without_time", 1),
        (line(item="b", rating="good"), "unreadable_ratings", 2),
        (line(item="b", rating=float("nan")), "unreadable_ratings", 2),
        (line(item="b", rating=True), "unreadable_ratings", 2),
        (line(item="b", rating=9), "ratings_out_of_range", 2),
        (line(item="b", rating=float("inf")), "ratings_out_of_range", 2),
        (line(item="b", time=MS // 1000), "seconds_to_ms", 2),
        (line(item="b", text="caf").encode()[:-2] + b'\xe9"}', "lines_not_utf8", 2),
    ],
)
def test_counted_repairs(tmp_path, bad, problem, rows):
    data, (warning,) = load(tmp_path, [line(), bad])
    assert data.report[problem] == 1 and data.report["interactions"] == rows
    assert str(tmp_path / "Toys.jsonl") in warning and "first: line 2" in warning
    everything = pl.concat(pl.from_pandas(data.part(part)) for part in ("train", "valid", "test"))
    assert everything["timestamp"].to_list() == [MS] * rows
    if "rating" in problem:
        assert everything.filter(parent_asin="b")["rating"].to_list() == [None]


def test_mixed_types_are_one_meaning(tmp_path):
    lines = [line(user=7, rating="4.5", time=str(MS)), line(user="7", item="b", rating=3, time=float(MS + 1))]
    data, warned = load(tmp_path, lines)
    assert data.targets("valid") == {"7": ["a"]} and data.targets("test") == {"7": ["b"]} and not warned
    assert data.valid.rating.tolist() == [4.5] and data.test.timestamp.tolist() == [MS + 1]


@pytest.mark.parametrize("odd", ["", "-", "u,d,x,y", "u,d"])
def test_numbers_in_a_csv_mean_the_same_beside_a_line_that_is_none(tmp_path, odd):
    rows = ["u,a,4.5, 1600000000001", 'u,b,"5","1600000000002"', "u,c,,1600000000003.0", odd]
    (tmp_path / "Toys.csv").write_text("user_id,parent_asin,rating,timestamp\n" + "\n".join(rows) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = load_amazon(tmp_path, "Toys", k=0)
    assert data.report["interactions"] == 3 and data.report["null_ratings"] == 1
    assert [data.part(part).timestamp.tolist() for part in ("train", "valid", "test")] == [[MS + 1], [MS + 2], [MS + 3]]
    assert data.train.rating.tolist() == [4.5] and data.valid.rating.tolist() == [5.0]


def test_whole_file_in_seconds_or_ordinals_stays_as_it_is(tmp_path):
    data, warned = load(tmp_path, [line(time=MS // 1000), line(item="b", time=0)])
    assert data.test.timestamp.tolist() == [MS // 1000] and data.valid.timestamp.tolist() == [0] and not warned


def test_null_ratings_are_counted_without_a_warning(tmp_path):
    data, warned = load(tmp_path, [line(rating=None), '{"user_id": "u", "parent_asin": "b", "timestamp": 9}'])
    assert data.report["null_ratings"] == 2 and not warned


def test_items_titles_missing_blank_repeated_and_described_twice(tmp_path):
    (tmp_path / "Toys.jsonl").write_text("\n".join(line(item=i, time=MS + n) for n, i in enumerate("abcde")))
    titles = ["Pen &amp; Ink", None, "Late <b>title</b>", "&nbsp;\u200b", "Pen & Ink", "x"]
    meta = [json.dumps({"asin": item, "title": title}) + "\n" for item, title in zip("abbcdq", titles)]
    (tmp_path / "meta_Toys.jsonl").write_text("".join(meta) + "{\n")
    with pytest.warns(UserWarning, match="meta_Toys.jsonl: 1 broken lines.*line 7.*; 1 repeated.*line 2"):
        data = load_amazon(tmp_path, "Toys", k=0)
    assert data.items.title.tolist() == ["Pen &amp; Ink", "Late <b>title</b>", None, "Pen & Ink", None]
    assert data.titles == ["Pen & Ink", "Late title", "Item c", "Pen & Ink (2)", "Item e"]
    assert (data.report["untitled_items"], data.report["repeated_titles"]) == (2, 1)
    assert data.report["html_titles"] == 2 and "shortened_titles" not in data.report
    assert data.report["repeated_metadata"] == 1


@pytest.mark.parametrize("name", ["../Toys", "a/b", "", "Toys\n", "..", "To ys", "/etc/passwd", "Toys.jsonl", "*"])
def test_a_name_that_is_no_category(tmp_path, name):
    with pytest.raises(LwaError, match="is not a category name"):
        load_amazon(tmp_path, name)
    with pytest.raises(LwaError, match="is not a category name"):
        download.download(name, tmp_path)


def test_missing_and_ambiguous_files(tmp_path):
    (tmp_path / "Books.csv").write_text("x")
    with pytest.raises(LwaError, match=r"no reviews of Toys .*there: Books.csv.*lwa data download Toys"):
        load_amazon(tmp_path, "Toys")
    with pytest.raises(LwaError, match="there: nothing"):
        load_amazon(tmp_path / "nowhere", "Toys")
    (tmp_path / "Books.jsonl.gz").write_text("x")
    with pytest.raises(LwaError, match="Books.jsonl.gz and Books.csv"):
        load_amazon(tmp_path, "Books")


@pytest.mark.parametrize("arguments", [{"k": -1}, {"k": 2.5}, {"k": True}, {"split": "random"}])
def test_bad_parameters(tmp_path, arguments):
    with pytest.raises(LwaError, match="last_out, timestamp, file"):
        load_amazon(tmp_path, "Toys", **arguments)


PACKED = gzip.compress(os.urandom(3000) + "\n".join(line(user=f"u{n}") for n in range(500)).encode())
DAMAGED = {
    "empty": ("Toys.jsonl", b"", "no usable line"),
    "blank": ("Toys.jsonl", b"\n\n  \n", "no usable line|lacks the column"),
    "empty gz": ("Toys.jsonl.gz", gzip.compress(b""), "no usable line"),
    "cut gz": ("Toys.jsonl.gz", PACKED[:-600], "cut short"),
    "bad gz data": ("Toys.jsonl.gz", PACKED[:200] + b"\0" * 80 + PACKED[280:], "damaged"),
    "not gz": ("Toys.jsonl.gz", line().encode(), "damaged"),
    "header only": ("Toys.csv", b"user_id,parent_asin,rating,timestamp\n", "no usable line"),
    "no such column": ("Toys.csv", b"user_id,item,rating,when\nu,a,5,1\n", "parent_asin or asin, timestamp or unix"),
    "not JSON": ("Toys.jsonl", b"a,b\nc,d\n", "lacks the column"),
    "no parquet": ("Toys.parquet", b"PAR1 nonsense", "parquet"),
    "cut parquet": ("Toys.parquet", b"PAR1" + b"\0" * 100, "parquet"),
    "JSON over many lines": (
        "Toys.json",
        b'[{"asin": "a",\n"overall": 5}]\n',
        "each line must be one JSON object, in UTF-8",
    ),
    "UTF-16": ("Toys.jsonl", line().encode("utf-16"), "in UTF-8"),
    "gz without its suffix": ("Toys.jsonl", gzip.compress(line().encode()), "each line must be one JSON object"),
    "carriage returns alone": (
        "Toys.csv",
        b"user_id,parent_asin,rating,timestamp\ru,a,5,1\r",
        "it has: none.*such as user_id",
    ),
    "no usable row": ("Toys.jsonl", (line(user="") + "\n").encode(), "no usable row"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_errors_that_name_the_file(tmp_path, case):
    name, content, message = DAMAGED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LwaError, match=message) as caught:
        load_amazon(tmp_path, "Toys", k=0)
    assert name in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.parquet"))


@pytest.mark.parametrize("case", ["cut gz", "bad gz data", "not JSON", "no parquet"])
def test_a_damaged_item_file_is_an_error_that_names_it(tmp_path, case):
    name, content, message = DAMAGED[case]
    (tmp_path / "Toys.jsonl").write_text(line() + "\n")
    (tmp_path / f"meta_{name}").write_bytes(content)
    with pytest.raises(LwaError, match=f"meta_{name}.*({message})"):
        load_amazon(tmp_path, "Toys", k=0)


@pytest.mark.parametrize("first", ["u,b,5", "-", "u,b,5,1,9", 'u,b,5,"1" 2', 'u,b,"5,1"'])
def test_a_broken_line_may_be_the_first_of_its_block(tmp_path, first):
    (tmp_path / "Toys.csv").write_text(f"user_id,parent_asin,rating,timestamp\n{first}\nu,a,5,{MS}\nu,c,5,{MS}\n")
    (tmp_path / "meta_Toys.csv").write_text("parent_asin,title\na,A,or B\nc,C\n")
    with pytest.warns(UserWarning, match="broken lines, skipped") as caught:
        data = load_amazon(tmp_path, "Toys", k=0)
    told = [str(one.message) for one in caught]
    assert data.targets("valid") == {"u": ["a"]} and data.targets("test") == {"u": ["c"]} and data.warnings == told
    assert len(told) == 2 and "Toys.csv: 1 broken lines, skipped (first: line 2)" in told[0]
    assert "meta_Toys.csv: 1 broken lines, skipped (first: line 2)" in told[1] and data.titles == ["Item a", "C"]


def test_csv_with_broken_lines(tmp_path):
    lines = ["user_id,parent_asin,rating,timestamp", f"u,a,5,{MS}", "u,b,5", f"u,c,5,{MS},9"]
    lines.append(f'"u, the 1st","b",4.0,{MS}')
    (tmp_path / "Toys.csv").write_text("\r\n".join(lines))
    (tmp_path / "meta_Toys.csv").write_text('parent_asin,title\na,"A, or ""B"""\nb,B\n')
    with pytest.warns(UserWarning, match=r"Toys.csv: 2 broken lines.*line 3"):
        data = load_amazon(tmp_path, "Toys", k=0)
    assert data.targets("test") == {"u": ["a"], "u, the 1st": ["b"]} and data.titles == ['A, or "B"', "B"]
