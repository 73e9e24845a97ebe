"""Which layer gets how many bits: curvature by Hutchinson's estimator, and the best allocation within a budget of bytes.

The sensitivity of a layer is the mean eigenvalue of its Hessian block, tr(H_l) / n_l with n_l weights. For bits b_l in a set B,
`allocate_bits` minimises

    sum_l tr(H_l) / n_l  |Q_{b_l}(W_l) - W_l|^2        subject to   sum_l n_l b_l <= budget

as an integer linear programme (HAWQ-V2's objective). The objective that the paper prints, sum_l tr(H_l) / n_l b_l, gives few bits to the
sensitive layers; it is there as an option only. A network is prepared for allocations by training with precisions drawn at random for each
layer (`draw_bits`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from coloss.compression.layer_choice import choose_layers
from coloss.compression.switchable_layers import bits_of, find_switchable, set_bits
from coloss.data import Batch, IndexedDataset
from coloss.errors import InputError
from coloss.metrics import evaluation_mode
from coloss.ops import full_precision, without_autocast

Allocation = Literal["error", "printed"]


def hessian_trace(
    model: nn.Module,
    loss_fn: Any,
    data: Any,
    probes: int = 16,
    *,
    layers: str | Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Trace of the loss' Hessian for each layer's weight, estimated by random probes.

    tr(H) = E[v^T H v] for v of random signs; one probe serves all layers at once, since what different layers have in common averages to
    zero. The model runs in eval mode and in the precision of its weights: autocast is off.

    Args:
        model: twice differentiable, not quantised.
        loss_fn: `(outputs, targets) -> scalar`, a mean over samples.
        data: `(inputs, targets)` tensors, an `IndexedDataset`, or an iterable of batches, each of which counts by its samples. About 1000
            samples do.
        probes: for each batch, >= 1. The error falls with their root.
        layers: paths; default: `choose_layers`.
        generator: of the signs; None for torch's own.

    Returns:
        Path -> trace (of the mean loss over all samples), which may be negative.

    Raises:
        InputError: for no probes or no batch, or a loss that does not depend on a layer.

    Cost: a forward and a backward pass for each batch, and a second-order one for each probe.

    Source:
        Hutchinson 1990; Dong et al. 2020 (HAWQ-V2), arXiv 1911.03852.

    Examples:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> inputs = torch.tensor([[1.0], [3.0]])
        >>> hessian_trace(layer, lambda out, y: (out - y).square().mean(), (inputs, inputs), 1, layers="")
        {'': 10.0}
    """
    if probes < 1:
        raise InputError(f"probes must be >= 1, got {probes}")
    chosen = choose_layers(model, layers)
    weights = [layer.get_parameter("weight") for layer in chosen.values()]
    totals, samples = [0.0] * len(weights), 0
    fixed = [w for w in weights if not w.requires_grad]
    with evaluation_mode(model), torch.enable_grad(), without_autocast(weights[0].device):
        for weight in fixed:
            weight.requires_grad_(True)
        try:
            for batch in _batches(data):
                batch = batch.to(weights[0].device)
                loss = loss_fn(model(batch.inputs), batch.targets)
                slopes = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
                for path, slope in zip(chosen, slopes, strict=True):
                    if slope is None:
                        raise InputError(
                            f"the loss does not depend on the layer {path!r}: leave it out of layers"
                        )
                for _ in range(probes):
                    signs = [_signs(weight, generator) for weight in weights]
                    found = _curvatures(slopes, weights, signs)
                    totals = [t + len(batch) * v for t, v in zip(totals, found, strict=True)]
                samples += len(batch)
        finally:
            for weight in fixed:
                weight.requires_grad_(False)
    if not samples:
        raise InputError("data must give at least one batch, got none")
    return {path: total / (samples * probes) for path, total in zip(chosen, totals, strict=True)}


def quantization_errors(model: nn.Module) -> dict[str, dict[int, float]]:
    """Squared distance of each switchable layer's weight from itself at each of its precisions, |Q_b(W) - W|^2.

    Args:
        model: with switchable layers; left as it is.

    Returns:
        Path -> bits -> error.

    Examples:
        >>> from coloss.compression import make_switchable
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> _ = make_switchable(model, (8, 4, 2))
        >>> errors = quantization_errors(model)["1"]
        >>> errors[8] < errors[4] < errors[2]
        True
    """
    present = bits_of(model)
    found: dict[str, dict[int, float]] = {}
    try:
        for path, layer in find_switchable(model).items():
            found[path] = {}
            for bits in layer.weight_quantizer.bits:
                layer.set_bits(bits)
                with torch.no_grad():
                    apart = full_precision(layer.quantized_weight()) - full_precision(layer.weight)
                found[path][bits] = float(apart.square().sum())
    finally:
        set_bits(model, present)
    return found


