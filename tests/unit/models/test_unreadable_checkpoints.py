"""Whatever keeps a folder or file from being a model ends in one LwaError that names it, the cause and the fix."""

import json
import re

import pytest
from tiny_lm import language_model
from transformers import AutoConfig, AutoModelForCausalLM

from lwa_helpers import load_teacher
from lwa_helpers.errors import LwaError
from lwa_helpers.models import loading
from lwa_helpers.models.checkpoint_errors import LONGEST, cause


@pytest.fixture
def folder(tmp_path):
    """The folder of a good checkpoint."""
    language_model(2, 16).save(tmp_path / "good")
    return tmp_path / "good"


def change(folder, **settings):
    """Write these settings into the folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refused(folder, message):
    """Check that the folder is refused with this message, in one piece that begins with the cause."""
    with pytest.raises(LwaError, match=message) as raised:
        load_teacher(folder)
    text = str(raised.value)
    assert str(folder) in text and "\n" not in text and len(text) < 800 and not re.search(r":\s*(;|$)", text)


QUANTISED = [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
    ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes"),
    ({"quantization_config": {"quant_method": "hqq", "quant_config": {}}}, "hqq"),
    ({"quantization_config": {"quant_method": "torchao", "quant_type": {}}}, "torchao"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "fbgemm_fp8"),
    ({"quantization_config": {"quant_method": "a method of tomorrow"}}, "a method of tomorrow"),
    ({"quantization_config": {}}, "an unnamed method"),
    ({"compression_config": {"quant_method": "sparseml"}}, "sparseml"),
    ({"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}}, "affine"),
    ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
]


@pytest.mark.parametrize(("settings", "method"), QUANTISED)
def test_a_quantised_checkpoint_is_refused_before_it_is_loaded(settings, method, folder, monkeypatch):
    monkeypatch.setattr(loading, "_load", lambda *_, **__: pytest.fail("it was loaded"))
    change(folder, **settings)
    refused(folder, rf"is quantised \({method}\): give an unquantised checkpoint or a GGUF")


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_quantisation_that_stands_in_a_file_of_its_own(file, folder):
    (folder / file).write_text("{}")
    refused(folder, r"is quantised \(\w+\)")


def test_no_quantisation_is_no_quantisation(folder):
    change(folder, quantization_config=None)
    load_teacher(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": "wide"}, "Validation error for field 'hidden_size': TypeError.*expected int, got str"),
        ({"hidden_size": 17}, "hidden size .17. is not a multiple of the number of attention heads"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "KeyError: 'spiral'"),
        ({"hidden_act": "wobble"}, "wobble"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"model_type": "t5"}, "T5Config"),
        ({"model_type": "llava"}, "LlavaConfig"),
        ({"model_type": "tomorrow"}, "model type `tomorrow`"),
        (
            {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Model"}},
            "'mine' needs code that comes with it",
        ),
    ],
)
def test_settings_that_no_model_can_be_made_of(settings, message, folder):
    change(folder, **settings)
    refused(folder, f"can load.*{message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json is not a JSON file .*line 1 column 2"),
        (b'{"model_type": "llama",}', "config.json is not a JSON file"),
        (b"\xff\xfe{", "config.json is not a JSON file .*utf-8"),
        (b"[1]", "config.json holds a list"),
        (b"", "config.json is not a JSON file"),
        (b"<html>", "config.json is not a JSON file"),
        (b"{}", "model_type"),
        (None, "no config.json"),
    ],
)
def test_a_config_file_that_is_none(content, message, folder):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    refused(folder, message)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma3_text"])
def test_a_checkpoint_without_a_tokenizer_is_said_to_have_none(kind, folder):
    """For some types transformers makes up a tokenizer of a few special tokens."""
    for path in folder.glob("token*"):
        path.unlink()
    config = language_model(2, 16).model.config
    if kind != "llama":
        change(folder, model_type=kind, architectures=None, n_embd=16, n_layer=2, n_head=2, head_dim=4)
        config = AutoConfig.from_pretrained(str(folder))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    refused(folder, "has no tokenizer: copy tokenizer.json")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", "{", "line 1 column"),
        ("tokenizer.json", "[]", "."),
        ("tokenizer.json", "", "."),
        ("tokenizer_config.json", "{", "line 1 column"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.T", null]}}',
            "code",
        ),
        ("generation_config.json", "[", "."),
    ],
)
def test_other_files_that_are_broken(file, text, message, folder):
    (folder / file).write_text(text)
    if file == "generation_config.json":  # transformers does without it
        load_teacher(folder)
    else:
        refused(folder, f"can load: .*{message}")


def test_code_is_never_advised(folder):
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["mine.T", null]}}')
    with pytest.raises(LwaError) as raised:
        load_teacher(folder)
    assert "trust_remote_code" not in str(raised.value) and "never runs" in str(raised.value)


def test_paths_that_miss_the_folder_say_which_to_give(folder, monkeypatch):
    with pytest.raises(LwaError, match=f"is a file.*give its directory {re.escape(str(folder))}$"):
        load_teacher(folder / "model.safetensors")
    with pytest.raises(LwaError, match="no .safetensors file: there is a model in a folder of it, so give .*good$"):
        load_teacher(folder.parent)
    with pytest.raises(LwaError, match="unknown model"):
        load_teacher(folder / "missing")
    with pytest.raises(LwaError, match="can load|unknown model"):
        load_teacher("x" * 5000)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_teacher("~/good").name == "good"
    (folder / "model.safetensors").rename(folder / "weights.gguf")
    with pytest.raises(LwaError, match=r"holds weights.gguf, so give .*weights.gguf"):
        load_teacher(folder)


def test_a_pointer_of_git_lfs_is_no_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(LwaError, match="model.safetensors is a Git LFS pointer.*git lfs pull"):
        load_teacher(folder)


@pytest.mark.parametrize("error", [RuntimeError, ImportError, TypeError, AttributeError, MemoryError, RecursionError])
def test_any_exception_of_the_libraries_becomes_one_error(error, folder, monkeypatch):
    def fail(*_, **__):
        raise error("Error(s) in loading:\n\n\tthe weight is odd.\nmore")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(LwaError, match=r"can load: .*Error\(s\) in loading: the weight is odd; ") as raised:
        load_teacher(folder)
    assert isinstance(raised.value.__cause__, error)


def test_an_interruption_is_none_of_them(folder, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        load_teacher(folder)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("plain"), "plain"),
        (ValueError(""), "ValueError"),
        (KeyError("layers"), "KeyError: 'layers'"),
        (ValueError("one of: \n(1) a file, \n(2) a class"), "one of: (1) a file,"),
        (ValueError("a:\nb:\n\nc.\nd"), "a: b: c"),
        (ValueError("all of it:"), "all of it"),
        (ValueError("pass `trust_remote_code=True`"), "it needs code that comes with it, which lwa never runs"),
        (ValueError("x" * 2000), "x" * LONGEST + "…"),
    ],
)
def test_the_line_that_says_what_is_wrong(error, text):
    assert cause(error) == text
