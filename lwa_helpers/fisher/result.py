"""The result of a Fisher pass, and how it is saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from lwa_helpers.errors import LwaError
from lwa_helpers.files import atomic_write, sha256_of
from lwa_helpers.fisher.convergence import convergence_curve, examples_needed


@dataclass
class FisherResult:
    """Traces of Fisher blocks, one row per example, in the order of the examples.

    Attributes:
        traces: Squared norm of each example's gradient per column, (n, C) float64.
        columns: The layer and module of each column.
        estimator: The estimator of the calculation, "empirical" or "sampled".
        granularity: The granularity of the calculation, "layer", "module", "head" or "parameter".
        diagonal: Mean squared gradient of every entry, by "layer.module.parameter"; empty unless granularity is
            "parameter".
        weighted: sum_j F_jj w_j^2 per column, (C,); None unless granularity is "parameter". Rescaling a weight leaves
            it unchanged.

    Example:
        >>> columns = [Column(layer=0, module="", n_parameters=10), Column(layer=1, module="", n_parameters=10)]
        >>> result = FisherResult(np.array([[1.0, 4.0], [3.0, 8.0]]), columns, "empirical", "layer")
        >>> result.per_layer.tolist()
        [2.0, 6.0]
    """

    traces: np.ndarray
    columns: list[Column]
    estimator: str
    granularity: str
    diagonal: dict[str, torch.Tensor] = field(default_factory=dict)
    weighted: np.ndarray | None = None

    @property
    def n_examples(self) -> int:
        """Number of rows read, including those without any label, whose gradient is zero."""
        return len(self.traces)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers, L."""
        return 1 + max(column.layer for column in self.columns)

    @property
    def per_example(self) -> np.ndarray:
        """Trace of each layer for each example, (n, L)."""
        return self._by_layer(self.traces)

    @property
    def per_layer(self) -> np.ndarray:
        """Trace of the Fisher block of each decoder layer, averaged over examples, (L,)."""
        return self.per_example.mean(0)

    @property
    def standard_error(self) -> np.ndarray:
        """Standard error of per_layer over examples, (L,); NaN for one example."""
        return _standard_error(self.per_example)

    @property
    def per_layer_per_parameter(self) -> np.ndarray:
        """Trace divided by the number of parameters of the layer, (L,)."""
        return self.per_layer / self._by_layer(self._n_parameters()[None])[0]

    @property
    def per_layer_weighted(self) -> np.ndarray:
        """Fisher x weight^2 of each layer, sum_j F_jj w_j^2, (L,).

        Raises:
            LwaError: If granularity is not "parameter".
        """
        if self.weighted is None:
            raise LwaError('Fisher x weight^2 needs the diagonal: use granularity="parameter"')
        return self._by_layer(self.weighted[None])[0]

    def to_frame(self) -> pd.DataFrame:
        """Convert the result to a tidy frame.

        Returns:
            One row per column of traces: layer, module, trace, n_parameters, trace_per_parameter, standard_error.
            Granularity "head" adds head, granularity "parameter" adds fisher_weight2.
        """
        frame = pd.DataFrame([asdict(column) for column in self.columns])
        frame["trace"] = self.traces.mean(0)
        frame["trace_per_parameter"] = frame["trace"] / frame["n_parameters"]
        frame["standard_error"] = _standard_error(self.traces)
        names = ["layer", "module", "trace", "n_parameters", "trace_per_parameter", "standard_error"]
        if self.granularity == "head":
            frame["head"] = frame["head"].astype("Int64")
            names.insert(2, "head")
        if self.weighted is not None:
            frame["fisher_weight2"] = self.weighted
            names.append("fisher_weight2")
        return frame[names]

    def by_group(self, groups: Sequence) -> pd.DataFrame:
        """Compute the per-layer trace of each group of examples.

        Args:
            groups: One label per example (category, history length …).

        Returns:
            One row per group and layer: group, layer, n_examples, trace, standard_error.

        Raises:
            LwaError: If the number of labels is not the number of examples.
        """
        if len(groups) != self.n_examples:
            raise LwaError(f"{len(groups)} group labels for {self.n_examples} examples")
        frames = []
        for group, rows in pd.Series(range(self.n_examples)).groupby(pd.Series(list(groups))):
            chosen = self.per_example[rows.to_numpy()]
            frames.append(
                pd.DataFrame(
                    {
                        "group": group,
                        "layer": range(self.n_layers),
                        "n_examples": len(rows),
                        "trace": chosen.mean(0),
                        "standard_error": _standard_error(chosen),
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)

    def convergence(self, n_splits: int = 20, seed: int = 0) -> pd.DataFrame:
        """Return the split-half Spearman of the layers' order by number of examples: n_examples, spearman."""
        return convergence_curve(self.per_example, n_splits, seed)

    def examples_needed(self, threshold: float = 0.95) -> int | None:
        """Return how many examples it takes for the split-half Spearman to stay at or above the threshold, or None."""
        return examples_needed(self.convergence(), threshold)

    def save(self, path: str | Path) -> None:
        """Write the arrays to `path` (safetensors) and their description to the same name with .json."""
        path, description = _files(path)
        tensors = {f"diagonal.{name}": value.contiguous() for name, value in self.diagonal.items()}
        tensors["traces"] = torch.from_numpy(np.ascontiguousarray(self.traces))
        if self.weighted is not None:
            tensors["weighted"] = torch.from_numpy(self.weighted)
        with atomic_write(path) as temporary:
            save_file(tensors, temporary)
        contents = {
            "estimator": self.estimator,
            "granularity": self.granularity,
            "n_examples": self.n_examples,
            "per_layer": self.per_layer.tolist(),
            "sha256": sha256_of(path),
            "columns": [asdict(column) for column in self.columns],
        }
        with atomic_write(description) as temporary:
            temporary.write_text(json.dumps(contents, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> FisherResult:
        """Return the result that `save` wrote.

        Args:
            path: The path that `save` got.

        Raises:
            LwaError: If a file is missing, or the two files do not belong together.
        """
        path, description = _files(path)
        for file in (path, description):
            if not file.is_file():
                raise LwaError(f"{file} does not exist: save a FisherResult first")
        try:
            contents = json.loads(description.read_text(encoding="utf-8"))
            columns = [Column(**column) for column in contents["columns"]]
            estimator, granularity, sha256 = (contents[key] for key in ("estimator", "granularity", "sha256"))
        except (ValueError, KeyError, TypeError) as error:
            raise LwaError(
                f"{description} is not the description of a FisherResult ({error!r}): compute it again"
            ) from error
        if sha256 != sha256_of(path):
            raise LwaError(
                f"{path} is not the file that {description.name} describes: compute the Fisher information again"
            )
        tensors = load_file(path)
        weighted = tensors.pop("weighted", None)
        traces = tensors.pop("traces").numpy()
        diagonal = {name.removeprefix("diagonal."): value for name, value in tensors.items()}
        return cls(traces, columns, estimator, granularity, diagonal, None if weighted is None else weighted.numpy())

    def _by_layer(self, values: np.ndarray) -> np.ndarray:
        """Sum the columns of values (n, C) by layer, (n, L)."""
        summed = np.zeros((len(values), self.n_layers))
        np.add.at(summed.T, [column.layer for column in self.columns], values.T)
        return summed

    def _n_parameters(self) -> np.ndarray:
        return np.array([column.n_parameters for column in self.columns], dtype=np.float64)


def _files(path: str | Path) -> tuple[Path, Path]:
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
    return path, path.with_suffix(".json")


def _standard_error(rows: np.ndarray) -> np.ndarray:
    """Return the standard error of the mean over rows (n, C), as if they were drawn independently, (C,)."""
    if len(rows) < 2:
        return np.full(rows.shape[1], np.nan)
    return rows.std(0, ddof=1) / np.sqrt(len(rows))


@dataclass(frozen=True)
class Column:
    """What one column of traces belongs to.

    Attributes:
        layer: The decoder layer, from 0.
        module: The module's path within the layer; "" is the whole layer.
        n_parameters: Number of parameters that the column covers.
        head: The attention head; None is the whole module.
    """

    layer: int
    module: str
    n_parameters: int
    head: int | None = None
