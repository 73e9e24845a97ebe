r"""Which examples to mix for each anchor, how similar the anchor is to their mix, and what a pair loss makes of it.

A mix of unit vectors, brought back to length 1, is $v = (\lambda f + (1-\lambda) g) / \|\lambda f + (1-\lambda) g\|$, so its similarity with
an anchor follows from three inner products:

    s(a, v) = (lambda s(a, f) + (1 - lambda) s(a, g)) / sqrt(lambda^2 + (1 - lambda)^2 + 2 lambda (1 - lambda) s(f, g))

No mixed embedding is ever stored.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from coloss.contrastive.labelled_pairs import PairLoss, mean_pair_loss
from coloss.metrics import nearest_neighbours
from coloss.ops import (
    full_precision,
    gather_with_gradient,
    hardest_keys,
    is_distributed,
    rank,
    without_autocast,
)
from coloss.ops.distributed import row_counts
from coloss.ops.pair_sums import pair_scores

MixKind = Literal["pos-neg", "anchor-neg"]
Mix = Callable[[Tensor, Tensor], Tensor]


class AnchoredMixes(NamedTuple):
    """Mixes of two examples for anchors, in order of the anchors.

    Attributes:
        anchor: (mixes,) number of the anchor.
        first: (mixes,) number of the example that counts as a positive of the anchor.
        second: (mixes,) number of the example that counts as a negative.
    """

    anchor: Tensor
    first: Tensor
    second: Tensor


def mixed_pairs(
    labels: Shaped[Tensor, " examples"],
    kind: MixKind = "pos-neg",
    *,
    negatives: Int[Tensor, "anchors candidates"] | None = None,
    anchors: Int[Tensor, " anchors"] | None = None,
    proxy_labels: Shaped[Tensor, " anchors"] | None = None,
    generator: torch.Generator | None = None,
) -> AnchoredMixes:
    """For each anchor and each of its negatives, the two examples to mix.

    `"pos-neg"` mixes the negative with one positive of the anchor, drawn at random for each negative; `"anchor-neg"` with the anchor
    itself. So there are as many mixes as negatives, not as many as positives times negatives. Anchors without a positive have no
    `"pos-neg"` mix.

    Args:
        labels: of the examples.
        kind: see above.
        negatives: numbers of the negatives to mix for each anchor, -1 for none, such as the k hardest from
            `coloss.ops.hardest_keys(..., ids=(labels, labels))[1]`. None takes all.
        anchors: numbers of the examples that are anchors; None: all.
        proxy_labels: where the anchors are proxies, their labels; then they cannot be mixed.
        generator: of the draws of positives; None for torch's global one.

    Returns:
        Numbers of anchors (places in `anchors` or `proxy_labels`) and of examples; empty where no anchor has a mix.

    Raises:
        ValueError: for an unknown kind, `"anchor-neg"` of proxies, both sorts of anchors, or negatives of other anchors.

    Cost:
        A boolean matrix anchors x examples and some numbers for each mix.

    Examples:
        >>> mixes = mixed_pairs(torch.tensor([0, 0, 1]))
        >>> mixes.anchor, mixes.first, mixes.second
        (tensor([0, 1]), tensor([1, 0]), tensor([2, 2]))
    """
    if kind not in ("pos-neg", "anchor-neg"):
        raise ValueError(f'kind must be "pos-neg" or "anchor-neg", got {kind!r}')
    if proxy_labels is not None and (anchors is not None or kind == "anchor-neg"):
        wrong = "anchors" if anchors is not None else "the kind anchor-neg"
        raise ValueError(f"proxy_labels are of anchors that are no examples, got {wrong} too")
    own = torch.arange(len(labels), device=labels.device) if anchors is None else anchors
    of_anchors = labels[own] if proxy_labels is None else proxy_labels
    if negatives is None:
        anchor, second = (of_anchors.unsqueeze(1) != labels.unsqueeze(0)).nonzero(as_tuple=True)
    else:
        if negatives.ndim != 2 or len(negatives) != len(of_anchors):
            raise ValueError(f"negatives must have {len(of_anchors)} rows, got {tuple(negatives.shape)}")
        anchor, place = (negatives >= 0).nonzero(as_tuple=True)
        second = negatives[anchor, place]
    if kind == "anchor-neg":
        return AnchoredMixes(anchor, own[anchor], second)
    _, group = torch.cat([of_anchors, labels]).unique(return_inverse=True)
    group_of_anchor, group_of_example = group[: len(of_anchors)], group[len(of_anchors) :]
    order = group_of_example.argsort(stable=True)
    sizes = torch.bincount(group_of_example, minlength=int(group.max()) + 1 if len(group) else 0)
    starts = sizes.cumsum(0) - sizes
    others = sizes[group_of_anchor] - int(proxy_labels is None)
    kept = others[anchor] > 0
    anchor, second = anchor[kept], second[kept]
    device = "cpu" if generator is None else generator.device
    share = torch.rand(len(anchor), generator=generator, device=device, dtype=torch.float64).to(labels.device)
    drawn = (share * others[anchor]).long()
    if proxy_labels is None:
        # The anchor itself stands among its group, and is stepped over.
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        drawn += drawn >= (place[own] - starts[group_of_anchor])[anchor]
    return AnchoredMixes(anchor, order[starts[group_of_anchor[anchor]] + drawn], second)


def mixed_similarities(
    anchors: Float[Tensor, "anchors dim"],
    examples: Float[Tensor, "examples dim"],
    mixes: AnchoredMixes,
    weight: float | Float[Tensor, " mixes"],
) -> Float[Tensor, " mixes"]:
    """Similarity of each mix of embeddings, brought to length 1, with its anchor.

    Args:
        anchors: unit vectors.
        examples: unit vectors.
        mixes: what is mixed.
        weight: lambda in [0, 1] of the first: one number, or one for each mix.

    Returns:
        One value for each mix. It can be differentiated once.

    Cost:
        O(mixes * dim) time, O(mixes) memory.

    Examples:
        >>> mixes = AnchoredMixes(torch.tensor([0]), torch.tensor([0]), torch.tensor([1]))
        >>> mixed_similarities(torch.eye(2), torch.eye(2), mixes, 0.5)  # at 45 degrees
        tensor([0.7071])
    """

    along = weight * _listed_scores(anchors, examples, mixes.anchor, mixes.first)
    along = along + (1 - weight) * _listed_scores(anchors, examples, mixes.anchor, mixes.second)
    return along / _length(examples, mixes, weight)


def mixed_pair_loss(
    similarities: Float[Tensor, " mixes"],
    anchor: Int[Tensor, " mixes"],
    weight: float | Float[Tensor, " mixes"],
    loss: PairLoss,
    *,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    """What a pair loss makes of mixes that belong to anchors with a weight.

    The mixes may have been made anywhere, such as by a network from mixed inputs.

    Args:
        similarities: of each mix with its anchor.
        anchor: number of each mix's anchor, in rising order.
        weight: lambda in [0, 1], share of the positive in the mix, which is its label.
        loss: which.
        across_processes: average over the anchors of all processes.

    Returns:
        A scalar, at least float32, a mean over the anchors that have a mix; 0 where there is none.

    Examples:
        >>> from coloss.contrastive import contrastive
        >>> similarities, anchor = torch.tensor([0.8, 0.6]), torch.tensor([3, 3])
        >>> loss = mixed_pair_loss(similarities, anchor, 1.0, contrastive())  # as positives: (0.2 + 0.4) / 2
        >>> round(loss.item(), 4)
        0.3
    """
    _, row, sizes = anchor.unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(anchor), device=anchor.device) - (sizes.cumsum(0) - sizes)[row]
    shape = (len(sizes), int(sizes.max()) if len(sizes) else 0)
    values = full_precision(similarities)
    shares = torch.as_tensor(weight, dtype=values.dtype, device=values.device).expand(len(values))
    table = values.new_zeros(shape).index_put((row, place), values)
    labels = values.new_zeros(shape).index_put((row, place), shares)
    mask = torch.zeros(shape, dtype=torch.bool, device=values.device).index_put(
        (row, place), values.new_ones(len(values), dtype=torch.bool)
    )
    return mean_pair_loss(table, labels, mask, loss, across_processes=across_processes)


def metric_mix_loss(
    embeddings: Float[Tensor, "samples dim"],
    labels: Shaped[Tensor, " samples"],
    loss: PairLoss,
    weight: float,
    kind: MixKind = "pos-neg",
    *,
    proxies: Float[Tensor, "classes dim"] | None = None,
    mix: Mix | None = None,
    k_hard: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """A pair loss of mixed examples: the term that Metrix adds to the same loss of the examples themselves.

    Losses with proxies mix examples with examples, never proxies: for a proxy as anchor an example of its class with one of another; where
    the proxies are the others, each example with one of another class, the mix being the anchor.

    Args:
        embeddings: one row for each sample, of any length.
        labels: classes; with proxies numbers in [0, classes).
        loss: which; see `coloss.contrastive.PAIR_LOSSES`.
        weight: lambda in [0, 1], share of the positive in each mix, such as a draw of `coloss.ops.beta_weights`.
        kind: `"pos-neg"` or `"anchor-neg"`, see `mixed_pairs`; with proxies it makes no difference.
        proxies: of the classes, for losses that have them.
        mix: of numbers (mixes,) of first and second examples (of all processes, in the order of ranks) the embeddings (mixes, dim) of
            their mixes, for instance by a network from mixed inputs. None mixes the embeddings and never stores a mix.
        k_hard: mix only so many negatives, those most similar to each anchor, >= 1. None: all, or one at random for each example where
            proxies are the others.
        generator: of the draws; with proxies as anchors it must be equal on all processes.

    Returns:
        A scalar, at least float32; 0 where nothing can be mixed. It can be differentiated once.

    Raises:
        ValueError: for a value out of range, or where proxies and loss do not fit.

    Cost:
        With embeddings O(samples^2 dim) time and O(samples^2) numbers of memory, O(samples k_hard) with `k_hard`; else what `mix` costs.

    Source:
        Venkataramanan et al. 2022, arXiv 2106.04990, section 3.3.

    Examples:
        >>> from coloss.contrastive import contrastive
        >>> loss = metric_mix_loss(torch.eye(3), torch.tensor([0, 0, 1]), contrastive(), 0.5)
        >>> loss.item()  # mixes are orthogonal to their anchors: 0.5 (1 - 0) + 0.5 [0 - 0.5]_+
        0.5
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be in [0, 1], got {weight}")
    if k_hard is not None and k_hard < 1:
        raise ValueError(f"k_hard must be >= 1, got {k_hard}")
    loss.check_proxies(proxies)
    rows = F.normalize(full_precision(embeddings), dim=1)
    examples, classes = gather_with_gradient(rows), gather_with_gradient(labels)
    first_row = sum(row_counts(rows)[: rank()]) if is_distributed() else 0
    numbers = torch.arange(first_row, first_row + len(rows), device=labels.device)
    if proxies is None or loss.proxies == "others":
        centres, of_centres = rows, labels
    else:
        centres = F.normalize(full_precision(proxies), dim=1).to(rows.dtype)
        of_centres = torch.arange(len(centres), device=labels.device)
    negatives = None
    if k_hard is not None:
        _, negatives = hardest_keys(centres, rows, k_hard, ids=(of_centres, labels))
    elif loss.proxies == "others":
        negatives = _random_negatives(labels, classes, generator)
    if loss.proxies == "anchors":
        mixes = mixed_pairs(classes, negatives=negatives, proxy_labels=of_centres, generator=generator)
    else:
        kind = "anchor-neg" if loss.proxies == "others" else kind
        mixes = mixed_pairs(classes, kind, negatives=negatives, anchors=numbers, generator=generator)
    made = None
    if mix is not None and len(mixes.first):
        made = F.normalize(full_precision(mix(mixes.first, mixes.second)), dim=1).to(rows.dtype)
    if loss.proxies == "others":
        assert proxies is not None
        return _mixes_among_proxies(examples, classes, mixes, made, weight, loss, proxies)
    if made is None:
        similarities = mixed_similarities(centres, examples, mixes, weight)
    else:
        similarities = (centres[mixes.anchor] * made).sum(1)
    # Proxies are the same anchors on every process.
    return mixed_pair_loss(similarities, mixes.anchor, weight, loss, across_processes=loss.proxies is None)


