"""Features of a table's rows from masked latent prediction, as a scikit-learn transformer."""

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from coloss.data import TableEncoding
from coloss.errors import InputError
from coloss.jepa.masked_prediction import between_sample_std
from coloss.jepa.rank_monitor import CollapseWarning
from coloss.jepa.table_prediction import TabularJEPA
from coloss.metrics import extract_features
from coloss.nn import TokenEncoder, token_encoder_for_shape
from coloss.train.atomic_text import write_atomically
from coloss.train.budget import Budget
from coloss.train.checkpoint import load_model, save_model
from coloss.train.loop import fit
from coloss.train.schedules import cosine, linear

COLLAPSED = 0.1
"""Features whose deviation between rows falls below this share of the untrained encoder's have collapsed."""

_MEASURED = 1024
"""Rows whose features are measured."""

_WEIGHTS, _DESCRIPTION = "encoder.safetensors", "transformer.json"


class TJEPATransformer(TransformerMixin, BaseEstimator):
    """Pretrains an encoder on a table without labels, and turns rows into features for any model.

    Numbers, words and missing values go in as they are: `X` is a pandas DataFrame, whose numeric and boolean columns are numbers and
    whose others are categories, or an array. Means, scales and categories are learnt in `fit`; a category that `fit` did not see counts
    as missing. A column that had no missing value in `fit` has not learnt what one means: fill such holes yourself.

    Args:
        output: "flatten" for the vectors of all columns one after another, "mean" for their mean.
        dim: size of a column's vector; even, and divisible by `heads`.
        depth: blocks of the encoder.
        heads: attention heads.
        registers: tokens that stand for no column, always visible and never predicted (REG); 0 for none.
        steps: of training; 0 leaves the encoder untrained, the rival to beat. More are not better, see `coloss.jepa.table_prediction`.
        batch_size: rows in a step.
        learning_rate: of AdamW without weight decay, warmed up and then lowered along a cosine.
        momentum: of the slow copy at the start, in [0, 1]; rises to 1 in a straight line.
        context: range of the share of visible columns, in (0, 1]; (0.136, 0.368) in the paper.
        target: range of the share of columns to predict, in (0, 1]; (0.156, 0.622) in the paper.
        num_targets: sets of such columns for each row; 4 in the paper.
        max_categories: of a column with more of them the rarer ones count as unknown.
        random_state: None, a number or a `RandomState`.

    Attributes:
        encoding_: the `TableEncoding`.
        encoder_: the `TokenEncoder`, as it ships (the slow copy's weights).
        feature_std_: deviation of the training rows' features around each column's mean vector (`between_sample_std`; of more than 1,024
            rows, on 1,024 drawn by a fixed seed); near 0 for a collapsed encoder, of which `fit` warns.
        untrained_feature_std_: the same before training.
        n_features_in_, feature_names_in_: as scikit-learn has them.

    Raises:
        ValueError: in `fit`, for an option out of range, or a table with fewer than two rows or columns, infinite numbers or times; in
            `transform`, for other columns.

    Cost:
        A training step of B rows of D columns takes O(B D^2) and, on one core, 0.03 to 0.1 s at B = 128, D = 14 and these defaults.

    Source:
        Thimonier et al., 2025 (T-JEPA), arXiv 2410.05016.

    Examples:
        >>> from sklearn.linear_model import LogisticRegression
        >>> from sklearn.pipeline import make_pipeline
        >>> from sklearn.preprocessing import StandardScaler
        >>> people = pd.DataFrame({"age": [31, 54, None, 22] * 5, "city": ["Rome", None, "Oslo", "Oslo"] * 5})
        >>> features = TJEPATransformer(steps=5, random_state=0)
        >>> model = make_pipeline(features, StandardScaler(), LogisticRegression())
        >>> model.fit(people, [1, 0, 1, 1] * 5).predict(people[:4])
        array([1, 0, 1, 1])
        >>> features.transform(people).shape
        (20, 64)
    """

    encoding_: TableEncoding
    encoder_: TokenEncoder

    def __init__(
        self,
        output: Literal["flatten", "mean"] = "flatten",
        *,
        dim: int = 32,
        depth: int = 2,
        heads: int = 2,
        registers: int = 1,
        steps: int = 300,
        batch_size: int = 128,
        learning_rate: float = 2e-3,
        momentum: float = 0.99,
        context: tuple[float, float] = (0.3, 0.6),
        target: tuple[float, float] = (0.15, 0.4),
        num_targets: int = 2,
        max_categories: int = 100,
        random_state: Any = None,
    ) -> None:
        self.output = output
        self.dim = dim
        self.depth = depth
        self.heads = heads
        self.registers = registers
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.context = context
        self.target = target
        self.num_targets = num_targets
        self.max_categories = max_categories
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "TJEPATransformer":
        """Learn scales and categories, and pretrain; `y` is not used."""
        return self.pretrain(X)

    def pretrain(
        self,
        X: Any,
        *,
        budget: Budget | None = None,
        checkpoint_dir: str | Path | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> "TJEPATransformer":
        """What `fit` does, in a run that can be stopped and watched.

        Args:
            X: the table.
            budget: in place of `steps`.
            checkpoint_dir: of a run that goes on where it was stopped; needs a number as `random_state`.
            progress: called with the share done.
        """
        self._check()
        table = self._table(X, reset=True)
        if checkpoint_dir is not None and not isinstance(self.random_state, int | np.integer):
            raise InputError(f"random_state must be a number with checkpoint_dir, got {self.random_state!r}")
        seed = int(check_random_state(self.random_state).randint(2**31))
        self.encoding_ = TableEncoding.learn(table, self.max_categories)
        rows = torch.from_numpy(self.encoding_.transform(table))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder_ = self._new_encoder().eval()
        self.untrained_feature_std_ = self.feature_std_ = self._feature_std(rows)
        if self.steps == 0 and budget is None:
            return self
        fit(
            self.encoder_,
            (rows,),
            methods=[
                TabularJEPA(
                    context=self.context,
                    target=self.target,
                    num_targets=self.num_targets,
                    momentum=linear(self.momentum, 1.0),
                    predictor_heads=self.heads,
                )
            ],
            budget=budget or Budget(steps=self.steps),
            batch_size=self.batch_size,
            optimizer=partial(torch.optim.AdamW, lr=self.learning_rate, weight_decay=0.0),
            learning_rate_schedule=cosine(warmup=0.05),
            checkpoint_dir=checkpoint_dir,
            resume=checkpoint_dir is not None,
            progress=(lambda share, terms: progress(share)) if progress is not None else None,
            seed=seed,
        )
        self.encoder_.eval()
        self.feature_std_ = self._feature_std(rows)
        if self.feature_std_ < COLLAPSED * self.untrained_feature_std_:
            warnings.warn(
                f"the encoder collapsed: its features deviate by {self.feature_std_:.2g} between rows, "
                f"{self.untrained_feature_std_:.2g} before training; try registers=1, a lower learning_rate or a higher momentum",
                CollapseWarning,
                stacklevel=3,
            )
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Features of rows: (rows, columns * dim) for "flatten", (rows, dim) for "mean"."""
        check_is_fitted(self, "encoder_")
        rows = torch.from_numpy(self.encoding_.transform(self._table(X, reset=False)))
        tokens = self._tokens(rows)
        return (tokens.flatten(1) if self.output == "flatten" else tokens.mean(1)).numpy()

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the features: column and dimension, or `mean` and dimension."""
        check_is_fitted(self, "encoder_")
        names = self.encoding_.columns if self.output == "flatten" else ("mean",)
        return np.array([f"{name}_{place}" for name in names for place in range(self.dim)], dtype=object)

    def save(self, folder: str | Path) -> Path:
        """Write the fitted transformer as `encoder.safetensors` and `transformer.json`; nothing is pickled.

        Raises:
            InputError: if the folder cannot be written.

        Examples:
            >>> import tempfile
            >>> table = np.arange(12.0).reshape(6, 2)
            >>> folder = TJEPATransformer(steps=2, random_state=0).fit(table).save(tempfile.mkdtemp())
            >>> TJEPATransformer.load(folder).transform(table).shape
            (6, 64)
        """
        check_is_fitted(self, "encoder_")
        options = self.get_params(deep=False)
        if not isinstance(self.random_state, int | np.integer):
            options["random_state"] = None
        description = {
            "options": options,
            "encoding": self.encoding_.as_json(),
            "columns": self.n_features_in_,
            "names": list(getattr(self, "feature_names_in_", ())),
            "feature_std": self.feature_std_,
            "untrained_feature_std": self.untrained_feature_std_,
        }
        folder = Path(folder)
        save_model(self.encoder_, folder / _WEIGHTS)
        write_atomically(folder / _DESCRIPTION, json.dumps(description, indent=1, default=_plain) + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "TJEPATransformer":
        """The fitted transformer that `save` wrote.

        Raises:
            InputError: if a file is missing or damaged.
        """
        folder = Path(folder)
        try:
            stored = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
            options: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in stored["options"].items()
            }
            found = cls(**options)
            found.encoding_ = TableEncoding.from_json(stored["encoding"])
            found.n_features_in_ = int(stored["columns"])
            if stored["names"]:
                found.feature_names_in_ = np.array(stored["names"], dtype=object)
            found.feature_std_ = float(stored["feature_std"])
            found.untrained_feature_std_ = float(stored["untrained_feature_std"])
            with torch.random.fork_rng():
                encoder = found._new_encoder()
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder} holds no table transformer that can be read ({error})") from error
        found.encoder_ = load_model(encoder, folder / _WEIGHTS).eval()  # type: ignore[assignment]
        return found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = tags.input_tags.string = tags.input_tags.categorical = True
        tags.transformer_tags.preserves_dtype = []
        return tags

    def _check(self) -> None:
        if self.output not in ("flatten", "mean"):
            raise InputError(f'output must be "flatten" or "mean", got {self.output!r}')
        for name, least in (
            ("dim", 2),
            ("depth", 1),
            ("heads", 1),
            ("registers", 0),
            ("steps", 0),
            ("batch_size", 1),
        ):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.dim % 2 or self.dim % self.heads:
            raise InputError(f"dim must be even and divisible by heads = {self.heads}, got {self.dim}")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate must be > 0, got {self.learning_rate}")
        if not 0 <= self.momentum <= 1:
            raise InputError(f"momentum must be in [0, 1], got {self.momentum}")

    def _table(self, X: Any, reset: bool) -> pd.DataFrame:
        if not isinstance(X, pd.DataFrame):
            array = validate_data(
                self,
                X,
                dtype=None,
                ensure_all_finite=False,
                ensure_min_samples=2 if reset else 1,
                ensure_min_features=2 if reset else 1,
                reset=reset,
            )
            return pd.DataFrame(array).infer_objects()
        validate_data(self, X, skip_check_array=True, reset=reset)
        if reset and min(X.shape) < 2:
            raise InputError(f"X must have at least 2 rows and 2 columns, got shape {X.shape}")
        return X

    def _new_encoder(self) -> TokenEncoder:
        cardinalities = self.encoding_.cardinalities
        return token_encoder_for_shape(
            (len(self.encoding_.columns),),
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            categorical_cardinalities=cardinalities,
            registers=self.registers,
            pool="none",
            mlp_ratio=2.0,
        )

    def _tokens(self, rows: Tensor) -> Tensor:
        return extract_features(self.encoder_, rows).features.unflatten(1, (-1, self.dim))

    def _feature_std(self, rows: Tensor) -> float:
        """Of at most 1,024 rows from all over the table, which may be sorted; always the same ones."""
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_MEASURED]
        return float(between_sample_std(self._tokens(rows[chosen])))


def _plain(value: Any) -> Any:
    """NumPy's numbers, which options may be, as Python's."""
    return value.item()
