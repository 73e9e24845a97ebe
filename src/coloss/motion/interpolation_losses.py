"""Losses for pictures, joint heatmaps and masks that cost nothing, and pull nowhere, where prediction and truth are equal."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from coloss.ops import full_precision

_GREY = (0.2989, 0.5870, 0.1140)
_FAR = 1e4
"""Logits beyond this are as sure as can be; infinite ones would make 0 * inf."""


def charbonnier_loss(
    predicted: Float[Tensor, "batch *shape"], truth: Float[Tensor, "batch *shape"], epsilon: float = 1e-3
) -> Float[Tensor, ""]:
    r"""An absolute difference that is smooth at zero: mean of $\sqrt{d^2 + \epsilon^2} - \epsilon$ over all numbers, d = predicted - truth.

    The constant is taken off, which the published form keeps, so that equal pictures cost 0; the gradient is the same.

    Args:
        predicted: any shape.
        truth: the same shape.
        epsilon: > 0, the difference up to which it is quadratic.

    Returns:
        A scalar, at least float32.

    Raises:
        ValueError: for unequal shapes, or an epsilon out of range.

    Source:
        Charbonnier et al., 1994; with epsilon 1e-3 as in SportsSloMo, arXiv 2308.16876.

    Examples:
        >>> charbonnier_loss(torch.tensor([[3.0]]), torch.tensor([[-1.0]]), epsilon=3.0)
        tensor(2.)
    """
    if not 0 < epsilon < torch.inf:
        raise ValueError(f"epsilon must be > 0 and finite, got {epsilon}")
    squares = _difference(predicted, truth).square()
    # The difference of two close numbers, without cancellation.
    return (squares / ((squares + epsilon**2).sqrt() + epsilon)).mean()


def census_loss(
    predicted: Float[Tensor, "batch channels height width"],
    truth: Float[Tensor, "batch channels height width"],
    window: int = 7,
) -> Float[Tensor, ""]:
    r"""Compares how each pixel differs from its neighbours, so that a change of brightness costs nothing.

    With grey value g (of three channels 0.2989 R + 0.587 G + 0.114 B, else the mean), neighbour q of pixel p in the window around it,
    $c_{pq} = d / \sqrt{0.81 + d^2}$ for $d = g_q - g_p$, and $\delta$ the difference of the two pictures' c:

        mean over pairs of pixels inside the picture of  delta^2 / (0.1 + delta^2)

    The published code takes zeros beyond the edge, and so sees brightness there; it also counts each pixel as its own neighbour.

    Args:
        predicted: colours in [0, 1], two pixels or more.
        truth: the same shape.
        window: side of the window, odd, >= 3.

    Returns:
        A scalar in [0, 1), at least float32.

    Raises:
        ValueError: for unequal shapes, pictures of one pixel, or a window out of range.

    Cost:
        window^2 / 2 numbers for each pixel of both.

    Source:
        Meister, Hur and Roth, 2018 (UnFlow), as used in SportsSloMo, arXiv 2308.16876.

    Examples:
        >>> picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> census_loss(picture + 0.25, picture).item() < 1e-9
        True
    """
    _same_shape(predicted, truth)
    if window < 3 or window % 2 == 0:
        raise ValueError(f"window must be odd and >= 3, got {window}")
    if max(predicted.shape[2:]) < 2:
        raise ValueError(f"pictures must have two pixels or more, got {tuple(predicted.shape[2:])}")
    delta = (_census(predicted, window) - _census(truth, window)).square()
    return (delta / (0.1 + delta)).mean()


def _census(images: Tensor, window: int) -> Tensor:
    """Soft signs of the differences of all pairs of pixels in a window of one another, (batch, pairs)."""
    images = full_precision(images)
    if images.shape[1] == 3:
        grey = torch.einsum("bchw,c->bhw", images, images.new_tensor(_GREY))
    else:
        grey = images.mean(1)
    reach, (height, width) = window // 2, grey.shape[1:]
    pairs = []
    # Half of the window: the other half has the same pairs the other way round.
    for down in range(min(reach, height - 1) + 1):
        for right in range(-min(reach, width - 1), min(reach, width - 1) + 1):
            if down == 0 and right <= 0:
                continue
            left, end = max(0, -right), width - max(0, right)
            there = grey[:, down:, left + right : end + right]
            pairs.append((there - grey[:, : height - down, left:end]).flatten(1))
    difference = torch.cat(pairs, 1)
    return difference * (0.81 + difference.square()).rsqrt()


def reconstruction_loss(
    predicted: Float[Tensor, "batch channels height width"],
    truth: Float[Tensor, "batch channels height width"],
    census_weight: float = 0.1,
) -> Float[Tensor, ""]:
    """What frame interpolation is trained on without other help: `charbonnier_loss + census_weight * census_loss`.

    Args:
        predicted: colours in [0, 1].
        truth: the same shape.
        census_weight: >= 0.

    Returns:
        A scalar, at least float32.

    Raises:
        ValueError: for unequal shapes or a negative weight.

    Source:
        SportsSloMo, arXiv 2308.16876.

    Examples:
        >>> picture = torch.rand(1, 3, 8, 8)
        >>> reconstruction_loss(picture, picture).item()
        0.0
    """
    if not 0 <= census_weight < torch.inf:
        raise ValueError(f"census_weight must be >= 0 and finite, got {census_weight}")
    return charbonnier_loss(predicted, truth) + census_weight * census_loss(predicted, truth)


def laplacian_pyramid_loss(
    predicted: Float[Tensor, "batch channels height width"],
    truth: Float[Tensor, "batch channels height width"],
    levels: int = 5,
) -> Float[Tensor, ""]:
    r"""Compares pictures band by band, coarse bands counting more: $\sum_l 2^{l} \operatorname{mean} |L_l(x) - L_l(y)|$, l = 0 the finest.

    Each level but the last holds what halving with a binomial blur (1, 3, 3, 1) takes away, the last what is left. Levels at which a side would fall below
    two pixels are left out.

    Args:
        predicted: colours.
        truth: the same shape.
        levels: of the pyramid, >= 1; 1 is the mean absolute difference.

    Returns:
        A scalar, at least float32.

    Raises:
        ValueError: for unequal shapes, or `levels` < 1.

    Source:
        Bojanowski et al., 2018, arXiv 1707.05776; weights of Niklaus and Liu, 2018, arXiv 1803.10967.

    Examples:
        >>> picture = torch.rand(1, 3, 8, 8)
        >>> laplacian_pyramid_loss(picture, picture).item()
        0.0
    """
    if levels < 1:
        raise ValueError(f"levels must be >= 1, got {levels}")
    # Each level is linear in the picture, so one pyramid of the difference does.
    rest = _difference(predicted, truth)
    total = rest.new_zeros(())
    for level in range(levels):
        size = rest.shape[2:]
        if level == levels - 1 or min(size) < 3:
            return total + 2**level * rest.abs().mean()
        # Both ways by centres of cells, or the bands would be half a pixel out.
        half = [(side + 1) // 2 for side in size]
        smaller = F.interpolate(rest, half, mode="bilinear", align_corners=False, antialias=True)
        band = rest - F.interpolate(smaller, size, mode="bilinear", align_corners=False)
        total = total + 2**level * band.abs().mean()
        rest = smaller
    return total


def heatmap_mse_loss(
    predicted: Float[Tensor, "batch joints height width"], truth: Float[Tensor, "batch joints height width"]
) -> Float[Tensor, ""]:
    """Mean squared difference of joint heatmaps, over joints, pixels and batch.

    Most pixels are background, so the mean is small: look at its gradient beside that of the other terms before you trust a weight.

    Args:
        predicted: one map for each joint.
        truth: the same shape.

    Returns:
        A scalar, at least float32.

    Raises:
        ValueError: for unequal shapes.

    Examples:
        >>> heatmap_mse_loss(torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 2, 2))
        tensor(1.)
    """
    return _difference(predicted, truth).square().mean()


def soft_dice_focal_loss(
    mask_logits: Float[Tensor, "batch predicted height width"],
    truth: Float[Tensor, "batch segments height width"],
    *,
    match: str = "iou",
    focal_weight: float = 20.0,
    dice_weight: float = 1.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Tensor, ""]:
    r"""Dice and focal loss of soft masks against soft masks, each prediction with the segment it belongs to.

    With p = sigmoid(logits) and truth q in [0, 1],

        dice  = sum (p - q)^2 / (sum p^2 + sum q^2 + 1)
        focal = mean over pixels of  (alpha q + (1 - alpha)(1 - q)) |q - p|^gamma BCE(p, q)

    For masks of zeros and ones this is the usual pair, 1 - (2 sum p q + 1) / (sum p + sum q + 1) and the focal loss; for soft ones it is
    0, with gradient 0, where p = q, which the usual pair is not. Of each image the sum over segments is divided by the number of segments
    whose probability exceeds 1/2 somewhere (at least 1); the result is the mean over images. What has no partner is not free: a predicted mask
    without a segment is held against an empty one, a segment without a prediction costs the dice of an empty prediction.

    Args:
        mask_logits: logits, not probabilities.
        truth: probabilities, not logits.
        match: `"iou"` gives predictions to segments so that the sum of soft intersections over unions is largest (Hungarian), for instances
            in any order; `"class"` takes channel c with channel c, for classes in a fixed order, and then divides by their number.
        focal_weight, dice_weight: of the two parts, >= 0.
        alpha: of the focal loss, in [0, 1].
        gamma: of the focal loss, >= 1.

    Returns:
        A scalar, at least float32.

    Raises:
        ValueError: for an unknown `match`, unequal sizes, a value out of range, or (on the CPU) a truth outside [0, 1].

    Cost:
        `"iou"` takes the masks' overlaps to the CPU, unless one prediction meets one segment.

    Source:
        SportsSloMo, arXiv 2308.16876, which matches by the order of segments and takes the focal loss of sigmoid(sigmoid(x)).
        The focal loss for soft truth: Li et al., 2020, arXiv 2006.04388.

    Examples:
        >>> masks = torch.eye(2).repeat_interleave(4, 1).reshape(1, 2, 2, 4)
        >>> logits = 100 * (2 * masks - 1)
        >>> soft_dice_focal_loss(logits.flip(1), masks).item() < 1e-6
        True
        >>> soft_dice_focal_loss(logits.flip(1), masks, match="class", focal_weight=0.0)
        tensor(0.8889)
    """
    if match not in ("iou", "class"):
        raise ValueError(f'match must be "iou" or "class", got {match!r}')
    if mask_logits.shape[2:] != truth.shape[2:] or len(mask_logits) != len(truth):
        raise ValueError(
            f"masks must have equal batch, height and width, got {tuple(mask_logits.shape)} and {tuple(truth.shape)}"
        )
    if match == "class" and mask_logits.shape[1] != truth.shape[1]:
        raise ValueError(
            f"masks matched by class must have equal channels, got {mask_logits.shape[1]} and {truth.shape[1]}"
        )
    for name, value in (("focal_weight", focal_weight), ("dice_weight", dice_weight)):
        if not 0 <= value < torch.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if not 1 <= gamma < torch.inf:
        raise ValueError(f"gamma must be >= 1 and finite, got {gamma}")
    logits = full_precision(mask_logits).flatten(2).clamp(-_FAR, _FAR)
    segments = full_precision(truth).flatten(2)
    if (
        segments.device.type == "cpu"
        and segments.numel()
        and bool((segments < 0).any() | (segments > 1).any())
    ):
        raise ValueError(
            f"truth must be probabilities in [0, 1], got {segments.min():.3g} to {segments.max():.3g}"
        )
    probability = logits.sigmoid()
    count = torch.full((len(logits),), segments.shape[1], dtype=logits.dtype, device=logits.device)
    lost = torch.zeros_like(count)
    if match == "iou":
        there = segments.amax(2) > 0.5 if segments.shape[2] else segments.new_zeros(segments.shape[:2]).bool()
        count = there.sum(1).to(logits.dtype)
        segments, lost = _partners(probability.detach(), segments)
    error = (probability - segments).square().sum(2)
    dice = error / (probability.square().sum(2) + segments.square().sum(2) + 1)
    entropy = segments * F.softplus(-logits) + (1 - segments) * F.softplus(logits)
    balance = alpha * segments + (1 - alpha) * (1 - segments)
    focal = (balance * (segments - probability).abs().pow(gamma) * entropy).mean(2)
    parts = (focal_weight * focal + dice_weight * dice).sum(1) + dice_weight * lost
    return (parts / count.clamp(min=1)).mean()


def _partners(probability: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """The segment that each prediction is held against, empty for those without; and the dice of the segments that got none."""
    (predicted, pixels), given = probability.shape[1:], segments.shape[1]
    if predicted == given == 1:
        return segments, probability.new_zeros(len(probability))
    overlap = probability @ segments.transpose(1, 2)
    union = probability.sum(2)[:, :, None] + segments.sum(2)[:, None] - overlap
    score = (overlap / union.clamp(min=torch.finfo(union.dtype).tiny)).nan_to_num().cpu().numpy()
    # One more, empty segment for predictions without partner.
    chosen = torch.full((len(probability), predicted), given, dtype=torch.int64)
    for image, table in enumerate(score):
        rows, columns = linear_sum_assignment(table, maximize=True)
        chosen[image, torch.as_tensor(rows)] = torch.as_tensor(columns)
    chosen = chosen.to(segments.device)
    square = segments.square().sum(2)
    empty = square / (square + 1)
    met = torch.zeros(len(probability), given + 1, dtype=torch.bool, device=segments.device)
    met = met.scatter(1, chosen, True)[:, :given]
    padded = torch.cat([segments, segments.new_zeros(len(segments), 1, pixels)], 1)
    return padded.gather(1, chosen[..., None].expand(-1, -1, pixels)), (empty * ~met).sum(1)


def _difference(predicted: Tensor, truth: Tensor) -> Tensor:
    _same_shape(predicted, truth)
    return full_precision(predicted) - full_precision(truth)


def _same_shape(predicted: Tensor, truth: Tensor) -> None:
    if predicted.shape != truth.shape:
        raise ValueError(
            f"prediction and truth must have equal shapes, got {tuple(predicted.shape)} and {tuple(truth.shape)}"
        )
