"""The registry and loading: the embedded model is an ordinary float model, and every absence is named."""

import pytest
import torch
from tiny_lm import language_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, Phi3Config

from lwa_helpers import load_teacher
from lwa_helpers.errors import LwaError
from lwa_helpers.models import backbone, decoder_layers, model_spec, registry

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24,
         "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def test_the_registry_holds_the_teachers():
    known = registry()
    assert {"smollm2-135m", "gemma3-270m", "llama3:latest", "qwen3", "gpt-oss"} <= known.keys()
    assert all(spec.revision for spec in known.values() if spec.backend == "huggingface")


def test_absent_models_are_named(tmp_path):
    with pytest.raises(LwaError, match="registered name .smollm2-135m"):
        model_spec("no-such-model")
    with pytest.raises(LwaError, match="served by Ollama"):
        load_teacher("llama3:latest")
    with pytest.raises(LwaError, match="does not exist"):
        load_teacher(tmp_path / "missing.gguf")
    with pytest.raises(LwaError, match="no .safetensors"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("config", [
    GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=50), Phi3Config(**SMALL), Gemma3TextConfig(**SMALL, head_dim=8),
])
def test_decoder_layers_of_other_families(config):
    model = AutoModelForCausalLM.from_config(config).eval()
    layers = decoder_layers(model)
    assert len(layers) == 3 and decoder_layers(nn.Sequential(model)) is layers
    ids = torch.randint(3, 50, (1, 5))
    with torch.no_grad():
        states = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(states)
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits)


def test_no_layers_is_an_error():
    with pytest.raises(LwaError, match="no list of decoder layers"):
        decoder_layers(nn.Linear(2, 2))


def test_the_embedded_teacher_is_an_ordinary_model(tmp_path):
    teacher = load_teacher("smollm2-135m")
    assert len(decoder_layers(teacher.model)) == 30 and teacher.model.dtype == torch.float32
    assert 134e6 < teacher.model.num_parameters() < 135e6
    assert not hasattr(teacher.model.config, "quantization_config") and not getattr(teacher.model, "hf_quantizer", None)
    assert not getattr(teacher.model, "is_quantized", False)
    teacher.model.float()
    text = "The capital of France is"
    ids = teacher.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        best = teacher.model(ids).logits[0, -1].argmax()
    assert teacher.tokenizer.decode(best).strip() == "Paris"
    assert not load_teacher("smollm2-135m").model.training


def test_a_directory_loads_as_saved(tmp_path):
    lm = language_model()
    lm.save(tmp_path)
    again = load_teacher(str(tmp_path))
    for name, value in lm.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    again.model.save_pretrained(tmp_path / "twice")
