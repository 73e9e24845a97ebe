"""Batch normalisation whose statistics span all processes of a distributed run, on any device."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.ops.distributed import all_reduce_mean, world_size
from coloss.ops.precision import full_precision


class SyncBatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation with the mean and variance of the batches of all processes together.

    `y = (x - mean) / sqrt(var + eps) * weight + bias`, with `mean` and `var` over every row (and position) on
    every process. On one process, and in evaluation mode, it is `torch.nn.BatchNorm1d` itself.
    `torch.nn.SyncBatchNorm` does the same but refuses to run on a CPU; this one goes wherever the process
    group goes. Processes may hold batches of different size. After the gradients of the processes are
    averaged, as data-parallel training does, they are those of one process with the joined batch (when each
    process averages its loss over equally many rows).

    Args:
        num_features: number of channels.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics; `None` for their plain average.

    Returns:
        From `forward`, for (batch, channels) or (batch, channels, length): the same shape and dtype.

    Raises:
        ValueError: in training, for a single value per channel over all processes.

    Cost:
        Two small all-reduces per forward pass and two per backward pass.

    Source: Ioffe and Szegedy 2015, arXiv 1502.03167.

    Examples:
        >>> import torch
        >>> from coloss.nn import SyncBatchNorm1d
        >>> rows = torch.tensor([[0.0], [2.0]])
        >>> [round(value, 3) for value in SyncBatchNorm1d(1)(rows).flatten().tolist()]
        [-1.0, 1.0]
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)

    def forward(
        self, inputs: Float[Tensor, "batch channels *length"]
    ) -> Float[Tensor, "batch channels *length"]:
        if not self.training or world_size() == 1:
            return super().forward(inputs)
        self._check_input_dim(inputs)
        values = full_precision(inputs)
        others = [dim for dim in range(values.ndim) if dim != 1]
        channels = [1, -1] + [1] * (values.ndim - 2)
        # Sums and the count travel together, so that processes may hold batches of different size.
        local_count = values.new_full((1,), values.numel() // values.shape[1])
        reduced = all_reduce_mean(torch.cat([values.sum(others), local_count]))
        mean_count = reduced[-1].detach()
        count = float(mean_count) * world_size()
        if count <= 1:
            raise ValueError(
                f"training needs more than one value per channel, got {count:g} over all processes"
            )
        mean = reduced[:-1] / mean_count
        centred = values - mean.view(channels)
        variance = all_reduce_mean(centred.square().sum(others)) / mean_count
        self._update_running(mean.detach(), variance.detach() * (count / (count - 1)))
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale.view(channels) + self.bias.view(channels)).to(inputs.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(variance.to(self.running_var), momentum)
