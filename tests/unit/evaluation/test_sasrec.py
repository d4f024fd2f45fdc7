"""SASRec and eSASRec: the loss on drawn items by hand, gated layers, and files that bring the scores back."""

import numpy as np
import pytest
import torch
from tiny_interactions import decided_by_the_last_but_one, random_interactions
from torch.nn import functional as F

from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.protocol import cases, ranks
from lwa_helpers.evaluation.sasrec import ESASRec, GatedLayer, ItemTransformer, SASRec

KINDS = {"sasrec": SASRec, "esasrec": ESASRec}


@pytest.fixture(scope="module", params=KINDS)
def fitted(request):
    return KINDS[request.param](dim=16, max_length=6, max_epochs=2).fit(random_interactions(0))


def small(negatives, n_items=5):
    """An eSASRec that is not trained, with a table drawn from a fixed seed."""
    model = ESASRec(negatives=negatives, dim=8)
    torch.manual_seed(0)
    model.model = ItemTransformer(n_items, **model.shape)
    return model


def test_the_loss_on_drawn_negatives_by_hand_where_they_hit_the_target(monkeypatch):
    """Items 2, 0, 2, 4 are drawn; for target 2 both its hits are left out, for target 1 none is, for 0 one."""
    model, target = small(4), torch.tensor([2, 1, 0])
    drawn, hidden = torch.tensor([2, 0, 2, 4]), torch.randn(3, 8)
    monkeypatch.setattr(torch, "randint", lambda n, size, device=None: drawn if (n, size) == (5, (4,)) else 1 / 0)
    scores = (hidden @ model.model.items.weight[:-1].T).detach().double().numpy()
    want = 0.0
    for row, (own, others) in enumerate([(2, [0, 4]), (1, [2, 0, 2, 4]), (0, [2, 2, 4])]):
        z = np.exp(scores[row, own]) + sum(np.exp(scores[row, item]) for item in others)
        want -= np.log(np.exp(scores[row, own]) / z) / 3
    assert model._loss(hidden, target).item() == pytest.approx(want, rel=1e-5)


def test_negatives_are_drawn_evenly_from_the_catalogue_anew_each_time():
    model, seen = small(2000), []
    draw = torch.randint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *args, **kwargs: seen.append(draw(*args, **kwargs)) or seen[-1])
        losses = [model._loss(torch.randn(2, 8), torch.tensor([0, 1])).item() for _ in range(3)]
    assert len({tuple(row.tolist()) for row in seen}) == 3 and np.isfinite(losses).all()
    counts = torch.bincount(torch.cat(seen), minlength=5)
    assert len(counts) == 5 and (counts / 6000 - 0.2).abs().max() < 0.03


def test_a_target_alone_has_no_loss():
    """Where every draw hits the target nothing is left to lose to."""
    model = small(3, n_items=1)
    assert model._loss(torch.randn(2, 8), torch.tensor([0, 0])).item() == pytest.approx(0, abs=1e-6)


def gated(dim=8, heads=2, seed=0):
    torch.manual_seed(seed)
    layer = GatedLayer(dim, heads, 0.0).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def test_a_gated_layer_by_its_formula():
    """x + sigmoid(W x) f(norm x) twice, attention written out by hand and SwiGLU after it."""
    layer, x = gated(), torch.randn(2, 5, 8)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
    with torch.no_grad():
        y = F.layer_norm(x, (8,), layer.norms[0].weight, layer.norms[0].bias)
        q, k, v = (y @ layer.attention.in_proj_weight.T + layer.attention.in_proj_bias).chunk(3, -1)
        heads = []
        for part in (slice(0, 4), slice(4, 8)):
            scores = q[..., part] @ k[..., part].transpose(1, 2) / 2 + mask
            heads.append(scores.softmax(-1) @ v[..., part])
        out = torch.cat(heads, -1) @ layer.attention.out_proj.weight.T + layer.attention.out_proj.bias
        z = x + torch.sigmoid(x @ layer.gates[0].weight.T + layer.gates[0].bias) * out
        y = F.layer_norm(z, (8,), layer.norms[1].weight, layer.norms[1].bias) @ layer.up.weight.T + layer.up.bias
        hidden = y[..., :32] / (1 + torch.exp(-y[..., :32])) * y[..., 32:]
        gate = torch.sigmoid(z @ layer.gates[1].weight.T + layer.gates[1].bias)
        want = z + gate * (hidden @ layer.down.weight.T + layer.down.bias)
        torch.testing.assert_close(layer(x, mask), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_gated_layer_is_causal(training):
    layer, mask = gated().train(training), torch.nn.Transformer.generate_square_subsequent_mask(5)
    x = torch.randn(2, 5, 8)
    later = x.clone()
    later[:, 3:] = torch.randn(2, 2, 8)
    change = (layer(x, mask) - layer(later, mask)).abs().amax(-1)
    assert change[:, :3].max() < 1e-6 and change[:, 3:].min() > 1e-3


def test_gated_layers_begin_apart():
    first, second = ItemTransformer(5, 4, 8, layers=2, heads=2, dropout=0.0, gated=True).encoder.layers
    assert all(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()) if a.ndim > 1)


