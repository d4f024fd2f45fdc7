"""A model with fewer layers computes what the whole model does when the other layers pass their input on."""

import copy

import pytest
import torch
from architectures import tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lwa_helpers.errors import LwaError
from lwa_helpers.models.layers import decoder_layers
from lwa_helpers.models.pruning import with_layers

IDS = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(2))  # longer than the tiny windows of 8

KEPT_SETTINGS = [
    ("gpt_neo", [0, 2], {"attention_layers": ["global", "global"], "attention_types": [[["global", "global"], 1]]}),
    ("gpt_neo", [1, 2, 3], {"attention_layers": ["local", "global", "local"]}),
    ("lfm2_moe", [1, 2], {"num_dense_layers": 1, "layer_types": ["full_attention", "conv"]}),
    ("jamba", [0, 3], {"attn_layer_period": 2}),
    ("gemma3_text", [0, 3], {"num_hidden_layers": 2}),
]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def without_others(model, kept):
    """The logits of a copy of the model whose other layers return what they get."""
    whole = copy.deepcopy(model)
    for index, layer in enumerate(decoder_layers(whole)):
        if index not in kept:
            layer.forward = passing_on(layer.forward)
    return logits(whole)


def passing_on(forward):
    def pass_on(*args, **kwargs):
        states, found = args[0] if args else kwargs["hidden_states"], forward(*args, **kwargs)
        return (states, *found[1:]) if isinstance(found, tuple) else states

    return pass_on


@pytest.mark.parametrize(("kind", "kept", "settings"), KEPT_SETTINGS)
def test_settings_that_go_by_a_layers_index(kind, kept, settings, tmp_path):
    model = tiny_model(kind).model
    pruned = with_layers(model, kept)
    assert {name: getattr(pruned.config, name) for name in settings} == settings
    assert len(decoder_layers(pruned)) == len(kept) and len(decoder_layers(model)) == 4
    torch.testing.assert_close(logits(pruned), without_others(model, kept))
    pruned.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(pruned))


def test_every_second_layer_sparse():
    model = tiny_model("qwen2_moe").model
    model.config.decoder_sparse_step = 1
    sparse = copy.deepcopy(model.config)
    sparse.decoder_sparse_step = 2  # layers 1 and 3 have experts, 0 and 2 do not
    model = AutoModelForCausalLM.from_config(sparse).eval()
    pruned = with_layers(model, [0, 3])
    assert pruned.config.mlp_only_layers == [0] and pruned.config.decoder_sparse_step == 1
    torch.testing.assert_close(logits(pruned), without_others(model, [0, 3]))


@pytest.mark.parametrize(("kind", "kept"), [("diffllama", [0, 2]), ("jamba", [0, 2]), ("zamba2", [0, 3])])
def test_refused_where_the_config_cannot_say_it(kind, kept):
    # DiffLlama computes lambda_init from a layer's index, Jamba's config says "every second layer attends", and the
    # blocks that Zamba 2 shares have an adapter for each of their places.
    with pytest.raises(
        LwaError, match=r"cannot be cut to its layers \[0, .\]: what a layer computes depends on its index"
    ):
        with_layers(tiny_model(kind).model, kept)


def test_layers_that_stay_where_they_were_are_kept_whatever_the_architecture():
    model = tiny_model("diffllama").model
    torch.testing.assert_close(logits(with_layers(model, [0, 1])), without_others(model, [0, 1]))


def test_text_layers_of_a_multimodal_model():
    model = tiny_model("gemma3").model
    pruned = with_layers(model, [0, 2])
    assert pruned.config.text_config.num_hidden_layers == 2 and pruned.config.vision_config.num_hidden_layers == 5
    torch.testing.assert_close(logits(pruned), without_others(model, [0, 2]))


def test_adapters_are_merged():
    adapted = get_peft_model(tiny_model("llama").model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    expected = without_others(adapted, [0, 2])
    pruned = with_layers(adapted, [0, 2])
    assert not any("lora" in name for name in pruned.state_dict())
    torch.testing.assert_close(logits(pruned), expected)
    assert any("lora" in name for name in adapted.state_dict())  # the adapted model is as it was


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama").model.train()
    before, state = logits(model.eval()), torch.get_rng_state()
    model.train()
    with_layers(model, [1, 3])
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model.eval()), before)