def utilization(
    queries: Float[Tensor, "queries dim"], base: Float[Tensor, "base dim"], *, normalize: bool = True
) -> float:
    """How much of the space of some embeddings is left uncovered by others: the mean squared distance to the nearest of them.

    With embeddings of unseen classes as queries and of the training data as base, lower means that training covers more of where
    unseen classes lie. It says nothing on whether classes are told apart.

    Args:
        queries: finite, at least one row.
        base: finite, at least one row.
        normalize: bring rows to length 1 before; the value then lies in [0, 4].

    Returns:
        A number >= 0; 0 if each query is a row of the base.

    Raises:
        ValueError: if shapes disagree, a value is not finite, or there is no row.

    Cost:
        As `coloss.metrics.nearest_neighbours` for one neighbour: never all pairs at once.

    Source:
        Venkataramanan et al. 2022, arXiv 2106.04990, section 4.4.

    Examples:
        >>> round(utilization(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0]])), 4)
        1.0
    """
    if not len(queries) or not len(base):
        raise ValueError(f"queries and base must have rows, got {len(queries)} and {len(base)}")
    if normalize:
        queries, base = (F.normalize(full_precision(rows), dim=1) for rows in (queries, base))
    distances = nearest_neighbours(queries.detach(), base.detach(), 1, metric="euclidean").values
    return float(distances.square().mean())


