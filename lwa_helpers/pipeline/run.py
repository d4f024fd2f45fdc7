"""What a notebook uses: its settings, its inputs, and outputs that are recorded in a manifest.

While a notebook runs, its outputs lie in results/<profile>/.staging/<notebook>/; `finish` moves them into
results/<profile>/ and writes the manifest, so a run that fails or is killed leaves the earlier results as they were.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from lwa_helpers import files, paths
from lwa_helpers.config import ExperimentConfig, load_config
from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline import manifest
from lwa_helpers.pipeline.overrides import typed
from lwa_helpers.report import tables


class Run:
    """One execution of one notebook under one profile. Make it with `Run.open`."""

    def __init__(
        self, notebook: str, config: ExperimentConfig, overrides: dict[str, Any], study: str | None = None
    ) -> None:
        self.notebook = notebook
        self.config = config
        self.study = study
        self.dir = paths.run_dir(config.profile, study)
        self.staging = self.dir / ".staging" / notebook
        self._device: Any = None
        self._started = time.time()
        self._outputs: dict[str, dict[str, Any]] = {}
        self._inputs: dict[str, str] = {}
        self._known: dict[Path, dict[str, str]] = {}  # what each folder of results holds
        self._numbers: dict[str, dict[str, Any]] = {}
        self._verdicts: dict[str, dict[str, Any]] = {}
        self._warnings: list[str] = []
        self._records: dict[str, Any] = {"overrides": overrides}

    @classmethod
    @files.explained("results")
    def open(
        cls, notebook: str, profile: str, overrides: dict[str, Any] | None = None, study: str | None = None
    ) -> Run:
        """Start a run of a notebook.

        Args:
            notebook: its file name without .ipynb.
            profile: the profile whose settings it takes.
            overrides: settings that differ from the profile's; texts are read as the command line reads them.
            study: the study whose points the notebook compares.

        Returns:
            The run.

        Raises:
            LwaError: on settings that are not valid.
        """
        paths.checkout()
        _check_name(notebook, "notebook")
        overrides = typed(overrides)
        run = cls(notebook, load_config(profile, overrides), overrides, study)
        files.remove(run.staging)
        run.staging.mkdir(parents=True)
        return run

    @property
    def device(self) -> Any:
        """The torch.device to compute on: the first CUDA device, else the CPU."""
        import torch

        if self._device is None:
            self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return self._device

    @files.explained("results")
    def path(self, name: str, **details: Any) -> Path:
        """Return the path of an output file or folder to be written now, e.g. `run.path("models/teacher")`."""
        _check_name(name, "output")
        self._outputs[name] = details
        target = self.staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def input(self, name: str) -> Path:
        """Find an output of this or an earlier notebook.

        Args:
            name: such as "models/teacher"; of a study's point, "deeper/seed-0/models/teacher".

        Returns:
            Its path.

        Raises:
            LwaError: naming the notebook to run first, when it is not there, or is not as it was written.
        """
        if name in self._outputs:
            return self.staging / name
        path, made = manifest.locate(self.dir, name), self.uses(name)
        if made is not None and path.exists():
            if files.sha256_of(path) != made:
                raise LwaError(f"{path} is not as it was written: `lwa reproduce` or `lwa study` makes it again")
            return path
        makers = [book.stem for book in sorted(paths.NOTEBOOKS.glob("*.ipynb")) if _names(book, name)]
        first = " or ".join(book for book in makers if book != self.notebook) or "an earlier notebook"
        raise LwaError(
            f"{self.notebook} needs {name}, which is not in {self.dir}: run {first} first "
            f"(`lwa reproduce --profile {self.config.profile}` runs all in order)"
        )

    def uses(self, name: str) -> str | None:
        """Record an output, number or verdict of an earlier notebook as an input.

        Args:
            name: as of `input`, or "numbers/<name>" or "verdicts/<name>".

        Returns:
            Its hash, or the number or verdict as text; None when there is none.
        """
        folder, within = manifest.split_point(self.dir, name)
        if folder not in self._known:
            self._known[folder] = manifest.fingerprints(folder, but=self.notebook)
        made = self._known[folder].get(within)
        if made is not None:
            self._inputs[name] = made
        return made

    @files.explained("results")
    def save_frame(self, name: str, frame: pd.DataFrame) -> Path:
        """Write data/<name>.parquet."""
        target = self.path(f"data/{name}.parquet", rows=len(frame))
        frame.to_parquet(target, index=False)
        return target

    def load_frame(self, name: str) -> pd.DataFrame:
        """Read data/<name>.parquet of this or an earlier notebook."""
        return pd.read_parquet(self.input(f"data/{name}.parquet"))

    @files.explained("results")
    def save_json(self, name: str, value: Any) -> Path:
        """Write data/<name>.json."""
        target = self.path(f"data/{name}.json")
        target.write_text(json.dumps(value, indent=1, sort_keys=True, default=manifest.plain) + "\n", encoding="utf-8")
        return target

    def load_json(self, name: str) -> Any:
        """Read data/<name>.json of this or an earlier notebook."""
        return json.loads(self.input(f"data/{name}.json").read_text(encoding="utf-8"))

    @files.explained("results")
    def save_figure(self, figure: Any, name: str, caption: str, alt: str) -> Path:
        """Write figures/<name>.pdf and .png; caption and alternative text are recorded. Returns the PDF's path."""
        if not any(axes.has_data() for axes in figure.axes):
            raise LwaError(f"figure {name!r} is empty: draw something before saving it")
        if not caption.strip() or not alt.strip():
            raise LwaError(f"figure {name!r} needs a caption and an alternative text")
        target = self.path(f"figures/{name}.pdf", caption=caption, alt=alt)
        figure.savefig(target, metadata={"CreationDate": None, "ModDate": None})
        figure.savefig(self.path(f"figures/{name}.png", caption=caption, alt=alt), dpi=200, metadata={"Software": None})
        return target

    @files.explained("results")
    def save_table(self, table: str | pd.DataFrame, name: str, caption: str) -> Path:
        r"""Write tables/<name>.tex, a booktabs tabular: LaTeX text with \toprule, or a frame to be set as one."""
        if isinstance(table, pd.DataFrame):
            style = table.style.hide(axis="index").format(precision=4, escape="latex")
            table = style.format_index(escape="latex", axis=1).to_latex(hrules=True)
        if "\\toprule" not in table:
            raise LwaError(f"table {name!r} has no \\toprule: make it with DataFrame.style … .to_latex(hrules=True)")
        target = self.path(f"tables/{name}.tex", caption=caption)
        target.write_text(table, encoding="utf-8")
        return target

    def number(self, name: str, value: float | str, form: str = "{}", optional: bool = False) -> str:
        r"""Record one number of the text as the LaTeX macro \<name>.

        Args:
            name: letters only, since it names a macro.
            value: the number, or a text.
            form: how it is printed, as for str.format.
            optional: whether there may be too little data to measure it: nan is then printed as `--`.

        Returns:
            The number as it will be printed.

        Raises:
            LwaError: for a name that is not letters only, a repeated name, or a value that is not finite.
        """
        if not re.fullmatch(r"[A-Za-z]+", name):
            raise LwaError(f"number {name!r}: a LaTeX macro's name has letters only")
        if name in self._numbers:
            raise LwaError(f"number {name!r} is recorded twice in {self.notebook}: give each its own name")
        value = value if isinstance(value, (str, int, float)) else manifest.plain(value)
        if optional and isinstance(value, float) and math.isnan(value):
            value, form = tables.ABSENT, "{}"
        text = tables.escape(form.format(value)) if isinstance(value, str) else tables.format_number(value, form)
        self._numbers[name] = {"value": value, "text": text, "cell": _cell()}
        return text

    def interval(self, name: str, values: Sequence[float], form: str = "{}", scale: float = 1.0) -> None:
        """Record an estimate and the ends of its interval, as <name>, <name>Low and <name>High.

        Args:
            name: as of `number`.
            values: the estimate and the two ends; all nan where there is too little data to measure them.
            form: as of `number`.
            scale: factor of all three, such as 100 for per cent.
        """
        for suffix, value in zip(("", "Low", "High"), values):
            self.number(name + suffix, scale * value, form, optional=all(map(math.isnan, values)))

    def verdict(
        self, hypothesis: str, outcome: Literal["supported", "refuted", "undecided"], sentence: str, figure: str
    ) -> None:
        """Record what was found about a hypothesis ("H1" …), in one sentence with the evidence, and its figure."""
        if outcome not in ("supported", "refuted", "undecided"):
            raise LwaError(f"verdict on {hypothesis}: {outcome!r} is not supported, refuted or undecided")
        self._verdicts[hypothesis] = {"outcome": outcome, "sentence": sentence, "figure": figure}

    def warn(self, message: str) -> None:
        """Put a warning into the manifest, as one line; `lwa reproduce` prints it after the notebook and at the end."""
        self._warnings.append("".join(c if c.isprintable() else "?" for c in " ".join(message.split())))

    def record(self, **facts: Any) -> None:
        """Put facts such as data_hash=… and model_hash=… into the manifest."""
        self._records.update(facts)

    @files.explained("results")
    def finish(self) -> Path:
        """Check that every declared output was written, move all into place and write the manifest.

        Returns:
            The manifest's path.

        Raises:
            LwaError: when nothing was declared, or an output is missing or empty.
        """
        if not self._outputs:
            raise LwaError(f"{self.notebook} saved nothing: a finished run has at least one output")
        outputs = {name: manifest.describe(self.staging / name) | d for name, d in sorted(self._outputs.items())}
        figures = [f"figures/{v['figure']}.pdf" for v in self._verdicts.values()]
        if absent := [name for name in figures if not (name in outputs or (self.dir / name).exists())]:
            raise LwaError(f"{self.notebook}: a verdict names {absent[0]}, which no notebook saved")
        summary = manifest.provenance(self._device, self.config) | {
            "notebook": self.notebook,
            "started": self._started,
            "seconds": time.time() - self._started,
            "inputs": self._inputs,
            "outputs": outputs,
            "numbers": self._numbers,
            "verdicts": self._verdicts,
            "warnings": self._warnings,
            "records": self._records,
        }
        manifest.install(self.staging, self.dir, summary)
        return manifest.path_of(self.dir, self.notebook)


def _cell() -> int | None:
    """The number that the running cell has in its notebook, as In [n] shows it; None outside of a notebook."""
    from IPython import get_ipython

    shell = get_ipython()
    return None if shell is None else len(shell.user_ns["In"]) - 1


def _check_name(name: str, kind: str) -> None:
    """Raise LwaError unless `name` is a plain relative path below the results folder."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", name):
        raise LwaError(f"{kind} name {name!r}: use letters, digits, '_', '-', '.' and '/' for folders")


def _names(notebook: Path, output: str) -> bool:
    """Whether a notebook's source contains the output's name, or the bare name that a save_ method takes."""
    source = notebook.read_text(encoding="utf-8")
    return (
        f'\\"{output}\\"' in source
        or f'save_frame(\\"{Path(output).stem}\\"' in source
        or (f'save_json(\\"{Path(output).stem}\\"' in source)
    )
