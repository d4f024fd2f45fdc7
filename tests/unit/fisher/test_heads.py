"""Attention heads of many architectures, against slices of autograd's gradients by each architecture's own layout."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
import transformers
from fisher_models import batch, row_gradients, row_traces, tiny
from torch import nn

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.calculator import FisherInformationCalculator

HEADS, SIZE, WIDTH = 4, 8, 32  # of the queries; the width of the hidden states
NAMED = {"vocab_size": 50, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
SHORT = {"vocab_size": 50, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": 32}
LLAMA = NAMED | {"intermediate_size": 24, "num_key_value_heads": 2}


def one_after_the_other(weight):
    """Query heads, key heads, value heads; or heads of one kind."""
    return weight.unflatten(0, (-1, SIZE))


def by_head(weight):
    """The query, key and value of each head lie together."""
    return weight.unflatten(0, (HEADS, 3, SIZE)).transpose(0, 1).flatten(0, 1)


def by_group(weight):
    """Two queries, their key and their value lie together (Falcon 40B)."""
    groups = weight.unflatten(0, (2, HEADS // 2 + 2, SIZE))
    return torch.cat([groups[:, :-2].flatten(0, 1), groups[:, -2], groups[:, -1]])


def by_device(weight):
    """Four parts of query, value, key, as CodeGen was trained on four devices."""
    parts = weight.unflatten(0, (4, 3, HEADS // 4, SIZE))
    return torch.cat([parts[:, place].flatten(0, 1) for place in (0, 2, 1)])


def named(*leaves):
    return {leaf: (one_after_the_other, heads) for leaf, heads in zip(leaves, (HEADS, HEADS, HEADS))}


GROUPED = {"q_proj": (one_after_the_other, 4), "k_proj": (one_after_the_other, 2), "v_proj": (one_after_the_other, 2)}
SEPARATE = named("q_proj", "k_proj", "v_proj")
# config class, settings, {projection: (its layout, its number of heads)}, the projection that joins the heads
ARCHITECTURES = {
    "gpt2": ("GPT2Config", SHORT, {"c_attn": (one_after_the_other, 12)}, "c_proj"),
    "gpt_neox": ("GPTNeoXConfig", NAMED | {"intermediate_size": 24}, {"query_key_value": (by_head, 12)}, "dense"),
    "bloom": (
        "BloomConfig",
        {"vocab_size": 50, "hidden_size": WIDTH, "n_layer": 2, "n_head": HEADS},
        {"query_key_value": (by_head, 12)},
        "dense",
    ),
    "gptj": ("GPTJConfig", SHORT | {"rotary_dim": 4}, SEPARATE, "out_proj"),
    "gpt_neo": (
        "GPTNeoConfig",
        {"vocab_size": 50, "hidden_size": WIDTH, "num_layers": 2, "num_heads": HEADS, "intermediate_size": 24}
        | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 32},
        SEPARATE,
        "out_proj",
    ),
    "falcon 7B": (
        "FalconConfig",
        NAMED | {"multi_query": True},
        {"query_key_value": (one_after_the_other, 6)},
        "dense",
    ),
    "falcon 40B": (
        "FalconConfig",
        NAMED | {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"query_key_value": (by_group, 8)},
        "dense",
    ),
    "falcon, no sharing": ("FalconConfig", NAMED | {"multi_query": False}, {"query_key_value": (by_head, 12)}, "dense"),
    "mpt": (
        "MptConfig",
        {"vocab_size": 50, "d_model": WIDTH, "n_layers": 2, "n_heads": HEADS, "max_seq_len": 32},
        {"Wqkv": (one_after_the_other, 12)},
        "out_proj",
    ),
    "phi": ("PhiConfig", NAMED | {"intermediate_size": 24}, SEPARATE, "dense"),
    "phi3": ("Phi3Config", LLAMA | {"pad_token_id": 0}, {"qkv_proj": (one_after_the_other, 8)}, "o_proj"),
    "starcoder2": ("Starcoder2Config", LLAMA, GROUPED, "o_proj"),
    "qwen3": ("Qwen3Config", LLAMA | {"head_dim": SIZE}, GROUPED, "o_proj"),
    "olmo2, norms over all heads": ("Olmo2Config", LLAMA, GROUPED, "o_proj"),
    "opt": (
        "OPTConfig",
        NAMED | {"ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": WIDTH},
        SEPARATE,
        "out_proj",
    ),
    "codegen": ("CodeGenConfig", SHORT | {"rotary_dim": 4}, {"qkv_proj": (by_device, 12)}, "out_proj"),
    "gpt_bigcode": ("GPTBigCodeConfig", SHORT, {"c_attn": (one_after_the_other, 6)}, "c_proj"),
    "gpt_bigcode, no sharing": (
        "GPTBigCodeConfig",
        SHORT | {"multi_query": False},
        {"c_attn": (by_head, 12)},
        "c_proj",
    ),
    "ctrl": (
        "CTRLConfig",
        {"vocab_size": 50, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": 32, "dff": 24},
        named("Wq", "Wk", "Wv"),
        "dense",
    ),
    "bert": (
        "BertConfig",
        NAMED | {"intermediate_size": 24, "is_decoder": True, "max_position_embeddings": 32},
        named("query", "key", "value"),
        "output.dense",
    ),
    "persimmon": ("PersimmonConfig", NAMED | {"intermediate_size": 24}, {"query_key_value": (by_head, 12)}, "dense"),
}


def squares(parts):
    return parts.square().flatten(1).sum(1) if parts.ndim > 1 else parts.square()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_are_the_slices_of_the_architectures_own_layout(name):
    config, settings, projections, joint = ARCHITECTURES[name]
    model = tiny(getattr(transformers, config)(**settings))
    rows = batch(lengths=(6, 4))
    found = row_gradients(model, rows)
    result = FisherInformationCalculator(granularity="head").calculate(model, [rows])
    np.testing.assert_allclose(result.per_example, row_traces(model, rows), rtol=1e-6)
    split = result.to_frame().dropna(subset="head")
    attention = split["module"].str.contains("att")
    assert attention.all() and set(split["layer"]) == {0, 1}
    for (layer, module), group in split.groupby(["layer", "module"]):
        leaf = module.rpartition(".")[2]
        transposed = (lambda weight: weight.T) if config in ("GPT2Config",) else (lambda weight: weight)
        expected = 0.0
        for row in found:
            weight = transposed(row[layer][f"{module}.weight"])
            bias = row[layer].get(f"{module}.bias")
            if module.endswith(joint) and leaf not in projections:
                expected = expected + squares(weight.T.unflatten(0, (HEADS, -1)))
                continue
            layout, n_heads = projections[leaf]
            expected = expected + squares(layout(weight))
            expected = expected + (0.0 if bias is None else squares(layout(bias)))
            assert len(group) == n_heads
        assert group["head"].tolist() == list(range(len(group)))
        np.testing.assert_allclose(group["trace"], expected / len(found), rtol=1e-6)
    leaves = {module.rpartition(".")[2] for module in split["module"]}
    assert leaves == set(projections) | {joint.rpartition(".")[2]}


def test_low_rank_projections_split_where_single_heads_own_their_parts():
    settings = LLAMA | {"num_key_value_heads": HEADS, "q_lora_rank": 12, "kv_lora_rank": 8}
    sizes = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 16}
    model = tiny(transformers.DeepseekV3Config(**settings, **sizes, first_k_dense_replace=2))
    rows = batch(lengths=(6, 4))
    result = FisherInformationCalculator(granularity="head").calculate(model, [rows])
    np.testing.assert_allclose(result.per_example, row_traces(model, rows), rtol=1e-6)
    heads = result.to_frame().dropna(subset="head").groupby("module").size()
    assert heads.to_dict() == {f"self_attn.{leaf}": 2 * HEADS for leaf in ("q_b_proj", "kv_b_proj", "o_proj")}
    gradient = [
        row[0]["self_attn.kv_b_proj.weight"].unflatten(0, (HEADS, 8 + 16)) for row in row_gradients(model, rows)
    ]
    frame = result.to_frame().query("layer == 0 and module == 'self_attn.kv_b_proj'")
    np.testing.assert_allclose(frame["trace"], sum(squares(g) for g in gradient) / 2, rtol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_heads_of_adapters():
    every = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = peft.get_peft_model(
        tiny(transformers.LlamaConfig(**LLAMA)), peft.LoraConfig(r=3, target_modules=every, task_type="CAUSAL_LM")
    )
    rows = batch(lengths=(6, 4))
    result = FisherInformationCalculator(granularity="head").calculate(model, [rows])
    np.testing.assert_allclose(result.per_example, row_traces(model, rows), rtol=1e-6)
    heads = result.to_frame().dropna(subset="head").groupby("module").size() // 2
    both = {
        f"self_attn.{leaf}.{part}": n
        for leaf, n in zip(every, (4, 2, 2, 4))
        for part in ("base_layer", "lora_B.default")
    }
    both["self_attn.o_proj.lora_A.default"] = both.pop(
        "self_attn.o_proj.lora_B.default"
    )  # there the input is the heads
    assert heads.to_dict() == both


def test_a_model_without_heads_is_an_error_that_names_it():
    class Mixer(nn.Module):
        """Mixes tokens by a running mean; it has no head."""

        def __init__(self):
            super().__init__()
            self.inside, self.outside = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, hidden_states, **_):
            steps = torch.arange(1, hidden_states.shape[1] + 1)[:, None]
            return self.outside(self.inside(hidden_states).cumsum(1) / steps), None

    model = tiny(transformers.LlamaConfig(**LLAMA))
    for layer in model.model.layers:
        layer.self_attn = Mixer().double()
    rows = batch(lengths=(6, 4))
    with pytest.raises(LwaError, match='no attention heads .* LlamaForCausalLM.*granularity="module"'):
        FisherInformationCalculator(granularity="head").calculate(model, [rows])
    model.model.layers[0].self_attn = tiny(transformers.LlamaConfig(**LLAMA)).model.layers[0].self_attn
    split = FisherInformationCalculator(granularity="head").calculate(model, [rows]).to_frame().dropna(subset="head")
    assert set(split["layer"]) == {0} and len(split) == 4 + 2 + 2 + 4  # a hybrid stack: the layers that have heads


def test_a_linear_map_of_a_class_of_its_own_is_told_by_what_it_computes():
    class Tripled(nn.Linear):
        def forward(self, x):
            return 3 * (x @ self.weight.T)

    model = tiny(transformers.FalconConfig(**NAMED))
    rows = batch(lengths=(6, 4), side="left")
    np.testing.assert_allclose(
        FisherInformationCalculator().calculate(model, [rows]).per_example, row_traces(model, rows), rtol=1e-9
    )
    model.transformer.h[1].mlp.dense_h_to_4h = Tripled(WIDTH, 4 * WIDTH, bias=False).double()
    with pytest.raises(LwaError, match=r"layer 1: mlp.dense_h_to_4h \(Tripled\)"):
        FisherInformationCalculator().calculate(model, [rows])
