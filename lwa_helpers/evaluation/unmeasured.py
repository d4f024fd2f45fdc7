"""What too few users or layers leave unmeasured: nan in the result, `--` in the text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class TooFew(ValueError):
    """There are too few users or layers, or they are too alike, for a statistic.

    Attributes:
        absent: the statistic's result, with nan for each number.
    """

    def __init__(self, message: str, result: type[NamedTuple]) -> None:
        super().__init__(message)
        self.absent = result._make([math.nan] * len(result._fields))


def measured(statistic: Callable[..., Any], *values: Any, **options: Any) -> Any:
    """Return a statistic of the values, or a result that is all nan where they are too few or too alike for it."""
    try:
        return statistic(*values, **options)
    except TooFew as error:
        return error.absent
