"""Where the models of a federation's clients agree: features block by block, and learnt links."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean

import torch
from torch import Tensor, nn

from coloss.metrics import evaluation_mode, linear_cka
from coloss.motion.adaptive_topology import AdaptiveTopology
from coloss.nn import Taps


def block_agreement(
    models: Mapping[str, nn.Module], inputs: Tensor, blocks: Sequence[str]
) -> dict[str, float]:
    """How alike the clients' models see the same clips, block by block: linear CKA, averaged over pairs of clients.

    The authors report it high in early blocks and low in late ones.

    Args:
        models: of the clients, by name, at least two.
        inputs: clips that all of them see, on the models' device.
        blocks: module paths, such as `"backbone.blocks.0"`.

    Returns:
        Mean CKA in [0, 1] by path; NaN where a block's output does not vary.

    Raises:
        ValueError: for fewer than two models, or a path that one does not have.

    Cost: one forward pass of each model; the features of all blocks are held at once.

    Examples:
        >>> one = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> {
        ...     path: round(value, 6)
        ...     for path, value in block_agreement({"a": one, "b": one}, torch.randn(9, 3), ["0"]).items()
        ... }
        {'0': 1.0}
    """
    if len(models) < 2:
        raise ValueError(f"models must be two at least, got {len(models)}")
    features: dict[str, dict[str, Tensor]] = {}
    for name, model in models.items():
        with Taps(model, {path: path for path in blocks}, detach=True) as taps, evaluation_mode(model):
            model(inputs)
            features[name] = {path: taps[path].flatten(1) for path in blocks}
    pairs = list(combinations(features, 2))
    return {
        path: fmean(linear_cka(features[one][path], features[other][path]).item() for one, other in pairs)
        for path in blocks
    }


def link_agreement(models: Mapping[str, nn.Module]) -> dict[str, float]:
    """Cosine of the learnt link matrices of two clients, all layers together, averaged over pairs.

    Args:
        models: of the clients, by name, at least two, with `AdaptiveTopology` layers. After an averaging the shared matrices are equal; before
            it they tell how far clients agree on common links.

    Returns:
        `shared_matrix` and `private_matrix`, in [-1, 1], where there are such matrices; NaN where all are 0.

    Raises:
        ValueError: for fewer than two models, or one without such layers.

    Examples:
        >>> layer = AdaptiveTopology(torch.eye(2)[None], noise=1.0)
        >>> {name: round(value, 6) for name, value in link_agreement({"a": layer, "b": layer}).items()}
        {'shared_matrix': 1.0, 'private_matrix': 1.0}
    """
    if len(models) < 2:
        raise ValueError(f"models must be two at least, got {len(models)}")
    found: dict[str, list[Tensor]] = {"shared_matrix": [], "private_matrix": []}
    for name, model in models.items():
        layers = [module for module in model.modules() if isinstance(module, AdaptiveTopology)]
        if not layers:
            raise ValueError(f"models must hold AdaptiveTopology layers, {name!r} has none")
        for kind, rows in found.items():
            matrices = [getattr(layer, kind) for layer in layers if getattr(layer, kind) is not None]
            if matrices:
                rows.append(torch.cat([matrix.detach().flatten().double() for matrix in matrices]))
    return {
        kind: fmean(
            (one @ other / (one.norm() * other.norm())).item() for one, other in combinations(rows, 2)
        )
        for kind, rows in found.items()
        if len(rows) == len(models)
    }
