"""Whether a model reads trees right: over architectures, it is exact to a pass per title, or the model is refused."""

import pytest
import torch
from architectures import tiny_model
from tiny_lm import TITLES, language_model
from transformers import FalconConfig, GPTNeoConfig, Llama4TextConfig, MixtralConfig, OpenAIGPTConfig

from lwa_helpers.errors import LwaError
from lwa_helpers.models.layers import backbone, decoder_layers
from lwa_helpers.ranking import tree_reader
from lwa_helpers.ranking.title_head import TitleRanker

TOKENS = {"vocab_size": 340, "bos_token_id": 0, "eos_token_id": 0}
SIZES = TOKENS | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
NEO = TOKENS | {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "window_size": 12, "max_position_embeddings": 256}
LONG = [place % 8 for place in range(14)]  # some 55 tokens


def exact(ranker, histories):
    """The largest error of a log-probability, against one pass over header, history and title for each title."""
    worst, got = 0.0, ranker.scores(histories)
    for history, row in zip(histories, got):
        prompt = ranker.prompt(history)
        for tokens, score in zip(ranker.tokens, row):
            with torch.no_grad():
                log_p = ranker.model(torch.tensor([prompt + tokens]), use_cache=False).logits[0].log_softmax(-1)
            want = sum(log_p[len(prompt) - 1 + k, token].item() for k, token in enumerate(tokens))
            worst = max(worst, abs(score - want))
    return worst


def ranker_of(config=None, lm=None, titles=TITLES):
    lm = lm or language_model(config=config)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)  # far from uniform, so that a wrong mask shows
    return TitleRanker(lm.model, lm.tokenizer, "Seen:\n", titles, batch_size=2, tokens_per_batch=64)


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoConfig(**NEO, attention_types=[[["global"], 4]]),
        Llama4TextConfig(
            **SIZES, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=16, no_rope_layers=[1, 0]
        ),
        MixtralConfig(**SIZES, num_local_experts=4, sliding_window=9),
    ],
    ids=["gpt-neo, global", "llama4, chunks of 16", "mixtral, window 9"],
)
def test_titles_after_prompts_beyond_every_window_are_exact(config):
    assert exact(ranker_of(config), [LONG, [5], [], [1, 2, 3, 4, 5]]) < 1e-4


@pytest.mark.parametrize("kind", ["gpt_oss", "opt", "gemma3", "starcoder2", "cohere2", "deepseek_v3", "exaone4"])
def test_every_architecture_with_windows_sinks_tables_or_towers_is_exact(kind):
    """Windows are 8 tokens; Gemma 3 is the multimodal one."""
    assert exact(ranker_of(lm=tiny_model(kind), titles=TITLES[:3]), [[0, 1, 2, 1, 0], [2]]) < 1e-4


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPTNeoConfig(**NEO, attention_types=[[["global", "local"], 2]]), "local attention goes by a token's place"),
        (FalconConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True), "ALiBi"),
        (OpenAIGPTConfig(**TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=256), "fails on a tree's attention"),
    ],
    ids=["gpt-neo", "falcon with alibi", "openai-gpt"],
)  # fmt: skip
def test_models_whose_attention_follows_no_mask_are_refused(config, reason):
    with pytest.raises(LwaError, match=f"cannot rank by title: .*{reason}.*use the item head"):
        ranker_of(config).scores([[1, 2]])


@pytest.mark.parametrize("kind", ["mamba", "jamba", "recurrent_gemma", "qwen3_next", "mpt", "bloom", "xlnet"])
def test_state_space_layers_and_biases_by_distance_are_refused(kind):
    lm = tiny_model(kind)
    with pytest.raises(LwaError, match="cannot rank by title"):
        TitleRanker(lm.model, lm.tokenizer, "Seen:\n", TITLES[:3], tokens_per_batch=64).scores([[0, 1, 2]])


# What no setting shows


def hidden_window():
    """A GPT-Neo whose config says that all its layers are global; they look back 12 tokens."""
    lm = language_model(config=GPTNeoConfig(**NEO, attention_types=[[["global", "local"], 2]]))
    lm.model.config.attention_layers = ["global"] * 4
    return ranker_of(lm=lm)


def test_a_window_that_no_setting_names_is_found_at_the_first_prompt_beyond_it():
    with pytest.raises(LwaError, match="tokens its logits for titles in a tree are .* off those for one title"):
        hidden_window().scores([LONG])


def test_a_model_that_ignores_the_mask_it_is_given_is_found():
    ranker = ranker_of()
    own = backbone(ranker.model).forward
    backbone(ranker.model).forward = lambda attention_mask=None, position_ids=None, **rest: own(
        position_ids=position_ids, **rest
    )
    with pytest.raises(LwaError, match="does not follow the mask|take no position_ids"):
        ranker.scores([[1, 2]])


def test_a_bias_by_place_is_found():
    """As T5's: the attention's output depends on a token's place in the row."""

    def biased(_module, _args, out):
        place = torch.arange(out[0].shape[1], dtype=out[0].dtype)[None, :, None]
        return (out[0] + 0.05 * place, *out[1:])

    ranker = ranker_of()
    decoder_layers(ranker.model)[0].self_attn.register_forward_hook(biased)
    with pytest.raises(LwaError, match="does not follow the mask"):
        ranker.search([[1, 2]], 2)


# The cost


def test_a_model_is_measured_once_and_again_only_after_a_longer_prompt(monkeypatch):
    measured, plain = [], tree_reader._plain
    monkeypatch.setattr(tree_reader, "_plain", lambda *args: measured.append(len(args[1])) or plain(*args))
    ranker = ranker_of()
    ranker.scores([[1], [1, 2, 3], [1, 2]])
    TitleRanker(ranker.model, ranker.tokenizer, "Seen:\n", TITLES).search([[3, 2], [1, 2, 3]], 2)
    longest = len(ranker.prompt([1, 2, 3]))
    assert measured == [longest, 8, 3]
    ranker.scores([LONG])
    assert measured[3:] == [len(ranker.prompt(LONG)), 8, 3]


def test_measuring_draws_no_random_number():
    ranker, before = ranker_of(), torch.random.get_rng_state()
    ranker.scores([LONG])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_memory_that_runs_out_is_no_fault_of_the_mask(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tree_reader, "_plain", full)
    with pytest.raises(torch.OutOfMemoryError):
        ranker_of().scores([[1]])
