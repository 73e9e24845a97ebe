"""Which features of a network a method acts on, and how to run the network once more within a step without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coloss.errors import InputError
from coloss.nn import find_classifier
from coloss.train.state import State


class FeatureSource:
    """One feature vector for each row of the batch, read from the model's last forward pass.

    Args:
        path: module path, or module path with ":input" (see `coloss.nn.Taps`). None takes the model's output where there is no
            objective (a self-supervised encoder), and the input of the classifier (the last linear layer) where there is one.

    Attributes:
        place: the path that it comes to, from `setup` on; None for the model's output.

    Raises:
        InputError: from `setup`, if the path names no module.

    Examples:
        >>> import torch
        >>> from coloss.nn import MLP, Classifier
        >>> state = State(Classifier(MLP(4, [8]), 3), objective=nn.functional.cross_entropy)
        >>> source = FeatureSource()
        >>> source.setup(state)
        >>> _ = state.model(torch.zeros(5, 4))
        >>> source.width(state), source.read(state).shape
        (8, torch.Size([5, 8]))
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.place: str | None = path

    def setup(self, state: State) -> None:
        """Find the place in the model, and keep its values from now on."""
        if self.path is None:
            self.place = _classifier_input(state.model) if state.objective is not None else None
        if self.place is not None:
            try:
                state.tap(self._name, self.place)
            except ValueError as error:
                raise InputError(f"features cannot be read: {error}") from error

    def read(self, state: State) -> Float[Tensor, "rows features"]:
        """The features of the last forward pass.

        Raises:
            InputError: if they are no matrix; the message names the place.
        """
        features = state.outputs if self.place is None else state.features[self._name]
        if not isinstance(features, Tensor) or features.ndim != 2:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            where = "the model's output" if self.place is None else repr(self.place)
            raise InputError(
                f"features must be one vector for each row, got {found} at {where}: "
                "name the module path of pooled features"
            )
        return features

    def width(self, state: State) -> int | None:
        """Length of a feature vector as the module declares it; None if it does not."""
        path = self.place or ""
        takes_input = path.endswith(":input")
        module = state.model.get_submodule(path.removesuffix(":input"))
        while isinstance(module, nn.Sequential) and len(module):
            module = module[0 if takes_input else -1]
        declared = getattr(module, "in_features" if takes_input else "out_features", None)
        return declared if isinstance(declared, int) else None

    def required_width(self, state: State, given: int | None = None) -> int:
        """Length of a feature vector: as given, else as the module declares it.

        Raises:
            InputError: if neither says.
        """
        width = given or self.width(state)
        if width is None:
            raise InputError(
                f"{type(state.model).__name__} does not declare the width of its features: give in_features, or a tap"
            )
        return width

    @property
    def _name(self) -> str:
        return f"features at {self.place}"


@contextmanager
def second_look(state: State) -> Iterator[None]:
    """Run the model again inside a step; afterwards outputs, tapped features and batch-norm statistics are as before.

    Other methods go on to see the features of the batch itself, and what batch norm uses after training is measured on the batch alone.

    Args:
        state: of the run; its model may be called inside.

    Examples:
        >>> import torch
        >>> state = State(nn.BatchNorm1d(2), outputs="of the batch")
        >>> with second_look(state):
        ...     state.outputs = state.model(torch.ones(3, 2))
        >>> state.outputs, state.model.running_mean.tolist()
        ('of the batch', [0.0, 0.0])
    """
    outputs = state.outputs
    norms = [module for module in state.model.modules() if isinstance(module, _BatchNorm)]
    kept = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in kept:
        # A stand-in takes the update: the graph of the first pass does not let its own statistics be edited.
        setattr(norm, name, buffer.clone())
    try:
        with state.features.set_aside():
            yield
    finally:
        state.outputs = outputs
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)


def _classifier_input(model: nn.Module) -> str | None:
    try:
        return f"{find_classifier(model)}:input"
    except ValueError:
        return None
