"""Final states read from a last layer that computes only where they are read, against those of the whole model."""

import pytest
import torch
from tiny_lm import SMALL, language_model
from transformers import (
    BertConfig,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3Config,
)

from lwa_helpers.models.layers import backbone, decoder_layers
from lwa_helpers.ranking.item_head import end_states, rank_catalogue
from lwa_helpers.ranking.last_layer import OWN, is_exact, last_layer_at
from lwa_helpers.ranking.model_checks import head_is_last

SIZES = SMALL | {"num_hidden_layers": 3, "pad_token_id": 0}
OWN_HEAD = SIZES | {"num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 0}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "one layer": LlamaConfig(**SIZES | {"num_hidden_layers": 1}),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3": Gemma3TextConfig(
        **SIZES, sliding_window=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "phi3, one matrix for queries, keys and values": Phi3Config(**SIZES),
    "gpt2": GPT2Config(vocab_size=340, n_embd=32, n_layer=3, n_head=4, eos_token_id=0, bos_token_id=0),
    "falcon, attention beside the MLP": FalconConfig(
        vocab_size=340, hidden_size=32, num_hidden_layers=3, num_attention_heads=4
    ),
    "bloom, whose MLP takes a residual": BloomConfig(vocab_size=340, hidden_size=32, n_layer=3, n_head=4),
    "gpt-oss, a mixture that says its choice": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}
ROWS, COLUMNS = torch.tensor([0, 1, 1, 2]), torch.tensor([8, 2, 5, 0])


def batch():
    """Rows of 9, 6 and 1 tokens, padded on the right."""
    mask = (torch.arange(9) < torch.tensor([[9], [6], [1]])).long()
    return {
        "input_ids": torch.randint(1, 300, (3, 9), generator=torch.Generator().manual_seed(1)) * mask,
        "attention_mask": mask,
    }


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_states_that_are_read_are_those_of_the_whole_model(family):
    model = language_model(config=FAMILIES[family]).model
    body, inputs = backbone(model), batch()
    whole = body(**inputs, use_cache=False).last_hidden_state
    with last_layer_at(model, ROWS, COLUMNS):
        read = body(**inputs, use_cache=False).last_hidden_state
    torch.testing.assert_close(read[ROWS, COLUMNS], whole[ROWS, COLUMNS], atol=1e-5, rtol=1e-5)
    assert torch.equal(body(**inputs, use_cache=False).last_hidden_state, whole), (
        "the model does not come back as it was"
    )


@torch.no_grad()
def test_the_last_layer_alone_reads_fewer_positions():
    model, rows = language_model(layers=3).model, {}
    for place, layer in enumerate(decoder_layers(model)):
        layer.mlp.gate_proj.register_forward_hook(
            lambda _, args, __, place=place: rows.update({place: args[0].shape[:2].numel()})
        )
    with last_layer_at(model, ROWS, COLUMNS):
        backbone(model)(**batch(), use_cache=False)
    assert rows == {0: 27, 1: 27, 2: 4}


def test_the_model_comes_back_after_an_error():
    model = language_model(layers=2).model
    with pytest.raises(RuntimeError, match="stopped"), last_layer_at(model, ROWS, COLUMNS):
        raise RuntimeError("stopped")
    parts = [module for name, module in decoder_layers(model)[-1].named_modules() if name in OWN]
    assert len(parts) == len(OWN) and not any("forward" in vars(module) for module in parts)


class Mixing(torch.nn.Module):
    """A projection that looks at the token before, as the convolutions behind Kimi Linear's queries do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, states):
        return self.inner(states + states.roll(1, 1))


def test_a_layer_whose_parts_mix_positions_is_computed_whole():
    model = language_model(layers=2).model
    assert is_exact(model)
    mixing = language_model(layers=2).model
    attention = decoder_layers(mixing)[-1].self_attn
    attention.q_proj = Mixing(attention.q_proj)
    ends, states = torch.tensor([8, 5, 0]), backbone(mixing)(**batch(), use_cache=False).last_hidden_state
    assert not is_exact(mixing)
    got = end_states(mixing, **batch())
    torch.testing.assert_close(got, states[torch.arange(3), ends], atol=1e-6, rtol=1e-6)


def test_finding_that_out_changes_nothing():
    """No random number is drawn, and a model with dropout comes back in training mode."""
    model = language_model(layers=2, attention_dropout=0.5).model.train()
    before = torch.random.get_rng_state()
    assert is_exact(model) and all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["bert", "cohere", "gemma2"])
def test_scores_are_logits_where_the_head_is_not_last(kind):
    """BERT's layers need more than token ids, Cohere scales what its head returns, Gemma 2 caps it."""
    config = {
        "bert": BertConfig(**OWN_HEAD, is_decoder=True),
        "cohere": CohereConfig(**OWN_HEAD, logit_scale=0.25),
        "gemma2": Gemma2Config(**OWN_HEAD, final_logit_softcapping=0.5),
    }[kind]
    model, prompts = language_model(config=config).model, [[3, 4, 7, 9], [5]]
    assert not head_is_last(model)
    want = [model(input_ids=torch.tensor([prompt])).logits[0, -1, 300:310] for prompt in prompts]
    got = rank_catalogue(model, prompts, slice(300, 310), 2, progress=False)
    torch.testing.assert_close(torch.as_tensor(got), torch.stack(want).detach(), atol=1e-5, rtol=1e-5)
