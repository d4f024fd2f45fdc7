"""A .gguf file that is no whole language model is refused, and a kept conversion is used only if it is whole."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from gguf_files import copy_gguf
from tiny_lm import language_model, tokenizer, write_gguf
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config

from lwa_helpers import load_teacher, paths
from lwa_helpers.errors import LwaError
from lwa_helpers.models import loading

SIZES = {
    "vocab_size": len(tokenizer()),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8),
}
ONES = np.ones(16, np.float32)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Good files by architecture."""
    folder = tmp_path_factory.mktemp("gguf")
    for name, config in CONFIGS.items():
        write_gguf(language_model(config=config), folder / f"{name}.gguf", name)
    return {name: folder / f"{name}.gguf" for name in CONFIGS}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "models"


def refused(path, message, cache):
    with pytest.raises(LwaError, match=message) as raised:
        load_teacher(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert not cache.exists() or not list(cache.iterdir())  # nothing of it is kept


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["output_norm"]}, "1 tensor is missing: model.norm.weight"),
        ({"drop": ["blk.0.ffn_up"]}, "1 tensor is missing: model.layers.0.mlp.up_proj.weight"),
        ({"drop": ["blk.1."]}, r"\d+ tensors are missing: model.layers.1"),
        ({"drop": ["token_embd"]}, "missing: (lm_head.weight, )?model.embed_tokens.weight"),
        ({"tensors": {"blk.2.attn_norm.weight": ONES}}, "leaves out: blk.2.attn_norm.weight; give the .safetensors"),
        ({"tensors": {"blk.0.ffn_up.bias": np.ones(24, np.float32)}}, "leaves out: blk.0.ffn_up.bias"),
        ({"tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, "leaves out: rope_freqs.weight"),
    ],
)
def test_tensors_that_are_missing_or_left_out(architecture, change, message, good, tmp_path, cache):
    refused(copy_gguf(good[architecture], tmp_path / "odd.gguf", **change), message, cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": {"llama.block_count": 3}}, "9 tensors are missing: model.layers.2"),
        ({"fields": {"llama.block_count": 1}}, "leaves out: blk.1.*, …; give"),
        ({"fields": {"llama.embedding_length": 32}}, r"lm_head.weight is \(313, 16\) in the file and \(313, 32\)"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, "leaves out: the scaling of positions .yarn."),
        ({"fields": {"tokenizer.ggml.padding_token_id": 2**32 - 1}}, "padding_token_id is 4294967295, of 313 tokens"),
        ({"fields": {"tokenizer.ggml.eos_token_id": 313}}, "gguf-set-metadata odd.gguf tokenizer.ggml.eos_token_id"),
        ({"fields": {"general.type": "adapter"}}, "no model but of type 'adapter'"),
        ({"fields": {"general.type": "mmproj"}}, "image part of a model"),
        ({"architecture": "clip"}, "image part of a model"),
        ({"architecture": "bert"}, "architecture bert is not supported"),
        ({"architecture": "t5"}, "T5Config"),
        ({"architecture": "tomorrow"}, "architecture tomorrow is not supported"),
        ({"fields": {"split.count": 3, "split.no": 1}}, "part 2 of 3: join"),
        ({"drop": ["tokenizer."]}, "has no tokenizer"),
        ({"drop": ["blk.", "token_embd", "output"]}, "holds no weights"),
    ],
)
def test_files_of_another_kind(change, message, good, tmp_path, cache):
    refused(copy_gguf(good["llama"], tmp_path / "odd.gguf", **change), message, cache)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: whole[: len(whole) // 2], "cut off.*: download it again"),
        (lambda whole: whole[:-64], "cut off"),
        (lambda whole: whole[:100], "cut off"),
        (lambda whole: whole[:30] + b"\xff" * 40 + whole[70:], "cut off"),
        (lambda _: b"", "not a GGUF file"),
        (lambda whole: b"\0" * len(whole), "not a GGUF file"),
        (lambda _: b"<!DOCTYPE html>", "not a GGUF file"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "Git LFS pointer"),
    ],
)
def test_files_that_are_cut_off_or_something_else(damage, message, good, tmp_path, cache):
    path = tmp_path / "odd.gguf"
    path.write_bytes(damage(good["llama"].read_bytes()))
    refused(path, message, cache)


def test_a_head_that_is_the_embedding_is_left_out_of_the_file(good, tmp_path):
    model = load_teacher(copy_gguf(good["llama"], tmp_path / "tied.gguf", drop=["output.weight"])).model
    assert torch.equal(model.lm_head.weight, load_teacher(good["llama"]).model.model.embed_tokens.weight)


def shorter(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()  # a loaded model still reads the file
    (folder / "model.safetensors").write_bytes(weights[:-8])


@pytest.mark.parametrize(
    "harm",
    [
        shorter,
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "conversion.json").unlink(),
        lambda folder: (folder / "conversion.json").write_text("[]"),
        lambda folder: (folder / "conversion.json").write_text("{}"),
        lambda folder: [path.unlink() for path in folder.iterdir()],
    ],
)
def test_a_conversion_that_is_not_whole_is_made_again(harm, good, cache):
    want = {name: value.clone() for name, value in load_teacher(good["llama"]).model.state_dict().items()}
    (folder,) = cache.iterdir()
    harm(folder)
    for _ in "ab":
        got = load_teacher(good["llama"]).model.state_dict()
        assert got.keys() == want.keys() and all(torch.equal(got[name], value) for name, value in want.items())
    assert json.loads((folder / "conversion.json").read_text())["model.safetensors"]


def test_a_conversion_is_made_once_and_an_interrupted_one_is_not_kept(good, cache, monkeypatch):
    load, files = loading._load, []

    def counted(*args, **where):
        files.append(where.get("gguf_file"))
        return load(*args, **where)

    monkeypatch.setattr(loading, "_load", counted)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "seal", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load_teacher(good["llama"])
    assert not list(cache.iterdir())
    assert files == ["llama.gguf"]
    assert load_teacher(good["llama"]).sha256 == load_teacher(good["llama"]).sha256 == next(cache.iterdir()).name
    assert files == ["llama.gguf", "llama.gguf", None, None]


def test_a_folder_may_have_the_name_of_a_file_and_neighbours_do_no_harm(good, tmp_path):
    language_model(2, 16).save(tmp_path / "dotted.gguf")
    assert load_teacher(tmp_path / "dotted.gguf").name == "dotted"
    shutil.copy(good["llama"], tmp_path / "model.gguf")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    with pytest.raises(LwaError, match=re.escape(f"{tmp_path / 'model.gguf'}") + ".*adapter_config.json"):
        load_teacher(tmp_path / "model.gguf")
