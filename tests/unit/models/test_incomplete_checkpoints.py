"""A checkpoint that lacks tensors, has others than its config says or more than it says is refused by their names."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_lm import language_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
)

from lwa_helpers import load_teacher
from lwa_helpers.errors import LwaError

LAYER = "model.layers.1.self_attn.q_proj.weight"
SIZES = {"vocab_size": 313, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def checkpoint(folder, tied=False, config=None, change=None, **settings):
    """A saved model whose tensors `change` changes, and whose config.json has these settings instead."""
    lm = language_model(2, 16, tie_word_embeddings=tied, config=config)
    lm.save(folder)
    if change:
        tensors = load_file(folder / "model.safetensors")
        save_file(change(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | settings))
    return lm


def without(*starts):
    return lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(starts)}


def renamed(old, new):
    return lambda tensors: {name.replace(old, new, 1): value for name, value in tensors.items()}


def also(**tensors):
    return lambda found: found | {name.replace("__", "."): value for name, value in tensors.items()}


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_base_model_and_a_classifier_have_no_head(kind, tmp_path):
    lm = checkpoint(tmp_path)
    kind(lm.model.config).save_pretrained(tmp_path)
    with pytest.raises(LwaError, match=r"'test_a_base.*1 tensor is missing: lm_head.weight. Give a causal"):
        load_teacher(tmp_path)


def test_an_encoder_is_no_causal_model_although_it_has_a_head(tmp_path):
    """Its tokens see those that follow, so predicting them is reading."""
    config = BertConfig(**SIZES, num_attention_heads=2)
    checkpoint(tmp_path, config=config)
    with pytest.raises(LwaError, match="is an encoder .bert."):
        load_teacher(tmp_path)
    checkpoint(tmp_path, config=BertConfig(**SIZES, num_attention_heads=2, is_decoder=True))
    load_teacher(tmp_path)


def test_a_base_model_whose_head_is_its_embedding_is_whole(tmp_path):
    lm = checkpoint(tmp_path, tied=True)
    lm.model.model.save_pretrained(tmp_path)
    again = load_teacher(tmp_path)
    assert torch.equal(again.model.lm_head.weight, lm.model.model.embed_tokens.weight)


def test_only_the_head_of_a_tied_model_in_the_file_will_do(tmp_path):
    lm = checkpoint(tmp_path, tied=True, change=renamed("model.embed_tokens", "lm_head"))
    again = load_teacher(tmp_path)
    for end in (again.model.get_input_embeddings(), again.model.get_output_embeddings()):
        assert torch.equal(end.weight, lm.model.lm_head.weight)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (without(LAYER), {}, f"1 tensor is missing: {LAYER}"),
        (without("model.layers.1."), {}, "9 tensors are missing: model.layers.1.input_layernorm.weight, .*, …"),
        (without("model.embed", "lm_head"), {}, "2 tensors are missing: lm_head.weight, model.embed_tokens.weight"),
        (None, {"num_hidden_layers": 3}, "9 tensors are missing: model.layers.2.input"),
        (
            None,
            {"num_hidden_layers": 1},
            "9 tensors are without a place in LlamaForCausalLM: model.layers.1.*config",
        ),
        (None, {"vocab_size": 320}, r"lm_head.weight is \(313, 16\) in the file and \(320, 16\) by config.json"),
        (
            None,
            {"hidden_size": 8, "head_dim": 4},
            r"model.embed_tokens.weight is \(313, 16\) in .* \(313, 8\)",
        ),
        (None, {"intermediate_size": 40}, r"6 tensors are of another.*down_proj.weight is \(16, 32\).*and \(16, 40\)"),
        (None, {"num_key_value_heads": 4}, r"k_proj.weight is \(8, 16\) in the file and \(16, 16\)"),
        (None, {"attention_bias": True}, "8 tensors are missing: model.layers.0.self_attn.k_proj.bias"),
        (also(model__layers__0__self_attn__q_proj__bias=torch.ones(16)), {}, "without a place.*q_proj.bias"),
        (also(model__layers__0__self_attn__q_norm__weight=torch.ones(4)), {}, "without a place.*q_norm"),
        (also(lm_head__bias=torch.ones(313)), {}, "without a place.*lm_head.bias"),
        (renamed("", "module."), {}, "inside a wrapper"),
        (renamed("", "_orig_mod."), {}, "inside a wrapper"),
        (renamed("q_proj.", "q_proj.base_layer."), {}, "merge_and_unload"),
        (renamed("", "base_model.model."), {}, "merge_and_unload"),
        (also(model__layers__0__mlp__up_proj__weight_scale=torch.ones(1)), {}, "look quantised"),
        (also(model__layers__0__mlp__up_proj__SCB=torch.ones(32)), {}, "look quantised"),
    ],
)
def test_weights_and_config_that_disagree(change, settings, message, tmp_path):
    checkpoint(tmp_path, change=change, **settings)
    with pytest.raises(LwaError, match=f"{re.escape(str(tmp_path))}.*do not fit: .*{message}") as raised:
        load_teacher(tmp_path)
    assert len(str(raised.value)) < 700


def test_a_head_of_its_own_beside_a_config_that_ties_it(tmp_path):
    checkpoint(tmp_path, tie_word_embeddings=True)
    with pytest.raises(LwaError, match="lm_head.weight.*tie_word_embeddings|tie_word_embeddings.*lm_head.weight"):
        load_teacher(tmp_path)


def test_a_shard_and_an_index_that_lack_something(tmp_path):
    lm = checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    lm.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert torch.equal(load_teacher(tmp_path).model.lm_head.weight, lm.model.lm_head.weight)
    index = tmp_path / "model.safetensors.index.json"
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    kept = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(LwaError, match=f"{re.escape(str(tmp_path))}.*{shards[1].name}"):
        load_teacher(tmp_path)
    shards[1].write_bytes(kept)
    text = index.read_text()
    index.write_text("{")
    with pytest.raises(LwaError, match=re.escape(str(tmp_path))):
        load_teacher(tmp_path)
    index.unlink()
    with pytest.raises(LwaError, match="model.safetensors.index.json|no file named model.safetensors"):
        load_teacher(tmp_path)
    index.write_text(text)
    load_teacher(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-400], lambda whole: whole[:5], lambda whole: b"", bytes.upper]
)
def test_a_file_that_is_cut_off_or_damaged(damage, tmp_path):
    checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(damage(whole))
    with pytest.raises(LwaError, match=f"{re.escape(str(tmp_path))}.*can load.*download or save it again"):
        load_teacher(tmp_path)


def test_experts_that_cannot_be_put_together(tmp_path):
    expert = "model.layers.0.block_sparse_moe.experts.2."
    config = MixtralConfig(**SIZES, **HEADS, num_local_experts=4)
    checkpoint(tmp_path, config=config, change=without(expert + "w1"))
    with pytest.raises(LwaError, match="do not fit: .*model.layers.0.mlp.experts.gate_up_proj"):
        load_teacher(tmp_path)
    checkpoint(tmp_path, config=config, change=without(expert))
    with pytest.raises(LwaError, match=r"experts.down_proj is \(3, 16, 24\) in the file and \(4, 16, 24\)"):
        load_teacher(tmp_path)


def test_masks_of_old_checkpoints_and_other_heads_do_no_harm(tmp_path):
    """Causal masks were once saved, and TRL saves a value head beside the model."""
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=313, n_positions=64)
    old = {f"transformer.h.0.attn.{name}": torch.ones(1) for name in ("bias", "masked_bias")}
    lm = checkpoint(tmp_path, config=config, change=lambda tensors: tensors | old)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(load_teacher(tmp_path).model(ids).logits, lm.model(ids).logits)
    checkpoint(tmp_path, config=config, change=also(v_head__summary__weight=torch.ones(1, 16)))
    with pytest.warns(UserWarning, match="left out: v_head.summary.weight"):
        load_teacher(tmp_path)


def test_weights_of_torch_say_how_to_convert_them(tmp_path):
    lm = checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(lm.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(LwaError, match=r"no .safetensors file: it holds pytorch_model.bin; convert.*save_pretrained\("):
        load_teacher(tmp_path)
    AutoModelForCausalLM.from_pretrained(str(tmp_path)).save_pretrained(str(tmp_path))  # as the message says
    assert torch.equal(load_teacher(tmp_path).model.lm_head.weight, lm.model.lm_head.weight)
