"""Measures the two halves of a representation apart: what single views tell about a change, and what a summary tells about the class.

Equivariance: two views of an image, each encoded by itself; a regressor gets both embeddings and must say what happened in between. R2
of that on unseen images is 0 for an encoder that forgets the change. Invariance: a linear class probe on the summary of several views.
Its fair baseline is the same probe on the mean of the same views' embeddings, which also sees several views; one view is context.
"""

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.jepa.known_transforms import ActionKind, ParamTransform, draw_views, relative_actions
from coloss.jepa.sequence_aggregator import SequenceEncoder
from coloss.metrics import (
    RegressionProbeResult,
    extract_features,
    linear_probe,
    mean_squared_error,
    r2_score,
    ridge_probe,
)
from coloss.metrics.inference import evaluation_mode

TrainInputs = Float[Tensor, "train *shape"]
HeldOutInputs = Float[Tensor, "test *shape"]


def action_probe(
    train_pairs: Float[Tensor, "train 2 features"],
    train_actions: Float[Tensor, "train actions"],
    test_pairs: Float[Tensor, "test 2 features"],
    test_actions: Float[Tensor, "test actions"],
    *,
    hidden: Sequence[int] = (256, 256),
    epochs: int = 60,
    seed: int = 0,
) -> RegressionProbeResult:
    """Test R2 of the action between two views, from their two embeddings side by side.

    A perceptron on standardised features and actions (scikit-learn's `MLPRegressor` with Adam, batches of 200 and learning rate 1e-3),
    or with no hidden layer `ridge_probe`, which knows only what stands in the embeddings in a linear form.

    Args:
        train_pairs: embeddings of the first and the second view of each pair.
        train_actions: what happened in between, such as `relative_actions` gives.
        test_pairs: of other images.
        test_actions: of these.
        hidden: widths of the hidden layers; the paper's are (1024, 1024).
        epochs: passes over the training pairs, >= 1; a tenth of them is held out, and 10 passes without gain there end it early.
        seed: of the regressor.

    Returns:
        R2 averaged over the numbers of an action (`coloss.metrics.r2_score`), squared error and predictions. R2 is below 0 for predictions worse
        than the mean.

    Raises:
        ValueError: for pairs and actions that do not fit, or embeddings that are not finite.

    Source:
        Ghaemi, Muller, Bakhtiari, 2025 (seq-JEPA), arXiv 2505.03176; Devillers and Lefort, 2023 (EquiMod), arXiv 2211.01244.

    Examples:
        >>> pairs = torch.randn(300, 2, 4, generator=torch.Generator().manual_seed(0))
        >>> actions = pairs[:, 1, :1] - pairs[:, 0, :1]
        >>> action_probe(pairs[:200], actions[:200], pairs[200:], actions[200:], hidden=()).r2 > 0.99
        True
    """
    if epochs < 1:
        raise ValueError(f"epochs must be >= 1, got {epochs}")
    for name, pairs, actions in (
        ("train", train_pairs, train_actions),
        ("test", test_pairs, test_actions),
    ):
        if len(pairs) != len(actions) or not len(pairs):
            raise ValueError(
                f"{name}_pairs and {name}_actions must be as many, at least one, got {len(pairs)} and {len(actions)}"
            )
        if not bool(pairs.isfinite().all() and actions.isfinite().all()):
            raise ValueError(f"{name}_pairs and {name}_actions must be finite, got NaN or infinity")
    train, test = train_pairs.flatten(1), test_pairs.flatten(1)
    if not hidden:
        return ridge_probe(train, train_actions, test, test_actions)
    if len(train) < 20:
        raise ValueError(f"train_pairs must be >= 20 for a perceptron, got {len(train)}")
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    network = MLPRegressor(
        hidden_layer_sizes=tuple(hidden),
        batch_size=min(200, len(train) * 9 // 10),
        max_iter=epochs,
        early_stopping=True,
        random_state=seed,
    )
    probe = TransformedTargetRegressor(make_pipeline(StandardScaler(), network), transformer=StandardScaler())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        # One number for each pair must be a vector to scikit-learn.
        wanted = train_actions[:, 0] if train_actions.shape[1] == 1 else train_actions
        probe.fit(train.detach().cpu().float().numpy(), wanted.detach().cpu().float().numpy())
    found = torch.from_numpy(probe.predict(test.detach().cpu().float().numpy())).double()
    predictions = found.reshape(test_actions.shape)
    truth = test_actions.detach().cpu().double()
    error = float(mean_squared_error(predictions, truth))
    return RegressionProbeResult(float(r2_score(predictions, truth)), error, predictions)


def evaluate_equivariance(
    encoder: nn.Module,
    transform: ParamTransform,
    train: TrainInputs,
    test: HeldOutInputs,
    *,
    action: ActionKind = "difference",
    pairs: int = 1,
    hidden: Sequence[int] = (256, 256),
    epochs: int = 60,
    seed: int = 0,
) -> dict[str, float]:
    """How well the change between two views can be read from their embeddings, each made without the other.

    Args:
        encoder: gives one vector for each view; run in evaluation mode.
        transform: draws the views.
        train: images for the regressor.
        test: other images, for the R2.
        action: what an action is, see `relative_actions`.
        pairs: of views drawn from each image, >= 1.
        hidden: of the regressor, see `action_probe`.
        epochs: likewise.
        seed: of views and regressor.

    Returns:
        `action_r2` of the perceptron, `action_r2_linear` of a ridge regression, and where an action has several numbers `action_r2_NAME`
        of each.

    Raises:
        ValueError: as `action_probe`, or for pairs < 1.

    Examples:
        >>> from coloss.jepa import Shifts
        >>> found = evaluate_equivariance(
        ...     nn.Flatten(), Shifts(), torch.rand(40, 1, 8, 8), torch.rand(20, 1, 8, 8), epochs=2
        ... )
        >>> sorted(found)
        ['action_r2', 'action_r2_down', 'action_r2_linear', 'action_r2_right']
    """
    if pairs < 1:
        raise ValueError(f"pairs must be >= 1, got {pairs}")
    generator = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    for inputs in (train, test):
        views, parameters = draw_views(transform, inputs.repeat_interleave(pairs, dim=0), 2, generator)
        actions = relative_actions(parameters, action, transform.spread)[:, 0]
        parts += [_encoded(encoder, views), actions]
    train_pairs, train_actions, test_pairs, test_actions = parts
    result = action_probe(*parts, hidden=hidden, epochs=epochs, seed=seed)
    linear = action_probe(train_pairs, train_actions, test_pairs, test_actions, hidden=())
    found = {"action_r2": result.r2, "action_r2_linear": linear.r2}
    names = transform.names
    if action == "quaternion":
        names = ("x", "y", "z", "w", *names[4:])
    if len(names) > 1:
        wanted = test_actions.double().cpu()
        for place, name in enumerate(names):
            found[f"action_r2_{name}"] = float(r2_score(result.predictions[:, place], wanted[:, place]))
    return found


def evaluate_invariance(
    both: SequenceEncoder,
    transform: ParamTransform,
    train: tuple[TrainInputs, Int[Tensor, " train"]],
    test: tuple[HeldOutInputs, Int[Tensor, " test"]],
    *,
    views: int = 3,
    action: ActionKind = "difference",
    labels: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """What class the summary of several views tells, beside the mean of the same views' embeddings and a single view.

    Args:
        both: encoder and aggregator; run in evaluation mode.
        transform: draws the views.
        train: images and classes for the probes.
        test: other images and their classes.
        views: in a sequence, >= 1.
        action: what an action is, see `relative_actions`.
        labels: training labels for the probes; None for all.
        seed: of views and labels.

    Returns:
        Accuracy of linear probes: `accuracy_aggregate`, `accuracy_mean` (of the views' embeddings: the fair baseline, which sees as much) and
        `accuracy_view` (the last view alone). R2 of linear regressions of that view's parameters, which only the encoder should
        keep: `parameters_r2_aggregate` and `parameters_r2_view`.

    Raises:
        ValueError: as `draw_views` and `coloss.metrics.linear_probe`.

    Examples:
        >>> from coloss.jepa import ActionConditionedAggregator, Rotations
        >>> aggregator = ActionConditionedAggregator(64, action_dim=1, action_features=16)
        >>> images, classes = torch.rand(30, 1, 8, 8), torch.arange(30) % 3
        >>> found = evaluate_invariance(
        ...     SequenceEncoder(nn.Flatten(), aggregator),
        ...     Rotations(),
        ...     (images[:20], classes[:20]),
        ...     (images[20:], classes[20:]),
        ... )
        >>> sorted(found)[:3]
        ['accuracy_aggregate', 'accuracy_mean', 'accuracy_view']
    """
    generator = torch.Generator().manual_seed(seed)
    summaries, features, last = [], [], []
    for inputs, _ in (train, test):
        drawn, parameters = draw_views(transform, inputs, views, generator)
        encoded = _encoded(both, drawn)
        actions = relative_actions(parameters, action, transform.spread)
        with evaluation_mode(both):
            device = next(both.aggregator.parameters(), encoded).device
            summary = both.aggregator(encoded.to(device), actions.to(encoded).to(device)).cpu()
        summaries.append(summary)
        features.append(encoded)
        last.append(parameters[:, -1])
    classes = (train[1], test[1])
    found = {}
    for name, (learn, judge) in {
        "aggregate": summaries,
        "mean": [part.mean(1) for part in features],
        "view": [part[:, -1] for part in features],
    }.items():
        result = linear_probe(learn, classes[0], judge, classes[1], labels=labels, seed=seed)
        found[f"accuracy_{name}"] = result.accuracy
        if name != "mean":
            found[f"parameters_r2_{name}"] = ridge_probe(learn, last[0], judge, last[1]).r2
    return found


def _encoded(encoder: nn.Module, views: Float[Tensor, "batch views *shape"]) -> Tensor:
    """Embeddings of every view, in evaluation mode, on the CPU."""
    rows = extract_features(encoder, views.flatten(0, 1)).features
    return rows.unflatten(0, views.shape[:2])
