"""Training that is killed, and training in several processes, end at the weights of one undisturbed process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.smoke
SCRIPT, SHARDED = (Path(__file__).with_name(name) for name in ("train_tiny.py", "train_sharded.py"))
TWO = [
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
]  # without a GPU the two processes talk through gloo


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


def run(*arguments, launcher=(), script=SCRIPT):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), *sys.path]),
        "TMPDIR": str(arguments[0].parent),  # where torchrun leaves its logs
    }
    command = [sys.executable, *launcher, str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_run_after_kill_9_ends_with_the_same_bits(tmp_path):
    killed = run(tmp_path / "killed", "--folder", tmp_path / "run", "--kill", 5)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "killed").exists(), killed.stderr
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    for arguments in ((tmp_path / "resumed", "--folder", tmp_path / "run"), (tmp_path / "whole",)):
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
    resumed, whole = load_file(tmp_path / "resumed"), load_file(tmp_path / "whole")
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_two_processes_equal_one_with_twice_the_batches_a_step(tmp_path):
    """Tolerance: 1e-5, as sums of gradients are taken in another order."""
    two = run(tmp_path / "two", launcher=TWO)
    assert two.returncode == 0, two.stderr
    one = run(tmp_path / "one", "--accumulate", 2)
    assert one.returncode == 0, one.stderr
    got, want = load_file(tmp_path / "two"), load_file(tmp_path / "one")
    assert got.pop("processes") == 2 and want.pop("processes") == 1
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5)


def test_a_sharded_student_has_the_loss_and_the_gradients_of_a_whole_one(tmp_path):
    """FSDP over two processes, which average their gradients: the mean over the batches of one process without it."""
    for name, launcher in (("two", TORCHRUN), ("one", ())):
        done = run(tmp_path / name, launcher=launcher, script=SHARDED)
        assert done.returncode == 0, done.stderr
    got, want = load_file(tmp_path / "two"), load_file(tmp_path / "one")
    assert got.keys() == want.keys() and len(want) > 40 and any(value.any() for value in want.values())
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)
