"""Gates and experts: limits where the mixture is one tower, invariances of the gate, and the growth with the history."""

import copy
import math

import pytest
import torch
from torch import nn

from coloss.errors import InputError
from coloss.nn import MLP
from coloss.retrieval import (
    AttentionWeightedGate,
    HistoryInput,
    MixtureRanker,
    TargetAttention,
    expert_load,
    small_mixture_ranker,
)

HISTORIES = torch.tensor([[0, 0, 3, 7], [5, 2, 9, 1], [0, 0, 0, 0]])
ITEMS = torch.tensor([4, 8, 6])


class Ones(nn.Module):
    def forward(self, history, context, mask):
        return history.new_ones(len(history), 1)


def test_one_expert_with_a_constant_gate_is_the_single_tower():
    network, expert = HistoryInput(9, 4), MLP(8, (6,), 1, norm=None)
    mixed, alone = MixtureRanker(network, [expert], Ones()), MixtureRanker(network, [expert])
    inputs = HISTORIES, ITEMS
    assert torch.equal(mixed(inputs), alone(inputs))
    features = torch.cat([network.attention(*network.embed(inputs)), network.embedding(ITEMS)], dim=1)
    torch.testing.assert_close(alone(inputs), expert(features).squeeze(1))
    assert alone.gate_output is None and torch.equal(mixed.gate_output, torch.ones(3, 1))


def test_the_score_is_the_weighted_sum_of_the_experts():
    ranker = small_mixture_ranker(9, dim=4, num_experts=3)
    embedded = ranker.input_net.embed((HISTORIES, ITEMS))
    outputs = torch.stack([expert(ranker.input_net(embedded)).squeeze(1) for expert in ranker.experts], dim=1)
    expected = sum(ranker.gate(*embedded)[:, k] * outputs[:, k] for k in range(3))
    torch.testing.assert_close(ranker((HISTORIES, ITEMS)), expected)
    assert not ranker.gate_output.requires_grad
    copy.deepcopy(ranker)  # nothing of the graph is left on it


def test_attention_is_the_weighted_sum_written_out():
    attention, history, context = TargetAttention(3), torch.randn(2, 4, 3), torch.randn(2, 3)
    mask = torch.tensor([[True, True, False, True], [False, False, False, False]])
    found = attention(history, context, mask)
    expected = torch.zeros(3)
    for j in (0, 1, 3):
        one, target = history[0, j], context[0]
        weight = attention.weigh(torch.cat([one, target, one - target, one * target])[None])[0, 0]
        expected = expected + weight * one
    torch.testing.assert_close(found[0], expected)
    assert torch.equal(found[1], torch.zeros(3))


@pytest.mark.parametrize("scaling", ["none", "length", "weights"])
def test_the_gate_knows_neither_order_nor_padding(scaling):
    gate = AttentionWeightedGate(5, 3, scaling=scaling)
    history, context = torch.randn(2, 4, 5), torch.randn(2, 5)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    found = gate(history, context, mask)
    shuffled = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(gate(history[:, shuffled], context, mask[:, shuffled]), found)
    longer = torch.cat([torch.full((2, 3, 5), math.nan), history], dim=1)
    wider = torch.cat([torch.zeros(2, 3, dtype=torch.bool), mask], dim=1)
    torch.testing.assert_close(gate(longer, context, wider), found)


def test_what_stands_in_padding_leaves_no_gradient():
    gate = AttentionWeightedGate(5, 3)
    history = torch.randn(1, 3, 5)
    history[0, 0] = math.inf
    history.requires_grad_()
    gate(history, torch.randn(1, 5), torch.tensor([[False, True, True]])).sum().backward()
    assert history.grad.isfinite().all() and not history.grad[0, 0].any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in gate.parameters())


def test_an_empty_history_has_a_learned_gate_of_its_own():
    gate = AttentionWeightedGate(5, 4)
    found = gate(torch.randn(2, 3, 5), torch.randn(2, 5), torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(found, torch.full((2, 4), 0.25))
    found.sum().backward()
    assert torch.equal(gate.default.grad, torch.full((4,), 2.0))


@pytest.mark.parametrize(("scaling", "growth"), [("none", 200.0), ("length", 200**0.5), ("weights", 1.0)])
def test_growth_with_the_length_of_the_history(scaling, growth):
    """The same behaviour once and 200 times: the plain sum grows with the length and saturates the probability."""
    gate = AttentionWeightedGate(5, 3, scaling=scaling)
    history, context = torch.randn(1, 1, 5), torch.randn(1, 5)
    once = gate(history, context, torch.ones(1, 1, dtype=torch.bool))
    often = gate(history.expand(1, 200, 5), context, torch.ones(1, 200, dtype=torch.bool))
    torch.testing.assert_close(often, once * growth, rtol=1e-4, atol=1e-5)


def test_scaled_by_weights_no_element_exceeds_the_largest_preference():
    gate = AttentionWeightedGate(5, 3, scaling="weights")
    history, context = 10 * torch.randn(4, 7, 5), torch.randn(4, 5)
    found = gate(history, context, torch.ones(4, 7, dtype=torch.bool))
    pairs = torch.cat([history, context[:, None].expand_as(history)], dim=2).flatten(0, 1)
    assert (found.abs() <= gate.prefer(pairs).view(4, 7, 3).abs().amax(1) + 1e-5).all()
    with torch.no_grad():
        for part in gate.activate.parameters():
            part.zero_()
    assert not gate(history, context, torch.ones(4, 7, dtype=torch.bool)).any()  # nothing counts: 0, not NaN


def test_under_autocast_the_gate_is_summed_in_float32():
    ranker = small_mixture_ranker(9, dim=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gates = ranker.gate_vector((HISTORIES, ITEMS))
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates, ranker.gate_vector((HISTORIES, ITEMS)), rtol=0.03, atol=0.02)


def test_load_of_the_experts():
    shares, balance = expert_load(torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    assert shares.tolist() == [0.25, 0.75, 0.0]
    assert balance == pytest.approx((0.25 * math.log(4) + 0.75 * math.log(4 / 3)) / math.log(3))
    assert expert_load(torch.tensor([[5.0, 0.0]]))[1] == 0.0
    assert expert_load(torch.ones(2, 1))[1] == 1.0
    assert expert_load(torch.zeros(0, 2))[0].tolist() == [0.5, 0.5]


def test_bad_input_is_refused(as_users_call):
    for call, message in (
        (lambda: AttentionWeightedGate(4, 0), "num_experts must be >= 1, got 0"),
        (
            lambda: AttentionWeightedGate(4, 2, scaling="mean"),
            'scaling must be "none", "length" or "weights"',
        ),
        (lambda: HistoryInput(0), "num_items must be >= 1, got 0"),
        (lambda: MixtureRanker(HistoryInput(3), []), "experts must hold at least one module, got none"),
        (lambda: small_mixture_ranker(3, num_experts=0), "num_experts must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(InputError, match="the ranker has no gate"):
        small_mixture_ranker(9, num_experts=1).gate_vector((HISTORIES, ITEMS))
