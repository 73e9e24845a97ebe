"""Finds the documents nearest to a query in a collection of embeddings, exactly by default; kept in a folder, found again without training.

`backend="exact"` needs nothing else and is `nearest_neighbours`. `backend="faiss"` hands the work to the library faiss
(pip install 'coloss[search]'): a flat index compares all documents in float32, HNSW and IVF look at a part of them, which is
quicker for large collections and misses some neighbours.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from coloss.errors import DataNotFoundError, InputError

from .neighbours import Neighbours, check_at_least_one, nearest_neighbours
from .pair_scores import METRICS, Metric, nonzero

Backend = Literal["exact", "faiss"]
Kind = Literal["flat", "hnsw", "ivf"]

FORMAT = 1
"""Version of the files of a stored index."""

_PLAN = "index.json"
_CONTENTS = {"documents.safetensors", "documents.faiss"}


class SearchIndex:
    """Embeddings of documents, ready to be searched.

    Args:
        documents: one row each, finite.
        metric: "cosine" (0 with a zero row), "inner" (dot product) or "euclidean".
        backend: "exact", or "faiss" for the library.
        kind: of a faiss index: "flat" compares every document, "hnsw" walks a graph of near documents, "ivf" looks into the cells
            nearest to the query.
        effort: what an approximate index looks at for each query, >= 1: of "hnsw" candidates held (64), of "ivf" cells (an eighth of
            all). More is slower and misses less.
        links: of "hnsw", neighbours of each document in the graph, >= 2 (32).
        cells: of "ivf", in 1 .. documents (about four times the root of their number).

    Attributes:
        metric, backend, kind, effort: as given.

    Raises:
        ValueError: for shapes, values or options out of range, and options that the kind of index does not have.
        InputError: if faiss is asked for and not installed.

    Cost:
        The embeddings in memory, in their own precision ("exact") or in float32. Building: nothing for "exact" and "flat"; "hnsw"
        O(documents * log documents * links), "ivf" a k-means of the cells.

    Source:
        Malkov and Yashunin 2016, arXiv 1603.09320 (HNSW); Sivic and Zisserman 2003 and Johnson et al. 2017, arXiv 1702.08734 (IVF, faiss).

    Examples:
        >>> index = SearchIndex(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        >>> index.search(torch.tensor([[2.0, 0.1]]), k=2).indices
        tensor([[0, 2]])
        >>> import tempfile
        >>> folder = index.save(Path(tempfile.mkdtemp()) / "index")
        >>> len(SearchIndex.load(folder))
        3
    """

    def __init__(
        self,
        documents: Float[Tensor, "documents dimensions"],
        *,
        metric: Metric = "cosine",
        backend: Backend = "exact",
        kind: Kind = "flat",
        effort: int | None = None,
        links: int | None = None,
        cells: int | None = None,
    ) -> None:
        if documents.ndim != 2:
            raise ValueError(f"documents must be (documents, dimensions), got shape {tuple(documents.shape)}")
        for name, value, choices in (
            ("metric", metric, METRICS),
            ("backend", backend, ("exact", "faiss")),
            ("kind", kind, ("flat", "hnsw", "ivf")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if backend == "exact" and kind != "flat":
            raise ValueError(f"kind must be 'flat' for the backend 'exact', got {kind!r}")
        for name, given, kinds in (
            ("effort", effort, ("hnsw", "ivf")),
            ("links", links, ("hnsw",)),
            ("cells", cells, ("ivf",)),
        ):
            if given is not None and kind not in kinds:
                owners = f"kind{'s' * (len(kinds) > 1)} {' and '.join(kinds)}"
                raise ValueError(f"{name} is of the {owners}, leave it out for {kind!r}, got {given}")
        links = 32 if links is None else links
        if links < 2:
            raise ValueError(f"links must be >= 2, got {links}")
        count = len(documents)
        if cells is not None and count and cells > count:
            raise ValueError(f"cells must be in [1, {count}], got {cells}")
        check_at_least_one(
            **{name: 1 if given is None else given for name, given in (("effort", effort), ("cells", cells))}
        )
        if not bool(documents.isfinite().all()):
            raise ValueError("documents must be finite, got NaN or infinity")
        self.metric, self.backend, self.kind = metric, backend, kind
        cells = cells if cells is not None else max(1, min(count, round(4 * count**0.5)))
        default = {"flat": None, "hnsw": 64, "ivf": max(1, cells // 8)}[kind]
        self.effort = effort if effort is not None else default
        self.dimensions, self._count = documents.shape[1], count
        self._documents: Tensor | None = documents.detach() if backend == "exact" else None
        self._faiss: Any = None
        if backend == "faiss" and count:
            self._faiss = _built(_rows(documents, metric), metric, kind, links, cells)

    def __len__(self) -> int:
        return self._count

    def search(self, queries: Float[Tensor, "queries dimensions"], k: int = 10) -> Neighbours:
        """The k documents nearest to each query, nearest first.

        Args:
            queries: finite.
            k: >= 1; capped at the number of documents.

        Returns:
            Values (similarities, or Euclidean distances) and row numbers of documents, (queries, k). Of equal values the lower number
            comes first. An approximate index that finds fewer fills up with -1.

        Raises:
            ValueError: if shapes disagree, a value is not finite, or k < 1.
        """
        check_at_least_one(k=k)
        if queries.ndim != 2 or queries.shape[1] != self.dimensions:
            raise ValueError(
                f"queries must be (queries, {self.dimensions}), got shape {tuple(queries.shape)}"
            )
        if self._documents is not None:
            return nearest_neighbours(
                queries.to(self._documents.device), self._documents, k, metric=self.metric
            )
        if not bool(queries.isfinite().all()):
            raise ValueError("queries must be finite, got NaN or infinity")
        k = min(k, self._count)
        if k == 0 or not len(queries):
            return Neighbours(
                torch.zeros(len(queries), k, dtype=torch.float64), torch.zeros(len(queries), k).long()
            )
        if self.kind == "hnsw":
            self._faiss.hnsw.efSearch = max(self.effort or 1, k)
        elif self.kind == "ivf":
            self._faiss.nprobe = self.effort
        found, numbers = self._faiss.search(_rows(queries, self.metric), k)
        values, indices = torch.from_numpy(found).double(), torch.from_numpy(numbers)
        if self.metric == "euclidean":
            values = values.clamp_(min=0).sqrt_()
        sign = 1 if self.metric == "euclidean" else -1
        values = values.masked_fill(indices < 0, sign * torch.inf)
        # Faiss leaves the order of equal values open.
        indices, order = torch.where(indices < 0, self._count, indices).sort(1)
        values, again = (sign * values.gather(1, order)).sort(dim=1, stable=True)
        indices = indices.gather(1, again)
        return Neighbours(sign * values, indices.masked_fill(indices == self._count, -1))

    def save(self, folder: str | Path) -> Path:
        """Write the index into a folder: `index.json`, and `documents.safetensors` or `documents.faiss`; nothing is pickled.

        Args:
            folder: made if it is not there; an index in it is replaced.

        Returns:
            The folder.
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if self._documents is not None:
            name = "documents.safetensors"
            content = save({"documents": self._documents.cpu().contiguous()})
        else:
            name = "documents.faiss"
            content = b"" if self._faiss is None else _faiss().serialize_index(self._faiss).tobytes()
        plan = {
            "format": FORMAT,
            "metric": self.metric,
            "backend": self.backend,
            "kind": self.kind,
            "effort": self.effort,
            "documents": self._count,
            "dimensions": self.dimensions,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        _replace(folder / name, content)
        _replace(folder / _PLAN, json.dumps(plan, indent=1).encode())
        for other in _CONTENTS - {name}:
            (folder / other).unlink(missing_ok=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "SearchIndex":
        """Index that `save` wrote; an approximate one answers as it did.

        Raises:
            DataNotFoundError: if there is no index in the folder.
            InputError: if it is broken, of another version, or needs faiss and that is not installed.
        """
        folder = Path(folder).expanduser()
        if not (folder / _PLAN).is_file():
            raise DataNotFoundError(f"there is no index in {folder}: {_PLAN} is missing")
        try:
            plan = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
            if plan["format"] != FORMAT:
                raise InputError(
                    f"the index in {folder} is of version {plan['format']}, this one reads {FORMAT}"
                )
            exact = plan["backend"] == "exact"
            content = (folder / f"documents.{'safetensors' if exact else 'faiss'}").read_bytes()
            if hashlib.sha256(content).hexdigest() != plan["sha256"]:
                raise ValueError("its documents do not have the checksum that was written")
            index = cls.__new__(cls)
            index.metric, index.backend, index.kind = plan["metric"], plan["backend"], plan["kind"]
            index.effort, index.dimensions, index._count = (
                plan["effort"],
                plan["dimensions"],
                plan["documents"],
            )
            index._documents = load(content)["documents"] if exact else None
            index._faiss = None if exact or not index._count else _deserialized(content)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"the index in {folder} is broken ({error}): build it anew") from error
        return index


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            "backend 'faiss' needs the package faiss-cpu: pip install 'coloss[search]'"
        ) from error
    return faiss


def _rows(embeddings: Tensor, metric: str) -> Any:
    rows = embeddings.detach().cpu().double()
    if metric == "cosine":
        rows = rows / nonzero(rows.norm(dim=1))[:, None]
    return rows.float().contiguous().numpy()


def _built(rows: Any, metric: str, kind: str, links: int, cells: int) -> Any:
    faiss = _faiss()
    measure = faiss.METRIC_L2 if metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
    dimensions = rows.shape[1]
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dimensions, links, measure)
    elif kind == "ivf":
        index = faiss.IndexIVFFlat(faiss.IndexFlat(dimensions, measure), dimensions, cells, measure)
        index.cp.min_points_per_centroid = 1  # or it warns about small collections on the error stream
        index.train(rows)
    else:
        index = faiss.IndexFlat(dimensions, measure)
    index.add(rows)
    return index


def _deserialized(content: bytes) -> Any:
    import numpy as np

    return _faiss().deserialize_index(np.frombuffer(content, dtype=np.uint8))


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
