import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from coloss.metrics import (
    diversity,
    frechet_distance,
    generation_metrics,
    multimodal_distance,
    multimodality,
    r_precision,
    repeated_evaluation,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Frechet distance


def test_it_is_that_of_plain_numpy_and_scipy() -> None:
    first, second = torch.randn(40, 5), torch.randn(60, 5) @ torch.randn(5, 5) + 1
    a, b = first.double().numpy(), second.double().numpy()
    c, d = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c + d - 2 * scipy.linalg.sqrtm(c @ d).real)
    assert frechet_distance(first, second).item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(frechet_distance(first, second), frechet_distance(second, first))


def test_a_set_is_at_no_distance_from_itself_even_where_its_covariance_is_singular() -> None:
    for samples in (torch.randn(50, 8), torch.randn(5, 30), torch.ones(3, 4), 1e6 + torch.randn(50, 8)):
        assert frechet_distance(samples, samples[torch.randperm(len(samples))]).item() < 1e-4


def test_shifted_normals_are_apart_by_the_squared_shift() -> None:
    shift = torch.tensor([3.0, 0.0, -4.0])
    same = torch.randn(100, 3)
    assert frechet_distance(same, same + shift).item() == pytest.approx(25, rel=1e-4)
    apart = frechet_distance(torch.randn(20_000, 3), torch.randn(20_000, 3) + shift)
    assert apart.item() == pytest.approx(25, abs=0.5)


def test_wider_normals_are_apart_by_the_squared_difference_of_deviations() -> None:
    samples = torch.randn(100, 4).double()
    expected = samples.var(0).sum() * (3 - 1) ** 2
    centred = samples - samples.mean(0)
    torch.testing.assert_close(frechet_distance(centred, 3 * centred), expected)


def test_rotations_and_shifts_of_both_change_nothing_and_scale_squares() -> None:
    first, second = torch.randn(30, 6).double(), torch.randn(30, 6).double() * 2
    rotation = torch.linalg.qr(torch.randn(6, 6).double())[0]
    expected = frechet_distance(first, second)
    torch.testing.assert_close(frechet_distance(first @ rotation + 5, second @ rotation + 5), expected)
    torch.testing.assert_close(frechet_distance(3 * first, 3 * second), 9 * expected)


def test_fewer_samples_are_further_apart() -> None:
    few = frechet_distance(torch.randn(20, 16), torch.randn(20, 16))
    many = frechet_distance(torch.randn(500, 16), torch.randn(500, 16))
    assert few > 4 * many > 0


def test_one_dimension_and_half_precision_will_do() -> None:
    first, second = torch.randn(30, 1), torch.randn(30, 1).half()
    means, deviations = zip(*((x.double().mean(), x.double().std()) for x in (first, second)))
    expected = (means[0] - means[1]) ** 2 + (deviations[0] - deviations[1]) ** 2
    torch.testing.assert_close(frechet_distance(first, second), expected)


# R-precision


def slow_precision(text: Tensor, motion: Tensor, k: int) -> float:
    distances = torch.cdist(text, motion)
    return float(np.mean([int((row < row[i]).sum()) < k for i, row in enumerate(distances)]))


def test_the_precision_of_one_batch_is_that_of_a_loop() -> None:
    text = torch.randn(32, 4).double()
    motion = text + torch.randn(32, 4).double()
    found = r_precision(text, motion, top=(1, 3, 10))
    for k in (1, 3, 10):
        assert found[f"r_precision@{k}"] == slow_precision(text, motion, k)


def test_shares_are_exact_where_sums_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # Some devices have no float64.
    monkeypatch.setattr("coloss.metrics.generation.accumulation_dtype", lambda device: torch.float32)
    text = torch.eye(3)
    assert r_precision(text, text[[0, 2, 1]], top=(1,), batch_size=3) == {"r_precision@1": 1 / 3}


def test_incomplete_batches_are_left_out_and_batches_are_drawn() -> None:
    text = torch.eye(70)
    motion = torch.eye(70)[torch.randperm(70, generator=generator())]
    found = {r_precision(text, motion, generator=generator(seed))["r_precision@1"] for seed in range(5)}
    assert all((value * 64) % 1 == 0 for value in found)
    first = r_precision(text, motion, generator=generator(3))
    assert first == r_precision(text, motion, generator=generator(3))


def test_chance_is_k_in_32() -> None:
    text, motion = torch.randn(3200, 8), torch.randn(3200, 8)
    found = r_precision(text, motion, generator=generator())
    for k in (1, 2, 3):
        assert found[f"r_precision@{k}"] == pytest.approx(k / 32, abs=0.015)


def test_one_embedding_for_everything_is_no_perfect_model() -> None:
    found = r_precision(torch.ones(32, 4), torch.ones(32, 4), top=(1, 3, 15, 16, 32))
    assert list(found.values()) == [0, 0, 0, 1, 1]


def test_motions_with_one_caption_do_not_compete() -> None:
    # A perfect model of captions, of which each is worn by four clips: by the diagonal alone it would fail.
    groups = torch.arange(32) // 4
    text = torch.eye(8)[groups]
    motion = text + 0.01 * torch.randn(32, 8)
    assert r_precision(text, motion, groups)["r_precision@1"] == 1
    assert r_precision(text, motion)["r_precision@1"] < 0.6


