"""Models of text and images: the language model inside is saved, cut and given items; its text settings are written."""

import pytest
import torch
from tiny_lm import TITLES, tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3nTextConfig,
    Gemma4Config,
    Llama4Config,
    LlavaConfig,
    MllamaConfig,
)

from lwa_helpers import load_teacher
from lwa_helpers.errors import LwaError
from lwa_helpers.models.gguf_export import export_gguf
from lwa_helpers.models.item_tokens import title_rows, with_item_tokens
from lwa_helpers.models.language_model import ItemTokens, LanguageModel
from lwa_helpers.models.layers import text_config
from lwa_helpers.models.low_rank import low_rank
from lwa_helpers.models.vocabulary import trim_vocabulary

WORDS = len(tokenizer())
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
EYE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
EYE |= {"image_size": 28}
BY_LAYER = {"sliding_window": 8, "hidden_size_per_layer_input": 4, "num_kv_shared_layers": 0}
CONFIGS = {
    "gemma3": Gemma3Config(
        text_config=TEXT | {"sliding_window": 8, "vocab_size": WORDS + 3},
        vision_config=EYE,
        mm_tokens_per_image=4,
        boi_token_index=WORDS,
        image_token_index=WORDS + 1,
        eoi_token_index=WORDS + 2,
    ),
    "gemma4, with a table of tokens for the layers": Gemma4Config(
        text_config=TEXT
        | BY_LAYER
        | {"global_head_dim": 8, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": WORDS},
        vision_config=EYE | {"head_dim": 8, "num_key_value_heads": 2},
        audio_config=None,
    ),
    "gemma3n, whose table of tokens for the layers is the shorter one": Gemma3nTextConfig(
        **TEXT | BY_LAYER,
        vocab_size_per_layer_input=WORDS - 5,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0, 0.0],
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mllama, whose embedding has rows for images": MllamaConfig(
        text_config={key: value for key, value in TEXT.items() if key != "head_dim"} | {"cross_attention_layers": []},
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2},
        image_token_index=WORDS,
    ),
    "llama4": Llama4Config(
        text_config=TEXT | {"intermediate_size_mlp": 32, "num_local_experts": 2},
        vision_config=EYE | {"intermediate_size": 64, "vision_output_dim": 16, "projector_output_dim": 16},
    ),
}


def model_of(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return LanguageModel("tiny", model, tokenizer(), "0" * 64)


def logits(lm, ids):
    with torch.no_grad():
        return lm.model(torch.tensor([ids]), use_cache=False).logits[0]


def same_after_loading(lm, ids, folder):
    lm.save(folder)
    again = load_teacher(folder)
    assert type(again.model) is type(lm.model) and again.items == lm.items
    assert torch.equal(logits(again, ids), logits(lm, ids))


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_language_model_is_saved_cut_and_given_items(kind, tmp_path):
    lm = model_of(kind)
    ids, text = lm.tokenizer("Toy Story\nHeat\n")["input_ids"], [f"{title}\n" for title in TITLES[:6]]
    same_after_loading(lm, ids, tmp_path / "whole")

    cut = trim_vocabulary(lm, text)
    names = cut.tokenizer.convert_ids_to_tokens(range(len(cut.tokenizer)))
    old, new = lm.tokenizer.convert_tokens_to_ids(names), cut.tokenizer("Toy Story\nHeat\n")["input_ids"]
    assert len(names) < WORDS and [old[i] for i in new] == ids
    assert text_config(cut.model).vocab_size == logits(cut, new).shape[-1]
    torch.testing.assert_close(logits(cut, new)[:, : len(old)], logits(lm, ids)[:, old])
    same_after_loading(cut, new, tmp_path / "cut")

    inputs, outputs = 0.1 * torch.randn(len(TITLES), 16), torch.randn(len(TITLES), 16)
    grown = with_item_tokens(lm, TITLES, inputs, outputs, ItemTokens(TITLES), text)
    ends = grown.model.get_input_embeddings().weight, grown.model.get_output_embeddings().weight
    assert all(torch.equal(end[grown.items.tokens], rows) for end, rows in zip(ends, (inputs, outputs)))
    assert text_config(grown.model).vocab_size == grown.items.tokens.stop == len(grown.tokenizer)
    assert not text_config(grown.model).tie_word_embeddings and not grown.model.config.tie_word_embeddings
    history = [grown.items.first + item for item in (5, 0, 3)]
    assert grown.tokenizer("Heat\nToy Story\nÉté à Paris\n")["input_ids"] == history
    same_after_loading(grown, history, tmp_path / "items")
    bare = trim_vocabulary(grown, [])
    moved = [index - grown.items.first + bare.items.first for index in history]
    torch.testing.assert_close(logits(bare, moved)[:, bare.items.tokens], logits(grown, history)[:, grown.items.tokens])


def test_the_tokens_of_images_are_renumbered():
    cut = trim_vocabulary(model_of("gemma3"), ["Toy\n"])
    config, rows = cut.model.config, text_config(cut.model).vocab_size
    assert (config.boi_token_index, config.image_token_id, config.eoi_token_index) == (rows - 3, rows - 2, rows - 1)
    whole = model_of("mllama, whose embedding has rows for images")
    assert len(whole.model.get_input_embeddings().weight) == WORDS + 8
    rows = trim_vocabulary(whole, ["Toy\n"]).model.get_input_embeddings().weight
    assert torch.equal(rows[-8:], whole.model.get_input_embeddings().weight[-8:])


def test_rows_of_titles_and_low_rank_updates_are_those_of_the_language_model():
    lm = model_of("gemma3")
    table = lm.model.get_input_embeddings().weight.detach().clone()
    ids = lm.tokenizer("Heat", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(title_rows(lm, ["Heat"])[0], table[ids].mean(0))
    with low_rank([lm.model.get_input_embeddings()], 2):
        assert torch.equal(lm.model.get_input_embeddings().weight, table)
    assert torch.equal(lm.model.get_input_embeddings().weight, table)


def test_what_is_no_language_model_of_transformers_is_refused(tmp_path):
    with pytest.raises(LwaError, match="is a gemma3: GGUF export knows llama"):
        export_gguf(model_of("gemma3"), tmp_path)
    lm = model_of("gemma3")
    lm.save(tmp_path)
    LlavaConfig().save_pretrained(tmp_path)
    with pytest.raises(LwaError, match="LlavaConfig"):
        load_teacher(tmp_path)
