"""Labelled examples to be shown to a reader: the nearest to each query, never the query itself nor a copy of it.

While a model is trained, the example that it is asked about usually sits in the bank as well, and so may the same text under another
id. Either would hand over the answer, training loss falls and nothing is learnt. So a search leaves out by id and by content.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.metrics import nearest_neighbours
from coloss.metrics.pair_scores import Metric
from coloss.ops import full_precision

Payload = Tensor | tuple[Tensor, ...] | Sequence[str]


class Retrieved(NamedTuple):
    """Places in a bank, best first.

    Attributes:
        scores: (queries, k), the higher the nearer (distances with a minus sign); -infinity where fewer than k could be found.
        positions: (queries, k), rows of the bank; -1 there.
    """

    scores: Tensor
    positions: Tensor


def content_keys(contents: Tensor | Sequence[str]) -> Int[Tensor, " items"]:
    """One number for each text or row of numbers, equal where the contents are: what tells copies under different ids.

    Texts count as equal if they differ in case, white space or Unicode form alone; numbers must be equal in every bit (-0 is 0).

    Args:
        contents: strings, or a tensor (items, ...).

    Returns:
        int64 (items), on the device of the tensor; the same on every machine and in every run.

    Cost:
        A loop in Python, a few microseconds for each item: the digest is cryptographic, so equal keys of unequal contents can be
        neglected (2^-64 for a pair).

    Examples:
        >>> keys = content_keys(["Is my card  lost?", "is my card lost?", "My card is lost."])
        >>> bool(keys[0] == keys[1]), bool(keys[0] == keys[2])
        (True, False)
    """
    if isinstance(contents, Tensor):
        rows = contents.detach().cpu().flatten(1) if contents.ndim > 1 else contents.detach().cpu()[:, None]
        rows = rows + 0.0 if rows.is_floating_point() else rows
        if rows.dtype == torch.bfloat16:
            rows = rows.float()
        parts = [row.tobytes() for row in rows.contiguous().numpy()]
        device = contents.device
    else:
        parts = [
            " ".join(unicodedata.normalize("NFKC", text).casefold().split()).encode() for text in contents
        ]
        device = torch.device("cpu")
    digests = [
        int.from_bytes(hashlib.blake2b(part, digest_size=8).digest(), "little", signed=True) for part in parts
    ]
    return torch.tensor(digests, dtype=torch.int64, device=device)


class DemonstrationBank(nn.Module):
    """Embedded examples with what belongs to them, searched exactly.

    Args:
        embeddings: (items, dimensions), finite; of an encoder that is frozen: the bank does not follow one that learns.
        payload: what is shown of an item: a tensor, a tuple of tensors (items, ...) such as `(inputs, labels)`, or texts.
        ids: int64 (items), distinct; 0, 1, 2 ... by default.
        content: int64 (items), equal for copies; default: `content_keys` of the payload (of its first tensor).
        metric: "cosine", "inner" (dot product) or "euclidean".

    Raises:
        ValueError: if numbers of items differ, ids repeat or embeddings are not finite.

    Tensors are buffers, which move and are saved with a model; texts stay as they are, and are not saved.

    Examples:
        >>> texts = ["card lost", "Card lost ", "card late", "new pin"]
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.5], [0.0, 1.0]])
        >>> bank = DemonstrationBank(embeddings, texts)
        >>> found = bank.search(
        ...     embeddings[:1], k=2, exclude_ids=bank.ids[:1], exclude_content=bank.content[:1]
        ... )
        >>> bank.take(found.positions)  # neither the item itself nor its copy
        [['card late', 'new pin']]
    """

    embeddings: Tensor
    ids: Tensor
    content: Tensor

    def __init__(
        self,
        embeddings: Float[Tensor, "items dimensions"],
        payload: Payload,
        *,
        ids: Int[Tensor, " items"] | None = None,
        content: Int[Tensor, " items"] | None = None,
        metric: Metric = "cosine",
    ) -> None:
        super().__init__()
        items = len(embeddings)
        tensors = (payload,) if isinstance(payload, Tensor) else payload if isinstance(payload, tuple) else ()
        self.texts = None if isinstance(payload, Tensor | tuple) else list(payload)
        for part in tensors if self.texts is None else (self.texts,):
            if len(part) != items:
                raise ValueError(
                    f"payload must have a row for each of the {items} embeddings, got {len(part)}"
                )
        if metric not in ("cosine", "inner", "euclidean"):
            raise ValueError(f'metric must be "cosine", "inner" or "euclidean", got {metric!r}')
        if not bool(embeddings.isfinite().all()):
            raise ValueError("embeddings must be finite, got NaN or infinity")
        ids = torch.arange(items) if ids is None else ids
        content = (
            content_keys(self.texts if self.texts is not None else tensors[0]) if content is None else content
        )
        for name, numbers in (("ids", ids), ("content", content)):
            if numbers.shape != (items,):
                raise ValueError(f"{name} must have shape ({items},), got {tuple(numbers.shape)}")
        if len(ids.unique()) != items:
            raise ValueError(f"ids must be distinct, got {items - len(ids.unique())} repeats")
        self.metric: Metric = metric
        self.register_buffer("embeddings", embeddings.detach())
        self.register_buffer("ids", ids.to(embeddings.device))
        self.register_buffer("content", content.to(embeddings.device))
        self._parts = len(tensors)
        self._single = isinstance(payload, Tensor)
        for number, tensor in enumerate(tensors):
            self.register_buffer(f"payload_{number}", tensor.detach().to(embeddings.device))

    def __len__(self) -> int:
        """Number of items."""
        return len(self.embeddings)

    @property
    def payload(self) -> Any:
        """What is shown of every item, as it was given."""
        if self.texts is not None:
            return self.texts
        parts = tuple(getattr(self, f"payload_{number}") for number in range(self._parts))
        return parts[0] if self._single else parts

    @torch.no_grad()
    def search(
        self,
        queries: Float[Tensor, "queries dimensions"],
        k: int,
        *,
        exclude_ids: Int[Tensor, " queries"] | None = None,
        exclude_content: Int[Tensor, " queries"] | None = None,
    ) -> Retrieved:
        """The k nearest items of each query, exactly; of equal scores the lower position comes first.

        Args:
            queries: embeddings, finite.
            k: items for each query, >= 1.
            exclude_ids: id of each query: the item that carries it is left out.
            exclude_content: content of each query, from `content_keys`: all items with the same are left out.

        Returns:
            Scores and positions (queries, k), without a gradient.

        Raises:
            ValueError: if shapes disagree, queries are not finite, or k < 1.

        Cost:
            That of `coloss.metrics.nearest_neighbours`: the product of queries and bank, in tiles.
        """
        self._check(len(queries), k, exclude_ids, exclude_content)
        scores = full_precision(queries.new_full((len(queries), k), -torch.inf))
        positions = torch.full((len(queries), k), -1, device=queries.device)
        if not len(self):
            return Retrieved(scores, positions)
        exclude: bool | tuple[Tensor, Tensor] = False
        if exclude_content is not None:
            exclude = (exclude_content, self.content)
        elif exclude_ids is not None:
            exclude = (exclude_ids, self.ids)
        # Ids are distinct, so one item more than wanted makes up for the one that an id may take away.
        both = exclude_content is not None and exclude_ids is not None
        found = nearest_neighbours(
            queries.detach(), self.embeddings, k + both, metric=self.metric, exclude=exclude
        )
        values, places = -found.values if self.metric == "euclidean" else found.values, found.indices
        if both:
            assert exclude_ids is not None
            dropped = self.ids[places.clamp(min=0)] == exclude_ids[:, None].to(self.ids.device)
            places, values = places.masked_fill(dropped, -1), values.masked_fill(dropped, -torch.inf)
            order = dropped.int().argsort(dim=1, stable=True)
            values, places = values.gather(1, order)[:, :k], places.gather(1, order)[:, :k]
        scores[:, : values.shape[1]] = values.to(scores.dtype)
        positions[:, : places.shape[1]] = places
        return Retrieved(scores, positions)

    @torch.no_grad()
    def draw(
        self,
        queries: int,
        k: int,
        *,
        exclude_ids: Int[Tensor, " queries"] | None = None,
        exclude_content: Int[Tensor, " queries"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Retrieved:
        """k random items for each query, without repeats: what a search has to be held against.

        Args:
            queries: how many there are.
            k, exclude_ids, exclude_content: as for `search`.
            generator: of the draw.

        Returns:
            Positions as from `search`, with scores of 0.

        Raises:
            ValueError: if shapes disagree or k < 1.

        Cost:
            queries * items random numbers.
        """
        self._check(queries, k, exclude_ids, exclude_content)
        device = generator.device if generator is not None else self.ids.device
        keys = torch.rand(queries, len(self), generator=generator, device=device).to(self.ids.device)
        for excluded, own in ((exclude_ids, self.ids), (exclude_content, self.content)):
            if excluded is not None:
                keys = keys.masked_fill(excluded.to(own.device)[:, None] == own, -1.0)
        best, places = keys.topk(min(k, len(self)), dim=1)
        places = nn.functional.pad(places.masked_fill(best < 0, -1), (0, k - places.shape[1]), value=-1)
        scores = full_precision(self.embeddings).new_zeros(places.shape)
        return Retrieved(scores.masked_fill(places < 0, -torch.inf), places)

    def take(self, positions: Int[Tensor, "queries k"]) -> Any:
        """What is shown of some items.

        Args:
            positions: from `search` or `draw`.

        Returns:
            Like the payload: each tensor (queries, k, ...), zeros for a position of -1; texts as lists of lists, "" there.
        """
        if self.texts is not None:
            return [["" if place < 0 else self.texts[place] for place in row] for row in positions.tolist()]
        parts = tuple(
            _rows(part, positions) for part in (self.payload if not self._single else (self.payload,))
        )
        return parts[0] if self._single else parts

    def take_embeddings(self, positions: Int[Tensor, "queries k"]) -> Float[Tensor, "queries k dimensions"]:
        """Embeddings of some items, zeros for a position of -1."""
        return _rows(self.embeddings, positions)

    def extra_repr(self) -> str:
        return f"items={len(self)}, dimensions={self.embeddings.shape[1]}, metric={self.metric!r}"

    def _check(
        self, queries: int, k: int, exclude_ids: Tensor | None, exclude_content: Tensor | None
    ) -> None:
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}")
        for name, excluded in (("exclude_ids", exclude_ids), ("exclude_content", exclude_content)):
            if excluded is not None and excluded.shape != (queries,):
                raise ValueError(f"{name} must have shape ({queries},), got {tuple(excluded.shape)}")


def _rows(part: Tensor, positions: Tensor) -> Tensor:
    if not len(part):
        return part.new_zeros(*positions.shape, *part.shape[1:])
    rows = part[positions.clamp(min=0)]
    missing = (positions < 0).view(*positions.shape, *[1] * (part.ndim - 1))
    return rows.masked_fill(missing, 0)