def test_the_nearest_motion_of_the_group_counts() -> None:
    text = torch.zeros(3, 1)
    motion = torch.tensor([[3.0], [1.0], [2.0]])
    found = r_precision(text, motion, torch.tensor([0, 0, 1]), top=(1, 2), batch_size=3)
    assert found["r_precision@1"] == pytest.approx(2 / 3)
    assert found["r_precision@2"] == 1


# Distances and spread


def test_the_multimodal_distance_is_the_mean_of_paired_distances() -> None:
    text, motion = torch.randn(9, 4).double(), torch.randn(9, 4).double()
    expected = np.mean([np.linalg.norm(a - b) for a, b in zip(text.numpy(), motion.numpy())])
    assert multimodal_distance(text, motion).item() == pytest.approx(expected)


def test_diversity_of_normals_is_their_mean_distance() -> None:
    # The distance of two standard normals of two dimensions is sqrt(2) Rayleigh: its mean is sqrt(pi).
    found = diversity(torch.randn(4000, 2), 4000, generator=generator())
    assert found.item() == pytest.approx(math.sqrt(math.pi), abs=0.05)


def test_the_number_of_pairs_is_that_of_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    norm = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda x, dim: drawn.append(len(x)) or norm(x, dim=dim))
    for samples in (301, 300, 101, 40):
        diversity(torch.randn(samples, 2))
    assert drawn == [300, 100, 100, 40]


def test_multimodality_compares_generations_of_one_text_alone() -> None:
    texts = 100 * torch.randn(6, 1, 3)
    assert multimodality(texts.expand(6, 12, 3)).item() == 0
    spread = multimodality(texts + torch.randn(6, 30, 3), generator=generator())
    assert 1 < spread.item() < 4


def test_draws_are_functions_of_the_generator() -> None:
    samples = torch.randn(200, 3)
    assert diversity(samples, generator=generator(1)) == diversity(samples, generator=generator(1))
    assert diversity(samples, generator=generator(1)) != diversity(samples, generator=generator(2))
    answers = samples.view(10, 20, 3)
    assert multimodality(answers, 5, generator=generator(1)) == multimodality(
        answers, 5, generator=generator(1)
    )


# Together


def test_real_motions_in_place_of_generated_ones_measure_as_real_ones() -> None:
    text = torch.randn(64, 4)
    real = text + 0.1 * torch.randn(64, 4)
    found = generation_metrics(text, real, real, generator=generator())
    assert found["fid"] < 1e-6
    assert found["multimodal_distance"] == found["real_multimodal_distance"]
    assert found["fid_samples_per_dimension"] == 16
    few = generation_metrics(text[:20], real[:20], real[:20])
    assert sorted(few) == sorted(name for name in found if "precision" not in name)
    worse = generation_metrics(text, real, real[torch.randperm(64)] * 2, generator=generator())
    assert worse["fid"] > 0.5
    assert worse["r_precision@1"] < worse["real_r_precision@1"]
    assert worse["diversity"] > worse["real_diversity"]


def test_repeats_have_a_mean_and_the_papers_interval() -> None:
    found = repeated_evaluation(lambda g: {"x": float(g.initial_seed() % 10), "y": 1.0}, 4, seed=3)
    values = [3.0, 4.0, 5.0, 6.0]
    assert found["x"].values == tuple(values)
    assert found["x"].mean == 4.5
    assert found["x"].half_width == pytest.approx(1.96 * np.std(values) / 2)
    assert found["y"].half_width == 0
    assert math.isnan(repeated_evaluation(lambda g: {"x": 1.0}, 1)["x"].half_width)


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: frechet_distance(torch.ones(1, 2), torch.ones(3, 2)),
            "first must hold at least 2 samples, got 1",
        ),
        (
            lambda: frechet_distance(torch.ones(3, 2), torch.ones(3, 4)),
            "second must have the width 2 of first, got 4",
        ),
        (
            lambda: frechet_distance(torch.ones(3, 2), torch.full((3, 2), torch.nan)),
            "second must be finite, got NaN or infinity",
        ),
        (lambda: r_precision(torch.ones(9, 2), torch.ones(9, 2)), r"batch_size must be in \[1, 9\].* got 32"),
        (
            lambda: r_precision(torch.ones(40, 2), torch.ones(40, 3)),
            r"motion must have the shape \(40, 2\) of text",
        ),
        (
            lambda: r_precision(torch.ones(32, 2), torch.ones(32, 2), torch.ones(3)),
            r"groups must have shape \(32,\), got \(3,\)",
        ),
        (
            lambda: r_precision(torch.ones(32, 2), torch.ones(32, 2), top=(0,)),
            r"top must hold numbers >= 1, got \(0,\)",
        ),
        (
            lambda: multimodal_distance(torch.ones(0, 2), torch.ones(0, 2)),
            "text must hold at least one sample, got none",
        ),
        (lambda: diversity(torch.ones(5, 2), 6), r"pairs must be in \[1, 5\].* got 6"),
        (lambda: diversity(torch.full((5, 2), torch.inf)), "embeddings must be finite"),
        (lambda: multimodality(torch.ones(2, 5, 2), 6), r"pairs must be in \[1, 5\].* got 6"),
        (lambda: repeated_evaluation(lambda g: {}, 0), "repeats must be >= 1, got 0"),
        (
            lambda: repeated_evaluation(lambda g: {str(g.initial_seed()): 1.0}, 2),
            r"evaluate must give the same names each time, got \['0'\] and \['1'\]",
        ),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str, as_users_call: None) -> None:
    with pytest.raises(ValueError, match=message):
        call()
