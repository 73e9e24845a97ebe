import copy

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.naive_bayes import GaussianNB
from torch import Tensor, nn

from coloss.classification import GaussianNBHead, class_moments
from coloss.data import IndexedDataset
from coloss.ops import RunningMoments


def draw(samples: int = 60, features: int = 4, classes: int = 3) -> tuple[Tensor, Tensor]:
    target = torch.arange(samples) % classes
    spread = torch.linspace(0.5, 2, features, dtype=torch.float64)
    return torch.randn(samples, features, dtype=torch.float64) * spread + target[:, None], target


def fitted(features: Tensor, classes: Tensor, count: int = 3, **options: object) -> GaussianNBHead:
    head = GaussianNBHead(features.shape[1], count, **options)
    head.update(features, classes)
    return head


def test_logits_are_the_scores_up_to_what_all_classes_share() -> None:
    features, classes = draw()
    head = fitted(features, classes, smoothing=0.0)
    variance = RunningMoments.of(features, classes, 3).pooled_variance(unbiased=True)
    scores = torch.stack(
        [
            (classes == k).double().mean().log()
            - 0.5 * ((features - features[classes == k].mean(0)) ** 2 / variance).sum(1)
            for k in range(3)
        ],
        1,
    )
    gap = head(features) - scores
    torch.testing.assert_close(gap, gap[:, :1].expand(-1, 3), rtol=0, atol=1e-10)
    torch.testing.assert_close(
        head.to_linear(torch.float64)(features).softmax(1), scores.softmax(1), rtol=0, atol=1e-10
    )


def test_it_is_gaussian_nb_where_the_classes_have_equal_variances() -> None:
    noise = torch.randn(20, 4, dtype=torch.float64) * torch.tensor([0.5, 1.0, 2.0, 3.0])
    shifts = torch.randn(3, 4, dtype=torch.float64)
    # The same deviations in each class; unequal numbers come from repeating whole sets of them.
    features = torch.cat([noise + shifts[0], noise + shifts[0], noise + shifts[1], noise + shifts[2]])
    classes = torch.tensor([0, 0, 1, 2]).repeat_interleave(20)
    ours = fitted(features, classes, smoothing=0.0, unbiased=False)(features).softmax(1)
    theirs = GaussianNB(var_smoothing=0.0).fit(features, classes).predict_proba(features)
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_it_is_linear_discriminant_analysis_with_a_diagonal_covariance() -> None:
    features, classes = draw()
    centred = features - RunningMoments.of(features, classes, 3).mean[classes]
    # Uncorrelated within the classes, so that the pooled covariance is its own diagonal.
    covariance = centred.T @ centred / len(centred)
    centred = centred @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T * torch.tensor([1.0, 2, 3, 4])
    features = centred + torch.randn(3, 4, dtype=torch.float64)[classes]
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=None).fit(features, classes)
    ours = fitted(features, classes, smoothing=0.0, unbiased=False)(features).softmax(1)
    np.testing.assert_allclose(ours, lda.predict_proba(features), atol=1e-6)


def test_streaming_and_merging_give_the_head_of_the_whole() -> None:
    features, classes = draw()
    whole = fitted(features, classes).weights()
    streamed, other = GaussianNBHead(4, 3), GaussianNBHead(4, 3)
    for rows in (slice(0, 1), slice(1, 20), slice(20, 20)):
        streamed.update(features[rows], classes[rows])
    other.update(features[20:], classes[20:])
    streamed.merge(other)
    for ours, theirs in zip(streamed.weights(), whole):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    again = GaussianNBHead(4, 3)
    again.merge(streamed.moments)
    assert all(torch.equal(a, b) for a, b in zip(again.weights(), streamed.weights()))


def test_rescaling_a_feature_changes_nothing_without_smoothing() -> None:
    features, classes = draw()
    moved = features * torch.tensor([1e-3, 1.0, 50.0, 7.0]) + torch.tensor([0.0, 100.0, -3.0, 1.0])
    before = fitted(features, classes, smoothing=0.0)(features).softmax(1)
    torch.testing.assert_close(
        fitted(moved, classes, smoothing=0.0)(moved).softmax(1), before, rtol=0, atol=1e-8
    )


def test_a_uniform_prior_and_one_variance_is_the_nearest_mean() -> None:
    features, classes = draw(59)
    head = fitted(features, classes, prior="uniform", shrinkage=1.0)
    distance = torch.cdist(features, torch.stack([features[classes == k].mean(0) for k in range(3)]))
    assert torch.equal(head(features).argmax(1), distance.argmin(1))
    assert head.feature_variance().unique().numel() == 1


def test_a_copy_of_every_feature_doubles_the_log_odds() -> None:
    features, classes = draw()
    once = fitted(features, classes, prior="uniform")(features)
    doubled = features.repeat(1, 2)
    twice = fitted(doubled, classes, prior="uniform")(doubled)
    torch.testing.assert_close(twice[:, 0] - twice[:, 1], 2 * (once[:, 0] - once[:, 1]))


