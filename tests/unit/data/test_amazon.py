"""load_amazon against a plain-Python version of the same steps, in every layout that the sets are published in."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections import Counter
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from lwa_helpers import paths
from lwa_helpers.config import DataConfig
from lwa_helpers.data import amazon, kcore, textfiles
from lwa_helpers.data.amazon import load_amazon
from lwa_helpers.data.history_tokens import Reading, encode
from lwa_helpers.data.interactions import COLUMNS, PARTS
from lwa_helpers.data.loading import load_data
from lwa_helpers.data.prompts import prompt_for
from lwa_helpers.data.splits import TEST_FROM, VALID_FROM
from lwa_helpers.data.windows import LengthBatches, user_windows
from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline import code_digest

SHARED = Path(os.environ.get("LWA_SHARED_DATA") or paths.ROOT.parent / "shared" / "data")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data in {SHARED} (set LWA_SHARED_DATA)")
CLOCK = (1_500_000_000_000, VALID_FROM - 1, VALID_FROM, TEST_FROM - 1, TEST_FROM, 1_690_000_000_000)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")


def oracle(rows, k, split):
    """Rows (user, item, rating, time) in file order -> the three parts: dictionaries and lists only."""
    by_user = {}
    for row in rows:
        by_user.setdefault(row[0], []).append(row)
    kept = []
    for events in by_user.values():
        seen = set()
        for row in sorted(events, key=lambda row: row[3]):
            if row[1] not in seen:
                seen.add(row[1])
                kept.append(row)
    while k:
        users, items = Counter(row[0] for row in kept), Counter(row[1] for row in kept)
        core = [row for row in kept if users[row[0]] >= k and items[row[1]] >= k]
        if len(core) == len(kept):
            break
        kept = core
    parts = {part: [] for part in PARTS}
    left = Counter(row[0] for row in kept)
    for row in kept:
        left[row[0]] -= 1
        if split == "timestamp":
            part = "test" if row[3] >= 1658002729837 else "valid" if row[3] >= 1628643414042 else "train"
        else:
            part = {0: "test", 1: "valid"}.get(left[row[0]], "train")
        parts[part].append(row)
    return parts


def write_jsonl(path: Path, records, names=COLUMNS) -> None:
    text = "".join(json.dumps(dict(zip(names, record))) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_items(root: Path, category: str, titles: dict[str, str | None]) -> None:
    write_jsonl(root / f"meta_{category}.jsonl", titles.items(), ("parent_asin", "title"))


def rows_of(data, part):
    return list(data.part(part).itertuples(index=False, name=None))


ROWS = st.lists(
    st.tuples(*map(st.sampled_from, ("uvwxyz", "abcdefg", (1.0, 2.5, 5.0), CLOCK))),
    min_size=1,
    max_size=70,
)


@settings(max_examples=80, deadline=None)
@given(ROWS, st.sampled_from([0, 1, 2, 3, 5]), st.sampled_from(["last_out", "timestamp"]), st.booleans())
def test_same_rows_in_the_same_order_as_plain_python(tmp_path_factory, rows, k, split, scattered):
    root = tmp_path_factory.mktemp("root")
    write_jsonl(root / "Toys.jsonl", rows)
    write_items(root, "Toys", dict.fromkeys("abcdefg", "t"))
    expected = oracle(rows, k, split)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "CACHE", root / "cache")
        if scattered:
            patch.setattr(kcore, "PIECE_BYTES", 100)
            patch.setattr(textfiles, "BLOCK_BYTES", 64)
        if not any(expected.values()):
            with pytest.raises(LwaError, match=f"{k}-core"):
                load_amazon(root, "Toys", k, split)
            return
        data = load_amazon(root, "Toys", k, split)
    assert {part: rows_of(data, part) for part in PARTS} == expected
    events = {}
    for part in PARTS:
        for row, history in zip(expected[part], data.with_history(part).history, strict=True):
            before = events.setdefault(row[0], [])
            assert history == " ".join(before)
            before.append(row[1])
    kept = [row for part in PARTS for row in expected[part]]
    counts = {"rows": len(rows), "interactions": len(kept), "users": len({r[0] for r in kept})}
    unique = {row[:2] for row in rows}
    counts |= {"duplicates": len(rows) - len(unique), "users_before_core": len({u for u, _ in unique})}
    counts |= {"items": len({r[1] for r in kept}), "items_before_core": len({i for _, i in unique})}
    assert data.report | counts == data.report
    assert set(data.item_ids) == {row[1] for row in kept}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_core_of_a_larger_random_set(tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    users, items = rng.zipf(1.5, 3000) % 300, rng.zipf(1.4, 3000) % 200
    rows = [(f"u{u}", f"i{i}", 4.0, int(t)) for u, i, t in zip(users, items, rng.integers(10**12, 10**12 + 500, 3000))]
    root = tmp_path_factory.mktemp("root")
    write_jsonl(root / "Toys.jsonl.gz", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "CACHE", root / "cache")
        with pytest.warns(UserWarning, match="no meta_Toys"):
            data = load_amazon(root, "Toys", 4)
    assert {part: rows_of(data, part) for part in PARTS} == oracle(rows, 4, "last_out")


def test_users_keep_the_order_of_their_first_lines_in_blocks_that_are_parsed_in_parallel(tmp_path):
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 40_000, 200_000), rng.integers(0, 50, 200_000)
    frame = pl.DataFrame({"user_id": users, "parent_asin": items, "rating": 5.0, "timestamp": 7})
    frame = frame.with_columns(pl.format("user number {} of many", "user_id"), pl.format("item {}", "parent_asin"))
    frame.write_csv(tmp_path / "Toys.csv")
    with pytest.warns(UserWarning, match="no meta_Toys") as caught:
        data = load_amazon(tmp_path, "Toys", k=0)
    assert data.warnings == [str(caught[0].message)]
    assert data.test.user_id.tolist() == frame["user_id"].unique(maintain_order=True).to_list()
    assert data.item_ids == frame["parent_asin"].unique(maintain_order=True).to_list()


NAMES_2018 = ("reviewerID", "asin", "overall", "unixReviewTime")
FEW = [("u", "b", 4.0, 7), ("v", "a", 5.0, 3), ("u", "a", 1.0, 5), ("v", "b", 2.0, 3), ("u", "c", 3.0, 6)]


def csv_file(path: Path, header: bool = True, rows=FEW, names=COLUMNS) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([names] * header + [list(row) for row in rows])


LAYOUTS = {
    "2023 jsonl": lambda root: write_jsonl(root / "Toys.jsonl", FEW),
    "2023 jsonl.gz": lambda root: write_jsonl(root / "Toys.jsonl.gz", FEW),
    "2023 csv": lambda root: csv_file(root / "Toys.csv"),
    "2023 csv.gz": lambda root: (root / "Toys.csv.gz").write_bytes(
        gzip.compress("".join(",".join(map(str, row)) + "\n" for row in [COLUMNS, *FEW]).encode())
    ),
    "2018 names in csv": lambda root: csv_file(root / "Toys.csv", names=NAMES_2018),
    "2014/2018 names": lambda root: write_jsonl(root / "Toys.jsonl", FEW, NAMES_2018),
    "2014/2018 suffix": lambda root: write_jsonl(root / "Toys.json.gz", FEW, NAMES_2018),
    "other columns": lambda root: write_jsonl(
        root / "Toys.jsonl",
        [(*row, {"x": [1]}, "other", "a\u2028b") for row in FEW],
        (*COLUMNS, "images", "asin", "text"),
    ),
    "parquet": lambda root: pl.DataFrame(FEW, COLUMNS, orient="row").write_parquet(root / "Toys.parquet"),
    "parquet, odd types": lambda root: (
        pl.DataFrame(FEW, COLUMNS, orient="row")
        .cast({"user_id": pl.Categorical, "rating": pl.Int8, "timestamp": pl.Float64})
        .write_parquet(root / "Toys.parquet")
    ),
    "no break at the end, blank lines, BOM": lambda root: (root / "Toys.jsonl").write_bytes(
        b"\xef\xbb\xbf" + "\n\n".join(json.dumps(dict(zip(COLUMNS, row))) for row in FEW).encode()
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    LAYOUTS[layout](tmp_path)
    write_items(tmp_path, "Toys", {"a": "A", "b": "B", "c": "C", "unused": "U"})
    data = load_amazon(tmp_path, "Toys", k=0)
    assert rows_of(data, "train") == [("u", "a", 1.0, 5)]
    assert rows_of(data, "valid") == [("u", "c", 3.0, 6), ("v", "a", 5.0, 3)]
    assert rows_of(data, "test") == [("u", "b", 4.0, 7), ("v", "b", 2.0, 3)]
    assert list(zip(data.item_ids, data.items.title)) == [("b", "B"), ("a", "A"), ("c", "C")]
    assert data.train.timestamp.dtype == np.int64 and data.train.rating.dtype == np.float64
    assert list(data.train.columns) == list(COLUMNS)


def test_item_files_of_2014_are_lines_of_python_and_never_run(tmp_path, monkeypatch):
    csv_file(tmp_path / "Toys.csv")
    items = [{"asin": "a", "title": 'Pen\'s "A"', "salesRank": {"Toys": 1}, "price": 1.5, "brand": "\u00e9"}]
    items += [{"asin": "b", "title": None}, {"asin": "c", "related": {"bought": ["a"]}, "title": "5' rope"}]
    lines = "".join(f"{item!r}\n" for item in items) + "{'asin': print('run'), 'title': 'x'}\n{'asin': {1}}\n"
    (tmp_path / "meta_Toys.json.gz").write_bytes(gzip.compress(lines.encode()))
    monkeypatch.setattr("builtins.print", lambda *_: pytest.fail("a line was run"))
    with pytest.warns(UserWarning, match="meta_Toys.json.gz: 2 broken lines.*first: line 4"):
        data = load_amazon(tmp_path, "Toys", k=0)
    assert dict(zip(data.item_ids, data.titles)) == {"a": 'Pen\'s "A"', "b": "Item b", "c": "5' rope"}
    assert data.items.store.dropna().tolist() == ["\u00e9"] and data.report["untitled_items"] == 1


def test_csv_without_header_is_the_2023_order_and_nothing_else(tmp_path):
    rows = [(user, item, rating, 1_600_000_000_000 + time) for user, item, rating, time in FEW]
    csv_file(tmp_path / "Toys.csv", header=False, rows=rows)
    write_items(tmp_path, "Toys", {"a": "A", "b": "B", "c": "C"})
    assert rows_of(load_amazon(tmp_path, "Toys", k=0), "train") == [("u", "a", 1.0, 1_600_000_000_005)]
    csv_file(tmp_path / "Early.csv", header=False, rows=[(*row[:3], 900_000_000_000 + row[3]) for row in FEW])
    write_items(tmp_path, "Early", {"a": "A"})
    assert len(load_amazon(tmp_path, "Early", k=0).train) == 1
    csv_file(tmp_path / "Old.csv", header=False, rows=[(i, u, r, 1_500_000_000) for u, i, r, _ in FEW])
    with pytest.raises(LwaError, match="lacks the column user_id.*starts with a line of column names"):
        load_amazon(tmp_path, "Old", k=0)


def test_dates_in_parquet_become_milliseconds(tmp_path):
    frame = pl.DataFrame(FEW, COLUMNS, orient="row")
    frame = frame.with_columns(pl.lit(datetime(2020, 9, 13, 12, 26, 40)).alias("timestamp"))
    frame.write_parquet(tmp_path / "Toys.parquet")
    write_items(tmp_path, "Toys", {"a": "A", "b": "B", "c": "C"})
    assert set(load_amazon(tmp_path, "Toys", k=0).test.timestamp) == {1_600_000_000_000}


def test_own_split_keeps_every_row_and_the_whole_catalogue(tmp_path):
    rows = [("u", "a", 1.0, 1, "train"), ("u", "a", 2.0, 1, "train"), ("u", "b", 3.0, 2, "test")]
    rows.append(("v", "c", 4.0, 3, "valid"))
    write_jsonl(tmp_path / "Toys.jsonl", rows, (*COLUMNS, "split"))
    write_items(tmp_path, "Toys", {"z": "Z", "c": "C", "a": "A"})
    data = load_amazon(tmp_path, "Toys", split="file")
    assert {part: rows_of(data, part) for part in PARTS} == {
        part: [row[:4] for row in rows if row[4] == part] for part in PARTS
    }
    assert data.item_ids == ["a", "b", "c", "z"] and data.report["items_without_interactions"] == 1
    assert data.report["untitled_items"] == 1 and data.items.title.iloc[1] is None and data.titles[1] == "Item b"
    write_jsonl(tmp_path / "Toys.jsonl", [*rows, ("v", "a", 1.0, 9, "dev")], (*COLUMNS, "split"))
    with pytest.raises(LwaError, match=r"Toys.jsonl.*'dev' in line 5"):
        load_amazon(tmp_path, "Toys", split="file")
    write_jsonl(tmp_path / "Toys.jsonl", FEW)
    with pytest.raises(LwaError, match="lacks the column split"):
        load_amazon(tmp_path, "Toys", split="file")


def test_timestamp_split_in_seconds_and_without_a_clock(tmp_path):
    write_items(tmp_path, "Toys", {"a": "A", "b": "B", "c": "C", "d": "D"})
    times = [1628643414, 1628643415, 1658002729, 1658002730]
    write_jsonl(tmp_path / "Toys.jsonl", [("u", item, 5.0, time) for item, time in zip("abcd", times)])
    data = load_amazon(tmp_path, "Toys", k=0, split="timestamp")
    assert [data.part(part).timestamp.tolist() for part in PARTS] == [times[:1], times[1:3], times[3:]]
    write_jsonl(tmp_path / "Toys.jsonl", FEW)
    with pytest.raises(LwaError, match="no clock"):
        load_amazon(tmp_path, "Toys", k=0, split="timestamp")


def test_cache_follows_contents_and_parameters(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "Toys.jsonl", FEW)
    write_items(tmp_path, "Toys", {"a": "A", "b": "B", "c": "C"})
    first = load_amazon(tmp_path, "Toys", k=0)
    with monkeypatch.context() as patch:
        patch.setattr("lwa_helpers.data.amazon.core", lambda *_: pytest.fail("worked again"))
        again = load_amazon(tmp_path, "Toys", k=0)
    assert again.sha256 == first.sha256 and again.report == first.report
    assert len(load_amazon(tmp_path, "Toys", k=2).train) == 0
    write_items(tmp_path, "Toys", {"a": "A", "b": "B", "c": "Other"})
    assert load_amazon(tmp_path, "Toys", k=0).titles == ["B", "A", "Other"]
    write_jsonl(tmp_path / "Toys.jsonl", FEW[:-1])
    assert load_amazon(tmp_path, "Toys", k=0).report["rows"] == 4
    assert not list((tmp_path / "cache" / "amazon").glob(".*"))


@needs_shared
def test_real_2014_office_products_complete():
    root = SHARED / "amazon_2014_office_products"
    data = load_amazon(root, "Office_Products", split="file")
    raw = pl.read_parquet(root / "Office_Products.parquet")
    kept = {key: data.report[key] for key in ("users", "items", "interactions")}
    assert kept == {"users": 4905, "items": 2420, "interactions": 53_258}
    for part in PARTS:
        mine = data.part(part)[["user_id", "parent_asin", "timestamp"]]
        assert list(mine.itertuples(index=False, name=None)) == raw.filter(split=part).select(mine.columns).rows()
        assert data.part(part).rating.isna().all()
    own = load_amazon(root, "Office_Products", k=5, split="last_out")
    assert all(own.part(part).equals(data.part(part)) for part in PARTS)
    assert data.report["untitled_items"] == 0 and data.report["repeated_titles"] == 5 and len(set(data.titles)) == 2420


@needs_shared
def test_windows_read_a_real_set_in_a_sixth_of_the_tokens():
    data = load_amazon(SHARED / "amazon_2014_office_products", "Office_Products", split="file")
    words = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = Split(" ", "removed")
    prompt = prompt_for(data.name)
    lines = [title + prompt.separator for title in data.titles]
    header, rows = encode(PreTrainedTokenizerFast(tokenizer_object=words), prompt.header, lines)
    reading = Reading("titles", header, rows, first=1)
    windows = user_windows(data, reading, max_items=32, context_items=2)
    pairs = user_windows(data, reading, max_items=11, context_items=1, pairs=True)
    targets = [[label for one in some for label in one.labels if label >= 0] for some in (windows, pairs)]
    assert len(targets[0]) == 38_543 and sorted(targets[0]) == sorted(targets[1])
    tokens, pair_tokens = (sum(len(one.input_ids) for one in some) for some in (windows, pairs))
    assert pair_tokens > 6 * tokens
    short = load_amazon(SHARED / "amazon_2014_office_products", "Office_Products", split="file", title_limit=80)
    assert short.report["shortened_titles"] == sum(len(title) > 80 for title in data.titles) > 500
    assert max(map(len, short.titles)) <= 84 and short.item_ids == data.item_ids
    room = sum(len(batch) * max(len(windows[i].input_ids) for i in batch) for batch in LengthBatches(windows, 2048))
    assert tokens >= 0.9 * room


@needs_shared
def test_real_2018_office_products_with_its_split():
    root = str((SHARED / "amazon_2018_office_products").resolve())
    windows = {"max_items": 10, "context_items": 1}
    data = load_data(DataConfig(name="Office_Products", root=root, k_core=5, split="file", **windows))
    assert [len(data.part(part)) for part in PARTS] == [12_715, 4_866, 4_866] and len(data.items) == 3459
    assert data.report["users"] == 3231
    raw = pl.read_parquet(Path(root, "Office_Products.parquet"), columns=[*COLUMNS, "split"]).rows()
    by_user = {row[0]: [] for row in raw}
    for row in raw:
        by_user[row[0]].append(row)
    ordered = [row for rows in by_user.values() for row in sorted(rows, key=lambda row: row[3])]
    for part in PARTS:
        mine = data.part(part)[["user_id", "parent_asin", "timestamp"]].itertuples(index=False, name=None)
        assert list(mine) == [(user, item, time) for user, item, _, time, own in ordered if own == part]
        assert data.part(part).rating.isna().all()
    known = dict(pl.read_parquet(Path(root, "meta_Office_Products.parquet"), columns=["parent_asin", "title"]).rows())
    assert dict(zip(data.item_ids, data.items.title)) == known


@needs_shared
@pytest.mark.parametrize("category", ["All_Beauty", "Electronics", "Office_Products", "Video_Games"])
@pytest.mark.parametrize("split", ["last_out", "timestamp"])
def test_real_2023_samples(category, split):
    root = SHARED / "amazon_2023_sample"
    with gzip.open(root / f"{category}.jsonl.gz", "rt") as file:
        raw = [tuple(json.loads(line)[name] for name in COLUMNS) for line in file]
    data = load_amazon(root, category, k=0, split=split)
    assert {part: rows_of(data, part) for part in PARTS} == oracle(raw, 0, split)
    assert data.report["users"] == 30 and data.report["untitled_items"] == 0


def test_prepared_files_are_named_by_the_modules_that_make_them_alone() -> None:
    reached = code_digest.reached(code_digest.module_tree(paths.PACKAGE / "data/amazon.py"))
    modules = {name.removeprefix("lwa_helpers.data.") for name in reached if name.startswith("lwa_helpers.data.")}
    assert modules | {"amazon"} == set(amazon.PREPARED_BY)
