"""Fisher traces per layer by every library that offers something like them: time, peak memory and error side by side.

    python tests/benchmarks/fisher_peers.py [--layers 4] [--examples 8] [--batch-size 4] [--tokens 110]
                                            [--peers opacus …]

The model is SmolLM2-135M cut to its first layers, in float32; rows are of one length and every token has a label, so
that no peer stumbles over padding. Wanted is the mean over rows of || gradient of the row's summed NLL ||^2 for each
layer. The error is the largest relative one, against one backward pass per row in float64. Each peer runs in a fresh
process, once on one batch to warm up and once for the record; a peer that is not installed or fails has a row that says
so. Install peers beside torch (`pip install --no-deps --target DIR …`, DIR on PYTHONPATH). The table goes to
results/benchmarks/fisher_peers.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pandas as pd
import psutil
import torch
import torch.nn.functional as F
from peak_memory import peak_bytes, reset_peak
from torch import Tensor, nn

from lwa_helpers.files import atomic_write
from lwa_helpers.fisher.calculator import FisherInformationCalculator
from lwa_helpers.models.loading import load_teacher
from lwa_helpers.paths import RESULTS

PROBES = 4  # random vectors of a stochastic trace
Batches = list[Tensor]


def row_nll(model: nn.Module, ids: Tensor) -> Tensor:
    """Summed next-token NLL of each row: (B,)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return (
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        .unflatten(0, (len(ids), -1))
        .sum(1)
    )


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.model.layers


def linears_of(layer: nn.Module) -> list[nn.Linear]:
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


def by_layer(model: nn.Module, value) -> np.ndarray:
    """Sum value(parameter) over each layer's parameters."""
    return np.array([sum(float(value(p)) for p in layer.parameters()) for layer in layers_of(model)])


def training_step(model, batches):
    """What all are measured by: an ordinary forward and backward pass into every parameter."""
    model.requires_grad_(True)
    for ids in batches:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)


def ours(model, batches, granularity="layer"):
    rows = [{"input_ids": ids, "labels": ids} for ids in batches]
    return FisherInformationCalculator(granularity=granularity).calculate(model, rows).per_layer


def ours_diagonal(model, batches):
    return ours(model, batches, "parameter")


def per_example_loop(model, batches):
    total = np.zeros(len(layers_of(model)))
    rows = torch.cat(batches)
    for row in rows:
        model.zero_grad(set_to_none=True)
        row_nll(model, row[None]).sum().backward()
        total += by_layer(model, lambda p: p.grad.square().sum())
    return total / len(rows)


def vmap_grad(model, batches):
    from torch.func import functional_call, grad, vmap

    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values, row):
        logits = functional_call(model, values, (), {"input_ids": row[None], "use_cache": False}).logits[0, :-1]
        return F.cross_entropy(logits, row[1:], reduction="sum")

    total = dict.fromkeys(parameters, 0.0)
    for ids in batches:
        for name, gradient in vmap(grad(loss), (None, 0))(parameters, ids).items():
            total[name] += float(gradient.square().sum())
    names = {p: name for name, p in model.named_parameters()}
    return by_layer(model, lambda p: total[names[p]]) / len(torch.cat(batches))


def opacus_ghost(model, batches):
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(model.train(), loss_reduction="sum", strict=False)
    total = 0.0
    for ids in batches:
        wrapped.zero_grad()
        row_nll(wrapped, ids).sum().backward()
        total = total + by_layer(model, lambda p: p._norm_sample.square().sum())
    wrapped.remove_hooks()
    return total / len(torch.cat(batches))


def nngeometry_diagonal(model, batches):
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatDiag

    collection = LayerCollection()
    for layer in layers_of(model):
        for module in linears_of(layer):
            collection.add_layer_from_model(model, module)
    embedded = torch.cat([model.get_input_embeddings()(ids).detach() for ids in batches])
    data = torch.utils.data.TensorDataset(embedded, torch.cat(batches))
    loader = torch.utils.data.DataLoader(data, batch_size=len(batches[0]))

    def nll(x, ids):
        logits = model(inputs_embeds=x, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.mT, ids[:, 1:], reduction="none").sum(1, keepdim=True)

    backend = TorchHooksJacobianBackend(layer_collection=collection, model=model, function=nll)
    diagonal = PMatDiag(generator=backend, examples=loader).get_diag()
    sizes = [sum(module.weight.numel() for module in linears_of(layer)) for layer in layers_of(model)]
    return np.array([float(part.sum()) for part in diagonal.split(sizes)])


