"""The table that transformers logs about weights that do not fit, caught for the error that is raised of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = "transformers.modeling_utils"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
ROW = re.compile(r"(\S.*?)\s+\| (?:MISSING|CONVERSION)\b")


@contextmanager
def load_report() -> Iterator[list[str]]:
    """Keep transformers' load report from being printed inside, and yield the list that it comes into, by lines."""
    logger, lines = logging.getLogger(LOGGER), list[str]()

    def catch(record: logging.LogRecord) -> bool:
        text = COLOUR.sub("", record.getMessage())
        if "LOAD REPORT" not in text:
            return True
        lines.extend(text.splitlines())
        return False

    level = logger.level
    logger.addFilter(catch)
    if not logger.isEnabledFor(logging.WARNING):
        logger.setLevel(logging.WARNING)
    try:
        yield lines
    finally:
        logger.removeFilter(catch)
        logger.setLevel(level)


def tensors_in(report: list[str]) -> list[str]:
    """Return the names of the tensors that a report says are missing or could not be converted."""
    return sorted({found[1] for line in report if (found := ROW.match(line))})
