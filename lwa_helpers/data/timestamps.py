"""One meaning for every way to write a time: whole seconds or milliseconds since 1970, in UTC."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import polars as pl

from lwa_helpers.data.splits import CLOCK, MILLISECONDS

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EARLIEST = 315_532_800_000  # 1980 in milliseconds; the year 9999 in seconds is a smaller number
LATEST = 4_102_444_800_000  # 2100 in milliseconds
FINER = {1000: 5 * 10**14, 10**6: 5 * 10**17}  # late 1985 in micro- and in nanoseconds
UTC_NAME = re.compile(r"\s*(?:UTC|GMT)$")
SPACE_BEFORE_ZONE = re.compile(r"\s+(?=[+-]\d\d:?\d\d$)")


def read_times(column: pl.Series) -> tuple[pl.Series, dict[str, pl.Series]]:
    """Read a column of times.

    A whole number is the number itself, however it is written (5, "5", 5.0): seconds, milliseconds or, below 1e8, a
    counter. Micro- and nanoseconds, seconds with a fraction, dates and ISO 8601 texts become milliseconds: without a
    zone they are in UTC, without a time of day they are midnight.

    Args:
        column: (n,) numbers, dates or texts.

    Returns:
        The times, (n,) int64, null where there is none; and for each problem, by its name in `repairs.PROBLEMS`, the
        (n,) mask of its rows. The times of rows out of range are null.
    """
    wrong: dict[str, pl.Series] = {}
    if column.dtype == pl.String:
        column = column.str.strip_chars()
    if column.dtype.is_temporal():
        times = column.cast(pl.Datetime("ms")).cast(pl.Int64)
        dated = times.is_not_null()
    else:
        times, wrong["fractional_times"] = _whole(column)
        times, wrong["finer_than_ms"] = _in_milliseconds(times)
        times, dated = _with_dates(times, column)
        wrong["dates_to_ms"] = dated
    outside = (times < 0) | times.is_between(LATEST // 1000, EARLIEST, "left") | (times >= LATEST)
    outside = (outside | (dated & (times < EARLIEST))).fill_null(False)
    wrong = {problem: mask & ~outside for problem, mask in wrong.items()} | {"times_out_of_range": outside}
    return times.set(outside, None), wrong


def _whole(column: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Return the numbers as int64, null where there is none, and which of them had a fraction."""
    exact = column.cast(pl.Int64, strict=False)
    if column.dtype.is_integer():
        return exact, pl.repeat(False, len(column), eager=True)
    number = column.cast(pl.Float64, strict=False)
    clock = (number != number.floor()) & (number >= CLOCK)
    rounded = pl.select(pl.when(number < MILLISECONDS).then(number * 1000).otherwise(number)).to_series().round()
    whole = pl.when(number == number.floor()).then(pl.coalesce(exact, number.cast(pl.Int64, strict=False)))
    return pl.select(whole.when(clock).then(rounded.cast(pl.Int64, strict=False))).to_series(), clock


def _in_milliseconds(times: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Return the times with those in finer units turned into milliseconds, and which of them these are."""
    finer = pl.repeat(False, len(times), eager=True)
    for factor, earliest in FINER.items():
        mask = times.is_between(earliest, LATEST * factor, "left")
        times = pl.select(pl.when(mask).then(times // factor).otherwise(times)).to_series()
        finer |= mask
    return times, finer


def _with_dates(times: pl.Series, column: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Return the times with those of texts that are dates filled in, and which of them these are."""
    unread = times.is_null() & column.is_not_null()
    if column.dtype != pl.String or not unread.any():
        return times, pl.repeat(False, len(times), eager=True)
    dates = pl.Series([_milliseconds(text) for text in column.filter(unread)], dtype=pl.Int64)
    filled = times.scatter(unread.arg_true(), dates)
    return filled, unread & filled.is_not_null()


def _milliseconds(text: str) -> int | None:
    """Return the time that a text in ISO 8601 names, in milliseconds; None for any other text."""
    try:
        moment = datetime.fromisoformat(SPACE_BEFORE_ZONE.sub("", UTC_NAME.sub("Z", text.upper())))
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return (moment - EPOCH) // timedelta(milliseconds=1)
    except (ValueError, OverflowError):
        return None
