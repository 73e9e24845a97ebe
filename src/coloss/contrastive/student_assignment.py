"""Soft clusters of embeddings around centres that are learnt, and the target that sharpens them: deep embedded clustering."""

import math
import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.ops import full_precision


def k_means(
    embeddings: Float[Tensor, "nodes dim"], clusters: int, *, seed: int = 0, restarts: int = 1
) -> tuple[Int[Tensor, " nodes"], Float[Tensor, "found dim"]]:
    """Clusters of embeddings by scikit-learn's k-means, and their centres; without gradient.

    Args:
        embeddings: at least one row, finite.
        clusters: how many, >= 1; no more than there are nodes are made.
        seed: of the first centres.
        restarts: of which the best is kept, >= 1.

    Returns:
        The cluster of each node, and the centres in the type and on the device of the embeddings.

    Raises:
        ValueError: for a number below 1, no embeddings, or values that are not finite.

    Examples:
        >>> clusters, centres = k_means(torch.tensor([[0.0], [0.2], [5.0]]), 2)
        >>> (
        ...     bool(clusters[0] == clusters[1] != clusters[2]),
        ...     sorted(round(c, 1) for c in centres.flatten().tolist()),
        ... )
        (True, [0.1, 5.0])
    """
    for name, value in (("clusters", clusters), ("restarts", restarts), ("embeddings", len(embeddings))):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    rows = full_precision(embeddings).detach()
    model = KMeans(min(clusters, len(rows)), n_init=restarts, random_state=seed)
    with warnings.catch_warnings():
        # Fewer distinct rows than clusters leave some clusters empty, which is no trouble here.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = model.fit_predict(rows.cpu().double().numpy())
    centres = torch.from_numpy(model.cluster_centers_).to(rows)
    return torch.from_numpy(labels).long().to(rows.device), centres


def sharpened_target(probabilities: Float[Tensor, "nodes clusters"]) -> Float[Tensor, "nodes clusters"]:
    r"""The assignment to be learnt from a soft one: surer, and with less weight on large clusters.

    $p_{ik} \propto q_{ik}^2 / \sum_i q_{ik}$, with rows that sum to 1; without gradient.

    Args:
        probabilities: q, rows that sum to 1.

    Returns:
        In the shape of q. An empty cluster gets 0.

    Source:
        Xie, Girshick, Farhadi, 2016, arXiv 1511.06335, equation 3.

    Examples:
        >>> sharpened_target(torch.tensor([[0.5, 0.5], [0.9, 0.1]]))
        tensor([[0.3000, 0.7000],
                [0.9720, 0.0280]])
    """
    q = full_precision(probabilities.detach())
    sizes = q.sum(0)
    weight = q.square() / torch.where(sizes > 0, sizes, 1.0)
    return weight / weight.sum(1, keepdim=True)


def log_assignments(
    embeddings: Float[Tensor, "nodes dim"], centres: Float[Tensor, "clusters dim"], degrees: float = 1.0
) -> Float[Tensor, "nodes clusters"]:
    r"""Logarithm of the probability of each cluster for each embedding, by a Student-t kernel; exact far from all centres too.

    $\log q_{ik}$ with $q_{ik} \propto (1 + \|z_i - \mu_k\|^2 / v)^{-(v + 1) / 2}$.

    Args:
        embeddings: z.
        centres: $\mu$, one for each cluster.
        degrees: $v > 0$, degrees of freedom.

    Returns:
        (nodes, clusters), at least float32.

    Source:
        Xie, Girshick, Farhadi, 2016 (DEC), arXiv 1511.06335, equation 1.

    Examples:
        >>> log_assignments(torch.zeros(1, 1), torch.tensor([[0.0], [1.0]])).exp()  # 1 : 1 / 2
        tensor([[0.6667, 0.3333]])
    """
    # By differences: the expanded square would lose the digits of embeddings near a centre.
    distances = torch.cdist(
        full_precision(embeddings), full_precision(centres), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return (-(degrees + 1) / 2 * torch.log1p(distances.square() / degrees)).log_softmax(1)


class StudentTAssignment(nn.Module):
    """The probability of each cluster for an embedding, by a Student-t kernel around its centre, which is learnt; see `log_assignments`.

    Args:
        clusters: C >= 1.
        dim: of the embeddings, >= 1.
        degrees: > 0, degrees of freedom of the kernel.

    Attributes:
        centres: (clusters, dim), a parameter; random until `initialize`.

    Returns:
        From `forward(embeddings)`: probabilities (nodes, clusters), at least float32.

    Raises:
        ValueError: for a value out of range.

    Cost:
        O(nodes * clusters * dim) time, O(nodes * clusters) memory.

    Source:
        Xie, Girshick, Farhadi, 2016 (DEC), arXiv 1511.06335.

    Examples:
        >>> embeddings = torch.tensor([[0.0, 0.0], [0.1, 0.0], [4.0, 4.0]])
        >>> assignment = StudentTAssignment(2, 2).initialize(embeddings)
        >>> found = assignment(embeddings).argmax(1)
        >>> bool(found[0] == found[1] != found[2])
        True
    """

    def __init__(self, clusters: int, dim: int, degrees: float = 1.0) -> None:
        super().__init__()
        for name, value in (("clusters", clusters), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not 0 < degrees < math.inf:
            raise ValueError(f"degrees must be > 0 and finite, got {degrees}")
        self.degrees = degrees
        self.centres = nn.Parameter(torch.randn(clusters, dim))

    def log_probabilities(self, embeddings: Float[Tensor, "nodes dim"]) -> Float[Tensor, "nodes clusters"]:
        """Logarithms of the probabilities, see `log_assignments`."""
        return log_assignments(embeddings, self.centres, self.degrees)

    def forward(self, embeddings: Float[Tensor, "nodes dim"]) -> Float[Tensor, "nodes clusters"]:
        return self.log_probabilities(embeddings).exp()

    def loss(
        self,
        embeddings: Float[Tensor, "nodes dim"],
        target: Float[Tensor, "nodes clusters"] | None = None,
    ) -> Float[Tensor, ""]:
        """Divergence KL(target || q) for each node, averaged; without a target `sharpened_target` of q itself."""
        logs = self.log_probabilities(embeddings)
        target = sharpened_target(logs.exp()) if target is None else target.detach().to(logs.dtype)
        return F.kl_div(logs, target, reduction="sum") / max(len(logs), 1)

    @torch.no_grad()
    def initialize(
        self, embeddings: Float[Tensor, "nodes dim"], *, seed: int = 0, restarts: int = 20
    ) -> "StudentTAssignment":
        """Put the centres where k-means finds clusters of these embeddings; gives back the module.

        Raises:
            ValueError: if there are fewer embeddings than clusters.
        """
        if len(embeddings) < len(self.centres):
            raise ValueError(
                f"embeddings must be at least as many as the {len(self.centres)} clusters, got {len(embeddings)}"
            )
        _, centres = k_means(embeddings, len(self.centres), seed=seed, restarts=restarts)
        self.centres.copy_(centres)
        return self
