"""The registry and loading: the embedded model is an ordinary float model, and every absence is named."""

import json
import re

import pytest
import torch
from tiny_lm import language_model, tokenizer, write_gguf
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, Phi3Config, Qwen2Config

from lwa_helpers import load_teacher, paths
from lwa_helpers.errors import LwaError
from lwa_helpers.models import loading
from lwa_helpers.models import registry as registry_module
from lwa_helpers.models.layers import backbone, decoder_layers
from lwa_helpers.models.registry import model_spec, registry

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_the_registry_holds_the_teachers():
    known = registry()
    assert {"smollm2-135m", "gemma3-270m", "llama3:latest", "qwen3", "gpt-oss"} <= known.keys()
    assert all(re.fullmatch("[0-9a-f]{40}", spec.revision) for spec in known.values() if spec.backend == "huggingface")
    assert all(spec.licence for spec in known.values())


def test_absent_models_are_named(tmp_path):
    with pytest.raises(LwaError, match="registered name .smollm2-135m"):
        model_spec("no-such-model")
    with pytest.raises(LwaError, match="served by Ollama"):
        load_teacher("llama3:latest")
    with pytest.raises(LwaError, match="does not exist"):
        load_teacher(tmp_path / "missing.gguf")
    with pytest.raises(LwaError, match="no .safetensors"):
        load_teacher(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=50),
        Phi3Config(**SMALL),
        Gemma3TextConfig(**SMALL, head_dim=8),
    ],
)
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


# A directory or a .gguf file needs no entry

TINY = SMALL | {
    "vocab_size": len(tokenizer()),
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("config", [Qwen2Config(**TINY), LlamaConfig(**TINY), Gemma3TextConfig(**TINY, head_dim=8)])
def test_a_directory_of_any_architecture_needs_no_entry(config, tmp_path):
    lm = language_model(config=config)
    lm.save(tmp_path)
    again = load_teacher(tmp_path)
    assert type(again.model) is type(lm.model) and len(decoder_layers(again.model)) == 2
    ids = again.tokenizer("Toy Story\n", return_tensors="pt").input_ids
    assert ids.tolist() == lm.tokenizer("Toy Story\n", return_tensors="pt").input_ids.tolist()
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, lm.model(ids).logits)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [(Qwen2Config(**TINY), "qwen2"), (LlamaConfig(**TINY), "llama"), (Gemma3TextConfig(**TINY, head_dim=8), "gemma3")],
)
def test_a_gguf_file_needs_no_entry(config, architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    lm = language_model(config=config)
    write_gguf(lm, tmp_path / "tiny.gguf", architecture)
    again = load_teacher(tmp_path / "tiny.gguf")
    assert again.name == "tiny" and type(again.model) is type(lm.model)
    ids = lm.tokenizer("Toy Story\n", return_tensors="pt").input_ids
    if architecture != "gemma3":  # whose tokenizer is SentencePiece, not the byte-level one of this file
        assert again.tokenizer("Toy Story\n", add_special_tokens=False)["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, lm.model(ids).logits, rtol=1e-4, atol=1e-5)


def test_what_transformers_cannot_read_is_named(tmp_path):
    (tmp_path / "odd.gguf").write_bytes(b"no model at all")
    with pytest.raises(LwaError, match="odd.gguf"):
        load_teacher(tmp_path / "odd.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(LwaError, match=f"{tmp_path.name}.*can load"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("loader", [loading.AutoTokenizer, loading.AutoModelForCausalLM])
def test_a_repository_is_read_at_its_revision_without_its_code(loader, monkeypatch):
    """The hub is not asked: what it would be asked is looked at."""
    asked = []

    def absent(source, **how):
        asked.append((source, how))
        raise OSError("not in the cache\nmore")

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(loader, "from_pretrained", absent)
    spec = model_spec("qwen3-0.6b")
    missing = f"'qwen3-0.6b' .{spec.id} at {spec.revision}. is neither in the local cache.*not in the cache$"
    with pytest.raises(LwaError, match=missing):
        load_teacher("qwen3-0.6b")
    ((source, how),) = asked
    assert source == spec.id and how["revision"] == spec.revision and how["trust_remote_code"] is False


def test_code_that_comes_with_a_model_is_refused(tmp_path):
    language_model().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(LwaError, match="can load"):
        load_teacher(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backend": "embedded", "id": "x", "trust_remote_code": True}, "trust_remote_code"),
        ({"backend": "cloud", "id": "x"}, "backend"),
        ({"backend": "huggingface", "id": "owner/name"}, "pinned revision"),
        ({"backend": "huggingface", "id": "owner/name", "revision": "main"}, "pinned revision.*'main'"),
        ({"backend": "huggingface", "id": "https://x/y", "revision": "1"}, "owner/name"),
        ("smollm2", "list of fields"),
    ],
)
def test_a_wrong_entry_is_named(fields, message, monkeypatch):
    monkeypatch.setattr(registry_module, "read_yaml", lambda name: {"mine": fields})
    with pytest.raises(LwaError, match=f"model_config.yaml: entry 'mine'.*{message}"):
        registry()


def test_adding_a_model_is_one_entry(tmp_path, monkeypatch):
    language_model().save(tmp_path)
    monkeypatch.setattr(
        registry_module, "read_yaml", lambda name: {"mine": {"backend": "path", "id": str(tmp_path), "prompt": "plain"}}
    )
    lm = load_teacher("mine")
    assert lm.name == "mine" and lm.prompt == "plain"
