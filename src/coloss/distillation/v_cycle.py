"""The stages of multi-level training: a large model warms up, is shrunk, trains small, is grown back and blended, and finishes; and its FLOPs."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coloss.distillation.transformer_growth import Groups, Pairing, TransformerSizes, coalescing_map
from coloss.distillation.transformer_layouts import TransformerLayout
from coloss.errors import InputError
from coloss.nn.operation_count import count_operations
from coloss.train.state_map import StateMap, interpolate_states


@dataclass
class Stage:
    """One stretch of training, with a fresh optimizer and a learning rate schedule of its own.

    Attributes:
        number: 0, 1, ... in the cycle.
        level: 0 for the large model, 1 for the next smaller one, ...
        model: to be trained in place.
        steps: optimizer steps.
        learning_rate_scale: factor on the learning rate of the large model.
    """

    number: int
    level: int
    model: nn.Module
    steps: int
    learning_rate_scale: float


class VCycle:
    """Goes down to the smallest model and up again, training at every level; the loop that trains is the caller's.

    Going down, a level starts from the one above coalesced. Going up, its weights are `(1 - alpha) before + alpha grown`: what it had when
    it was left, blended with what the level below has become. Without the blend all copies would stay equal for ever.

    Args:
        new_model: level -> a model of `sizes[level]`; called once for each stage.
        layout: of the models' parameter names.
        sizes: of each level, the large model's first; 2 levels or more.
        steps: of each stage, down and up: 2 levels have 3 stages, K levels 2 K - 1. Stages of 0 steps are left out of the iteration;
            the last one, which trains the model that ships, has at least 1.
        alpha: share of the grown model in the blend, in [0, 1].
        learning_rate_scales: of each level; default: 1 for all.
        width_pairing, depth_pairing, groups: see `coalescing_map`; groups are for the first pair of levels alone.

    Raises:
        InputError: for other numbers of stages or levels, sizes that do not fit, steps below 0, a last stage without steps, or alpha
            out of range.

    Source: Zou, Zhang, Deng 2024, arXiv 2404.07999, algorithm 1; alpha 0.5 for BERT and GPT, 0.25 for DeiT, learning rate of the small model 4
        times the large one's.

    Examples:
        >>> from coloss.distillation import causal_language_model_layout
        >>> from coloss.nn import CausalLanguageModel
        >>> large = TransformerSizes(depth=2, heads=2, head_dim=4, hidden=32)
        >>> sizes = [large, large.scaled(width=0.5, depth=0.5)]
        >>> new_model = lambda level: CausalLanguageModel(
        ...     11, dim=sizes[level].axes()["width"], depth=sizes[level].depth, heads=sizes[level].heads
        ... )
        >>> cycle = VCycle(new_model, causal_language_model_layout(), sizes, steps=(5, 50, 50), alpha=0.5)
        >>> [(stage.level, stage.steps) for stage in cycle]  # train stage.model in the loop's body
        [(0, 5), (1, 50), (0, 50)]
    """

    def __init__(
        self,
        new_model: Callable[[int], nn.Module],
        layout: TransformerLayout,
        sizes: Sequence[TransformerSizes],
        steps: Sequence[int],
        *,
        alpha: float = 0.5,
        learning_rate_scales: Sequence[float] | None = None,
        width_pairing: Pairing = "offset",
        depth_pairing: Pairing = "offset",
        groups: Mapping[str, Groups] | None = None,
    ) -> None:
        levels = len(sizes)
        if levels < 2:
            raise InputError(f"sizes must be of at least 2 levels, got {levels}")
        if len(steps) != 2 * levels - 1 or min(steps) < 0:
            raise InputError(
                f"steps must be {2 * levels - 1} numbers >= 0, one for each stage of {levels} levels, got {list(steps)}"
            )
        if steps[-1] < 1:
            raise InputError(f"steps must be >= 1 for the last stage, got {list(steps)}")
        if not 0 <= alpha <= 1:
            raise InputError(f"alpha must be in [0, 1], got {alpha}")
        scales = [1.0] * levels if learning_rate_scales is None else list(learning_rate_scales)
        if len(scales) != levels or not all(0 < scale < math.inf for scale in scales):
            raise InputError(f"learning_rate_scales must be {levels} numbers > 0, got {scales}")
        self.new_model, self.layout, self.steps, self.alpha, self.scales = (
            new_model,
            layout,
            list(steps),
            alpha,
            scales,
        )
        self.levels = [*range(levels), *range(levels - 2, -1, -1)]
        self.shrinking: list[StateMap] = [
            coalescing_map(
                layout,
                above,
                below,
                width_pairing=width_pairing,
                depth_pairing=depth_pairing,
                groups=groups if level == 0 else None,
            )
            for level, (above, below) in enumerate(zip(sizes, sizes[1:]))
        ]

    def __iter__(self) -> Iterator[Stage]:
        """The stages in their order; what the models have become is read when the next one is asked for."""
        return self.stages()

    def stages(self, finished: Sequence[Mapping[str, Any]] = ()) -> Iterator[Stage]:
        """The stages from where a stopped run left off.

        Args:
            finished: state dicts that the first stages ended with, one for each; stages of 0 steps have none.

        Raises:
            InputError: if there are more of them than stages, or they do not fit.
        """
        trained = sum(count > 0 for count in self.steps)
        if len(finished) > trained:
            raise InputError(f"finished must be of at most {trained} stages, got {len(finished)}")
        left = list(finished)
        ended: list[Mapping[str, Any]] = []
        for number, level in enumerate(self.levels):
            if self.steps[number] and left:
                ended.append(left.pop(0))
                continue
            model = self.new_model(level)
            if number == 0:
                self.layout.check(model.state_dict())
            else:
                model.load_state_dict(self.initial_state(ended))
            if self.steps[number]:
                yield Stage(number, level, model, self.steps[number], self.scales[level])
            ended.append(_kept(model.state_dict()))

    def initial_state(self, ended: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The weights that the stage after these begins with.

        Args:
            ended: state dicts that the stages so far ended with, at least one.

        Raises:
            InputError: if there is none, all stages have ended, or a state does not fit its level.
        """
        number = len(ended)
        if not 1 <= number < len(self.levels):
            raise InputError(f"ended must be of 1 to {len(self.levels) - 1} stages, got {number}")
        level = self.levels[number]
        if level > self.levels[number - 1]:
            return self.shrinking[level - 1](ended[-1])
        # On the way down, stage and level have the same number.
        return interpolate_states(ended[level], self.shrinking[level].reversed()(ended[-1]), self.alpha)


