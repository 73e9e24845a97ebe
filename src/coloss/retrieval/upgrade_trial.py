"""An upgrade on digits, measured: an old encoder that learnt five of ten classes, and ways to replace it.

Runs once for each seed of the claim in `coloss.retrieval.basis_transform`.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from coloss.data import IndexedDataset
from coloss.metrics import extract_features, predict
from coloss.nn import MLP
from coloss.retrieval.compatibility_report import compatibility_report, procrustes_map
from coloss.retrieval.compatible_head import UpgradedEncoder
from coloss.train import Budget, Method, Setting, Task
from coloss.train.encoder_task import digits_encoder_task

DIM, EXTRA_DIMS, SCALE, HIDDEN, CLASSES = 8, 4, 2.0, 128, 10


def upgrade_task() -> Task:
    """1,200 digits to train on, 597 that serve as queries and as gallery.

    Examples:
        >>> upgrade_task().name
        'digits-upgrade'
    """
    return replace(
        digits_encoder_task(Budget(steps=300)),
        name="digits-upgrade",
        kind="retrieval",
        title=f"find digits of the same class in an index that an encoder of {DIM} dimensions and 5 known classes filled",
        model=lambda splits: MLP(64, (HIDDEN,)),
        metric="map_in_old_index",
    )


def measure_upgrade(setting: Setting) -> dict[str, dict[str, float]]:
    """Quality in the old index and in a new one, of the old encoder and of what may take its place.

    All networks have one architecture up to their head, and the same number of steps.
    """
    # The room that declares the claim imports this module.
    from coloss.retrieval.basis_transform import BackwardCompatibleTraining, BasisTransformTraining

    train, test = setting.splits.train, setting.splits.test
    known = train.subset((train.targets < CLASSES // 2).nonzero().flatten())

    def plain(dataset: IndexedDataset, seed: int = setting.seed) -> UpgradedEncoder:
        method = BackwardCompatibleTraining(torch.zeros(CLASSES, DIM), weight=0.0)
        return _trained(setting, dataset, method, seed=seed)

    # Heads that begin at the same weights would leave two encoders half aligned.
    old, new = plain(known, seed=setting.seed + 10_000), plain(train)
    options: dict[str, Any] = {"extra_dims": EXTRA_DIMS, "scale": SCALE}
    basis = BasisTransformTraining.from_encoders(old, new, train, **options)
    prototypes = basis.prototypes
    before_by_id, after_by_id = basis.old.table, basis.new.table
    assert prototypes is not None and before_by_id is not None and after_by_id is not None
    frozen = replace(
        setting,
        splits=replace(setting.splits, train=_features(new.trunk, train), test=_features(new.trunk, test)),
    )
    head_only = BasisTransformTraining(
        before_by_id, after_by_id, prototypes=prototypes, in_features=HIDDEN, **options
    )
    turn = procrustes_map(predict(new, train).outputs, predict(old, train).outputs)
    embedded = {
        "independent": predict(new, test).outputs,
        "bct": predict(_trained(setting, train, BackwardCompatibleTraining(prototypes)), test).outputs,
        "bt2": predict(_trained(setting, train, basis), test).outputs,
        "bt2, head only": predict(
            _trained(frozen, frozen.splits.train, head_only, nn.Identity()), frozen.splits.test
        ).outputs,
    }
    before = predict(old, test).outputs

    def judged(after: Tensor, compatible: Tensor | None = None) -> dict[str, float]:
        report = compatibility_report(
            before, after, before, after, test.targets, compatible_queries=compatible
        )
        sides = {"old_index": report.new_old, "new_index": report.new_new}
        return {
            f"{name}_in_{side}": found[key] for side, found in sides.items() for name, key in NAMES.items()
        }

    arms = {"old encoder": judged(before)}
    arms |= {name: judged(after) for name, after in embedded.items()}
    arms["procrustes"] = judged(embedded["independent"], embedded["independent"] @ turn)
    return arms


NAMES = {"map": "map", "top1": "cmc@1"}


def _trained(
    setting: Setting, dataset: IndexedDataset, method: Method, trunk: nn.Module | None = None, **options: Any
) -> UpgradedEncoder:
    trunk = MLP(64, (HIDDEN,)) if trunk is None else trunk
    inner = replace(setting, splits=replace(setting.splits, train=dataset))
    encoder = inner.fit(trunk, None, [method], **options).model
    assert isinstance(encoder, UpgradedEncoder)
    return encoder


def _features(trunk: nn.Module, dataset: IndexedDataset) -> IndexedDataset:
    return IndexedDataset(extract_features(trunk, dataset).features, dataset.targets, dataset.ids)
