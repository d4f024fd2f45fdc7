"""A CSV that grows by rows, so that a long benchmark can be stopped and started again."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lwa_helpers.paths import atomic_write


class RowFile:
    """The finished rows of a benchmark at `path`; keys: the columns that tell rows apart, and the type of each."""

    def __init__(self, path: Path, **keys: type):
        self.path, self.keys = path, keys

    def read(self) -> pd.DataFrame:
        """All rows so far; at first there are only the columns of the keys."""
        return pd.read_csv(self.path, dtype=self.keys) if self.path.exists() else pd.DataFrame(columns=list(self.keys))

    def has(self, **key: object) -> bool:
        """Whether a row holds all of these values."""
        return bool((self.read()[list(key)] == list(key.values())).all(axis=1).any())

    def add(self, rows: pd.DataFrame) -> None:
        """Append rows; the file is seen with all of them or with none."""
        with atomic_write(self.path) as temporary:
            (pd.concat([self.read(), rows]) if self.path.exists() else rows).to_csv(temporary, index=False)
