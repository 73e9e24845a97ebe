import pytest
import torch
import torch.nn.functional as F

from coloss.motion import LengthPredictor


def test_lengths_that_follow_from_the_condition_are_learnt() -> None:
    condition, lengths = torch.eye(3), torch.tensor([5, 9, 12])
    predictor = LengthPredictor(3, 12, 5, hidden=16, dropout=0.0)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=0.1)
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(predictor(condition), lengths - predictor.shortest).backward()
        optimizer.step()
    assert torch.equal(predictor.sample(condition, temperature=0.0), lengths)


def test_samples_follow_the_predicted_distribution() -> None:
    predictor = LengthPredictor(3, 4, 2).eval()
    condition = torch.randn(1, 3)
    found = predictor.sample(condition.expand(3000, 3), generator=torch.Generator().manual_seed(0))
    shares = found.bincount(minlength=5)[2:] / 3000
    assert (shares - predictor(condition).softmax(1)[0]).abs().max() < 0.04


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"shortest must be in \[1, 4\], got 5"):
        LengthPredictor(3, 4, 5)
    with pytest.raises(ValueError, match="longest must be >= 1, got 0"):
        LengthPredictor(3, 0)
    predictor = LengthPredictor(3, 4, 2)
    with pytest.raises(ValueError, match="temperature must be >= 0, got -1"):
        predictor.sample(torch.randn(2, 3), temperature=-1)