def training_flops(
    model: nn.Module, objective: Callable[[Any, Any], Tensor], inputs: Tensor, targets: Any
) -> int:
    """Floating point operations of one step's forward and backward pass, as counted in matrix products and convolutions.

    Attention counts as two plain products, whichever kernel runs it; element-wise work and the optimizer are left out.

    Args:
        model: gradients that are there stay as they are.
        objective: `(outputs, targets) -> loss`.
        inputs, targets: of one batch.

    Examples:
        >>> training_flops(
        ...     nn.Linear(4, 3, bias=False), nn.functional.mse_loss, torch.ones(2, 4), torch.ones(2, 3)
        ... )  # 2 x 2 x 4 x 3 x 2
        96
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        return count_operations(
            lambda: torch.autograd.grad(objective(model(inputs), targets), parameters, allow_unused=True)
        )


def cycle_steps(
    budget: float, flops: Sequence[float], *, warmup: float = 0.05, small: float = 0.5
) -> tuple[int, int, int]:
    """Steps of a two-level cycle that costs as much as some number of steps of the large model.

    Args:
        budget: steps of the large model that the cycle may cost, > 0.
        flops: of one step of the large and of the small model.
        warmup: share of `budget` for the large model before it shrinks, in (0, 1).
        small: steps of the small model as a multiple of `budget`, > 0.

    Returns:
        Steps of the three stages; the last gets what is left.

    Raises:
        InputError: for a value out of range, or if nothing is left for a stage.

    Examples:
        >>> cycle_steps(1000, (8.0, 1.0))  # 50 and 887 dear steps, 500 at an eighth of the price
        (50, 500, 887)
    """
    if not 0 < warmup < 1:
        raise InputError(f"warmup must be in (0, 1), got {warmup}")
    for name, value in (("budget", budget), ("small", small)):
        if not 0 < value < math.inf:
            raise InputError(f"{name} must be > 0 and finite, got {value}")
    first, second = max(round(warmup * budget), 1), round(small * budget)
    last = math.floor(budget - first - second * flops[1] / flops[0])
    if second < 1 or last < 1:
        raise InputError(
            f"budget, warmup and small must leave steps for each stage, got {(first, second, last)}"
        )
    return first, second, last


def _kept(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in state.items()
    }
