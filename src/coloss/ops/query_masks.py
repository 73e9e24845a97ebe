"""Loss of masks that learned queries draw, one query for each class: focal loss, dice loss and whether the class is there."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from coloss.ops.distributed import all_reduce_mean
from coloss.ops.precision import full_precision


def query_mask_loss(
    mask_logits: Float[Tensor, "batch classes rows columns"],
    presence: Float[Tensor, "batch classes 2"],
    targets: Int[Tensor, "batch height width"],
    *,
    ignore_index: int = -100,
    focal_weight: float = 20.0,
    dice_weight: float = 1.0,
    presence_weight: float = 1.0,
    absent_weight: float = 0.1,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Tensor, ""]:
    """Weighted sum of focal loss, dice loss and cross-entropy for masks drawn by one query per class.

    For each class that an image holds, with p = sigmoid(logits), brought to the image's size by bilinear interpolation, and binary mask t:

        focal = mean over pixels of  alpha_t (1 - p_t)^gamma * BCE(p, t),   p_t = p t + (1 - p)(1 - t),   alpha_t likewise from alpha
        dice  = 1 - (2 sum p t + 1) / (sum p + sum t + 1)

    each summed over masks and divided by the number of masks; and cross-entropy of `presence`, over all queries, with target 0 where the
    class is there and 1 where it is not, the latter weighted by `absent_weight`. Query c stands for class c: nothing is matched.

    Args:
        mask_logits: a map for each class, of any size.
        presence: logits of "there" and "not there".
        targets: class of each pixel in [0, classes), or `ignore_index` for pixels that count nowhere.
        ignore_index: see there.
        focal_weight, dice_weight, presence_weight: of the three parts, >= 0.
        absent_weight: of absent classes in the cross-entropy, >= 0.
        alpha: of the focal loss, in [0, 1].
        gamma: of the focal loss, >= 0; 0 is plain cross-entropy.

    Returns:
        A scalar, at least float32. The number of masks (at least 1) and the weights of the cross-entropy are averaged over processes, so
        that data-parallel training takes the steps of one process with the joined batch.

    Raises:
        ValueError: for a negative weight, alpha or gamma out of range, or (on the CPU) a target that is no class.

    Cost:
        O(batch * classes * height * width) time and memory.

    Source:
        Zhang et al. 2022, arXiv 2210.05844 (SegViT), as used in Tang et al. 2023, arXiv 2308.01045.

    Examples:
        >>> targets = torch.tensor([[[0, 1], [0, 1]]])
        >>> sure = 50 * (2 * F.one_hot(targets, 3).movedim(-1, 1).float() - 1)
        >>> there = torch.tensor([[[50.0, -50.0], [50.0, -50.0], [-50.0, 50.0]]])
        >>> query_mask_loss(sure, there, targets).item() < 1e-6
        True
    """
    weights = {
        "focal_weight": focal_weight,
        "dice_weight": dice_weight,
        "presence_weight": presence_weight,
        "absent_weight": absent_weight,
    }
    for name, value in weights.items():
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if not 0 <= gamma < torch.inf:
        raise ValueError(f"gamma must be >= 0 and finite, got {gamma}")
    mask_logits, presence = full_precision(mask_logits), full_precision(presence)
    classes = mask_logits.shape[1]
    counted = targets != ignore_index
    labels = targets.long().masked_fill(~counted, 0)
    if labels.device.type == "cpu" and labels.numel() and not 0 <= labels.min() <= labels.max() < classes:
        wrong = int(labels.min()) if labels.min() < 0 else int(labels.max())
        raise ValueError(f"targets must be in [0, {classes}) or {ignore_index}, got {wrong}")
    if mask_logits.shape[2:] != targets.shape[1:]:
        mask_logits = F.interpolate(mask_logits, targets.shape[1:], mode="bilinear", align_corners=False)
    pixels = counted[:, None].flatten(2).to(mask_logits.dtype)
    truth = F.one_hot(labels, classes).movedim(-1, 1).flatten(2).to(mask_logits.dtype) * pixels
    there = truth.amax(2)
    logits = mask_logits.flatten(2)
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    # (1 - p_t)^gamma through its logarithm: a power of zero has no finite gradient where gamma < 1.
    missed = (gamma * F.logsigmoid(torch.where(truth > 0, -logits, logits))).exp()
    balance = alpha * truth + (1 - alpha) * (1 - truth)
    focal = (balance * missed * entropy * pixels).sum(2) / pixels.sum(2).clamp(min=1)
    probability = probability * pixels
    dice = 1 - (2 * (probability * truth).sum(2) + 1) / (probability.sum(2) + truth.sum(2) + 1)
    masks = all_reduce_mean(there.sum()).clamp(min=1)
    drawn = ((focal_weight * focal + dice_weight * dice) * there).sum() / masks
    share = there + absent_weight * (1 - there)
    log_there, log_absent = presence.log_softmax(-1).unbind(-1)
    surprise = -torch.where(there > 0, log_there, log_absent)
    total = all_reduce_mean(share.sum())
    return drawn + presence_weight * (share * surprise).sum() / total.clamp(min=torch.finfo(total.dtype).tiny)
