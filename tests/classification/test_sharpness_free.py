import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import coloss
from coloss import Budget, Method, TrainingStep
from coloss.classification import (
    EMADistillation,
    NumberedDataset,
    TrajectoryDistillation,
    TrajectoryLoss,
)
from coloss.classification.sharpness_free import CLAIM, SYSTEM
from coloss.classification.sharpness_trial import SharpnessAwareMinimization
from coloss.data import IndexedDataset
from coloss.lab import find_entry, verify
from coloss.lab.catalog import import_name
from coloss.nn import MLP
from coloss.train.task import Setting

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
EPOCHS = Budget(epochs=5)
METHODS: dict[str, Callable[..., Method]] = {
    "saf": partial(TrajectoryDistillation, lag=1, start_epoch=0),
    "mesa": partial(EMADistillation, decay=0.8, start_epoch=0),
}
TERMS = {"saf": "trajectory", "mesa": "ema_distillation"}
both = pytest.mark.parametrize("name", METHODS)


def new_model() -> nn.Module:
    return MLP(6, (8,), 4)


def new_data() -> IndexedDataset:
    return IndexedDataset(torch.randn(48, 6), torch.randint(4, (48,)), ids=torch.randperm(100)[:48])


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def train(model: nn.Module, methods: list[Method], data: Any = None, **options: Any) -> coloss.Fit:
    defaults: dict[str, Any] = {"budget": EPOCHS, "optimizer": SGD, "batch_size": 16}
    torch.manual_seed(5)
    data = new_data() if data is None else data
    return coloss.fit(model, data, F.cross_entropy, methods, **(defaults | options))


@both
def test_before_the_start_epoch_training_is_plain(name: str) -> None:
    initial = new_model()
    plain, held = copy.deepcopy(initial), copy.deepcopy(initial)
    train(plain, [])
    train(held, [METHODS[name](start_epoch=4)])
    assert same(weights(plain), weights(held))


@both
def test_the_term_changes_training_and_the_model_ships_as_it_was_built(name: str) -> None:
    initial = new_model()
    plain, held = copy.deepcopy(initial), copy.deepcopy(initial)
    train(plain, [])
    run = train(held, [METHODS[name](weight=5.0)])
    assert run.history[-1].terms[TERMS[name]] > 0
    assert run.model is held and weights(held).keys() == weights(initial).keys()
    assert not same(weights(plain), weights(held))
    assert not any(module._forward_hooks for module in held.modules())
    if name == "mesa":
        held.eval()
        assert not torch.equal(held(torch.ones(2, 6)), run.methods[0].loss.average(torch.ones(2, 6)))


@both
def test_the_weight_may_follow_a_schedule(name: str) -> None:
    initial = new_model()
    plain, held = copy.deepcopy(initial), copy.deepcopy(initial)
    train(plain, [])
    train(held, [METHODS[name](weight=lambda progress: 0.0)])
    assert same(weights(plain), weights(held))


def test_the_table_is_indexed_by_sample_id_whatever_the_order_of_batches() -> None:
    # The learning rate is 0: what each sample gets in every epoch is the same, so nothing ever differs from the past.
    method = TrajectoryDistillation(lag=2, start_epoch=0, dtype="float64")
    data, model = new_data(), MLP(6, (8,), 4, norm=None).double()
    data = IndexedDataset(data.inputs.double(), data.targets, data.ids)
    run = train(model, [method], data, optimizer=partial(torch.optim.SGD, lr=0.0), log_every=1)
    assert max(point.terms["trajectory"] for point in run.history) < 1e-12
    past, seen = method.loss.history.read(data.ids, 4)
    assert seen.all()
    torch.testing.assert_close(past.softmax(1), model(data.inputs).softmax(1))


