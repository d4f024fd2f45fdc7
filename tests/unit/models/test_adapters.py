"""An adapter's folder loads as the model that it was trained as: its base with the adapter merged in, exactly."""

import json
import re
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_lm import TITLES, item_lm, language_model, tokenizer

from lwa_helpers import load_teacher, paths
from lwa_helpers.errors import LwaError
from lwa_helpers.models import registry as registry_module
from lwa_helpers.models.language_model import plain
from lwa_helpers.models.vocabulary import trim_vocabulary

IDS = torch.arange(3, 15)[None]
Q = ["q_proj", "v_proj"]
ENDS = ["embed_tokens", "lm_head"]
LORA = {
    "plain": {},
    "every linear layer, dora, ranks by stabilised root": {
        "target_modules": "all-linear",
        "use_dora": True,
        "use_rslora": True,
    },
    "biases": {"bias": "all"},
    "ranks of their own": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding trained whole": {"modules_to_save": ["embed_tokens"]},
    "both ends trained whole": {"modules_to_save": ENDS},
    "some tokens": {"trainable_token_indices": [5, 7]},
    "pissa, which changes the base": {"init_lora_weights": "pissa"},
    "no task": {"task_type": None},
}
AT_THE_ENDS = [kind for kind in LORA if any(word in kind for word in ("embedding", "head", "ends", "tokens"))]
OTHERS = {
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": peft.AdaLoraConfig(target_modules=Q, total_step=10),
    "loha": peft.LoHaConfig(target_modules=Q),
    "oft": peft.OFTConfig(target_modules=Q, oft_block_size=4, r=0),
    "vera": peft.VeraConfig(target_modules=Q),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        yield


def trained(folder, config=None, tied=False, grown=0, name="base", **options):
    """An adapter in folder/adapter with random weights, on a base in folder/base, and the logits of both together."""
    base = language_model(2, 16, tie_word_embeddings=tied)
    base.save(folder / name)
    base.model.name_or_path = str(folder / name)
    if grown:
        base.model.resize_token_embeddings(len(base.tokenizer) + grown)
    config = config or peft.LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": Q, "r": 4} | options)
    torch.manual_seed(1)
    model = peft.get_peft_model(base.model, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        logits = model(IDS).logits
    model.save_pretrained(folder / "adapter")
    return logits, model


def logits_of(lm):
    with torch.no_grad():
        return lm.model(IDS).logits


def change(folder, **settings):
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("kind", "tied"), [(kind, tied) for kind in LORA for tied in (False, True) if kind in AT_THE_ENDS or not tied]
)
def test_a_lora_is_merged_exactly(kind, tied, tmp_path):
    want, _ = trained(tmp_path, tied=tied, **LORA[kind])
    lm = load_teacher(tmp_path / "adapter")
    assert type(lm.model).__name__ == "LlamaForCausalLM" and lm.name == "adapter" and not lm.model.training
    assert (logits_of(load_teacher(tmp_path / "base")) - want).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(lm), want, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name or "base_layer" in name for name in lm.model.state_dict())
    assert all(parameter.requires_grad for parameter in lm.model.parameters())
    lm.save(tmp_path / "again")
    assert torch.equal(logits_of(load_teacher(tmp_path / "again")), logits_of(lm))


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_that_change_weights_are_merged_exactly(kind, tmp_path):
    want, _ = trained(tmp_path, OTHERS[kind])
    torch.testing.assert_close(logits_of(load_teacher(tmp_path / "adapter")), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ENDS}, {"modules_to_save": ENDS[:1]}])
def test_an_adapter_with_more_tokens_than_its_base(options, tied, tmp_path):
    want, _ = trained(tmp_path, tied=tied, grown=3, **options)
    words = tokenizer()
    words.add_tokens(["<one>", "<two>", "<three>"])
    words.save_pretrained(tmp_path / "adapter")
    lm = load_teacher(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(lm), want, rtol=1e-4, atol=1e-5)
    assert len(lm.tokenizer) == lm.model.config.vocab_size == len(tokenizer()) + 3
    lm.save(tmp_path / "again")
    assert torch.equal(logits_of(load_teacher(tmp_path / "again")), logits_of(lm))


def test_the_hash_names_base_and_adapter(tmp_path):
    trained(tmp_path)
    base, first = load_teacher(tmp_path / "base").sha256, load_teacher(tmp_path / "adapter").sha256
    assert first.startswith(base + "+") and load_teacher(tmp_path / "adapter").sha256 == first
    change(tmp_path, lora_alpha=99)
    second = load_teacher(tmp_path / "adapter").sha256
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(path).items()}, path, {"format": "pt"})
    third = load_teacher(tmp_path / "adapter").sha256
    language_model(2, 16, seed=1).save(tmp_path / "base")
    assert len({base, first, second, third, load_teacher(tmp_path / "adapter").sha256}) == 5


