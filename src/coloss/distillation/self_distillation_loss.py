"""The losses of self-distillation across epochs and across depth, with the memory they need, for a loop of one's own."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.distillation.layer_branches import BranchOutputs, layer_feature_loss, layer_kl_loss
from coloss.distillation.past_predictions import PredictionMemory, soften_targets
from coloss.errors import InputError
from coloss.ops import full_precision, joint_labels, soft_cross_entropy_loss

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}

DType = Literal["float16", "bfloat16", "float32", "float64"]
Remember = Literal["joint", "classes"]


class SelfDistillationLoss(nn.Module):
    """Trains a classifier, and branches on its stages, on labels mixed with what each of them said in the epoch before.

    Without branches it is PS-KD. With L branches that tell the N * M joint classes of M versions of each sample, rows as
    `coloss.ops.transform_copies` orders them, it is LSSKD.

    Args:
        num_classes: N.
        branches: L, number of branches.
        copies: M, versions of each sample that branches see, the sample as it is first.
        temperature: of the term between branches, > 0.
        remember: what softens the branches' labels: `"joint"`, each branch's own past prediction of each version; or `"classes"`, the
            network's own past prediction of the sample, in the slots of the version, which takes no further memory (ours).
        max_age, num_samples: of the memory, see `PredictionMemory`.
        dtype: of the memory.

    Attributes:
        memory: a `PredictionMemory`.

    Returns:
        From `forward`, the terms by name, unweighted: `soft_cross_entropy`, mean over the batch; with branches also
        `joint_cross_entropy` (mean over all versions, sum over branches), `layer_kl` and `layer_features`.

    Raises:
        InputError: for a value out of range; from `forward`, for targets that are no class numbers, no ids, or shapes that do not fit.

    Cost:
        The memory: samples * N numbers, and L * M * N * M more for `remember="joint"` with branches (CIFAR-100, 3 stages: 490 MB).

    Source:
        Kim et al., 2021, arXiv 2006.12000; Dahri et al., 2025, arXiv 2506.07055.

    Examples:
        >>> loss = SelfDistillationLoss(num_classes=2)
        >>> logits, targets, ids = torch.tensor([[0.0, 0.0]]), torch.tensor([0]), torch.tensor([7])
        >>> loss(logits, targets, ids, epoch=0, share=0.5)
        {'soft_cross_entropy': tensor(0.6931)}
        >>> later = torch.tensor([[2.0, 0.0]])
        >>> loss(later, targets, ids, epoch=1, share=0.5)["soft_cross_entropy"]  # towards (0.75, 0.25)
        tensor(0.6269)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        branches: int = 0,
        copies: int = 1,
        temperature: float = 3.0,
        remember: Remember = "joint",
        max_age: int = 1,
        num_samples: int | None = None,
        dtype: DType = "float16",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_classes", num_classes, 1),
            ("branches", branches, 0),
            ("copies", copies, 1),
        ):
            if value < least:
                raise InputError(f"{name} must be >= {least}, got {value}")
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature must be > 0 and finite, got {temperature}")
        if remember not in ("joint", "classes"):
            raise InputError(f'remember must be "joint" or "classes", got {remember!r}')
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.num_classes, self.branches, self.copies = num_classes, branches, copies
        self.temperature, self.remember = float(temperature), remember
        shapes: dict[str, tuple[int, ...]] = {"classes": (num_classes,)}
        if branches and remember == "joint":
            shapes["joint"] = (branches, copies, num_classes * copies)
        self.memory = PredictionMemory(shapes, max_age=max_age, num_samples=num_samples, dtype=DTYPES[dtype])

    def forward(
        self,
        logits: Float[Tensor, "batch classes"],
        targets: Tensor,
        ids: Int[Tensor, " batch"] | None,
        epoch: int,
        share: float,
        branches: Sequence[BranchOutputs] = (),
    ) -> dict[str, Tensor]:
        """The terms of one batch, whose predictions are remembered.

        Args:
            logits: of the network for the samples as they are, with their graph.
            targets: class numbers (batch).
            ids: stable number of each sample in its data set.
            epoch: from 0; equal on all processes.
            share: of the earlier predictions in the targets, in [0, 1].
            branches: what each branch gave for all versions, (batch * M, ...), in order of depth.
        """
        self._check(logits, targets, ids, branches)
        assert ids is not None
        past, seen = self.memory.read(ids, epoch)
        logits = full_precision(logits)
        soft = soften_targets(targets, past["classes"].to(logits), share, seen)
        terms = {"soft_cross_entropy": soft_cross_entropy_loss(logits, soft)}
        said = {"classes": logits.detach().softmax(1)}
        if branches:
            joint = torch.stack([full_precision(branch.logits) for branch in branches], 1)
            joint = joint.unflatten(0, (len(logits), self.copies))  # batch, copies, branches, joint classes
            labels = joint_labels(targets, self.copies).view(len(logits), self.copies)
            before = self._past_joint(past).to(joint)
            soft = soften_targets(labels.unsqueeze(2).expand(joint.shape[:3]), before, share, seen)
            terms["joint_cross_entropy"] = len(branches) * soft_cross_entropy_loss(joint, soft)
            terms["layer_kl"] = layer_kl_loss(joint.unbind(2), self.temperature)
            terms["layer_features"] = layer_feature_loss([branch.features for branch in branches])
            if self.remember == "joint":
                said["joint"] = joint.detach().softmax(3).transpose(1, 2)
        self.memory.write(ids, epoch, said)
        return terms

    def _past_joint(self, past: dict[str, Tensor]) -> Tensor:
        """Earlier joint probabilities, (batch, copies, branches, joint classes)."""
        if self.remember == "joint":
            return past["joint"].transpose(1, 2)
        versions = torch.eye(self.copies).to(past["classes"])
        # Not einsum, which autocast computes in half precision.
        known = (past["classes"][:, None, :, None] * versions[:, None, :]).flatten(2)
        return known.unsqueeze(2).expand(-1, -1, self.branches, -1)

    def _check(
        self, logits: Tensor, targets: Tensor, ids: Tensor | None, branches: Sequence[BranchOutputs]
    ) -> None:
        if ids is None:
            raise InputError(
                "past predictions are found by sample id and the batch has none: train on a coloss.data.IndexedDataset, or call "
                "step(inputs, targets, ids)"
            )
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise InputError(
                f"the model must give logits (batch, num_classes = {self.num_classes}), got {tuple(logits.shape)}"
            )
        if (
            not isinstance(targets, Tensor)
            or targets.is_floating_point()
            or targets.shape != logits.shape[:1]
        ):
            found = (
                f"{targets.dtype} {tuple(targets.shape)}"
                if isinstance(targets, Tensor)
                else type(targets).__name__
            )
            raise InputError(f"targets must be one class number for each of {len(logits)} rows, got {found}")
        # Elsewhere the look would make the host wait for the device, which checks the index by itself.
        if targets.device.type == "cpu" and targets.numel():
            low, high = int(targets.min()), int(targets.max())
            if low < 0 or high >= self.num_classes:
                raise InputError(
                    f"targets must be in [0, num_classes = {self.num_classes}), got {low if low < 0 else high}"
                )
        if len(branches) != self.branches:
            raise InputError(f"there must be {self.branches} branches, got {len(branches)}")
        shape = (len(logits) * self.copies, self.num_classes * self.copies)
        for number, branch in enumerate(branches):
            if branch.logits.shape != shape:
                raise InputError(
                    f"a branch must give logits {shape} for {self.copies} versions of each sample, got "
                    f"{tuple(branch.logits.shape)} from number {number}"
                )
