"""Recognises actions by networks that each see one part of the body, and all of joint, bone and their motions at once.

PSUMNet: Trivedi and Sarvadevabhatla, 2022, arXiv 2208.05775. The usual recogniser trains a network on each of four modalities and adds
their scores. Here the four are channels of one input, and what is trained apart are parts of the body, the smaller the part the smaller
its network:

    J = x,   B[v] = x[v] - x[parent of v],   JV[t] = J[t+1] - J[t],   BV[t] = B[t+1] - B[t]
    U = (J, B, JV, BV)                                        12 channels
    score = a_body s_body(U) + a_arms s_arms(U of the arms) + a_legs s_legs(U of the legs)

Positions stay in the frame of the whole body. Bones are those of the part's own tree. The networks are trained apart, or together with one
loss on the fused score; the weights a come from validation data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.data import Skeleton, skeleton_streams
from coloss.errors import InputError
from coloss.motion.score_fusion import fuse_scores
from coloss.nn import SkeletonEncoder
from coloss.ops import graph_partition

MODALITIES = ("joint", "bone", "motion", "bone_motion")

BODY_WIDTHS, BODY_STRIDES = (64,) * 4 + (128,) * 3 + (256,) * 3, (1, 1, 1, 1, 2, 1, 1, 2, 1, 1)
ARM_WIDTHS, ARM_STRIDES = (64, 128, 128, 128, 256, 256), (1, 2, 1, 1, 2, 1)
LEG_WIDTHS, LEG_STRIDES = (64, 128, 128, 256), (1, 2, 1, 2)
"""The paper's networks for body, hands (arms) and legs."""


def unify_modalities(
    clips: Float[Tensor, "clips 3 frames joints *persons"],
    parents: Sequence[int],
    modalities: Sequence[str] = MODALITIES,
) -> Float[Tensor, "clips channels frames joints *persons"]:
    """Joints, bones and the steps of both from one frame to the next, as channels of one input.

    Args:
        clips: positions.
        parents: of each joint, -1 at the root (whose bone is 0).
        modalities: which, of `MODALITIES`, three channels each, in this order.

    Returns:
        (clips, 3 x modalities, frames, joints[, persons]); steps of the last frame are 0.

    Raises:
        ValueError: for no or unknown modalities, or parents that do not fit the joints.

    Examples:
        >>> unify_modalities(torch.randn(2, 3, 8, 4), [-1, 0, 1, 1]).shape
        torch.Size([2, 12, 8, 4])
    """
    if not modalities or not set(modalities) <= set(MODALITIES):
        raise ValueError(f"modalities must be among {', '.join(MODALITIES)}, got {tuple(modalities)}")
    streams = skeleton_streams(clips, parents)
    return torch.cat([streams[name] for name in modalities], 1)


