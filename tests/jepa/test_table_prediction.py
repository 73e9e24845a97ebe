"""T-JEPA on tables: which columns are seen and predicted, the loss, the traps of the published code, and every kind of run."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes, weights
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.data import MaskRequest, Masks
from coloss.errors import InputError
from coloss.jepa import EffectiveRankMonitor, TabularJEPA, between_sample_std
from coloss.lab import find_entry, verify
from coloss.nn import Classifier, TokenEncoder, token_encoder_for_shape
from coloss.ops import latent_prediction_loss
from coloss.train import Budget, State, TrainingStep

NUMBERS, CARDINALITIES = 5, (3, 4)
COLUMNS = NUMBERS + len(CARDINALITIES)
METRICS = {"auc", "accuracy", "token_std", "token_variance", "effective_rank"}


def new_encoder(registers: int = 1, **options) -> TokenEncoder:
    torch.manual_seed(0)
    sizes = {"dim": 8, "depth": 1, "heads": 2} | options
    return token_encoder_for_shape(
        (COLUMNS,), categorical_cardinalities=CARDINALITIES, registers=registers, **sizes
    )


def new_classifier() -> nn.Module:
    return Classifier(new_encoder(), 3)


def small(**options) -> TabularJEPA:
    return TabularJEPA(**({"predictor_depth": 1, "predictor_heads": 2} | options))


def rows(count: int = 24) -> Tensor:
    """Numbers, codes, and holes in both."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(count, NUMBERS, generator=generator)
    codes = torch.stack([torch.randint(-1, size, (count,), generator=generator) for size in CARDINALITIES], 1)
    numbers[::3, 1] = torch.nan
    return torch.cat([numbers, codes.float()], dim=1)


def batches(labelled: bool = False) -> list[tuple[Tensor, ...]]:
    parts = rows().split(8)
    return [(part, torch.arange(8) % 3) for part in parts] if labelled else [(part,) for part in parts]


def half(request: MaskRequest) -> Masks:
    """Without chance: three columns are seen, two sets of the others are to be predicted."""

    def each(*columns: int) -> Tensor:
        return torch.tensor(columns).expand(request.batch_size, -1)

    return Masks(each(0, 2, 5)[None], torch.stack([each(1, 3, 6), each(1, 4, 6)]))


class Watched(TabularJEPA):
    """Keeps what each step worked with."""

    def __init__(self, **options) -> None:
        super().__init__(**({"predictor_depth": 1, "predictor_heads": 2} | options))
        self.seen: list = []

    def extra_terms(self, predictions, targets, found, state):
        self.seen.append((predictions, targets, found))
        return {}


def one_step(method: TabularJEPA, model: nn.Module, inputs: Tensor) -> tuple[TrainingStep, dict[str, Tensor]]:
    state = State(model)
    state.generator.manual_seed(0)
    state.local_generator.manual_seed(1)
    torch.manual_seed(2)
    step = TrainingStep(model, None, [method], state=state)
    return step, step(inputs)


@pytest.fixture(scope="module")
def forty_steps() -> list[Masks]:
    method = Watched()
    coloss.fit(
        new_encoder(), (rows(),), methods=[method], budget=Budget(steps=40), batch_size=6, log_every=40
    )
    return [found.masks for _, _, found in method.seen]


def test_sets_differ_from_one_another_and_never_hold_a_visible_column(forty_steps: list[Masks]) -> None:
    alike = []
    for masks in forty_steps:
        context, targets = masks.context, masks.targets
        assert context.shape[:2] == (1, 6)
        assert targets.shape[:2] == (4, 6)
        assert context.shape[2] + targets.shape[2] <= COLUMNS
        assert (context[..., None] != targets[:, :, None, :]).all()
        for indices in (context, targets):
            assert (indices.diff(dim=-1) > 0).all()  # no column twice
        alike.append((targets == targets[:1]).all(-1).all(0).float().mean().item())
    # One array that is shuffled in place and cut four times would give four times the same columns: a share of 1.
    assert sum(alike) / len(alike) < 0.1


def test_sizes_vary_from_step_to_step_and_columns_from_row_to_row(forty_steps: list[Masks]) -> None:
    assert len({(masks.context.shape[2], masks.targets.shape[2]) for masks in forty_steps}) > 3
    assert all((masks.context[0] != masks.context[0, :1]).any() for masks in forty_steps)


@pytest.mark.parametrize("registers", [0, 1, 3])
def test_every_column_is_seen_and_predicted_and_registers_shift_nothing(registers: int) -> None:
    method, model = Watched(), new_encoder(registers)
    inputs = rows()
    coloss.fit(model, (inputs,), methods=[method], budget=Budget(steps=12), log_every=12)
    masks = [found.masks for _, _, found in method.seen]
    for indices in ([m.context for m in masks], [m.targets for m in masks]):
        seen = torch.cat([part.flatten() for part in indices]).unique()
        assert seen.tolist() == list(range(COLUMNS))
    _, targets, found = method.seen[-1]
    fresh = Watched(momentum=1.0)
    one_step(fresh, model, inputs)
    _, targets, found = fresh.seen[0]
    with torch.no_grad():
        encoded = model.eval().encode(inputs, with_prefix=True)
    assert encoded.shape[1] == registers + COLUMNS
    expected = encoded[:, registers:].expand(4, -1, -1, -1).take_along_dim(found.masks.targets[..., None], 2)
    torch.testing.assert_close(targets, expected)


