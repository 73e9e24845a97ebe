r"""Learns a few synthetic samples on which a network takes the path that experts took on real data.

    student        theta_0 = expert_s;  theta_{n+1} = theta_n - a * v_{n+1} on synthetic batches, n < N (`coloss.train.unroll`)
    outer loss     |theta_N - expert_{s+M}|^2 / |expert_s - expert_{s+M}|^2, and for i = 1 .. M-1, if asked for,
                   beta_i |theta_{i (N // M)} - expert_{s+i}|^2 / |expert_s - expert_{s+i}|^2

Part of `dataset-distillation` (Shen, Yang, Lam, 2023, arXiv 2310.10541); base: Cazenavette et al., 2022, arXiv 2203.11932.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.distillation.expert_trajectories import Augment, require_matchable
from coloss.errors import InputError
from coloss.ops import full_precision, soft_cross_entropy_loss
from coloss.train.outcome import NonFiniteLossError
from coloss.train.unrolling import FlatParameters, unroll

Intermediate = Literal["none", "equal", "rising"]

_LOG_RATES = (-20.0, 5.0)
"""Between which the logarithm of the learned rate stays: 2e-9 to 148."""

_SKIPS = 10
"""Outer steps in a row without a finite gradient that are passed over before the run is given up."""

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "steps": (lambda value: value >= 1, ">= 1"),
    "expert_steps": (lambda value: value >= 1, ">= 1"),
    "max_start": (lambda value: value >= 1, ">= 1"),
    "learning_rate": (lambda value: 0 < value < math.inf, "> 0 and finite"),
    "momentum": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "intermediate": (lambda value: value in get_args(Intermediate), "none, equal or rising"),
    "perturbation": (lambda value: value >= 0, ">= 0"),
    "image_rate": (lambda value: value > 0, "> 0"),
    "clip": (lambda value: value > 0, "> 0"),
    "inner_batch": (lambda value: value is None or value >= 1, ">= 1"),
    "truncate": (lambda value: value is None or value >= 1, ">= 1"),
}


def check_matching(options: Mapping[str, Any]) -> None:
    """Refuse options of `TrajectoryMatcher` that cannot be; a plan is asked before experts are trained.

    Args:
        options: by name; others are not looked at.

    Raises:
        InputError: that names the option, the rule and the value.
    """
    for name, (fine, rule) in _RULES.items():
        if not fine(options[name]):
            raise InputError(f"{name} must be {rule}, got {options[name]}")
    if options["intermediate"] != "none" and options["steps"] < options["expert_steps"]:
        raise InputError(f"steps must be >= expert_steps to match points between, got {options['steps']}")


def trajectory_matching_loss(
    student: Float[Tensor, " parameters"],
    start: Float[Tensor, " parameters"],
    target: Float[Tensor, " parameters"],
) -> Float[Tensor, ""]:
    """How far the student is from the expert's later parameters, in units of how far the expert went: |s - t|^2 / |start - t|^2.

    Args:
        student: parameters after the unrolled steps.
        start: where both began.
        target: where the expert went.

    Returns:
        A scalar: 1 for a student that did not move, 0 for one that arrived. Without an expert's movement it is infinite, NaN where
        the student did not move either: no such start can be matched.

    Raises:
        ValueError: on unequal lengths.

    Source:
        Cazenavette et al., 2022, arXiv 2203.11932, equation 2.

    Examples:
        >>> zero, one = torch.zeros(4), torch.ones(4)
        >>> [trajectory_matching_loss(student, zero, one).item() for student in (zero, one, one / 2)]
        [1.0, 0.0, 0.25]
    """
    if not student.shape == start.shape == target.shape:
        shapes = [tuple(part.shape) for part in (student, start, target)]
        raise ValueError(f"student, start and target must have one shape, got {shapes}")
    student, start, target = full_precision(student), full_precision(start), full_precision(target)
    return (student - target).square().sum() / (start - target).square().sum()


def balance_factor(start: int, max_start: int) -> float:
    """The factor of the inner loss that lets late starts learn faster: log_5 of 8 or more from half-way on, 1 / log_5 of 9 or more before.

    Args:
        start: where on the expert's path, in [0, max_start).
        max_start: number of possible starts, >= 1.

    Raises:
        ValueError: if start is out of range.

    Source:
        arXiv 2310.10541 (base and offset as in the authors' code).

    Examples:
        >>> [round(balance_factor(start, 6), 2) for start in (0, 2, 3, 5)]
        [0.67, 0.73, 1.29, 1.43]
    """
    if not 0 <= start < max_start:
        raise ValueError(f"start must be in [0, {max_start}), got {start}")
    half = max_start // 2
    return math.log(start - half + 8, 5) if start >= half else 1 / math.log(half - start + 8, 5)


def perturb_weights(
    flat: FlatParameters,
    vector: Float[Tensor, " parameters"],
    strength: float = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " parameters"]:
    """Parameters with noise on every weight of two or more dimensions: W + strength * W * d / |d|, d standard normal.

    Biases and norms stay. The published form perturbs weights of convolutions alone, which a perceptron has none of.

    Args:
        flat: tells which parts of the vector are weights.
        vector: the parameters.
        strength: >= 0; 0 gives the vector itself.
        generator: of d, on the CPU.

    Raises:
        ValueError: if strength < 0 or the vector has another length.

    Source:
        arXiv 2310.10541.

    Examples:
        >>> flat = FlatParameters(nn.Linear(1, 1))
        >>> moved = perturb_weights(flat, torch.tensor([2.0, 5.0]))  # one weight: d / |d| is 1 or -1
        >>> abs(moved[0].item() - 2), moved[1].item()
        (2.0, 5.0)
    """
    if not strength >= 0:
        raise ValueError(f"strength must be >= 0, got {strength}")
    if strength == 0:
        return vector
    parts = []
    for part in flat.unflatten(vector).values():
        if part.ndim >= 2:
            noise = torch.randn(part.shape, generator=generator).to(part)
            part = part + strength * part * noise / torch.linalg.vector_norm(noise)
        parts.append(part.flatten())
    return torch.cat(parts)


class TrajectoryMatcher(nn.Module):
    """Synthetic samples, their labels and their learning rate, learned by matching trajectories.

    A plain loop calls `step` and takes `dataset()` at the end. The state dict, with that of `optimizer` and of the generator, is all
    that a stopped run needs to go on.

    Args:
        model: the experts' architecture; its own values are not used.
        trajectories: one (points, parameters) tensor for each expert, see `record_trajectory`.
        images: where the synthetic samples start.
        labels: class numbers of them, or probabilities for each class (samples, classes).
        steps: N, inner steps of the student.
        expert_steps: M, points of the expert that they should equal, >= 1.
        max_start: S, starts are drawn from the expert's first S points; S - 1 + M must be within its length.
        learning_rate: where the student's learned rate starts, > 0; it is kept as a logarithm, so it stays > 0.
        momentum: of the student, in [0, 1); the published code has 0.9 for experts with momentum.
        intermediate: weight of the points between: "none", "equal" (1) or "rising" (i / M).
        balanced: multiply the inner loss by `balance_factor`.
        perturbation: strength of `perturb_weights` at the start.
        learn_labels: learn the labels, too, as logits.
        image_rate: of Adam, for images, labels and the logarithm of the learning rate.
        clip: largest norm of the images' gradient.
        inner_batch: synthetic samples of each inner step, drawn without repeats until all were used; None takes all.
        augment: of the synthetic samples, drawn anew in each inner step; differentiable.
        checkpoint, truncate: as of `coloss.train.unroll`.
        generator: of everything random, on the CPU.

    Attributes:
        images: the synthetic samples.
        optimizer: of all that is learned.
        generator: as given.
        skipped: outer steps passed over because their loss or gradient was not finite.

    Raises:
        InputError: for values out of range, trajectories that do not fit the model or do not move, or a model that
            `require_matchable` refuses.

    Cost: of a step, as of `unroll` with N steps.

    Source:
        Shen, Yang, Lam, 2023, arXiv 2310.10541; Cazenavette et al., 2022, arXiv 2203.11932. Adam and the logarithm in place of SGD with
        rates near 1000, whose learning rate turns negative.

    Examples:
        >>> from coloss.data import IndexedDataset
        >>> from coloss.distillation import record_trajectory
        >>> data = IndexedDataset(torch.randn(40, 4), torch.arange(40) % 2)
        >>> experts = [record_trajectory(nn.Linear(4, 2), data, epochs=4) for _ in range(2)]
        >>> matcher = TrajectoryMatcher(
        ...     nn.Linear(4, 2), experts, data.inputs[:2], data.targets[:2], steps=5, max_start=3
        ... )
        >>> losses = [matcher.step() for _ in range(30)]
        >>> images, labels, learning_rate = matcher.dataset()
        >>> losses[-1] < losses[0], images.shape, learning_rate > 0
        (True, torch.Size([2, 4]), True)
    """

    log_rate: nn.Parameter

    def __init__(
        self,
        model: nn.Module,
        trajectories: Sequence[Float[Tensor, "points parameters"]],
        images: Float[Tensor, "samples *shape"],
        labels: Tensor,
        *,
        steps: int = 20,
        expert_steps: int = 2,
        max_start: int = 6,
        learning_rate: float = 0.01,
        momentum: float = 0.0,
        intermediate: Intermediate = "none",
        balanced: bool = False,
        perturbation: float = 0.0,
        learn_labels: bool = False,
        image_rate: float = 0.02,
        clip: float = 1.0,
        inner_batch: int | None = None,
        augment: Augment | None = None,
        checkpoint: bool = False,
        truncate: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_matching(locals())
        super().__init__()
        require_matchable(model)
        checks = (
            ("trajectories", len(trajectories) >= 1, "of one expert at least", len(trajectories)),
            ("images", len(images) >= 1, "of one sample at least", len(images)),
            ("labels", len(labels) == len(images), "as many as the images", len(labels)),
        )
        for name, fine, rule, value in checks:
            if not fine:
                raise InputError(f"{name} must be {rule}, got {value}")
        self.flat = FlatParameters(copy.deepcopy(model).to(images.device).train())
        for number, trajectory in enumerate(trajectories):
            _check_trajectory(number, trajectory, self.flat.size, max_start, expert_steps)
        self.trajectories = [trajectory.detach() for trajectory in trajectories]
        self.steps, self.expert_steps, self.max_start = steps, expert_steps, max_start
        self.momentum, self.intermediate, self.balanced = momentum, intermediate, balanced
        self.perturbation, self.clip, self.inner_batch = perturbation, clip, inner_batch
        self.augment, self.checkpoint, self.truncate = augment, checkpoint, truncate
        self.images = nn.Parameter(images.detach().clone().float())
        targets = _probabilities(labels, self._outputs()).to(self.images)
        if learn_labels:
            # Sharp enough to say the class, soft enough to have a gradient.
            targets = (0.9 * targets + 0.1 / targets.shape[1]).log()
        self.labels = nn.Parameter(targets, requires_grad=learn_labels)
        self.log_rate = nn.Parameter(torch.tensor(math.log(learning_rate), device=self.images.device))
        self.generator = generator or torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        self.optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=image_rate)
        self.skipped: Tensor
        self.register_buffer("skipped", torch.zeros(2, dtype=torch.int64))  # in all, and in a row

    @property
    def learning_rate(self) -> float:
        """The student's learned rate, > 0."""
        return float(self.log_rate.detach().exp())

    def step(self) -> float:
        """One outer step: unroll the student from a random point of a random expert, and improve the samples.

        Returns:
            The outer loss before the step; it may not be finite, and then nothing is changed.

        Raises:
            NonFiniteLossError: after ten such steps in a row.
        """
        self.optimizer.zero_grad()
        loss = self.loss()
        if torch.isfinite(loss):
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([self.images], self.clip)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if gradients and torch.isfinite(norm) and all(bool(torch.isfinite(g).all()) for g in gradients):
            self.optimizer.step()
            with torch.no_grad():
                self.log_rate.clamp_(*_LOG_RATES)
            self.skipped[1] = 0
            return float(loss.detach())
        self.skipped += 1
        if self.skipped[1] >= _SKIPS:
            raise NonFiniteLossError(
                f"{_SKIPS} outer steps in a row had no finite gradient: lower steps, max_start or learning_rate"
            )
        return float(loss.detach())

    def loss(self) -> Float[Tensor, ""]:
        """The outer loss from a random point of a random expert, with its graph."""
        expert = self.trajectories[self._draw(len(self.trajectories))]
        begin = self._draw(self.max_start)
        points = expert[begin : begin + self.expert_steps + 1].to(self.images)
        start = perturb_weights(self.flat, points[0], self.perturbation, self.generator)
        factor = balance_factor(begin, self.max_start) if self.balanced else 1.0
        labels = self._probabilities()

        def inner(theta: Tensor, batch: tuple[Tensor | None, int]) -> Tensor:
            rows, seed = batch
            seen = self.images if rows is None else self.images[rows]
            if self.augment is not None:
                seen = self.augment(seen, torch.Generator().manual_seed(seed))
            return factor * soft_cross_entropy_loss(
                self.flat(theta, seen), labels if rows is None else labels[rows]
            )

        path = unroll(
            start,
            inner,
            self._inner_batches(),
            self.log_rate.exp(),
            momentum=self.momentum,
            checkpoint=self.checkpoint,
            truncate=self.truncate,
        )
        total = trajectory_matching_loss(path[-1], start, points[-1])
        for i, weight in enumerate(self._weights_between(), 1):
            student = path[i * (self.steps // self.expert_steps)]
            total = total + weight * trajectory_matching_loss(student, start, points[i])
        return total

    @property
    def loss_at_rest(self) -> float:
        """The outer loss of a student that does not move: what matching must get below."""
        return 1.0 + sum(self._weights_between())

    def dataset(self) -> tuple[Tensor, Tensor, float]:
        """Images, label probabilities (samples, classes) and the learned rate, as they are now."""
        return self.images.detach().clone(), self._probabilities().detach().clone(), self.learning_rate

    def _probabilities(self) -> Tensor:
        return self.labels.softmax(1) if self.labels.requires_grad else self.labels

    def _weights_between(self) -> list[float]:
        if self.intermediate == "none":
            return []
        return [
            1.0 if self.intermediate == "equal" else i / self.expert_steps
            for i in range(1, self.expert_steps)
        ]

    def _draw(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def _inner_batches(self) -> list[tuple[Tensor | None, int]]:
        """Rows and the seed of the augmentation for each inner step, drawn beforehand: recomputing a step must not draw."""
        seeds = torch.randint(2**31, (self.steps,), generator=self.generator).tolist()
        if self.inner_batch is None or self.inner_batch >= len(self.images):
            return [(None, seed) for seed in seeds]
        rows: list[Tensor] = []
        while len(rows) < self.steps:
            order = torch.randperm(len(self.images), generator=self.generator)
            rows += [
                part.to(self.images.device)
                for part in order.split(self.inner_batch)
                if len(part) == self.inner_batch
            ]
        return list(zip(rows[: self.steps], seeds))

    def _outputs(self) -> int:
        with torch.no_grad():
            logits = self.flat.model(self.images[:1])
        if logits.ndim != 2:
            raise InputError(f"model must give logits (batch, classes), got shape {tuple(logits.shape)}")
        return logits.shape[1]


def _check_trajectory(number: int, trajectory: Tensor, size: int, max_start: int, expert_steps: int) -> None:
    if trajectory.ndim != 2 or trajectory.shape[1] != size:
        raise InputError(
            f"trajectory {number} must have {size} parameters as the model has, got shape {tuple(trajectory.shape)}"
        )
    if len(trajectory) < max_start + expert_steps:
        raise InputError(
            f"trajectory {number} must have max_start + expert_steps = {max_start + expert_steps} points, got {len(trajectory)}"
        )
    used = trajectory[: max_start + expert_steps]
    if not torch.isfinite(used).all():
        raise InputError(f"trajectory {number} must be finite: the expert diverged")
    moved = torch.stack([used[i : i + max_start] - used[:max_start] for i in range(1, expert_steps + 1)])
    if not (moved.abs().amax(-1) > 0).all():
        raise InputError(
            f"trajectory {number} must move from every start: an expert at rest cannot be matched"
        )


def _probabilities(labels: Tensor, classes: int) -> Tensor:
    if labels.ndim == 1 and not labels.dtype.is_floating_point:
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise InputError(
                f"labels must be in [0, {classes}), got {int(labels.min())} to {int(labels.max())}"
            )
        return torch.nn.functional.one_hot(labels.long(), classes).float()
    fits = labels.ndim == 2 and labels.shape[1] == classes
    if not fits or not bool((labels >= 0).all() and ((labels.float().sum(1) - 1).abs() < 1e-3).all()):
        raise InputError(
            f"labels must be class numbers or probabilities of {classes} classes, rows that sum to 1, "
            f"got shape {tuple(labels.shape)}"
        )
    return labels.detach().clone()