class Smoothness(Method):
    """A second source of loss on the same run, which reads a tapped feature after the average has run."""

    def setup(self, state: coloss.State) -> None:
        state.tap("hidden", "layers.0")

    def terms(self, state: coloss.State) -> dict[str, Tensor]:
        assert state.features["hidden"].requires_grad
        return {"smoothness": state.features["hidden"].square().mean()}


@both
def test_it_composes_with_another_method(name: str) -> None:
    for methods in ([METHODS[name](), Smoothness()], [Smoothness(), METHODS[name]()]):
        run = train(new_model(), methods)
        assert set(run.history[-1].terms) == {"cross_entropy", "smoothness", TERMS[name]}


def test_both_variants_may_run_together_and_under_mixed_precision() -> None:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    run = train(new_model(), [METHODS["saf"](), METHODS["mesa"]()], fabric=fabric)
    assert run.history[-1].terms["trajectory"] > 0 and run.history[-1].terms["ema_distillation"] > 0
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


@both
def test_micro_batches_add_up_to_the_large_batch(name: str) -> None:
    found = []
    for accumulate in (1, 2):
        torch.manual_seed(1)
        model = MLP(6, (8,), 4, norm=None).double()
        data = new_data()
        data = IndexedDataset(data.inputs.double(), data.targets, data.ids)
        method = METHODS[name](weight=3.0, **({"dtype": "float64"} if name == "saf" else {}))
        train(model, [method], data, accumulate=accumulate, batch_size=16 // accumulate)
        found.append(weights(model))
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], msg=key)


class Killed(Exception):
    pass


class Kill(Method):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def on_step(self, state: coloss.State) -> None:
        if state.step == self.at:
            raise Killed


@both
def test_a_killed_run_resumes_bit_identically(name: str, tmp_path: Path) -> None:
    initial = new_model()

    def run(kill_at: int, **options: Any) -> dict[str, Tensor]:
        method, model = METHODS[name](), copy.deepcopy(initial)
        train(model, [method, Kill(kill_at)], **options)
        return weights(model) | {f"method.{key}": value for key, value in weights(method).items()}

    whole = run(kill_at=0)
    kept = {"checkpoint_dir": tmp_path, "checkpoint_every": 4}
    with pytest.raises(Killed):
        run(kill_at=10, **kept)
    resumed = run(kill_at=0, resume=True, **kept)
    assert len(whole) > len(weights(initial))
    assert same(whole, resumed)


def test_a_run_that_resumes_without_its_table_waits_for_the_lag(tmp_path: Path) -> None:
    kept = {"checkpoint_dir": tmp_path, "checkpoint_every": 3, "log_every": 1}
    options: dict[str, Any] = {"lag": 1, "start_epoch": 0, "save_history": False}
    with pytest.raises(Killed):
        train(new_model(), [TrajectoryDistillation(**options), Kill(10)], **kept)
    run = train(new_model(), [TrajectoryDistillation(**options), Kill(0)], resume=True, **kept)
    # Three batches an epoch: steps 10 to 12 find nothing, steps 13 to 15 do.
    active = [point.terms["trajectory"] > 0 for point in run.history]
    assert active == [False] * 3 + [True] * 6 + [False] * 3 + [True] * 3


def test_fit_a_plain_loop_and_lightning_take_the_same_steps() -> None:
    from lightning.pytorch import LightningModule, Trainer

    data, initial = new_data(), new_model()
    batches = [data.take(rows) for rows in torch.arange(48).split(16)]
    triples = [(batch.inputs, batch.targets, batch.ids) for batch in batches]
    for name, make in METHODS.items():
        fitted, looped, lit = (copy.deepcopy(initial) for _ in range(3))
        coloss.fit(fitted, batches, F.cross_entropy, [make()], budget=EPOCHS, optimizer=SGD)

        step = TrainingStep(looped, F.cross_entropy, [make()])
        optimizer = SGD(step.trainable)
        for _ in range(5):
            for triple in triples:
                optimizer.zero_grad()
                step.backward(step(*triple))
                optimizer.step()
                step.after_step()
            step.after_epoch()
        step.finish()

        class Module(LightningModule):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.model = model

            def training_step(self, batch: Any, index: int) -> Tensor:
                return F.cross_entropy(self.model(batch[0]), batch[1])

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return SGD([p for p in self.parameters() if p.requires_grad])

        trainer = Trainer(
            max_epochs=5,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[coloss.MethodCallback([make()])],
        )
        trainer.fit(Module(lit), DataLoader(triples, batch_size=None))
        assert not same(weights(initial), weights(fitted))
        assert same(weights(fitted), weights(looped)), name
        assert same(weights(fitted), weights(lit)), name