@dataclass(frozen=True)
class PartStream:
    """Some joints of a skeleton as a tree of their own.

    Args:
        joints: their numbers in the whole skeleton, distinct.
        parents: of each of them, by its place in `joints`, -1 at the root.

    Raises:
        InputError: if there are no joints, one repeats, or the parents are no tree of them.

    Examples:
        >>> PartStream((0, 2), (-1, 0)).select(torch.arange(6.0).view(1, 1, 2, 3))
        tensor([[[[0., 2.],
                  [3., 5.]]]])
    """

    joints: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.joints or len(set(self.joints)) != len(self.joints) or min(self.joints) < 0:
            raise InputError(f"joints must be distinct and >= 0, at least one, got {self.joints}")
        if len(self.parents) != len(self.joints):
            raise InputError(
                f"parents must be {len(self.joints)}, one for each joint, got {len(self.parents)}"
            )
        Skeleton(self.parents)

    @classmethod
    def of(cls, skeleton: Skeleton, joints: Sequence[int], root: int | None = None) -> "PartStream":
        """A part of a skeleton, in which each joint hangs on its nearest ancestor of the part.

        Args:
            skeleton: the whole.
            joints: of the part.
            root: the joint that holds the part together; put in front if it is not among them. Default: the nearest one on which all of
                them hang.

        Raises:
            InputError: for joints that are not there, or hang on one another without the root.

        Examples:
            >>> body = Skeleton((-1, 0, 1, 0, 3))  # two limbs of two joints at joint 0
            >>> PartStream.of(body, [1, 2, 3, 4])
            PartStream(joints=(0, 1, 2, 3, 4), parents=(-1, 0, 1, 0, 3))
        """
        chosen = [int(joint) for joint in joints]
        if not chosen or not all(0 <= joint < skeleton.num_joints for joint in chosen):
            raise InputError(f"joints must be in [0, {skeleton.num_joints}), at least one, got {chosen}")
        root = _common_ancestor(skeleton.parents, chosen) if root is None else root
        if root not in chosen:
            chosen = [root, *chosen]
        return cls(tuple(chosen), skeleton.subset(chosen).parents)

    def select(
        self, clips: Float[Tensor, "clips channels frames joints *persons"]
    ) -> Float[Tensor, "clips channels frames part *persons"]:
        """The part's joints of clips of the whole skeleton.

        Raises:
            ValueError: if the clips have too few joints.
        """
        if clips.shape[3] <= max(self.joints):
            raise ValueError(f"clips must have at least {max(self.joints) + 1} joints, got {clips.shape[3]}")
        return clips.index_select(3, torch.tensor(self.joints, device=clips.device))


def streams_of_parts(
    skeleton: Skeleton, parts: Mapping[str, Sequence[str]] | None = None
) -> dict[str, PartStream]:
    """The whole body, both arms, both legs; or any other parts that a skeleton names.

    Args:
        skeleton: with parts `left_arm`, `right_arm`, `left_leg`, `right_leg`, unless others are asked for.
        parts: names of the skeleton's parts for each stream; none means all joints. Default: `body`, `arms` and `legs`; for a skeleton
            without those parts, such as a hand: `body` and each of its parts.

    Raises:
        UnknownNameError: for a part that the skeleton does not have.

    Examples:
        >>> from coloss.data.skeleton import SKELETONS
        >>> {name: len(stream.joints) for name, stream in streams_of_parts(SKELETONS["msr-action3d"]).items()}
        {'body': 20, 'arms': 9, 'legs': 9}
    """
    if parts is None:
        limbs: dict[str, tuple[str, ...]] = {
            "arms": ("left_arm", "right_arm"),
            "legs": ("left_leg", "right_leg"),
        }
        if not all(name in skeleton.parts for names in limbs.values() for name in names):
            limbs = {name: (name,) for name in skeleton.parts}
        parts = {"body": (), **limbs}
    found = {}
    for stream, names in parts.items():
        joints = [joint for name in names for joint in skeleton.part(name)]
        found[stream] = PartStream.of(skeleton, joints or range(skeleton.num_joints))
    return found