def allocate_bits(
    sensitivity: Mapping[str, float],
    numel: Mapping[str, int],
    bits: Sequence[int] = (8, 6, 4, 2),
    *,
    budget_bytes: float | None = None,
    mean_bits: float | None = None,
    errors: Mapping[str, Mapping[int, float]] | None = None,
    objective: Allocation = "error",
    exclude: Sequence[Mapping[str, int]] = (),
) -> dict[str, int]:
    """Bits for each layer that cost the least within a budget: the exact optimum of an integer linear programme.

    Args:
        sensitivity: trace of the Hessian by layer, see `hessian_trace`; it is divided by `numel`, and a negative one counts as 0.
        numel: weights of each layer.
        bits: to choose from.
        budget_bytes: of all these weights' integers together; this or `mean_bits`.
        mean_bits: mean over weights.
        errors: what each precision costs a layer, |Q_b(W) - W|^2, see `quantization_errors`; None takes n_l 4^-b, that of a grid whose step
            halves with each bit.
        objective: "error", or the "printed" one of the paper, which spends the budget and gives FEWER bits to the more sensitive layers.
        exclude: earlier solutions that must not come again: calling it again with each one found gives the next best.

    Returns:
        Layer -> bits.

    Raises:
        InputError: unless exactly one budget is given, the names fit, errors hold all bits, and the budget allows a solution.

    Cost: milliseconds for a hundred layers.

    Source:
        Dong et al. 2020 (HAWQ-V2), arXiv 1911.03852, section 3; the printed form: arXiv 2502.01199.

    Examples:
        >>> numel = {"a": 1000, "b": 1000}
        >>> first = allocate_bits({"a": 50.0, "b": 1.0}, numel, (8, 4, 2), mean_bits=5)
        >>> first, allocate_bits({"a": 50.0, "b": 1.0}, numel, (8, 4, 2), mean_bits=5, exclude=[first])
        ({'a': 8, 'b': 2}, {'a': 4, 'b': 4})
        >>> allocate_bits({"a": 50.0, "b": 1.0}, numel, (8, 6, 4, 2), budget_bytes=1000, objective="printed")
        {'a': 2, 'b': 6}
    """
    names, choices = list(numel), sorted(set(bits), reverse=True)
    if not names or set(names) != set(sensitivity) or (errors is not None and set(errors) != set(names)):
        raise InputError(
            f"sensitivity, numel and errors must name the same layers, at least one; got {sorted(sensitivity)} and {sorted(names)}"
        )
    if (budget_bytes is None) == (mean_bits is None):
        raise InputError("give one budget: budget_bytes or mean_bits")
    if objective not in ("error", "printed"):
        raise InputError(f'objective must be "error" or "printed", got {objective!r}')
    if not choices or min(numel.values()) < 1 or not np.isfinite(list(sensitivity.values())).all():
        raise InputError("bits must hold a choice, numel be >= 1 and sensitivity finite")
    for name, known in (errors or {}).items():
        if lacking := set(choices) - set(known):
            raise InputError(
                f"errors must hold every precision of bits, got none of {name} at {sorted(lacking)}"
            )
    total = sum(numel.values())
    budget = 8.0 * budget_bytes if budget_bytes is not None else float(mean_bits or 0.0) * total
    size = np.array([[numel[name] * b for b in choices] for name in names], dtype=float)
    slope = {name: max(float(sensitivity[name]), 0.0) / numel[name] for name in names}
    cost = np.array(
        [
            [
                slope[name] * b
                if objective == "printed"
                else slope[name] * (numel[name] * 4.0**-b if errors is None else errors[name][b])
                for b in choices
            ]
            for name in names
        ]
    )
    one_each = np.kron(np.eye(len(names)), np.ones(len(choices)))
    # Here and not above: it takes most of a second, and few who import the family allocate bits.
    from scipy.optimize import LinearConstraint

    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(size.reshape(1, -1), 0, budget)]
    for earlier in exclude:
        if set(earlier) != set(names):
            raise InputError(f"exclude must hold allocations of these layers, got {sorted(earlier)}")
        same = [[float(earlier[name] == b) for b in choices] for name in names]
        limits.append(LinearConstraint(np.array(same).reshape(1, -1), -np.inf, len(names) - 1))
    if objective == "printed" and (most := _solve(-size, limits)) is not None:
        # Where fewer bits cost nothing, the budget has to be spent: all but a hundredth of what can be.
        limits.append(LinearConstraint(size.reshape(1, -1), 0.99 * float(most @ size.reshape(-1)), np.inf))
    found = _solve(cost, limits)
    if found is None:
        needed = size[:, -1].sum() / 8
        raise InputError(
            f"the budget must allow a solution, got {budget / 8:.6g} bytes of at least {needed:.6g}, {len(exclude)} solutions excluded"
        )
    best = found.reshape(len(names), -1).argmax(1)
    return {name: choices[place] for name, place in zip(names, best, strict=True)}


