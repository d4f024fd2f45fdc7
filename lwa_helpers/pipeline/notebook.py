"""Run one notebook through papermill, with a progress line at each cell and at least every 30 seconds."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

from lwa_helpers import files, paths
from lwa_helpers.errors import LwaError

HEARTBEAT = 30.0
# glibc gives large blocks back to the system when they are freed, and every training step asks for the same ones again.
# A step of 30 layers takes a tenth less time where up to a GiB is kept. Other systems' libraries do not read these.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


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


def execute(source: Path, target: Path, parameters: dict[str, Any], progress: Progress) -> None:
    """Execute a notebook in the checkout; its executed copy is written to `target` only when it succeeds.

    Args:
        source: the notebook.
        target: where its executed copy goes.
        parameters: what its parameters cell is to hold.
        progress: what prints a line at each cell.

    Raises:
        LwaError: with notebook, cell, line, error and the path of the failed copy, when a cell fails.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    attempt = target.with_name(f"{target.stem}.attempt.ipynb")
    attempt.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="lwa-") as sockets:
            _papermill(source, attempt, parameters, progress, sockets)
    except papermill.PapermillExecutionError as error:
        raise LwaError(_explain(source, error, progress, attempt)) from None
    except DeadKernelError:
        raise LwaError(
            f"{source.name}, cell {progress.cell}: the kernel died, most likely for want of memory. "
            f"Executed copy: {attempt}"
        ) from None
    files.replace(attempt, target)


def _papermill(source: Path, target: Path, parameters: dict[str, Any], progress: Progress, sockets: str) -> None:
    """Call papermill with this environment's kernel, reached through private sockets rather than network ports."""
    import papermill
    from traitlets.config import Config

    _register_engine()
    os.environ |= KEEP_MEMORY | dict(os.environ) | {"JUPYTER_PREFER_ENV_PATH": "1", "JUPYTER_RUNTIME_DIR": sockets}
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
        config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/k"}}),
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
    line = next((text.strip() for text in error.source.splitlines() if text.strip()), "")
    return (
        f"{source.name} failed in cell {progress.cell}/{progress.cells} (In [{error.exec_count}])\n"
        f"  first line     {line}\n"
        f"  error          {error.ename}: {error.evalue}\n"
        f"  executed copy  {attempt}\n"
        "Earlier results are as they were."
    )
