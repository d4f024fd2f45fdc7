"""Several cases of one user are not independent: intervals resample users, each with all of their cases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd


def by_user(values: np.ndarray, user_ids: Sequence[str] | pd.Series) -> np.ndarray:
    """Return one value per user whose mean is the mean over all cases and whose spread is that of whole users.

    Let user u have n_u of N cases with the sum s_u, and let m be the mean over cases and U the number of users. The
    value is m + (s_u - m n_u) U / N: an interval that resamples these values is cluster-robust (the linearised ratio
    of totals; Cochran, Sampling Techniques, 1977, section 9A.1). With one case per user the values are unchanged.

    Args:
        values: (B,) or (B, seeds), one row per case.
        user_ids: (B,) whose case it is.

    Returns:
        (U,) or (U, seeds), in the order in which the users first appear.

    Example:
        >>> by_user(np.array([1.0, 0.0, 0.5]), ["ann", "ann", "bob"])
        array([0.5, 0.5])
    """
    values, codes = np.asarray(values, dtype=float), pd.factorize(np.asarray(user_ids))[0]
    n_users = codes.max() + 1
    if n_users == len(values):
        return values
    mean, sums = values.mean(0), np.zeros((n_users, *values.shape[1:]))
    np.add.at(sums, codes, values - mean)
    return mean + sums * n_users / len(values)
