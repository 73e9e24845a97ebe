"""Classifiers on the inner stages of a network, which the deepest of them teaches; they exist only in training.

Each branch repeats the stages that its input has still before it, with weights of its own, so that all end in features of one width
(Yang et al., 2021, arXiv 2107.13715; the losses between them are those of Zhang et al., 2019, arXiv 1905.08094).
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from coloss.distillation.conflict_report import linear_at
from coloss.errors import InputError
from coloss.nn import SyncBatchNorm1d, find_classifier
from coloss.nn.convolution import batch_norm, convolution, global_average_pool
from coloss.ops import distillation_kl_loss, full_precision


class BranchOutputs(NamedTuple):
    """What a branch says, and from which features.

    Args:
        logits: (rows, outputs).
        features: (rows, width).

    Examples:
        >>> import torch
        >>> BranchOutputs(torch.zeros(5, 3), torch.zeros(5, 8)).logits.shape
        torch.Size([5, 3])
    """

    logits: Tensor
    features: Tensor


class Branch(nn.Module):
    """Layers on top of a tapped stage, the mean over positions, and a linear classifier.

    Args:
        body: from the stage's output to maps (rows, width, ...) or vectors (rows, width).
        width: of the features.
        outputs: logits.

    Returns:
        From `forward`: `BranchOutputs(logits, features)`.

    Raises:
        ValueError: for a value below 1.

    Examples:
        >>> import torch
        >>> branch = Branch(nn.Conv2d(4, 8, 3), width=8, outputs=40)
        >>> [tuple(part.shape) for part in branch(torch.rand(2, 4, 6, 6))]
        [(2, 40), (2, 8)]
    """

    def __init__(self, body: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        for name, value in (("width", width), ("outputs", outputs)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.body = body
        self.classifier = nn.Linear(width, outputs)

    def forward(self, inputs: Float[Tensor, "rows *shape"]) -> BranchOutputs:
        found = self.body(inputs)
        features = global_average_pool(found) if found.ndim > 2 else found
        return BranchOutputs(self.classifier(features), features)


def stage_branches(model: nn.Module, outputs: int) -> dict[str, Any]:
    """A branch for each stage of a network that has an `nn.Sequential` of the name `stages` (`coloss.nn.ConvNet`, `ResNet`).

    The branch of stage l repeats the stages after it with new weights; that of the last stage is one more convolution of stride 1. A
    network without stages gets one branch on the input of its classifier.

    Args:
        model: ends in an `nn.Linear`; it is only read.
        outputs: logits of each branch.

    Returns:
        Module path of each stage -> its branch, in order of depth. `TrainOnlyHeads` takes them for a loop of one's own.

    Raises:
        ValueError: if the model has no `nn.Linear`.
        InputError: if the last stage does not give as many channels as the classifier takes; make branches by hand then.

    Examples:
        >>> import torch
        >>> from coloss.nn import Classifier, ConvNet, TrainOnlyHeads
        >>> network = Classifier(ConvNet(1, (4, 8, 16)), 10)
        >>> branches = stage_branches(network, 40)
        >>> list(branches)
        ['backbone.stages.0', 'backbone.stages.1', 'backbone.stages.2']
        >>> names = {path: path.replace(".", "_") for path in branches}
        >>> model = TrainOnlyHeads(
        ...     network,
        ...     {name: path for path, name in names.items()},
        ...     {names[path]: branch for path, branch in branches.items()},
        ... )
        >>> logits, auxiliary = model(torch.rand(5, 1, 8, 8))
        >>> [tuple(auxiliary[name].logits.shape) for name in names.values()]
        [(5, 40), (5, 40), (5, 40)]
    """
    place = find_classifier(model)
    width = linear_at(model, place).in_features
    found = next(
        ((path, part) for path, part in model.named_modules() if path.split(".")[-1] == "stages"),
        (None, None),
    )
    path, stages = found
    if not isinstance(stages, nn.Sequential) or not len(stages):
        body = nn.Sequential(nn.Linear(width, width), SyncBatchNorm1d(width), nn.ReLU())
        return {f"{place}:input": Branch(body, width, outputs)}
    convolutions = [part for part in stages[-1].modules() if isinstance(part, nn.Conv1d | nn.Conv2d)]
    channels = convolutions[-1].out_channels if convolutions else None
    if channels != width:
        raise InputError(
            f"the last stage must give the {width} channels that the classifier takes, got {channels}: give branches"
        )
    dims = 1 if isinstance(convolutions[-1], nn.Conv1d) else 2
    branches: dict[str, Any] = {}
    for number in range(len(stages)):
        body = nn.Sequential(*(_redrawn(stage) for stage in list(stages)[number + 1 :]))
        if not len(body):
            body.extend([convolution(dims, width, width, 3), batch_norm(dims, width), nn.ReLU()])
        branches[f"{path}.{number}"] = Branch(body, width, outputs)
    return branches


def layer_kl_loss(
    branch_logits: Sequence[Float[Tensor, "*batch classes"]], temperature: float = 3.0
) -> Float[Tensor, ""]:
    r"""How far the shallower classifiers are from the deepest one, which does not move towards them.

    $\sum_{l < L} T^2 \, \mathrm{KL}(\mathrm{softmax}(z_L / T) \,\|\, \mathrm{softmax}(z_l / T))$, means over the batch, $z_L$ constant.

    Args:
        branch_logits: of each classifier, in order of depth; at least one.
        temperature: T > 0.

    Returns:
        A scalar, 0 for one classifier.

    Raises:
        ValueError: if there is no classifier, shapes differ, or the temperature is not above 0.

    Source:
        Zhang et al., 2019, arXiv 1905.08094, equation 2, with the deepest branch in place of the network's own classifier.

    Examples:
        >>> import torch
        >>> early, last = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
        >>> round(layer_kl_loss([early, last], temperature=1.0).item(), 4)
        0.1109
    """
    if not branch_logits:
        raise ValueError("branch_logits must hold at least one classifier's, got none")
    *early, last = branch_logits
    teacher = last.detach()
    total = full_precision(teacher[:0]).sum()
    for logits in early:
        total = total + distillation_kl_loss(logits, teacher, temperature)
    return total


def layer_feature_loss(branch_features: Sequence[Float[Tensor, "rows width"]]) -> Float[Tensor, ""]:
    r"""Squared distance of the shallower branches' features to the deepest one's, which do not move towards them.

    $\sum_{l < L} \frac{1}{B} \sum_i \| g_{l,i} - g_{L,i} \|^2$ with $g_L$ constant.

    Args:
        branch_features: of each branch, in order of depth, all of one width; at least one.

    Returns:
        A scalar, at least float32; 0 for one branch or no row.

    Raises:
        ValueError: if there is no branch, or shapes differ.

    Source:
        Zhang et al., 2019, arXiv 1905.08094, equation 3, with the deepest branch in place of the network's last features.

    Examples:
        >>> import torch
        >>> layer_feature_loss([torch.zeros(2, 2), torch.tensor([[3.0, 4.0], [0.0, 1.0]])])
        tensor(13.)
    """
    if not branch_features:
        raise ValueError("branch_features must hold at least one branch's, got none")
    *early, last = branch_features
    goal = full_precision(last.detach())
    total = goal[:0].sum()
    for features in early:
        if features.shape != goal.shape:
            raise ValueError(
                f"branch_features must all have the shape {tuple(goal.shape)} of the last, got {tuple(features.shape)}"
            )
        total = total + (full_precision(features) - goal).square().sum() / max(len(goal), 1)
    return total


def _redrawn(stage: nn.Module) -> nn.Module:
    """A copy with new weights."""
    fresh = copy.deepcopy(stage).requires_grad_(True)
    for part in fresh.modules():
        reset: Any = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
        if isinstance(part, nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    return fresh
