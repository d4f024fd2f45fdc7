"""What was wrong in a file: counted, told in one sentence, and how to mend it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

TIME_FIX = "write timestamps as whole seconds or milliseconds since 1970, or as ISO dates like 2020-09-13T12:26:40Z"
PROBLEMS = {
    "broken_lines": "broken lines, skipped",
    "lines_not_utf8": "lines that are not UTF-8, the unreadable characters replaced",
    "rows_without_ids": "rows without user or item, skipped",
    "rows_without_time": "rows without a readable timestamp, skipped",
    "times_out_of_range": "rows with a timestamp before 1980 or after 2099, skipped",
    "dates_to_ms": "timestamps written as dates, turned into milliseconds (UTC where no zone is given)",
    "finer_than_ms": "timestamps in micro- or nanoseconds, turned into milliseconds",
    "fractional_times": "timestamps with a fraction, rounded to milliseconds",
    "seconds_to_ms": "timestamps in seconds among milliseconds, multiplied by 1000",
    "unreadable_ratings": "ratings that are not numbers, set to null",
    "ratings_out_of_range": "ratings outside 1 to 5, set to null",
    "repeated_metadata": "repeated descriptions of an item, the first one with a title kept",
    "script_titles": "titles that are page script, left out",
    "titles_not_text": "titles that are no text (a list, an object, true, false, nan …), left out",
}
REMEDIES = {
    "broken_lines": "write one JSON object a line, or in a csv one value for each column name",
    "rows_without_ids": "give each row the text or number of its user and of its item",
    "rows_without_time": TIME_FIX,
    "times_out_of_range": TIME_FIX,
}


@dataclass
class Repairs:
    """What was wrong in one file.

    Attributes:
        file: the file, or None if there is none.
        counts: how often each problem occurred.
        first: the line of each problem's first occurrence (in a parquet file the row), counted from 1.
    """

    file: Path | None
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)

    def add(self, problem: str, lines: Iterable[int]) -> None:
        """Count one occurrence of a problem for each line number."""
        if numbers := list(lines):
            self.counts[problem] = self.counts.get(problem, 0) + len(numbers)
            first = min(numbers)
            self.first[problem] = min(first, self.first.get(problem, first))

    def message(self) -> str:
        """Return everything that was repaired in the file as one sentence, or "" if nothing was."""
        found = [f"{n} {PROBLEMS[problem]} (first: line {self.first[problem]})" for problem, n in self.counts.items()]
        return f"{self.file}: {'; '.join(found)}" if found else ""

    def nothing_left(self, what: str) -> str:
        """Return the error message for a file in which no usable row or line is left, with what would mend it."""
        most = max((problem for problem in self.counts if problem in REMEDIES), key=self.counts.__getitem__, default="")
        return f"{self.message() or self.file} - no usable {what} is left: {REMEDIES.get(most, 'it holds no record')}"


def warn(messages: Iterable[str]) -> None:
    """Show each message as a warning."""
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=3)
