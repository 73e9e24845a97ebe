"""Gradual unstructured pruning for any training loop: masks with exact counts that shrink on a schedule, drop and grow.

At an update, every `every` steps and once more when p = `until`, with p in [0, 1] the progress of training and d the final density,

    density    r = d^(p / until)
    budgets    the r N largest |w| of all N weights stay: layer l gets n_l of them   (scope "layer": r N_l in each)
    drop       in layer l the n_l - g largest |w| are kept,           g = floor(n_l alpha/2 (1 + cos(pi p / until)))
    grow       the g weights of largest score outside of these join   score |dL/dw|, also of weights that are 0

and between updates masked weights, their gradients and their moments in the optimizer are exactly 0. Weights that join start at
0, or go on with their value if they were there before. The first update at which p >= `until` is the last.

Budgets and kept weights are taken among the present ones, and of equal magnitudes the first in order stay, so that every mask has
exactly the count of its schedule.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.ops import top_mask
from coloss.ops.distributed import world_size
from coloss.train.loop import NonFiniteLossError

DensitySchedule = Literal["exponential", "cubic", "cosine"]
Scope = Literal["global", "layer"]
Grow = Literal["gradient", "random", "none"]


def scheduled_density(share: float, final_density: float, schedule: DensitySchedule = "exponential") -> float:
    """Density of weights on the way from all of them to the final one.

    With x the share of the way and d the final density: "exponential" d^x, which prunes the same part of what is left in each
    update; "cubic" d + (1 - d)(1 - x)^3, fastest at the start; "cosine" d + (1 - d)(1 + cos(pi x))/2, slow at both ends.

    Args:
        share: x, taken into [0, 1].
        final_density: d in (0, 1].
        schedule: one of the three.

    Raises:
        ValueError: for an unknown schedule or a density out of range.

    Source:
        Tian et al. 2023 (exponential), arXiv 2311.17493; Zhu, Gupta 2017 (cubic), arXiv 1710.01878.

    Examples:
        >>> scheduled_density(0.5, 0.04), scheduled_density(0.5, 0.2, "cubic"), scheduled_density(2, 0.1)
        (0.2, 0.3..., 0.1)
    """
    if not 0 < final_density <= 1:
        raise ValueError(f"final_density must be in (0, 1], got {final_density}")
    if schedule not in get_args(DensitySchedule):
        raise ValueError(f'schedule must be "exponential", "cubic" or "cosine", got {schedule!r}')
    if share >= 1:
        return final_density
    share = max(share, 0.0)
    if schedule == "exponential":
        return float(final_density**share)
    left = (1 - share) ** 3 if schedule == "cubic" else (1 + math.cos(math.pi * share)) / 2
    return final_density + (1 - final_density) * left


class GradualSparsifier(nn.Module):
    """Prunes parameters little by little while any loop trains them; see the head of this module for the rule.

    Call `step(optimizer)` between the backward pass and the optimizer's step. It holds no parameters of its own; its state dict has
    the masks and the counters, so that a loop that saves it beside model and optimizer goes on as if never stopped.

    Args:
        params: the weights to prune, by name or in order; trainable, each once.
        final_sparsity: share of all their entries that is 0 at the end, in [0, 1).
        total_steps: optimizer steps of the training; None if `step` is told its progress each time.
        every: steps between updates, >= 1; the first is in the step after the first `every`. Longer than the training: one cut at
            `until`.
        alpha: share of a layer's weights that the first updates drop and grow, in [0, 1]; it falls to 0 with the cosine.
        schedule: of the density, see `scheduled_density`.
        scope: "global" ranks all weights together, so that layers get budgets of their own, which may become 0; "layer" keeps the
            same share of each.
        grow: what joins in place of dropped weights: those of largest "gradient", "random" ones, or "none": then nothing is
            dropped for it, which is gradual magnitude pruning, whatever `alpha`.
        until: share of the training at which the final density is reached, in (0, 1). Of n steps the last begins at 1 - 1/n: a later
            `until` is never reached.
        generator: of "random" growth, which must be equal on all processes; None for torch's own.

    Attributes:
        steps: calls of `step` so far.
        updates: updates of the masks so far.
        density: what the schedule has come to.

    Raises:
        InputError: for values out of range; tensors that are no parameters (a bare parameter in place of a list is taken for its rows);
            parameters that are frozen, sharded (FSDP), empty or given twice; no parameters.

    Cost:
        A byte for each weight. A pass over gradients each step; one over weights and optimizer state, O(all weights) time and a float
        copy of them at an update.

    Under DDP the gradients of `step` must be averaged already, as they are after its backward pass; masks are taken from rank 0.

    Source:
        Schedule and rule: Tian et al. 2023 (RPG), arXiv 2311.17493. Drop and grow: Evci et al. 2020 (RigL), arXiv 1911.11134.

    Examples:
        >>> model = nn.Linear(20, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> sparsifier = GradualSparsifier([model.weight], 0.9, total_steps=20, every=2)
        >>> for _ in range(20):
        ...     model(torch.randn(8, 20)).square().mean().backward()
        ...     _ = sparsifier.step(optimizer)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> int(model.weight.count_nonzero()), sparsifier.sparsity()
        (20, 0.9)
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter] | Iterable[nn.Parameter],
        final_sparsity: float,
        total_steps: int | None = None,
        every: int = 100,
        alpha: float = 0.3,
        schedule: DensitySchedule = "exponential",
        scope: Scope = "global",
        grow: Grow = "gradient",
        *,
        until: float = 0.9,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        check_plan(final_sparsity, every, alpha, schedule, scope, grow, until)
        if total_steps is not None and total_steps < 1:
            raise InputError(f"total_steps must be >= 1, got {total_steps}")
        named = params.items() if isinstance(params, Mapping) else ((str(i), p) for i, p in enumerate(params))
        # In a list, so that they are not registered a second time.
        self._params: list[tuple[str, nn.Parameter]] = list(named)
        if not self._params:
            raise InputError("params must hold at least one parameter, got none")
        if len({id(parameter) for _, parameter in self._params}) != len(self._params):
            raise InputError("params must be distinct, got the same parameter twice")
        for number, (name, parameter) in enumerate(self._params):
            if not isinstance(parameter, nn.Parameter):
                raise InputError(f"params must hold nn.Parameter, got {type(parameter).__name__}")
            check_whole(name, parameter)
            if not parameter.requires_grad or parameter.numel() == 0:
                fault = "an empty" if parameter.requires_grad else "a frozen"
                raise InputError(f"params must be trainable and not empty, got {fault} one, {name}")
            self.register_buffer(f"mask_{number}", torch.ones_like(parameter, dtype=torch.bool))
        self.final_density, self.total_steps, self.every = final_density(final_sparsity), total_steps, every
        self.alpha, self.schedule, self.scope, self.grow = alpha, schedule, scope, grow
        self.until, self.generator = until, generator
        self.steps, self.updates, self.density = 0, 0, 1.0
        self._next_update = every

    @property
    def masks(self) -> dict[str, Tensor]:
        """True where a weight is kept, by name; beside the parameters' own device."""
        return {name: self._mask(number) for number, (name, _) in enumerate(self._params)}

    def sparsity(self) -> float:
        """Share of all weights that is masked."""
        counts = [(int(mask.sum()), mask.numel()) for mask in self.masks.values()]
        return 1 - sum(kept for kept, _ in counts) / sum(size for _, size in counts)

    def densities(self) -> dict[str, float]:
        """Share of each parameter's weights that is kept, by name."""
        return {name: int(mask.sum()) / mask.numel() for name, mask in self.masks.items()}

    def update_is_due(self, progress: float | None = None) -> bool:
        """Whether the next `step` changes the masks: only then does it read `grow_scores`.

        Args:
            progress: as for `step`.
        """
        ends = self._share(progress) >= 1
        return (ends or self.steps >= self._next_update) and self.density > self.final_density

    @torch.no_grad()
    def step(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        progress: float | None = None,
        grow_scores: Sequence[Tensor | None] | None = None,
    ) -> bool:
        """After the backward pass: mask the gradients, having updated the masks where that is due, and then weights and optimizer state.

        Between updates weights and state stay at 0 by themselves, for lack of a gradient; see `enforce` for optimizers in which they do not.
        Gradients must be dense (those of masked weights included) and summed up, as the optimizer will see them. An update whose
        scores are not finite, as after an overflow under a gradient scaler, waits for the next step.

        Args:
            optimizer: that of the parameters; everything it keeps in the shape of a weight is masked at an update.
            progress: share of the training done, in [0, 1]; default: `steps / total_steps`. The density never rises again.
            grow_scores: one tensor for each parameter, higher grows first, in place of the gradients' absolute values; None for one in
                which nothing is to be replaced.

        Returns:
            Whether the masks were updated.

        Raises:
            InputError: if neither `progress` nor `total_steps` is known, or a score's shape does not fit.
            NonFiniteLossError: if a weight is not finite.
        """
        updated = False
        if self.update_is_due(progress):
            scores = self._scores(grow_scores)
            if all(score is None or bool(score.isfinite().all()) for score in scores):
                self._update(self._share(progress), scores)
                updated = True
        self.steps += 1
        for mask, (_, parameter) in zip(self.masks.values(), self._params, strict=True):
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~mask, 0)
        if updated:
            self.enforce(optimizer)
        return updated

    @torch.no_grad()
    def enforce(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Set masked weights to 0, and what the optimizer keeps for them.

        Needed after the optimizer's step for one that moves weights without gradient, moment and value, such as one that makes
        whole updates orthogonal; harmless otherwise.
        """
        for mask, (_, parameter) in zip(self.masks.values(), self._params, strict=True):
            out = ~mask
            parameter.masked_fill_(out, 0)
            for kept in optimizer.state.get(parameter, {}).values() if optimizer is not None else ():
                if isinstance(kept, Tensor) and kept.shape == parameter.shape:
                    kept.masked_fill_(out, 0)

    @torch.no_grad()
    def complete(self) -> None:
        """Cut to the final density at once, by magnitude, if the schedule has not come so far."""
        if self.density > self.final_density:
            self._update(1.0, [None] * len(self._params))
            self.enforce()

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "updates": self.updates,
            "density": self.density,
            "next_update": self._next_update,
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self.steps, self.updates, self.density = state["steps"], state["updates"], state["density"]
        self._next_update = state["next_update"]

    def _mask(self, number: int) -> Tensor:
        mask, parameter = getattr(self, f"mask_{number}"), self._params[number][1]
        if mask.device != parameter.device:
            mask = mask.to(parameter.device)
            setattr(self, f"mask_{number}", mask)
        return mask

    def _share(self, progress: float | None) -> float:
        """Of the way to the final density."""
        if progress is None:
            if self.total_steps is None:
                raise InputError("progress must be given where total_steps is None")
            progress = self.steps / self.total_steps
        return 1.0 if progress >= self.until - 1e-9 else progress / self.until

    def _scores(self, given: Sequence[Tensor | None] | None) -> list[Tensor | None]:
        """What decides on growth, for each parameter; None where nothing grows."""
        if self.grow == "none":
            return [None] * len(self._params)
        if given is not None:
            shapes = [None if score is None else tuple(score.shape) for score in given]
            wanted = [tuple(parameter.shape) for _, parameter in self._params]
            if len(shapes) != len(wanted) or any(
                s not in (None, w) for s, w in zip(shapes, wanted, strict=True)
            ):
                raise InputError(
                    f"grow_scores must have the shapes of the parameters, {wanted}, got {shapes}"
                )
            return list(given)
        if self.grow == "random":
            source = self.generator.device if self.generator is not None else "cpu"
            draws = [torch.rand(p.shape, generator=self.generator, device=source) for _, p in self._params]
            return [draw.to(p.device) for draw, (_, p) in zip(draws, self._params, strict=True)]
        return [p.grad.abs() if p.grad is not None else None for _, p in self._params]

    def _update(self, share: float, scores: Sequence[Tensor | None]) -> None:
        self.density = min(self.density, scheduled_density(share, self.final_density, self.schedule))
        replaced = self.alpha / 2 * (1 + math.cos(math.pi * min(share, 1.0)))
        magnitudes = []
        for mask, (name, parameter) in zip(self.masks.values(), self._params, strict=True):
            if not parameter.isfinite().all():
                raise NonFiniteLossError(
                    f"weight {name} is not finite after {self.steps} steps: it cannot be ranked"
                )
            magnitude = parameter.abs()
            magnitude = magnitude if magnitude.dtype == torch.float64 else magnitude.float()
            # Those that are out rank below a present weight of 0.
            magnitudes.append(magnitude.masked_fill(~mask, -1.0))
        for number, (magnitude, count) in enumerate(zip(magnitudes, self._counts(magnitudes), strict=True)):
            score = scores[number]
            grown = int(count * replaced) if score is not None else 0
            kept = top_mask(magnitude, count - grown)
            if score is not None and grown:
                kept = kept | top_mask(score.float().masked_fill(kept, -torch.inf), grown)
            if world_size() > 1:
                torch.distributed.broadcast(kept.view(torch.uint8), 0)
            self._mask(number).copy_(kept)
        self.updates += 1
        self._next_update = (self.steps // self.every + 1) * self.every

    def _counts(self, magnitudes: Sequence[Tensor]) -> list[int]:
        if self.scope == "layer":
            return [round(self.density * magnitude.numel()) for magnitude in magnitudes]
        together = torch.cat([magnitude.reshape(-1).to(magnitudes[0]) for magnitude in magnitudes])
        kept = top_mask(together, round(self.density * together.numel()))
        return [int(part.sum()) for part in kept.split([magnitude.numel() for magnitude in magnitudes])]


def check_plan(
    final_sparsity: float,
    every: int,
    alpha: float,
    schedule: str,
    scope: str,
    grow: str,
    until: float,
) -> None:
    """Refuse a plan of pruning that cannot work."""
    final_density(final_sparsity, "final_sparsity")
    if every < 1:
        raise InputError(f"every must be >= 1, got {every}")
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must be in [0, 1], got {alpha}")
    if not 0 < until < 1:
        raise InputError(f"until must be in (0, 1), got {until}")
    for name, value, known in (
        ("schedule", schedule, get_args(DensitySchedule)),
        ("scope", scope, get_args(Scope)),
        ("grow", grow, get_args(Grow)),
    ):
        if value not in known:
            raise InputError(f"{name} must be {', '.join(map(repr, known))}, got {value!r}")


def check_whole(name: str, weight: Tensor) -> None:
    """Refuse a piece of a weight: neither a rank nor a ranking can be read off it."""
    if hasattr(weight, "placements"):
        raise InputError(
            f"the weight {name} is sharded: pruning by rank needs whole weights, use strategy ddp"
        )


def final_density(sparsity: float, name: str = "sparsity") -> float:
    """What a sparsity leaves, without the rounding of the difference: 0.1 for 0.9; refuses one that leaves nothing."""
    density = round(1.0 - sparsity, 12)
    if not 0 <= sparsity < 1:
        raise InputError(f"{name} must be in [0, 1), got {sparsity}")
    if density == 0:
        raise InputError(f"{name} must leave a density of at least 1e-12, got {sparsity}")
    return density
