"""Makes one vector of several views and the actions between them, and predicts the next view from it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.nn import SyncBatchNorm1d, Taps, projection_head
from coloss.ops import latent_prediction_loss


class ActionConditionedAggregator(nn.Module):
    """A transformer over views, each beside what happened after it, read out at a learned token.

        c_t = [h_t, e(a_t)] for t < T,   c_T = [h_T, 0],   z = transformer(token, c_1, ..., c_T) at the token

    e is linear without bias, then batch norm without scale or shift, whose statistics are those of the actions before the last view, over
    all processes. There are no positions, so z does not depend on the order of the first T - 1 pairs (h_t, a_t). Blocks are PyTorch's own,
    post-norm, four times as wide inside, with a layer norm behind the last.

    Args:
        features: d, length of a view's features.
        action_dim: numbers in an action; 0 for no actions: tokens are h_t alone, whatever actions are given.
        action_features: length of e(a); taken as 0 without actions.
        depth: blocks; 0 for none, and z is the mean of the tokens (with one view, the token itself).
        heads: attention heads; divides `out_features` where there are blocks.
        dropout: inside the blocks, in [0, 1).

    Attributes:
        out_features: d + action_features, length of z.

    Returns:
        From `forward(features, actions)`: (batch, out_features). `actions` are (batch, T - 1, action_dim), or (batch, T, action_dim), of which
        the last is left unused; None where there are none.

    Raises:
        ValueError: for sizes that do not fit one another, or actions that are not there.

    Source:
        Ghaemi, Muller, Bakhtiari, 2025 (seq-JEPA), arXiv 2505.03176.

    Examples:
        >>> aggregator = ActionConditionedAggregator(64, action_dim=2, action_features=16)
        >>> aggregator(torch.randn(5, 3, 64), torch.randn(5, 2, 2)).shape, aggregator.out_features
        (torch.Size([5, 80]), 80)
    """

    def __init__(
        self,
        features: int,
        action_dim: int,
        action_features: int = 128,
        *,
        depth: int = 3,
        heads: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if action_dim < 0 or depth < 0:
            raise ValueError(f"action_dim and depth must be >= 0, got {action_dim} and {depth}")
        if features < 1 or (action_dim and action_features < 1):
            raise ValueError(
                f"features and action_features must be >= 1, got {features} and {action_features}"
            )
        self.action_dim = action_dim
        self.action_features = action_features if action_dim else 0
        self.out_features = width = features + self.action_features
        if depth and (heads < 1 or width % heads):
            raise ValueError(f"heads must divide features + action_features = {width}, got {heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if action_dim:
            norm = SyncBatchNorm1d(action_features).requires_grad_(False)
            self.action_embedding = nn.Sequential(nn.Linear(action_dim, action_features, bias=False), norm)
        if depth:
            self.token = nn.Parameter(torch.zeros(width))
            blocks = [
                nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, batch_first=True)
                for _ in range(depth)
            ]
            self.transformer: nn.Module | None = nn.Sequential(*blocks, nn.LayerNorm(width))
        else:
            self.transformer = None

    def embed_actions(self, actions: Float[Tensor, "*steps actions"]) -> Float[Tensor, "*steps embedding"]:
        """e(a) of each action; in training, the statistics are those of the actions given."""
        if not self.action_dim:
            return actions.new_zeros(*actions.shape[:-1], 0)
        if actions.shape[-1] != self.action_dim:
            raise ValueError(
                f"actions must hold action_dim = {self.action_dim} numbers, got {actions.shape[-1]}"
            )
        rows = actions.reshape(-1, self.action_dim).to(next(self.action_embedding.parameters()))
        embedded = self.action_embedding(rows) if len(rows) else rows.new_zeros(0, self.action_features)
        return embedded.view(*actions.shape[:-1], self.action_features)

    def forward(
        self,
        features: Float[Tensor, "batch views features"],
        actions: Float[Tensor, "batch steps actions"] | None = None,
    ) -> Float[Tensor, "batch out"]:
        batch, views, _ = features.shape
        if views < 1:
            raise ValueError("features must be of at least one view, got 0")
        tokens = features
        if self.action_dim:
            if views > 1 and (actions is None or actions.shape[1] not in (views - 1, views)):
                found = None if actions is None else actions.shape[1]
                raise ValueError(f"actions must be {views - 1} for {views} views, got {found}")
            withheld = features.new_zeros(batch, 1, self.action_features)
            parts = [withheld]
            if views > 1 and actions is not None:
                parts = [self.embed_actions(actions[:, : views - 1]).to(features), withheld]
            tokens = torch.cat([features, torch.cat(parts, dim=1)], dim=-1)
        if self.transformer is None:
            return tokens.mean(1)
        token = self.token.to(tokens).expand(batch, 1, -1)
        return self.transformer(torch.cat([token, tokens], dim=1))[:, 0]


class ActionPredictor(nn.Module):
    """Features of the next view from the summary of those before and the action that leads there: one hidden layer with batch norm.

    Linear without bias, batch norm over all processes, ReLU, linear.

    Args:
        summary: length of z.
        action_features: length of e(a), >= 0.
        hidden: width of the hidden layer.
        features: length of the prediction.

    Raises:
        ValueError: for a width below 1.

    Examples:
        >>> ActionPredictor(80, 16, 256, 64)(torch.randn(5, 80), torch.randn(5, 16)).shape
        torch.Size([5, 64])
    """

    def __init__(self, summary: int, action_features: int, hidden: int, features: int) -> None:
        super().__init__()
        self.layers = projection_head(summary + action_features, (hidden, features))

    def forward(
        self, summary: Float[Tensor, "batch summary"], action: Float[Tensor, "batch embedding"]
    ) -> Float[Tensor, "batch features"]:
        return self.layers(torch.cat([summary, action.to(summary)], dim=1))


def next_view_loss(
    features: Float[Tensor, "batch views features"],
    actions: Float[Tensor, "batch views actions"],
    target: Float[Tensor, "batch features"],
    aggregator: ActionConditionedAggregator,
    predictor: nn.Module,
) -> Float[Tensor, ""]:
    """How far the prediction of the next view is from what the slow copy makes of it: the whole loss of seq-JEPA.

        mean over samples of 1 - cos(p([z, e(a_T)]), target),    z = A(h_1 ... h_T; a_1 ... a_{T-1}),    in [0, 2]

    Args:
        features: h_1 ... h_T, of the encoder.
        actions: a_1 ... a_T; the last leads to the view that is predicted.
        target: features of that view, of the slow copy; taken without gradient.
        aggregator: A, and e.
        predictor: p, called as `ActionPredictor` is.

    Returns:
        A scalar, at least float32. Neither the length of a prediction nor that of a target matters.

    Raises:
        ValueError: if there are not as many actions as views.

    Examples:
        >>> aggregator = ActionConditionedAggregator(8, action_dim=1, action_features=8, depth=1)
        >>> predictor = ActionPredictor(16, 8, 32, 8)
        >>> features, actions, target = torch.randn(6, 3, 8), torch.randn(6, 3, 1), torch.randn(6, 8)
        >>> bool(0 <= next_view_loss(features, actions, target, aggregator, predictor) <= 2)
        True
    """
    if actions.shape[1] != features.shape[1]:
        raise ValueError(f"actions must be {features.shape[1]}, as many as views, got {actions.shape[1]}")
    summary = aggregator(features, actions[:, :-1])
    prediction = predictor(summary, aggregator.embed_actions(actions[:, -1]))
    return latent_prediction_loss(prediction, target.detach(), "cosine")


class SequenceEncoder(nn.Module):
    """What ships: an encoder of one view (equivariant) and the aggregate of several (invariant), as one module that can be stored.

    Args:
        encoder: gives one vector for each view.
        aggregator: trained with it.
        place: module path of the features inside the encoder (see `coloss.nn.Taps`); None for its output.

    Returns:
        From `forward`: as `encode`.

    Examples:
        >>> from coloss.nn import MLP
        >>> both = SequenceEncoder(
        ...     MLP(16, [8]), ActionConditionedAggregator(8, action_dim=1, action_features=8)
        ... ).eval()
        >>> views, turns = torch.rand(5, 3, 1, 4, 4), torch.randn(5, 2, 1)
        >>> both.encode(views[:, 0]).shape, both.aggregate(views, turns).shape
        (torch.Size([5, 8]), torch.Size([5, 16]))
    """

    def __init__(
        self, encoder: nn.Module, aggregator: ActionConditionedAggregator, place: str | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.aggregator, self.place = encoder, aggregator, place

    def encode(self, inputs: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch features"]:
        """Features of single views: they keep how a view was made."""
        return features_at(self.encoder, inputs, self.place)

    def aggregate(
        self,
        views: Float[Tensor, "batch views *shape"],
        actions: Float[Tensor, "batch steps actions"] | None = None,
    ) -> Float[Tensor, "batch out"]:
        """One vector for each sequence of views, of any length, given the actions between them."""
        features = self.encode(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return self.aggregator(features, actions)

    def forward(self, inputs: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch features"]:
        return self.encode(inputs)


def features_at(
    encoder: nn.Module, inputs: Float[Tensor, "batch *shape"], place: str | None = None
) -> Float[Tensor, "batch features"]:
    """The output of an encoder, or of a submodule on the way.

    Args:
        encoder: any network.
        inputs: its inputs.
        place: module path, see `coloss.nn.Taps`; None for the output.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
        >>> features_at(model, torch.zeros(5, 2), "0").shape
        torch.Size([5, 3])
    """
    if place is None:
        return encoder(inputs)
    with Taps(encoder, {"features": place}) as taps:
        encoder(inputs)
        return taps["features"]
