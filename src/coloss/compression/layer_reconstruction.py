"""Compresses a network layer by layer so that each layer's output stays what it was, on a few inputs without labels.

For each layer, in the order in which the network runs them: x is what the layer reads in the network as it was, x_q what it reads now that the
layers before it are compressed. The layer's new weight W_hat is sought such that it makes up for the errors before it as well,

    min  || W x - W_hat x_q ||^2

in which all that is needed of the inputs is H = sum x_q x_q^T and C = sum (W x) x_q^T, for convolutions over all patches: `OutputMoments`. They
are summed over one batch after the other, so memory does not grow with the number of calibration inputs.

Any rule that finds weights can be put in: rounding, scales, codebooks, low rank.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coloss.compression.cost import CONVOLUTIONS
from coloss.compression.layer_choice import choose_layers
from coloss.errors import InputError
from coloss.metrics import evaluation_mode, predict
from coloss.ops.precision import accumulation_dtype, without_autocast


@dataclass
class OutputMoments:
    """What the error of a linear layer's or convolution's output, as a function of its weight, depends on.

    Attributes:
        gram: H, (channel groups, inputs, inputs).
        cross: C, (channel groups, outputs, inputs).
        energy: sum of the squared targets, bias taken off.
        count: output positions seen.

    Examples:
        >>> layer = nn.Linear(3, 2)
        >>> inputs = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> moments = OutputMoments.of(layer, inputs, layer(inputs))
        >>> (
        ...     round(moments.error(layer.weight.detach()), 6),
        ...     round(moments.relative_error(torch.zeros(2, 3)), 6),
        ... )
        (0.0, 1.0)
    """

    gram: Tensor
    cross: Tensor
    energy: float = 0.0
    count: int = 0

    @classmethod
    def empty(cls, layer: nn.Module) -> "OutputMoments":
        """Nothing seen yet.

        Raises:
            InputError: if the layer is neither a linear layer nor a convolution.
        """
        parts, _, columns = shape = _parts(layer)
        weight: Any = layer.weight
        cross = torch.zeros(shape, dtype=accumulation_dtype(weight.device), device=weight.device)
        return cls(cross.new_zeros(parts, columns, columns), cross)

    @classmethod
    def of(cls, layer: nn.Module, inputs: Tensor, targets: Tensor, batch_size: int = 256) -> "OutputMoments":
        """Of inputs and the outputs that the layer should give for them.

        Args:
            layer: gives shapes, and the bias that the targets hold.
            inputs: x_q; a batch, or one sample without a batch dimension.
            targets: W x + bias, likewise.
            batch_size: samples summed at a time.

        Raises:
            InputError: for another kind of layer, or another number of targets than of inputs.
        """
        found = cls.empty(layer)
        weight: Any = layer.weight
        inputs, targets = (x[None] if x.ndim < weight.ndim else x for x in (inputs, targets))
        if len(inputs) != len(targets):
            raise InputError(f"targets must be as many as inputs, got {len(targets)} and {len(inputs)}")
        for some, wanted in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            found.add(layer, some, wanted)
        return found

    @torch.no_grad()
    def add(self, layer: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Count one more batch.

        Raises:
            InputError: if inputs or targets are not finite.
        """
        wide = self.gram.dtype
        device = self.gram.device
        patches = _patches(layer, inputs.detach().to(device, wide))
        bias: Any = layer.bias
        targets = targets.detach().to(device, wide)
        weight: Any = layer.weight
        if targets.ndim < weight.ndim and not isinstance(layer, nn.Linear):
            targets = targets[None]  # a map without batch dimension
        outputs = targets if isinstance(layer, nn.Linear) else targets.movedim(1, -1)
        if bias is not None:
            outputs = outputs - bias.detach().to(wide)
        parts = len(self.gram)
        outputs = outputs.reshape(-1, parts, outputs.shape[-1] // parts).transpose(0, 1)
        with without_autocast(device):
            gram, cross = patches.mT @ patches, outputs.mT @ patches
        energy = float(outputs.square().sum())
        if not (bool(gram.isfinite().all()) and energy < float("inf")):
            raise InputError("inputs and targets of a layer must be finite, got NaN or infinity")
        self.gram += gram
        self.cross += cross
        self.energy += energy
        self.count += patches.shape[1]

    def check_layer(self, layer: nn.Module) -> None:
        """Refuse a layer that these moments cannot be of.

        Raises:
            InputError: for another kind of layer, or other sizes.
        """
        if (wanted := _parts(layer)) != (own := tuple(self.cross.shape)):
            raise InputError(
                f"moments must be of a layer with (channel groups, outputs, inputs) {wanted}, got {own}"
            )

    def error(self, weight: Float[Tensor, "rows *shape"]) -> float:
        """Mean squared error of one output number."""
        rows = self._rows(weight)
        with without_autocast(rows.device):
            error = (rows * (rows @ self.gram - 2 * self.cross)).sum() + self.energy
        # Rounding can leave a little less than nothing.
        return max(float(error), 0.0) / max(self.count * self.cross.shape[0] * self.cross.shape[1], 1)

    def relative_error(self, weight: Float[Tensor, "rows *shape"]) -> float:
        """Squared error over the squared size of the targets; 0 where both are nothing."""
        size = self.energy / max(self.count * self.cross.shape[0] * self.cross.shape[1], 1)
        error = self.error(weight)
        return error / size if size > 0 else 0.0 if error == 0 else float("inf")

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.gram.dtype).reshape(self.cross.shape)


