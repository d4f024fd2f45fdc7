"""Fisher information of models with item tokens, by the default loss, against autograd row by row for each reading."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_lm import CUT, READINGS, TITLES, item_lm, language_model, reading_of, windows
from transformers import Gemma3TextConfig, Qwen3Config

from lwa_helpers import build_student
from lwa_helpers.data.windows import collate
from lwa_helpers.fisher.calculator import FisherInformationCalculator
from lwa_helpers.models.layers import decoder_layers

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 340,
}
CONFIGS = {"llama": None, "qwen3": Qwen3Config(**SMALL), "gemma3": Gemma3TextConfig(**SMALL, sliding_window=4)}
MORE = [*CUT, ("x", [2, 2, 2, 5, 6, 7, 0], 1), ("y", [3, 4, 5], 3)]  # the last has no target


def targets(lm, window):
    """(tokens before, tokens that follow) of each target, made anew from the items of the window."""
    how = reading_of(lm)
    if how.first is None:
        line = [lm.tokenizer(TITLES[item] + "\n")["input_ids"] for item in window.items]
        header = lm.tokenizer("Seen:\n")["input_ids"]
        n = sum(label != -100 for label in window.labels)
        text = header + [token for tokens in line for token in tokens]
        return [(text[:place], text[place]) for place in range(len(text) - n, len(text))]
    if how.kind == "hybrid":  # which titles are shown is for the whole window: one reading of all its tokens
        places = [place for place, label in enumerate(window.labels) if label != -100]
        return [(window.input_ids[:place], window.labels[place]) for place in places]
    return [
        (how.prompt(history), how.first + item)
        for history, item in zip(window.histories(), window.items[len(window.items) - len(window.histories()) :])
    ]


def brute_traces(lm, data):
    """(rows, layers): squared norms of the gradient of a row's summed -log p, one forward pass for each target."""
    model, found = lm.model.eval(), []
    for window in data:
        model.zero_grad()
        for before, token in targets(lm, window):
            logits = model(input_ids=torch.tensor([before])).logits[:, -1]
            F.cross_entropy(logits, torch.tensor([token])).backward()
        grads = [[p.grad for p in layer.parameters() if p.grad is not None] for layer in decoder_layers(model)]
        found.append([sum(g.double().square().sum().item() for g in layer) for layer in grads])
        model.zero_grad(set_to_none=True)
    return np.array(found)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("reading", [*READINGS, "text"])
def test_traces_of_each_layer_equal_autograds(reading, kind):
    full = language_model(config=CONFIGS[kind], layers=3)
    lm = full if reading == "text" else item_lm(reading, full)
    lm.model.double()
    data = windows(lm, MORE)
    got = FisherInformationCalculator().calculate(lm.model, [collate(data[:2], 0), collate(data[2:], 0)])
    want = brute_traces(lm, data)
    np.testing.assert_allclose(got.per_example, want, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(got.per_layer, want.mean(0), rtol=1e-6)
    assert (want[:-1] > 0).all() and not want[-1].any() and got.n_examples == 5


@pytest.mark.parametrize("granularity", ["module", "head", "parameter"])
def test_finer_traces_of_a_model_with_items_sum_to_the_layers(granularity):
    lm = item_lm("hybrid")
    lm.model.double()
    data = windows(lm, MORE)
    got = FisherInformationCalculator(granularity=granularity).calculate(lm.model, [collate(data, 0)])
    np.testing.assert_allclose(got.per_example, brute_traces(lm, data), rtol=1e-6, atol=1e-12)


def test_padding_and_batches_do_not_matter():
    lm = item_lm("titles")
    lm.model.double()
    data = windows(lm, MORE)
    whole = FisherInformationCalculator().calculate(lm.model, [collate(data, 0)])
    alone = FisherInformationCalculator().calculate(lm.model, [collate([window], 7) for window in data])
    np.testing.assert_allclose(whole.per_example, alone.per_example, rtol=1e-6, atol=1e-12)


def test_a_student_of_a_model_with_items_is_measured_by_its_own_layers():
    student = build_student(item_lm(), 2, "first_last")
    student.model.double()
    data = windows(student, MORE)
    got = FisherInformationCalculator().calculate(student.model, [collate(data, 0)])
    np.testing.assert_allclose(got.per_example, brute_traces(student, data), rtol=1e-6, atol=1e-12)
    assert got.per_layer.shape == (2,)


def test_sampled_targets_give_the_fisher_information_of_the_models_own_distribution():
    """One position: the mean of the squared gradients over drawn labels nears the sum over all labels by their p."""
    lm = item_lm(layers=2)
    lm.model.double()
    (window,) = windows(lm, [("u", [0, 1], 1)])
    first = lm.items.first
    p = lm.model(torch.tensor([[first]])).logits[0, -1].detach().softmax(-1)
    want = np.zeros(2)
    for token in range(len(p)):
        loss = F.cross_entropy(lm.model(torch.tensor([[first]])).logits[:, -1], torch.tensor([token]))
        for place, layer in enumerate(decoder_layers(lm.model)):
            grads = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True, allow_unused=True)
            want[place] += p[token].item() * sum(g.square().sum().item() for g in grads if g is not None)
    batch = collate([window] * 4000, 0)
    got = FisherInformationCalculator(estimator="sampled", seed=0).calculate(lm.model, [batch])
    error = got.per_example.std(0) / 4000**0.5
    assert (np.abs(got.per_layer - want) < 4 * error).all() and (error > 0).all() and (error < 0.2 * want).all()
