r"""Losses that bring a student's inner features to a teacher's, or the relations among samples that the features express.

Everywhere `student` is the side that learns; the teacher's features are not detached here. Samples are the first dimension and, where
channels matter, channels the second: maps are (batch, channels, height, width), series (batch, channels, steps). What each compares:

| function | compares | widths may differ | positions may differ | of the batch as a whole |
|---|---|---|---|---|
| `hint_loss` | every number | no | no | no |
| `variational_information_loss` | every number, each channel with a learned tolerance | no | no | no |
| `attention_transfer_loss` | where a map is large | yes | yes | no |
| `similarity_preserving_loss` | cosines between samples | yes | yes | yes |
| `rkd_distance_loss`, `rkd_angle_loss` | distances between two samples, angles among three | yes | yes | yes |

Half precision is computed in float32. `hint_loss` and `variational_information_loss` measure in the features' own units, and overflow where
a squared difference does. The others divide scales out before anything is squared, so that neither very large nor very small features leave
the range. What is not finite stays so and shows in the loss. An empty batch costs 0.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .gradients import first_order_only
from .latent_prediction import latent_prediction_loss
from .precision import accumulation_dtype, full_precision, without_autocast

# Angles that are in memory at a time: few enough for a processor's cache, or many to keep an accelerator busy.
_ON_CPU, _ELSEWHERE = 1 << 16, 1 << 24
# Squared distances below this share of the squared sizes are rounding errors of the Gram matrix: the samples coincide.
_COINCIDE = {torch.float64: 1e-12, torch.float32: 1e-5}
# Smallest tolerated variance of a channel.
_LEAST_VARIANCE = 1e-5


def hint_loss(
    student: Float[Tensor, "batch *features"], teacher: Float[Tensor, "batch *features"]
) -> Float[Tensor, ""]:
    """Mean squared difference of two features of one shape: the hint of FitNets.

    Where widths or positions differ, a `coloss.nn.ShapeAdapter` that learns with the student brings its features to the teacher's shape.

    Args:
        student: features of the network that learns.
        teacher: features to match.

    Returns:
        A scalar >= 0, at least float32.

    Raises:
        ValueError: for shapes that differ.

    Source:
        Romero et al. 2015, arXiv 1412.6550, section 2.2 (there half the sum over features, here their mean).

    Examples:
        >>> hint_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        tensor(2.)
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}: "
            "bring them to one with coloss.nn.ShapeAdapter"
        )
    return latent_prediction_loss(_rows(student), _rows(teacher), "mse")


def variational_information_loss(
    prediction: Float[Tensor, "batch channels *space"],
    teacher: Float[Tensor, "batch channels *space"],
    raw_variance: Float[Tensor, " channels"],
) -> Float[Tensor, ""]:
    r"""Squared difference in which each channel has a tolerance of its own, that is learned: variational information distillation.

    $\frac12 \left( \frac{(t_c - \mu_c)^2}{\sigma_c^2} + \log \sigma_c^2 \right)$, averaged over samples, channels and positions, with
    $\sigma_c^2 = \mathrm{softplus}(\alpha_c) + 10^{-5}$: up to a constant, how unlikely the teacher's features are under a Gaussian
    around the student's prediction. Channels that the student cannot predict get a large variance, and stop to matter. It may be negative.

    Args:
        prediction: $\mu$, the student's features, brought to the teacher's shape.
        teacher: $t$, features to match.
        raw_variance: $\alpha$, a parameter that learns with the student.

    Returns:
        A scalar, at least float32.

    Raises:
        ValueError: for shapes that differ.

    Source:
        Ahn et al. 2019, arXiv 1904.05835, equation 5.

    Examples:
        >>> teacher, wide = torch.full((1, 1), 3.0), torch.tensor([9.0])
        >>> gap = lambda raw: variational_information_loss(torch.zeros(1, 1), teacher, raw).item()
        >>> gap(wide) < gap(torch.zeros(1))
        True
    """
    if prediction.shape != teacher.shape or raw_variance.shape != prediction.shape[1:2]:
        raise ValueError(
            "prediction and teacher must have one shape and raw_variance one number for each channel, got "
            f"{tuple(prediction.shape)}, {tuple(teacher.shape)} and {tuple(raw_variance.shape)}"
        )
    prediction, teacher = full_precision(prediction), full_precision(teacher)
    variance = F.softplus(full_precision(raw_variance)) + _LEAST_VARIANCE
    variance = variance.view(-1, *[1] * (prediction.ndim - 2))
    costs = ((teacher - prediction).square() / variance + variance.log()) / 2
    return costs.sum() / max(costs.numel(), 1)


