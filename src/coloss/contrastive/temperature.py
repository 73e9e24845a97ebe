r"""Says what a contrastive temperature does to a batch, and offers a hard form of the loss that depends on it less.

Understanding the behaviour of contrastive loss: Wang, Liu, CVPR 2021, arXiv 2012.09740. With unit embeddings, s_ij the similarity of query
i and candidate j, candidate i the positive, and P the softmax of s_i. / tau over all candidates:

    L_i = -log P_ii                       d L_i / d s_ii = -(1 / tau) sum_{j != i} P_ij          the pull on the positive
                                          d L_i / d s_ij =  (1 / tau) P_ij                       the push on a negative: both are equal
    r_ij = exp(s_ij / tau) / sum_{k != i} exp(s_ik / tau)            share of the push that falls on negative j (`negative_weights`)
    exp(- sum_j r_ij log r_ij)                                       how many negatives that amounts to (`effective_negatives`)

    tau -> 0          tau L_i -> max(0, max_k s_ik - s_ii): the nearest negative alone counts
    tau -> infinity   L_i -> log N + (mean_k s_ik - s_ii) / tau: all count alike (`simple_contrastive_loss`)

A low temperature spreads embeddings evenly, by pushing away what is nearest; among that are samples of the same class. A high one keeps
these together and separates less. In numbers (`coloss.metrics`): `uniformity`, the log of the mean Gaussian potential, 0 for one point
and lower for more even (the paper turns its sign); `tolerance`, the mean similarity within a class; the "false-negative pressure", the
sum of r_ij over negatives j of the class of i.

`temperature_report` gives all of them for a batch at a list of temperatures, as table and plot, with a recommendation and its reason;
`EmbeddingMonitor` logs them while a network trains. `hard_info_nce_loss` and `hard_supervised_contrastive_loss` of `coloss.ops`, and
`NTXent(hard_share=...)`, keep of each query's negatives the K nearest only: at a high temperature that brings back the
separation that uniform weights lose.

    L_hard,i = -log [ exp(s_ii / tau) / (exp(s_ii / tau) + sum over the K largest s_ik of exp(s_ik / tau)) ]

Every form compares with the negatives of all processes, and gives one process's loss on the joined batch; gradient accumulation joins
its micro-batches.

When it helps: to choose a temperature before a long run, and to see why one does badly. On 1,200 digits (150 steps, five seeds), from
0.07 over 0.3 to 1, the embeddings of test images became less even (uniformity -3.03, -2.90, -2.37) and more tolerant (.53, .62, .79) in
every seed. With the nearest 10 % of negatives alone, after a warm-up, the run at 1 was nearly as even as that at 0.3 (-2.86, tolerance
.59). The simple loss was the least even of all (-1.75).

When not: to gain accuracy where views are easy. There the probes hardly told the temperatures apart (5-NN .914, .917, .915; linear .925,
.935, .937), the hard loss lost a little (.908, .929), and only the simple loss was clearly worse (.879, .914). With strong views
the hard loss is of no use: the nearest negatives are then more alike than two views of one image, it falls when all embeddings draw
together, and without a safeguard they do. A warm-up alone only puts that off: in a trial on digits with occluded views (share 10 %, 200
steps, one seed) uniformity ended at -0.1 after a warm-up of 30 %. The safeguard of `NTXent` then keeps the plain loss. Values of
the loss at different temperatures cannot be compared, and 1 / tau scales gradients: `NTXent(scale_by_temperature=True)` takes that off.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coloss.contrastive.temperature_trial import compare_temperatures
from coloss.ops import full_precision
from coloss.train import Budget, Claim, System
from coloss.train.encoder_task import digits_encoder_task


def negative_weights(
    similarities: Float[Tensor, "queries candidates"],
    temperature: float | Float[Tensor, "*temperatures"],
    positives: Bool[Tensor, "queries candidates"],
) -> Float[Tensor, "queries candidates"]:
    r"""Share of a query's push on its negatives that falls on each: what the gradient of a softmax loss weighs them by.

    $r_{ij} = e^{s_{ij}/\tau} / \sum_{k \in N_i} e^{s_{ik}/\tau}$ with $N_i$ the candidates of query $i$ that are no positives. It is the size of
    the gradient by $s_{ij}$ over that by the positive's similarity, and does not depend on the positive.

    Args:
        similarities: $s_{ij}$.
        temperature: $\tau > 0$: a number, a scalar tensor, or one value for each query.
        positives: True where a candidate is no negative: the positive, the query itself, what is to be left out.

    Returns:
        At least float32; rows sum to 1. 0 for positives, and throughout a row without negatives.

    Raises:
        ValueError: if shapes disagree, or a temperature is not above 0.

    Source:
        Wang and Liu 2021, arXiv 2012.09740, section 3.2 (relative penalty).

    Examples:
        >>> similarities = torch.tensor([[1.0, 0.5, 0.0]])
        >>> negative_weights(similarities, 0.5, torch.tensor([[True, False, False]]))
        tensor([[0.0000, 0.7311, 0.2689]])
    """
    if positives.shape != similarities.shape:
        raise ValueError(
            f"positives must have shape {tuple(similarities.shape)}, got {tuple(positives.shape)}"
        )
    if isinstance(temperature, Tensor):
        if temperature.ndim and temperature.shape != similarities.shape[:1]:
            raise ValueError(
                f"temperature must be a scalar or have shape ({len(similarities)},), got shape {tuple(temperature.shape)}"
            )
        if not bool((temperature > 0).all()):
            raise ValueError(f"temperature must be > 0, got {temperature.min().item()}")
        temperature = temperature.unsqueeze(1) if temperature.ndim else temperature
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    logits = (full_precision(similarities) / temperature).masked_fill(positives, -math.inf)
    empty = positives.all(1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(1).masked_fill(positives, 0.0)


def weight_entropy(weights: Float[Tensor, "queries candidates"]) -> Float[Tensor, " queries"]:
    r"""How evenly each query's push is spread over its negatives, in nats.

    $H_i = -\sum_j r_{ij} \log r_{ij}$: 0 where one negative gets all of it, $\log N$ where $N$ share it alike. It rises with the temperature,
    unless all similarities are equal.

    Args:
        weights: $r_{ij}$ from `negative_weights`.

    Returns:
        One value for each query, at least float32; 0 without negatives.

    Source:
        Wang and Liu 2021, arXiv 2012.09740, section 3.2.

    Examples:
        >>> weight_entropy(torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]))
        tensor([0.6931, 0.0000])
    """
    return torch.special.entr(full_precision(weights)).sum(1)


def effective_negatives(weights: Float[Tensor, "queries candidates"]) -> Float[Tensor, " queries"]:
    r"""The number of equally weighted negatives that would be weighed as unevenly as these: $e^{H_i}$.

    Args:
        weights: $r_{ij}$ from `negative_weights`.

    Returns:
        One value for each query, between 1 and its number of negatives; 0 without negatives.

    Examples:
        >>> effective_negatives(torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]))
        tensor([2., 1.])
    """
    count = weight_entropy(weights).exp()
    return torch.where((weights > 0).any(1), count, 0.0)


SYSTEM = System(
    slug="contrastive-temperature",
    title="Understanding the Behaviour of Contrastive Loss",
    paper="Wang, Liu, 2021, arXiv 2012.09740",
    family="contrastive",
    acts_on=("loss", "evaluation"),
    api=(
        "coloss.contrastive.temperature_report",
        "coloss.contrastive.EmbeddingMonitor",
        "coloss.contrastive.negative_weights",
        "coloss.contrastive.weight_entropy",
        "coloss.contrastive.effective_negatives",
        "coloss.contrastive.simple_contrastive_loss",
        "coloss.contrastive.nt_xent_loss",
        "coloss.ops.hard_info_nce_loss",
        "coloss.ops.hard_supervised_contrastive_loss",
        "coloss.ops.hardest_keys",
        "coloss.ops.hardest_scores",
    ),
    method="coloss.contrastive.NTXent",
    kinds=("self-supervised", "classification"),
)

CLAIM = Claim(
    statement="Raising NT-Xent's temperature from 0.07 over 0.3 to 1 makes the embeddings of 597 test digits less uniform and more tolerant "
    "each time: the smallest of these four changes, in the predicted direction, is above 0.",
    metric="least_change",
    baseline="no effect",
    method="rising temperature",
    task=digits_encoder_task(Budget(steps=150)),
    trial=compare_temperatures,
)