def test_a_constant_feature_does_not_decide() -> None:
    # The trap: a dead unit in the subset, alive later, with a variance of 1e-9.
    features, classes = draw()
    features[:, 0] = 0.0
    new = features.clone()
    new[:, 0] = torch.where(classes == 0, 0.0, 1e-3)
    for smoothing in (0.0, 1e-9, 0.1):
        head = fitted(features, classes, smoothing=smoothing)
        assert head.weights()[0][:, 0].abs().max() == 0  # all classes agree on it
        assert torch.equal(head(new).argmax(1), head(features).argmax(1))
    few = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1e-3, 3.0], [1e-3, 4.0]])  # constant within both classes
    weight = fitted(few, torch.tensor([0, 0, 1, 1]), 2).weights()[0]
    assert weight[:, 0].abs().max() < weight[:, 1].abs().max()


def test_one_sample_a_class_is_the_nearest_sample() -> None:
    features = torch.randn(3, 4)
    head = fitted(features, torch.arange(3))
    assert torch.equal(head.feature_variance(), torch.ones(4, dtype=torch.float64))
    assert torch.equal(head(features).argmax(1), torch.arange(3))


def test_a_class_without_samples_is_impossible_or_smoothed() -> None:
    features, classes = draw()
    masked = fitted(features, classes, 5)
    assert masked(features)[:, 3:].eq(-torch.inf).all()
    layer = masked.to_linear()
    assert layer.weight[3:].abs().max() == 0 and layer.bias[3:].eq(-torch.inf).all()
    torch.testing.assert_close(masked(features)[:, :3], fitted(features, classes)(features))
    assert fitted(features, classes, 5, prior="uniform")(features)[:, 3:].eq(-torch.inf).all()
    smoothed = fitted(features, classes, 5, prior_smoothing=1.0)
    assert smoothed(features).isfinite().all()
    torch.testing.assert_close(smoothed.log_prior().exp()[3:], torch.full((2,), 1 / 65, dtype=torch.float64))
    middle = features.mean(0, keepdim=True)
    # At the mean of all, a class that lies there is as likely as its prior says.
    assert (
        smoothed(middle)[0, 3] == smoothed(middle)[0, 4] and smoothed(middle)[0, 3] < smoothed(middle)[0, 1]
    )


def test_the_unbiased_variance_is_larger_by_samples_over_samples_minus_classes() -> None:
    features, classes = draw(12)
    biased, unbiased = (fitted(features, classes, unbiased=flag).feature_variance() for flag in (False, True))
    torch.testing.assert_close(unbiased, biased * 12 / (12 - 3))


def test_large_means_do_not_cancel() -> None:
    features, classes = draw()
    moved = features + 1e6
    near, far = fitted(features, classes), fitted(moved, classes)
    torch.testing.assert_close(far(moved).softmax(1), near(features).softmax(1), rtol=0, atol=1e-6)


def test_its_state_is_stored_and_kept_wide() -> None:
    features, classes = draw()
    head = fitted(features, classes)
    assert sorted(head.state_dict()) == ["count", "mean", "squares"] and not list(head.parameters())
    other = GaussianNBHead(4, 3)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(features), head(features))
    halved = copy.deepcopy(head).half()
    assert halved.mean.dtype == torch.float64 and torch.equal(halved.mean, head.mean)
    assert halved(features.half()).dtype == torch.float32


def test_class_moments_stream_features_of_a_submodule_in_eval_mode() -> None:
    network = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    inputs, classes = torch.randn(50, 5), torch.randint(3, (50,))
    expected = RunningMoments.of(network[0](inputs), classes, 3)
    loaders = [
        IndexedDataset(inputs, classes),
        (inputs, classes),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, classes), 7),
        [{"inputs": inputs, "targets": classes}],
    ]
    for data in loaders:
        found = class_moments(data, 3, network, "2:input", batch_size=16)
        torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=1e-6)
        assert torch.equal(found.count, expected.count)
    assert network.training and not any(module._forward_hooks for module in network.modules())
    plain = class_moments((inputs, classes), 3)
    torch.testing.assert_close(plain.mean, RunningMoments.of(inputs, classes, 3).mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": -0.1}, "smoothing must be >= 0 and finite, got -0.1"),
        ({"shrinkage": 1.5}, r"shrinkage must be in \[0, 1\], got 1.5"),
        ({"prior_smoothing": float("nan")}, "prior_smoothing must be >= 0 and finite, got nan"),
        ({"prior": "flat"}, 'prior must be "empirical" or "uniform", got \'flat\''),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianNBHead(2, 2, **options)


def test_bad_data_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample, got none"):
        GaussianNBHead(2, 2).to_linear()
    with pytest.raises(ValueError, match="at least one batch, got none"):
        class_moments([], 2)
    with pytest.raises(ValueError, match="batches with targets"):
        class_moments([torch.randn(3, 2)], 2)
    with pytest.raises(ValueError, match=r"classes must be in \[0, 2\), got 2"):
        class_moments((torch.randn(3, 2), torch.arange(3)), 2)
    with pytest.raises(ValueError, match=r"must have \(2, 2\) classes and features, got \(3, 2\)"):
        GaussianNBHead(2, 2).merge(GaussianNBHead(2, 3))
