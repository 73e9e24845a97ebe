import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from coloss.metrics import knn_probe, label_budget, linear_probe, ridge_probe


def blobs(seed=0, samples=120, classes=3, dimensions=4, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(samples) % classes
    centres = 2 * torch.randn(classes, dimensions, generator=generator)
    return centres[targets] + spread * torch.randn(samples, dimensions, generator=generator), targets


@pytest.fixture(scope="module")
def digits():
    features, targets = (torch.as_tensor(x) for x in load_digits(return_X_y=True))
    return features[:1200].float(), targets[:1200], features[1200:].float(), targets[1200:]


def test_linear_probe_is_scikit_learn_on_standardised_features():
    x, y = blobs(spread=2.0)
    mean, std = x[:80].mean(0), x[:80].std(0, correction=0)
    expected = LogisticRegression(C=1 / 3, max_iter=1000).fit((x[:80] - mean) / std, y[:80])
    found = linear_probe(x[:80], y[:80], x[80:], y[80:], penalty=3)
    assert found.predictions.tolist() == expected.predict((x[80:] - mean) / std).tolist()
    assert found.accuracy == expected.score((x[80:] - mean) / std, y[80:]) and found.labels == 80


def test_linear_probe_does_not_see_scale_or_shift_of_features(digits):
    train, train_targets, test, test_targets = digits
    scale = torch.linspace(0.01, 100, 64)
    found = linear_probe(train, train_targets, test, test_targets, labels=200)
    moved = linear_probe(scale * train + 5, train_targets, scale * test + 5, test_targets, labels=200)
    assert abs(found.accuracy - moved.accuracy) < 0.005 and found.accuracy > 0.85


def test_more_labels_probe_better_and_seeds_draw_other_labels(digits):
    few, many = (linear_probe(*digits, labels=n).accuracy for n in (20, 400))
    assert few < many and linear_probe(*digits, labels=20).accuracy == few
    assert linear_probe(*digits, labels=20, seed=1).accuracy != few


def test_global_random_state_is_left_alone():
    x, y = blobs()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    linear_probe(x, y, x, y, labels=30)
    knn_probe(x, y, x, y, labels=30)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_single_class_is_predicted_for_all_and_new_classes_are_wrong(probe):
    x, y = blobs()
    found = probe(x, torch.full_like(y, 2), x, y)
    assert (found.predictions == 2).all() and found.accuracy == pytest.approx(1 / 3)


def test_arbitrary_class_numbers_are_kept():
    x, y = blobs(spread=0.1)
    names = torch.tensor([-7, 100, 3])[y]
    for probe in (linear_probe, knn_probe):
        found = probe(x, names, x, names)
        assert found.accuracy == 1 and torch.equal(found.predictions, names)


def test_ridge_probe_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1])
    y = torch.randn(40, 2, generator=generator, dtype=torch.float64) + x[:, :1]
    z = (x - x.mean(0)) / x.std(0, correction=0)
    weights = torch.linalg.solve(z.T @ z + 5 * torch.eye(3), z.T @ (y - y.mean(0)))
    found = ridge_probe(x, y, x, y, penalty=5)
    torch.testing.assert_close(found.predictions, z @ weights + y.mean(0))
    assert found.mean_squared_error == pytest.approx(float((found.predictions - y).square().mean()))


def test_ridge_probe_of_useless_features_predicts_the_mean():
    y = torch.tensor([1.0, 2.0, 3.0, 6.0])
    found = ridge_probe(torch.ones(4, 2), y, torch.ones(4, 2), y)
    assert found.r2 == pytest.approx(0) and found.predictions.tolist() == pytest.approx([3.0] * 4)
    assert found.predictions.shape == y.shape


@pytest.mark.parametrize("k", [1, 5, 20])
def test_majority_vote_equals_scikit_learn_on_digits(digits, k):
    train, train_targets, test, test_targets = digits
    expected = KNeighborsClassifier(k, algorithm="brute").fit(train, train_targets).predict(test)
    found = knn_probe(train, train_targets, test, test_targets, k=k, temperature=None, metric="euclidean")
    assert (
        found.predictions.numpy() != expected
    ).sum() <= 1  # equal distances at the border may go either way


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 1000),
    st.integers(1, 15),
    st.sampled_from([None, 0.05, 1.0]),
    st.sampled_from(["cosine", "euclidean"]),
)
def test_votes_equal_a_slow_twin_with_ties(seed, k, temperature, metric):
    random = np.random.default_rng(seed)
    # Small whole numbers make many distances exactly equal; cosines round, so they get values without ties.
    if metric == "euclidean":
        train, test = (random.integers(-1, 2, (samples, 2)).astype(float) for samples in (15, 6))
    else:
        train, test = random.normal(size=(15, 2)), random.normal(size=(6, 2))
    targets = random.integers(0, 3, 15)
    found = knn_probe(
        *(torch.tensor(x) for x in (train, targets, test)),
        torch.zeros(6, dtype=torch.long),
        k=k,
        temperature=temperature,
        metric=metric,
    )
    for x, prediction in zip(test, found.predictions.tolist()):
        if metric == "euclidean":
            similarity = -np.sqrt(((train - x) ** 2).sum(1))
        else:
            similarity = train @ x / (np.linalg.norm(train, axis=1) * np.linalg.norm(x))
        nearest = sorted(range(15), key=lambda i: (-similarity[i], i))[:k]
        votes = np.zeros(3)
        for i in nearest:
            votes[targets[i]] += 1.0 if temperature is None else np.exp(similarity[i] / temperature)
        assert votes[prediction] >= max(votes) * (1 - 1e-9)
        if temperature is None:
            assert prediction == votes.argmax()