class PartStreamNet(nn.Module):
    """A recogniser of one part of the body: clips of the whole skeleton to class scores.

    Each block is a graph convolution with learnt relations between joints, beginning as its shortcut, and convolutions over time at
    several scales; then a mean over frames, joints and the persons that are there, and a linear layer.

    Args:
        stream: which joints it sees.
        classes: scores, >= 1.
        modalities: what it sees of them: `MODALITIES`, or one for a network of the usual ensemble.
        widths: channels of each block, multiples of 4; the paper's are `BODY_WIDTHS`, `ARM_WIDTHS`, `LEG_WIDTHS`.
        strides: in time, of each block.
        dropout: before the linear layer, in [0, 1).
        graph: `relation` as in the paper; or the blocks of another recogniser, see `coloss.nn.SkeletonBlock` (`importance` is several
            times as fast on a CPU).
        kernel: frames of the temporal convolutions of those others.

    Attributes:
        encoder: a `SkeletonEncoder`.
        classifier: the linear layer.

    Raises:
        ValueError: for a size or dropout out of range; from `forward` for clips of too few joints.

    Source: Trivedi and Sarvadevabhatla, 2022; blocks of Chen and others, 2021.

    Examples:
        >>> from coloss.data.skeleton import SKELETONS
        >>> arms = streams_of_parts(SKELETONS["msr-action3d"])["arms"]
        >>> net = PartStreamNet(arms, 20, widths=(8, 16), strides=(1, 2))
        >>> net(torch.randn(2, 3, 16, 20)).shape
        torch.Size([2, 20])
    """

    def __init__(
        self,
        stream: PartStream,
        classes: int,
        *,
        modalities: Sequence[str] = MODALITIES,
        widths: Sequence[int] = BODY_WIDTHS,
        strides: Sequence[int] = BODY_STRIDES,
        dropout: float = 0.0,
        graph: Literal["fixed", "importance", "additive", "relation"] = "relation",
        kernel: int = 5,
    ) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes must be >= 1, got {classes}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.stream, self.modalities = stream, tuple(modalities)
        partition = graph_partition(stream.parents, "directed")
        self.encoder = SkeletonEncoder(
            partition, 3 * len(self.modalities), widths, strides, graph=graph, kernel=kernel
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(self.encoder.out_features, classes)

    def encoded(
        self, clips: Float[Tensor, "clips 3 frames joints *persons"]
    ) -> Float[Tensor, "clips features"]:
        """What the linear layer sees of each clip."""
        part = self.stream.select(clips)
        unified = unify_modalities(part, self.stream.parents, self.modalities)
        # By the whole body's positions: who stands still has no steps, but is there.
        people = clips if clips.ndim == 5 else clips[..., None]
        return self.encoder(unified, (people != 0).flatten(1, 3).any(1))

    def forward(
        self, clips: Float[Tensor, "clips 3 frames joints *persons"]
    ) -> Float[Tensor, "clips classes"]:
        return self.classifier(self.dropout(self.encoded(clips)))


class PartStreamEnsemble(nn.Module):
    """Networks whose scores are added with weights: as one model, to use, store, or train with one loss on the fused score.

    Args:
        nets: by name; each takes the same clips.
        weights: one for each net, >= 0; equal ones that sum to 1 by default.

    Attributes:
        nets: `nn.ModuleDict`.
        weights: buffer; set it with `fit_fusion_weights` on validation data.

    Raises:
        ValueError: for no nets, or weights that do not fit them.

    Examples:
        >>> ensemble = PartStreamEnsemble({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}, [2.0, 1.0])
        >>> x = torch.randn(4, 3)
        >>> torch.allclose(ensemble(x), 2 * ensemble.nets["a"](x) + ensemble.nets["b"](x), atol=1e-6)
        True
    """

    weights: Tensor

    def __init__(self, nets: Mapping[str, nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not nets:
            raise ValueError("nets must hold at least one network, got none")
        self.nets = nn.ModuleDict(nets)
        given = torch.full((len(nets),), 1 / len(nets)) if weights is None else torch.tensor(weights).float()
        if given.shape != (len(nets),) or not bool((given >= 0).all()):
            raise ValueError(f"weights must be {len(nets)} numbers >= 0, got {given.tolist()}")
        self.register_buffer("weights", given)

    def scores(self, clips: Tensor) -> list[Tensor]:
        """Of each net."""
        return [net(clips) for net in self.nets.values()]

    def forward(self, clips: Tensor) -> Tensor:
        """The fused scores, (clips, classes)."""
        return fuse_scores(self.scores(clips), self.weights)


def _common_ancestor(parents: Sequence[int], joints: Sequence[int]) -> int:
    """The nearest joint on which all of some joints hang, or that is one of them and holds the others."""

    def line(joint: int) -> list[int]:
        found = [joint]
        while parents[found[-1]] >= 0:
            found.append(parents[found[-1]])
        return found

    lines = [line(joint) for joint in joints]
    shared = set(lines[0]).intersection(*lines)
    return next(joint for joint in lines[0] if joint in shared)
