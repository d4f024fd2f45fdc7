"""Students hold the teacher's own layers; a cut vocabulary changes neither tokens nor logits of what is kept."""

import copy
import json

import pytest
import torch
from tiny_lm import TITLES, language_model
from transformers import Gemma3TextConfig, GPT2Config, Qwen3Config

from lwa_helpers import build_student
from lwa_helpers.errors import LwaError
from lwa_helpers.models import decoder_layers, load_teacher
from lwa_helpers.student import kept_tokens, select_layers, trim_vocabulary

TEXTS = [f"{title}\n" for title in TITLES[:5]]
SMALL = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
         "intermediate_size": 48, "vocab_size": 340}
CONFIGS = {
    "llama": None,
    "qwen3": Qwen3Config(**SMALL, tie_word_embeddings=False),
    "gemma3": Gemma3TextConfig(**SMALL, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 3),
    "gpt2": GPT2Config(n_embd=32, n_layer=6, n_head=4, vocab_size=340, n_positions=64),
}


@pytest.mark.parametrize(("selection", "expected"), [
    ("first", [0, 1, 2, 3]), ("last", [6, 7, 8, 9]), ("first_last", [0, 1, 8, 9]), ("drop_block", [0, 1, 2, 9]),
    ("uniform", [0, 3, 6, 9]), ([9, 0, 5, 4], [0, 4, 5, 9]),
])
def test_selections(selection, expected):
    assert select_layers(10, 4, selection) == expected


@pytest.mark.parametrize(("n_layers", "selection", "message"), [
    (0, "first", "1 to 10"), (11, "first", "1 to 10"), (4, "best", "unknown selection"), (2, [1, 1], "different layers"),
    (2, [1, 10], "different layers"),
])
def test_bad_selections_are_named(n_layers, selection, message):
    with pytest.raises(LwaError, match=message):
        select_layers(10, n_layers, selection)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_student_is_the_teacher_without_the_other_layers(kind):
    """Independent oracle: the teacher itself with its list of layers shortened in place."""
    teacher = language_model(layers=6, config=CONFIGS[kind])
    before = copy.deepcopy(teacher.model.state_dict())
    student = build_student(teacher, 3, [0, 2, 5])
    ids = torch.randint(0, 300, (2, 11))
    with torch.no_grad():
        got = student.model(ids).logits
        layers = decoder_layers(teacher.model)
        oracle = copy.deepcopy(teacher.model)
        kept = torch.nn.ModuleList(copy.deepcopy(layers[i]) for i in (0, 2, 5))
        for place, layer in enumerate(kept):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = place
        holder = next(m for m in oracle.modules() for name, c in m.named_children() if c is decoder_layers(oracle))
        name = next(name for name, child in holder.named_children() if child is decoder_layers(oracle))
        setattr(holder, name, kept)
        oracle.config.num_hidden_layers = 3
        if getattr(oracle.config, "layer_types", None):
            oracle.config.layer_types = [oracle.config.layer_types[i] for i in (0, 2, 5)]
        torch.testing.assert_close(got, oracle(ids, use_cache=False).logits, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_a_cut_vocabulary_keeps_tokens_and_logits(tied):
    teacher = language_model(tie_word_embeddings=tied)
    cut = trim_vocabulary(teacher, TEXTS)
    old = kept_tokens(teacher.tokenizer, json.loads(teacher.tokenizer.backend_tokenizer.to_str()), TEXTS)
    assert len(old) == cut.model.config.vocab_size < teacher.model.config.vocab_size
    for text in TEXTS:
        before, after = teacher.tokenizer(text)["input_ids"], cut.tokenizer(text)["input_ids"]
        assert [old[i] for i in after] == before and cut.tokenizer.decode(after) == text
        with torch.no_grad():
            full, small = teacher.model(torch.tensor([before])).logits, cut.model(torch.tensor([after])).logits
        torch.testing.assert_close(full[..., old], small, rtol=0, atol=1e-6)
    assert cut.tokenizer.eos_token == "<end>" and cut.model.config.eos_token_id == cut.tokenizer.eos_token_id


def test_a_saved_student_loads_as_a_plain_checkpoint(tmp_path):
    student = build_student(language_model(), 2, "uniform", TEXTS)
    student.save(tmp_path / "student")
    again = load_teacher(tmp_path / "student")
    ids = torch.tensor([again.tokenizer(TEXTS[3])["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, student.model(ids).logits)
