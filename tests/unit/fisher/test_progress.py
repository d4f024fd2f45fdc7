"""Runs over several processes, runs that are killed and go on, and models of which only a part is in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from fisher_models import batch, build
from fisher_ranks import N_BATCHES, RUNS, dataset

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.calculator import FisherInformationCalculator
from lwa_helpers.fisher.losses import next_token_nll
from lwa_helpers.fisher.result import FisherResult


def assert_equal(one: FisherResult, other: FisherResult, rtol: float = 0.0) -> None:
    np.testing.assert_allclose(one.traces, other.traces, rtol=rtol)
    np.testing.assert_allclose(one.weighted, other.weighted, rtol=rtol)
    assert one.columns == other.columns and one.diagonal.keys() == other.diagonal.keys()
    for name, value in one.diagonal.items():
        torch.testing.assert_close(value, other.diagonal[name], rtol=rtol, atol=0)


def run_two_processes(folder: Path, *arguments: str) -> int:
    """Exit status of fisher_ranks.py under torchrun with two processes."""
    script = Path(__file__).with_name("fisher_ranks.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        str(folder),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}  # torchrun leaves its logs there
    return subprocess.run([*command, *arguments], check=False, timeout=120, env=environment).returncode


def test_two_processes_equal_one_also_after_a_kill(tmp_path):
    assert run_two_processes(tmp_path, "4") != 0  # both are killed at the sharded run's fifth batch
    assert [path.name for path in tmp_path.glob("*.progress")] == ["sharded.progress"]
    assert run_two_processes(tmp_path) == 0
    assert not list(tmp_path.glob("*.progress"))
    for name, (estimator, stop_at) in RUNS.items():
        seen = N_BATCHES if stop_at is None else 4  # two turns of two: the first of at least four rows
        alone = FisherInformationCalculator(estimator, "parameter").calculate(
            build("llama").double(), islice(dataset(), seen)
        )
        for rank in range(2):
            assert_equal(FisherResult.load(tmp_path / f"{name}{rank}"), alone, rtol=1e-10)  # sums in another order


def test_processes_without_a_group_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LwaError, match="2 processes without a process group"):
        FisherInformationCalculator().calculate(build("llama"), dataset())


def killed(batches, after):
    """The dataset up to a batch at which the process is interrupted."""
    for index, rows in enumerate(batches):
        if index == after:
            raise KeyboardInterrupt
        yield rows


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_killed_run_goes_on_with_the_identical_result(tmp_path, after):
    model, file = build("qwen3"), tmp_path / "progress.safetensors"
    whole = FisherInformationCalculator("sampled", "parameter").calculate(model, dataset())
    calculator = FisherInformationCalculator("sampled", "parameter", checkpoint=file, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        calculator.calculate(model, killed(dataset(), after))
    kept = after // 2 * 2
    assert file.exists() == (kept > 0)
    passes = []

    def counted(model, rows):
        passes.append(len(rows["labels"]))
        return next_token_nll(model, rows)

    counted.sample = next_token_nll.sample
    assert_equal(calculator.calculate(model, dataset(), loss=counted), whole)
    assert len(passes) == N_BATCHES - kept + (kept > 0)
    assert not file.exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    model, file = build("llama"), tmp_path / "progress.safetensors"
    calculator = FisherInformationCalculator(checkpoint=file, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        calculator.calculate(model, killed(dataset(), 2))
    with pytest.raises(LwaError, match="another model, loss or dataset"):
        calculator.calculate(build("llama", seed=1), dataset())
    with pytest.raises(LwaError, match="another model, loss or dataset"):
        calculator.calculate(model, dataset(), loss=lambda model, rows: 2 * next_token_nll(model, rows))
    with pytest.raises(LwaError, match="another model, loss or dataset"):
        calculator.calculate(model, [batch(lengths=(6,), seed=7)] * 5)
    with pytest.raises(LwaError, match="another model, loss or dataset"):
        calculator.calculate(model, [next(dataset())])
    with pytest.raises(LwaError, match="checkpoint of another calculation"):
        FisherInformationCalculator(granularity="module", checkpoint=file).calculate(model, dataset())
    assert file.exists()


@pytest.mark.parametrize(("family", "rtol"), [("llama", 1e-12), ("gemma3", 1e-6)])
def test_offloaded_weights_are_read_where_accelerate_keeps_them(family, rtol):
    """Without its weight at hand a norm is computed again from its input; Gemma's does that in float32 in any model."""
    model = build(family).double()
    whole = FisherInformationCalculator(granularity="parameter").calculate(model, dataset())
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.model.layers[0].parameters()).device.type == "meta"
    assert_equal(FisherInformationCalculator(granularity="parameter").calculate(model, dataset()), whole, rtol=rtol)


def test_a_model_spread_by_a_device_map_is_read_wherever_its_layers_are(tmp_path):
    model = build("llama").double()
    whole = FisherInformationCalculator(granularity="parameter").calculate(model, dataset())
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    model = dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path)
    assert [next(layer.parameters()).device.type for layer in model.model.layers] == ["cpu", "meta", "meta"]
    assert_equal(FisherInformationCalculator(granularity="parameter").calculate(model, dataset()), whole, rtol=1e-12)
