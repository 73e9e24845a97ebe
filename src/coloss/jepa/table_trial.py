"""What features of census rows are worth to a linear model with few labels: the measurement behind the claim of `t-jepa`."""

from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from coloss.data.prepare import Labelled
from coloss.data.splitting import TEST, TRAIN
from coloss.jepa.masked_prediction import between_sample_std
from coloss.jepa.table_pretraining import boosting_scores, labelled_columns, labelled_rows, linear_scores
from coloss.jepa.table_transformer import TJEPATransformer
from coloss.ops import effective_rank, gram_singular_values
from coloss.train.task import Setting

ROWS, TEST_ROWS, LABELS, DRAWS = 8000, 5000, 100, 3
SETTINGS: dict[str, Any] = {"steps": 300}
ARMS: dict[str, dict[str, Any]] = {
    "untrained": {"steps": 0},
    "t-jepa": {},
    "t-jepa, no registers": {"registers": 0},
}


def compare_features(setting: Setting) -> dict[str, dict[str, float]]:
    """Test scores of every arm on one seed, averaged over draws of labelled rows that are the same for all arms.

    Pretraining sees 8,000 rows of the official training part without labels; the labelled rows are among them. Test rows are drawn from
    the official test part.
    """
    table = _adult()
    assert table.parts is not None
    rng = np.random.default_rng(setting.seed)
    sizes = (300, 200) if setting.smoke else (ROWS, TEST_ROWS)
    train, test = (
        rng.permutation(np.flatnonzero(table.parts == part))[:size]
        for part, size in zip((TRAIN, TEST), sizes, strict=True)
    )
    targets = [table.targets[numbers] for numbers in (train, test)]
    draws = [
        labelled_rows(targets[0], table.kind, LABELS, 1000 * setting.seed + draw)
        for draw in range(1 if setting.smoke else DRAWS)
    ]
    found: dict[str, dict[str, float]] = {}
    for arm, changes in ARMS.items():
        options = SETTINGS | changes
        if setting.smoke:
            options |= {"steps": min(options["steps"], 3), "dim": 8}
        transformer = TJEPATransformer(random_state=setting.seed, **options)
        transformer.fit(table.inputs.iloc[train])
        features = [transformer.transform(table.inputs.iloc[numbers]) for numbers in (train, test)]
        means = [some.reshape(len(some), -1, transformer.dim).mean(1) for some in features]
        flat = _mean_scores(linear_scores, features, targets, draws)
        found[arm] = _mean_scores(linear_scores, means, targets, draws)
        found[arm] |= {f"{name}_flat": value for name, value in flat.items()}
        found[arm] |= _meters(features[1], transformer.dim)
        if arm == "t-jepa":
            found["boosting, t-jepa flat"] = _mean_scores(boosting_scores, features, targets, draws)
            encoding = transformer.encoding_
            raw = [encoding.transform(table.inputs.iloc[numbers]) for numbers in (train, test)]
            hot = [encoding.one_hot(rows) for rows in raw]
            found["raw columns"] = _mean_scores(linear_scores, hot, targets, draws)
            codes = np.arange(len(encoding.columns)) >= len(encoding.numeric)
            found["boosting, raw columns"] = _mean_scores(
                partial(boosting_scores, codes=codes), raw, targets, draws
            )
    return found


@lru_cache(maxsize=1)
def _adult() -> Labelled:
    return labelled_columns("adult")


def _mean_scores(
    score: Any,
    features: list[NDArray],
    targets: list[NDArray],
    draws: list[NDArray],
) -> dict[str, float]:
    scores = [
        score("classification", features[0][rows], targets[0][rows], features[1], targets[1])
        for rows in draws
    ]
    return {name: float(np.mean([found[name] for found in scores])) for name in scores[0]}


def _meters(features: NDArray, dim: int) -> dict[str, float]:
    """How far rows differ: absolute meters, which see collapse, and the effective rank, which does not."""
    flat = torch.from_numpy(features)
    tokens = flat.unflatten(1, (-1, dim))
    centred = flat - flat.mean(0)
    return {
        "token_std": float(between_sample_std(tokens)),
        "token_variance": float(tokens.var(0, correction=0).mean()),
        "effective_rank": float(effective_rank(gram_singular_values(centred), eps=1e-7)),
    }