def test_a_torch_data_set_gets_ids_by_a_wrapper() -> None:
    data = new_data()
    wrapped = NumberedDataset(TensorDataset(data.inputs, data.targets))
    method = METHODS["saf"]()
    train(new_model(), [method], DataLoader(wrapped, batch_size=16, shuffle=True))
    assert method.loss.history.read(torch.arange(48), 4)[1].all()


def test_mixing_methods_say_whom_they_mixed() -> None:
    class Mix(Method):
        def on_batch(self, state: coloss.State) -> None:
            batch = state.batch
            batch.extras |= {"mixed_ids": batch.ids.flip(0), "mixed_share": torch.full((len(batch),), 0.7)}
            batch.inputs = 0.7 * batch.inputs + 0.3 * batch.inputs.flip(0)

    method = METHODS["saf"]()
    run = train(new_model(), [Mix(), method])
    # Every batch is mixed, so nothing is known about single samples.
    assert method.loss.history.memory_bytes == 0
    assert run.history[-1].terms["trajectory"] == 0


JOINED = {
    "saf": lambda: TrajectoryDistillation(lag=2, start_epoch=1, dtype="float64", weight=3.0),
    "mesa": lambda: EMADistillation(start_epoch=1, decay=0.8, weight=3.0),
}


@pytest.mark.parametrize("variant", list(JOINED))
def test_two_processes_take_the_steps_of_one(variant: str, tmp_path: Path) -> None:
    def train(fabric: Fabric) -> dict[str, Tensor]:
        """Weights after six epochs in float64, in reshuffled shards, and the method's own state."""
        torch.manual_seed(0)
        model, method = MLP(6, (8,), 4, norm=None).double(), JOINED[variant]()
        coloss.fit(
            model,
            (torch.randn(40, 6, dtype=torch.float64), torch.randint(4, (40,))),
            F.cross_entropy,
            [method],
            batch_size=8,
            budget=Budget(epochs=6),
            optimizer=SGD,
            fabric=fabric,
        )
        if variant == "saf":
            # Every process found the rows that the other had written: the tables are whole.
            assert (method.state_dict()["loss.history.epochs"][:, :40] >= 3).all()
        return {f"model.{n}": v for n, v in model.state_dict().items()} | {
            f"method.{n}": v for n, v in method.state_dict().items()
        }

    check_two_processes(train, tmp_path)


def test_bad_input_is_named(as_users_call: None) -> None:
    for make, message in (
        (
            lambda: TrajectoryDistillation(weight=-1.0),
            "weight must be >= 0 and finite, or a schedule, got -1.0",
        ),
        (lambda: TrajectoryDistillation(dtype="int8"), "dtype must be one of float16, .* got 'int8'"),
        (lambda: TrajectoryDistillation(every=0), "every must be >= 1, got 0"),
        (lambda: TrajectoryDistillation(lag=0), "lag must be >= 1 epoch, got 0"),
        (lambda: EMADistillation(weight=float("nan")), "weight must be >= 0 and finite"),
        (lambda: EMADistillation(decay=2.0), r"decay must be in \[0, 1\], got 2.0"),
        (lambda: EMADistillation(temperature=0.0), "temperature must be > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    batches = [(torch.randn(8, 6), torch.randint(4, (8,)))]
    with pytest.raises(ValueError, match="found by sample id and the batch has none"):
        train(new_model(), [METHODS["saf"]()], batches)
    with pytest.raises(ValueError, match=r"one tensor of logits \(batch, classes\), got \(16,\)"):
        coloss.fit(
            nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)),
            new_data(),
            lambda z, y: z.mean(),
            [METHODS["mesa"]()],
            budget=EPOCHS,
            batch_size=16,
        )


