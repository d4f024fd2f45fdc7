"""Fisher pass of a Llama-3-8B-shaped model (random weights, bf16) on one GPU: tokens/s, memory, FLOP utilisation.

    python tests/benchmarks/fisher_gpu.py [--layers 32] [--examples 32] [--batch-size 8] [--tokens 512] [--rounds 3]

Utilisation is the model's own work, 4 FLOP per token and weight of the layers and the head (forward, and backward into
the activations), over the time, as a share of what a square bf16 matrix product reaches on the same card in the same
run. The per-example loop forms every row's gradients; it reads as many rows as --loop-examples says. The first line of
the output names the card. Without a CUDA device it runs on the CPU, which only shows that it runs: pass small sizes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lwa_helpers.fisher.calculator import FisherInformationCalculator
from lwa_helpers.fisher.losses import next_token_nll

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LLAMA_8B = {"hidden": 4096, "width": 14336, "heads": 32, "kv-heads": 8, "vocabulary": 128_256, "layers": 32}
READ = {"examples": 32, "batch-size": 8, "tokens": 512, "rounds": 3, "loop-examples": 4, "matrix": 8192}


def make_model(options: argparse.Namespace) -> nn.Module:
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=options.width,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def make_batches(options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, options.vocabulary, (options.examples, options.tokens), generator=generator)
    return [{"input_ids": part, "labels": part} for part in ids.split(options.batch_size)]


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median time of a call, after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def matrix_peak(size: int) -> float:
    """FLOP/s of a square bf16 product."""
    x = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    return 2 * size**3 / seconds(lambda: x @ x, 20)


def per_example_loop(model: nn.Module, batches: list[dict[str, torch.Tensor]], examples: int) -> None:
    """One backward pass into every layer's parameters for each row, and the squared norm of what came out."""
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    for row in torch.cat([batch["input_ids"] for batch in batches])[:examples].to(DEVICE):
        next_token_nll(model, {"input_ids": row[None], "labels": row[None]}).sum().backward()
        for layer in model.model.layers:
            sum(parameter.grad.float().square().sum() for parameter in layer.parameters())
        model.zero_grad(set_to_none=True)


def peak_memory(work: Callable[[], object]) -> float:
    """GiB at most, the weights included; NaN off a GPU."""
    if DEVICE != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / 2**30


def main(options: argparse.Namespace) -> None:
    print(torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU: the numbers say nothing", flush=True)
    model, batches = make_model(options), make_batches(options)
    tokens, peak = options.examples * options.tokens, matrix_peak(options.matrix)
    worked = sum(p.numel() for p in model.model.layers.parameters()) + model.lm_head.weight.numel()
    print(f"matrix peak {peak / 1e12:.1f} TFLOP/s, {worked / 1e9:.2f}e9 weights", flush=True)
    few = min(options.loop_examples, options.examples)
    loop = seconds(lambda: per_example_loop(model, batches, few), 1) / few
    print(f"per-example loop  {options.tokens / loop:9.0f} tokens/s", flush=True)
    for granularity in ("layer", "parameter"):
        calculator = FisherInformationCalculator(granularity=granularity)

        def work(calculator: FisherInformationCalculator = calculator):
            return calculator.calculate(model, batches)

        took, memory = seconds(work, options.rounds), peak_memory(work)
        print(
            f"{granularity:17s} {tokens / took:9.0f} tokens/s, {memory:5.1f} GiB, "
            f"{4 * worked * tokens / took / peak:5.1%} of the peak, "
            f"{loop * options.examples / took:5.1f}x the loop",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (LLAMA_8B | READ).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    main(parser.parse_args())
