"""The contrast of gates: its value by hand, whom it reaches, what it leaves alone, and how it runs."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes, run_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.lab import verify
from coloss.retrieval import (
    GateContrast,
    HistoryMasking,
    gate_contrastive_loss,
    mask_histories,
    random_history_mask,
    small_mixture_ranker,
)
from coloss.train import Budget, TrainingStep

BCE = F.binary_cross_entropy_with_logits


def new_model() -> nn.Module:
    torch.manual_seed(3)
    return small_mixture_ranker(20, dim=4, num_experts=3, hidden=(8,))


def new_data() -> IndexedDataset:
    generator = torch.Generator().manual_seed(1)
    histories = torch.randint(21, (48, 5), generator=generator)
    items = torch.randint(1, 21, (48,), generator=generator)
    clicks = torch.randint(2, (48,), generator=generator).float()
    return IndexedDataset((histories, items), clicks, extras={"user": torch.arange(48) % 7})


def every_other(inputs, generator=None):
    """Masks that do not depend on the process that makes them."""
    histories, items = inputs
    return histories * (torch.arange(5) % 2), items


def test_written_out_by_hand():
    gates, masked = torch.randn(2, 6, 4, dtype=torch.float64)
    users = torch.tensor([0, 1, 0, 2, 2, 3])
    cosine = F.cosine_similarity(masked[:, None], gates[None], dim=2)
    costs = []
    for i in range(6):
        others = [math.exp(cosine[i, l] / 0.3) for l in range(6) if users[l] != users[i]]  # noqa: E741
        own = math.exp(cosine[i, i] / 0.3)
        costs.append(-math.log(own / (own + sum(others))))
    found = gate_contrastive_loss(gates, masked, 0.3, user_ids=users)
    assert found.item() == pytest.approx(sum(costs) / 6)


def test_without_masking_it_is_at_its_least_for_the_given_negatives():
    """Unit check: G+ = G gives log(1 + sum exp((cos - 1) / tau)), and no other positive costs less."""
    gates = torch.randn(5, 4, dtype=torch.float64)
    cosine = F.cosine_similarity(gates[:, None], gates[None], dim=2)
    terms = ((cosine - 1) / 0.5).exp().fill_diagonal_(0.0)
    expected = torch.log1p(terms.sum(1)).mean()
    torch.testing.assert_close(gate_contrastive_loss(gates, 3.0 * gates, 0.5), expected)


def test_one_request_or_one_user_costs_nothing():
    gates = torch.randn(3, 4, requires_grad=True)
    for loss in (
        gate_contrastive_loss(gates[:1], gates[:1].flip(1)),
        gate_contrastive_loss(gates, gates.flip(1), user_ids=torch.zeros(3)),
        gate_contrastive_loss(gates[:0], gates[:0]),
    ):
        assert loss == 0.0
        assert not torch.autograd.grad(loss, gates)[0].any()


def test_the_same_user_twice_is_no_negative():
    gates = torch.eye(4)[[0, 1, 0]]
    masked = gates.clone()
    told = gate_contrastive_loss(gates, masked, 0.05, user_ids=torch.tensor([5, 6, 5]))
    not_told = gate_contrastive_loss(gates, masked, 0.05)
    assert told < 1e-6 and not_told == pytest.approx(2 / 3 * math.log(2), rel=1e-3)


def test_gradients_are_exact():
    gates, masked = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    users = torch.tensor([0, 1, 0, 2, 3])
    assert torch.autograd.gradcheck(
        lambda g, m: gate_contrastive_loss(g, m, 0.4, user_ids=users),
        (gates.detach().requires_grad_(), masked.detach().requires_grad_()),
    )


def test_half_precision_and_gates_of_zero_are_finite():
    gates = torch.randn(4, 3).bfloat16()
    found = gate_contrastive_loss(gates, gates.flip(0), 0.01)
    assert found.dtype == torch.float32 and found == gate_contrastive_loss(
        gates.float(), gates.float().flip(0), 0.01
    )
    zero = torch.zeros(4, 3, requires_grad=True)
    loss = gate_contrastive_loss(zero, zero)
    assert loss.item() == pytest.approx(math.log(4))
    assert torch.autograd.grad(loss, zero)[0].isfinite().all()


def test_masks_drop_at_the_rate_and_keep_enough():
    mask = torch.ones(4000, 10, dtype=torch.bool)
    mask[:, :2] = False
    kept = random_history_mask(mask, 0.3, generator=torch.Generator().manual_seed(0))
    assert not kept[:, :2].any() and kept[:, 2:].float().mean().item() == pytest.approx(0.7, abs=0.01)
    assert torch.equal(random_history_mask(mask, 0.0), mask)
    for least in (0, 1, 3, 20):
        left = random_history_mask(mask, 1.0, min_keep=least)
        assert (left.sum(1) == min(least, 8)).all() and not (left & ~mask).any()
    # What stays in any case is drawn evenly.
    share = random_history_mask(mask, 1.0)[:, 2:].float().mean(0)
    assert (share - 1 / 8).abs().max() < 0.02
    empty = torch.zeros(3, 4, dtype=torch.bool)
    assert not random_history_mask(empty, 0.5, min_keep=2).any()


def test_masked_inputs_forget_items_and_keep_the_candidate():
    inputs = new_data().inputs
    histories, items = mask_histories(inputs, 0.5, torch.Generator().manual_seed(0))
    assert items is inputs[1] and ((histories == inputs[0]) | (histories == 0)).all()
    assert ((histories > 0).sum(1) >= (inputs[0] > 0).sum(1).clamp(max=1)).all()
    assert 0.4 < (histories > 0).sum() / (inputs[0] > 0).sum() < 0.7


def test_no_expert_gets_a_gradient_from_the_contrast():
    model = new_model()
    step = TrainingStep(model, None, [GateContrast()])
    batch = new_data().all()
    step.backward(step(batch))
    assert all(p.grad is None or not p.grad.any() for p in model.experts.parameters())
    assert model.input_net.attention.weigh.layers[0].weight.grad is None
    assert model.gate.prefer.layers[0].weight.grad.any() and model.input_net.embedding.weight.grad.any()


def test_the_term_compares_the_batch_with_the_same_candidates():
    model, batch = new_model(), new_data().all()
    step = TrainingStep(model, BCE, [GateContrast(mask=every_other, temperature=0.4)])
    found = step(batch)
    gates, masked = model.gate_vector(batch.inputs), model.gate_vector(every_other(batch.inputs))
    expected = gate_contrastive_loss(gates, masked, 0.4, user_ids=batch.extras["user"])
    torch.testing.assert_close(found["gate_contrast"], expected)
    # The ranking loss saw the whole histories.
    torch.testing.assert_close(
        found["binary_cross_entropy_with_logits"], BCE(model(batch.inputs), batch.targets)
    )


class Routed(nn.Module):
    """A mixture of another make, without `gate_vector`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(21, 6, padding_idx=0, mode="sum")
        self.router = nn.Linear(6, 3)
        self.experts = nn.Linear(6, 3)

    def forward(self, histories: Tensor) -> Tensor:
        features = self.embedding(histories)
        return (self.router(features).softmax(1) * self.experts(features)).sum(1)


