"""The parts of a language model are found by its config, inside any wrapper, not by which part is the largest."""

import pytest
import torch
from architectures import OWN, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

from lwa_helpers.errors import LwaError
from lwa_helpers.models.layers import backbone, decoder_layers, text_config, unwrapped

WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "PEFT": lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])),
    "PEFT in torch.compile": lambda model: torch.compile(WRAPPERS["PEFT"](model), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_parts_inside_a_wrapper(wrap):
    model = tiny_model("llama").model
    layers = model.model.layers
    wrapped = wrap(model)
    assert decoder_layers(wrapped) is layers and unwrapped(wrapped) is model
    assert backbone(wrapped) is model.model and text_config(wrapped) is model.config


def test_layers_of_the_language_model_beside_a_larger_vision_tower(monkeypatch):
    large = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5}
    monkeypatch.setitem(OWN["gemma3"], "vision_config", OWN["gemma3"]["vision_config"] | large)
    model = tiny_model("gemma3").model
    text = model.model.language_model
    towers = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    assert max(towers, key=lambda part: sum(p.numel() for p in part.parameters())) is not text.layers
    assert decoder_layers(model) is text.layers and backbone(model) is text
    assert text_config(model) is model.config.text_config


def test_layers_of_two_types_are_layers():
    model = tiny_model("zamba2").model
    assert decoder_layers(model) is model.model.layers
    assert len({type(layer) for layer in model.model.layers}) == 2


def test_as_many_layers_as_the_config_says():
    model = tiny_model("llama").model
    del model.model.layers[0]
    with pytest.raises(LwaError, match="LlamaForCausalLM has no list of decoder layers .*4 layers, as its config says"):
        decoder_layers(model)


def test_largest_list_of_a_module_without_config():
    model = nn.Module()
    model.small = nn.ModuleList([nn.Linear(2, 2)])
    model.large = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert decoder_layers(model) is model.large
