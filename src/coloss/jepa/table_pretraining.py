"""Pretrains on a table of one's own, stores the transformer, and judges what was stored: behind `coloss run t-jepa`."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from coloss.data import DATASETS, dataset_info
from coloss.data.files import TABLE_SUFFIXES, labelled_file
from coloss.data.formats import read_table
from coloss.data.prepare import Labelled
from coloss.data.sources import labelled
from coloss.data.splitting import part_numbers, split_rows
from coloss.data.tables import TARGET_COLUMNS, encode_targets, require_rows
from coloss.errors import InputError
from coloss.jepa.table_transformer import TJEPATransformer
from coloss.metrics import label_budget
from coloss.train.budget import Budget
from coloss.train.run_folder import claim_folder, source_name, write_metrics

FEW, MANY = 100, 5000
"""Labelled rows that judges learn from; the fewer where there are not so many."""

PENALTIES = (1e3, 1e2, 1e1, 1.0)
"""L2 penalties that cross-validation chooses from, as of `coloss.metrics.linear_probe`."""


def pretrain_tjepa(
    data: str = "adult",
    folder: str | Path = "runs/t-jepa",
    *,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Pretrain a table transformer on a data set by name or path, and say what its features are worth beside the raw columns.

    A file may hold numbers, words and missing values; a column `target` or `label` serves the judges alone, and a column `split` of
    train / validation / test divides the rows. The folder gets what `TJEPATransformer.load` reads, `metrics.json`, `run.json` and
    checkpoints; the same folder goes on where a stopped run ended. The metrics are those of the stored files, loaded again.

    Args:
        data: `.csv`, `.tsv` (also `.gz`), `.parquet`, an `.npz` of a feature matrix, or the name of a table of the catalog.
        folder: of the results.
        budget: default: 300 steps.
        seed: of the split, of labelled rows and of training.
        progress: called with the share done.

    Returns:
        On test rows, `WHO_MODEL_METRIC_LABELS`: WHO is "features", "untrained" (features of the encoder as initialised) or "raw"
        (scaled numbers, one-hot categories); MODEL is "linear" (logistic or ridge regression, its penalty chosen by cross-validation)
        or "boosting" (scikit-learn's `HistGradientBoosting`, which gets raw categories and holes as they are); METRIC is "accuracy" and,
        for two classes, "auc", or "r2"; LABELS is the number of labelled rows, 100 (even over classes) and up to 5,000. `feature_std`
        and `untrained_feature_std` as of `TJEPATransformer`.

    Raises:
        InputError: for data that cannot be read or are no table with one target, or a folder that holds another run.

    Source:
        Thimonier et al., 2025 (T-JEPA), arXiv 2410.05016.

    Examples:
        >>> import tempfile
        >>> metrics = pretrain_tjepa("iris", tempfile.mkdtemp(), budget=Budget(steps=2))
        >>> [name for name in metrics if name.startswith("raw")]
        ['raw_linear_accuracy_90', 'raw_boosting_accuracy_90']
    """
    table = labelled_columns(data)
    labels = table.targets if table.kind == "classification" else None
    train, _, test = split_rows(labels, table.parts, len(table.targets), seed)
    if 0 in (len(train), len(test)):
        raise InputError(f"{data} has too few rows to train and to test: {len(table.targets)}")
    folder = Path(folder)
    claim_folder(folder, {"data": source_name(data), "seed": seed})
    TJEPATransformer(random_state=seed).pretrain(
        table.inputs.iloc[train], budget=budget, checkpoint_dir=folder / "checkpoints", progress=progress
    ).save(folder)
    metrics = _judge(TJEPATransformer.load(folder), table, train, test, seed)
    write_metrics(folder, metrics)
    return metrics


def labelled_columns(data: str) -> Labelled:
    """The rows of a table as they are, words and missing values included, with their target.

    Args:
        data: as for `pretrain_tjepa`.

    Returns:
        Rows whose `inputs` are a DataFrame.

    Raises:
        InputError: if it cannot be read, or is no table with one target.

    Examples:
        >>> labelled_columns("iris").inputs.shape
        (150, 4)
    """
    path = Path(data).expanduser()
    if data in DATASETS:
        kind = dataset_info(data).kind
        if kind not in ("classification", "regression"):
            raise InputError(
                f"data must be a table with one class or number for each row, got the {kind} set {data}"
            )
        found = labelled(data)
    elif path.name.lower().endswith(TABLE_SUFFIXES):
        return _read_columns(path)
    else:
        found = labelled_file(path)
    if found.form != "table" or found.kind not in ("classification", "regression"):
        raise InputError(f"data must be a table with one class or number for each row, got {found.form} rows")
    if not isinstance(found.inputs, pd.DataFrame):
        names = found.feature_names or tuple(f"column {place}" for place in range(found.inputs.shape[1]))
        found.inputs = pd.DataFrame(np.asarray(found.inputs), columns=list(names))
    return found


def _read_columns(path: Path) -> Labelled:
    table = read_table(path).rename(columns=str)
    table = table.drop(columns="Unnamed: 0", errors="ignore")  # row numbers that pandas wrote
    require_rows(len(table), str(path))
    target = next((name for name in TARGET_COLUMNS if name in table), None)
    if target is None:
        raise InputError(
            f"{path} must have a column 'target' or 'label' to judge the features by: rename yours, or use TJEPATransformer, which needs none"
        )
    missing = int(table[target].isna().sum())
    if missing:
        raise InputError(f"column {target!r} of {path} has {missing} missing values: drop those rows")
    kind, targets, class_names = encode_targets(table[target].to_numpy(), f"column {target!r} of {path}")
    features = table.drop(columns=[target])
    parts = part_numbers(features["split"].to_numpy()) if "split" in features else None
    if parts is not None:
        features = features.drop(columns="split")
    return Labelled(str(path), kind, "table", features, targets, class_names, parts)


