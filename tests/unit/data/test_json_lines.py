"""Lines of JSON and of Python: keys that come late, types that change, characters that only look like line breaks."""

from __future__ import annotations

import csv
import gzip
import json
import warnings

import polars as pl
import pytest

from lwa_helpers import paths
from lwa_helpers.data import blocks, textfiles
from lwa_helpers.data.amazon import load_amazon
from lwa_helpers.errors import LwaError

MS = 1_600_000_000_000
LATE = 1100  # more lines than a sample has


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")


def write(root, name, rows, spell=json.dumps):
    text = "".join((row if isinstance(row, str) else spell(row)) + "\n" for row in rows)
    (root / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())


def load(root):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_amazon(root, "Toys", k=0)


def row(n=0, **more):
    return {"user_id": "u", "parent_asin": f"i{n}", "rating": 4.0, "timestamp": MS + n} | more


def without(names, n):
    return {key: value for key, value in row(n).items() if key not in names}


@pytest.mark.parametrize("name", ["meta_Toys.jsonl", "meta_Toys.json.gz", "meta_Toys.csv", "meta_Toys.parquet"])
def test_fields_that_first_come_late_are_read(tmp_path, name):
    late = [{"title": f"T{n}", "store": "S", "price": n} if n >= 1000 else {} for n in range(LATE)]
    items = [{"parent_asin": f"i{n}", **more} for n, more in enumerate(late)]
    write(tmp_path, "Toys.jsonl", map(row, range(LATE)))
    if name.endswith("parquet"):
        pl.DataFrame(items, infer_schema_length=None).write_parquet(tmp_path / name)
    elif name.endswith("csv"):
        with open(tmp_path / name, "w", newline="") as file:
            table = csv.DictWriter(file, ["parent_asin", "title", "store", "price"], quoting=csv.QUOTE_ALL)
            table.writeheader()
            table.writerows(items)
    else:
        write(tmp_path, name, items, repr if ".json." in name else json.dumps)
    data = load(tmp_path)
    assert data.report["untitled_items"] == 1000
    assert data.items.title.tolist()[1000:] == [f"T{n}" for n in range(1000, LATE)]
    assert data.items.store.notna().sum() == 100 and data.items.price.iloc[-1] == "1099"
    assert list(data.items.columns) == ["parent_asin", "title", "store", "price"]


