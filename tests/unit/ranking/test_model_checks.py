"""Models in wrappers, and rows longer than a model has positions for."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny_lm import item_lm, language_model
from torch import nn
from transformers import GPT2Config, OPTConfig

from lwa_helpers.errors import LwaError
from lwa_helpers.ranking.item_head import rank_catalogue
from lwa_helpers.ranking.model_checks import check_positions, plain_model
from lwa_helpers.ranking.outputs import label_outputs

LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.5, init_lora_weights="gaussian")
WRAPPERS = {
    "data parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "lora": lambda model: get_peft_model(model, LORA),
    "lora in data parallel": lambda model: nn.DataParallel(get_peft_model(model, LORA)),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_that_adds_nothing_is_taken_off(kind):
    model = language_model(layers=2).model
    wrapped = WRAPPERS[kind](model).train()
    before = torch.random.get_rng_state()
    assert plain_model(wrapped) is model
    assert torch.equal(torch.random.get_rng_state(), before) and all(m.training for m in wrapped.modules())


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_a_wrapper_that_adds_tokens_is_named(kind):
    wrapped = get_peft_model(language_model(layers=2).model, kind(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(LwaError, match=r"LlamaForCausalLM is wrapped by PEFT \((PROMPT|PREFIX)_TUNING\)"):
        plain_model(nn.DataParallel(wrapped))


def test_the_catalogue_is_ranked_by_the_model_inside():
    lm, prompts = item_lm(), [[3, 4, 5], [4]]
    want = rank_catalogue(lm.model, prompts, lm.items.tokens, 2, progress=False)
    got = rank_catalogue(nn.DataParallel(lm.model), prompts, lm.items.tokens, 2, progress=False)
    np.testing.assert_array_equal(got, want)


TABLES = {
    "gpt2": GPT2Config(vocab_size=340, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0),
    "opt": OPTConfig(
        vocab_size=340, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_a_row_that_is_longer_than_the_table_of_positions_is_named(kind):
    lm = language_model(config=TABLES[kind])
    check_positions(lm.model, 16)
    ids = torch.ones(1, 17, dtype=torch.long)
    for call in (
        lambda: rank_catalogue(lm.model, [[1] * 17], slice(300, 310), 2, progress=False),
        lambda: label_outputs(lm.model, {"input_ids": ids, "labels": ids}),
    ):
        with pytest.raises(LwaError, match="has positions for 16 tokens and is to read 17"):
            call()


def test_rotary_positions_have_no_end():
    check_positions(language_model(layers=1).model, 10**6)