def attention_transfer_loss(
    student: Float[Tensor, "batch student_channels *student_space"],
    teacher: Float[Tensor, "batch teacher_channels *teacher_space"],
) -> Float[Tensor, ""]:
    r"""How much the places at which two maps are large differ, whatever their channels.

    $\frac1B \sum_b \left\| \frac{q^s_b}{\|q^s_b\|} - \frac{q^t_b}{\|q^t_b\|} \right\|^2$ where $q$ is the map of the mean squared activation
    over channels. Maps of different sizes are averaged down to the smaller size of each dimension before they are normalised.

    Args:
        student: maps of the network that learns, with one spatial dimension or two.
        teacher: maps to match, with as many spatial dimensions.

    Returns:
        A scalar in [0, 2], at least float32. A map of zeros has no direction: it costs 1 against another map and 0 against zeros.

    Raises:
        ValueError: for features without positions, or with other numbers of dimensions.

    Source:
        Zagoruyko and Komodakis 2017, arXiv 1612.03928, section 3.1 (there the distance itself, here its square, as is usual).

    Examples:
        >>> left, right = torch.zeros(1, 2, 1, 4), torch.zeros(1, 3, 1, 2)
        >>> left[..., 0], right[..., 1] = 5.0, 1.0
        >>> attention_transfer_loss(left, left * 3), attention_transfer_loss(left, right)
        (tensor(0.), tensor(2.))
    """
    if student.ndim != teacher.ndim or student.ndim not in (3, 4):
        raise ValueError(
            "student and teacher must be maps (batch, channels, height, width) or series (batch, channels, steps), got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    _check_batches(student, teacher)
    size = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    gap = _attention(student, size) - _attention(teacher, size)
    return gap.square().sum() / max(len(gap), 1)


def similarity_preserving_loss(
    student: Float[Tensor, "batch *student_features"], teacher: Float[Tensor, "batch *teacher_features"]
) -> Float[Tensor, ""]:
    r"""How much the similarities among the samples of a batch differ between two networks.

    $\frac{1}{B^2} \| \hat G^s - \hat G^t \|_F^2$ where $G = Q Q^\top$ holds the inner products of the flattened features, and each row of
    $\hat G$ has length 1.

    Args:
        student: features of the network that learns, of any shape.
        teacher: features to match, of any shape.

    Returns:
        A scalar in [0, 4 / B], at least float32. The row of a sample whose features are all zero is zero.

    Raises:
        ValueError: for different numbers of samples.

    Cost:
        Two Gram matrices: B^2 inner products of each feature's length, B^2 numbers of memory.

    Source:
        Tung and Mori 2019, arXiv 1907.09682, equations 2 to 4.

    Examples:
        >>> one_hot, pairs = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> similarity_preserving_loss(7 * one_hot, one_hot), similarity_preserving_loss(pairs, one_hot) > 0
        (tensor(0.), tensor(True))
    """
    _check_batches(student, teacher)
    gap = _similarities(student) - _similarities(teacher)
    return gap.square().sum() / max(len(gap), 1) ** 2


def rkd_distance_loss(
    student: Float[Tensor, "batch *student_features"], teacher: Float[Tensor, "batch *teacher_features"]
) -> Float[Tensor, ""]:
    r"""How much the distances between samples differ between two networks, each in units of its own mean distance.

    The mean of $h(d^s_{ij} / \overline{d^s} - d^t_{ij} / \overline{d^t})$ over pairs $i \ne j$, with Euclidean distances $d$ of flattened
    features, their mean $\overline d$ over the same pairs and Huber's $h(u) = u^2 / 2$ for $|u| < 1$, else $|u| - 1/2$.

    Args:
        student: features of the network that learns, of any shape.
        teacher: features to match, of any shape.

    Returns:
        A scalar >= 0, at least float32; 0 for less than two samples. Samples that all coincide have distance 0.

    Raises:
        ValueError: for different numbers of samples.

    Cost:
        B^2 distances of each feature's length, B^2 numbers of memory. It can be differentiated once.

    Source:
        Park et al. 2019, arXiv 1904.05068, section 3.2.1.

    Examples:
        >>> teacher = torch.tensor([[0.0], [1.0], [3.0]])
        >>> rkd_distance_loss(5 * teacher + 1, teacher).abs() < 1e-6
        tensor(True)
    """
    _check_batches(student, teacher)
    rows = len(student)
    if rows < 2:
        return _nothing(student, teacher)
    gap = _relative_distances(student) - _relative_distances(teacher)
    # The diagonal is zero on both sides.
    return F.huber_loss(gap, torch.zeros_like(gap), reduction="sum") / (rows * (rows - 1))


def rkd_angle_loss(
    student: Float[Tensor, "batch *student_features"], teacher: Float[Tensor, "batch *teacher_features"]
) -> Float[Tensor, ""]:
    r"""How much the angles that three samples form differ between two networks.

    The mean of $h(a^s_{ijk} - a^t_{ijk})$ over triples of distinct samples, with $a_{ijk}$ the cosine of the angle at sample $j$
    between $x_i - x_j$ and $x_k - x_j$ of flattened features, and Huber's $h$ as in `rkd_distance_loss`. An angle at or between samples
    that coincide counts as a cosine of 0.

    Args:
        student: features of the network that learns, of any shape.
        teacher: features to match, of any shape.

    Returns:
        A scalar in [0, 1.5], at least float32; 0 for less than three samples.

    Raises:
        ValueError: for different numbers of samples.

    Cost:
        B^2 inner products of each feature's length, and some 20 operations for each of the B^3 angles, both in float64 where the device has
        it. Angles are made in parts, and what they give to the gradient in the same pass: memory is that of B^2 numbers. On one CPU core,
        a loss and its gradient took 0.02 s for 64 samples, 0.08 s for 128 and 0.7 s for 256. It can be differentiated once.

    Source:
        Park et al. 2019, arXiv 1904.05068, section 3.2.2.

    Examples:
        >>> corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> line = torch.tensor([[0.0], [1.0], [2.0]])
        >>> rkd_angle_loss(-3 * corner, corner), rkd_angle_loss(line, corner) > 0.1
        (tensor(0.), tensor(True))
    """
    _check_batches(student, teacher)
    rows = len(student)
    if rows < 3:
        return _nothing(student, teacher)
    total = _AngleGaps.apply(*_inner_products(student), *_inner_products(teacher))
    loss = total / (rows * (rows - 1) * (rows - 2))
    return loss.to(torch.promote_types(full_precision(student).dtype, full_precision(teacher).dtype))


def _check_batches(student: Tensor, teacher: Tensor) -> None:
    if len(student) != len(teacher):
        raise ValueError(
            f"student and teacher must have features of the same samples, got {len(student)} and {len(teacher)}"
        )


def _rows(features: Tensor) -> Tensor:
    """One flat row for each sample; a single number is a row too."""
    return features[:, None].flatten(1)


def _nothing(student: Tensor, teacher: Tensor) -> Tensor:
    """Zero, with a graph; NaN where the features are not finite."""
    return (full_precision(student) * 0).sum() + (full_precision(teacher) * 0).sum()


def _moderate(features: Tensor, dim: int | None = None) -> Tensor:
    """Features of largest entry 1, as a whole or within the flattened rows: what follows does not see a scale."""
    features = full_precision(features)
    if not features.numel():
        return features
    size = features.detach().abs()
    size = size.amax() if dim is None else size.amax(dim, keepdim=True)
    return features / torch.where(size == 0, 1, size)


def _unit(vectors: Tensor) -> Tensor:
    """Rows of length 1; rows of zeros stay."""
    vectors = _moderate(vectors, 1)
    squares = vectors.square().sum(1, keepdim=True)
    return vectors / torch.where(squares == 0, 1, squares).sqrt()


def _attention(maps: Tensor, size: list[int]) -> Tensor:
    scaled = _moderate(maps.flatten(1), 1).view(maps.shape)
    squares = scaled.square().mean(1, keepdim=True)
    if list(squares.shape[2:]) != size:
        pool: Callable[..., Tensor] = F.adaptive_avg_pool1d if len(size) == 1 else F.adaptive_avg_pool2d
        squares = pool(squares, size)
    return _unit(squares.flatten(1))


def _similarities(features: Tensor) -> Tensor:
    # Each row by its own scale would change the matrix, so one scale for all.
    rows = _moderate(_rows(features))
    with without_autocast(rows.device):
        return _unit(rows @ rows.T)


def _relative_distances(features: Tensor) -> Tensor:
    rows = _moderate(_rows(features))
    # Not by matrix products: of close samples they leave nothing but rounding errors.
    with without_autocast(rows.device):
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (len(rows) * (len(rows) - 1))
    return distances / torch.where(mean == 0, 1, mean)


def _inner_products(features: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix of centred features, and one over each distance; 0 for samples that coincide."""
    rows = _moderate(_rows(features)).to(accumulation_dtype(features.device))
    rows = _moderate(rows - rows.mean(0))
    with without_autocast(rows.device):
        gram = rows @ rows.T
    sizes = gram.diagonal()
    squared = sizes[:, None] + sizes - 2 * gram
    coincide = squared <= _COINCIDE[gram.dtype] * (sizes[:, None] + sizes)
    return gram, torch.where(coincide, 0.0, torch.where(coincide, 1.0, squared).rsqrt())


class _AngleGaps(torch.autograd.Function):
    """Sum of Huber's loss over all angles, and in the same pass its gradients, a few vertices at a time."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, student_inverse: Tensor, teacher: Tensor, teacher_inverse: Tensor
    ) -> Tensor:
        sides = [(student, student_inverse), (teacher, teacher_inverse)]
        slopes = [
            [torch.zeros_like(part) for part in side] if ctx.needs_input_grad[2 * n] else []
            for n, side in enumerate(sides)
        ]
        total, rows = student.new_zeros(()), len(student)
        at_once = (_ON_CPU if student.device.type == "cpu" else _ELSEWHERE) // rows**2
        for vertices in torch.arange(rows, device=student.device).split(max(at_once, 1)):
            products = [_products(vertices, gram) for gram, _ in sides]
            near = [inverse[vertices] for _, inverse in sides]
            gap, others = (n * r[:, :, None] * r[:, None, :] for n, r in zip(products, near, strict=True))
            gap -= others
            # An angle between a sample and itself is none.
            gap.diagonal(dim1=1, dim2=2).zero_()
            slope = gap.clamp(-1, 1)
            total += torch.linalg.vecdot(slope, gap - slope / 2).sum()
            for found, n, r, sign in zip(slopes, products, near, (1, -1), strict=True):
                if found:
                    _add_slopes(found, vertices, sign * slope, n, r)
        ctx.save_for_backward(*slopes[0], *slopes[1])
        ctx.sides = [bool(found) for found in slopes]
        return total

    @staticmethod
    @first_order_only("rkd_angle_loss")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        return tuple(gradient * next(saved) if wanted else None for wanted in ctx.sides for _ in range(2))


def _products(vertices: Tensor, gram: Tensor) -> Tensor:
    """Inner products (vertices, batch, batch): <x_i - x_j, x_k - x_j> = G_ik - G_ij - G_kj + G_jj."""
    to_vertex, size = gram[vertices], gram.diagonal()[vertices]
    offset = to_vertex - size[:, None] / 2
    return gram - offset[:, :, None] - offset[:, None, :]


def _add_slopes(found: list[Tensor], vertices: Tensor, slope: Tensor, products: Tensor, near: Tensor) -> None:
    """Add what some vertices' angles give to the gradient of Gram matrix and inverse distances; all here is symmetric in i and k."""
    of_gram, of_inverse = found
    of_inverse[vertices] += 2 * torch.linalg.vecdot(slope * products, near[:, None, :])
    slope = slope * near[:, :, None] * near[:, None, :]
    of_gram += slope.sum(0)
    rows = slope.sum(2)
    of_gram[vertices] -= 2 * rows
    of_gram[vertices, vertices] += rows.sum(1)
