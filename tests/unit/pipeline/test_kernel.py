"""Notebooks run in this environment's own kernel, whatever the machine around it holds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tiny_project import make_project, point_paths_at, write_notebook

from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline import kernel
from lwa_helpers.pipeline.kernel import OwnKernel, OwnKernelSpecs, connection, private_folder, takes_sockets
from lwa_helpers.pipeline.notebook import _way_out, execute
from lwa_helpers.pipeline.reproduce import reproduce

SEEN = """
import os, sys
from lwa_helpers.pipeline.run import Run
run = Run.open("01_first", profile=profile, overrides=overrides)
told = {name: os.environ.get(name) for name in ("PYTHONSTARTUP", "IPYTHONDIR", "MPLBACKEND", "LWA_CACHE", "KEPT")}
run.save_json("seen", told | {"executable": sys.executable, "started": "started" in globals()})
run.finish()
"""


class Quiet:
    """Takes the place of the progress lines."""

    cell = cells = 0

    def enter_cell(self, cell: int, cells: int) -> None:
        self.cell, self.cells = cell, cells

    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which everything that can lead to another kernel does so."""
    spec = tmp_path / "home/.local/share/jupyter/kernels/python3/kernel.json"
    startup = tmp_path / "home/.ipython/profile_default/startup/00.py"
    for path, text in (
        (spec, json.dumps({"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"})),
        (startup, "started = True"),
        (tmp_path / "shell.py", "started = True"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    long = tmp_path / "a folder whose name is long" / ("x" * 90)
    long.mkdir(parents=True)
    for name, value in {
        "JUPYTER_PATH": str(spec.parents[2]),
        "JUPYTER_DATA_DIR": str(spec.parents[2]),
        "JUPYTER_RUNTIME_DIR": "/proc/nowhere",
        "JUPYTER_DEFAULT_PROVISIONER_NAME": "none-such",
        "HOME": str(tmp_path / "home"),
        "PYTHONSTARTUP": str(tmp_path / "shell.py"),
        "PYTHONIOENCODING": "ascii",
        "MPLBACKEND": "TkAgg",
        "TMPDIR": str(long),
        "KEPT": "yes",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("IPYTHONDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)  # read TMPDIR again
    return tmp_path


def test_a_hostile_machine_changes_nothing(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_project(hostile / "project")
    point_paths_at(root, monkeypatch)
    write_notebook(root / "notebooks/01_first.ipynb", SEEN)
    reproduce("smoke", only="01")
    seen = json.loads((root / "results/smoke/data/seen.json").read_text())
    assert seen["executable"] == sys.executable and not seen["started"] and seen["PYTHONSTARTUP"] is None
    assert seen["MPLBACKEND"] == "module://matplotlib_inline.backend_inline"
    assert not seen["IPYTHONDIR"].startswith(str(hostile / "home")) and seen["KEPT"] == "yes"
    assert seen["LWA_CACHE"] == str(root / ".cache") and not Path(seen["IPYTHONDIR"]).exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
            "the kernel died: it was killed, most likely because memory has run out: free some",
        ),
        (
            "import os\nos.write(2, b'libx: bad')\nos._exit(7)",
            "cell 3: the kernel died: it ended with status 7; it printed last: libx: bad",
        ),
        ("raise OSError(28, 'No space left on device', 'results/x')", "fix +there is no room left for it"),
    ],
)
def test_a_notebook_that_ends_badly_is_explained(tmp_path: Path, monkeypatch, code: str, message: str) -> None:
    point_paths_at(make_project(tmp_path / "project"), monkeypatch)
    source = write_notebook(tmp_path / "project/notebooks/03_bad.ipynb", code)
    with pytest.raises(LwaError, match=message) as caught:
        execute(source, tmp_path / "out", {"profile": "smoke"}, Quiet())
    assert "03_bad.ipynb" in str(caught.value) and not (tmp_path / "out/notebooks/03_bad.ipynb").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            [sys.executable, "-c", "raise SystemExit('no module named x')"],
            "status 1; it printed last: no module named x",
        ),
        (["/no/such/python"], "the kernel did not start .*FileNotFoundError.*: it was not started"),
    ],
)
def test_a_kernel_that_does_not_start_is_explained(tmp_path: Path, monkeypatch, argv: list[str], message: str) -> None:
    root = make_project(tmp_path / "project")
    point_paths_at(root, monkeypatch)
    spec = OwnKernelSpecs().get_kernel_spec("python3")
    spec.argv = argv
    monkeypatch.setattr(OwnKernelSpecs, "get_kernel_spec", lambda *_: spec)
    with pytest.raises(LwaError, match=message):
        execute(root / "notebooks/01_first.ipynb", tmp_path / "out", {}, Quiet())