def test_any_model_with_a_gate_will_do():
    model, histories = Routed(), new_data().inputs[0]
    step = TrainingStep(
        model, None, [GateContrast(gate="router", mask=lambda x, g: x * (torch.arange(5) % 2))]
    )
    found = step(histories)["gate_contrast"]
    gates, masked = (model.router(model.embedding(h)) for h in (histories, histories * (torch.arange(5) % 2)))
    torch.testing.assert_close(found, gate_contrastive_loss(gates, masked))


def test_another_module_than_the_gate_is_compared_with_itself():
    """What is named is what is contrasted, in a ranker with `gate_vector` as well."""
    model, batch = new_model(), new_data().all()
    found = TrainingStep(model, None, [GateContrast(gate="input_net", mask=every_other)])(batch)
    features, masked = (
        model.input_net(model.input_net.embed(inputs)) for inputs in (batch.inputs, every_other(batch.inputs))
    )
    expected = gate_contrastive_loss(features, masked, user_ids=batch.extras["user"])
    torch.testing.assert_close(found["gate_contrast"], expected)


def test_plain_masking_hides_a_share_of_the_histories_in_training_only():
    data = new_data()
    step = TrainingStep(new_model(), BCE, [HistoryMasking(drop=1.0, share=0.5)])
    step(data.all())
    seen = (step.state.batch.inputs[0] > 0).sum(1)
    full = (data.inputs[0] > 0).sum(1)
    short = seen < full
    assert (seen[short] == 1).all() and 10 < int(short.sum()) < 38 and torch.equal(seen[~short], full[~short])
    assert torch.equal(data.inputs[0], new_data().inputs[0])
    alone = TrainingStep(Routed(), lambda out, _: out.mean(), [HistoryMasking(drop=1.0, share=1.0)])
    alone(data.inputs[0])
    assert ((alone.state.batch.inputs > 0).sum(1) <= 1).all()


def test_beside_another_method_every_term_counts_and_the_model_ships_as_built():
    def go(*methods: coloss.Method) -> nn.Module:
        return coloss.fit(new_model(), new_data(), BCE, methods, budget=Budget(steps=4), batch_size=16).model

    model = go(HistoryMasking(), GateContrast())
    assert list(model.state_dict()) == list(new_model().state_dict())
    weights = [torch.cat([p.detach().flatten() for p in go(*methods).parameters()]) for methods in (
        (GateContrast(mask=every_other, weight=0.0),), (), (GateContrast(mask=every_other),)
    )]  # fmt: skip
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_balance_of_the_experts_is_logged():
    run = coloss.fit(new_model(), new_data(), BCE, [GateContrast()], budget=Budget(steps=3), batch_size=16)
    assert 0 < run.history[-1].metrics["gate_balance"] <= 1


