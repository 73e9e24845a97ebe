"""Maps from a code to groups of outputs in which each group depends on few latent dimensions, with zeros that are exact.

With a code s in R^m and groups g of outputs, y_g = f_g(W_g s): a matrix W_g of p rows, then a small network f_g of the group's own. Column j
of W_g says what latent j does to group g; where it is zero, group g ignores it. The penalty and its proximal step are

    penalty(W)      = sum over g, j of || W_g[:, j] ||
    prox_t(w)       = w max(0, 1 - t / ||w||),   the minimiser of || v - w ||^2 / 2 + t || v ||

A gradient step on the loss without the penalty, then `prox_group_lasso_` with t = step * strength, makes columns that are exactly zero; a
gradient of the penalty never does. Do one or the other, not both: a penalty in the loss and the proximal step count it twice.

`activation_group_penalty` is another thing: groups of a sample's own activations are driven to zero, not columns of weights.

Ainsworth, Foti, Lee, Fox, 2018, arXiv 1802.06765, "oi-VAE: Output Interpretable VAEs for Nonlinear Group Factor Analysis", is where the
map and its proximal training come from; Yuan and Lin, 2006, is the source of the penalty.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.ops import full_precision


def group_l2_norms(weights: Float[Tensor, "groups width latents"]) -> Float[Tensor, "groups latents"]:
    """How much each group depends on each latent dimension: the length of its column, 0 for a latent that the group ignores.

    Args:
        weights: W_g of each group.

    Returns:
        At least float32. The gradient at a zero column is zero.

    Examples:
        >>> group_l2_norms(torch.tensor([[[3.0, 0.0], [4.0, 0.0]]]))
        tensor([[5., 0.]])
    """
    return torch.linalg.vector_norm(full_precision(weights), dim=1)


def group_lasso(weights: Float[Tensor, "groups width latents"]) -> Float[Tensor, ""]:
    """Sum of the lengths of all columns: the penalty, to be read, or to be added to a loss where no proximal step is made.

    Args:
        weights: W_g of each group.

    Returns:
        A scalar >= 0, at least float32, with gradient; the gradient of a zero column is zero.

    Source:
        Yuan and Lin, 2006, "Model selection and estimation in regression with grouped variables".

    Examples:
        >>> group_lasso(torch.tensor([[[3.0, 0.0], [4.0, 1.0]]]))
        tensor(6.)
    """
    return group_l2_norms(weights).sum()


@torch.no_grad()
def prox_group_lasso_(weights: Float[Tensor, "groups width latents"], step: float, strength: float) -> None:
    """Shortens every column by step * strength, in place; columns not longer than that become exactly zero.

        w <- w max(0, 1 - step strength / ||w||)

    With a width of one this is soft thresholding. NaN stays NaN.

    Args:
        weights: W_g of each group; changed.
        step: size of the gradient step before, >= 0.
        strength: factor of the penalty, >= 0.

    Raises:
        ValueError: for a negative or infinite product.

    Examples:
        >>> weights = torch.tensor([[[3.0, 0.3], [4.0, 0.4]]])
        >>> prox_group_lasso_(weights, step=0.5, strength=2.0)
        >>> weights
        tensor([[[2.4000, 0.0000],
                 [3.2000, 0.0000]]])
    """
    if not (step >= 0 and strength >= 0 and step * strength < math.inf):
        raise ValueError(f"step and strength must be finite and >= 0, got {step} and {strength}")
    norms, threshold = group_l2_norms(weights)[:, None], step * strength
    kept = torch.where(norms <= threshold, 0, 1 - threshold / norms)
    weights.copy_((full_precision(weights) * kept).to(weights.dtype))


def activation_group_penalty(
    embeddings: Float[Tensor, "batch dim"], groups: Sequence[int]
) -> Float[Tensor, ""]:
    """Group lasso on embeddings themselves: few groups of dimensions active in each sample.

        (1 / batch) sum over samples b and groups g of sqrt(d_g) || s_b[g] ||,    d_g dimensions in group g

    It acts on activations of each sample, not on weights as `group_lasso` does. Alone with a loss of latent prediction it invites
    collapse to zero: watch a meter that sees scale, such as `coloss.jepa.between_sample_std`.

    Args:
        embeddings: s.
        groups: sizes of the groups, of consecutive dimensions; they add up to dim.

    Returns:
        A scalar >= 0, at least float32; 0 for an empty batch. The gradient at a group of zeros is zero.

    Raises:
        ValueError: if the sizes are not positive, or do not add up.

    Examples:
        >>> activation_group_penalty(torch.tensor([[3.0, 4.0, 0.0]]), (2, 1))
        tensor(7.0711)
    """
    check_groups(groups, embeddings.shape[1])
    norms = [
        size**0.5 * torch.linalg.vector_norm(part, dim=1)
        for size, part in zip(groups, full_precision(embeddings).split(list(groups), dim=1))
    ]
    return torch.stack(norms).sum() / max(len(embeddings), 1)


def multi_information_gaussian(
    embeddings: Float[Tensor, "samples dim"], groups: Sequence[int] | None = None
) -> float:
    """Total dependence between dimensions, or between groups of them, as it would be if all were jointly Gaussian; in nats.

        I = 1/2 ( sum over g of log det S_g  -  log det S ),    S the covariance, S_g its block of group g

    0 where groups are uncorrelated, -1/2 log(1 - r^2) for two numbers of correlation r. No invertible affine map within a group changes it,
    and no linear map within a group raises it.

    Args:
        embeddings: one row for each sample. The estimate is biased upwards by about (pairs of dimensions across groups) / (2 samples).
        groups: sizes of groups of consecutive dimensions; None for each dimension by itself.

    Returns:
        I >= 0, computed in float64. Dimensions that are constant, or that follow from the others of their group, count for nothing.
        Infinite where a dimension follows from those of other groups, as it must with fewer samples than dimensions.

    Raises:
        ValueError: for sizes that do not add up, or values that are not finite.

    Cost:
        O(samples * dim^2 + dim^3).

    Source:
        Cover and Thomas, 2006, "Elements of Information Theory", chapter 8.

    Examples:
        >>> first, noise = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
        >>> both = torch.stack([first, 0.6 * first + 0.8 * noise], 1)  # -log(0.64) / 2 = 0.22
        >>> round(multi_information_gaussian(both), 1)
        0.2
    """
    sizes = [1] * embeddings.shape[1] if groups is None else list(groups)
    check_groups(sizes, embeddings.shape[1])
    values = embeddings.detach().cpu().double()
    if not bool(values.isfinite().all()):
        raise ValueError("embeddings must be finite, got NaN or infinity")
    if len(values) < 2 or values.shape[1] == 0:
        return 0.0
    centred = values - values.mean(0)
    # What is left of a constant is rounding, which must not be taken for its information.
    centred[:, centred.abs().amax(0) <= 1e-12 * values.abs().amax(0)] = 0
    bases = [_orthonormal(part) for part in centred.split(sizes, dim=1)]
    # With an orthonormal basis of each group's columns all S_g are identities.
    spectrum = torch.linalg.svdvals(torch.cat(bases, 1)).square()
    count = sum(basis.shape[1] for basis in bases)
    if count == 0:
        return 0.0
    if count >= len(values) or bool(spectrum.min() <= 1e-12):
        return math.inf
    return max(-0.5 * float(spectrum.log().sum()), 0.0)


class GroupSparseMap(nn.Module):
    """A map to groups of outputs, each through a matrix whose columns can be switched off, and a network of its own.

        y_g = f_g(W_g s),    f_g: linear layers with biases, GELU between them

    It stands in for the last layer of a predictor or decoder. W alone is to be shrunk by `prox_step`, after a gradient step of a fixed size
    and without weight decay; s must have a fixed scale (such as a layer norm without learned scale gives), and f a prior (`prior`), or W
    shrinks while they grow and its zeros mean nothing.

    Args:
        in_dim: m, latent dimensions.
        groups: sizes d_g of the groups, in the order of the outputs.
        width: p, rows of each W_g.
        hidden: widths of hidden layers of each f_g; empty for a linear f_g.

    Attributes:
        weight: W, a parameter (groups, width, latents).
        out_features: outputs in all.

    Returns:
        From `forward(s)` for s of shape (..., m): (..., sum of groups).

    Raises:
        ValueError: for sizes below 1.

    Cost:
        O(groups * width * m) for each code, and f: for that all groups are computed as large as the largest.

    Source:
        Ainsworth et al., 2018 (oi-VAE), arXiv 1802.06765, section 2.

    Examples:
        >>> sparse = GroupSparseMap(6, groups=(2, 3), width=4)
        >>> sparse(torch.rand(7, 6)).shape
        torch.Size([7, 5])
        >>> sparse.prox_step(step=1.0, strength=100.0)
        >>> sparse.influence().count_nonzero()
        tensor(0)
    """

    def __init__(
        self, in_dim: int, groups: Sequence[int], width: int = 8, hidden: Sequence[int] = ()
    ) -> None:
        super().__init__()
        if in_dim < 1:
            raise ValueError(f"in_dim must be >= 1, got {in_dim}")
        if width < 1:
            raise ValueError(f"width must be >= 1, got {width}")
        if any(size < 1 for size in hidden):
            raise ValueError(f"hidden must hold sizes >= 1, got {tuple(hidden)}")
        check_groups(groups, sum(groups))
        self.groups, count, largest = tuple(groups), len(groups), max(groups)
        self.out_features = sum(groups)
        self.weight = nn.Parameter(_draw(count, width, in_dim, fan_in=in_dim))
        sizes = [width, *hidden, largest]
        self.layers = nn.ParameterList(_draw(count, n, k, fan_in=n) for n, k in zip(sizes, sizes[1:]))
        self.biases = nn.ParameterList(torch.zeros(count, k) for k in sizes[1:])
        held = torch.arange(largest) < torch.tensor(self.groups)[:, None]
        self.register_buffer("held", held.flatten().nonzero()[:, 0], persistent=False)

    held: Tensor

    def forward(self, codes: Float[Tensor, "*batch latents"]) -> Float[Tensor, "*batch outputs"]:
        values = torch.einsum("...m,gpm->...gp", codes, self.weight)
        for number, (layer, bias) in enumerate(zip(self.layers, self.biases)):
            values = F.gelu(values) if number else values
            values = torch.einsum("...gn,gnk->...gk", values, layer) + bias
        flat = values.flatten(-2)
        return flat if len(self.held) == flat.shape[-1] else flat[..., self.held]

    def penalty(self) -> Float[Tensor, ""]:
        """Sum of the lengths of all columns of W."""
        return group_lasso(self.weight)

    def prior(self) -> Float[Tensor, ""]:
        """Half the squared length of all weights and biases of the f_g: minus the log density of a standard normal prior, but for a constant."""
        return torch.stack([full_precision(p).square().sum() for p in (*self.layers, *self.biases)]).sum() / 2

    def prox_step(self, step: float, strength: float) -> None:
        """Shortens the columns of W by step * strength; see `prox_group_lasso_`."""
        prox_group_lasso_(self.weight, step, strength)

    @torch.no_grad()
    def influence(self) -> Float[Tensor, "groups latents"]:
        """Length of each column of W: what depends on what."""
        return group_l2_norms(self.weight)


class ProximalStep:
    """An optimizer whose every step ends with the proximal step of group lasso on some of its weights.

    For a loop of your own. Give these weights a group of their own: without weight decay (refused here, for it would shrink them a second
    time), and best with plain SGD and its learning rate as `step`, for then the columns that vanish are those whose gradient of the loss is
    shorter than `strength`. With Adam, whose steps differ from entry to entry, `step` is a choice: keep it fixed in proportion to the
    learning rate.

    Args:
        optimizer: takes the gradient step.
        weights: parameters of the optimizer, each (groups, width, latents).
        step: of `prox_group_lasso_`.
        strength: likewise.

    Raises:
        InputError: for a weight that the optimizer does not hold, or decays.

    Examples:
        >>> sparse = GroupSparseMap(4, groups=(2, 2), width=3)
        >>> others = [p for p in sparse.parameters() if p is not sparse.weight]
        >>> groups = [{"params": [sparse.weight], "weight_decay": 0.0}, {"params": others}]
        >>> optimizer = ProximalStep(
        ...     torch.optim.SGD(groups, lr=0.1), [sparse.weight], step=0.1, strength=20.0
        ... )
        >>> sparse(torch.rand(5, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> sparse.influence().count_nonzero()
        tensor(0)
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], step: float, strength: float
    ) -> None:
        for number, weight in enumerate(weights):
            groups = [g for g in optimizer.param_groups if any(p is weight for p in g["params"])]
            if not groups:
                raise InputError(f"weights must be parameters of the optimizer, number {number} is not")
            if groups[0].get("weight_decay", 0):
                raise InputError(
                    "weight_decay must be 0 for weights with a proximal step: give them a parameter group of their own, "
                    f"got {groups[0]['weight_decay']}"
                )
        self.optimizer, self.weights, self.size, self.strength = optimizer, list(weights), step, strength

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer."""
        return self.optimizer.param_groups

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes the optimizer's step, then the proximal one."""
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        for weight in self.weights:
            prox_group_lasso_(weight, self.size, self.strength)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer: the proximal step has no state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the optimizer."""
        self.optimizer.load_state_dict(state)


def check_groups(groups: Sequence[int], dim: int) -> None:
    """Refuse sizes of groups that are not positive, or do not add up to `dim`."""
    if any(size < 1 for size in groups) or sum(groups) != dim or not len(groups):
        raise ValueError(f"groups must be sizes >= 1 that add up to {dim}, got {tuple(groups)}")


def _draw(*shape: int, fan_in: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(shape), std=fan_in**-0.5)


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of what the columns span, each column judged at its own scale."""
    scale = columns.abs().amax(0)
    columns = columns[:, scale > 0] / scale[scale > 0]
    left, values, _ = torch.linalg.svd(columns, full_matrices=False)
    return left[:, values > 1e-10 * values.amax()] if values.numel() else left