def test_ties_at_the_border_go_to_the_earlier_sample_and_tied_votes_to_the_lower_class():
    train = torch.tensor([[0.0], [1.0], [-1.0], [1.0]])
    here, anything = torch.tensor([[0.0]]), torch.tensor([0])

    def predicted(targets, k):
        targets = torch.tensor(targets)
        return int(
            knn_probe(train, targets, here, anything, k=k, temperature=None, metric="euclidean").predictions
        )

    assert predicted([5, 1, 2, 2], 2) == 1  # of the three at distance 1, the first votes; 1 ties with 5
    assert predicted([5, 1, 2, 2], 4) == 2
    assert predicted([0, 9, 9, 1], 3) == 9


def test_cold_votes_follow_the_nearest_and_hot_votes_the_majority():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.2], [1.0, 0.2]])
    targets, test = torch.tensor([1, 0, 0]), torch.tensor([[1.0, 0.0]])
    predictions = [
        int(knn_probe(train, targets, test, torch.tensor([0]), temperature=t).predictions)
        for t in (1e-4, 10.0, None)
    ]
    assert predictions == [1, 0, 0]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_chunks_do_not_change_the_result(digits, metric):
    train, train_targets, test, test_targets = digits
    found = [
        knn_probe(train, train_targets, test, test_targets, metric=metric, chunk_size=size).predictions
        for size in (37, 10_000)
    ]
    assert (found[0] != found[1]).sum() <= 1


def test_large_k_is_capped_and_far_points_still_vote():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])
    found = knn_probe(x, y, torch.tensor([[1e6], [-1e6]]), torch.tensor([1, 0]), k=50, metric="euclidean")
    assert found.accuracy == 1


def test_features_of_images_and_half_precision_are_taken():
    x, y = blobs(spread=0.1)
    images = x.reshape(-1, 1, 2, 2)
    assert linear_probe(images.half(), y, images.half(), y).accuracy == 1
    assert knn_probe(images.bfloat16(), y, images.bfloat16(), y).accuracy == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = knn_probe(x, y, x, y, k=7, temperature=1e-3).predictions
    assert torch.equal(under, knn_probe(x, y, x, y, k=7, temperature=1e-3).predictions)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(-2, 4), min_size=1, max_size=40), st.integers(0, 50), st.data())
def test_label_budget_is_balanced_nested_and_repeatable(classes, seed, data):
    targets = torch.tensor(classes)
    labels = data.draw(st.integers(len(set(classes)), len(classes)))
    chosen = label_budget(targets, labels, seed)
    assert len(set(chosen.tolist())) == labels and torch.equal(chosen, label_budget(targets, labels, seed))
    counts = {c: (targets[chosen] == c).sum().item() for c in set(classes)}
    unexhausted = [counts[c] for c in counts if counts[c] < classes.count(c)]
    if unexhausted:
        assert max(counts.values()) <= min(unexhausted) + 1
    if labels > len(set(classes)):
        assert set(label_budget(targets, labels - 1, seed).tolist()) < set(chosen.tolist())


def test_label_budget_draws_samples_evenly():
    targets = torch.zeros(10, dtype=torch.long)
    counts = torch.bincount(torch.cat([label_budget(targets, 3, seed) for seed in range(1000)]), minlength=10)
    assert counts.min() > 240 and counts.max() < 360  # 300 expected, standard deviation 14.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"labels": 2}, "labels must be between the number of classes 3 and of samples 120, got 2"),
        ({"labels": 121}, "samples 120, got 121"),
        ({"k": 0}, "k must be >= 1, got 0"),
        ({"chunk_size": 0}, "chunk_size must be >= 1, got 0"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    x, y = blobs()
    with pytest.raises(ValueError, match=message):
        knn_probe(x, y, x, y, **options)


def test_bad_features_are_refused():
    x, y = blobs()
    with pytest.raises(ValueError, match="test_features must be finite, got NaN or infinity"):
        linear_probe(x, y, x * torch.nan, y)
    with pytest.raises(ValueError, match="train_features must hold at least one sample"):
        knn_probe(x[:0], y[:0], x, y)
    with pytest.raises(ValueError, match="penalty must be > 0, got 0"):
        ridge_probe(x, x, x, x, penalty=0)
    with pytest.raises(ValueError, match="train_targets must be 120, one for each sample, got 2"):
        inspect.unwrap(linear_probe)(x, y[:2], x, y)
    with pytest.raises(ValueError, match="must have one number of dimensions, got 4 and 3"):
        inspect.unwrap(linear_probe)(x, y, x[:, :3], y)
    with pytest.raises(ValueError, match="metric must be 'cosine' or 'euclidean', got 'manhattan'"):
        inspect.unwrap(knn_probe)(x, y, x, y, metric="manhattan")


def test_cosine_probe_ignores_lengths():
    x, y = blobs()
    lengths = torch.rand(len(x), 1, generator=torch.Generator().manual_seed(0)) + 0.1
    found = knn_probe(x * lengths, y, x, y, k=3)
    assert torch.equal(found.predictions, knn_probe(F.normalize(x, dim=1), y, x, y, k=3).predictions)