def test_the_base_may_be_registered_beside_the_adapter_an_adapter_itself_or_hold_items(tmp_path, monkeypatch):
    want, _ = trained(tmp_path)
    for name in ("../base", "mine"):
        change(tmp_path, base_model_name_or_path=name)
        entry = {"backend": "path", "id": str(tmp_path / "base"), "prompt": "plain"}
        monkeypatch.setattr(registry_module, "read_yaml", lambda _, entry=entry: {"mine": entry})
        lm = load_teacher(tmp_path / "adapter")
        torch.testing.assert_close(logits_of(lm), want, rtol=1e-4, atol=1e-5)
    assert lm.prompt == "plain"
    (tmp_path / "adapter").rename(tmp_path / "first")
    trained(tmp_path)
    change(tmp_path, base_model_name_or_path=str(tmp_path / "first"))
    assert load_teacher(tmp_path / "adapter").sha256.startswith(load_teacher(tmp_path / "first").sha256)
    items = item_lm("titles", language_model(2, 16))
    items.save(tmp_path / "base")
    assert load_teacher(tmp_path / "adapter").items.ids == items.items.ids


def test_weights_of_torch_are_read_too(tmp_path):
    want, _ = trained(tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(path), tmp_path / "adapter" / "adapter_model.bin")
    path.unlink()
    torch.testing.assert_close(logits_of(load_teacher(tmp_path / "adapter")), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_model_name_or_path": "org/base"}, "a LoRA adapter of org/base, which is neither.*hf download org/base"),
        ({"base_model_name_or_path": "/no/such/folder"}, "of /no/such/folder, which is neither a directory"),
        ({"base_model_name_or_path": None}, "names no base"),
        ({"base_model_name_or_path": "llama3:latest"}, "which cannot be used: .*served by Ollama"),
        ({"base_model_name_or_path": "../adapter"}, "is an adapter of .*adapter again"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "a PROMPT_TUNING adapter, which changes no weights"),
        ({"peft_type": "OF_TOMORROW"}, "OF_TOMORROW"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed its base .pissa_niter_4."),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, r"4 of its tensors are missing \(.*k_proj.lora_A"),
        ({"target_modules": ["v_proj"]}, r"4 of its tensors are not in the base \(.*q_proj.lora_A"),
        ({"r": 2}, "size mismatch for .*lora_A"),
        ({"lora_bias": True}, "lora_bias|missing"),
    ],
)
def test_what_is_wrong_with_an_adapter_is_said(settings, message, tmp_path):
    trained(tmp_path)
    change(tmp_path, **settings)
    with pytest.raises(LwaError, match=f"{re.escape(str(tmp_path / 'adapter'))}.*{message}"):
        load_teacher(tmp_path / "adapter")


def test_a_folder_that_lacks_or_mixes_its_parts(tmp_path):
    trained(tmp_path)
    folder = tmp_path / "adapter"
    language_model(2, 16).model.save_pretrained(folder)
    with pytest.raises(LwaError, match="in the same folder as a whole model .model.safetensors."):
        load_teacher(folder)
    (folder / "model.safetensors").unlink()
    load_teacher(folder)  # its config.json does no harm
    (folder / "adapter_model.safetensors").write_bytes(b"1")
    with pytest.raises(LwaError, match="adapter.*damaged"):
        load_teacher(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(LwaError, match="without weights"):
        load_teacher(folder)
    for text in ("{", "[]"):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(LwaError, match="adapter_config.json"):
            load_teacher(folder)


def test_a_quantised_base_is_named(tmp_path):
    trained(tmp_path)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(LwaError, match="LoRA adapter of .*base, which cannot be used: .*quantised .bitsandbytes."):
        load_teacher(tmp_path / "adapter")


def test_a_model_with_an_adapter_is_saved_and_cut_as_one(tmp_path):
    want, model = trained(tmp_path)
    lm = language_model(2, 16)
    for wrapped in (model, torch.nn.DataParallel(model)):
        lm.model = wrapped
        lm.save(tmp_path / "whole")
        torch.testing.assert_close(logits_of(load_teacher(tmp_path / "whole")), want, rtol=1e-4, atol=1e-5)
        cut = trim_vocabulary(lm, [f"{title}\n" for title in TITLES])
        old = lm.tokenizer.convert_tokens_to_ids(cut.tokenizer.convert_ids_to_tokens(range(len(cut.tokenizer))))
        ids = torch.arange(4, 12)
        with torch.no_grad():
            got, whole = cut.model(ids[None]).logits, model(torch.tensor(old)[ids][None]).logits
        torch.testing.assert_close(got, whole[..., old], rtol=1e-4, atol=1e-5)
    assert any("lora_A" in name for name, _ in model.named_parameters())  # the model itself is as it was
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    lm.model = peft.get_peft_model(language_model(2, 16).model, prompt)
    with pytest.raises(LwaError, match="PROMPT_TUNING.*cannot be merged"):
        plain(lm.model)
