"""One meaning for each value, whether it stands in JSON, CSV, parquet or a Python dictionary."""

from __future__ import annotations

import csv
import json
import math
import warnings
from datetime import UTC, date, datetime, timedelta, timezone

import polars as pl
import pytest

from lwa_helpers import paths
from lwa_helpers.data.amazon import load_amazon
from lwa_helpers.data.kcore import core
from lwa_helpers.data.repairs import Repairs
from lwa_helpers.data.timestamps import read_times
from lwa_helpers.data.values import identifiers, text_of
from lwa_helpers.errors import LwaError

MS = 1_600_000_000_000  # 2020-09-13T12:26:40Z
FORMATS = ("jsonl", "csv", "parquet", "json")
every_format = pytest.mark.parametrize("kind", FORMATS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")


def write(path, rows):
    if path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        spell = repr if path.suffix == ".json" else json.dumps
        path.write_text("".join(f"{spell(row)}\n" for row in rows))
    return path


def review(root, kind, **field):
    """Read the review of one user with one field changed; return it and what was counted."""
    row = {"user_id": "u", "parent_asin": "a", "rating": 4.0, "timestamp": MS} | field
    repairs = Repairs(write(root / f"Toys.{kind}", [row]))
    rows, users, _ = core(repairs.file, 0, False, repairs, root)
    return rows.row(0, named=True) | {"user_id": users[0]}, repairs.counts


@every_format
@pytest.mark.parametrize(
    ("given", "meant", "problem"),
    [
        (MS, MS, None),
        (str(MS), MS, None),
        (float(MS), MS, None),
        (MS // 1000, MS // 1000, None),
        (MS // 1000 + 0.25, MS + 250, "fractional_times"),
        (MS * 1000, MS, "finer_than_ms"),
        (MS * 10**6, MS, "finer_than_ms"),
        ("2020-09-13T12:26:40Z", MS, "dates_to_ms"),
        ("2020-09-13 12:26:40", MS, "dates_to_ms"),
        ("2020-09-13", MS - 44_800_000, "dates_to_ms"),
    ],
)
def test_a_time_is_the_same_in_every_format(tmp_path, kind, given, meant, problem):
    row, counts = review(tmp_path, kind, timestamp=given)
    assert row["timestamp"] == meant and counts == ({problem: 1} if problem else {})


@every_format
@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (-1, "timestamp before 1980 or after 2099"),
        (253_402_300_799, "timestamp before 1980 or after 2099"),
        ("1970-01-01", "timestamp before 1980 or after 2099"),
        ("yesterday", "without a readable timestamp"),
        ("", "without a readable timestamp"),
        ([MS], "without a readable timestamp"),
        (True, "without a readable timestamp"),
        (math.nan, "without a readable timestamp"),
    ],
)
def test_a_row_without_time_is_skipped_and_the_fix_is_no_fetching(tmp_path, kind, given, problem):
    with pytest.raises(LwaError, match=rf"Toys.{kind}: 1 rows.*{problem}.*first: line.*as ISO dates like") as caught:
        review(tmp_path, kind, timestamp=given)
    assert "fetch" not in str(caught.value)


def test_times_by_datetime_as_oracle():
    zone = timezone(timedelta(hours=5, minutes=30))
    moments = [datetime(2013, 2, 3, 4, 5, 6, 789_000, tz) for tz in (UTC, zone)] + [datetime(1999, 12, 31, 23, 59, 59)]
    texts = [text for one in moments for text in (str(one), one.isoformat(), f" {one.isoformat()} ")]
    texts += ["2013-02-03T04:05:06.789Z", "2013-02-03 04:05:06.789 UTC", "2013-02-03 09:35:06.789 +0530"]
    meant = [round(one.replace(tzinfo=one.tzinfo or UTC).timestamp() * 1000) for one in moments for _ in range(3)]
    meant += [meant[0]] * 3
    times, found = read_times(pl.Series(texts))
    assert times.to_list() == meant and found["dates_to_ms"].all() and sum(mask.any() for mask in found.values()) == 1
    typed, found = read_times(pl.Series([date(2020, 9, 13), None, date(9999, 12, 31)]))
    assert typed.to_list() == [MS - 44_800_000, None, None] and found["times_out_of_range"].to_list() == [0, 0, 1]


def test_numbers_at_the_edges_of_a_clock():
    numbers = [0, 5, 10**8, 4_102_444_799, 4_102_444_800, 315_532_799_999, 315_532_800_000, 4_102_444_799_999]
    numbers += [4_102_444_800_000, -5, 2**63 - 1]
    expected = [0, 5, 10**8, 4_102_444_799, None, None, 315_532_800_000, 4_102_444_799_999, None, None, None]
    for column in (pl.Series(numbers), pl.Series([str(number) for number in numbers])):
        times, found = read_times(column)
        assert times.to_list() == expected and found["times_out_of_range"].sum() == 5
    assert read_times(pl.Series([20200913.0, 1.5, 1e30, math.inf, None]))[0].to_list() == [20200913, *[None] * 4]


@every_format
@pytest.mark.parametrize(
    ("given", "meant", "problem"),
    [
        (5, 5.0, None),
        ("5.0", 5.0, None),
        (" 4 ", 4.0, None),
        (None, None, None),
        ("", None, None),
        ("five", None, "unreadable_ratings"),
        ("nan", None, "unreadable_ratings"),
        (math.inf, None, "ratings_out_of_range"),
        (0, None, "ratings_out_of_range"),
        (True, None, "unreadable_ratings"),
        ([5.0], None, "unreadable_ratings"),
        ({"value": 5.0}, None, "unreadable_ratings"),
    ],
)
def test_a_rating_is_the_same_in_every_format(tmp_path, kind, given, meant, problem):
    row, counts = review(tmp_path, kind, rating=given)
    assert row["rating"] == meant and counts == ({problem: 1} if problem else {})


@every_format
@pytest.mark.parametrize(
    ("given", "meant"), [(7, "7"), (7.0, "7"), ("7.0", "7"), ("007", "007"), (" u ", "u"), ("True North", "True North")]
)
def test_an_id_is_the_same_in_every_format(tmp_path, kind, given, meant):
    assert review(tmp_path, kind, user_id=given)[0]["user_id"] == meant
    assert review(tmp_path, kind, parent_asin=given)[0]["parent_asin"] == meant


def test_numbers_of_every_type_of_parquet_are_written_plainly():
    for dtype in (pl.Int8, pl.UInt64, pl.Float32, pl.Float64, pl.Decimal(9, 2)):
        assert identifiers(pl.Series([7, None, 12], dtype=dtype)).to_list() == ["7", None, "12"]
    assert text_of(pl.Series([0.1, 12.99, 300.0], dtype=pl.Float32)).to_list() == ["0.1", "12.99", "300"]


@every_format
@pytest.mark.parametrize("given", [None, "", "  ", "nan", "None", "<NA>", ["u"], {"$oid": "5f"}, math.nan])
def test_what_is_no_id_is_counted(tmp_path, kind, given):
    with pytest.raises(LwaError, match=rf"Toys.{kind}: 1 rows without user or item.*text or number of its user"):
        review(tmp_path, kind, user_id=given)


@every_format
@pytest.mark.parametrize(
    ("given", "meant", "counted"),
    [
        ("Pens", "Pens", 0),
        (1984, "1984", 0),
        ("True", "True", 0),
        ("[REC] 2", "[REC] 2", 0),
        (" ", None, 0),
        ("nan", None, 2),
        (["Pens", "Ink"], None, 2),
        ({"value": "Heat"}, None, 2),
    ],
)
def test_a_title_is_the_same_in_every_format(tmp_path, kind, given, meant, counted):
    rows = [{"user_id": "u", "parent_asin": item, "rating": 4.0, "timestamp": MS} for item in "ab"]
    write(tmp_path / f"Toys.{kind}", rows)
    write(tmp_path / f"meta_Toys.{kind}", [{"parent_asin": item, "title": given} for item in "ab"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_amazon(tmp_path, "Toys", k=0)
    assert data.items.title.tolist() == [meant] * 2 and data.titles[0] == (meant or "Item a")
    assert data.report.get("titles_not_text", 0) == counted and data.report["untitled_items"] == (0 if meant else 2)
    assert data.warnings == [str(one.message) for one in caught] and len(data.warnings) == counted // 2
    assert all(f"meta_Toys.{kind}: 2 titles that are no text" in message for message in data.warnings)


@pytest.mark.parametrize(
    ("column", "value"), [("user_id", b"\xff"), ("timestamp", timedelta(1)), ("timestamp", b"1"), ("title", b"A")]
)
def test_parquet_columns_that_no_other_format_has_are_named(tmp_path, column, value):
    row = {"user_id": "u", "parent_asin": "a", "rating": 5.0, "timestamp": MS, "title": "A"} | {column: value}
    pl.DataFrame([row]).drop("title").write_parquet(tmp_path / "Toys.parquet")
    pl.DataFrame([row]).select("parent_asin", "title").write_parquet(tmp_path / "meta_Toys.parquet")
    with pytest.raises(LwaError, match=rf"Toys.parquet: {column} \(.*convert the column"):
        load_amazon(tmp_path, "Toys", k=0)
