"""A head carried over to other states: ridge regression by augmented least squares, and where it changes nothing."""

import numpy as np
import pytest
import torch
from tiny_lm import READINGS, item_lm, language_model, windows

from lwa_helpers import build_student
from lwa_helpers.data.windows import collate
from lwa_helpers.ranking import head_transfer
from lwa_helpers.ranking.head_transfer import carry_head, label_states


def numpy_of(tensor):
    return tensor.detach().double().numpy()


@pytest.mark.parametrize(("positions", "width"), [(200, 32), (7, 32), (90, 48), (32, 16)])
def test_the_carried_head_is_the_old_one_after_a_ridge_regression(positions, width):
    """Oracle: least squares with a row of sqrt(penalty) for each dimension. One case has fewer positions than these."""
    generator = torch.Generator().manual_seed(0)
    target = item_lm(hidden=width).model
    weight = torch.randn(len(target.get_output_embeddings().weight), 32, generator=generator)
    source = torch.randn(positions, 32, generator=generator)
    states = torch.randn(positions, width, generator=generator) * torch.linspace(0.2, 3, width)
    carry_head(weight, source, target, states)
    x, y = numpy_of(states), numpy_of(source)
    penalty = head_transfer.RIDGE * (x**2).sum(0).mean()
    rows = np.vstack([x, np.sqrt(penalty) * np.eye(width)])
    mapped = np.linalg.lstsq(rows, np.vstack([y, np.zeros((width, 32))]), rcond=None)[0]
    want = numpy_of(weight) @ mapped.T
    head = target.get_output_embeddings().weight
    np.testing.assert_allclose(numpy_of(head), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    assert head.requires_grad and head.dtype == torch.float32


def test_the_same_states_leave_the_head_as_it_is(monkeypatch):
    monkeypatch.setattr(head_transfer, "RIDGE", 1e-10)
    target = item_lm().model
    head = target.get_output_embeddings().weight
    before, states = head.detach().clone(), torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    carry_head(before, states, target, states)
    torch.testing.assert_close(head.detach(), before, rtol=1e-4, atol=1e-5)


def test_states_that_are_turned_and_stretched_are_read_alike(monkeypatch):
    """Whatever invertible map lies between the states, the new head says of its own what the old one said."""
    monkeypatch.setattr(head_transfer, "RIDGE", 1e-10)
    generator = torch.Generator().manual_seed(0)
    target, turn = item_lm().model, torch.randn(32, 32, generator=generator) + 3 * torch.eye(32)
    head = target.get_output_embeddings().weight
    weight, states = head.detach().clone(), torch.randn(300, 32, generator=generator)
    carry_head(weight, states, target, states @ turn)
    torch.testing.assert_close(states @ turn @ head.detach().T, states @ weight.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reading", [*READINGS, "text"])
def test_label_states_are_those_before_each_label_in_the_order_of_the_batches(reading):
    """Oracle: transformers' own last states of each row alone."""
    lm = language_model() if reading == "text" else item_lm(reading)
    data = windows(lm)
    want = []
    for window in data:
        with torch.no_grad():
            states = lm.model.model(torch.tensor([window.input_ids])).last_hidden_state[0]
        want += [states[place - 1] for place, label in enumerate(window.labels) if label != -100]
    batches = [collate(data[:2], 0), collate(data[2:], 0)]
    got = label_states(lm.model.train(), batches, False)
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-5)
    half = label_states(lm.model, batches, True)
    assert got.dtype == half.dtype == torch.float32 and not got.requires_grad and 0 < (half - got).abs().max() < 0.2


def test_a_student_with_the_carried_head_says_more_of_what_its_teacher_says():
    """Fitted on some windows, judged on others: the correlation of item scores with the teacher's."""
    lm = item_lm(layers=6)
    with torch.no_grad():
        for layer in lm.model.model.layers:
            for parameter in layer.parameters():
                parameter *= 3  # so that layers do something
    rng = np.random.default_rng(0)
    cut = [("u", rng.permutation(8)[:6].tolist(), 1) for _ in range(150)]
    fitted, judged = (collate(windows(lm, part), 0) for part in (cut[:100], cut[100:]))
    student, weight = build_student(lm, 2, "first").model, lm.model.get_output_embeddings().weight

    def agreement():
        said = []
        for model in (lm.model, student):
            head = model.get_output_embeddings().weight.detach()[lm.items.tokens]
            said.append((label_states(model, [judged], False) @ head.T).flatten())
        return torch.corrcoef(torch.stack(said))[0, 1].item()

    before = agreement()
    carry_head(weight, label_states(lm.model, [fitted], False), student, label_states(student, [fitted], False))
    assert agreement() > before + 0.1
