"""The report's numbers are those of the full similarity matrix, whatever is held of it at once; its rule does what it says."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coloss.contrastive import temperature_report
from coloss.metrics import alignment, tolerance, uniformity


def classes_and_views(samples: int = 24, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 3
    centres = torch.eye(3, 6)[labels]
    one, other = (centres + noise * torch.randn(samples, 6, generator=generator) for _ in range(2))
    return 2 * one, other, labels


def by_hand(queries: Tensor, keys: Tensor, ids: Tensor, keys_ids: Tensor, labels: Tensor, temperature: float):
    """Row by row in NumPy: entropy, effective number, its share, nearest 1, 5, 10 %, own class."""
    rows = []
    q, k = (F.normalize(part.double(), dim=1).numpy() for part in (queries, keys))
    for i in range(len(q)):
        others = (keys_ids != ids[i]).numpy()
        scores, same = (
            k[others] @ q[i],
            labels.repeat(len(k) // len(labels))[others] == labels[i % len(labels)],
        )
        weights = np.exp((scores - scores.max()) / temperature)
        weights /= weights.sum()
        entropy = -(weights[weights > 0] * np.log(weights[weights > 0])).sum()
        falling = np.sort(weights)[::-1]
        nearest = [falling[: math.ceil(len(scores) * share - 1e-9)].sum() for share in (0.01, 0.05, 0.1)]
        own = weights[same.numpy()].sum()
        rows.append([entropy, np.exp(entropy), np.exp(entropy) / len(scores), *nearest, own])
    return np.mean(rows, 0)


@pytest.mark.parametrize("candidates", ["both", "other"])
@pytest.mark.parametrize("entries", [1, 200, 2**22])
def test_numbers_are_those_of_the_full_matrix(candidates, entries, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["coloss.contrastive.temperature_report"], "_ENTRIES", entries)
    one, other, labels = classes_and_views()
    ids = torch.arange(24)
    ids[5] = ids[4]  # a duplicate
    report = temperature_report(one, other, labels, (0.5, 0.05), ids=ids, candidates=candidates)
    assert [row.temperature for row in report.rows] == [0.05, 0.5]
    if candidates == "both":
        queries, keys, of_queries = torch.cat([one, other]), torch.cat([one, other]), ids.repeat(2)
    else:
        queries, keys, of_queries = one, other, ids
    for row in report.rows:
        expected = by_hand(queries, keys, of_queries, of_queries, labels, row.temperature)
        found = [row.entropy, row.effective_negatives, row.effective_share]
        found += [row.nearest_1, row.nearest_5, row.nearest_10, row.false_negative_pressure]
        assert found == pytest.approx(expected, rel=1e-4)
    assert report.queries == len(queries)
    assert report.uniformity == pytest.approx(uniformity(one).item())
    assert report.tolerance == pytest.approx(tolerance(one, labels).item())
    assert report.alignment == pytest.approx(alignment(one, other).item())


def test_limits_over_temperatures():
    one, other, labels = classes_and_views()
    low, high = temperature_report(one, other, labels, (1e-3, 1e3)).rows
    negatives = 2 * 23
    assert low.effective_negatives == pytest.approx(1, abs=0.1) and low.nearest_1 > 0.95
    assert high.effective_negatives == pytest.approx(
        negatives, rel=1e-3
    ) and high.effective_share == pytest.approx(1)
    assert high.nearest_10 == pytest.approx(5 / negatives, rel=1e-2)
    assert high.false_negative_pressure == pytest.approx(2 * 7 / negatives, rel=1e-2)


def test_recommends_the_lowest_that_spares_suspects():
    one, other, labels = classes_and_views(noise=0.1)
    report = temperature_report(one, other, labels)
    limit = (1 + report.own_class) / 2
    fine = [row.temperature for row in report.rows if row.false_negative_pressure <= limit]
    assert report.recommendation == fine[0] and len(fine) < len(report.rows)
    assert "query's own class" in report.reason and "no more than" in report.reason
    blind = temperature_report(one, other)
    fine = [row.temperature for row in blind.rows if row.nearest_10 <= 0.55]
    assert blind.recommendation == fine[0] and "nearest 10% of negatives" in blind.reason


def test_reason_names_the_edges_of_the_list():
    one, other, labels = classes_and_views(noise=0.1)
    too_low = temperature_report(one, other, labels, (0.01, 0.02))
    assert too_low.recommendation == 0.02 and "try higher temperatures" in too_low.reason
    too_high = temperature_report(one, other, labels, (5.0, 9.0))
    assert too_high.recommendation == 5.0
    assert "lower ones than those given" in too_high.reason and "hard loss" in too_high.reason


def test_a_collapsed_batch_and_the_smallest_one():
    report = temperature_report(torch.ones(6, 3), torch.ones(6, 3), torch.arange(6) % 2, (0.07,))
    assert report.uniformity == pytest.approx(0, abs=1e-6) and report.tolerance == pytest.approx(1)
    assert report.rows[0].effective_share == pytest.approx(1, abs=1e-4)
    tiny = temperature_report(torch.eye(2).half(), torch.eye(2).half(), temperatures=(0.07,))
    assert tiny.negatives == 2 and tiny.rows[0].nearest_1 == pytest.approx(0.5)
    assert temperature_report(torch.eye(3), torch.eye(3), torch.arange(3)).own_class == 0


def test_table_and_figure_show_every_temperature():
    one, other, labels = classes_and_views()
    report = temperature_report(one, other, labels, (0.1, 0.5))
    lines = report.table().splitlines()
    assert lines[0].split()[0] == "temperature" and "own class" in lines[0] and len(lines) == 5
    assert len({len(line) for line in lines[:3]}) == 1
    assert f"{report.rows[0].effective_negatives:.4g}" in lines[1] and lines[-1].startswith("take ")
    assert "own class" not in temperature_report(one, other).table().splitlines()[0]
    figure = report.figure()
    assert {trace.name for trace in figure.data} == {
        "effective negatives, of all",
        "push on the nearest 1%",
        "push on the nearest 5%",
        "push on the nearest 10%",
        "push on the own class",
    }
    assert list(figure.data[0].y) == [row.effective_share for row in report.rows]
    assert len(temperature_report(one, other).figure().data) == 4


def test_bad_input_is_named(as_users_call):
    x = torch.eye(4)
    for call, message in (
        (lambda: temperature_report(x, x[:3]), r"one shape, got \(4, 4\) and \(3, 4\)"),
        (lambda: temperature_report(x, x, torch.arange(3)), r"labels must have shape \(4,\), got \(3,\)"),
        (lambda: temperature_report(x, x, ids=torch.arange(3)), r"ids must have shape \(4,\), got \(3,\)"),
        (lambda: temperature_report(x, x, temperatures=()), "temperatures must hold at least one"),
        (
            lambda: temperature_report(x, x, temperatures=(0.0,)),
            "temperatures must be > 0 and finite, got 0.0",
        ),
        (lambda: temperature_report(x, x, candidates="all"), "candidates must be"),
        (lambda: temperature_report(x[:1], x[:1]), "at least two samples of different ids, got 1"),
        (lambda: temperature_report(x / 0, x), "first must be finite, got NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
