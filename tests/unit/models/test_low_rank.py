"""Rows trained in few dimensions: nothing changes at first, the factors alone move, plain matrices are left behind."""

import pytest
import torch
from tiny_lm import distillation, item_lm
from torch import nn

from lwa_helpers.distillation.recipes import trained_rows
from lwa_helpers.models.low_rank import low_rank

SHAPES = [(30, 8, 3), (5, 8, 3), (30, 2, 3), (1, 4, 2), (7, 7, 7)]


def steps(module, n=3):
    """Some steps of plain gradient descent on a loss of the whole matrix."""
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)
    for seed in range(n):
        optimizer.zero_grad()
        aim = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(seed))
        (module.weight - aim).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(("rows", "width", "rank"), SHAPES)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.Linear])
def test_a_matrix_is_its_base_and_a_product_of_two_factors(rows, width, rank, kind):
    torch.manual_seed(0)
    module = kind(rows, width) if kind is nn.Embedding else nn.Linear(width, rows, bias=False)
    base, names = module.weight.detach().clone(), list(module.state_dict())
    with low_rank([module], rank):
        assert torch.equal(module.weight, base)
        trained = dict(module.named_parameters())
        shapes = sorted(tuple(parameter.shape) for parameter in trained.values())
        assert shapes == sorted([(rows, min(rank, rows, width)), (min(rank, rows, width), width)])
        left, right = module.parametrizations.weight.original0, module.parametrizations.weight.original1
        assert not right.any() and left.square().sum(1).mean().item() == pytest.approx(1, rel=1e-4)
        steps(module)
        assert right.any()
        want = base + left.detach() @ right.detach()
        torch.testing.assert_close(module.weight, want)
    assert type(module) is kind and isinstance(module.weight, nn.Parameter) and module.weight.requires_grad
    assert list(module.state_dict()) == names and torch.equal(module.weight, want)
    assert torch.linalg.matrix_rank(module.weight - base, atol=1e-5) <= rank


def test_both_ends_start_from_the_directions_of_the_last_which_knows_the_items():
    lm = item_lm()
    ends = trained_rows(lm.model)
    with low_rank(ends, 5):
        first, last = (module.parametrizations.weight.original0 for module in ends)
        assert torch.equal(first, last) and first is not last and first.requires_grad and last.requires_grad
    with low_rank(ends[1:], 5):
        assert torch.equal(ends[1].parametrizations.weight.original0, last)


def test_rows_move_where_those_of_the_base_differ_most():
    """Two groups of rows: the first step in one dimension moves the rows of a group alike."""
    module = nn.Embedding(6, 4)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, 0, 0, 0]] * 3 + [[-1.0, 0, 0, 0]] * 3))
    base = module.weight.detach().clone()
    with low_rank([module], 1):
        steps(module, n=1)
    change = module.weight.detach() - base
    assert change.abs().max() > 1e-3
    for rows, scale in ((range(3), 3.0), (range(3, 6), -1.0)):
        for row in rows:
            torch.testing.assert_close(change[row] / scale, change[0] / 3)


def test_a_base_of_zeros_has_no_direction_and_stays():
    """A head that begins at nothing would divide by nothing."""
    module = nn.Embedding.from_pretrained(torch.zeros(4, 3), freeze=False)
    with low_rank([module], 2):
        steps(module)
    assert not module.weight.any()


def test_ordinary_matrices_are_left_behind_after_an_exception():
    lm = item_lm()
    modules = trained_rows(lm.model)
    base = [module.weight.detach().clone() for module in modules]
    with pytest.raises(KeyboardInterrupt), low_rank(modules, 4):
        for module in modules:
            nn.init.ones_(module.parametrizations.weight.original1)
        expected = [module.weight.detach().clone() for module in modules]
        raise KeyboardInterrupt
    for module, before, want in zip(modules, base, expected):
        assert isinstance(module.weight, nn.Parameter) and not hasattr(module, "parametrizations")
        assert torch.equal(module.weight, want) and not torch.equal(want, before)


def test_a_student_is_trained_in_few_dimensions_at_both_ends_and_in_all_between(cache):
    taught = distillation(rank=2, learning_rate=1e-2, head_learning_rate=1e-2)
    student = taught.start(2)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    taught.train(student, "uniform")
    after = student.model.state_dict()
    assert list(after) == list(before)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        change = after[name] - before[name]
        assert change.abs().max() > 1e-4 and torch.linalg.matrix_rank(change, rtol=1e-3) <= 2
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) > 2