@dataclass
class LayerProblem:
    """One layer to be compressed, with everything before it compressed already.

    Attributes:
        path: of the layer.
        layer: in the network that is compressed: give it its new weight in place.
        visit: calls a function with (x_q, target) of each batch in turn, as the layer reads and should give them; targets hold the bias.
    """

    path: str
    layer: nn.Module
    visit: Callable[[Callable[[Tensor, Tensor], None]], None]

    def moments(self) -> OutputMoments:
        """All that a quadratic error needs, in one pass over the calibration inputs."""
        found = OutputMoments.empty(self.layer)
        self.visit(lambda inputs, targets: found.add(self.layer, inputs, targets))
        return found


class LayerReconstruction:
    """Goes through a network layer by layer, with the network as it was beside it.

    Args:
        model: changed in place by what is done to the layers.
        calibration: inputs without labels: a tensor, an `IndexedDataset`, or an iterable of batches that can be gone through again.
        layers: paths; None: `choose_layers`.
        batch_size: inputs in one forward pass.
        reference: the network that gives the targets; None: a copy of the model as it is now.

    Raises:
        InputError: if a layer does not exist, its weight belongs to another module too or is sharded, or the calibration can be gone through
            once only; on going through, if the network does not run a layer.

    Cost: for each layer two forward passes over the calibration inputs, up to that layer. Memory: the copy, one batch, and what is done with it.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> for problem in LayerReconstruction(model, torch.randn(64, 4)):
        ...     with torch.no_grad():
        ...         _ = problem.layer.weight.mul_(16).round_().div_(16)
        ...     problem.path, 0 < problem.moments().relative_error(problem.layer.weight) < 0.1
        ('2', True)
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Any,
        layers: str | Sequence[str] | None = None,
        *,
        batch_size: int = 256,
        reference: nn.Module | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be >= 1, got {batch_size}")
        if isinstance(calibration, Iterator):
            raise InputError(
                "calibration must be iterable more than once, got an iterator: make a list of it"
            )
        self.model, self.calibration, self.batch_size = model, calibration, batch_size
        self.layers = choose_layers(model, layers)
        check_own_weights(model, self.layers)
        self.reference = copy.deepcopy(model) if reference is None else reference

    def __iter__(self) -> Iterator[LayerProblem]:
        calls = self._calls()
        for path in calls:
            yield LayerProblem(path, self.layers[path], partial(self._visit, path, calls[path] == 1))

    def _calls(self) -> dict[str, int]:
        """How often each layer runs in a pass over the calibration's first batch, in the order of the first time."""
        calls: dict[str, int] = {}
        with ExitStack() as stack:
            for path, layer in self.layers.items():
                stack.callback(layer.register_forward_hook(partial(_count, calls, path)).remove)
            self._over(lambda inputs: self.model(inputs), first_only=True)
        if idle := [path for path in self.layers if path not in calls]:
            raise InputError(
                f"layers must run in a forward pass of the calibration inputs, got idle {', '.join(idle)}"
            )
        return calls

    def _visit(self, path: str, once: bool, look: Callable[[Tensor, Tensor], None]) -> None:
        self._over(partial(self._compare, path, once, look))

    def _compare(self, path: str, once: bool, look: Callable[[Tensor, Tensor], None], inputs: Any) -> None:
        original = self.reference.get_submodule(path)
        with evaluation_mode(self.reference), _records(original, once) as full:
            _run(self.reference, inputs)
        with _records(self.layers[path], once) as now:
            _run(self.model, inputs)
        for (_, target), (read, _) in zip(full, now, strict=True):
            look(read, target)

    def _over(self, call: Callable[[Any], Any], first_only: bool = False) -> None:
        """Every batch through `call`, in eval mode and without gradients, on the model's device."""
        nothing = torch.zeros(1)
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))

        def quiet(inputs: Any) -> Tensor:
            with without_autocast(device):
                call(inputs)
            if first_only:
                raise _Reached
            return nothing

        try:
            predict(self.model, self.calibration, self.batch_size, call=quiet)
        except _Reached:
            return
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"calibration: {error}") from error


