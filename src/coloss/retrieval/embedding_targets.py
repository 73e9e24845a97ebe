"""Embeddings to learn from: of a frozen encoder, or computed once for a data set and looked up by sample id."""

import math

from jaxtyping import Float
from torch import Tensor, nn

from coloss.data import Batch, IndexedDataset
from coloss.errors import InputError
from coloss.metrics import predict
from coloss.nn import Frozen

Targets = nn.Module | Tensor


def embedding_table(
    encoder: nn.Module, dataset: IndexedDataset, batch_size: int = 512
) -> Float[Tensor, "ids dim"]:
    """Embeddings of a data set by one encoder, by sample id, computed once.

    Args:
        encoder: gives embeddings (batch, dim); runs in evaluation mode and is left as it was.
        dataset: with the transforms of evaluation; its ids are the rows of the result.
        batch_size: samples in one forward pass.

    Returns:
        One row for each id from 0 to the largest, on the CPU; NaN where there is no such id.

    Raises:
        InputError: if the encoder gives no matrix.

    Examples:
        >>> import torch
        >>> dataset = IndexedDataset(torch.tensor([[1.0], [2.0]]), ids=[2, 0])
        >>> embedding_table(nn.Identity(), dataset).flatten().tolist()
        [2.0, nan, 1.0]
    """
    embeddings = predict(encoder, dataset, batch_size).outputs
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2:
        found = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise InputError(f"an encoder must give embeddings (batch, dim), got {found}")
    table = embeddings.new_full((int(dataset.ids.max()) + 1, embeddings.shape[1]), math.nan)
    table[dataset.ids.cpu()] = embeddings
    return table


class EmbeddingTargets(nn.Module):
    """Embeddings to learn from, for any batch: of a network that stays as it is, or looked up by sample id.

    Args:
        source: a network, frozen in place, that sees the inputs of the step; or a table from `embedding_table`, which is no part of
            the state dict.
        name: what errors call it.

    Returns:
        From `forward(batch)`: (batch, dim), without a graph.

    Raises:
        InputError: from `forward`, if the batch has no ids, or one without an embedding; or the network gives no matrix.

    Examples:
        >>> import torch
        >>> targets = EmbeddingTargets(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
        >>> targets(Batch(torch.zeros(2, 8), ids=torch.tensor([1, 0])))
        tensor([[5., 5.],
                [1., 3.]])
    """

    def __init__(self, source: Targets, name: str = "targets") -> None:
        super().__init__()
        if isinstance(source, Tensor) and (source.ndim != 2 or not source.is_floating_point()):
            raise InputError(
                f"{name} must be a float (ids, dim) table, got {source.dtype} {tuple(source.shape)}"
            )
        self.name = name
        self.network = Frozen(source) if isinstance(source, nn.Module) else None
        # Not a buffer: data-parallel training would send every buffer to every process at every step.
        self.table = source.detach() if isinstance(source, Tensor) else None

    @property
    def dim(self) -> int:
        """Length of an embedding.

        Raises:
            InputError: for a network that does not say.
        """
        if self.table is not None:
            return self.table.shape[1]
        width = getattr(self.network.module, "out_features", None) if self.network is not None else None
        if not isinstance(width, int):
            raise InputError(f"{self.name} must have an integer out_features, or be a table of embeddings")
        return width

    def forward(self, batch: Batch) -> Float[Tensor, "batch dim"]:
        if self.network is not None:
            embeddings = self.network(batch.inputs)
            if not isinstance(embeddings, Tensor) or embeddings.ndim != 2:
                raise InputError(f"{self.name} must give embeddings (batch, dim)")
            return embeddings
        assert self.table is not None
        ids = batch.ids
        if ids is None:
            raise InputError(f"{self.name} are looked up by sample id, and the batch has none")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.table):
            raise InputError(
                f"{self.name} must have a row for every sample id, got {len(self.table)} rows and ids from "
                f"{int(ids.min())} to {int(ids.max())}"
            )
        rows = self.table[ids.to(self.table.device)]
        if bool(rows.isnan().any()):
            missing = int(ids[rows.isnan().any(1).to(ids.device)][0])
            raise InputError(f"{self.name} must have an embedding of every sample, got none for id {missing}")
        return rows.to(ids.device)
