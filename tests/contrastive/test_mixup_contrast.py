"""Mixed and soft contrast equal their formulas, at their limits CLIP's loss and an entropy, and on two processes what they are on one."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import check_two_processes
from lightning_fabric import Fabric
from scipy.special import log_softmax, softmax
from torch import Tensor

from coloss.contrastive import (
    MixedPairs,
    MultimodalMixupLoss,
    UnimodalHeads,
    mixup_contrastive_loss,
    mixup_pairs,
    soft_clip_loss,
    soft_target_clip_loss,
)
from coloss.ops import info_nce_loss, rank, world_size


def rows(count: int = 9, dim: int = 5) -> Tensor:
    return 3 * torch.randn(count, dim, dtype=torch.float64)


def unit(x: Tensor) -> np.ndarray:
    values = x.detach().double().numpy()
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def crossed(targets: np.ndarray, scores: np.ndarray) -> float:
    return float(-np.mean(np.sum(targets * log_softmax(scores, axis=1), axis=1)))


# Mixing


def test_pairs_are_mixed_sample_by_sample_in_new_memory():
    samples = torch.randn(6, 2, 3)
    kept = samples.clone()
    mixed, partner, weight = mixup_pairs(samples, probability=0.7, generator=torch.Generator().manual_seed(4))
    for i in range(6):
        expected = weight[i] * kept[i] + (1 - weight[i]) * kept[partner[i]]
        torch.testing.assert_close(mixed[i], expected)
    assert torch.equal(samples, kept)
    assert partner.sort().values.tolist() == list(range(6))
    assert 0 < int((weight == 1).sum()) < 6


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_what_is_not_chosen_has_weight_one_and_stays(probability):
    samples = torch.randn(200, 3)
    mixed, _, weight = mixup_pairs(samples, probability=probability)
    share = (weight < 1 - 1e-6).float().mean().item()
    if probability == 0:
        assert share == 0
        assert torch.equal(mixed, samples)
    else:
        assert share > 0.5


# Mixed contrast


def targets_by_hand(partner: Tensor, weight: Tensor) -> np.ndarray:
    """P, filled entry by entry; entries that fall together add up."""
    table = np.zeros((len(partner), len(partner)))
    for i, (j, share) in enumerate(zip(partner.tolist(), weight.double().tolist())):
        table[i, i] += share
        table[i, j] += 1 - share
    return table


@pytest.mark.parametrize("bidirectional", [True, False])
def test_mixed_contrast_equals_the_formula(bidirectional):
    mixed, others = rows(), rows()
    partner = torch.tensor([3, 1, 0, 2, 5, 4, 6, 8, 7])  # samples 1 and 6 are their own partners
    weight = torch.rand(9)
    table = targets_by_hand(partner, weight)
    np.testing.assert_allclose(table.sum(1), 1)
    scores = unit(mixed) @ unit(others).T / 0.1
    expected = crossed(table, scores)
    if bidirectional:
        expected = (expected + crossed(table.T, scores.T)) / 2
    loss = mixup_contrastive_loss(mixed, others, partner, weight, bidirectional=bidirectional)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_without_mixing_it_is_symmetric_info_nce():
    first, second = (F.normalize(rows(), dim=1) for _ in range(2))
    loss = mixup_contrastive_loss(first, second, torch.randperm(9), torch.ones(9))
    torch.testing.assert_close(loss, info_nce_loss(first, second, 0.1, symmetric=True))


def test_a_sample_that_is_its_own_partner_keeps_its_target_whatever_its_weight():
    first, second, itself = rows(), rows(), torch.arange(9)
    losses = [mixup_contrastive_loss(first, second, itself, torch.full((9,), w)) for w in (0.0, 0.3, 1.0)]
    torch.testing.assert_close(losses[0], losses[2])
    torch.testing.assert_close(losses[1], losses[2])


def test_two_samples_swapped_by_half_cost_at_least_log_two():
    swap, half = torch.tensor([1, 0]), torch.full((2,), 0.5)
    equal = mixup_contrastive_loss(torch.ones(2, 3), torch.ones(2, 3), swap, half)
    assert equal.item() == pytest.approx(math.log(2), rel=1e-6)
    for _ in range(5):
        assert mixup_contrastive_loss(torch.randn(2, 3), torch.randn(2, 3), swap, half) >= equal - 1e-6


def test_gradients_of_mixed_contrast():
    partner, weight = torch.tensor([2, 1, 0]), torch.tensor([0.3, 0.5, 1.0])
    given = [rows(3, 2).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: mixup_contrastive_loss(a, b, partner, weight), given)


# Soft contrast


def softened(x: Tensor, y: Tensor, temperature: float) -> float:
    a, b = unit(x), unit(y)
    targets = softmax(b @ b.T / temperature, axis=1)
    scores = a @ b.T / temperature
    return (crossed(targets, scores) + crossed(targets, scores.T)) / 2


@pytest.mark.parametrize("temperature", [0.05, 0.125, 2.0])
@pytest.mark.parametrize("detach", [True, False])
def test_soft_contrast_equals_the_formula(temperature, detach):
    first, second = rows(), rows()
    loss = soft_clip_loss(first, second, temperature, detach_target=detach, chunk_size=4)
    assert loss.item() == pytest.approx(softened(first, second, temperature), rel=1e-9)


def test_soft_contrast_of_equal_modalities_is_the_entropy_of_its_targets():
    x = rows()
    targets = softmax(unit(x) @ unit(x).T / 0.125, axis=1)
    entropy = float(np.mean(-np.sum(targets * np.log(targets), axis=1)))
    assert soft_clip_loss(x, x).item() == pytest.approx(entropy, rel=1e-9)


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_of_soft_contrast_are_those_of_the_plain_formula(detach):
    given = [rows().requires_grad_() for _ in range(2)]
    x, y = (F.normalize(part, dim=1) for part in given)
    targets = (y @ y.T / 0.125).softmax(1)
    targets = targets.detach() if detach else targets
    scores = x @ y.T / 0.125
    plain = sum(-(targets * s.log_softmax(1)).sum(1).mean() for s in (scores, scores.T)) / 2
    ours = soft_clip_loss(*given, detach_target=detach)
    for found, expected in zip(torch.autograd.grad(ours, given), torch.autograd.grad(plain, given)):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_soft_targets_that_are_identities_make_clip_s_loss():
    first, second = (F.normalize(rows(), dim=1) for _ in range(2))
    hard = torch.eye(9)
    loss = soft_target_clip_loss(first, second, hard, hard, 0.2)
    torch.testing.assert_close(loss, info_nce_loss(first, second, 0.2, symmetric=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_finite_float32_loss(dtype):
    first, second = (torch.randn(6, 4).to(dtype).requires_grad_() for _ in range(2))
    mixed = mixup_pairs(first, probability=1.0)
    losses = [
        mixup_contrastive_loss(mixed.mixed, second, mixed.partner, mixed.weight),
        soft_clip_loss(first, second, detach_target=False),
    ]
    for loss in losses:
        assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(loss, (first, second))
        assert all(part.isfinite().all() and part.dtype == dtype for part in gradients)


@pytest.mark.parametrize("count", [0, 1])
def test_batches_of_none_and_one_cost_nothing(count):
    first, second = (torch.randn(count, 3, requires_grad=True) for _ in range(2))
    mixed = mixup_pairs(first, probability=1.0)
    loss = mixup_contrastive_loss(mixed.mixed, second, mixed.partner, mixed.weight)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert soft_clip_loss(first, second).item() == pytest.approx(0, abs=1e-5)


def test_rows_of_zeros_and_equal_rows_are_finite():
    for samples in (torch.zeros(4, 3), torch.ones(4, 3), 1e20 * torch.ones(4, 3)):
        samples.requires_grad_()
        loss = soft_clip_loss(samples, samples, detach_target=False)
        assert loss.item() == pytest.approx(math.log(4), rel=1e-5)
        assert torch.autograd.grad(loss, samples)[0].isfinite().all()


# Both, by progress


def test_progress_decides_which_loss_of_which_pairs():
    embeddings = [rows() for _ in range(3)]
    mixed = [
        mixup_pairs(part, generator=torch.Generator().manual_seed(i)) for i, part in enumerate(embeddings)
    ]
    forward = [(0, 1), (1, 2), (2, 0)]
    every = [*forward, (1, 0), (2, 1), (0, 2)]
    for pairs, listed in (("cycle", forward), ("all", every)):
        loss = MultimodalMixupLoss(pairs)
        early = sum(
            mixup_contrastive_loss(mixed[i].mixed, embeddings[j], mixed[i].partner, mixed[i].weight)
            for i, j in listed
        )
        torch.testing.assert_close(loss(embeddings, 0.32, mixed=mixed), early)
        late = sum(soft_clip_loss(embeddings[i], embeddings[j]) for i, j in listed)
        torch.testing.assert_close(loss(embeddings, 0.33), late)
    two = [MultimodalMixupLoss(pairs)(embeddings[:2], 0.0, mixed=mixed[:2]) for pairs in ("all", "cycle")]
    torch.testing.assert_close(*two)


def test_modalities_are_mixed_by_permutations_of_their_own():
    seen = []
    loss = MultimodalMixupLoss(probability=1.0)
    loss.mix = lambda samples, generator: seen.append(mixup_pairs(samples, 0.15, 1.0, generator)) or seen[-1]
    loss([rows(), rows()], 0.0, torch.Generator().manual_seed(0))
    assert not torch.equal(seen[0].partner, seen[1].partner)


def test_unimodal_heads_sum_their_cross_entropies():
    heads, embeddings, targets = (
        UnimodalHeads([4, 6], 3, hidden=(5,)),
        [torch.randn(7, 4), torch.randn(7, 6)],
        torch.randint(3, (7,)),
    )
    logits, loss = heads(embeddings, targets)
    torch.testing.assert_close(
        loss, F.cross_entropy(logits[0], targets) + F.cross_entropy(logits[1], targets)
    )


def test_bad_input_is_named(as_users_call):
    eight, itself, ones = torch.ones(8, 2), torch.arange(8), torch.ones(8)
    for call, message in (
        (lambda: mixup_pairs(eight, probability=1.5), r"probability must be in \[0, 1\], got 1.5"),
        (lambda: mixup_pairs(eight, beta=0.0), "alpha and beta must be > 0 and finite, got 0.0 and 0.0"),
        (
            lambda: mixup_contrastive_loss(eight, eight[:3], itself, ones),
            r"of one shape, got \(8, 2\) and \(3, 2\)",
        ),
        (
            lambda: mixup_contrastive_loss(eight, eight, itself + 1, ones),
            r"partner must hold numbers in \[0, 8\)",
        ),
        (
            lambda: mixup_contrastive_loss(eight, eight, itself, ones[:2]),
            r"weight must have shape \(8,\), got \(2,\)",
        ),
        (lambda: mixup_contrastive_loss(eight, eight, itself, ones, 0.0), "temperature must be > 0"),
        (lambda: soft_clip_loss(eight, eight, -1.0), "temperature must be > 0 and finite, got -1.0"),
        (lambda: MultimodalMixupLoss("some"), 'pairs must be "all" or "cycle", got \'some\''),
        (lambda: MultimodalMixupLoss(switch=2.0), r"switch must be in \[0, 1\], got 2.0"),
        (
            lambda: MultimodalMixupLoss(soft_temperature=0.0),
            "soft_temperature must be > 0 and finite, got 0.0",
        ),
        (lambda: MultimodalMixupLoss()([eight], 0.0), "at least two modalities, got 1"),
        (lambda: UnimodalHeads([], 3), "dims must hold the width of at least one modality, got none"),
        (lambda: UnimodalHeads([2], 3)([eight, eight], itself), "embeddings must be of 1 modalities, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Several processes


def test_two_processes_mix_and_cost_what_one_does(tmp_path: Path):
    everyone = [rows(8, 3) for _ in range(2)]

    def work(fabric: Fabric) -> dict[str, Tensor]:
        own = slice(rank(), None, world_size())  # rows are dealt out in turn
        first, second = (part[own].clone().requires_grad_() for part in everyone)
        generator = torch.Generator().manual_seed(5)
        found = {}
        for name, progress, detach in (
            ("mixed", 0.0, True),
            ("soft", 0.9, True),
            ("differentiated", 0.9, False),
        ):
            loss = MultimodalMixupLoss(probability=1.0, detach_target=detach)(
                (first, second), progress, generator
            )
            found[name] = loss
            for which, gradient in zip("xy", torch.autograd.grad(loss, (first, second))):
                whole = torch.zeros_like(everyone[0])
                whole[own] = gradient / world_size()
                if world_size() > 1:
                    torch.distributed.all_reduce(whole)
                found[f"{name} {which}"] = whole
        return found

    check_two_processes(work, tmp_path)
    assert isinstance(mixup_pairs(everyone[0]), MixedPairs)
