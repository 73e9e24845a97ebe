"""A backbone with a linear head, and two encoders that embed into one space."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coloss.ops.precision import full_precision


class Classifier(nn.Module):
    """A backbone followed by one linear layer: `head(backbone(x))`.

    Args:
        backbone: any module with an integer attribute `out_features`, the size of its result's last
            dimension.
        num_outputs: number of classes, or 1 for a binary logit or a regression.

    Attributes:
        backbone: the module that was given.
        head: `nn.Linear(backbone.out_features, num_outputs)`.

    Returns:
        From `forward`: logits of shape (batch, num_outputs); a backbone that gives tokens gives logits per
        token.

    Raises:
        ValueError: for a backbone without `out_features`, or `num_outputs` below 1.

    Examples:
        >>> import torch
        >>> from coloss.nn import Classifier, ConvNet
        >>> model = Classifier(ConvNet(1, (8, 16)), num_outputs=10)
        >>> model(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, backbone: nn.Module, num_outputs: int) -> None:
        super().__init__()
        features = getattr(backbone, "out_features", None)
        if not isinstance(features, int):
            raise ValueError(f"backbone must have an integer out_features, got {type(backbone).__name__}")
        if num_outputs < 1:
            raise ValueError(f"num_outputs must be >= 1, got {num_outputs}")
        self.backbone = backbone
        self.head = nn.Linear(features, num_outputs)

    def forward(self, inputs: Any) -> Float[Tensor, "batch *tokens outputs"]:
        return self.head(self.backbone(inputs))


class DualEncoder(nn.Module):
    """Two towers that embed queries and documents (or images and texts) into one space.

    `forward((queries, documents))` returns `(f(queries), g(documents))`, each row divided by its Euclidean
    norm when `normalize` is set, so that dot products are cosines. One module may serve as both towers; it is
    then registered once, so that its weights appear once in `parameters()` and in `state_dict()`.

    Args:
        query_encoder: module that maps queries to (batch, dim).
        document_encoder: module that maps documents to (batch, dim); may be `query_encoder` itself.
        normalize: give rows of unit norm, in at least float32; a row of zeros stays zero.

    Attributes:
        query_encoder: the first tower.
        document_encoder: the second tower; the first one again when it is shared.

    Returns:
        From `forward`: a pair of (batch, dim) embeddings.

    Raises:
        ValueError: when the towers declare different `out_features`, or the batch is not a pair.

    Examples:
        >>> import torch
        >>> from coloss.nn import MLP, DualEncoder
        >>> model = DualEncoder(MLP(20, [32], 8), MLP(30, [32], 8))
        >>> queries, documents = model((torch.rand(4, 20), torch.rand(4, 30)))
        >>> (queries @ documents.T).shape, bool((queries.norm(dim=1) - 1).abs().max() < 1e-6)
        (torch.Size([4, 4]), True)
    """

    def __init__(
        self, query_encoder: nn.Module, document_encoder: nn.Module, *, normalize: bool = True
    ) -> None:
        super().__init__()
        sizes = [getattr(tower, "out_features", None) for tower in (query_encoder, document_encoder)]
        if None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(f"both encoders must have the same out_features, got {sizes[0]} and {sizes[1]}")
        self.query_encoder = query_encoder
        if document_encoder is not query_encoder:
            self.document_encoder = document_encoder
        self.normalize = normalize

    def __getattr__(self, name: str) -> Any:
        if name == "document_encoder" and name not in self._modules:
            return self.query_encoder
        return super().__getattr__(name)

    def encode_query(self, queries: Any) -> Float[Tensor, "batch dim"]:
        """Embeddings of a batch of queries."""
        return self._finish(self.query_encoder(queries))

    def encode_document(self, documents: Any) -> Float[Tensor, "batch dim"]:
        """Embeddings of a batch of documents."""
        return self._finish(self.document_encoder(documents))

    def forward(
        self, pair: Sequence[Any]
    ) -> tuple[Float[Tensor, "queries dim"], Float[Tensor, "documents dim"]]:
        if isinstance(pair, Tensor) or len(pair) != 2:
            raise ValueError(f"pair must be (queries, documents), got {_describe(pair)}")
        queries, documents = pair
        return self.encode_query(queries), self.encode_document(documents)

    def _finish(self, embeddings: Tensor) -> Tensor:
        if not self.normalize:
            return embeddings
        return F.normalize(full_precision(embeddings), dim=-1)


def _describe(pair: Any) -> str:
    if isinstance(pair, Tensor):
        return f"a tensor of shape {tuple(pair.shape)}"
    return f"{len(pair)} items"
