"""What each of the processes of `test_ring` computes."""

from collections.abc import Callable

import torch
from torch import Tensor

from coloss.ops import (
    decoupled_softmax_loss,
    info_nce_loss,
    pair_margin_loss,
    sigmoid_pair_loss,
    soft_contrastive_loss,
    supervised_contrastive_loss,
    triplet_margin_loss,
)

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def losses(inputs: dict[str, Tensor], start: int) -> dict[str, Loss]:
    """Each takes local queries, keys, labels and temperature; `start` is the number of the first local row among all."""

    def own(pairs: Tensor, rows: int) -> Tensor:
        here = (pairs[0] >= start) & (pairs[0] < start + rows)
        return pairs[:, here] - torch.tensor([[start], [0]])

    def targets(x: Tensor) -> Tensor:
        return inputs["targets"][start : start + len(x)]

    def per_row(x: Tensor, t: Tensor) -> Tensor:
        return t * (1 + torch.arange(start, start + len(x)) % 3)

    losses: dict[str, Loss] = {
        "info_nce": lambda x, y, _, t: info_nce_loss(x, y, t),
        "info_nce_symmetric": lambda x, y, _, t: info_nce_loss(x, y, t, symmetric=True),
        "info_nce_ids": lambda x, y, ids, t: info_nce_loss(x, y, t, symmetric=True, ids=ids),
        "info_nce_sum": lambda x, y, _, t: info_nce_loss(x, y, t, reduction="sum"),
        "info_nce_rows": lambda x, y, _, t: info_nce_loss(x, y, per_row(x, t)),
        "supervised": lambda x, _, ids, t: supervised_contrastive_loss(x, ids, t),
        "supervised_rows": lambda x, _, ids, t: supervised_contrastive_loss(x, ids, per_row(x, t)),
        "references": lambda x, y, ids, t: supervised_contrastive_loss(
            x, ids, t, references=y, reference_labels=ids
        ),
        "soft": lambda x, y, _, t: soft_contrastive_loss(x, y, targets(x).to_sparse(), t),
        "soft_function": lambda x, y, _, t: soft_contrastive_loss(
            x, y, lambda i, j: inputs["targets"][i + start, j], t, chunk_size=2
        ),
        "soft_ids": lambda x, y, ids, t: soft_contrastive_loss(
            x, y, targets(x).to_sparse(), t, ids=(ids, ids)
        ),
        "decoupled": lambda x, y, _, t: decoupled_softmax_loss(x, y, own(inputs["positives"], len(x)), t),
        "sigmoid": lambda x, y, _, t: sigmoid_pair_loss(x, y, t, t - 1),
        "sigmoid_ids": lambda x, y, ids, t: sigmoid_pair_loss(x, y, t, ids=(ids, ids)),
        "pair_margin": lambda x, _, ids, t: pair_margin_loss(x, ids) * t,
        "pair_margin_squared": lambda x, _, ids, t: pair_margin_loss(x, ids, power=2) * t,
    }
    for mining in ("hard", "semi-hard", "all"):
        losses[f"triplet_{mining}"] = (
            lambda x, _, ids, t, mining=mining: triplet_margin_loss(x, ids, mining=mining) * t  # type: ignore[misc]
        )
    return losses


def observe(inputs: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Value of each loss, and its gradients by the rows of this process and by the temperature."""
    seen = {}
    for name, loss in losses(inputs, rows.start).items():
        x, y = (inputs[key][rows].clone().requires_grad_() for key in ("queries", "keys"))
        temperature = inputs["temperature"].clone().requires_grad_()
        value = loss(x, y, inputs["labels"][rows], temperature)
        value.backward()
        seen[f"{name}.value"] = value.detach()
        for key, leaf in (("queries", x), ("keys", y), ("temperature", temperature)):
            seen[f"{name}.{key}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return seen
