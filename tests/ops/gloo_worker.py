"""What each of the processes of `test_distributed` computes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coloss.ops import (
    all_reduce_mean,
    epps_pulley,
    gather_with_gradient,
    info_nce_loss,
    is_distributed,
    pairwise_logistic_loss,
    rank,
    sliced_statistic,
    world_size,
)


def loss_functions(directions: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Losses of local embeddings that reach over all processes, and on one process are those of the joined batch."""

    def contrastive(z: Tensor) -> Tensor:
        joined = gather_with_gradient(z)
        return info_nce_loss(joined[:, :2], joined[:, 2:], 0.5, symmetric=True, across_processes=False)

    def pooled(z: Tensor) -> Tensor:
        return pairwise_logistic_loss(gather_with_gradient(z[:, 0]), gather_with_gradient(z[:, 1]), 0.5)

    def sliced(z: Tensor) -> Tensor:
        return sliced_statistic(z, directions, chunk_size=3)

    def moments(z: Tensor) -> Tensor:
        return all_reduce_mean(z.mean(0)).square().sum() + all_reduce_mean(z.square().mean(0)).sum().log()

    return {"contrastive": contrastive, "pooled": pooled, "sliced": sliced, "moments": moments}


def local_rows_against_all_keys(z: Tensor, number: int) -> Tensor:
    """The usual split of a contrastive loss: own queries against gathered keys, own keys turned to the front."""
    queries, keys = z[:, :2], gather_with_gradient(z[:, 2:])
    return info_nce_loss(queries, keys.roll(-number * len(z), 0), 0.5, across_processes=False)


def averaged_gradient(loss: Callable[[Tensor], Tensor], rows: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    network = nn.Linear(4, 4, dtype=torch.float64)
    network.load_state_dict({"weight": inputs["weight"], "bias": inputs["bias"]})
    # The wrapper must outlive the backward pass: its hooks do the averaging.
    wrapped = DistributedDataParallel(network)
    loss(wrapped(rows)).backward()
    assert network.weight.grad is not None
    return network.weight.grad


def observe(number: int, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    seen = {"group": torch.tensor([rank(), world_size(), int(is_distributed())])}
    local, even = inputs[f"local_{number}"], inputs["joined"].chunk(2)[number]
    directions = inputs["directions"]

    for name, loss in loss_functions(directions).items():
        rows = even if name == "moments" else local
        z = rows.clone().requires_grad_()
        value = loss(z)
        value.backward()
        seen[f"{name}.value"], seen[f"{name}.gradient"] = value.detach(), z.grad

        # The same through a network whose parameter gradients DDP averages.
        seen[f"{name}.ddp"] = averaged_gradient(loss, rows, inputs)
    z = local.clone().requires_grad_()
    ((number + 1) * sliced_statistic(z, directions)).backward()
    seen["unequal.gradient"] = z.grad
    seen["split.ddp"] = averaged_gradient(lambda z: local_rows_against_all_keys(z, number), even, inputs)

    seen["ids"] = gather_with_gradient(torch.arange(number + 1) + 10 * number)
    seen["flags"] = gather_with_gradient(torch.tensor([number == 0]))
    seen["no_rows"] = gather_with_gradient(torch.full((3 * number, 2), 7.0))
    seen["half_mean"] = all_reduce_mean(torch.tensor([number + 1.0], dtype=torch.bfloat16)).float()
    seen["half_rows"] = gather_with_gradient(torch.tensor([number + 1.0], dtype=torch.float16)).float()
    seen["empty_statistic"] = epps_pulley(torch.zeros(5 * number, 1, dtype=torch.float64))

    x = torch.tensor([number + 2.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(gather_with_gradient(x).prod() ** 2, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    seen["second"] = second
    return {name: value.contiguous() for name, value in seen.items()}
