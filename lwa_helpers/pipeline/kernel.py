"""The Jupyter kernel that a notebook runs in: this environment's own, in a private folder, whatever the machine has."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from traitlets import default
from traitlets.config import Config

from lwa_helpers import files, paths
from lwa_helpers.errors import LwaError

# glibc gives large blocks back to the system when they are freed, and every training step asks for the same ones again.
# A step of 30 layers takes a tenth less time where up to a GiB is kept. Other systems' libraries do not read these.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
FOREIGN = ("PYTHONSTARTUP", "PYTHONIOENCODING", "PYTHONINSPECT")  # meant for the user's own shell, not for notebooks
PLACES = (None, "/tmp", "/var/tmp", "/dev/shm")  # where a kernel's folder may lie; None is TMPDIR
LOG_CHARACTERS = 400  # of what a dead kernel printed last


class OwnKernelSpecs(KernelSpecManager):
    """The only kernel is that of the running interpreter: no kernel.json of a search path is read."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """Return this interpreter's kernel, whatever the name."""
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            name=kernel_name,
            language="python",
            metadata={"kernel_provisioner": {"provisioner_name": "local-provisioner"}},
        )


class OwnKernel(AsyncKernelManager):
    """Starts that kernel; `in_folder` makes the class that knows where.

    Attributes:
        folder: where its sockets, its connection file and its log lie.
        results: where the notebook's outputs go.
        process: the kernel's process, once it has been started.
    """

    folder = Path()
    results = Path()
    process: subprocess.Popen | None = None

    @classmethod
    def in_folder(cls, folder: Path, results: Path) -> type[OwnKernel]:
        """Return a class of kernels that lie in a folder, which papermill makes one of."""
        return type("OwnKernelInFolder", (cls,), {"folder": folder, "results": results})

    @default("kernel_spec_manager")
    def _own_specs(self) -> KernelSpecManager:
        return OwnKernelSpecs()

    @default("connection_file")
    def _own_connection_file(self) -> str:
        return str(self.folder / "kernel.json")

    async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]  # declared for the blocking manager
        """Start the kernel with an environment of its own; what it prints outside of cells goes to a log."""
        with open(self.folder / "log", "ab") as log:
            await super().start_kernel(**options, env=environment(self.folder, self.results), stdout=log, stderr=log)
        type(self).process = getattr(self.provisioner, "process", None)

    @classmethod
    def death(cls) -> str:
        """Say how the kernel ended: by which signal or with which status, and what it printed last."""
        if cls.process is None:
            return "was not started"
        status = cls.process.poll()
        if status == -signal.SIGKILL:
            return f"was killed, most likely because {files.fix(errno.ENOMEM)}"
        reason = f"died of {signal.Signals(-status).name}" if status and status < 0 else f"ended with status {status}"
        log = cls.folder / "log"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        printed = " / ".join(line.strip() for line in lines if line.strip())
        return f"{reason}; it printed last: {printed[-LOG_CHARACTERS:]}" if printed else reason


def environment(folder: Path, results: Path) -> dict[str, str]:
    """Return the environment variables of a kernel whose private folder and results folder are given."""
    own = {
        "JUPYTER_RUNTIME_DIR": str(folder),
        "IPYTHONDIR": str(folder / "ipython"),  # none of the user's start-up files, and no home that must be writable
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONUTF8": "1",
        "LWA_ROOT": str(paths.ROOT),  # as absolute paths: a kernel starts in the checkout
        "LWA_CACHE": str(paths.CACHE),
        "LWA_RUN": str(results),
    }
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    if "PYTHONPATH" in kept:
        kept["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, kept["PYTHONPATH"].split(os.pathsep)))
    return KEEP_MEMORY | kept | own


@contextmanager
def private_folder() -> Iterator[Path]:
    """Yield a folder for a kernel, which is deleted afterwards: one that takes sockets, if there is any.

    Raises:
        LwaError: if no temporary folder can be made.
    """
    made: list[Path] = []
    try:
        for place in PLACES:
            with suppress(OSError):
                made.append(Path(tempfile.mkdtemp(prefix="lwa-", dir=place)))
                if takes_sockets(made[-1]):
                    made.insert(0, made.pop())
                    break
        if not made:
            raise LwaError("no folder can be made for temporary files: name a writable one in TMPDIR")
        yield made[0]
    finally:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)


def takes_sockets(folder: Path) -> bool:
    """Return whether sockets can lie in a folder: some paths are too long for them, and some file systems have none."""
    path = folder / "k-0"  # as long as those of a kernel, k-1 to k-5
    try:
        with closing(socket.socket(socket.AF_UNIX)) as probe:
            probe.bind(str(path))
    except OSError:
        return False
    path.unlink()
    return True


def connection(folder: Path) -> Config:
    """Return how a kernel is reached: through sockets in its folder or, where there can be none, network ports."""
    sockets = {"transport": "ipc", "ip": f"{folder}/k"}
    return Config({"KernelManager": sockets if takes_sockets(folder) else {"transport": "tcp", "ip": "127.0.0.1"}})