def _mixes_among_proxies(
    examples: Tensor,
    classes: Tensor,
    mixes: AnchoredMixes,
    made: Tensor | None,
    weight: float,
    loss: PairLoss,
    proxies: Tensor,
) -> Tensor:
    """Each mix is an anchor, and has two proxies that are positives in part."""
    centres = F.normalize(full_precision(proxies), dim=1).to(examples.dtype)
    with without_autocast(examples.device):
        if made is not None:
            similarities = made @ centres.T
        else:
            scores = examples @ centres.T
            along = weight * scores[mixes.first] + (1 - weight) * scores[mixes.second]
            similarities = along / _length(examples, mixes, weight).unsqueeze(1)
    labels = torch.zeros_like(similarities)
    row = torch.arange(len(labels), device=labels.device)
    labels[row, classes[mixes.first]] += weight
    labels[row, classes[mixes.second]] += 1 - weight
    return mean_pair_loss(similarities, labels.clamp(max=1), torch.ones_like(labels, dtype=torch.bool), loss)


def _length(examples: Tensor, mixes: AnchoredMixes, weight: float | Tensor) -> Tensor:
    """Length of each mix of unit vectors."""
    cross = _listed_scores(examples, examples, mixes.first, mixes.second)
    squared = weight**2 + (1 - weight) ** 2 + 2 * weight * (1 - weight) * cross
    # Opposite vectors at weight 1/2 leave nothing to bring to length 1.
    return squared.clamp(min=1e-6).sqrt()


def _listed_scores(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Inner products of listed rows; of a matrix of all where that is hardly larger than the list, for it is quicker."""
    if len(x) * len(y) > 4 * len(rows):
        return pair_scores(x, y, torch.stack([rows, columns]), False)
    with without_autocast(x.device):
        return (x @ y.T)[rows, columns]


def _random_negatives(labels: Tensor, classes: Tensor, generator: torch.Generator | None) -> Tensor:
    """(rows, 1) number of one example of another class for each row, -1 where there is none."""
    apart = labels.unsqueeze(1) != classes.unsqueeze(0)
    device = "cpu" if generator is None else generator.device
    draws = torch.rand(apart.shape, generator=generator, device=device).to(labels.device)
    best, number = draws.masked_fill(~apart, -1.0).max(1, keepdim=True)
    return number.masked_fill(best < 0, -1)