def _solve(cost: np.ndarray, limits: Sequence[Any]) -> np.ndarray | None:
    # The solver stops within 1e-6 of the optimum: costs of any size are scaled so that this is far below their differences.
    scaled = 1e6 * cost.reshape(-1) / max(float(np.abs(cost).max()), 1e-300)
    options = {"mip_rel_gap": 0.0}
    from scipy.optimize import Bounds, milp

    found = milp(
        scaled, constraints=limits, integrality=np.ones(cost.size), bounds=Bounds(0, 1), options=options
    )
    return None if found.x is None else np.asarray(found.x).round()


def redraw_probability(share: float, sigma: float = 0.5) -> float:
    """Probability with which a layer draws bits of its own: sigma times the share of the training that is done.

    Args:
        share: in [0, 1]; the paper's (epoch + 1) / epochs.
        sigma: in [0, 1], at the end.

    Raises:
        ValueError: for values out of range.

    Examples:
        >>> redraw_probability(0.5, sigma=0.4)
        0.2
    """
    if not 0 <= share <= 1 or not 0 <= sigma <= 1:
        raise ValueError(f"share and sigma must be in [0, 1], got {share} and {sigma}")
    return sigma * share


def roulette(bits: Sequence[int], sensitive: bool) -> list[float]:
    """Probability of each precision: in proportion to its bits for a sensitive layer, else equal.

    Examples:
        >>> roulette((8, 6, 4, 2), sensitive=True), roulette((8, 6, 4, 2), sensitive=False)
        ([0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25])
    """
    return [b / sum(bits) if sensitive else 1 / len(bits) for b in bits]


def draw_bits(
    sensitivity: Mapping[str, float],
    bits: Sequence[int],
    start: int,
    probability: float,
    generator: torch.Generator | None = None,
) -> dict[str, int]:
    """Bits of each layer for one forward pass: those of the loop, or with some probability drawn by `roulette`.

    Args:
        sensitivity: trace of the Hessian by layer; one of at least their mean is sensitive.
        bits: to draw from.
        start: what a layer keeps that does not draw.
        probability: of drawing, see `redraw_probability`.
        generator: None for torch's own.

    Examples:
        >>> draw_bits({"a": 3.0, "b": 1.0}, (8, 2), start=8, probability=0.0)
        {'a': 8, 'b': 8}
    """
    mean = sum(sensitivity.values()) / max(len(sensitivity), 1)
    found = {}
    for path, trace in sensitivity.items():
        redraw, place = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        shares = np.cumsum(roulette(bits, trace >= mean))
        drawn = bits[min(int(np.searchsorted(shares, place, side="right")), len(bits) - 1)]
        found[path] = drawn if redraw < probability else start
    return found


def _batches(data: Any) -> Any:
    if isinstance(data, tuple):
        data = IndexedDataset(*data)
    if isinstance(data, IndexedDataset):
        return (data.take(part) for part in torch.arange(len(data)).split(256))
    return map(Batch.of, data)


def _signs(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else weight.device
    drawn = torch.randint(0, 2, weight.shape, generator=generator, device=device)
    return (2 * drawn - 1).to(weight)


def _curvatures(slopes: Sequence[Tensor], weights: Sequence[Tensor], signs: Sequence[Tensor]) -> list[float]:
    along = torch.stack([(slope * sign).sum() for slope, sign in zip(slopes, signs, strict=True)]).sum()
    if not along.requires_grad:  # a loss that is linear in all of them
        return [0.0] * len(weights)
    products = torch.autograd.grad(along, weights, retain_graph=True, allow_unused=True)
    return [
        0.0 if product is None else float((product * sign).sum())
        for product, sign in zip(products, signs, strict=True)
    ]
