import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss import Budget, Method, TrainingStep
from coloss.classification import FactoredOutput, FactoredSphericalLinear, SphericalObjective, z_loss
from coloss.classification.spherical_training import CLAIM, SYSTEM
from coloss.errors import InputError
from coloss.lab import find_entry, verify
from coloss.lab.catalog import import_name
from coloss.nn import MLP, Classifier

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
STEPS = Budget(steps=6)
CLASSES = 12


def new_model() -> Classifier:
    return Classifier(MLP(6, [5], norm=None), CLASSES)


def new_batches(count: int = 6, rows: int = 16) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(rows, 6), torch.randint(CLASSES, (rows,))) for _ in range(count)]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


class Smoothness(Method):
    """A second source of loss on the same run."""

    def setup(self, state: coloss.State) -> None:
        state.tap("hidden", "backbone")

    def terms(self, state: coloss.State) -> dict[str, Tensor]:
        return {"smoothness": state.features["hidden"].square().mean()}


class Killed(Exception):
    pass


class Kill(Method):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def on_step(self, state: coloss.State) -> None:
        if state.step == self.at:
            raise Killed


@pytest.mark.parametrize(
    ("kind", "term", "options"),
    [
        ("z", "z_loss", {"sharpness": 2.0, "location": 1.0}),
        ("taylor-softmax", "taylor_softmax_loss", {}),
        ("spherical-softmax", "spherical_softmax_loss", {"eps": 0.5}),
        ("squared-error", "squared_error_loss", {}),
    ],
)
def test_the_objective_is_the_loss(kind: Any, term: str, options: dict[str, float]) -> None:
    from coloss.classification import spherical_loss, spherical_statistics

    model, batch = new_model(), new_batches(1)[0]
    step = TrainingStep(model, F.cross_entropy, [SphericalObjective(kind, **options)])
    terms = step(*batch)
    assert list(terms) == [term]
    expected = spherical_loss(kind, **options)(spherical_statistics(model(batch[0]), batch[1])).mean()
    torch.testing.assert_close(terms[term], expected.float())


def test_the_objective_composes_and_a_killed_run_resumes_bit_identically(tmp_path: Path) -> None:
    for make in (
        SphericalObjective,
        lambda: FactoredOutput(lambda progress: 0.5 - 0.4 * progress, stabilize_every=2),
    ):
        data, start = (torch.randn(64, 6), torch.randint(CLASSES, (64,))), new_model()
        folder = tmp_path / make().__class__.__name__

        def run(
            kill_at: int, make: Any = make, data: Any = data, start: Any = start, **options: Any
        ) -> dict[str, Tensor]:
            trained = copy.deepcopy(start)
            found = coloss.fit(
                trained,
                data,
                None,
                [make(), Smoothness(), Kill(kill_at)],
                batch_size=16,
                budget=Budget(steps=9),
                optimizer=SGD,
                **options,
            )
            assert set(found.history[-1].terms) == {"z_loss", "smoothness"}
            return weights(trained)

        whole = run(kill_at=0)
        kept = {"checkpoint_dir": folder, "checkpoint_every": 2}
        with pytest.raises(Killed):
            run(kill_at=7, **kept)
        resumed = run(kill_at=0, resume=True, **kept)
        assert whole.keys() == weights(start).keys()
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_factored_training_is_dense_training_with_sgd() -> None:
    # Everything with plain SGD: then the factored layer and a dense layer with the same loss take the same steps.
    model, batches = new_model().double(), [(x.double(), y) for x, y in new_batches()]
    dense, factored = copy.deepcopy(model), copy.deepcopy(model)
    plain = partial(torch.optim.SGD, lr=0.3)
    common: dict[str, Any] = {
        "budget": STEPS,
        "optimizer": plain,
        "learning_rate_schedule": lambda p: 1 - 0.5 * p,
    }
    coloss.fit(dense, batches, methods=[SphericalObjective(location=2.0)], **common)
    method = FactoredOutput(lambda progress: 0.3 * (1 - 0.5 * progress), location=2.0)
    run = coloss.fit(factored, batches, methods=[method], **common)
    assert not torch.allclose(weights(model)["head.weight"], weights(dense)["head.weight"])
    for name, value in weights(dense).items():
        torch.testing.assert_close(weights(factored)[name], value, rtol=0, atol=1e-8, msg=name)
    assert run.model is factored and isinstance(factored.head, nn.Linear)
    assert not any(module._forward_hooks for module in factored.modules())


def test_in_evaluation_the_model_gives_logits_in_training_features() -> None:
    model, (inputs, target) = new_model(), new_batches(1)[0]
    expected = model.eval()(inputs)
    step = TrainingStep(model.train(), None, [FactoredOutput(0.1)])
    step(inputs, target)
    assert step.state.outputs.shape == (16, 5)
    torch.testing.assert_close(model.eval()(inputs), expected)
    finished = step.finish()
    assert finished is model
    torch.testing.assert_close(model(inputs), expected)