@pytest.mark.parametrize("blocks_of", [9000, 1 << 23])
def test_reviews_whose_fields_come_late_or_under_another_name(tmp_path, monkeypatch, blocks_of):
    monkeypatch.setattr(textfiles, "BLOCK_BYTES", blocks_of)
    old = [{"reviewerID": "u", "asin": f"o{n}", "unixReviewTime": MS // 1000 + n} for n in range(1001)]
    write(tmp_path, "Toys.jsonl", [*old, row(1), without("rating", 2), row(3, asin="variant")])
    data = load(tmp_path)
    assert data.report["rows"] == 1004 == data.report["interactions"] and data.report["null_ratings"] == 1002
    assert data.item_ids == [f"o{n}" for n in range(1001)] + ["i1", "i2", "i3"]
    assert data.report["seconds_to_ms"] == 1001 and "rows_without_ids" not in data.report


def test_a_needed_field_that_never_comes_is_named(tmp_path):
    write(tmp_path, "Toys.jsonl", map(row, range(LATE)))
    write(tmp_path, "meta_Toys.jsonl", [{"parent_asin": f"i{n}", "name": "T"} for n in range(LATE)])
    with pytest.raises(LwaError, match="meta_Toys.jsonl lacks the column title; it has: parent_asin, name$"):
        load(tmp_path)
    write(tmp_path, "Toys.jsonl", (without("timestamp", n) for n in range(LATE)))
    with pytest.raises(LwaError, match="Toys.jsonl lacks the column timestamp or unixReviewTime; it has: user_id"):
        load(tmp_path)


def test_lines_that_lack_a_needed_field_are_counted(tmp_path):
    rows = [row(0), without(["timestamp"], 1), without(["user_id"], 2), without(["parent_asin"], 3), {}, row(5)]
    write(tmp_path, "Toys.jsonl", rows)
    data = load(tmp_path)
    assert data.report["interactions"] == 2 and data.report["rows_without_time"] == 1
    assert data.report["rows_without_ids"] == 3
    assert "first: line 2" in data.warnings[0] and "first: line 3" in data.warnings[0]


@pytest.mark.parametrize("spell", [json.dumps, repr])
def test_types_that_change_late_keep_their_meaning(tmp_path, spell):
    rows = [row(n, user_id=7, text=None) for n in range(LATE)]
    rows += [row(LATE, user_id="7", rating="5.0", text=["a"]), row(LATE + 1, user_id=7.0, timestamp=str(MS + LATE + 1))]
    write(tmp_path, "Toys.json", rows, spell)
    data = load(tmp_path)
    assert data.histories() == {"7": [f"i{n}" for n in range(LATE + 1)]} and data.valid.rating.tolist() == [5.0]
    assert [message for message in data.warnings if "Toys.json:" in message] == []


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x1e", "\x0b", "\x0c", "\t", "\r", "\x00", "\\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_a_line_break_ends_a_line(tmp_path, character, end):
    lines = [json.dumps(row(n, text="x")).replace('"x"', f'"x{character}{{}}"') for n in range(3)]
    (tmp_path / "Toys.jsonl").write_bytes(end.join(lines).encode())
    write(tmp_path, "meta_Toys.jsonl", [{"parent_asin": "i0", "title": f"Pens{json.loads(json.dumps(character))}Ink"}])
    data = load(tmp_path)
    assert data.report["rows"] == 3 and "broken_lines" not in data.report
    assert data.titles[0].startswith("Pens") and data.titles[0].endswith("Ink")


def test_numbers_that_python_prints_and_json_does_not_know(tmp_path):
    rows = [row(0, rating=float("nan")), row(1, rating=float("inf")), row(2, rating=-float("inf")), row(3)]
    write(tmp_path, "Toys.json", rows, repr)
    write(tmp_path, "meta_Toys.json", [{"asin": "i0", "title": float("nan")}, "{u'asin': u'i1', u'title': u'U'}"], repr)
    data = load(tmp_path)
    assert data.report["rows"] == 4 and data.report["null_ratings"] == 3 and "broken_lines" not in data.report
    assert data.report["unreadable_ratings"] == 1 and data.report["ratings_out_of_range"] == 2
    assert data.titles == ["Item i0", "U", "Item i2", "Item i3"] and data.report["titles_not_text"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps([row(), row(1)]), "is one array: write one object a line, with `jq -c '.\\[\\]'`"),
        ("[\n" + ",\n".join(json.dumps(row(n)) for n in range(3)) + "\n]\n", "is one array"),
        (" \n[ {\n}]", "is one array"),
        (json.dumps([row(), row(1)], indent=1), "is one array"),
        (json.dumps(row(), indent=1), "has objects over many lines: write one object a line, with `jq -c .`"),
    ],
)
@pytest.mark.parametrize("name", ["Toys.json", "Toys.jsonl.gz"])
def test_json_that_is_not_one_object_a_line_is_refused_with_the_fix(tmp_path, name, text, message):
    write(tmp_path, name, [text])
    with pytest.raises(LwaError, match=rf"{name} {message}.*each line must be one JSON object"):
        load(tmp_path)


def test_a_line_without_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "RECORD_BYTES", 1 << 20)
    write(tmp_path, "Toys.jsonl", [json.dumps(row()), json.dumps(row(1, text="x" * (11 << 20)))])
    with pytest.raises(LwaError, match="Toys.jsonl: the record of line 2 does not end within 1 MiB: each line must be"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        ("Toys.jsonl", gzip.compress(b"{}", mtime=0), "is gzipped: let its name end in .gz"),
        ("Toys.csv", gzip.compress(b"a,b\n", mtime=0), "is gzipped: let its name end in .gz"),
        ("Toys.csv", "user_id\n".encode("utf-16"), "is in UTF-16: save it in UTF-8"),
        ("Toys.csv", b"PK\x03\x04\0", "is a zip archive or a spreadsheet"),
        ("Toys.jsonl", b"PAR1\0", "is a parquet file: let its name end in .parquet"),
        ("Toys.csv.gz", b"user_id,parent_asin\n", "is damaged or not gzipped.*take .gz off its name"),
    ],
)
def test_what_is_no_text_is_named_with_the_fix(tmp_path, name, head, message):
    (tmp_path / name).write_bytes(head)
    with pytest.raises(LwaError, match=f"{name} {message}"):
        load(tmp_path)
