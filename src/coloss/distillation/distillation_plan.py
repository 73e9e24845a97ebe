"""Every choice of a data set distillation but its data and seed, and choices that suit a data set."""

from dataclasses import dataclass, replace

from coloss.data import Splits
from coloss.distillation.distillation_networks import named_augmentation
from coloss.distillation.trajectory_matching import Intermediate, check_matching
from coloss.errors import InputError


@dataclass(frozen=True)
class DistillationPlan:
    """Every choice of a distillation but its data and seed.

    Args:
        images_per_class: synthetic images of each class.
        experts: networks whose paths are matched.
        expert_epochs: their schedule is made for; with start "random" they stop at the last epoch that is matched, see `trained_epochs`.
        expert_rate, expert_momentum, expert_decay, expert_batch: their training, see `record_trajectory`.
        ramp_epochs: of the experts' `loss_ramp`; 0 for none.
        penalty: of the experts' `input_gradient_penalty`; 0 for none.
        outer_steps: of matching.
        steps, expert_steps, max_start, learning_rate, momentum, intermediate, balanced, perturbation, learn_labels, image_rate,
            clip, inner_batch, checkpoint, truncate: see `TrajectoryMatcher`.
        start: of the synthetic images: "random" real ones, or "kmeans", real ones near K-means centres of an expert's logits.
        augmentation: of real and synthetic images, see `named_augmentation`.
        networks: fresh networks that judge the result.
        network_steps: of their training.

    Raises:
        InputError: if a value is out of range.

    Examples:
        >>> DistillationPlan(images_per_class=10).max_start
        6
    """

    images_per_class: int = 1
    experts: int = 4
    expert_epochs: int = 12
    expert_rate: float = 0.025
    expert_momentum: float = 0.9
    expert_decay: float = 0.0
    expert_batch: int = 64
    ramp_epochs: int = 10
    penalty: float = 0.0
    outer_steps: int = 250
    steps: int = 10
    expert_steps: int = 2
    max_start: int = 6
    learning_rate: float = 0.05
    momentum: float = 0.0
    intermediate: Intermediate = "equal"
    balanced: bool = False
    perturbation: float = 0.0
    learn_labels: bool = False
    image_rate: float = 0.02
    clip: float = 1.0
    inner_batch: int | None = None
    checkpoint: bool = False
    truncate: int | None = None
    start: str = "random"
    augmentation: str = "none"
    networks: int = 5
    network_steps: int = 300

    def __post_init__(self) -> None:
        for name in (
            "images_per_class",
            "experts",
            "expert_batch",
            "outer_steps",
            "networks",
            "network_steps",
        ):
            if not getattr(self, name) >= 1:
                raise InputError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("expert_decay", "ramp_epochs", "penalty"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not self.expert_rate > 0:
            raise InputError(f"expert_rate must be > 0, got {self.expert_rate}")
        if not 0 <= self.expert_momentum < 1:
            raise InputError(f"expert_momentum must be in [0, 1), got {self.expert_momentum}")
        check_matching(vars(self))
        if self.start not in ("random", "kmeans"):
            raise InputError(f"start must be random or kmeans, got {self.start!r}")
        if self.max_start - 1 + self.expert_steps > self.expert_epochs:
            raise InputError(
                "max_start - 1 + expert_steps must be <= expert_epochs, "
                f"got {self.max_start - 1 + self.expert_steps} and {self.expert_epochs}"
            )
        named_augmentation(self.augmentation)

    @property
    def trained_epochs(self) -> int:
        """Epochs that each expert trains: up to the last that is matched, or all for K-means in a trained expert's logits."""
        return self.expert_epochs if self.start == "kmeans" else self.max_start - 1 + self.expert_steps


def plan_for(splits: Splits, images_per_class: int = 1) -> DistillationPlan:
    """Choices that suit a data set: those tuned on digits for small inputs, others for images of 16 pixels a side or more.

    For such images the rates are not tuned, and 1000 outer steps may be too few: see how far "matching_loss" of a run is below
    "matching_loss_at_rest", and ask for more steps (a budget) while it still falls.

    Cost: minutes on one CPU core, with 6400 training images of MNIST and 4800 of CIFAR-10; four experts take about 3 on each.

        images a class         1     10     50
        MNIST, 1000 steps      8     60     80
        CIFAR-10, 1000 steps  10     72    100

    Examples:
        >>> from coloss.data import load
        >>> plan_for(load("digits"), 10).inner_batch is None
        True
    """
    plan = DistillationPlan(images_per_class=images_per_class)
    samples = images_per_class * (splits.num_classes or 1)
    if samples > 100:
        plan = replace(plan, inner_batch=100)
    if len(splits.input_shape) == 3 and min(splits.input_shape[1:]) >= 16:
        coloured = splits.input_shape[0] == 3
        plan = replace(
            plan,
            expert_batch=128,
            expert_rate=0.01,
            learning_rate=0.1,
            outer_steps=1000,
            augmentation="mirrored" if coloured else "shifted",
            checkpoint=samples > 100,
        )
    return plan