def curvlinops_hutchinson(model, batches):
    from curvlinops import EFLinearOperator, hutchinson_trace

    class RowNLL(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return row_nll(self.model, ids)[:, None]

    model.set_attn_implementation("eager")
    function = RowNLL()
    with torch.no_grad():  # the square of (NLL - target) then has gradient 1 with respect to the NLL
        data = [(ids, function(ids) - 0.5) for ids in batches]
    traces = []
    for layer in layers_of(model):
        operator = EFLinearOperator(
            function, nn.MSELoss(reduction="sum"), list(layer.parameters()), data, check_deterministic=False
        )
        traces.append(float(hutchinson_trace(operator, PROBES)))
    return np.array(traces) / len(torch.cat(batches))


def backpack_norms(model, batches):
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    for layer in layers_of(model):
        for module in linears_of(layer):
            extend(module)
    total = 0.0
    for ids in batches:
        with backpack(BatchL2Grad()):
            row_nll(model, ids).sum().backward()
        total = total + by_layer(model, lambda p: p.batch_l2.sum() if hasattr(p, "batch_l2") else 0)
    return total / len(torch.cat(batches))


def asdl_diagonal(model, batches):
    from asdl import FISHER_EMP, SHAPE_DIAG, FisherConfig, get_fisher_maker

    others = [
        module
        for module in model.modules()
        if module not in {m for layer in layers_of(model) for m in linears_of(layer)}
    ]
    count = len(torch.cat(batches))
    maker = get_fisher_maker(model, FisherConfig(FISHER_EMP, [SHAPE_DIAG], data_size=count, ignore_modules=others))
    for number, ids in enumerate(batches):
        loss = maker.setup_model_call(row_nll, model, ids)
        maker.setup_loss_repr(loss.sum())
        maker.forward_and_backward(accumulate=number > 0)
    modules = [[m for m in linears_of(layer) if hasattr(m, "fisher")] for layer in layers_of(model)]
    return np.array([sum(float(m.fisher.diag.weight.sum()) for m in part) for part in modules])


def bergson_gradients(model, batches):
    from bergson import GradientProcessor
    from bergson.collector.collector import HookCollectorBase

    class Norms(HookCollectorBase):
        def setup(self):
            self.total = np.zeros(len(layers_of(model)))

        def backward_hook(self, module, g):
            self.total[int(module._name.split(".")[2])] += float(self._compute_gradient(module, g).square().sum())

        def process_batch(self, indices, **kwargs):
            pass

        def teardown(self):
            pass

    collector = Norms(model=model, processor=GradientProcessor(), filter_modules="lm_head")
    with collector:
        for ids in batches:
            row_nll(model, ids).sum().backward()
    return collector.total / len(torch.cat(batches))


def kronfluence_lambda(model, batches):
    from kronfluence import Analyzer, FactorArguments, Task, prepare_model

    class Language(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return row_nll(model, batch).sum()

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in name]

    task = Language()
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("peers", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=folder)
        settings = FactorArguments(strategy="diagonal", use_empirical_fisher=True)
        analyzer.fit_lambda_matrices(
            "all", torch.cat(batches), per_device_batch_size=len(batches[0]), factor_args=settings
        )
        sums = analyzer.load_lambda_matrices("all")["lambda_matrix"]
    total = np.zeros(len(layers_of(model)))
    for name, value in sums.items():
        total[int(name.split(".")[2])] += float(value.sum())
    return total / len(torch.cat(batches))


def uni_layer_published(model, batches):
    from uni_layer.metrics.optimization import FisherInformation

    def criterion(logits, ids):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / len(ids)

    metric = FisherInformation(num_batches=len(batches))
    arguments = {"data_loader": [(ids, ids) for ids in batches], "device": "cpu", "criterion": criterion}
    layers = enumerate(layers_of(model))
    return np.array([metric.compute(model, layer, str(i), i, **arguments)["fisher_information"] for i, layer in layers])


TOKENS_AS_EXAMPLES = "takes every token for an example of its own"
PEERS = {  # name: (function, package on PyPI, remark)
    "training step": (training_step, "torch", "the unit of time and memory"),
    "lwa_helpers, trace": (ours, "torch", ""),
    "lwa_helpers, diagonal": (ours_diagonal, "torch", "each parameter's Fisher information as well"),
    "per-example loop": (per_example_loop, "torch", ""),
    "torch.func vmap(grad)": (vmap_grad, "torch", "holds a gradient per example"),
    "opacus, ghost": (opacus_ghost, "opacus", "norms by functorch"),
    "nngeometry": (nngeometry_diagonal, "nngeometry", "linear modules only; its rules want (B, d), not (B, T, d)"),
    "curvlinops": (curvlinops_hutchinson, "curvlinops-for-pytorch", f"stochastic: {PROBES} probes per layer"),
    "backpack": (backpack_norms, "backpack-for-pytorch", "linear modules only; has no rule for RMSNorm"),
    "ASDL": (asdl_diagonal, "asdfghjkl", f"linear modules only; {TOKENS_AS_EXAMPLES}"),
    "bergson": (bergson_gradients, "bergson", "linear modules only; forms a gradient per example"),
    "kronfluence": (kronfluence_lambda, "kronfluence", "linear modules only; forms a gradient per example"),
    "uni-layer": (uni_layer_published, "uni-layer", "squares the batch's mean gradient; reads the data once per layer"),
}


PUBLISHED = [
    {
        "peer": "FlashDP",
        "remark": "as published, on GPUs: exact per-example norms at 90 % of plain training's throughput",
    },
    {"peer": "bergson", "remark": "as published, on one GH200: about 28k tokens/s for 1B parameters, 13k for 6.9B"},
]


def make_task(options: argparse.Namespace) -> tuple[nn.Module, Batches]:
    """The cut model, its layers trainable and the rest frozen, and the batches."""
    model = load_teacher("smollm2-135m").model.eval()
    model.model.layers = model.model.layers[: options.layers]
    model.config.num_hidden_layers = options.layers
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40_000, (options.examples, options.tokens), generator=generator)
    return model, list(ids.split(options.batch_size))


