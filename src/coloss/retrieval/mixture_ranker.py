"""A click ranker whose experts are mixed for each user by a gate that reads the user's history.

    h_u  = sum_j a(e_j, e_t) e_j                 a = MLP([e_j, e_t, e_j - e_t, e_j * e_t]), no softmax
    x    = [h_u, e_t]                            input of the experts
    G    = sum_j w(e_j, e_t) g(e_j, e_t)         g: K preferences over experts, w: one activation, each an MLP of [e_j, e_t]
    logit = sum_k G_k E_k(x)

for a history of items with embeddings e_j and a candidate item e_t. Names after "Attention Weighted Mixture of Experts with Contrastive
Learning for Personalized Ranking in E-commerce", JD.com 2023, arXiv 2306.05011; the wiring is reconstructed from its abstract and
from DIN (Zhou et al. 2018, arXiv 1706.06978), not copied from equations of the paper. The vector for empty histories and the scaling of G
are additions.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.nn import MLP
from coloss.ops import entropy

Scaling = Literal["none", "length", "weights"]


class EmbeddedHistory(NamedTuple):
    """What a ranker's parts read.

    Attributes:
        history: (batch, positions, dim), embeddings of what a user did.
        context: (batch, dim), embedding of the candidate, or of the query.
        mask: (batch, positions), False for padding.
    """

    history: Tensor
    context: Tensor
    mask: Tensor


class TargetAttention(nn.Module):
    """The part of a history that matters for a candidate: each item weighted by a small network that sees both.

    The weights are not normalised, so their sum tells how much of the history fits.

    Args:
        dim: size of an embedding.
        hidden: widths of the weighing network.

    Returns:
        From `forward(history, context, mask)`: (batch, dim), zero for an empty history.

    Cost:
        O(batch * positions * dim * width) time.

    Source:
        Zhou et al. 2018 (DIN), arXiv 1706.06978, section 4.3.

    Examples:
        >>> history, mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
        >>> TargetAttention(8)(history, torch.randn(2, 8), mask).shape
        torch.Size([2, 8])
    """

    def __init__(self, dim: int, hidden: Sequence[int] = (16,)) -> None:
        super().__init__()
        self.weigh = MLP(4 * dim, hidden, 1, norm=None)

    def forward(
        self,
        history: Float[Tensor, "batch positions dim"],
        context: Float[Tensor, "batch dim"],
        mask: Bool[Tensor, "batch positions"],
    ) -> Float[Tensor, "batch dim"]:
        target = context.unsqueeze(1).expand_as(history)
        pairs = torch.cat([history, target, history - target, history * target], dim=2)
        weights = self.weigh(pairs.flatten(0, 1)).view(mask.shape).masked_fill(~mask, 0.0)
        return (weights.unsqueeze(2) * history.masked_fill(~mask.unsqueeze(2), 0.0)).sum(1)


class AttentionWeightedGate(nn.Module):
    """Weights of the experts for one user and one candidate, summed over what the user did.

    G = s * sum_j w_j g_j with g_j the preferences of behaviour j over the experts and w_j how much it counts for the candidate. The
    order of the history does not matter. Weights may have any sign and need not sum to 1.

    Args:
        dim: size of an embedding.
        num_experts: K.
        hidden: widths of the two networks.
        scaling: s. `"none"` is the plain sum, which grows with the history and saturates the click probability of busy users;
            `"length"` divides by the square root of the number of behaviours; `"weights"` by the sum of |w_j|, so that no element
            exceeds the largest preference.

    Attributes:
        default: (K), learned, the weights for an empty history; 1 / K at first.

    Returns:
        From `forward(history, context, mask)`: (batch, K), at least float32.

    Raises:
        ValueError: for fewer than one expert, or an unknown scaling.

    Source:
        JD.com 2023, arXiv 2306.05011, reconstructed.

    Examples:
        >>> gate = AttentionWeightedGate(8, num_experts=4)
        >>> nothing = torch.zeros(2, 5, dtype=torch.bool)
        >>> gate(torch.randn(2, 5, 8), torch.randn(2, 8), nothing)[0].tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    def __init__(
        self, dim: int, num_experts: int, hidden: Sequence[int] = (16,), scaling: Scaling = "length"
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts must be >= 1, got {num_experts}")
        if scaling not in ("none", "length", "weights"):
            raise ValueError(f'scaling must be "none", "length" or "weights", got {scaling!r}')
        self.prefer = MLP(2 * dim, hidden, num_experts, norm=None)
        self.activate = MLP(2 * dim, hidden, 1, norm=None)
        self.default = nn.Parameter(torch.full((num_experts,), 1.0 / num_experts))
        # At first every behaviour counts, for all experts alike; sums that begin near 0 learn slowly, and their direction means nothing.
        with torch.no_grad():
            for network, value in ((self.prefer, 1.0 / num_experts), (self.activate, 1.0)):
                nn.init.constant_(network.layers[-1].bias, value)  # type: ignore[union-attr, arg-type]
        self.scaling = scaling

    def forward(
        self,
        history: Float[Tensor, "batch positions dim"],
        context: Float[Tensor, "batch dim"],
        mask: Bool[Tensor, "batch positions"],
    ) -> Float[Tensor, "batch experts"]:
        pairs = torch.cat([history, context.unsqueeze(1).expand_as(history)], dim=2)
        # Padding must neither count nor leave a gradient, whatever stands there.
        rows = pairs.masked_fill(~mask.unsqueeze(2), 0.0).flatten(0, 1)
        preferences = self.prefer(rows).view(*mask.shape, -1).float()
        weights = self.activate(rows).view(mask.shape).float().masked_fill(~mask, 0.0)
        gates = (weights.unsqueeze(2) * preferences).sum(1)
        count = mask.sum(1, keepdim=True)
        if self.scaling == "length":
            gates = gates / count.clamp(min=1).sqrt()
        elif self.scaling == "weights":
            total = weights.abs().sum(1, keepdim=True)
            gates = gates / total.masked_fill(total == 0, 1.0)
        return torch.where(count > 0, gates, self.default.to(gates))


class HistoryInput(nn.Module):
    """Embeds histories and candidates of items, and makes of them what experts read: the attended history beside the candidate.

    Args:
        num_items: items are 1 .. num_items; 0 is padding.
        dim: of an item's embedding.
        hidden: widths of the attention's network.

    Attributes:
        out_features: 2 * dim.

    Returns:
        From `embed(inputs)`, for (histories (batch, positions), items (batch)): `EmbeddedHistory`. From `forward` of that: features.

    Examples:
        >>> network = HistoryInput(num_items=9, dim=4)
        >>> embedded = network.embed((torch.tensor([[0, 3, 7]]), torch.tensor([5])))
        >>> embedded.mask.tolist(), network(embedded).shape
        ([[False, True, True]], torch.Size([1, 8]))
    """

    def __init__(self, num_items: int, dim: int = 16, hidden: Sequence[int] = (16,)) -> None:
        super().__init__()
        if num_items < 1:
            raise ValueError(f"num_items must be >= 1, got {num_items}")
        self.embedding = nn.Embedding(num_items + 1, dim, padding_idx=0)
        nn.init.normal_(self.embedding.weight[1:], std=dim**-0.5)
        self.attention = TargetAttention(dim, hidden)
        self.out_features = 2 * dim

    def embed(self, inputs: Sequence[Tensor]) -> EmbeddedHistory:
        histories, items = inputs
        return EmbeddedHistory(self.embedding(histories), self.embedding(items), histories > 0)

    def forward(self, embedded: EmbeddedHistory) -> Float[Tensor, "batch features"]:
        return torch.cat([self.attention(*embedded), embedded.context], dim=1)


class MixtureRanker(nn.Module):
    """Adds up the logits of several experts, weighted for each user by a gate.

    Args:
        input_net: has `embed(inputs)`, an `EmbeddedHistory`, and makes features of it when called, such as `HistoryInput`.
        experts: each gives one logit (batch, 1) for the features.
        gate: gives (batch, experts) for an `EmbeddedHistory`'s parts, such as `AttentionWeightedGate`; None counts each expert once.

    Attributes:
        gate_output: (batch, experts) of the last forward pass, without gradient; None without a gate. Its gradient is had by a tap on
            `gate`.

    Returns:
        From `forward(inputs)`: logits (batch), for `binary_cross_entropy_with_logits`.

    Raises:
        ValueError: for no experts.

    Examples:
        >>> network = HistoryInput(num_items=9, dim=4)
        >>> experts = [MLP(8, [16], 1, norm=None) for _ in range(3)]
        >>> ranker = MixtureRanker(network, experts, AttentionWeightedGate(4, 3))
        >>> inputs = torch.tensor([[0, 3, 7], [0, 0, 0]]), torch.tensor([5, 2])
        >>> ranker(inputs).shape, torch.equal(ranker.gate_output, ranker.gate_vector(inputs))
        (torch.Size([2]), True)
    """

    gate_output: Tensor | None

    def __init__(
        self, input_net: nn.Module, experts: Sequence[nn.Module], gate: nn.Module | None = None
    ) -> None:
        super().__init__()
        if not experts:
            raise ValueError("experts must hold at least one module, got none")
        self.input_net, self.gate = input_net, gate
        self.experts = nn.ModuleList(experts)
        self.gate_output = None

    def gate_vector(self, inputs: Any) -> Float[Tensor, "batch experts"]:
        """What the gate gives for some inputs; the experts do not run.

        Raises:
            InputError: if there is no gate.
        """
        if self.gate is None:
            raise InputError("the ranker has no gate: give gate=AttentionWeightedGate(...)")
        return self.gate(*self.input_net.embed(inputs))  # type: ignore[operator]

    def forward(self, inputs: Any) -> Float[Tensor, " batch"]:
        embedded = self.input_net.embed(inputs)  # type: ignore[operator]
        features = self.input_net(embedded)
        logits = torch.cat([expert(features) for expert in self.experts], dim=1)
        if self.gate is None:
            return logits.sum(1)
        gates = self.gate(*embedded)
        self.gate_output = gates.detach()
        return (gates * logits).sum(1)


def small_mixture_ranker(
    num_items: int,
    dim: int = 16,
    num_experts: int = 4,
    *,
    hidden: Sequence[int] = (32,),
    scaling: Scaling = "length",
) -> MixtureRanker:
    """A small ranker of items by a user's history, made of the parts in this module.

    Args:
        num_items: items are 1 .. num_items.
        dim: of an item's embedding.
        num_experts: K; 1 makes one tower without a gate.
        hidden: widths of each expert.
        scaling: as for `AttentionWeightedGate`.

    Examples:
        >>> small_mixture_ranker(20, num_experts=1).gate is None, len(small_mixture_ranker(20).experts)
        (True, 4)
    """
    if num_experts < 1:
        raise ValueError(f"num_experts must be >= 1, got {num_experts}")
    network = HistoryInput(num_items, dim)
    experts = [MLP(network.out_features, hidden, 1, norm=None) for _ in range(num_experts)]
    gate = AttentionWeightedGate(dim, num_experts, scaling=scaling) if num_experts > 1 else None
    return MixtureRanker(network, experts, gate)


def expert_load(gates: Float[Tensor, "batch experts"]) -> tuple[Float[Tensor, " experts"], float]:
    """How the experts share the work: the mean share of |G| of each, and the entropy of these shares over its maximum, log K.

    Args:
        gates: from `AttentionWeightedGate`; rows of zeros are left out.

    Returns:
        Shares, which sum to 1 (all alike for no rows), and a balance in [0, 1], 0 where one expert does everything; 1 for one expert.

    Examples:
        >>> shares, balance = expert_load(torch.tensor([[3.0, -1.0], [0.0, 0.0]]))
        >>> shares.tolist(), round(balance, 3)
        ([0.75, 0.25], 0.811)
    """
    size = gates.detach().float().abs()
    size = size[size.sum(1) > 0]
    experts = gates.shape[1]
    shares = F.normalize(size, p=1, dim=1).mean(0) if len(size) else size.new_full((experts,), 1 / experts)
    balance = float(entropy(shares.log())) / math.log(experts) if experts > 1 else 1.0
    return shares, balance
