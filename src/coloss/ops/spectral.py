"""Singular values: weights as matrices, low-rank truncation, nuclear norm and effective rank."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .gradients import first_order_only, needs_gradient
from .precision import accumulation_dtype, full_precision, without_autocast

Scheme = Literal["channel", "spatial", "decoupled"]

# Rows of an embedding matrix that are held in float64 at once.
_GRAM_BLOCK = 1024


class TruncatedSVD(NamedTuple):
    """A matrix as its leading singular triples: about `U * S.unsqueeze(-2) @ Vh`."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    rank: int


def matricize(
    weight: Float[Tensor, "*weight"], scheme: Scheme
) -> tuple[Float[Tensor, "*batch rows columns"], Callable[[Tensor], Tensor]]:
    """A layer's weight laid out as a matrix whose rank can be cut, and the function that lays it back.

    A convolution's weight has shape (out N, in C, height, width).

    - `"channel"`: N x (C height width). Also for linear layers and for convolutions of any dimension.
    - `"spatial"`: (C height) x (N width), for two thin convolutions one after the other; 2-D convolutions
      only.
    - `"decoupled"`: a batch of N matrices C x (height width), for pointwise and depthwise pairs; convolutions
      only.

    Args:
        weight: weight of a linear layer or of a convolution without groups.
        scheme: `"channel"`, `"spatial"` or `"decoupled"`.

    Returns:
        The matrix (a view where possible, differentiable), and `restore`, which takes a tensor of the matrix'
        shape to the weight's shape.

    Raises:
        ValueError: on an unknown scheme, or a weight with too few or too many dimensions for it.

    Source:
        Xu et al. 2020 (TRP), arXiv 2004.14566, section 3.

    Examples:
        >>> matrix, restore = matricize(torch.zeros(8, 4, 3, 3), "spatial")
        >>> matrix.shape, restore(matrix).shape
        (torch.Size([12, 24]), torch.Size([8, 4, 3, 3]))
    """
    shape = weight.shape
    if scheme == "channel":
        _check_dimensions(weight, scheme, 2, None)
        matrix, lay_back = weight.flatten(1), lambda m: m.reshape(shape)
    elif scheme == "spatial":
        _check_dimensions(weight, scheme, 4, 4)
        outputs, inputs, height, width = shape
        matrix = weight.permute(1, 2, 0, 3).reshape(inputs * height, outputs * width)
        lay_back = lambda m: m.reshape(inputs, height, outputs, width).permute(2, 0, 1, 3)
    elif scheme == "decoupled":
        _check_dimensions(weight, scheme, 3, None)
        matrix, lay_back = weight.flatten(2), lambda m: m.reshape(shape)
    else:
        raise ValueError(f'scheme must be "channel", "spatial" or "decoupled", got {scheme!r}')
    matrix_shape = matrix.shape

    def restore(changed: Tensor) -> Tensor:
        if changed.shape != matrix_shape:
            raise ValueError(f"matrix must have shape {tuple(matrix_shape)}, got {tuple(changed.shape)}")
        return lay_back(changed)

    return matrix, restore


@torch.no_grad()
def truncated_svd(
    matrix: Float[Tensor, "*batch rows columns"],
    *,
    energy: float | None = None,
    rank: int | None = None,
    threshold: float | None = None,
) -> TruncatedSVD:
    r"""The closest matrix of low rank, as factors; the rank is given or follows from the singular values.

    Exactly one criterion chooses the rank $k \ge 1$: `energy` takes the smallest $k$ whose leading $\sum_{i
    \le k} s_i^2$ is at least that share of all $\sum_i s_i^2$; `rank` is $k$ itself; `threshold` keeps every
    $s_i$ not below it. The squared Frobenius error is the sum of the dropped $s_i^2$, the least possible.

    In a batch each matrix is cut at its own $k$: factors are as wide as the largest $k$ of the batch, and the
    dropped singular values of the other matrices are set to 0 in `S`.

    Args:
        matrix: one matrix or a batch of them, finite.
        energy: share in (0, 1]; 1 keeps every singular value above 0.
        rank: between 1 and min(rows, columns).
        threshold: >= 0.

    Returns:
        `(U, S, Vh, rank)` with U (..., rows, rank), S (..., rank) descending and Vh (..., rank, columns), in
        float32 for half-precision input, without gradients; for a penalty with a gradient see `nuclear_norm`.

    Raises:
        ValueError: unless exactly one criterion is given and in its range, and the matrix is finite and not
        empty.

    Cost:
        One SVD: $O(\min(r, c)^2 \max(r, c))$ for each matrix.

    Source:
        Eckart, Young 1936.

    Examples:
        >>> U, S, Vh, rank = truncated_svd(torch.diag(torch.tensor([3.0, 1.0])), energy=0.9)
        >>> rank, S.tolist()
        (1, [3.0])
    """
    _check_one_criterion(matrix, energy, rank, threshold)
    U, S, Vh = torch.linalg.svd(full_precision(matrix), full_matrices=False)
    if rank is not None:
        ranks = torch.full(S.shape[:-1], rank, device=S.device)
    elif energy is not None:
        ranks = _rank_at_energy(S, energy).clamp(min=1)
    else:
        ranks = torch.ge(S, threshold or 0.0).sum(-1).clamp(min=1)
    largest = int(ranks.max())
    kept = torch.arange(largest, device=S.device) < ranks.unsqueeze(-1)
    return TruncatedSVD(U[..., :largest], S[..., :largest] * kept, Vh[..., :largest, :], largest)