def measure(name: str, options: argparse.Namespace) -> dict:
    """Traces, seconds and MiB above the loaded model of one peer, in this process."""
    model, batches = make_task(options)
    function = PEERS[name][0]
    with contextlib.redirect_stdout(sys.stderr):
        function(model, batches[:1])
        model.zero_grad(set_to_none=True)
        reset_peak()
        before, start = psutil.Process().memory_info().rss, time.perf_counter()
        traces = function(model, batches)
        seconds = time.perf_counter() - start
    mib = (peak_bytes() - before) / 2**20
    return {"seconds": seconds, "peak_mib": mib, "traces": None if traces is None else list(traces)}


def one_row(name: str, truth: np.ndarray, options: argparse.Namespace) -> dict:
    """The table's row for a peer, measured in a fresh process."""
    _, package, remark = PEERS[name]
    row = {"peer": name, "package": package}
    try:
        row["version"] = version(package)
    except PackageNotFoundError:
        return row | {"remark": f"not installed: pip install {package}"}
    arguments = [
        f"--{key}={getattr(options, key.replace('-', '_'))}" for key in ("layers", "examples", "batch-size", "tokens")
    ]
    command = [sys.executable, __file__, "--measure", name, *arguments]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return row | {"remark": f"not done within {options.limit} s; {remark}"}
    if done.returncode:
        return row | {"remark": f"fails: {done.stderr.strip().splitlines()[-1][:120]}; {remark}"}
    found = json.loads(done.stdout.splitlines()[-1])
    if found["traces"] is not None:
        row["error"] = float(np.abs(np.array(found["traces"]) / truth - 1).max())
    return row | {"seconds": found["seconds"], "peak_mib": found["peak_mib"], "remark": remark}


def compare(options: argparse.Namespace) -> None:
    model, batches = make_task(options)
    truth = per_example_loop(model.double(), batches)
    del model
    rows = []
    for name in ["training step", *[name for name in options.peers if name != "training step"]]:
        rows.append(one_row(name, truth, options))
        print(rows[-1], flush=True)
    frame = pd.DataFrame(rows + PUBLISHED).reindex(
        columns=["peer", "package", "version", "seconds", "peak_mib", "error", "remark"]
    )
    frame.insert(4, "time_ratio", frame["seconds"] / frame["seconds"][0])
    frame.insert(6, "memory_ratio", frame["peak_mib"] / frame["peak_mib"][0])
    target = RESULTS / "benchmarks" / "fisher_peers.csv"
    with atomic_write(target) as temporary:
        frame.to_csv(temporary, index=False)
    with pd.option_context("display.width", 250, "display.max_colwidth", 90, "display.max_columns", None):
        print(frame.round(3).to_string(index=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=110)
    parser.add_argument("--limit", type=int, default=120, help="seconds per peer")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--measure", choices=list(PEERS), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    print(json.dumps(measure(chosen.measure, chosen))) if chosen.measure else compare(chosen)
