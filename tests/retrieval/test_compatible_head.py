"""The head's identities hold whatever its weights, its losses are what they say, and class means are exact in any cut."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coloss.errors import InputError
from coloss.retrieval import (
    BackwardCompatibleHead,
    BasisTransform,
    CompatibleOutput,
    PrototypeHead,
    UpgradedEncoder,
    backward_compatible_loss,
    backward_compatible_terms,
    class_prototypes,
)


@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.floats(0.1, 5), st.integers(0, 1000))
def test_lengths_and_inner_products_are_those_of_the_two_parts(dim_new, dim_old, extra, scale, seed):
    extra = min(extra, dim_old)
    if extra + dim_new < dim_old:
        return
    torch.manual_seed(seed)
    head = BackwardCompatibleHead(dim_new, dim_old, extra, scale).double()
    h = torch.randn(6, dim_new + dim_old, dtype=torch.float64)
    output = head(h)
    feature = F.normalize(h[:, :dim_new], dim=1)
    expected = scale**2 * feature @ feature.T
    if extra:
        free = F.normalize(head.free(h.relu()), dim=1)
        expected = expected + free @ free.T
    found = output.embedding
    assert found.shape == (6, extra + dim_new) == (6, head.out_features)
    torch.testing.assert_close(found @ found.T, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, :dim_old], output.compatible, rtol=0, atol=0)


def test_in_float32_the_squared_length_is_one_and_the_squared_scale():
    output = BackwardCompatibleHead(32, 16, 8, scale=2.0)(torch.randn(50, 48))
    torch.testing.assert_close(output.embedding.square().sum(1), torch.full((50,), 5.0), rtol=0, atol=1e-5)


def test_without_free_dimensions_the_embedding_is_the_feature_rotated():
    head = BackwardCompatibleHead(6, 6, extra_dims=0, scale=3.0).double()
    output = head(torch.randn(9, 12, dtype=torch.float64))
    turn = head.rotate_old.matrix @ head.rotate_new.matrix
    torch.testing.assert_close(output.embedding, 3 * output.feature @ turn.T)
    torch.testing.assert_close(turn @ turn.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)
    assert output.embedding.shape == (9, 6)


def test_all_free_dimensions_leave_the_feature_out_of_the_old_space():
    head = BackwardCompatibleHead(6, 4, extra_dims=4)
    torch.testing.assert_close(head(torch.randn(9, 10)).compatible.norm(dim=1), torch.ones(9))
    terms = backward_compatible_terms(head(torch.randn(9, 10)), torch.randn(9, 6), torch.randn(9, 4))
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in head.parameters())  # data-parallel training waits for each


def test_the_published_free_part_of_all_old_dimensions_is_the_same_function():
    """normalize(normalize(z)[:k]) with z of dim_old entries is normalize(z[:k])."""
    z = torch.randn(20, 7, dtype=torch.float64)
    torch.testing.assert_close(F.normalize(F.normalize(z)[:, :3]), F.normalize(z[:, :3]))


@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_the_transform_is_orthogonal_after_a_hundred_adam_steps(rate):
    transform = BasisTransform(8)
    before = transform.matrix.detach().clone()
    optimizer = torch.optim.Adam(transform.parameters(), lr=rate)
    vectors, target = torch.randn(32, 8), torch.randn(32, 8)
    for _ in range(100):
        optimizer.zero_grad()
        (transform(vectors) - target).square().sum().backward()
        optimizer.step()
    product = transform.matrix @ transform.matrix.T
    torch.testing.assert_close(product, torch.eye(8), rtol=0, atol=2e-5)
    assert (transform.matrix - before).abs().max() > 0.1


def test_the_transform_learns_a_rotation_that_a_linear_layer_would_only_approach():
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    if torch.det(turn) < 0:
        turn[:, 0] *= -1
    transform = BasisTransform(4).double()
    if torch.det(transform.matrix) < 0:  # the sign of the start is kept by the exponential
        turn[:, 0] *= -1
    vectors = torch.randn(64, 4, dtype=torch.float64)
    optimizer = torch.optim.Adam(transform.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (transform(vectors) - vectors @ turn.T).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(transform.matrix, turn, rtol=0, atol=2e-2)


def test_merging_keeps_the_matrix_and_drops_the_exponential():
    transform, vectors = BasisTransform(5), torch.randn(3, 5)
    before = transform(vectors)
    transform.merge()
    transform.merge()
    assert torch.equal(transform(vectors), before)
    assert list(transform.state_dict()) == ["linear.weight"]


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_networks_keep_exact_rotations(half):
    head = BackwardCompatibleHead(6, 4, 2, num_classes=3, in_features=7).to(half)
    for transform in (head.rotate_new, head.rotate_old):
        assert all(value.dtype == torch.float32 for value in transform.state_dict().values())
    output = head(torch.randn(5, 7, dtype=half))
    assert output.embedding.dtype == torch.float32
    torch.testing.assert_close(output.embedding.square().sum(1), torch.full((5,), 5.0), rtol=0, atol=1e-5)
    assert output.logits.isfinite().all()
    terms = backward_compatible_terms(
        output, torch.randn(5, 6), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), torch.randn(3, 4)
    )
    assert {term.dtype for term in terms.values()} == {torch.float32}


def test_under_autocast_rotations_and_cosines_stay_in_float32():
    head = BackwardCompatibleHead(6, 4, 2, in_features=7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = head(torch.randn(5, 7))
        loss = backward_compatible_loss(output, output.feature, output.compatible)
    torch.testing.assert_close(output.embedding.square().sum(1), torch.full((5,), 5.0), rtol=0, atol=1e-5)
    assert loss.dtype == torch.float32 and abs(loss.item()) < 1e-5


def test_perfect_targets_leave_no_cosine_cost_and_opposite_ones_two():
    output = BackwardCompatibleHead(6, 4, 2).double()(torch.randn(5, 10, dtype=torch.float64))
    perfect = backward_compatible_terms(output, 7 * output.feature, 0.1 * output.compatible)
    opposite = backward_compatible_terms(output, -output.feature, -output.compatible)
    for name in ("match_new", "match_old"):
        assert perfect[name].item() == pytest.approx(0, abs=1e-12)
        assert opposite[name].item() == pytest.approx(2, abs=1e-12)


def test_the_loss_is_the_sum_written_out():
    head = BackwardCompatibleHead(6, 4, 2, num_classes=3, logit_scale=5.0).double()
    h, labels = torch.randn(7, 10, dtype=torch.float64), torch.arange(7) % 3
    new, old, means = (torch.randn(n, d, dtype=torch.float64) for n, d in ((7, 6), (7, 4), (3, 4)))
    output = head(h)
    found = backward_compatible_loss(output, new, old, labels, means, (2.0, 3.0, 4.0), prototype_scale=1.5)
    f, b = (part.detach().numpy() for part in (output.feature, output.compatible))
    weight = head.classifier.weight.detach().numpy()

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def cross_entropy(z):
        return np.mean([np.log(np.exp(row).sum()) - row[y] for row, y in zip(z, labels.numpy())])

    expected = (
        cross_entropy(5.0 * f @ weight.T)
        + 2 * np.mean(1 - (f * unit(new.numpy())).sum(1))
        + 3 * cross_entropy(1.5 * unit(b) @ means.numpy().T)
        + 4 * np.mean(1 - (unit(b) * unit(old.numpy())).sum(1))
    )
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_gradients_are_those_of_finite_differences_and_none_reaches_a_target():
    head = BackwardCompatibleHead(3, 2, 1, num_classes=2).double()
    targets = [
        torch.randn(n, d, dtype=torch.float64, requires_grad=True) for n, d in ((4, 3), (4, 2), (2, 2))
    ]
    labels = torch.tensor([0, 1, 1, 0])

    def loss(h):
        return backward_compatible_loss(head(h), targets[0], targets[1], labels, targets[2])

    assert torch.autograd.gradcheck(loss, torch.randn(4, 5, dtype=torch.float64, requires_grad=True))
    loss(torch.randn(4, 5, dtype=torch.float64)).backward()
    assert all(target.grad is None for target in targets)


def test_no_samples_cost_nothing():
    head = BackwardCompatibleHead(3, 2, 1, num_classes=2)
    loss = backward_compatible_loss(
        head(torch.zeros(0, 5)),
        torch.zeros(0, 3),
        torch.zeros(0, 2),
        torch.zeros(0, dtype=torch.int64),
        torch.eye(2),
    )
    loss.backward()
    assert loss.item() == 0


def test_without_labels_the_two_cross_entropies_are_left_out():
    output = BackwardCompatibleHead(3, 2, 1, num_classes=2)(torch.randn(4, 5))
    assert set(backward_compatible_terms(output, torch.randn(4, 3), torch.randn(4, 2))) == {
        "match_new",
        "match_old",
    }


def test_a_scaled_classifier_does_not_start_flat():
    h = torch.randn(200, 10)
    spread = {
        scale: BackwardCompatibleHead(6, 4, 2, num_classes=5, logit_scale=scale)(h).logits.std().item()
        for scale in (1.0, 16.0)
    }
    assert spread[1.0] < 0.5 < 2 < spread[16.0]


def test_shipping_drops_the_classifier_and_keeps_embeddings():
    encoder = UpgradedEncoder(nn.Linear(3, 7), BackwardCompatibleHead(6, 4, 2, num_classes=5, in_features=7))
    inputs = torch.randn(5, 3)
    before = encoder(inputs)
    encoder.head.ship()
    assert torch.equal(encoder(inputs), before)
    names = list(encoder.state_dict())
    assert not any("classifier" in name or "parametrizations" in name for name in names)
    plain = UpgradedEncoder(nn.Linear(3, 4), PrototypeHead(4, 2, 5))
    plain.head.ship()
    assert not any("classifier" in name for name in plain.state_dict())


def test_the_compatible_part_is_not_of_unit_length_but_what_the_encoder_gives_for_the_old_index_is():
    encoder = UpgradedEncoder(nn.Identity(), BackwardCompatibleHead(8, 4, 2))
    inputs = torch.randn(30, 12)
    raw = encoder.head(inputs).compatible.norm(dim=1)
    assert raw.std() > 0.05
    torch.testing.assert_close(encoder.compatible(inputs).norm(dim=1), torch.ones(30))


def test_class_means_are_exact_in_any_cut():
    vectors, labels = torch.randn(50, 3) + 1e3, torch.randint(4, (50,))
    expected = torch.stack([vectors[labels == c].double().mean(0) for c in range(4)]).float()
    for size in (50, 7, 1):
        found = class_prototypes(vectors.split(size), labels.split(size), 4)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(class_prototypes(vectors, labels, 4), expected, rtol=1e-7, atol=0)


def test_classes_without_samples_are_named():
    with pytest.raises(InputError, match="every class must have a sample to take its mean, got none of 0, 3"):
        class_prototypes(torch.randn(4, 2), torch.tensor([1, 2, 1, 2]), 4)
    with pytest.raises(InputError, match="embeddings must hold at least one batch, got none"):
        class_prototypes([], [], 4)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"dim_new": 0, "dim_old": 4}, "dim_new must be >= 1, got 0"),
        ({"dim_new": 4, "dim_old": 4, "extra_dims": 5}, r"extra_dims must be in \[0, dim_old = 4\], got 5"),
        ({"dim_new": 4, "dim_old": 4, "extra_dims": -1}, r"extra_dims must be in \[0, dim_old = 4\], got -1"),
        ({"dim_new": 2, "dim_old": 4, "extra_dims": 1}, "must be >= dim_old = 4, got 1 \\+ 2"),
        ({"dim_new": 4, "dim_old": 4, "extra_dims": 2, "scale": 0.0}, "scale must be > 0, got 0.0"),
        (
            {"dim_new": 4, "dim_old": 4, "extra_dims": 2, "logit_scale": math.nan},
            "logit_scale must be > 0, got nan",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        BackwardCompatibleHead(**sizes)


def test_targets_that_do_not_fit_are_refused():
    output = BackwardCompatibleHead(6, 4, 2)(torch.randn(5, 10))
    with pytest.raises(InputError, match="target_old must have 4 columns, got 3"):
        backward_compatible_terms(output, None, torch.randn(5, 3))
    with pytest.raises(InputError, match="prototypes must come with labels"):
        backward_compatible_terms(output, None, None, None, torch.randn(2, 4))
    with pytest.raises(InputError, match="at least one of target_new, target_old and labels must be given"):
        backward_compatible_loss(output, None, None)
    with pytest.raises(InputError, match=r"weights must be >= 0, got \(1.0, -1.0, 1.0\)"):
        backward_compatible_loss(output, output.feature, None, weights=(1.0, -1.0, 1.0))
    with pytest.raises(InputError, match="features must have dim_new \\+ dim_old = 10 columns, got 9"):
        BackwardCompatibleHead(6, 4, 2)(torch.randn(5, 9))
    with pytest.raises(InputError, match="dim must be >= 1, got 0"):
        BasisTransform(0)


def test_outputs_can_be_made_by_hand():
    vectors = torch.eye(3)
    output = CompatibleOutput(vectors, vectors, vectors, 10 * vectors)
    loss = backward_compatible_loss(output, None, None, torch.arange(3))
    assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(-10)), rel=1e-3)
