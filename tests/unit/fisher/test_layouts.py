"""Activations that are not (rows, tokens, size): flattened, tokens first, other axes as long as the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fisher_models import batch, build, layers_of, row_traces, tiny
from torch import nn
from transformers import BertConfig, LlamaConfig, OPTConfig

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.calculator import FisherInformationCalculator
from lwa_helpers.fisher.importance import block_influence
from lwa_helpers.fisher.kfac import kfac_effective_ranks
from lwa_helpers.fisher.losses import next_token_nll

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama():
    return tiny(LlamaConfig(**SMALL, intermediate_size=24))


def opt(**more):
    return tiny(OPTConfig(**SMALL, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16, **more))


def traces(model, rows, **options):
    return FisherInformationCalculator(**options).calculate(model, [rows]).per_example


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("granularity", ["layer", "module", "head", "parameter"])
def test_opt_whose_feed_forward_sees_flat_tokens(granularity, side):
    model = opt()
    rows = batch(lengths=(7, 4, 6), side=side)
    np.testing.assert_allclose(traces(model, rows, granularity=granularity), row_traces(model, rows), rtol=1e-9)


def test_opt_with_norms_behind_and_sampled_labels():
    model, rows = opt(do_layer_norm_before=False), batch(lengths=(7, 4, 6))
    np.testing.assert_allclose(traces(model, rows), row_traces(model, rows), rtol=1e-9)
    drawn = next_token_nll.sample(model, rows, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(traces(model, rows, estimator="sampled"), traces(model, drawn), rtol=1e-9)


def in_order(x):
    """What a module gets in place of (rows, tokens, size), and how its output is put back."""
    return x.flatten(0, 1), lambda y: y.view(*x.shape[:2], -1)


def tokens_first(x):
    return x.transpose(0, 1), lambda y: y.transpose(0, 1)


def tokens_first_flat(x):
    return x.transpose(0, 1).flatten(0, 1), lambda y: y.view(x.shape[1], x.shape[0], -1).transpose(0, 1)


def shuffled(x):
    order = torch.randperm(x.shape[0] * x.shape[1], generator=torch.Generator().manual_seed(1))
    return x.flatten(0, 1)[order], lambda y: y[order.argsort()].view(*x.shape[:2], -1)


def hidden_among_rows(x):
    """It looks like (rows, tokens, size), but its first axis is not the rows."""
    return x.transpose(0, 1).reshape(x.shape), lambda y: y.view(x.shape[1], x.shape[0], -1).transpose(0, 1)


@pytest.mark.parametrize("lengths", [(7, 4), (4, 4, 3, 4), (5,)], ids=["2 x 7", "4 x 4", "1 x 5"])
@pytest.mark.parametrize("layout", [in_order, tokens_first, tokens_first_flat, shuffled])
def test_any_order_of_rows_and_tokens_is_exact(layout, lengths):
    model, rows = llama(), batch(lengths=lengths)
    expected = row_traces(model, rows)
    for layer in layers_of(model):
        plain = layer.mlp.forward

        def forward(x, plain=plain):
            inside, back = layout(x)
            return back(plain(inside))

        layer.mlp.forward = forward
    for granularity in ("layer", "parameter"):
        np.testing.assert_allclose(traces(model, rows, granularity=granularity), expected, rtol=1e-9)


@pytest.mark.parametrize("lengths", [(4, 4, 4, 3), (6, 6), (1, 1, 1)], ids=["4 x 4", "rows = heads", "one token"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_as_many_rows_as_tokens_or_heads(family, lengths):
    model, rows = build(family).double(), batch(lengths=lengths)
    calls = []
    handle = layers_of(model)[0].register_forward_hook(lambda *_: calls.append(1))
    found = traces(model, rows)
    handle.remove()
    np.testing.assert_allclose(found, row_traces(model, rows), rtol=1e-6)
    assert len(calls) <= 2  # the batch, and one row to tell the axes; not every row


class Pooled(nn.Module):
    """A gate that sees one vector for each row."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 16)

    def forward(self, x):
        return x * self.gate(x[:, 0])[:, None]


def test_one_vector_a_row():
    model, rows = llama(), batch(lengths=(7, 4))
    layers_of(model)[0].mlp = Pooled().double()
    np.testing.assert_allclose(traces(model, rows), row_traces(model, rows), rtol=1e-9)


def test_ranks_do_not_ask_for_rows():
    flat, rows = llama(), [batch(lengths=(7, 4))]
    expected = kfac_effective_ranks(llama(), rows)
    mlp = layers_of(flat)[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x.flatten(0, 1)).view_as(x)
    found = kfac_effective_ranks(flat, rows)
    np.testing.assert_allclose(found["gradient_rank"], expected["gradient_rank"], rtol=1e-9)


class TokensFirst(nn.Module):
    """A stack that keeps its hidden states as (tokens, rows, size), as XLNet does."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))

    def forward(self, input_ids):
        hidden = self.embedding(input_ids).transpose(0, 1)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden.transpose(0, 1))


@pytest.mark.parametrize("lengths", [(7, 4), (4, 4, 3, 4)], ids=["2 x 7", "4 x 4"])
def test_a_model_of_ones_own_that_puts_tokens_first(lengths):
    torch.manual_seed(0)
    model, rows = TokensFirst().double(), batch(lengths=lengths)

    def loss(model, rows):
        logp = model(rows["input_ids"])[:, :-1].log_softmax(-1)
        nll = -logp.gather(2, rows["input_ids"][:, 1:, None])[..., 0]
        return (nll * rows["attention_mask"][:, 1:]).sum(1)

    expected = []
    for row in loss(model, rows):
        gradients = torch.autograd.grad(row, list(model.layers.parameters()), retain_graph=True)
        expected.append([sum(g.square().sum().item() for g in gradients[i : i + 2]) for i in (0, 2)])
    found = FisherInformationCalculator().calculate(model, [rows], loss).per_example
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    with pytest.raises(LwaError, match="not .rows, tokens, size"):
        block_influence(model, [rows], loss)


def test_an_encoder_that_reads_ahead_is_refused_where_padding_would_count():
    encoder = BertConfig(**SMALL, intermediate_size=24, max_position_embeddings=32)
    with pytest.raises(LwaError, match="BertLMHeadModel is not causal.*is_decoder=True"):
        traces(tiny(encoder), batch(lengths=(7, 4)))
    even = batch(lengths=(5, 5))
    model = tiny(encoder)
    np.testing.assert_allclose(traces(model, even), row_traces(model, even), rtol=1e-9)
    encoder.is_decoder = True
    model, rows = tiny(encoder), batch(lengths=(7, 4), side="left")
    np.testing.assert_allclose(traces(model, rows), row_traces(model, rows), rtol=1e-9)
