"""A network whose hidden units were added in stages: ordinary in every way, and its last stages can be switched off."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coloss.nn import linear_layer

Activation = Literal["logistic", "tanh", "relu"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"logistic": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}


class BoostedMLP(nn.Module):
    """One hidden layer in blocks of units, one block for each stage; any number of the first stages is a network by itself.

    score_t(x) = c_0 + sum_{s <= t} (V_s activation(W_s x + b_s) + c_s)

    Args:
        hidden: the hidden layer, all stages after one another.
        output_weight: V (outputs, hidden units).
        bias_shares: c (stages + 1, outputs): the constant start, and what each stage adds to the output's bias.
        activation: "logistic", "tanh" or "relu".

    Attributes:
        stages: number of stages.
        units_per_stage: hidden units of each.
        hidden, output: the two linear layers of the whole network.

    Returns:
        From `forward`: scores (batch, outputs).

    Raises:
        ValueError: for shapes that do not match, or an unknown activation.

    Examples:
        >>> network = BoostedMLP(
        ...     nn.Linear(3, 4), torch.randn(2, 4), torch.zeros(3, 2)
        ... )  # two stages of two units
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(network.truncate(1)(x), network(x, stages=1)), network.truncate(1).hidden
        (True, Linear(in_features=3, out_features=2, bias=True))
    """

    bias_shares: Tensor

    def __init__(
        self,
        hidden: nn.Linear,
        output_weight: Float[Tensor, "outputs units"],
        bias_shares: Float[Tensor, "starts outputs"],
        activation: Activation = "logistic",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be {', '.join(ACTIVATIONS)}, got {activation!r}")
        stages = len(bias_shares) - 1
        if stages < 0 or hidden.out_features % max(stages, 1) or (stages == 0) != (hidden.out_features == 0):
            raise ValueError(
                f"hidden must have a multiple of {stages} units, one block a stage, got {hidden.out_features}"
            )
        if output_weight.shape != (bias_shares.shape[1], hidden.out_features):
            raise ValueError(
                f"output_weight must have shape {(bias_shares.shape[1], hidden.out_features)}, got "
                f"{tuple(output_weight.shape)}"
            )
        self.stages = stages
        self.units_per_stage = hidden.out_features // max(stages, 1)
        self.activation_name: Activation = activation
        self.hidden = hidden
        self.activation = ACTIVATIONS[activation]()
        self.output = linear_layer(output_weight, bias_shares.sum(0))
        self.register_buffer("bias_shares", bias_shares.detach().clone())

    def forward(
        self, inputs: Float[Tensor, "batch features"], stages: int | None = None
    ) -> Float[Tensor, "batch outputs"]:
        """Scores by the first stages; time and memory fall with their number.

        Args:
            inputs: one row for each sample.
            stages: how many to use, in [0, stages]; None for all.

        Raises:
            ValueError: if there are not so many.
        """
        if stages is None or stages == self.stages:
            return self.output(self.activation(self.hidden(inputs)))
        units = self._units(stages)
        active = self.activation(F.linear(inputs, self.hidden.weight[:units], self.hidden.bias[:units]))
        # What training has done to the bias since, if anything, belongs to the start.
        bias = self.output.bias - self.bias_shares[stages + 1 :].sum(0)
        return F.linear(active, self.output.weight[:, :units], bias)

    @torch.no_grad()
    def truncate(self, stages: int) -> "BoostedMLP":
        """The network of the first stages alone, a copy.

        Raises:
            ValueError: if there are not so many.
        """
        units = self._units(stages)
        shares = self.bias_shares[: stages + 1].clone()
        shares[0] += self.output.bias - self.bias_shares.sum(0)
        hidden = linear_layer(self.hidden.weight[:units], self.hidden.bias[:units])
        return BoostedMLP(hidden, self.output.weight[:, :units], shares, self.activation_name)

    @torch.no_grad()
    def to_sequential(self) -> nn.Sequential:
        """The same network as three plain layers, a copy: it needs coloss no more."""
        return nn.Sequential(
            linear_layer(self.hidden.weight, self.hidden.bias),
            ACTIVATIONS[self.activation_name](),
            linear_layer(self.output.weight, self.output.bias),
        )

    def extra_repr(self) -> str:
        return f"stages={self.stages}, units_per_stage={self.units_per_stage}"

    def _units(self, stages: int) -> int:
        if not 0 <= stages <= self.stages:
            raise ValueError(f"stages must be in [0, {self.stages}], got {stages}")
        return stages * self.units_per_stage


@torch.no_grad()
def truncate_units(
    network: nn.Sequential, keep: int, bias_shares: Float[Tensor, "starts outputs"]
) -> nn.Sequential:
    """Switch off the last stages of a folded network: the first `keep` hidden units, and their share of the bias.

    Args:
        network: linear, activation, linear, as `BoostedMLP.to_sequential` gives it.
        keep: hidden units to keep; whole stages.
        bias_shares: (stages + 1, outputs), as `BoostedMLP.bias_shares`.

    Returns:
        A new network; the given one is left as it is.

    Raises:
        ValueError: for a network of another form, or units that are no whole stages.

    Examples:
        >>> whole = BoostedMLP(nn.Linear(3, 4), torch.randn(2, 4), torch.randn(3, 2))
        >>> half = truncate_units(whole.to_sequential(), 2, whole.bias_shares)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(half(x), whole(x, stages=1), atol=1e-6)
        True
    """
    form = "network must be linear, activation, linear"
    if len(network) != 3:
        raise ValueError(f"{form}, got {len(network)} layers")
    first, activation, last = network
    if not isinstance(first, nn.Linear) or not isinstance(last, nn.Linear):
        raise ValueError(f"{form}, got {type(first).__name__} and {type(last).__name__}")
    stages = len(bias_shares) - 1
    units = first.out_features // max(stages, 1)
    if stages < 1 or first.out_features % stages or not 0 <= keep <= first.out_features or keep % units:
        raise ValueError(
            f"keep must be a multiple of {units} in [0, {first.out_features}], whole stages, got {keep}"
        )
    bias = last.bias - bias_shares[keep // units + 1 :].sum(0).to(last.bias)
    return nn.Sequential(
        linear_layer(first.weight[:keep], first.bias[:keep]),
        activation,
        linear_layer(last.weight[:, :keep], bias),
    )