def test_the_loss_is_the_squared_error_of_the_definition_row_by_row() -> None:
    method, model = Watched(), new_encoder().double()
    method.masker = half
    inputs = rows(3).double()
    _, terms = one_step(method, model, inputs)
    found = []
    for row in inputs:
        goal = model.encode(row[None])[0]
        tokens = model.tokenizer(row[None])
        context = model.forward_tokens(tokens[:, [0, 2, 5]])
        for hidden in ([1, 3, 6], [1, 4, 6]):
            predicted = method.predictor(context, torch.tensor([[0, 2, 5]]), torch.tensor([hidden]))[0]
            found.append((predicted - goal[hidden]).square().mean())
    assert terms["latent_prediction"].item() == pytest.approx(torch.stack(found).mean().item(), rel=1e-10)


def test_the_loss_is_zero_for_equal_vectors_alone() -> None:
    targets = torch.randn(4, 3, 2, 8)
    assert latent_prediction_loss(targets.clone(), targets, "mse") == 0
    other = targets.clone()
    other[0, 0, 0, 0] += 1
    assert latent_prediction_loss(other, targets, "mse").item() == pytest.approx(1 / targets.numel())


def test_values_of_hidden_columns_do_not_reach_predictions() -> None:
    def predictions(inputs: Tensor) -> Tensor:
        method = Watched()
        method.masker = half
        one_step(method, new_encoder().double(), inputs)
        return method.seen[0][0]

    inputs = rows(4).double()
    plain, hidden, visible = predictions(inputs), inputs.clone(), inputs.clone()
    hidden[:, [1, 3, 4]] += 2
    hidden[:, 6] = (hidden[:, 6] + 1) % 3
    torch.testing.assert_close(predictions(hidden), plain, rtol=0, atol=1e-12)
    visible[:, 2] += 2
    assert (predictions(visible) - plain).abs().max() > 1e-6


def test_the_slow_copy_takes_no_gradient_and_drops_nothing_out() -> None:
    method = small()
    step, terms = one_step(method, new_encoder(dropout=0.5), rows())
    step.backward(terms)
    assert not any(p.requires_grad or p.grad is not None for p in method.target.parameters())
    step.train()
    assert not any(module.training for module in method.target.module.modules())


@pytest.mark.parametrize(("momentum", "stays"), [(1.0, True), (0.0, False)])
def test_momentum_one_keeps_the_slow_copy_and_zero_copies(momentum: float, stays: bool) -> None:
    model, method = new_encoder(), small(momentum=momentum)
    before = weights(model)
    coloss.fit(model, (rows(),), methods=[method], budget=Budget(steps=3), batch_size=8)
    after = weights(model)  # no objective: the slow copy's weights ship
    assert all(torch.equal(after[name], before[name]) for name in before) == stays
    if not stays:
        online = small(momentum=0.0, ships="online")
        twin = new_encoder()
        coloss.fit(twin, (rows(),), methods=[online], budget=Budget(steps=3), batch_size=8)
        assert all(torch.equal(after[name], value) for name, value in weights(twin).items())


def test_columns_permuted_with_their_parameters_permute_their_vectors() -> None:
    model, order = new_encoder().double(), torch.tensor([3, 0, 4, 2, 1, 5, 6])
    twin, tokenizer = new_encoder().double(), model.tokenizer
    with torch.no_grad():
        for name in ("missing", "bias"):
            getattr(twin.tokenizer, name).copy_(getattr(tokenizer, name)[order])
        twin.tokenizer.weight.copy_(tokenizer.weight[order[:NUMBERS]])
        twin.tokenizer.positions.table.copy_(tokenizer.positions.table[order])
    inputs = rows().double()
    torch.testing.assert_close(twin.encode(inputs[:, order]), model.encode(inputs)[:, order])


def test_the_meter_is_zero_for_a_constant_encoder_and_is_logged() -> None:
    model = new_encoder()
    run = coloss.fit(model, (rows(),), methods=[small(meter_every=1)], budget=Budget(steps=2), log_every=1)
    assert run.history[-1].metrics["target_std"] > 0.1
    with torch.no_grad():
        for parameter in (model.tokenizer.weight, model.tokenizer.missing):
            parameter.zero_()
        model.tokenizer.categories.zero_()
    assert between_sample_std(model.encode(rows())) < 1e-6


