"""Write a model as a GGUF file with a Modelfile next to it, for llama.cpp and `ollama create`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from gguf import GGUFWriter, TokenType
from torch import Tensor

from lwa_helpers.errors import LwaError
from lwa_helpers.files import atomic_write
from lwa_helpers.models.language_model import LanguageModel

GGUF_FILE = "model.gguf"
# The template passes prompts on as they are.
MODELFILE = f'FROM ./{GGUF_FILE}\nTEMPLATE "{{{{ .Prompt }}}}"\nPARAMETER temperature 0\n'
FILE_TYPES = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}


def export_gguf(lm: LanguageModel, directory: str | Path, dtype: Literal["f32", "f16"] = "f16") -> Path:
    """Write model.gguf and Modelfile into a folder; the item head is not part of them.

    transformers' GGUF reader and llama.cpp reproduce the logits of the model (to the precision of the dtype) and its
    tokens.

    Args:
        lm: The model.
        directory: The folder.
        dtype: Type in which matrices are stored. Vectors are stored as f32.

    Returns:
        The path of model.gguf.

    Raises:
        LwaError: If the model is no Llama (SmolLM2 is one), scales its positions, or has another kind of tokenizer.
    """
    if dtype not in FILE_TYPES:
        raise LwaError(f"dtype {dtype!r}: choose one of {', '.join(FILE_TYPES)}")
    config = lm.model.config
    if config.model_type != "llama":
        raise LwaError(
            f"model {lm.name!r} is a {config.model_type}: GGUF export knows llama, the architecture of SmolLM2"
        )
    path = Path(directory) / GGUF_FILE
    with atomic_write(path) as temporary:
        writer = GGUFWriter(temporary, "llama")
        _add_config(writer, lm, dtype)
        _add_tokenizer(writer, lm)
        for name, tensor in _tensors(lm):
            stored = np.float16 if dtype == "f16" and tensor.ndim > 1 else np.float32
            writer.add_tensor(name, tensor.detach().cpu().float().numpy().astype(stored))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with atomic_write(path.with_name("Modelfile")) as temporary:
        temporary.write_text(MODELFILE, encoding="utf-8")
    return path


def _add_config(writer: GGUFWriter, lm: LanguageModel, dtype: str) -> None:
    """Write the model's shape under llama.cpp's names."""
    config = lm.model.config
    rope = config.rope_parameters
    if config.attention_bias or config.mlp_bias:
        raise LwaError(f"model {lm.name!r} is a llama with biases, which GGUF readers leave out")
    if rope["rope_type"] != "default":
        raise LwaError(
            f"model {lm.name!r} scales its positions ({rope['rope_type']}): GGUF export knows plain rotary ones"
        )
    head = config.head_dim or config.hidden_size // config.num_attention_heads
    writer.add_name(lm.name)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: GGUFWriter, lm: LanguageModel) -> None:
    """Write vocabulary, merges and special tokens.

    Rows of the embedding without a token are marked as unused. Tokens without a row of the embedding are left out.
    """
    spec, size = json.loads(lm.tokenizer.backend_tokenizer.to_str()), lm.model.config.vocab_size
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for token, index in spec["model"]["vocab"].items():
        tokens[index], types[index] = token, TokenType.NORMAL
    for token in (token for token in spec["added_tokens"] if token["id"] < size):
        tokens[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(lm.name, spec))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]])
    for kind in ("bos", "eos", "unk", "pad"):
        if (index := getattr(lm.tokenizer, f"{kind}_token_id")) is not None and index < size:
            getattr(writer, f"add_{kind}_token_id")(index)
    writer.add_add_bos_token(lm.tokenizer("")["input_ids"] == [lm.tokenizer.bos_token_id])
    if lm.tokenizer.chat_template:
        writer.add_chat_template(lm.tokenizer.chat_template)


def _pre_tokenizer(name: str, spec: dict) -> str:
    """Return llama.cpp's name for the rule that cuts a text into words.

    "gpt-2" is a ByteLevel pre-tokenizer with its default settings.

    Raises:
        LwaError: If the tokenizer cuts words in another way.
    """
    pre = spec["pre_tokenizer"] or {}
    plain = pre.get("type") == "ByteLevel" and pre["use_regex"] and not pre["add_prefix_space"]
    if spec["model"]["type"] != "BPE" or spec["normalizer"] or not plain:
        raise LwaError(f"model {name!r}: GGUF export needs a byte-level BPE tokenizer that cuts words as GPT-2 does")
    return "gpt-2"


def _tensors(lm: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the file, tensor) of every parameter; a tied head is left out, so that the reader ties it."""
    config = lm.model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in lm.model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        if ".q_proj." in name:
            tensor = _interleaved(tensor, config.num_attention_heads)
        if ".k_proj." in name:
            tensor = _interleaved(tensor, config.num_key_value_heads)
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None  # llama.cpp has a name for every parameter of a Llama without biases
        yield stored, tensor


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows (heads * d, …) from halves to pairs, because llama.cpp rotates pairs of neighbours."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