def test_fit_a_plain_loop_and_lightning_take_the_same_steps():
    data = new_data()
    histories, items = data.inputs
    batches = [((histories[i : i + 16], items[i : i + 16]), data.targets[i : i + 16]) for i in (0, 16, 32)]
    check_loops(new_model, GateContrast, batches, BCE)
    check_loops(new_model, HistoryMasking, batches, BCE)


@pytest.mark.parametrize("method", [GateContrast, HistoryMasking])
def test_a_killed_run_resumes_bit_identically(tmp_path: Path, method: type[coloss.Method]):
    check_resume(new_model, method, new_data(), tmp_path, BCE, batch_size=16)


def test_joined_micro_batches_are_one_large_batch():
    def go(size: int, accumulate: int) -> nn.Module:
        return coloss.fit(
            new_model().double(), new_data().subset(torch.arange(32)), None, [GateContrast(mask=every_other)],
            budget=Budget(steps=1), batch_size=size, accumulate=accumulate, optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        ).model  # fmt: skip

    for one, other in zip(go(32, 1).parameters(), go(16, 2).parameters()):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_two_processes_take_the_steps_of_one(tmp_path: Path):
    def train(fabric: Fabric) -> dict[str, Tensor]:
        data = new_data()
        data = IndexedDataset(data.inputs, data.targets.double(), extras=data.extras)
        run = coloss.fit(
            _double(new_model()), data, BCE, [GateContrast(mask=every_other)],
            budget=Budget(steps=5), batch_size=16, fabric=fabric,
        )  # fmt: skip
        return dict(run.model.state_dict())

    # The gate is summed in float32, whatever the network's precision.
    check_two_processes(train, tmp_path, atol=1e-5)


def _double(model: nn.Module) -> nn.Module:
    return model.double()


def test_users_are_known_across_processes(tmp_path: Path):
    gates, masked = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    users = torch.tensor([0, 1, 0, 2, 2, 3])

    def work(fabric: Fabric) -> dict[str, Tensor]:
        mine = slice(fabric.global_rank, None, fabric.world_size)
        return {"loss": gate_contrastive_loss(gates[mine], masked[mine], 0.3, user_ids=users[mine])}

    alone = gate_contrastive_loss(gates, masked, 0.3, user_ids=users)
    for found in run_processes(work, tmp_path):
        torch.testing.assert_close(found["loss"], alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight must be >= 0 and finite, or a schedule, got -1.0"),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"drop": 1.5}, r"drop must be in \[0, 1\], got 1.5"),
        ({"min_keep": -1}, "min_keep must be >= 0, got -1"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str):
    with pytest.raises(InputError, match=message):
        GateContrast(**options)


def test_bad_input_is_refused(as_users_call, monkeypatch):
    data = new_data()
    odd = new_model()
    monkeypatch.setattr(odd, "gate_vector", lambda inputs: torch.zeros(48, 5))
    with pytest.raises(InputError, match=r"must give \(48, 3\) for masked histories too, got \(48, 5\)"):
        TrainingStep(odd, BCE, [GateContrast()])(data.all())
    for method, inputs, extras, message in (
        (GateContrast(gate="router"), data.inputs, {}, "gate must name the module that weighs the experts"),
        (GateContrast(gate=""), data.inputs, {}, r"must give a tensor \(batch, experts\), got \(48,\)"),
        (
            GateContrast(),
            data.inputs,
            {"user": torch.arange(3)},
            r"batch.extras\['user'\] must have shape \(48,\)",
        ),
    ):
        with pytest.raises(InputError, match=message):
            TrainingStep(new_model(), BCE, [method])({"inputs": inputs, "targets": data.targets, **extras})
    with pytest.raises(
        InputError,
        match=r"inputs must begin with histories \(batch, positions\) of item numbers, got \(4, 2\)",
    ):
        mask_histories(torch.randn(4, 2), 0.5)
    with pytest.raises(InputError, match=r"share must be in \[0, 1\], got 2"):
        HistoryMasking(share=2)
    with pytest.raises(ValueError, match=r"drop must be in \[0, 1\], got -0.1"):
        random_history_mask(torch.ones(1, 1, dtype=torch.bool), -0.1)
    with pytest.raises(ValueError, match="min_keep must be >= 0, got -1"):
        random_history_mask(torch.ones(1, 1, dtype=torch.bool), 0.1, min_keep=-1)
    with pytest.raises(ValueError, match=r"masked_gates must have the shape of gates \(2, 3\), got \(2, 4\)"):
        gate_contrastive_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="temperature must be > 0 and finite, got 0.0"):
        gate_contrastive_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0)


def test_the_claim_runs():
    found = verify("aw-moe", smoke=True, seeds=1)
    assert found["metric"] == "auc_last_1" and len(found["arms"]) == 4
    for name, arm in found["arms"].items():
        assert {"auc", "gauc", "auc_last_1", "gauc_last_3", "auc_drop"} <= set(arm["metrics"])
        assert ("gate_balance" in arm["metrics"]) == (name != "one tower")
