"""Embeddings to learn from: of a frozen encoder, or computed once for a data set and looked up by sample id."""

from jaxtyping import Float
from torch import Tensor, nn

from coloss.data import Batch, IndexedDataset
from coloss.errors import InputError
from coloss.nn import Frozen
from coloss.train import TeacherTable, cache_teacher

Targets = nn.Module | Tensor | TeacherTable


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
        InputError: if the encoder gives no matrix, or a NaN.

    Examples:
        >>> import torch
        >>> dataset = IndexedDataset(torch.tensor([[1.0], [2.0]]), ids=[2, 0])
        >>> embedding_table(nn.Identity(), dataset).flatten().tolist()
        [2.0, nan, 1.0]
    """
    try:
        table = cache_teacher(encoder, dataset, batch_size=batch_size)
    except InputError as error:
        raise InputError(f"an encoder must give embeddings (batch, dim): {error}") from error
    if len(table.shape()) != 1:
        raise InputError(
            f"an encoder must give embeddings (batch, dim), got (batch, {', '.join(map(str, table.shape()))})"
        )
    return table.dense()


class EmbeddingTargets(nn.Module):
    """Embeddings to learn from, for any batch: of a network that stays as it is, or looked up by sample id.

    Args:
        source: a network, frozen in place, that sees the inputs of the step; or a table from `embedding_table`, or from
            `coloss.train.cache_teacher`, which also refuses inputs that the encoder did not see; no part of the state dict.
        name: what errors call it.

    Returns:
        From `forward(batch)`: (batch, dim), without a graph.

    Raises:
        InputError: for a table of something else than vectors; from `forward`, if the batch has no ids, or one without an embedding; or the network gives no matrix.

    Examples:
        >>> import torch
        >>> targets = EmbeddingTargets(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
        >>> targets(Batch(torch.zeros(2, 8), ids=torch.tensor([1, 0])))
        tensor([[5., 5.],
                [1., 3.]])
    """

    def __init__(self, source: Targets, name: str = "targets") -> None:
        super().__init__()
        if isinstance(source, Tensor):
            if source.ndim != 2 or not source.is_floating_point():
                raise InputError(
                    f"{name} must be a float (ids, dim) table, got {source.dtype} {tuple(source.shape)}"
                )
            source = TeacherTable.of(source)
        if isinstance(source, TeacherTable) and len(source.shape()) != 1:
            stored = ", ".join(map(str, source.shape()))
            raise InputError(f"{name} must be a table of embeddings (batch, dim), got (batch, {stored})")
        self.name = name
        self.network: Frozen | None = None
        if isinstance(source, nn.Module):
            self.network = source if isinstance(source, Frozen) else Frozen(source)
        # Not a buffer: data-parallel training would send every buffer to every process at every step.
        self.table = source if isinstance(source, TeacherTable) else None

    @property
    def dim(self) -> int:
        """Length of an embedding.

        Raises:
            InputError: for a network that does not say.
        """
        if self.table is not None:
            return self.table.shape()[0]
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
        return self.table.rows(batch, called=self.name, one="an embedding")