def test_rows_of_tokens_are_rows() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, CLASSES))
    inputs, target = torch.randn(4, 3, 6), torch.randint(CLASSES, (4, 3))
    expected = z_loss(model(inputs).flatten(0, 1), target.flatten())
    logits = model(inputs)
    step = TrainingStep(model, None, [FactoredOutput(0.1)])
    torch.testing.assert_close(step(inputs, target)["z_loss"], expected)
    torch.testing.assert_close(model.eval()(inputs), logits)


def test_a_plain_loop_and_fit_take_the_same_steps() -> None:
    batches, model = new_batches(), new_model()
    fitted, looped = copy.deepcopy(model), copy.deepcopy(model)
    coloss.fit(fitted, batches, methods=[FactoredOutput(0.2)], budget=STEPS, optimizer=SGD)
    step = TrainingStep(looped, None, [FactoredOutput(0.2)], total_steps=6)
    optimizer = SGD(step.trainable)
    for batch in batches:
        optimizer.zero_grad()
        step.backward(step(*batch))
        optimizer.step()
        step.after_step()
    step.finish()
    assert all(torch.equal(value, weights(looped)[name]) for name, value in weights(fitted).items())


def test_a_conflict_monitor_changes_nothing() -> None:
    batches, model = new_batches(), new_model()
    runs = []
    for monitor in (None, coloss.ConflictMonitor(every=1)):
        trained = copy.deepcopy(model)
        coloss.fit(
            trained,
            batches,
            methods=[FactoredOutput(0.2), Smoothness()],
            budget=STEPS,
            optimizer=SGD,
            monitor=monitor,
        )
        runs.append(weights(trained))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_in_lightning_the_layer_is_called_by_hand() -> None:
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader

    batches, start = new_batches(), new_model()
    fitted = copy.deepcopy(start)
    coloss.fit(fitted, batches, methods=[FactoredOutput(0.2)], budget=STEPS, optimizer=SGD)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = copy.deepcopy(start.backbone)
            self.head = FactoredSphericalLinear.from_linear(start.head, 0.2)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.head(self.backbone(batch[0]), batch[1])

        def on_train_batch_end(self, *_: Any) -> None:
            self.head.step()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return SGD(self.parameters())

    module = Module()
    off = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    Trainer(max_epochs=1, accelerator="cpu", **off).fit(module, DataLoader(batches, batch_size=None))
    torch.testing.assert_close(module.head.to_linear().weight, fitted.head.weight, rtol=0, atol=1e-7)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    def train(fabric: Fabric) -> dict[str, Tensor]:
        """Weights after four epochs in float64."""
        torch.manual_seed(0)
        model = Classifier(MLP(6, [5], norm=None), 20).double()
        run = coloss.fit(
            model,
            (torch.randn(48, 6, dtype=torch.float64), torch.randint(20, (48,))),
            methods=[FactoredOutput(0.5, stabilize_every=3, weight_decay=0.01)],
            batch_size=16,
            budget=Budget(epochs=4),
            optimizer=SGD,
            fabric=fabric,
        )
        return dict(run.model.state_dict())

    check_two_processes(train, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -0.1}, "learning_rate must be >= 0 and finite, or a schedule, got -0.1"),
        ({"kind": "softmax"}, "the kind of loss must be"),
        ({"sharpness": 0.0}, "sharpness must be > 0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
        ({"stabilize_every": 0}, "stabilize_every must be >= 1, got 0"),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FactoredOutput(**options)
    if set(options) <= {"kind", "sharpness"}:
        with pytest.raises(InputError, match=message):
            SphericalObjective(**options)


def test_what_cannot_be_factored_is_refused() -> None:
    with pytest.raises(InputError, match="classifier must name an nn.Linear of the model, got 'backbone'"):
        TrainingStep(new_model(), None, [FactoredOutput(classifier="backbone")])
    with pytest.raises(InputError, match="the model must be more than the linear layer itself"):
        TrainingStep(nn.Linear(3, 4), None, [FactoredOutput()])
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(InputError, match=r"the weight of 1 must not be shared, it is also 0\.weight"):
        TrainingStep(tied, None, [FactoredOutput()])


def test_a_backward_pass_taken_over_is_refused() -> None:
    with pytest.raises(InputError, match="needs the plain backward pass"):
        coloss.fit(
            new_model(),
            new_batches(),
            methods=[FactoredOutput(), _Takes()],
            budget=STEPS,
        )


class _Takes(Method):
    def backward(self, state: coloss.State, terms: dict[str, Tensor]) -> None:
        state.set_gradients(state.gradients(state.combine(state, terms)))


# In the lab


def test_the_catalog_entry_names_what_exists() -> None:
    entry = find_entry("z-loss")
    assert entry.has_claim and entry.method == "coloss.classification.SphericalObjective"
    assert [import_name(path).__name__ for path in SYSTEM.api] == [path.split(".")[-1] for path in SYSTEM.api]


def test_the_claim_runs() -> None:
    found = verify("z-loss", smoke=True, seeds=1)
    assert set(found["arms"]) == {arm.name for arm in CLAIM.arms}
    assert found["arms"][CLAIM.method]["metrics"].keys() >= {CLAIM.metric, "top_1", "top_50"}
