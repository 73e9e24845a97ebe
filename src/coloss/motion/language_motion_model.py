"""What language-motion pretraining trains and ships: features of texts that know motion, and of motions that know language."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.motion.language_motion_losses import query_text_scores
from coloss.motion.query_transformer import QueryReading, QueryTransformer
from coloss.nn import PositionTable
from coloss.ops import full_precision, without_autocast


class LanguageMotionModel(nn.Module):
    """Query transformer with the projections around it: motion tokens and word ids in, comparable embeddings out.

    Args:
        vocabulary_size: number of word ids.
        motion_dim: width of a motion token (of a frozen motion encoder's output).
        max_tokens: most tokens of a motion.
        embedding_dim: of the space in which motions and texts are compared.
        memory_dim: width of what the queries look at; None: `dim`.
        dim, layers, heads, num_queries, max_words, cross_every, feed_forward, padding_id, dropout: as for `QueryTransformer`; None for
            `num_queries`: as many as `max_tokens`, so that each can tell a token.

    Attributes:
        transformer: the `QueryTransformer`.
        motion_projection, motion_positions: motion tokens to memory, and where in time they are.
        text_memory: word embeddings to memory, for queries that look at a text.
        motion_head, text_head: projections to the common space.

    Returns:
        From `forward(motion tokens)`: unit vectors of the motions, as from `embed_motion`.

    Raises:
        ValueError: for sizes that do not fit one another.

    Examples:
        >>> model = LanguageMotionModel(30, motion_dim=6, max_tokens=4, dim=16, layers=2, heads=2)
        >>> motions, words = torch.randn(3, 4, 6), torch.randint(1, 30, (3, 5))
        >>> (
        ...     model.embed_motion(motions).shape,
        ...     model.embed_text(words).shape,
        ...     model.scores(motions, words).shape,
        ... )
        (torch.Size([3, 64]), torch.Size([3, 64]), torch.Size([3, 3]))
    """

    def __init__(
        self,
        vocabulary_size: int,
        motion_dim: int,
        *,
        max_tokens: int = 49,
        embedding_dim: int = 64,
        memory_dim: int | None = None,
        dim: int = 96,
        layers: int = 4,
        heads: int = 4,
        num_queries: int | None = None,
        max_words: int = 32,
        cross_every: int = 2,
        feed_forward: int | None = None,
        padding_id: int | None = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("motion_dim", motion_dim),
            ("max_tokens", max_tokens),
            ("embedding_dim", embedding_dim),
        ):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        memory_dim = dim if memory_dim is None else memory_dim
        self.transformer = QueryTransformer(
            vocabulary_size,
            memory_dim,
            dim=dim,
            layers=layers,
            heads=heads,
            num_queries=max_tokens if num_queries is None else num_queries,
            max_words=max_words,
            cross_every=cross_every,
            feed_forward=feed_forward,
            padding_id=padding_id,
            dropout=dropout,
        )
        self.max_tokens, self.motion_dim, self.embedding_dim = max_tokens, motion_dim, embedding_dim
        self.motion_projection = nn.Linear(motion_dim, memory_dim)
        self.motion_positions = PositionTable((max_tokens,), memory_dim)
        self.text_memory = nn.Linear(dim, memory_dim)
        self.motion_head, self.text_head = nn.Linear(dim, embedding_dim), nn.Linear(dim, embedding_dim)

    @property
    def dim(self) -> int:
        """Width of a query's output."""
        return self.transformer.dim

    def motion_memory(
        self,
        tokens: Float[Tensor, "batch tokens motion_dim"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens memory_dim"]:
        """What the queries look at, of motion tokens; what stands at padding, NaN included, reaches neither result nor gradient.

        Raises:
            ValueError: for tokens of another width, or too many.
        """
        if tokens.shape[2] != self.motion_dim or tokens.shape[1] > self.max_tokens:
            raise ValueError(
                f"tokens must be at most {self.max_tokens} of width {self.motion_dim}, got {tuple(tokens.shape[1:])}"
            )
        if valid is not None:
            tokens = torch.where(valid[..., None], tokens, 0.0)
        return self.motion_positions(self.motion_projection(tokens))

    def read_motion(
        self,
        tokens: Float[Tensor, "batch tokens motion_dim"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> QueryReading:
        """What the queries find in a motion: a prefix for a language model, among others.

        Args:
            tokens: of the motion encoder.
            valid: False for padding.
        """
        return self.transformer.read_memory(self.motion_memory(tokens, valid), valid)

    def read_text_by_queries(
        self, words: Int[Tensor, "batch words"], projection: nn.Module | None = None
    ) -> Float[Tensor, "batch queries dim"]:
        """What the queries find in the embedded words of a text, in place of a motion.

        Args:
            words: ids.
            projection: word embeddings to memory; None: `text_memory`.
        """
        memory = (projection or self.text_memory)(self.transformer.embed(words))
        return self.transformer.read_memory(memory, self.transformer.text_valid(words)).queries

    def embed_motion(
        self,
        tokens: Float[Tensor, "batch tokens motion_dim"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch embedding"]:
        """Unit vectors of motions for retrieval: the mean over queries of their projections."""
        return _unit(self.motion_head(self.read_motion(tokens, valid).queries).mean(1))

    def embed_text(self, words: Int[Tensor, "batch words"]) -> Float[Tensor, "batch embedding"]:
        """Unit vectors of texts for retrieval: the projected class token."""
        return _unit(self.text_head(self.transformer.read_text(words)[:, 0]))

    def scores(
        self,
        tokens: Float[Tensor, "motions tokens motion_dim"],
        words: Int[Tensor, "texts words"],
        valid: Bool[Tensor, "motions tokens"] | None = None,
    ) -> Float[Tensor, "motions texts"]:
        """Cosines as training scores them: of each text and the nearest query, where `embed_motion` takes the mean of queries."""
        queries = self.motion_head(self.read_motion(tokens, valid).queries)
        return query_text_scores(queries, self.text_head(self.transformer.read_text(words)[:, 0]))

    def forward(self, tokens: Float[Tensor, "batch tokens motion_dim"]) -> Float[Tensor, "batch embedding"]:
        return self.embed_motion(tokens)


class LanguageMotionCondition(nn.Module):
    """A vector of a text for a motion generator: the frozen model reads the text, its queries look at what was read, a linear layer sums up.

        c = V mean_k queries_k(memory = U read_text(w))

    with U and V trained along with the generator and the rest frozen. U starts as the model's own `text_memory`, which in pretraining
    showed word embeddings to the queries; the paper does not say how it starts.

    Args:
        model: pretrained; used as it is, frozen in place and kept in evaluation mode.
        dim: of the condition.
        by_queries: False leaves out queries and U: a linear layer on the text's class token.

    Returns:
        From `forward(words)`: (batch, dim).

    Raises:
        ValueError: for `dim` < 1.

    Source: Li et al. 2024 (LaMP), arXiv 2410.07093.

    Examples:
        >>> model = LanguageMotionModel(30, motion_dim=6, max_tokens=4, dim=16, layers=2, heads=2)
        >>> condition = LanguageMotionCondition(model, 24)
        >>> (
        ...     condition(torch.randint(1, 30, (3, 5))).shape,
        ...     sum(p.requires_grad for p in condition.parameters()),
        ... )
        (torch.Size([3, 24]), 4)
    """

    def __init__(self, model: LanguageMotionModel, dim: int, *, by_queries: bool = True) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be >= 1, got {dim}")
        self.model = model.requires_grad_(False)
        self.text_memory = None
        if by_queries:
            self.text_memory = nn.Linear(model.dim, model.transformer.memory_dim).to(model.text_memory.weight)
            self.text_memory.load_state_dict(model.text_memory.state_dict())
        self.output = nn.Linear(model.dim, dim).to(model.text_memory.weight)
        self.train(self.training)

    def train(self, mode: bool = True) -> "LanguageMotionCondition":
        """The pretrained model stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, words: Int[Tensor, "batch words"]) -> Float[Tensor, "batch dim"]:
        network = self.model.transformer
        with torch.no_grad():
            text = network.read_text(words)
        if self.text_memory is None:
            return self.output(text[:, 0])
        reading = network.read_memory(self.text_memory(text), network.text_valid(words))
        return self.output(reading.queries.mean(1))


def _unit(vectors: Tensor) -> Tensor:
    with without_autocast(vectors.device):
        return F.normalize(full_precision(vectors), dim=1)
