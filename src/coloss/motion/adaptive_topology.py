"""A skeleton graph with learnt links, some of which clients of a federation average and some of which each keeps for itself.

Guo, Liu, Sun, Guo, Zhang, Si, 2023, arXiv 2306.11046, adaptive topology structure:

    A~_k = alpha A_k + beta S_k + gamma P_k        for each layer and each subset k of neighbours

with the skeleton's normalised adjacency A, a shared matrix S (the authors' influence matrix, averaged over clients), a private matrix P (their
unique matrix, which never leaves the client) and learnt coefficients.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.nn import GraphConv


class AdaptiveTopology(nn.Module):
    """Adjacency matrices that training may add links to: `alpha A + beta S + gamma P`.

    Only the sum beta S + gamma P has an effect on one client: S and P are told apart by averaging S over clients and keeping P, not by local
    training, and a coefficient can be traded for the scale of its matrix. Weight decay on all of them keeps that from drifting.

    Args:
        adjacency: A, float (subsets, joints, joints), [k, receiving, giving], as of `coloss.ops.graph_partition`.
        shared: whether there is an S.
        private: whether there is a P.
        scales: alpha, beta and gamma at the start.
        noise: standard deviation of S and P at the start; 0 begins at the skeleton's own links.
        generator: of that noise.

    Attributes:
        shared_matrix, private_matrix: S and P, parameters; None where there is none.
        fixed_scale, shared_scale, private_scale: the coefficients, parameters.
        adjacency: A, a buffer: it is stored with the parameters, since learnt importances may be in it.
        private_names: names of what stays on a client: A, which the client has anyway, P and the coefficients. S alone may be averaged.

    Raises:
        ValueError: for an adjacency of another shape, a negative noise, or a coefficient of 0 with a matrix of 0, which no gradient would ever
            reach.

    Examples:
        >>> from coloss.ops import graph_partition
        >>> adjacency = graph_partition([-1, 0, 0])
        >>> topology = AdaptiveTopology(adjacency)
        >>> torch.equal(topology(), adjacency), topology.private_names
        (True, ('adjacency', 'fixed_scale', 'shared_scale', 'private_scale', 'private_matrix'))
    """

    adjacency: Tensor

    def __init__(
        self,
        adjacency: Float[Tensor, "subsets joints joints"],
        shared: bool = True,
        private: bool = True,
        *,
        scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if adjacency.ndim != 3 or adjacency.shape[1] != adjacency.shape[2] or not len(adjacency):
            raise ValueError(f"adjacency must be (subsets, joints, joints), got {tuple(adjacency.shape)}")
        if noise < 0:
            raise ValueError(f"noise must be >= 0, got {noise}")
        for name, there, scale in (("shared", shared, scales[1]), ("private", private, scales[2])):
            if there and scale == 0 and noise == 0:
                raise ValueError(
                    f"scales must not be 0 where the matrix begins at 0 (neither would get a gradient), got 0 for {name}"
                )
        self.register_buffer("adjacency", adjacency.detach().clone())

        def matrix(there: bool) -> nn.Parameter | None:
            if not there:
                return None
            drawn = (
                torch.randn(adjacency.shape, generator=generator) if noise else torch.zeros(adjacency.shape)
            )
            return nn.Parameter((noise * drawn).to(adjacency))

        self.shared_matrix, self.private_matrix = matrix(shared), matrix(private)
        self.fixed_scale = nn.Parameter(adjacency.new_tensor(scales[0]))
        self.shared_scale = nn.Parameter(adjacency.new_tensor(scales[1])) if shared else None
        self.private_scale = nn.Parameter(adjacency.new_tensor(scales[2])) if private else None

    @property
    def private_names(self) -> tuple[str, ...]:
        """Parameters and buffers that stay on a client."""
        names = ("adjacency", "fixed_scale", "shared_scale", "private_scale", "private_matrix")
        return tuple(name for name in names if getattr(self, name) is not None)

    def forward(self) -> Float[Tensor, "subsets joints joints"]:
        """The matrices in use."""
        mixed = self.fixed_scale * self.adjacency
        if self.shared_matrix is not None and self.shared_scale is not None:
            mixed = mixed + self.shared_scale * self.shared_matrix
        if self.private_matrix is not None and self.private_scale is not None:
            mixed = mixed + self.private_scale * self.private_matrix
        return mixed


class AdaptiveGraphConv(GraphConv):
    """A graph convolution whose adjacency is an `AdaptiveTopology`.

        out[u] = sum over subsets k and joints v of A~_k[u, v] W_k x[v]

    Args:
        in_channels: of the maps.
        out_channels: of the result.
        partition: A, float (subsets, joints, joints).
        shared: whether there is a shared matrix.
        private: whether there is a private matrix.
        noise: see `AdaptiveTopology`.
        generator: of that noise.

    Attributes:
        topology: the `AdaptiveTopology`, which holds A; `partition` is where it began.

    Raises:
        ValueError: for a partition of another shape or a negative noise.

    Cost: as `GraphConv`, and 2 x subsets x joints^2 more parameters at most.

    Examples:
        >>> from coloss.ops import graph_partition
        >>> layer = AdaptiveGraphConv(3, 16, graph_partition([-1, 0, 1]))
        >>> layer(torch.rand(2, 3, 8, 3)).shape
        torch.Size([2, 16, 8, 3])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        partition: Float[Tensor, "subsets joints joints"],
        shared: bool = True,
        private: bool = True,
        *,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, partition, "fixed")
        self.topology = AdaptiveTopology(partition, shared, private, noise=noise, generator=generator)
        # Only its length is used here: the A in use is stored with the topology.
        self.register_buffer("partition", self.partition, persistent=False)

    def adjacency(self) -> Float[Tensor, "subsets joints joints"]:
        """The matrices in use."""
        return self.topology()


def add_adaptive_topology(
    model: nn.Module,
    shared: bool = True,
    private: bool = True,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> int:
    """Give every graph convolution of a model an adaptive topology, in place.

    A layer keeps its weights, and begins with the adjacency that it had, learnt importances included; without noise the model computes what it
    did.

    Args:
        model: with `coloss.nn.GraphConv` layers, such as `SkeletonEncoder`.
        shared: whether there are shared matrices.
        private: whether there are private matrices.
        noise: see `AdaptiveTopology`.
        generator: of that noise.

    Returns:
        Number of layers that were changed.

    Raises:
        ValueError: if the model has no such layer (`RelationGraphConv` is none).

    Examples:
        >>> from coloss.nn import SkeletonEncoder
        >>> from coloss.ops import graph_partition
        >>> add_adaptive_topology(SkeletonEncoder(graph_partition([-1, 0, 1])))
        3
    """
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, GraphConv) and not isinstance(module, AdaptiveGraphConv) and path
    ]
    if not found:
        raise ValueError(f"model must hold GraphConv layers, got {type(model).__name__} without one")
    for path, layer in found:
        adaptive = AdaptiveGraphConv(
            layer.project.in_channels,
            layer.out_channels,
            layer.adjacency().detach(),
            shared,
            private,
            noise=noise,
            generator=generator,
        )
        adaptive.project = layer.project
        adaptive.train(layer.training)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, adaptive)
    return len(found)
