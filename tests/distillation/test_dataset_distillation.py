"""The catalog's entry, the claim's settings and its code."""

from coloss.data import Splits, load
from coloss.distillation import dataset_distillation, plan_for
from coloss.lab import find_entry, verify


def test_the_claim_runs_with_what_a_user_gets() -> None:
    splits = load("digits")
    assert isinstance(splits, Splits)
    users, ours = plan_for(splits, 1), dataset_distillation.SMOOTH
    judging = {"networks", "network_steps"}
    differing = {name for name, value in vars(users).items() if getattr(ours, name) != value}
    assert differing <= judging
    assert (ours.expert_rate, ours.outer_steps) == (0.025, 250)


def test_the_catalog_has_it_and_the_claim_runs() -> None:
    assert find_entry("dataset-distillation").recipe == "coloss.distillation.distill_dataset"
    found = verify("dataset-distillation", smoke=True, seeds=1)
    arms = set(dataset_distillation.PLANS)
    assert "smooth experts" in arms
    assert set(found["arms"]) == arms | {"class means", "random real images"}
    for name, arm in found["arms"].items():
        expected = {"accuracy", "learning_rate"}
        if name in arms:
            expected |= {"experts_accuracy", "matching_loss", "matching_loss_at_rest"}
        assert set(arm["metrics"]) == expected
