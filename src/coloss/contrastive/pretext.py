"""Questions about an image that answer themselves: by how much was it turned, in which order were its tiles? As losses beside any other.

Each takes a second forward pass of the model, on the images made for the question; that pass leaves no trace in outputs, tapped features
or batch-norm statistics. The heads belong to the methods, so the model ships as it was built.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coloss.contrastive.pretext_images import jigsaw_permutations, rotated_copies, shuffled_tiles
from coloss.data import View, default_views, stacked_views
from coloss.errors import InputError
from coloss.nn import MLP
from coloss.train import FeatureSource, Method, Schedule, State, second_look, value_at


class JigsawHead(nn.Module):
    """Tells the order of an image's tiles from the features of each tile.

    One layer shared by all tiles, their results side by side, and one more layer before the classifier; ReLU and dropout after both.

    Args:
        in_features: length of a tile's feature vector.
        permutations: orders to tell apart.
        tiles: of an image.
        hidden: widths of the shared layer and of the joint one.
        dropout: probability in [0, 1).

    Returns:
        From `forward`, features (batch * tiles, in_features), the tiles of an image one after the other: logits (batch, permutations).

    Raises:
        ValueError: for a value out of range.

    Examples:
        >>> JigsawHead(64, 35, hidden=(16, 32))(torch.rand(5 * 9, 64)).shape
        torch.Size([5, 35])
    """

    def __init__(
        self,
        in_features: int,
        permutations: int = 35,
        tiles: int = 9,
        hidden: tuple[int, int] = (512, 4096),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        shared, joint = hidden
        self.tiles = tiles
        self.shared = MLP(in_features, (shared,), norm=None, dropout=dropout)
        self.joint = MLP(tiles * shared, (joint,), permutations, norm=None, dropout=dropout)

    def forward(self, features: Float[Tensor, "rows features"]) -> Float[Tensor, "batch permutations"]:
        return self.joint(self.shared(features).unflatten(0, (-1, self.tiles)).flatten(1))


class Pretext(Method):
    """Base of methods that change images in one of several known ways and ask the encoder which; a subclass says how.

    It adds one cross-entropy term of the name `question`, and logs the share of right answers. The images are those of the batch. Where a
    method before it made views of them already, they are the first view of each sample: put this method first to have the images.

    Args:
        weight: of the term: a number >= 0 or a schedule of progress; while it is 0 nothing is asked.
        hidden: widths of the head's hidden layers.
        dropout: after each of them, in [0, 1).
        tap: module path of the features; None: the model's output, or beside an objective the input of its classifier.
        in_features: length of a feature vector, where the module does not declare it.

    Attributes:
        head: from `setup` on.

    Raises:
        InputError: for a value out of range; in a run, for inputs that are no images, or features that are no vectors.

    Examples:
        >>> import coloss
        >>> from coloss.nn import ConvNet
        >>> class Mirrored(Pretext):
        ...     question = "mirrored"
        ...
        ...     def new_head(self, in_features):
        ...         return nn.Linear(in_features, 2)
        ...
        ...     def ask(self, images, state):
        ...         answers = torch.arange(2).repeat_interleave(len(images))
        ...         return torch.cat([images, images.flip(3)]), answers
        >>> images = torch.rand(16, 1, 8, 8)
        >>> run = coloss.fit(ConvNet(1), (images,), methods=[Mirrored()], budget=coloss.Budget(epochs=1))
        >>> sorted(run.history[-1].terms)
        ['mirrored']
    """

    question: str

    def __init__(
        self,
        weight: Schedule = 0.3,
        hidden: Sequence[int] = (512, 128),
        dropout: float = 0.5,
        tap: str | None = None,
        in_features: int | None = None,
    ) -> None:
        super().__init__()
        if not callable(weight) and not 0 <= weight < math.inf:
            raise InputError(f"weight must be >= 0 and finite, or a schedule, got {weight}")
        if not hidden or min(hidden) < 1:
            raise InputError(f"hidden must hold widths >= 1, at least one, got {list(hidden)}")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {dropout}")
        self.weight, self.in_features = weight, in_features
        self.hidden, self.dropout = tuple(hidden), dropout
        self.source = FeatureSource(tap)
        self.term_weights = {self.question: weight}
        self._images: Any = None
        self._are_views = False

    def new_head(self, in_features: int) -> nn.Module:
        """The network from features to logits."""
        raise TypeError(f"{type(self).__name__} must define new_head(in_features)")

    def ask(self, images: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Inputs for the model, and for each result of the head its answer."""
        raise TypeError(f"{type(self).__name__} must define ask(images, state)")

    def setup(self, state: State) -> None:
        self.source.setup(state)
        width = self.source.required_width(state, self.in_features)
        self.head = state.like_model(self.new_head(width))

    def on_batch(self, state: State) -> None:
        views = state.batch.extras.get("views", 1)
        self._are_views = "views" in state.batch.extras
        self._images = state.batch.inputs
        if isinstance(self._images, Tensor):
            self._images = self._images[: len(self._images) // views]

    def terms(self, state: State) -> dict[str, Tensor]:
        images, self._images = self._images, None
        if value_at(self.weight, state.progress) == 0:
            # Zero, but with a graph to every parameter of the head, which data-parallel training waits for.
            return {self.question: torch.cat([p.flatten()[:0] for p in self.head.parameters()]).sum()}
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise InputError(
                f"{self.question} needs images (batch, channels, height, width) of floats, got {found}"
            )
        try:
            inputs, answers = self.ask(images, state)
        except ValueError as error:
            raise InputError(f"{self.question} does not fit these images: {error}") from error
        with second_look(state):
            state.outputs = state.model(inputs)
            logits = self.head(self.source.read(state)).float()
        state.log({f"{self.question}_accuracy": (logits.argmax(1) == answers).double().mean()})
        return {self.question: F.cross_entropy(logits, answers)}


class RotationPretext(Pretext):
    """Ask the encoder by how many quarter turns each image was turned; an extra loss beside any other.

    Adds the term `rotation`, the cross-entropy of four classes, and logs `rotation_accuracy`. Every image is asked about in all four
    positions, each copy with an augmentation of its own. Not for images whose upright position is unknown or ambiguous, such as cells, or
    the digits 0, 6 and 9.

    Args:
        weight: of the term: a number >= 0 or a schedule of progress.
        hidden: widths of the head's hidden layers.
        dropout: after each of them, in [0, 1).
        view: augmentation of the turned copies, called as `view(copies, generator=...)`; its first view is taken. Default:
            `default_views`. Copies of images that are views already get none.
        tap, in_features: as for `Pretext`.

    Raises:
        InputError: as `Pretext`; in a run, if images are not square.

    Cost:
        4 forward and backward passes of the encoder for each sample, beside the others.

    Source:
        Gidaris, Singh, Komodakis, 2018, arXiv 1803.07728; weight and head: Kinakh et al., 2021, arXiv 2108.13939.

    Examples:
        >>> import coloss
        >>> from coloss.contrastive import NTXent
        >>> from coloss.nn import ConvNet
        >>> methods = [RotationPretext(), NTXent()]
        >>> images = torch.rand(64, 1, 8, 8)
        >>> run = coloss.fit(ConvNet(1), (images,), methods=methods, budget=coloss.Budget(epochs=1))
        >>> sorted(run.history[-1].terms)
        ['nt_xent', 'rotation']
    """

    question = "rotation"

    def __init__(
        self,
        weight: Schedule = 0.3,
        *,
        hidden: Sequence[int] = (512, 128),
        dropout: float = 0.5,
        view: View | None = None,
        tap: str | None = None,
        in_features: int | None = None,
    ) -> None:
        super().__init__(weight, hidden, dropout, tap, in_features)
        self.view = view if view is not None else partial(default_views, views=1)

    def new_head(self, in_features: int) -> nn.Module:
        return MLP(in_features, self.hidden, 4, norm=None, dropout=self.dropout)

    def ask(self, images: Tensor, state: State) -> tuple[Tensor, Tensor]:
        copies, turns = rotated_copies(images)
        if not self._are_views:
            copies = stacked_views(self.view, copies, state.local_generator)[0]
        return copies, turns


class JigsawPretext(Pretext):
    """Ask the encoder in which order the tiles of each image were handed to it; an extra loss beside any other.

    Adds the term `jigsaw`, the cross-entropy over the orders, and logs `jigsaw_accuracy`. The images are cut as they come, without
    augmentation, and each tile passes the encoder by itself, in the size of an image. Not for images that look alike everywhere.

    Args:
        weight: of the term: a number >= 0 or a schedule of progress.
        permutations: number of orders to tell apart, see `jigsaw_permutations`.
        grid: tiles in a row and in a column, 2 or 3.
        hidden: widths of the head's shared layer and of its joint one.
        dropout: after both, in [0, 1).
        tap, in_features: as for `Pretext`.

    Attributes:
        permutations: (permutations, grid^2), a buffer.

    Raises:
        InputError: as `Pretext`; for a grid or number of permutations out of range; in a run, for images smaller than the grid.

    Cost:
        grid^2 forward and backward passes of the encoder for each sample, beside the others; as published, a head of 19 million weights.

    Source:
        Noroozi, Favaro, 2016, arXiv 1603.09246; weight and head: Kinakh et al., 2021, arXiv 2108.13939.

    Examples:
        >>> import coloss
        >>> from coloss.nn import Classifier, ConvNet
        >>> data = (torch.rand(32, 1, 12, 12), torch.randint(3, (32,)))
        >>> run = coloss.fit(
        ...     Classifier(ConvNet(1), 3),
        ...     data,
        ...     F.cross_entropy,
        ...     [JigsawPretext(hidden=(16, 32))],
        ...     budget=coloss.Budget(epochs=1),
        ... )
        >>> sorted(run.history[-1].terms)
        ['cross_entropy', 'jigsaw']
    """

    question = "jigsaw"
    permutations: Tensor

    def __init__(
        self,
        weight: Schedule = 0.3,
        *,
        permutations: int = 35,
        grid: int = 3,
        hidden: Sequence[int] = (512, 4096),
        dropout: float = 0.5,
        tap: str | None = None,
        in_features: int | None = None,
    ) -> None:
        super().__init__(weight, hidden, dropout, tap, in_features)
        if grid not in (2, 3):
            raise InputError(f"grid must be 2 or 3, got {grid}")
        if not 2 <= permutations <= math.factorial(grid**2):
            raise InputError(f"permutations must be in [2, {math.factorial(grid**2)}], got {permutations}")
        if len(self.hidden) != 2:
            raise InputError(f"hidden must hold 2 widths, got {list(hidden)}")
        self.register_buffer("permutations", jigsaw_permutations(permutations, grid**2))

    def new_head(self, in_features: int) -> nn.Module:
        (shared, joint), (count, tiles) = self.hidden, self.permutations.shape
        return JigsawHead(in_features, count, tiles, (shared, joint), self.dropout)

    def ask(self, images: Tensor, state: State) -> tuple[Tensor, Tensor]:
        tiles, order = shuffled_tiles(images, self.permutations, generator=state.local_generator)
        return tiles.flatten(0, 1), order
