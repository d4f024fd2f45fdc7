"""Run one notebook through papermill, with a progress line at each cell and at least every 30 seconds."""

from __future__ import annotations

import errno
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lwa_helpers import files, paths
from lwa_helpers.errors import LwaError, one_line

if TYPE_CHECKING:
    from lwa_helpers.pipeline.kernel import OwnKernel

HEARTBEAT = 30.0
START_TIMEOUT = 300  # seconds that a kernel may take to start: a cold network drive takes long


class Progress:
    """Prints `[3/5] 03_weighting_ablation cell 7/18 · 02:10 elapsed · eta 03:40`; takes the cells' stderr for tqdm."""

    def __init__(self, label: str, run_start: float, expected: float | None, later: float | None) -> None:
        """`expected`: seconds this stage took last time; `later`: what the stages after it took; None: not known."""
        self.label, self.run_start, self.expected, self.later = label, run_start, expected, later
        self.start = time.monotonic()
        self.cell = self.cells = 0
        self._bar = ""
        self._printed = self.start
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def enter_cell(self, cell: int, cells: int) -> None:
        """Say that a code cell begins."""
        self.cell, self.cells, self._bar = cell, cells, ""
        self.report()

    def write(self, text: str) -> None:
        """Keep the newest tqdm bar that a cell wrote to stderr, for the next line."""
        bars = [part for part in text.replace("\r", "\n").split("\n") if "%|" in part or "it/s" in part]
        self._bar = bars[-1].strip() if bars else self._bar

    def flush(self) -> None:
        """Nothing is held back."""

    def report(self) -> None:
        """Print the line now."""
        self._printed = time.monotonic()
        bar = f" · {self._bar}" if self._bar else ""
        elapsed = clock(self._printed - self.run_start)
        print(f"{self.label} cell {self.cell}/{self.cells} · {elapsed} elapsed · eta {self._eta()}{bar}", flush=True)

    def _eta(self) -> str:
        if self.expected is None or self.later is None:
            return "unknown"
        return clock(max(0.0, self.expected - (self._printed - self.start)) + self.later)

    def _beat(self) -> None:
        while not self._stop.wait(1.0):
            if time.monotonic() - self._printed >= HEARTBEAT:
                self.report()


def clock(seconds: float) -> str:
    """130 -> "02:10"; hours in front when there are any."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:02d}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def execute(source: Path, results: Path, parameters: dict[str, Any], progress: Progress) -> None:
    """Execute a notebook in the checkout; its executed copy is written only when it succeeds.

    Args:
        source: the notebook.
        results: where its outputs go; the executed copy goes to notebooks/ there.
        parameters: what its parameters cell is to hold.
        progress: what prints a line at each cell.

    Raises:
        LwaError: with notebook, cell, error and the path of the failed copy, when a cell or the kernel fails.
    """
    import papermill

    from lwa_helpers.pipeline import kernel

    target = results / "notebooks" / source.name
    attempt = target.with_name(f"{target.stem}.attempt.ipynb")
    attempt.parent.mkdir(parents=True, exist_ok=True)
    with kernel.private_folder() as folder:
        own = kernel.OwnKernel.in_folder(folder, results)
        try:
            _papermill(source, attempt, parameters, progress, own)
        except papermill.PapermillExecutionError as error:
            raise LwaError(_explain(source, error, progress, attempt)) from None
        except Exception as error:  # papermill, nbclient, jupyter_client and zmq each raise kinds of their own
            raise LwaError(_broken(source, error, progress, attempt, own)) from error
    files.replace(attempt, target)


def _papermill(
    source: Path, target: Path, parameters: dict[str, Any], progress: Progress, own: type[OwnKernel]
) -> None:
    """Call papermill with this environment's own kernel."""
    import papermill

    from lwa_helpers.pipeline.kernel import connection

    _register_engine()
    papermill.execute_notebook(
        source,
        target,
        parameters,
        engine_name="lwa",
        kernel_name="python3",
        language="python",
        cwd=paths.ROOT,
        progress_bar=False,
        stderr_file=progress,
        progress=progress,
        start_timeout=START_TIMEOUT,
        kernel_manager_class=own,
        config=connection(own.folder),
    )


def _register_engine() -> None:
    """Teach papermill an engine that tells `progress` of each code cell."""
    from papermill.engines import NBClientEngine, papermill_engines

    class ProgressEngine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, progress: Progress, **kwargs: Any) -> None:
            code = [index for index, cell in enumerate(nb_man.nb.cells) if cell.cell_type == "code"]
            start = nb_man.cell_start

            def cell_start(cell: Any, cell_index: int | None = None, **more: Any) -> None:
                if cell_index in code:
                    progress.enter_cell(code.index(cell_index) + 1, len(code))
                start(cell, cell_index, **more)

            nb_man.cell_start = cell_start
            super().execute_managed_notebook(nb_man, kernel_name, **kwargs)

    papermill_engines.register("lwa", ProgressEngine)


def _explain(source: Path, error: Any, progress: Progress, attempt: Path) -> str:
    """Say which cell failed, and why."""
    line = next((text.strip() for text in error.source.splitlines() if text.strip()), "")
    way_out = _way_out(error.ename, str(error.evalue))
    return (
        f"{source.name} failed in cell {progress.cell}/{progress.cells} (In [{error.exec_count}])\n"
        f"  first line     {line}\n"
        f"  error          {error.ename}: {error.evalue}\n"
        + (f"  fix            {way_out}\n" if way_out else "")
        + f"  executed copy  {attempt}\n"
        "Earlier results are as they were."
    )


def _way_out(kind: str, message: str) -> str | None:
    """Return what to do about an error of the system, whichever library tells of it; None for any other error."""
    if kind.endswith(("MemoryError", "OutOfMemoryError")) or "can't allocate memory" in message:
        return files.fix(errno.ENOMEM)
    if "Not enough free space" in message:  # numpy's own words
        return files.fix(errno.ENOSPC)
    number = re.search(r"(?:\[Errno |os error )(\d+)", message)
    return files.fix(int(number[1])) if number else None


def _broken(source: Path, error: Exception, progress: Progress, attempt: Path, own: type[OwnKernel]) -> str:
    """Say what went wrong outside of the notebook's own code: with its kernel, or with the executed copy."""
    from nbclient.exceptions import DeadKernelError

    if isinstance(error, DeadKernelError):
        cause = f"the kernel died: it {own.death()}"
    elif isinstance(error, OSError) and (way_out := files.fix(error.errno)):
        cause = f"{error.filename or attempt} ({error.strerror}): {way_out}"
    elif progress.cell == 0:
        cause = f"the kernel did not start ({_named(error)}): it {own.death()}"
    else:
        cause = f"the kernel was lost ({_named(error)}): start again; finished notebooks keep their results"
    return f"{source.name}, cell {progress.cell}: {cause}\nExecuted copy: {attempt}"


def _named(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")[:300]
