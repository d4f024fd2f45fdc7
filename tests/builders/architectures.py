"""A tiny random causal LM of every architecture of the installed transformers that can be made that small."""

from functools import cache

import torch
import transformers
from tiny_lm import tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lwa_helpers.models.language_model import LanguageModel

WIDTH, LAYERS, POSITIONS = 16, 4, 64
MOST_PARAMETERS = 1_000_000  # a config that ignores the sizes below would ask for gigabytes
EVERYWHERE = [  # sizes under all the names that configs have for them
    (WIDTH, "hidden_size d_model n_embd embedding_size word_embed_proj_dim lru_width"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers"),
    (
        2,
        "num_attention_heads n_head n_heads num_heads num_key_value_heads decoder_attention_heads encoder_layers "
        "encoder_attention_heads num_global_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k "
        "n_mamba_heads linear_num_key_heads linear_num_value_heads index_n_heads altup_num_inputs mamba_expand "
        "max_window_layers num_codebooks",
    ),
    (
        32,
        "intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim intermediate_size_mlp dff dim_ff "
        "mamba_d_ssm",
    ),
    (
        8,
        "head_dim attention_head_dim global_head_dim v_head_dim qk_head_dim moe_intermediate_size kv_lora_rank "
        "q_lora_rank shared_expert_intermediate_size moe_shared_expert_intermediate_size mamba_d_head mamba_headdim "
        "mamba_head_dim mamba_chunk_size chunk_size linear_key_head_dim linear_value_head_dim sliding_window "
        "window_size attention_window_size attention_chunk_size index_head_dim index_topk",
    ),
    (
        4,
        "num_experts n_routed_experts num_local_experts moe_num_experts qk_rope_head_dim qk_nope_head_dim "
        "mamba_n_heads mamba_num_heads mamba_d_state ssm_state_size state_size mamba_dt_rank time_step_rank "
        "adapter_rank laurel_rank hidden_size_per_layer_input",
    ),
    (
        1,
        "n_group topk_group num_expert_group num_shared_experts n_shared_experts moe_num_shared_experts num_mem_blocks",
    ),
    (0, "num_kv_shared_layers pad_token_id bos_token_id eos_token_id decoder_start_token_id"),
    (POSITIONS, "max_position_embeddings n_positions max_seq_len n_ctx model_max_length"),
]
SIZES = {name: size for size, names in EVERYWHERE for name in names.split()}
MIXED = ["mamba", "attention", "mamba", "attention"]
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
OWN = {  # what an architecture needs beside these
    "axk1": {"head_dim": 4},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"num_attention_heads": 4, "n_head": 4, "rotary_dim": 4},
    "deepseek_v3": {"head_dim": 4},
    "gemma3": {"vision_config": VISION | {"num_hidden_layers": 5}, "mm_tokens_per_image": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": MIXED},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1},
    "nemotron_h": {"n_groups": 1},
    "youtu": {"head_dim": 4},
    "zamba2": {
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "mamba_headdim": 8,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
    "zaya": {"num_experts_per_tok": 1},
}


def kinds():
    """The model types that transformers loads as causal LMs, one for each model class."""
    found = {}
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if getattr(transformers, str(name)).config_class is CONFIG_MAPPING[kind]:
            found.setdefault(str(name), kind)
    return sorted(found.values())


@cache
def shared_tokenizer():
    return tokenizer()


def tiny_config(kind):
    """The smallest config that the architecture takes."""
    made = CONFIG_MAPPING[kind]
    whole = made()
    text = whole.get_text_config(decoder=True)
    names = {*text.to_dict(), *getattr(text, "attribute_map", {})}
    sizes = {name: size for name, size in SIZES.items() if name in names} | {"vocab_size": len(shared_tokenizer())}
    if "vocab_size_per_layer_input" in names:
        sizes["vocab_size_per_layer_input"] = sizes["vocab_size"]
    if type(text) is not type(whole):
        inner = next(name for name, part in made.sub_configs.items() if isinstance(text, part))
        sizes = {inner: sizes}
    return made(**sizes | OWN.get(kind, {}))


def tiny_model(kind):
    """A random model of the architecture.

    Raises:
        ValueError: If its config has sizes that this file does not know.
    """
    config = tiny_config(kind)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{kind} has {size} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # larger than usual, so that a wrong layer shows
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return LanguageModel(kind, model, shared_tokenizer(), "0" * 64)
