"""Heads whose embeddings search an index that an older encoder filled.

For any training loop, with the losses of `coloss.retrieval.compatible_losses`; `coloss.retrieval.basis_transform` wraps both as methods
for `fit`, and says where they come from.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

from coloss.errors import InputError
from coloss.ops import full_precision, without_autocast


class CompatibleOutput(NamedTuple):
    """What a head gives for a batch.

    Attributes:
        embedding: for the new index, (batch, new dimensions).
        compatible: its first part, which searches the old index; not of unit length.
        feature: what is held to the unconstrained new encoder, unit rows.
        logits: of the head's own classifier, which exists only in training; None without one.
    """

    embedding: Tensor
    compatible: Tensor
    feature: Tensor
    logits: Tensor | None


class BasisTransform(nn.Module):
    """A learned rotation (or reflection) of vectors: lengths and inner products stay as they are.

    The matrix is the exponential of a skew-symmetric parameter times a random orthogonal start, so it is orthogonal whatever the
    optimizer does. It stays in float32 (or float64) under autocast and in half-precision networks.

    Args:
        dim: length of the vectors, >= 1.

    Returns:
        From `forward`: vectors of the same shape, at least float32.

    Raises:
        InputError: if dim < 1.

    Cost:
        A matrix exponential, O(dim^3), at each forward pass until `merge`.

    Examples:
        >>> rotate, vectors = BasisTransform(4), torch.randn(3, 4)
        >>> turned = rotate(vectors)
        >>> torch.allclose(turned @ turned.T, vectors @ vectors.T, atol=1e-5)
        True
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise InputError(f"dim must be >= 1, got {dim}")
        self.linear: Any = orthogonal(nn.Linear(dim, dim, bias=False), orthogonal_map="matrix_exp")

    @property
    def matrix(self) -> Float[Tensor, "dim dim"]:
        """The orthogonal matrix; `forward` multiplies vectors by it from the left."""
        with without_autocast(self.linear.weight.device):
            return self.linear.weight

    def forward(self, vectors: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        with without_autocast(vectors.device):
            vectors = full_precision(vectors)
            return F.linear(vectors, self.linear.weight.to(vectors.dtype))

    def merge(self) -> None:
        """Keep the matrix as plain weights: no exponential at each call, and no training that keeps it orthogonal."""
        if parametrize.is_parametrized(self.linear):
            parametrize.remove_parametrizations(self.linear, "weight", leave_parametrized=True)

    def _apply(self, fn: Any, recurse: bool = True) -> "BasisTransform":
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(move, recurse)


class BackwardCompatibleHead(nn.Module):
    r"""Turns features into an embedding whose first part lives in an old encoder's space and whose whole keeps all of the new one.

    With $h$ the features and $k$ `extra_dims`:

        f = h[:dim_new] / |h[:dim_new]|            a = z / |z|,  z = W relu(h) + bias  in R^k
        n = [a ; P (scale f)]                      b = R n[:dim_old]
        embedding = [b ; n[dim_old:]]              P, R orthogonal

    so $|embedding|^2 = 1 + scale^2$ and $\langle e, e' \rangle = \langle a, a' \rangle + scale^2 \langle f, f' \rangle$ (without the
    1 and the first product where k = 0): rotations lose nothing of f. (In the paper z has dim_old entries of which k are used; as both
    are normalised, the others have no effect.)

    Args:
        dim_new: length of f, which is held to the unconstrained new encoder.
        dim_old: length of the old embeddings.
        extra_dims: k, free dimensions beside f, in [0, dim_old]; with dim_new at least dim_old.
        scale: weight of f against a, > 0.
        num_classes: give the head a classifier on f, for training; None for none.
        in_features: length of h, which a linear layer then brings to dim_new + dim_old; None: h has that length and is taken as it is.
        logit_scale: of the classifier, whose inputs have unit length: logits are logit_scale * W f. The paper has 1, which starts flat.

    Attributes:
        out_features: extra_dims + dim_new.
        dim_old: as given; the first so many coordinates of the embedding search the old index.

    Returns:
        From `forward(h)`: a `CompatibleOutput`, at least float32.

    Raises:
        InputError: for sizes that do not fit one another.

    Cost:
        Two small matrix products, and two matrix exponentials until `ship`.

    Source:
        Zhou et al. 2022, arXiv 2211.03989.

    Examples:
        >>> head = BackwardCompatibleHead(dim_new=6, dim_old=4, extra_dims=2, scale=2.0)
        >>> output = head(torch.randn(5, 10))
        >>> output.embedding.shape, output.compatible.shape, head.out_features
        (torch.Size([5, 8]), torch.Size([5, 4]), 8)
        >>> torch.allclose(output.embedding.norm(dim=1), torch.tensor(5.0).sqrt())
        True
    """

    def __init__(
        self,
        dim_new: int,
        dim_old: int,
        extra_dims: int = 32,
        scale: float = 2.0,
        num_classes: int | None = None,
        *,
        in_features: int | None = None,
        logit_scale: float = 16.0,
    ) -> None:
        super().__init__()
        for name, size in (("dim_new", dim_new), ("dim_old", dim_old)):
            if size < 1:
                raise InputError(f"{name} must be >= 1, got {size}")
        if not 0 <= extra_dims <= dim_old:
            raise InputError(f"extra_dims must be in [0, dim_old = {dim_old}], got {extra_dims}")
        if extra_dims + dim_new < dim_old:
            raise InputError(
                f"extra_dims + dim_new must be >= dim_old = {dim_old}, got {extra_dims} + {dim_new}"
            )
        for name, value in (("scale", scale), ("logit_scale", logit_scale)):
            if not value > 0:
                raise InputError(f"{name} must be > 0, got {value}")
        self.dim_new, self.dim_old, self.extra_dims = dim_new, dim_old, extra_dims
        self.scale, self.logit_scale = float(scale), float(logit_scale)
        self.out_features = extra_dims + dim_new
        width = dim_new + dim_old
        self.expand = nn.Identity() if in_features is None else nn.Linear(in_features, width)
        # Whatever reaches no loss would make data-parallel training wait for its gradient.
        self.free = nn.Linear(width, extra_dims) if extra_dims else None
        self.rotate_new = BasisTransform(dim_new) if extra_dims < dim_old else nn.Identity()
        self.rotate_old = BasisTransform(dim_old)
        self.classifier = None if num_classes is None else nn.Linear(dim_new, num_classes, bias=False)

    def forward(self, features: Float[Tensor, "batch features"]) -> CompatibleOutput:
        expanded = self.expand(features)
        if expanded.shape[1] != self.dim_new + self.dim_old:
            raise InputError(
                f"features must have dim_new + dim_old = {self.dim_new + self.dim_old} columns, got {expanded.shape[1]}"
            )
        feature = F.normalize(full_precision(expanded[:, : self.dim_new]), dim=1)
        parts = [] if self.free is None else [F.normalize(full_precision(self.free(expanded.relu())), dim=1)]
        joined = torch.cat([*parts, self.rotate_new(self.scale * feature)], dim=1)
        compatible = self.rotate_old(joined[:, : self.dim_old])
        embedding = torch.cat([compatible, joined[:, self.dim_old :]], dim=1)
        logits = _scaled_logits(self.classifier, feature, self.logit_scale)
        return CompatibleOutput(embedding, compatible, feature, logits)

    def ship(self) -> None:
        """Drop the classifier and turn the rotations into plain matrices; embeddings stay as they are."""
        self.classifier = None
        for module in (self.rotate_new, self.rotate_old):
            if isinstance(module, BasisTransform):
                module.merge()


class PrototypeHead(nn.Module):
    """Turns features into an embedding of the old encoder's length: the head of backward-compatible training (BCT), the baseline.

    Args:
        in_features: length of a feature vector.
        dim_old: length of the old embeddings, and of the new ones.
        num_classes: give the head a classifier, for training; None for none.
        logit_scale: of the classifier, whose inputs have unit length.

    Returns:
        From `forward`: a `CompatibleOutput` in which embedding, compatible part and feature are the same unit vectors.

    Source:
        Shen et al. 2020, arXiv 2003.11942.

    Examples:
        >>> output = PrototypeHead(10, dim_old=4)(torch.randn(5, 10))
        >>> output.embedding.shape, output.embedding is output.compatible
        (torch.Size([5, 4]), True)
    """

    def __init__(
        self, in_features: int, dim_old: int, num_classes: int | None = None, *, logit_scale: float = 16.0
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(in_features, dim_old)
        self.out_features = self.dim_old = dim_old
        self.logit_scale = logit_scale
        self.classifier = None if num_classes is None else nn.Linear(dim_old, num_classes, bias=False)

    def forward(self, features: Float[Tensor, "batch features"]) -> CompatibleOutput:
        unit = F.normalize(full_precision(self.embed(features)), dim=1)
        return CompatibleOutput(unit, unit, unit, _scaled_logits(self.classifier, unit, self.logit_scale))

    def ship(self) -> None:
        """Drop the classifier; embeddings stay as they are."""
        self.classifier = None


class UpgradedEncoder(nn.Module):
    """An encoder under a compatible head: one network that fills the new index and searches the old one.

    Args:
        trunk: gives features (batch, in_features).
        head: a `BackwardCompatibleHead` or `PrototypeHead`.

    Attributes:
        out_features: length of an embedding.

    Returns:
        From `forward`: embeddings for the new index, compared by inner product or cosine (all have one length).

    Examples:
        >>> from coloss.retrieval import BackwardCompatibleHead, UpgradedEncoder
        >>> encoder = UpgradedEncoder(nn.Identity(), BackwardCompatibleHead(6, 4, 2, in_features=3))
        >>> inputs = torch.zeros(5, 3)
        >>> encoder(inputs).shape, encoder.compatible(inputs).shape
        (torch.Size([5, 8]), torch.Size([5, 4]))
    """

    def __init__(self, trunk: nn.Module, head: BackwardCompatibleHead | PrototypeHead) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head
        self.out_features = head.out_features

    def forward(self, inputs: Any) -> Float[Tensor, "batch dim"]:
        return self.head(self.trunk(inputs)).embedding

    def compatible(self, inputs: Any) -> Float[Tensor, "batch dim_old"]:
        """Unit vectors that search the old index, or join it."""
        return F.normalize(self.head(self.trunk(inputs)).compatible, dim=1)


def _scaled_logits(classifier: nn.Linear | None, unit: Tensor, scale: float) -> Tensor | None:
    return None if classifier is None else scale * classifier(unit.to(classifier.weight.dtype))
