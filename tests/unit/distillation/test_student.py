"""Students hold the teacher's own layers, those that a selection names."""

import copy

import numpy as np
import pytest
import torch
from tiny_lm import SMALL, TITLES, language_model, result
from transformers import Gemma3TextConfig, GPT2Config, Qwen3Config, SmolLM3Config

from lwa_helpers import build_student
from lwa_helpers.distillation.student import greedy_scores, select_layers
from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.losses import next_token_nll
from lwa_helpers.models.layers import decoder_layers
from lwa_helpers.models.loading import load_teacher

TEXTS = [f"{title}\n" for title in TITLES[:5]]
DEEP = SMALL | {"num_hidden_layers": 6}
CONFIGS = {
    "llama": None,
    "qwen3": Qwen3Config(**DEEP, tie_word_embeddings=False),
    "gemma3": Gemma3TextConfig(**DEEP, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 3),
    "smollm3": SmolLM3Config(**DEEP, no_rope_layers=[1, 1, 0, 1, 1, 0], bos_token_id=0, eos_token_id=0, pad_token_id=0),
    "gpt2": GPT2Config(n_embd=32, n_layer=6, n_head=4, vocab_size=340, n_positions=64),
}


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("first", [0, 1, 2, 3]),
        ("last", [6, 7, 8, 9]),
        ("first_last", [0, 1, 8, 9]),
        ("drop_block", [0, 1, 2, 9]),
        ("uniform", [0, 3, 6, 9]),
        ([9, 0, 5, 4], [0, 4, 5, 9]),
    ],
)
def test_selections(selection, expected):
    assert select_layers(10, 4, selection) == select_layers(10, np.int64(4), selection) == expected


@pytest.mark.parametrize(
    ("n_layers", "selection", "message"),
    [
        (0, "first", "1 to 10"),
        (11, "first", "1 to 10"),
        (4, "best", "unknown selection"),
        (2, [1, 1], "different layers"),
        (2, [1, 10], "different layers"),
        (2, [0, 0, 1], "different layers"),
    ],
)
def test_bad_selections_are_named(n_layers, selection, message):
    with pytest.raises(LwaError, match=message):
        select_layers(10, n_layers, selection)


def test_selections_by_score_keep_the_highest_and_of_equal_ones_the_lower():
    scores = [3.0, 9, 1, 3, 8, 0, 3]
    for selection in ("top_fisher", "block_influence", "greedy"):
        assert select_layers(7, 3, selection, scores) == [0, 1, 4]
        assert select_layers(7, 4, selection, np.array(scores)) == [0, 1, 3, 4]
    assert select_layers(7, 3, "top_fisher", result(scores)) == [0, 1, 4]


def test_random_selections_follow_the_seed():
    drawn = [select_layers(30, 8, "random", seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(kept)) == 8 and kept == sorted(kept) and set(kept) <= set(range(30)) for kept in drawn)


@pytest.mark.parametrize(
    ("selection", "scores", "message"),
    [
        ("top_fisher", None, "needs scores.*FisherResult"),
        ("greedy", None, "greedy_scores"),
        ("block_influence", result([1.0] * 10), "needs scores.*block_influence"),
        ("top_fisher", [1.0, 2], "10 finite"),
        ("greedy", [float("nan")] * 10, "10 finite"),
    ],
)
def test_missing_or_wrong_scores_are_named(selection, scores, message):
    with pytest.raises(LwaError, match=message):
        select_layers(10, 4, selection, scores)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_greedy_drops_what_a_student_without_it_misses_least(kind):
    """Independent oracle: every smaller student is built and its loss measured."""
    teacher = language_model(layers=6, config=CONFIGS[kind])
    with torch.no_grad():
        for layer in decoder_layers(teacher.model):
            for parameter in layer.parameters():
                parameter *= 3  # so that layers differ in what they do
    ids = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows} for rows in ids.split(2)]
    left = list(range(6))
    while len(left) > 2:
        losses = []
        for layer in left:
            smaller = build_student(teacher, len(left) - 1, [other for other in left if other != layer]).model
            losses.append(sum(next_token_nll(smaller, batch).sum().item() for batch in batches))
        left.pop(int(np.argmin(losses)))
        scores = greedy_scores(teacher.model, iter(batches), n_layers=len(left))
        assert select_layers(6, len(left), "greedy", scores) == left
    assert len(decoder_layers(teacher.model)) == 6 == teacher.model.config.num_hidden_layers
    assert sorted(scores) == [0, 1, 2, 3, 4, 4]


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


def test_a_saved_student_loads_as_a_plain_checkpoint(tmp_path):
    student = build_student(language_model(), 2, "uniform", TEXTS)
    student.save(tmp_path / "student")
    again = load_teacher(tmp_path / "student")
    ids = torch.tensor([again.tokenizer(TEXTS[3])["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, student.model(ids).logits)