# In the lab


def test_the_catalog_entry_names_what_exists() -> None:
    entry = find_entry("saf")
    assert entry.has_claim and entry.method == "coloss.classification.TrajectoryDistillation"
    assert [import_name(path).__name__ for path in SYSTEM.api] == [path.split(".")[-1] for path in SYSTEM.api]


def test_the_lab_fits_either_variant_to_the_budget(as_users_call: None) -> None:
    setting = Setting.of(CLAIM.task, seed=0, budget=Budget(epochs=10))  # 84 steps
    method = TrajectoryDistillation.for_setting(setting, lag=2)
    assert isinstance(method.loss, TrajectoryLoss)
    assert (method.loss.start_epoch, method.loss.lag) == (3, 2)
    average = TrajectoryDistillation.for_setting(setting, variant="mesa", weight=0.5)
    assert isinstance(average, EMADistillation)
    assert average.options["start_epoch"] == 3 and average.options["decay"] == pytest.approx(1 - 5 / 84.375)
    long = TrajectoryDistillation.for_setting(replace(setting, budget=Budget(steps=10**6)), variant="mesa")
    assert long.options == {"decay": 0.9995, "start_epoch": 5, "temperature": 5.0, "end_epoch": None}
    timed = replace(setting, budget=Budget(seconds=5.0))
    assert TrajectoryDistillation.for_setting(timed).loss.start_epoch == 5
    with pytest.raises(ValueError, match='variant must be "saf" or "mesa", got \'sam\''):
        TrajectoryDistillation.for_setting(setting, variant="sam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decay is for variant mesa"):
        TrajectoryDistillation.for_setting(setting, decay=0.9)


def test_a_budget_too_short_to_act_in_is_said_aloud() -> None:
    setting = Setting.of(CLAIM.task, seed=0, budget=Budget(epochs=3))
    with pytest.warns(UserWarning, match="saf acts from epoch 3 on and this budget ends after 3"):
        TrajectoryDistillation.for_setting(setting)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrajectoryDistillation.for_setting(replace(setting, smoke=True))
        TrajectoryDistillation.for_setting(replace(setting, budget=Budget(epochs=4)))


def test_the_sharpness_aware_rival_takes_the_gradient_uphill_and_puts_the_weights_back() -> None:
    method = SharpnessAwareMinimization()
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(2.0)
    step = TrainingStep(model, lambda outputs, targets: outputs.pow(2).mean(), [method])
    step.backward(step(torch.ones(1, 1, dtype=torch.float64)))
    assert model.weight.item() == 2.0
    assert model.weight.grad.item() == pytest.approx(2 * 2.05)  # w^2 has the gradient 2 w at w + rho


def test_the_claim_runs() -> None:
    found = verify("saf", smoke=True, seeds=1)
    assert set(found["arms"]) == {"sgd", "saf", "mesa", "sam"}
    assert found["arms"]["saf"]["metrics"].keys() >= {"accuracy", "learning_rate", "final_relative_curvature"}


def test_the_claims_data_are_disjoint() -> None:
    splits = CLAIM.task.load(1)
    assert (len(splits.train), len(splits.validation)) == (540, 362)
    rows = [
        {tuple(row) for row in part.inputs.flatten(1).tolist()}
        for part in (splits.train, splits.test, splits.validation)
    ]
    assert not (rows[0] & rows[1] or rows[0] & rows[2] or rows[1] & rows[2])