def test_the_kernel_is_that_of_this_interpreter_under_any_name() -> None:
    for name in ("python3", "julia"):
        assert OwnKernelSpecs().get_kernel_spec(name).argv[:3] == [sys.executable, "-m", "ipykernel_launcher"]


def test_a_folder_with_a_long_path_takes_no_sockets_and_ports_take_their_place(tmp_path: Path) -> None:
    short = Path(tempfile.mkdtemp(dir="/tmp"))
    assert takes_sockets(short) and not list(short.iterdir())
    assert connection(short).KernelManager == {"transport": "ipc", "ip": f"{short}/k"}
    long = tmp_path / ("x" * 100)
    long.mkdir()
    assert not takes_sockets(long)
    assert connection(long).KernelManager == {"transport": "tcp", "ip": "127.0.0.1"}
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(OSError, match="too long"):
        probe.bind(str(long / "k-1"))
    short.rmdir()


def test_the_private_folder_lies_where_sockets_can_and_is_gone_afterwards(tmp_path: Path, monkeypatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(kernel, "PLACES", (str(long), "/no/such/folder", "/tmp"))
    with private_folder() as folder:
        assert folder.parent == Path("/tmp") and takes_sockets(folder)
    assert not folder.exists() and not list(long.iterdir())
    monkeypatch.setattr(kernel, "PLACES", (str(long),))
    with private_folder() as folder:
        assert folder.parent == long
    monkeypatch.setattr(kernel, "PLACES", ("/no/such/folder",))
    with pytest.raises(LwaError, match="TMPDIR"), private_folder():
        pass


def test_the_kernel_finds_modules_where_this_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"own{os.pathsep}/absolute")
    assert kernel.environment(tmp_path, tmp_path)["PYTHONPATH"] == f"{tmp_path / 'own'}{os.pathsep}/absolute"
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")  # the user's own setting of what is only a default here
    assert kernel.environment(tmp_path, tmp_path)["MALLOC_TRIM_THRESHOLD_"] == "1"


@pytest.mark.parametrize(
    ("end", "words"),
    [(signal.SIGKILL, "was killed, most likely because memory has run out"), (signal.SIGSEGV, "died of SIGSEGV")],
)
def test_how_a_kernel_died(tmp_path: Path, end: signal.Signals, words: str) -> None:
    own = OwnKernel.in_folder(tmp_path, tmp_path)
    assert own.death() == "was not started"
    own.process = subprocess.Popen(["sleep", "60"])
    own.process.send_signal(end)
    own.process.wait()
    assert own.death().startswith(words) and OwnKernel.process is None


@pytest.mark.parametrize(
    ("kind", "message", "words"),
    [
        ("OSError", "[Errno 28] No space left on device: 'x'", "no room left"),
        ("OSError", "Not enough free space to write 72 bytes after offset 128", "no room left"),
        ("SafetensorError", "I/O error: No space left on device (os error 28)", "no room left"),
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB", "smaller batches"),
        ("_ArrayMemoryError", "Unable to allocate 9 GiB", "smaller batches"),
        ("RuntimeError", "[enforce fail] DefaultCPUAllocator: can't allocate memory", "smaller batches"),
    ],
)
def test_the_fix_of_a_full_machine_is_named_whichever_library_tells_of_it(kind: str, message: str, words: str) -> None:
    assert words in str(_way_out(kind, message))
    assert _way_out("ValueError", "28 items") is None