def test_missing_values_everywhere_are_finite_and_all_alike() -> None:
    inputs = torch.full((12, COLUMNS), torch.nan)
    model = new_encoder()
    run = coloss.fit(model, (inputs,), methods=[small()], budget=Budget(steps=2), batch_size=6)
    assert torch.tensor(run.history[-1].terms["latent_prediction"]).isfinite()
    encoded = model.encode(inputs)
    assert encoded.isfinite().all()
    assert between_sample_std(encoded) < 1e-6
    assert all(p.isfinite().all() for p in model.parameters())


def test_bfloat16_training_and_extreme_values() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    inputs = rows()
    inputs[0, 0], inputs[1, 0] = 1e6, -1e6
    model = new_encoder()
    run = coloss.fit(model, (inputs,), methods=[small()], budget=Budget(steps=2), fabric=fabric)
    assert torch.tensor(list(run.history[-1].terms.values())).isfinite().all()
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("objective", [None, F.cross_entropy])
def test_fit_a_plain_loop_and_lightning_take_the_same_steps(objective) -> None:
    new_model = new_classifier if objective else new_encoder
    check_loops(new_model, small, batches(labelled=objective is not None), objective)


def test_a_killed_run_resumes_bit_identically(tmp_path: Path) -> None:
    check_resume(partial(new_encoder, dropout=0.1), small, (rows(),), tmp_path)


def test_two_processes_with_the_same_masks_take_the_steps_of_one(tmp_path: Path) -> None:
    def train(fabric: Fabric) -> dict[str, Tensor]:
        model, method = new_encoder().double(), small()
        method.masker = half
        torch.manual_seed(0)
        coloss.fit(
            model,
            (rows().double(),),
            methods=[method],
            budget=Budget(steps=4),
            batch_size=8,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            fabric=fabric,
        )
        return weights(model) | {f"predictor.{n}": value for n, value in weights(method.predictor).items()}

    check_two_processes(train, tmp_path)


def test_it_composes_with_an_objective_and_a_monitor() -> None:
    monitor = EffectiveRankMonitor(every=2, min_scale=0.0, min_spread=0.0, min_rank_share=0.0)
    model = new_classifier()
    names = set(model.state_dict())
    run = coloss.fit(
        model,
        (rows(), torch.arange(24) % 3),
        F.cross_entropy,
        [small(weight=0.5), monitor],
        budget=Budget(steps=2),
        log_every=1,
    )
    assert set(run.history[-1].terms) == {"cross_entropy", "latent_prediction"}
    assert monitor.found
    assert set(run.model.state_dict()) == names


def test_columns_that_repeat_one_another_are_predicted() -> None:
    """The second half of a row repeats the first: hidden columns can be told from visible ones."""
    inputs = torch.randn(128, 2, generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    torch.manual_seed(0)
    model = token_encoder_for_shape((4,), dim=8, depth=1, heads=2, registers=1)
    method = Watched(context=(0.5, 0.5), target=(0.25, 0.5), momentum=1.0, predictor_width=16)
    coloss.fit(
        model,
        (inputs,),
        methods=[method],
        budget=Budget(steps=70),
        batch_size=32,
        optimizer=partial(torch.optim.AdamW, lr=2e-2),
    )
    told, guessed = [], []
    for predictions, targets, found in method.seen[-20:]:
        error = (predictions - targets).square().mean(-1)
        twin = (found.masks.context[0, :, None, :] % 2 == found.masks.targets[..., None] % 2).any(-1)
        told.append(error[twin].detach())
        guessed.append(error[~twin].detach())
    assert torch.cat(told).mean() < 0.5 * torch.cat(guessed).mean()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TabularJEPA(context=(0.0, 0.5)), "context must be"),
        (lambda: TabularJEPA(target=(0.5, 0.2)), "target must be"),
        (lambda: TabularJEPA(num_targets=0), "num_targets must be >= 1, got 0"),
        (lambda: TabularJEPA(momentum=2.0), r"momentum must be in \[0, 1\]"),
        (
            lambda: coloss.fit(
                token_encoder_for_shape((1, 8, 8), dim=8, depth=1, heads=2),
                (torch.rand(4, 1, 8, 8),),
                methods=[TabularJEPA()],
                budget=Budget(steps=1),
            ),
            "must read a table's columns .* got ImagePatches",
        ),
        (
            lambda: coloss.fit(
                token_encoder_for_shape((1,), dim=8, depth=1, heads=2),
                (torch.rand(4, 1),),
                methods=[TabularJEPA()],
                budget=Budget(steps=1),
            ),
            "leave room for one another in 1 columns",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message, as_users_call: None) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_the_claim_measures_every_arm() -> None:
    entry = find_entry("t-jepa")
    assert entry.recipe == "coloss.jepa.pretrain_tjepa"
    found = verify("t-jepa", smoke=True, seeds=1)
    assert set(found["arms"]) >= {"t-jepa", "untrained", "t-jepa, no registers", "raw columns"}
    assert set(found["arms"]["t-jepa"]["metrics"]) >= METRICS
    assert set(found["arms"]["t-jepa, no registers"]["metrics"]) >= METRICS
