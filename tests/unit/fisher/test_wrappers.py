"""Models in wrappers (torch.compile, DataParallel, DDP, PEFT) against autograd on rows without padding."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
from fisher_models import batch, layers_of, row_traces, tiny
from torch import nn
from transformers import Gemma3Config, GPT2Config, LlamaConfig

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher import importance
from lwa_helpers.fisher.baseline import squared_batch_gradient
from lwa_helpers.fisher.calculator import FisherInformationCalculator
from lwa_helpers.fisher.kfac import kfac_effective_ranks
from lwa_helpers.fisher.losses import next_token_nll
from lwa_helpers.models.layers import decoder_layers

SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = torch.tensor([[3, 4, 5]])


def gpt2():
    """It takes positions, which a wrapper's signature hides."""
    return tiny(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def llama(**more):
    return tiny(LlamaConfig(**SMALL | {"num_key_value_heads": 1} | more))


def traces(model, rows, **options):
    return FisherInformationCalculator(**options).calculate(model, [rows]).per_example


def eager(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    model(TOKENS)  # compiled before there is any hook
    return model


def compiled_forward(model):
    model.forward = eager(model.forward)
    model(TOKENS)
    return model


def compiled_layers(model):
    for index, layer in enumerate(layers_of(model)):
        layers_of(model)[index] = eager(layer)
    model(TOKENS)
    return model


WRAPPERS = {
    "torch.compile": eager,
    "compiled in place": compiled_in_place,
    "compiled forward": compiled_forward,
    "compiled layers": compiled_layers,
    "DataParallel": nn.DataParallel,
    "DataParallel of compiled": lambda model: nn.DataParallel(eager(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_changes_nothing_however_rows_are_padded(name):
    model = WRAPPERS[name](gpt2())
    for side in ("left", "right"):
        rows = batch(lengths=(7, 4), side=side)
        np.testing.assert_allclose(traces(model, rows), row_traces(gpt2(), rows), rtol=1e-9, err_msg=side)
    assert not any(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_distributed_data_parallel_changes_nothing(tmp_path):
    rows = batch(lengths=(7, 4), side="left")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(gpt2())
        np.testing.assert_allclose(traces(model, rows), row_traces(gpt2(), rows), rtol=1e-9)
    finally:
        dist.destroy_process_group()


def test_other_scores_do_not_see_a_wrapper_either():
    rows = [batch(lengths=(7, 4), side="left"), batch(lengths=(5, 6), seed=1)]
    scores = [
        importance.block_influence,
        importance.angular_distance,
        importance.weight_magnitude,
        importance.taylor,
        importance.leave_one_layer_out,
        squared_batch_gradient,
        lambda model, rows: kfac_effective_ranks(model, rows)[["input_rank", "gradient_rank"]],
    ]
    plain = [score(gpt2(), rows) for score in scores]
    for wrap in (eager, compiled_layers, nn.DataParallel):
        for score, expected in zip(scores, plain):
            np.testing.assert_allclose(score(wrap(gpt2()), rows), expected, rtol=1e-9)


def test_compiled_layers_have_the_names_of_plain_ones():
    rows = batch(lengths=(5, 4))
    plain, compiled = (
        FisherInformationCalculator(granularity="module").calculate(model, [rows])
        for model in (gpt2(), compiled_layers(gpt2()))
    )
    assert plain.columns == compiled.columns


def lora(model, **more):
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.5} | more
    return started(peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)))


def started(model):
    """Adapters that have been trained: a fresh one is zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def merged(model):
    model.merge_adapter()
    return model


def with_second(model, active):
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["o_proj"]))
    model.base_model.set_adapter(active)
    return started(model)


ADAPTERS = {
    "lora": lambda: lora(llama()),
    "lora on Conv1D": lambda: lora(gpt2(), target_modules=["c_attn"], fan_in_fan_out=True),
    "all linear maps, with biases": lambda: lora(llama(), target_modules="all-linear", use_rslora=True, lora_bias=True),
    "modules to save": lambda: lora(llama(), modules_to_save=["up_proj", "lm_head"]),
    "merged": lambda: merged(lora(llama())),
    "second adapter active": lambda: with_second(lora(llama()), "second"),
    "both adapters active": lambda: with_second(lora(llama()), ["default", "second"]),
    "injected": lambda: started(peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), llama())),
    "compiled": lambda: eager(lora(llama())),
    "in DataParallel": lambda: nn.DataParallel(lora(llama())),
    "around compiled": lambda: lora(eager(llama())),
    "tuned norms": lambda: peft.get_peft_model(
        llama(), peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM")
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ADAPTERS)
def test_base_and_adapter_weights_count_as_autograd_says(name):
    model = ADAPTERS[name]().train()
    rows = batch(lengths=(7, 4), side="left")
    expected = row_traces(model, rows)
    before = {path: p.requires_grad for path, p in model.named_parameters()}
    np.testing.assert_allclose(traces(model, rows), expected, rtol=1e-9)
    assert before == {path: p.requires_grad for path, p in model.named_parameters()} and model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_disabled_adapter_has_no_fisher_information():
    model, rows = lora(llama()), batch(lengths=(7, 4))
    with model.disable_adapter():
        off = FisherInformationCalculator(granularity="module").calculate(model, [rows])
        np.testing.assert_allclose(off.per_example, row_traces(llama(), rows), rtol=1e-9)
    frame = off.to_frame()
    assert set(frame.loc[frame["trace"] == 0, "module"]) == set(frame["module"][frame["module"].str.contains("lora_")])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (peft.LoraConfig(use_dora=True, target_modules=["q_proj"]), "lora_magnitude_vector"),
        (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "ia3_l"),
        (peft.LoHaConfig(target_modules=["q_proj"]), "hada"),
        (peft.PromptTuningConfig(num_virtual_tokens=2), "virtual tokens"),
        (peft.PrefixTuningConfig(num_virtual_tokens=2), "virtual tokens"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_adapters_that_are_no_linear_maps_are_refused(config, words):
    config.task_type = "CAUSAL_LM"
    model = peft.get_peft_model(llama(), config)
    with pytest.raises(LwaError, match=words):
        traces(model, batch(lengths=(4, 3)))


def test_a_multimodal_wrapper_is_measured_on_its_text_model():
    text = SMALL | {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4}
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = tiny(
        Gemma3Config(
            text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
        )
    )
    for side in ("left", "right"):
        rows = batch(lengths=(7, 4), side=side)
        result = FisherInformationCalculator(granularity="head").calculate(model, [rows])
        np.testing.assert_allclose(result.per_example, row_traces(model, rows), rtol=1e-6)  # its norms are float32
        assert {column.head for column in result.columns if column.module == "self_attn.q_proj"} == {0, 1}


def test_a_loss_that_runs_the_wrapper_itself_is_seen():
    model = gpt2()
    wrapper, rows = eager(model), batch(lengths=(7, 4))
    wrapper(TOKENS)
    found = FisherInformationCalculator().calculate(wrapper, [rows], lambda _, rows: next_token_nll(wrapper, rows))
    np.testing.assert_allclose(found.per_example, row_traces(model, rows), rtol=1e-9)
    assert len(decoder_layers(wrapper)) == 2