def nuclear_norm(matrix: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch"]:
    r"""Sum of singular values, a convex penalty that pulls a matrix towards low rank.

    $\|M\|_* = \sum_i s_i$. Its gradient here is $U_r V_r^\top$ over the $r$ singular values above rounding
    error: the gradient where the matrix has full rank, else the sub-gradient of least norm, so that
    directions of rank that are already gone are left alone and repeated or zero singular values do no harm. A
    zero matrix has a zero gradient.

    Args:
        matrix: one matrix or a batch of them.

    Returns:
        One value for each matrix, at least float32. It can be differentiated once.

    Cost:
        One SVD: $O(\min(r, c)^2 \max(r, c))$; singular values alone when no gradient is needed.

    Source:
        Watson 1992, Characterization of the subdifferential of some matrix norms.

    Examples:
        >>> matrix = torch.diag(torch.tensor([3.0, 0.0])).requires_grad_()
        >>> nuclear_norm(matrix).backward()
        >>> matrix.grad.tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    return _NuclearNorm.apply(full_precision(matrix), needs_gradient(matrix))


@torch.no_grad()
def gram_singular_values(
    embeddings: Float[Tensor, "samples features"], center: bool = False
) -> Float[Tensor, " values"]:
    r"""Singular values of a tall or wide matrix through its small Gram matrix, in float64.

    $s = \sqrt{\mathrm{eig}(Z^\top Z)}$, or $Z Z^\top$ where there are fewer samples than features. Squaring
    halves the digits of small values: those below about $10^{-8}$ of the largest are rounding error.

    Args:
        embeddings: $Z$, finite.
        center: take off the mean of the samples first, in the widest type, so that a mean much larger than the spread does not
            swallow it.

    Returns:
        min(samples, features) values, descending, float64, without a gradient.

    Raises:
        ValueError: if a value is not finite.

    Cost:
        $O(N D \min(N, D))$ time, much less than an SVD for $N \gg D$; $\min(N, D)^2$ memory beside the input, which with
        `center` and fewer samples than features is copied once.

    Examples:
        >>> gram_singular_values(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])).tolist()
        [4.0, 3.0]
    """
    wide = accumulation_dtype(embeddings.device)
    samples, features = embeddings.shape
    mean = None
    if center and samples:
        mean = sum(rows.to(wide).sum(0) for rows in embeddings.split(_GRAM_BLOCK)) / samples
        if samples < features:
            embeddings, mean = _centred(embeddings.to(wide), mean), None
    tall = embeddings if samples >= features else embeddings.T
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=wide, device=tall.device)
    half = tall.shape[1] // 2
    with without_autocast(tall.device):
        for rows in tall.split(_GRAM_BLOCK):
            # The upper right quarter is the lower left one again, and eigvalsh reads the lower triangle alone.
            rows = rows.to(wide) if mean is None else _centred(rows.to(wide), mean)
            gram[:, :half].addmm_(rows.T, rows[:, :half])
            gram[half:, half:].addmm_(rows[:, half:].T, rows[:, half:])
    # Sums of squares are finite where all values are: far quicker than a look at each value.
    if not gram.diagonal().isfinite().all():
        raise ValueError("embeddings must be finite, got an infinity or NaN")
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def _centred(rows: Tensor, mean: Tensor) -> Tensor:
    """Rows less their mean; what is left of equal rows is the rounding of that mean, which is no spread."""
    rounding = 8 * torch.finfo(rows.dtype).eps * mean.abs()
    rows = rows - mean
    return torch.where(rows.abs() <= rounding, 0.0, rows)


def effective_rank(
    singular_values: Float[Tensor, "*batch values"], eps: float = 0.0
) -> Float[Tensor, "*batch"]:
    r"""How many directions a matrix really uses: the exponential of the entropy of its singular values.

    $\exp(-\sum_k p_k \log p_k)$ with $p_k = s_k / \sum_j s_j + \epsilon$. Between 1 (one direction) and the
    number of values (all equal), unchanged by the matrix' scale. Singular values are not squared.

    Args:
        singular_values: $s \ge 0$, in any order.
        eps: $\epsilon \ge 0$ added after normalising. 0 is exact; RankMe's published values use $10^{-7}$,
        which adds
            about $K \epsilon \log(1/\epsilon)$ nats for $K$ values. Never compare numbers across `eps`.

    Returns:
        One value for each spectrum, at least float32; 0 where all singular values are 0.

    Raises:
        ValueError: if `eps` is negative.

    Source:
        Roy, Vetterli 2007; Garrido et al. 2023 (RankMe), arXiv 2210.02885, equation 1.

    Examples:
        >>> effective_rank(torch.tensor([[2.0, 2.0, 2.0], [2.0, 0.0, 0.0]])).round(decimals=4)
        tensor([3., 1.])
    """
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    values = full_precision(singular_values)
    total = values.sum(-1, keepdim=True)
    share = values / torch.where(total == 0, 1.0, total) + eps
    # log of 1 in place of log of 0: share 0 then counts 0, and its gradient stays finite.
    surprise = -torch.log(torch.where(share == 0, 1.0, share))
    return torch.where(total.squeeze(-1) == 0, 0.0, torch.exp((share * surprise).sum(-1)))


def rank_at_energy(singular_values: Float[Tensor, "*batch values"], energy: float) -> Int[Tensor, "*batch"]:
    r"""Least number of singular values that hold a share of the squared Frobenius norm.

    $\min\{k : \sum_{i \le k} s_i^2 \ge e \sum_i s_i^2\}$ over values in descending order.

    Args:
        singular_values: $s \ge 0$, in any order.
        energy: $e$ in (0, 1]; 1 counts every singular value above 0.

    Returns:
        One whole number for each spectrum; 0 where all singular values are 0.

    Raises:
        ValueError: if `energy` is outside (0, 1].

    Examples:
        >>> (
        ...     rank_at_energy(torch.tensor([3.0, 1.0, 0.0]), 0.9),
        ...     rank_at_energy(torch.tensor([3.0, 1.0, 0.0]), 1.0),
        ... )
        (tensor(1), tensor(2))
    """
    _check_energy(energy)
    return _rank_at_energy(full_precision(singular_values).sort(-1, descending=True).values, energy)


def _rank_at_energy(descending: Tensor, energy: float) -> Tensor:
    squares = descending.detach().to(accumulation_dtype(descending.device)) ** 2
    # Tails are summed from the small end, so that the last ones are not lost beside the large total.
    tails = squares.flip(-1).cumsum(-1).flip(-1)
    slack = 1 + 8 * torch.finfo(descending.dtype).eps
    allowed = (1 - energy) * slack * tails[..., :1]
    return (tails > allowed).sum(-1)


class _NuclearNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, with_gradient: bool) -> Tensor:
        if not with_gradient:
            return torch.linalg.svdvals(matrix).sum(-1)
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        rounding = torch.finfo(S.dtype).eps * max(matrix.shape[-2:]) * S.amax(-1, keepdim=True)
        with without_autocast(matrix.device):
            ctx.save_for_backward((U * (rounding < S).unsqueeze(-2)) @ Vh)
        return S.sum(-1)

    @staticmethod
    @first_order_only("nuclear_norm")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (direction,) = ctx.saved_tensors
        return gradient[..., None, None] * direction, None


def _check_dimensions(weight: Tensor, scheme: str, least: int, most: int | None) -> None:
    if weight.ndim < least or (most is not None and weight.ndim > most):
        rule = f"{least}" if most == least else f"at least {least}"
        raise ValueError(
            f'weight must have {rule} dimensions for scheme "{scheme}", got shape {tuple(weight.shape)}'
        )


def _check_energy(energy: float) -> None:
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")


def _check_one_criterion(
    matrix: Tensor, energy: float | None, rank: int | None, threshold: float | None
) -> None:
    given = {"energy": energy, "rank": rank, "threshold": threshold}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise ValueError(f"exactly one of energy, rank and threshold must be given, got {chosen or 'none'}")
    if matrix.numel() == 0:
        raise ValueError(f"matrix must not be empty, got shape {tuple(matrix.shape)}")
    if not matrix.isfinite().all():
        raise ValueError("matrix must be finite, got an infinity or NaN")
    if energy is not None:
        _check_energy(energy)
    if rank is not None and not 1 <= rank <= min(matrix.shape[-2:]):
        raise ValueError(f"rank must be in [1, {min(matrix.shape[-2:])}], got {rank}")
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold must be >= 0, got {threshold}")
