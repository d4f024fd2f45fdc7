"""A Slurm of this machine alone, with a configuration of its own, for as long as a test needs it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "sinfo")
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
CONFIG = """
ClusterName=alone
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
SlurmdPort={next_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Say why there can be no Slurm here; None where there can."""
    if os.geteuid() != 0:
        return "Slurm's daemons run as root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    return f"{', '.join(absent)} not installed (slurmctld slurmd slurm-client munge)" if absent else None


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Run a Slurm of one node whose files lie in a folder; yield the environment that reaches it."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host, port = socket.gethostname().split(".")[0], _free_port()
    config = folder / "slurm.conf"
    cpus = os.cpu_count()
    config.write_text(CONFIG.format(host=host, port=port, next_port=port + 1, folder=folder, cpus=cpus))
    environment = os.environ | {"SLURM_CONF": str(config), "PATH": SEARCH}
    daemons = [_munge()]
    try:
        for name in ("slurmctld", "slurmd"):
            with open(folder / f"{name}.out", "w") as out:
                daemons.append(subprocess.Popen([name, "-D"], env=environment, stdout=out, stderr=out))
            time.sleep(2.0)  # the node's daemon looks for its controller once
        _wait_until_idle(environment, folder)
        yield environment
    finally:
        for daemon in reversed([daemon for daemon in daemons if daemon]):
            daemon.terminate()
            daemon.wait()


def _munge() -> subprocess.Popen | None:
    """Start the daemon by which Slurm knows its users; None where it runs already."""
    if subprocess.run(["pgrep", "-x", "munged"], capture_output=True, check=False).returncode == 0:
        return None
    key = Path("/etc/munge/munge.key")
    if not key.exists():
        key.write_bytes(os.urandom(1024))
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown(key, "munge", "munge")
    shutil.chown("/run/munge", "munge", "munge")
    key.chmod(0o400)
    command = ["setpriv", "--reuid=munge", "--regid=munge", "--init-groups", "/usr/sbin/munged", "--foreground"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    for _ in range(30):
        state = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, check=False
        )
        if "idle" in state.stdout:
            return
        time.sleep(1.0)
    logs = "\n".join(path.read_text()[-1000:] for path in folder.glob("*.log"))
    raise RuntimeError(f"Slurm did not come up:\n{logs}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
