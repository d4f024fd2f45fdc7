"""A small causal LM of a real transformers class, with a byte-level BPE tokenizer of a few titles, and its readers."""

import json
from pathlib import Path

import gguf
import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lwa_helpers.config import load_config
from lwa_helpers.data.history_tokens import Reading
from lwa_helpers.data.loading import load_data
from lwa_helpers.data.prompts import Prompt
from lwa_helpers.data.windows import window_of
from lwa_helpers.distillation.recipes import Distillation
from lwa_helpers.fisher.result import Column, FisherResult
from lwa_helpers.models.item_tokens import with_item_tokens
from lwa_helpers.models.language_model import ItemTokens, LanguageModel
from lwa_helpers.models.layers import text_config
from lwa_helpers.ranking.task import RankingTask

SMALL = {  # sizes of a config of any architecture
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 340,
}
TITLES = [
    "Toy Story",
    "GoldenEye",
    "Toy Soldiers",
    "Été à Paris",
    "Story of Us & Them",
    "Heat",
    "Seven (1995)",
    "日本 Story",
]
PROMPT = Prompt("Seen:\n")
READINGS = ("items", "hybrid", "titles")
CUT = [("u", [0, 1, 2, 3, 4], 3), ("v", [4, 5], 1), ("w", [7, 6, 1], 1)]  # users, their items, where targets begin
USERS = 24


def tokenizer(vocabulary=340):
    """Byte-level BPE with an end token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([f"{title}\n" for title in TITLES] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")


def language_model(layers=4, hidden=32, seed=0, config=None, vocabulary=340, **options):
    """A random model with that tokenizer."""
    torch.manual_seed(seed)
    tok = tokenizer(vocabulary)
    config = config or LlamaConfig(
        vocab_size=len(tok),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=0,
        pad_token_id=0,
        **options,
    )
    return LanguageModel("tiny", AutoModelForCausalLM.from_config(config).eval(), tok, "0" * 64)


def item_lm(
    reading="items", lm=None, titles=TITLES, ids=None, text_items=2, history_items=50, seed=0, prompt=PROMPT, **options
):
    """A random model with a token for each title, whose rows in embedding and head are drawn with the seed too."""
    lm = lm or language_model(seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = (
        torch.randn(len(titles), text_config(lm.model).hidden_size, generator=generator) for _ in range(2)
    )
    ids = ids or [f"i{n}" for n in range(len(titles))]
    items = ItemTokens(ids, 0, reading, text_items if reading == "hybrid" else 0, history_items)
    texts = [] if reading == "items" else [prompt.header, *titles, *(title + prompt.separator for title in titles)]
    return with_item_tokens(lm, titles, 0.02 * inputs, outputs, items, texts)


def reading_of(lm, titles=TITLES):
    """How the model reads histories of these titles."""
    return Reading.of(titles, lm, PROMPT)


def windows(lm, cut=CUT):
    """Training windows of a few users, as the model reads them."""
    return [window_of(reading_of(lm), user, items, first) for user, items, first in cut]


def result(per_layer):
    """A FisherResult of one example with these traces."""
    columns = [Column(layer=i, module="all", n_parameters=1) for i in range(len(per_layer))]
    return FisherResult(np.array([per_layer], dtype=float), columns, "empirical", "module")


def section(**changes):
    """A distillation section for models that small."""
    own = {"n_layers": 2, "tokens_per_batch": 60, "bf16": False, "strategy": "uniform", "epochs": 1.0, "rank": 4}
    own |= {"frontier": [], "steps": [], "co_teachers": []}
    return load_config("smoke").distillation.model_copy(update=own | changes)


def distillation(teacher=None, cut=CUT, per_layer=(4.0, 3, 2, 1), seed=0, **changes):
    """A distillation of a tiny teacher with item tokens on a few users' windows; its outputs lie in paths.CACHE."""
    teacher = teacher or item_lm()
    return Distillation(teacher, result(per_layer), section(**changes), windows(teacher, cut), seed)


def office(folder: Path, titles: list[str] = TITLES) -> Path:
    """Users who each went round the catalogue from their own place, as Office_Products; complete, leave-one-out."""
    rows = [(f"u{user:02d}", f"i{(user + step) % len(titles)}", step) for user in range(USERS) for step in range(6)]
    part = {4: "valid", 5: "test"}
    folder.mkdir()
    pd.DataFrame(
        [
            {"user_id": user, "parent_asin": item, "rating": None, "timestamp": step, "split": part.get(step, "train")}
            for user, item, step in rows
        ]
    ).to_parquet(folder / "Office_Products.parquet")
    items = pd.DataFrame({"parent_asin": [f"i{n}" for n in range(len(titles))], "title": titles})
    items.to_parquet(folder / "meta_Office_Products.parquet")
    return folder


def office_config(folder: Path, **overrides):
    """Settings of a smoke run on `office`, laid out in the folder; overrides with __ for the dot."""
    folder = folder if folder.is_dir() else office(folder)
    where = {"data.name": "Office_Products", "data.root": str(folder), "data.split": "file", "data.k_core": 0}
    return load_config("smoke", where | {name.replace("__", "."): value for name, value in overrides.items()})


def office_task(folder: Path, lm=None, part="test", **overrides):
    """The ranking task on `office` for a model, by default one that reads items."""
    config = office_config(folder, **overrides)
    return RankingTask(load_data(config.data), lm or item_lm(), config.data, config.evaluation, config.seed, part)


def begin_with_a_token(lm):
    """Give the model's tokenizer a first token set by a sequence of processors, as Llama 3's has it."""
    raw = lm.tokenizer.backend_tokenizer
    raw.add_special_tokens(["<begin>"])
    first = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", raw.token_to_id("<begin>"))])
    raw.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), first])
    lm.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<begin>", eos_token="<end>", pad_token="<end>"
    )
    lm.model.resize_token_embeddings(len(lm.tokenizer))
    return lm


def write_gguf(lm, path, architecture):
    """Write a small model with its byte-level tokenizer as a .gguf file, as llama.cpp's converter does."""
    config, writer = lm.model.config, gguf.GGUFWriter(path, architecture)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6 if architecture == "gemma3" else 1e4)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if architecture == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(lm.tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, weight in lm.model.state_dict().items():
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = weight.reshape(2, 2, -1, weight.shape[1])  # 2 heads, whose rotary halves llama.cpp interleaves
            weight = halves.transpose(1, 2).reshape(weight.shape)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            weight = weight + 1
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
