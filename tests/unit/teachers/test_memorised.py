"""What a model knows by heart: completions of tiny models, and the control."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_lm import language_model

from lwa_helpers.teachers import memorised as module
from lwa_helpers.teachers.memorised import completed, memorised

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("n", [2, 3, 40])
def test_no_title_gets_its_own_second_half_back(monkeypatch, n):
    asked = []
    monkeypatch.setattr(
        module, "completed", lambda lm, starts, ends: asked.append((starts, ends)) or np.zeros(len(starts))
    )
    for seed in range(20):
        asked.clear()
        memorised(None, [f"a{i} b{i}" for i in range(n)], "Seen:\n", seed)
        (starts, real), (again, mixed), (years, _) = asked
        assert starts == again and sorted(mixed) == sorted(real) and years == []
        assert all(own != other for own, other in zip(real, mixed))


def test_years_in_brackets_are_asked_for_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(
        module, "completed", lambda lm, starts, ends: asked.append((starts, ends)) or np.zeros(len(starts))
    )
    memorised(None, ["Toy Story (1995)", "Heat (1995) again", "Heat"], "Seen:\n", 0)
    assert asked[2] == (["Seen:\nToy Story ("], ["1995)"])


def test_an_end_is_complete_if_the_model_would_write_it_token_by_token():
    lm = language_model(layers=1)
    beginnings, ends = ["Toy", "Story of Us", "Heat and more than that"], []
    for i, text in enumerate(beginnings):  # greedy decoding, one forward pass for each token
        ids = lm.tokenizer(text)["input_ids"]
        start = len(ids)
        for _ in range(3):
            ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        wrong = [(ids[-1] + 1) % 256] if i == 1 else []
        ends.append(ids[start:-1] + wrong if wrong else ids[start:])

    class Known:
        """The tokenizer, which takes ends as ready token ids: not every id sequence is what a text becomes."""

        def __call__(self, text, **options):
            return {"input_ids": text} if isinstance(text, list) else lm.tokenizer(text, **options)

    known = type("Known", (), {"tokenizer": Known(), "model": lm.model})()
    assert completed(known, beginnings, ends).tolist() == [True, False, True]
