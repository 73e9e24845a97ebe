"""BYOL for a loop of your own: an online network predicts what its slow moving average makes of another view; and a repulsion between the two.

Grill et al., 2020, arXiv 2006.07733; the repulsion after Guo et al., 2023, arXiv 2307.07791.
"""

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from coloss.nn import ModuleEMA
from coloss.ops.latent_prediction import latent_prediction_loss


def byol_loss(
    predictions: Float[Tensor, "*rows dim"], targets: Float[Tensor, "*rows dim"]
) -> Float[Tensor, ""]:
    """Mean of 2 - 2 cos(prediction, target), in one direction.

    Args:
        predictions: p, of any length.
        targets: z of the other view, from the slow network; no gradient reaches them.

    Returns:
        A scalar in [0, 4], at least float32; 2 for a zero vector, 0 for no rows.

    Source:
        Grill et al., 2020, arXiv 2006.07733, equation 2.

    Examples:
        >>> import torch
        >>> byol_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(2.)
    """
    return 2 * latent_prediction_loss(predictions, targets.detach(), "cosine")


def cross_model_loss(
    first: Float[Tensor, "*rows dim"],
    second: Float[Tensor, "*rows dim"],
    first_target: Float[Tensor, "*rows dim"],
    second_target: Float[Tensor, "*rows dim"],
    weight: float = 1.0,
) -> Float[Tensor, ""]:
    """The predictions of two views attract each other; each repels what the slow network makes of its own view.

        weight * ( D(p, p') - ( D(p, sg z) + D(p', sg z') ) / 2 ),   D(a, b) = mean of 2 - 2 cos(a, b)

    Without `byol_loss` beside it nothing holds the predictions at their targets: they run away from their own average. Keep its weight
    small, and watch D(p, z).

    Args:
        first, second: p and p', predictions of the two views.
        first_target, second_target: z and z', the slow network's projections of the same views; no gradient reaches them.
        weight: factor of the whole.

    Returns:
        A scalar in [-4, 4] times the weight, at least float32.

    Source:
        A reading of figure 2 of Guo et al., 2023, arXiv 2307.07791; signs and the factor 1/2 are inferred.

    Examples:
        >>> import torch
        >>> p, z = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> cross_model_loss(p, p, z, z), cross_model_loss(p, p, p, p)
        (tensor(-2.), tensor(0.))
    """
    attraction = 2 * latent_prediction_loss(first, second, "cosine")
    repulsion = (byol_loss(first, first_target) + byol_loss(second, second_target)) / 2
    return weight * (attraction - repulsion)


class BYOLOutputs(NamedTuple):
    """What `BYOL` makes of two views: predictions with a graph, targets without.

    Attributes:
        first, second: predictions of the first and of the second view.
        first_target, second_target: projections of the same views by the slow network.
    """

    first: Tensor
    second: Tensor
    first_target: Tensor
    second_target: Tensor

    def loss(self) -> Float[Tensor, ""]:
        """BYOL's loss across views, in both directions: in [0, 8]."""
        return byol_loss(self.first, self.second_target) + byol_loss(self.second, self.first_target)


class BYOL(nn.Module):
    """The two networks of BYOL around any encoder, for a loop of your own.

    Args:
        encoder: any module that gives (rows, features).
        projector: features to embeddings, such as `coloss.nn.projection_head(64, (128, 32))`.
        predictor: embeddings to embeddings.
        momentum: share of the slow network that stays in an update, in [0, 1].

    Attributes:
        online: encoder and projector, which learn.
        target: their moving average, in evaluation mode.

    Returns:
        From `forward(first, second)`: `BYOLOutputs`.

    Raises:
        ValueError: for a momentum out of range.

    Examples:
        >>> import torch
        >>> from coloss.nn import MLP, projection_head
        >>> byol = BYOL(MLP(6, [8]), projection_head(8, (16, 4)), projection_head(4, (16, 4)))
        >>> x = torch.rand(32, 6)
        >>> optimizer = torch.optim.SGD([p for p in byol.parameters() if p.requires_grad], lr=0.1)
        >>> byol(x, x + 0.1).loss().backward()
        >>> optimizer.step()
        >>> byol.update()
    """

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module, momentum: float = 0.996
    ) -> None:
        super().__init__()
        self.online = nn.Sequential(encoder, projector)
        self.predictor = predictor
        self.target = ModuleEMA(self.online, momentum)

    def forward(self, first: Any, second: Any) -> BYOLOutputs:
        return BYOLOutputs(
            self.predictor(self.online(first)),
            self.predictor(self.online(second)),
            self.target(first),
            self.target(second),
        )

    def update(self) -> None:
        """Let the slow network follow, after the optimizer's step."""
        self.target.update()
