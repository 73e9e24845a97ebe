"""Features of which few groups are active in each sample: group lasso on activations, beside any training."""

from collections.abc import Sequence

from torch import Tensor

from coloss.errors import InputError
from coloss.jepa.group_sparse import activation_group_penalty, check_groups
from coloss.jepa.masked_prediction import between_sample_std
from coloss.train.feature_source import FeatureSource
from coloss.train.method import Method
from coloss.train.schedules import Schedule
from coloss.train.state import State


class ActivationGroupSparsity(Method):
    """Few groups of features active in each sample: group lasso on activations, beside an objective or any self-supervised method.

    It acts on features, `SparseJEPA` on weights. Features that shrink to zero satisfy it best, so give it little weight, and look at
    `activation_std`, which is logged: `between_sample_std` of the features, 0 once they have shrunk to a point.

    Args:
        groups: number of equal groups of consecutive features, or their sizes.
        weight: of the term, a number >= 0 or a schedule.
        tap: which features, see `coloss.train.FeatureSource`: by default the model's output where there is no objective, and the input of the
            classifier where there is one.
        meter_every: steps between values of `activation_std` in the log, >= 1.

    Raises:
        InputError: for a value out of range, or features that do not fit the groups.

    Source:
        See `activation_group_penalty`.

    Examples:
        >>> import torch, coloss
        >>> from coloss.jepa import MaskedPrediction
        >>> from coloss.nn import token_encoder_for_shape
        >>> images, encoder = torch.rand(64, 1, 8, 8), token_encoder_for_shape((1, 8, 8), dim=16, depth=1)
        >>> methods = [MaskedPrediction(), ActivationGroupSparsity(groups=4)]
        >>> run = coloss.fit(encoder, (images,), methods=methods, budget=coloss.Budget(steps=2))
        >>> sorted(run.history[-1].terms)
        ['activation_groups', 'latent_prediction']
    """

    def __init__(
        self,
        groups: int | Sequence[int] = 8,
        *,
        weight: Schedule = 1e-3,
        tap: str | None = None,
        meter_every: int = 10,
    ) -> None:
        super().__init__()
        if not callable(weight) and not weight >= 0:
            raise InputError(f"weight must be >= 0, or a schedule, got {weight}")
        if any(number < 1 for number in ([groups] if isinstance(groups, int) else list(groups) or [0])):
            raise InputError(f"groups must be >= 1, got {groups}")
        if meter_every < 1:
            raise InputError(f"meter_every must be >= 1, got {meter_every}")
        self.groups, self.meter_every = groups, meter_every
        self.features = FeatureSource(tap)
        self.term_weights = {"activation_groups": weight}

    def setup(self, state: State) -> None:
        self.features.setup(state)

    def terms(self, state: State) -> dict[str, Tensor]:
        features = self.features.read(state)
        if state.step % self.meter_every == 0 and len(features) > 1:
            state.log({"activation_std": between_sample_std(features[:, None])})
        sizes = group_sizes(self.groups, features.shape[1])
        return {"activation_groups": activation_group_penalty(features, sizes)}


def group_sizes(groups: int | Sequence[int], dim: int) -> list[int]:
    """Sizes of groups of consecutive dimensions: as given, or so many equal ones.

    Raises:
        InputError: if they do not fit.

    Examples:
        >>> group_sizes(3, 12), group_sizes((10, 2), 12)
        ([4, 4, 4], [10, 2])
    """
    if isinstance(groups, int):
        if dim % groups:
            raise InputError(f"groups must divide the {dim} features, got {groups}: give their sizes instead")
        return [dim // groups] * groups
    try:
        check_groups(groups, dim)
    except ValueError as error:
        raise InputError(str(error)) from error
    return list(groups)
