"""A small causal LM of a real transformers class, with a byte-level BPE tokenizer trained on a few titles."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lwa_helpers.models import LanguageModel

TITLES = ["Toy Story", "GoldenEye", "Toy Soldiers", "Été à Paris", "Story of Us & Them", "Heat", "Seven (1995)", "日本 Story"]


def tokenizer():
    """Byte-level BPE with an end token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator([f"{title}\n" for title in TITLES] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")


def language_model(layers=4, hidden=32, seed=0, config=None, **options):
    """A random model with that tokenizer."""
    torch.manual_seed(seed)
    tok = tokenizer()
    config = config or LlamaConfig(
        vocab_size=len(tok), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0, pad_token_id=0, **options,
    )
    return LanguageModel("tiny", AutoModelForCausalLM.from_config(config).eval(), tok, "0" * 64)