def test_esasrec_scores_do_not_depend_on_later_items_or_batch_mates():
    model = ESASRec(dim=16, max_length=6, max_epochs=1, dropout=0.0).fit(random_interactions(0))
    items, later = torch.tensor([[9, 1, 2, 3, 4]]), torch.tensor([[9, 1, 2, 7, 8]])
    for training in (False, True):
        change = (model.model.train(training)(items) - model.model(later)).abs().amax(dim=-1)[0]
        assert change[:3].max() < 1e-5 and change[3:].min() > 1e-3
    histories = [[1, 2], [], [3, 4, 5, 6, 7]]
    alone = [model.scores([history])[0] for history in histories]
    np.testing.assert_allclose(model.scores(histories), alone, atol=1e-5)


def test_esasrec_learns_a_rule_that_order_alone_reveals():
    """The next item is decided by the last but one."""
    data = decided_by_the_last_but_one()
    model = ESASRec(negatives=8, dropout=0.0, batch_size=8, max_epochs=8).fit(data)
    assert (ranks(model, cases(data, "test"), exclude_seen=False) == 1).mean() > 0.95


def test_esasrec_repeats_itself_by_seed():
    data = random_interactions(0)
    found = [ESASRec(dim=8, max_epochs=2, seed=seed).fit(data).scores([[1, 2]]) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_a_saved_model_scores_alike_when_it_is_read_again(fitted, tmp_path):
    fitted.save(tmp_path / "model.safetensors")
    again = type(fitted).load(tmp_path / "model.safetensors")
    histories = [[1, 2], [], [3, 4, 5, 6, 7, 8, 0, 1], [8]]
    np.testing.assert_array_equal(again.scores(histories), fitted.scores(histories))
    assert type(again) is type(fitted) and again.max_length == fitted.max_length == 6
    again.save(tmp_path / "twice.safetensors")
    assert (tmp_path / "twice.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_either_class_reads_what_the_other_wrote(tmp_path):
    """The shape in the file says which layers there are."""
    model = ESASRec(dim=16, max_length=6, max_epochs=1).fit(random_interactions(0))
    model.save(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(SASRec.load(tmp_path / "model.safetensors").scores([[1, 2]]), model.scores([[1, 2]]))


def test_item_vectors_are_the_rows_that_states_are_held_against(fitted):
    """Scores of the catalogue are linear in them: the state of a history is found by least squares."""
    scores = fitted.scores([[1, 2], [7]]).T
    vectors = fitted.item_vectors
    assert vectors.shape == (9, 16) and vectors.dtype == np.float32
    state = np.linalg.lstsq(vectors, scores, rcond=None)[0]
    np.testing.assert_allclose(vectors @ state, scores, atol=1e-4)
    with torch.no_grad():
        hidden = fitted.model.eval()(torch.tensor([[9, 7]]))[0, -1].numpy()
    np.testing.assert_allclose(vectors @ hidden, scores[:, 1], atol=1e-4)


def test_impossible_sizes_are_refused_of_both():
    for build in KINDS.values():
        with pytest.raises(LwaError, match="divisible by heads"):
            build(dim=7, heads=2)