def _judge(
    transformer: TJEPATransformer, table: Labelled, train: NDArray, test: NDArray, seed: int
) -> dict[str, float]:
    rows = {part: table.inputs.iloc[numbers] for part, numbers in (("train", train), ("test", test))}
    encoding = transformer.encoding_
    raw = {part: encoding.transform(some) for part, some in rows.items()}
    untrained = TJEPATransformer(**(transformer.get_params() | {"steps": 0})).fit(rows["train"])
    features = {part: transformer.transform(some) for part, some in rows.items()}
    first = {part: untrained.transform(some) for part, some in rows.items()}
    categorical = np.arange(len(encoding.columns)) >= len(encoding.numeric)
    targets, expected = table.targets[train], table.targets[test]
    boosted = partial(boosting_scores, codes=categorical)
    judges: list[tuple[str, Callable[..., dict[str, float]], Mapping[str, NDArray]]] = [
        ("features_linear", linear_scores, features),
        ("features_boosting", boosting_scores, features),
        ("untrained_linear", linear_scores, first),
        ("untrained_boosting", boosting_scores, first),
        ("raw_linear", linear_scores, {part: encoding.one_hot(some) for part, some in raw.items()}),
        ("raw_boosting", boosted, raw),
    ]
    metrics: dict[str, float] = {}
    for wanted in sorted({min(count, len(targets)) for count in (FEW, MANY)}):
        chosen = labelled_rows(targets, table.kind, wanted, seed)
        for name, score, given in judges:
            found = score(table.kind, given["train"][chosen], targets[chosen], given["test"], expected)
            metrics |= {f"{name}_{metric}_{len(chosen)}": value for metric, value in found.items()}
    return metrics | {
        "feature_std": transformer.feature_std_,
        "untrained_feature_std": transformer.untrained_feature_std_,
    }


def labelled_rows(targets: NDArray, kind: str, count: int, seed: int) -> NDArray[np.int64]:
    """Places of some rows, drawn evenly over classes; all rows where there are no more.

    Examples:
        >>> labelled_rows(np.array([0, 0, 0, 1]), "classification", 2, seed=0).tolist()
        [0, 3]
    """
    if count >= len(targets):
        return np.arange(len(targets))
    if kind == "classification":
        count = max(count, len(np.unique(targets)))
        return label_budget(torch.from_numpy(targets), count, seed).numpy()
    return np.sort(np.random.default_rng(seed).permutation(len(targets))[:count])


def linear_scores(
    kind: str,
    train: NDArray,
    targets: NDArray,
    test: NDArray,
    expected: NDArray,
) -> dict[str, float]:
    """Test scores of a logistic or ridge regression on standardised features, its penalty chosen by cross-validation on the training rows.

    Rows of a class that has no other row are left out of the choice, and learnt from all the same; with fewer than two classes to choose on,
    the penalty is 1.

    Args:
        kind: "classification" or "regression".
        train, targets: labelled rows.
        test, expected: rows to be judged on.

    Returns:
        `accuracy` and, for two classes, `auc`; or `r2`.

    Examples:
        >>> x = np.linspace(-1, 1, 40)[:, None]
        >>> linear_scores("classification", x, (x[:, 0] > 0).astype(int), x, (x[:, 0] > 0).astype(int))
        {'accuracy': 1.0, 'auc': 1.0}
    """
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if kind == "regression":
        model = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
    else:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000))
        classes, counts = np.unique(targets, return_counts=True)
        if (counts > 1).sum() > 1:
            known = np.isin(targets, classes[counts > 1])
            grid = {"logisticregression__C": [1 / penalty for penalty in PENALTIES]}
            folds = min(5, int(counts[counts > 1].min()))
            search = GridSearchCV(model, grid, cv=folds, scoring="neg_log_loss", refit=False)
            model.set_params(**search.fit(train[known], targets[known]).best_params_)
    return _scores(kind, model.fit(train, targets), test, expected)


def boosting_scores(
    kind: str,
    train: NDArray,
    targets: NDArray,
    test: NDArray,
    expected: NDArray,
    codes: NDArray | None = None,
) -> dict[str, float]:
    """Test scores of scikit-learn's gradient boosted trees with their defaults.

    Args:
        kind, train, targets, test, expected: as for `linear_scores`; missing values welcome.
        codes: True for columns of category codes, below 0 where missing; None for none.

    Examples:
        >>> x = np.linspace(-1, 1, 80)[:, None]
        >>> boosting_scores("regression", x, x[:, 0], x, x[:, 0])["r2"] > 0.9
        True
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    if codes is not None:
        train, test = (np.where(codes & (part < 0), np.nan, part) for part in (train, test))
    kinds = {"classification": HistGradientBoostingClassifier, "regression": HistGradientBoostingRegressor}
    model = kinds[kind](categorical_features=codes, random_state=0)
    return _scores(kind, model.fit(train, targets), test, expected)


def _scores(kind: str, model: Any, test: NDArray, expected: NDArray) -> dict[str, float]:
    from sklearn.metrics import r2_score, roc_auc_score

    if kind == "regression":
        return {"r2": float(r2_score(expected, model.predict(test)))}
    probabilities = model.predict_proba(test)
    found = {"accuracy": float((model.classes_[probabilities.argmax(1)] == expected).mean())}
    if len(model.classes_) == 2 and len(np.unique(expected)) == 2:
        found["auc"] = float(roc_auc_score(expected, probabilities[:, 1]))
    return found
