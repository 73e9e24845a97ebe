import pytest
import torch
from torch import nn

from coloss.distillation import Branch, layer_feature_loss, layer_kl_loss, stage_branches
from coloss.nn import MLP, Classifier, ConvNet, ResNet, Taps
from coloss.ops import distillation_kl_loss


@pytest.mark.parametrize(
    ("backbone", "shape"),
    [
        (ConvNet(1, (2, 3, 4)), (3, 1, 8, 8)),
        (ResNet(1, (2, 3, 4)), (3, 1, 8, 8)),
        (ConvNet(1, (2, 3, 4), dims=1), (3, 1, 8)),
    ],
    ids=["images", "residual", "series"],
)
def test_branches_end_in_one_width_and_resolution(backbone: nn.Module, shape: tuple[int, ...]) -> None:
    model = Classifier(backbone, 5)
    branches = stage_branches(model, 20)
    assert list(branches) == [f"backbone.stages.{number}" for number in range(3)]
    with Taps(model, {path: path for path in branches}) as taps:
        model(torch.randn(shape))
    assert len({branch.body(taps[path]).shape for path, branch in branches.items()}) == 1
    for path, branch in branches.items():
        logits, features = branch(taps[path])
        assert logits.shape == (3, 20) and features.shape == (3, 4)


def test_branches_repeat_the_stages_to_come_with_weights_of_their_own() -> None:
    model = Classifier(ConvNet(1, (2, 3, 4)), 5).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second, last = stage_branches(model, 5).values()
    stages = model.backbone.stages
    assert [p.shape for p in first.body.parameters()] == [p.shape for s in stages[1:] for p in s.parameters()]
    assert [p.shape for p in second.body.parameters()] == [p.shape for p in stages[2].parameters()]
    assert len(last.body) == 3  # type: ignore[arg-type]
    assert not torch.equal(first.body[1][0].weight, stages[2][0].weight)  # type: ignore[index]
    assert not torch.equal(first.body[1][0].weight, second.body[0][0].weight)  # type: ignore[index]
    # A frozen network's branches learn, and the network is as it was.
    assert all(p.requires_grad for branch in (first, second, last) for p in branch.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_network_without_stages_gets_one_branch_before_its_classifier() -> None:
    (path,) = stage_branches(Classifier(MLP(6, [5]), 4), 8)
    assert path == "head:input"


def test_shallow_classifiers_learn_from_the_deepest_and_not_the_other_way() -> None:
    logits = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    loss = layer_kl_loss(logits, 2.0)
    expected = sum(distillation_kl_loss(early, logits[2], 2.0) for early in logits[:2])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for early in logits[:2]:
        assert early.grad is not None
        # T (q - p) / B, the gradient of T^2 KL.
        torch.testing.assert_close(
            early.grad, 2.0 / 4 * ((early / 2).softmax(1) - (logits[2] / 2).softmax(1)).detach()
        )
    assert logits[2].grad is None


def test_shallow_features_move_towards_the_deepest() -> None:
    features = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    layer_feature_loss(features).backward()
    for early in features[:2]:
        assert early.grad is not None
        torch.testing.assert_close(early.grad, (2 / 4 * (early - features[2])).detach())
    assert features[2].grad is None


def test_one_branch_or_no_row_gives_nothing() -> None:
    assert layer_kl_loss([torch.randn(2, 3)]) == 0 and layer_feature_loss([torch.randn(2, 3)]) == 0
    assert layer_kl_loss([torch.zeros(0, 3)] * 2) == 0 and layer_feature_loss([torch.zeros(0, 3)] * 2) == 0


def test_half_precision_is_left() -> None:
    far = [torch.full((1, 2), value, dtype=torch.float16) for value in (0.0, 300.0)]
    assert layer_feature_loss(far).item() == 180_000  # beyond the largest float16
    assert layer_kl_loss(far).dtype == torch.float32


def test_nan_stays_nan() -> None:
    rows = [torch.tensor([[torch.nan, 0.0]]), torch.zeros(1, 2)]
    assert layer_kl_loss(rows).isnan() and layer_feature_loss(rows).isnan()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="width must be >= 1, got 0"):
        Branch(nn.Identity(), 0, 4)
    with pytest.raises(ValueError, match="branch_logits must hold at least one classifier's, got none"):
        layer_kl_loss([])
    with pytest.raises(ValueError, match="branch_features must hold at least one branch's, got none"):
        layer_feature_loss([])
    with pytest.raises(ValueError, match=r"must all have the shape \(2, 4\) of the last, got \(2, 3\)"):
        layer_feature_loss([torch.zeros(2, 3), torch.zeros(2, 4)])

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.Sequential(nn.Conv2d(1, 4, 3))
            self.head = nn.Linear(16, 3)

    with pytest.raises(
        ValueError, match="must give the 16 channels that the classifier takes, got 4: give branches"
    ):
        stage_branches(Flat(), 12)
    with pytest.raises(ValueError, match=r"must contain an nn\.Linear"):
        stage_branches(ConvNet(1), 12)
