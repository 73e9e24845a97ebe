"""Auxiliary heads that see inner features of a network while it trains, and vanish when it ships."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from coloss.nn.taps import Taps


class Outputs(NamedTuple):
    """What a network with auxiliary heads gives in training.

    Args:
        main: the network's own output.
        auxiliary: the output of each head, by name.

    Examples:
        >>> main, auxiliary = Outputs(main=1.0, auxiliary={"early": 2.0})
        >>> auxiliary["early"]
        2.0
    """

    main: Any
    auxiliary: dict[str, Any]


class TrainOnlyHeads(nn.Module):
    """A network whose inner features feed extra heads in training, and which is itself alone in evaluation.

    Args:
        backbone: any network; it is not changed, only read from by forward hooks.
        taps: head name -> where its input comes from, as `Taps` writes it (`"stages.0"`, `"head:input"`).
        heads: head name -> module; the same names as `taps`.

    Attributes:
        backbone: the network that was given, with its own parameters and state.
        heads: `nn.ModuleDict` of the heads.

    Returns:
        From `forward`: `Outputs(main, auxiliary)` in training mode, the backbone's output in evaluation mode.

    Raises:
        ValueError: when names of taps and heads differ, a path is unknown, or a head's name holds a dot.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from coloss.nn import Classifier, ConvNet, TrainOnlyHeads
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        >>> network = Classifier(ConvNet(1, (8, 16)), num_outputs=10)
        >>> model = TrainOnlyHeads(network, {"early": "backbone.stages.0"}, {"early": head})
        >>> model(torch.rand(5, 1, 8, 8)).auxiliary["early"].shape
        torch.Size([5, 10])
        >>> model.eval()(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 10])
        >>> model.export() is network
        True
    """

    def __init__(self, backbone: nn.Module, taps: Mapping[str, str], heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if set(taps) != set(heads):
            raise ValueError(f"heads must have the names of taps {sorted(taps)}, got {sorted(heads)}")
        for name in heads:
            if "." in name or not name:
                raise ValueError(f"a head's name must be non-empty and without dots, got {name!r}")
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self._taps = Taps(backbone, taps)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            main = self.backbone(*args, **kwargs)
            if not self.training:
                return main
            return Outputs(main, {name: head(self._taps[name]) for name, head in self.heads.items()})
        finally:
            self._taps.clear()

    def export(self) -> nn.Module:
        """The backbone itself, not a copy, with every hook removed; call it when training is over.

        Examples:
            >>> from torch import nn
            >>> from coloss.nn import TrainOnlyHeads
            >>> network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
            >>> TrainOnlyHeads(network, {"a": "0"}, {"a": nn.Linear(2, 1)}).export()
            Sequential(
              (0): Linear(in_features=2, out_features=2, bias=True)
              (1): ReLU()
            )
        """
        self._taps.close()
        return self.backbone