class _Reached(Exception):
    """A forward pass has run as far as was wanted."""


def _run(model: nn.Module, inputs: Any) -> None:
    try:
        model(inputs)
    except _Reached:
        return


@contextmanager
def _records(layer: nn.Module, once: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What the layer reads and gives; a pass ends there if the layer runs once only."""
    found: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(partial(_record, found, once), with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def _count(calls: dict[str, int], path: str, *_: Any) -> None:
    calls[path] = calls.get(path, 0) + 1


def _record(
    found: list[tuple[Tensor, Tensor]],
    once: bool,
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
) -> None:
    found.append((args[0] if args else kwargs["input"], output))
    if once:
        raise _Reached


def check_own_weights(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Refuse layers whose weight is not theirs alone, or not whole.

    Raises:
        InputError: naming the layer.
    """
    owners: dict[int, list[str]] = {}
    for name, part in model.named_modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for path, layer in layers.items():
        weight: Any = layer.weight
        if hasattr(weight, "placements") or weight.ndim < 2:
            raise InputError(
                f"the weight of {path} is sharded: codebooks need whole weights, use strategy ddp"
            )
        if len(others := [name for name in owners[id(weight)] if name != path]):
            raise InputError(
                f"the weight of {path} must be its own, got one that {', '.join(others)} has too"
            )


def check_kind(layer: nn.Module) -> None:
    """Refuse what is neither a linear layer nor a convolution."""
    if not isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
        raise InputError(f"layer must be a linear layer or a convolution, got {type(layer).__name__}")


def _parts(layer: Any) -> tuple[int, int, int]:
    """Channel groups, and the outputs and inputs of each."""
    check_kind(layer)
    parts = getattr(layer, "groups", 1)
    return parts, len(layer.weight) // parts, layer.weight[0].numel()


def _patches(layer: Any, inputs: Tensor) -> Tensor:
    """(channel groups, positions, inputs): what each output number is a product with, in the order of the weight's columns."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(1, -1, inputs.shape[-1])
    dims = len(layer.kernel_size)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if inputs.ndim == dims + 1:
        inputs = inputs[None]
    inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, step, apart) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        inputs = inputs.unfold(axis + 2, (size - 1) * apart + 1, step)[..., ::apart]
    # (batch, channels, *positions, *kernel) -> (parts, batch and positions, channels in the part and kernel)
    parts = inputs.unflatten(1, (layer.groups, -1)).movedim(1, 0).movedim(2, 2 + dims)
    return parts.flatten(1, 1 + dims).flatten(2)
