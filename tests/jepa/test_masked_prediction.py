"""Masked latent prediction: what is seen and what is not, the slow copy, the hooks, and every kind of run."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes, weights
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.data import BlockMask1d, MaskRequest, Masks, MultiBlock2d, RandomColumns, RandomTokens
from coloss.errors import InputError
from coloss.jepa import (
    EffectiveRankMonitor,
    LeJEPA,
    MaskedPrediction,
    between_sample_std,
    find_token_encoder,
)
from coloss.nn import MLP, Classifier, MaskTokenPredictor, TokenEncoder, Words, token_encoder_for_shape
from coloss.ops import latent_prediction_loss
from coloss.train import Budget, State, TrainingStep, linear

SHAPES = {"images": (1, 8, 8), "series": (2, 24), "rows": (10,)}
BLOCKS = {"images": MultiBlock2d, "series": BlockMask1d, "rows": RandomColumns}


def new_encoder(kind: str = "images", **options) -> TokenEncoder:
    torch.manual_seed(0)
    return token_encoder_for_shape(SHAPES[kind], **({"dim": 8, "depth": 1, "heads": 2} | options))


def new_classifier() -> nn.Module:
    return Classifier(new_encoder(registers=1), 3)


def small(*arguments, **options) -> MaskedPrediction:
    return MaskedPrediction(*arguments, **({"predictor_depth": 1, "predictor_heads": 2} | options))


def samples(kind: str = "images", count: int = 24) -> Tensor:
    inputs = torch.randn(count, *SHAPES[kind], generator=torch.Generator().manual_seed(1))
    if kind == "rows":
        inputs[::3, 1] = torch.nan  # missing values
    return inputs


def batches(labelled: bool = False) -> list[tuple[Tensor, ...]]:
    inputs, targets = samples(), torch.arange(24) % 3
    return list(zip(inputs.split(8), targets.split(8))) if labelled else [(part,) for part in inputs.split(8)]


def one_step(
    method: MaskedPrediction, model: nn.Module, inputs: Tensor
) -> tuple[TrainingStep, dict[str, Tensor]]:
    state = State(model)
    state.generator.manual_seed(0)
    state.local_generator.manual_seed(1)
    torch.manual_seed(2)
    step = TrainingStep(model, None, [method], state=state)
    return step, step(inputs)


def half(request: MaskRequest) -> Masks:
    """The first half of the tokens is seen, the second is to be predicted in two sets."""
    middle = request.num_tokens // 2
    context = torch.arange(middle).expand(1, request.batch_size, -1)
    return Masks(context, (context + middle).reshape(1, request.batch_size, 2, -1)[0].permute(1, 0, 2))


@pytest.mark.parametrize("kind", SHAPES)
def test_images_series_and_tables_have_their_own_masks_and_train(kind: str) -> None:
    method, model = small(), new_encoder(kind)
    before = weights(model)
    run = coloss.fit(model, (samples(kind),), methods=[method], budget=Budget(steps=3), batch_size=12)
    assert isinstance(method.masker, BLOCKS[kind])
    assert run.model is model
    assert weights(model).keys() == before.keys()
    unchanged = [name for name, value in weights(model).items() if torch.equal(value, before[name])]
    assert not unchanged
    assert run.history[-1].terms["latent_prediction"] > 0


def test_the_loss_is_that_of_the_definition_worked_sample_by_sample() -> None:
    method, model = small(half), new_encoder(registers=1).double()
    inputs = samples(count=3).double()
    _, terms = one_step(method, model, inputs)
    found = []
    for sample in inputs:
        targets = F.layer_norm(model.encode(sample[None])[0], (8,))
        tokens = model.tokenizer(sample[None])
        context = model.forward_tokens(tokens[:, :8])
        for hidden in ([8, 9, 10, 11], [12, 13, 14, 15]):
            predicted = method.predictor(context, torch.arange(8)[None], torch.tensor([hidden]))[0]
            found.append(F.smooth_l1_loss(predicted, targets[hidden]))
    assert terms["latent_prediction"].item() == pytest.approx(torch.stack(found).mean().item(), rel=1e-10)


def prediction_of(inputs: Tensor) -> Tensor:
    seen = []

    class Watched(MaskedPrediction):
        def extra_terms(self, predictions, targets, found, state):
            seen.append(predictions)
            return {}

    method = Watched(half, predictor_depth=1, predictor_heads=2)
    one_step(method, new_encoder(registers=1, depth=2).double(), inputs)
    return seen[0]


def test_hidden_parts_of_a_sample_do_not_reach_its_predictions() -> None:
    inputs = samples(count=2).double()
    plain, hidden_changed, seen_changed = prediction_of(inputs), inputs.clone(), inputs.clone()
    hidden_changed[:, :, 4:] += 3  # the last eight of sixteen patches
    torch.testing.assert_close(prediction_of(hidden_changed), plain, rtol=0, atol=1e-12)
    seen_changed[:, :, :2, :2] += 3
    assert (prediction_of(seen_changed) - plain).abs().max() > 1e-6


def test_no_gradient_reaches_the_slow_copy_and_it_stays_in_evaluation_mode() -> None:
    method = small()
    step, terms = one_step(method, new_encoder(dropout=0.5), samples())
    step.backward(terms)
    assert all(parameter.grad is None for parameter in method.target.parameters())
    assert not any(parameter.requires_grad for parameter in method.target.parameters())
    step.train()
    assert not any(module.training for module in method.target.module.modules())
    trained = {id(parameter) for parameter in step.trainable}
    assert trained == {id(p) for part in (step.model, method.predictor) for p in part.parameters()}
    assert all(p.grad is not None for p in step.trainable)


@pytest.mark.parametrize("momentum", [0.0, 1.0, 0.75])
def test_the_slow_copy_moves_after_the_step_by_one_minus_momentum(momentum: float) -> None:
    method, model = small(momentum=momentum), new_encoder()
    step, terms = one_step(method, model, samples())
    start = weights(model)
    optimizer = torch.optim.SGD(step.trainable, lr=0.1)
    step.backward(terms)
    optimizer.step()
    assert torch.equal(method.target.module.tokenizer.projection.weight, start["tokenizer.projection.weight"])
    step.after_step()
    for name, value in method.target.module.named_parameters():
        expected = momentum * start[name] + (1 - momentum) * model.get_parameter(name)
        torch.testing.assert_close(value, expected, rtol=0, atol=0 if momentum in (0, 1) else 1e-7)


def test_momentum_follows_progress_in_a_straight_line() -> None:
    seen = []

    class Watched(MaskedPrediction):
        def on_step(self, state):
            super().on_step(state)
            seen.append(self.target.decay)

    method = Watched(momentum=linear(0.5, 1.0))
    coloss.fit(new_encoder(), (samples(),), methods=[method], budget=Budget(steps=4), batch_size=8)
    assert seen == pytest.approx([0.625, 0.75, 0.875, 1.0])


@pytest.mark.parametrize("ships", [None, "target", "online"])
@pytest.mark.parametrize("objective", [None, F.cross_entropy])
def test_the_weights_that_ship(ships, objective) -> None:
    method = small(ships=ships, momentum=0.5)
    model = new_classifier() if objective else new_encoder()
    data = (samples(), torch.arange(24) % 3)
    run = coloss.fit(model, data, objective, [method], budget=Budget(steps=3), batch_size=8)
    shipped, slow = find_token_encoder(run.model), method.target.module
    same = all(torch.equal(a, b) for a, b in zip(shipped.parameters(), slow.parameters()))
    assert same == (ships == "target" or (ships is None and objective is None))
    assert not any("predictor" in name or "target" in name for name in run.model.state_dict())


@pytest.mark.parametrize("objective", [None, F.cross_entropy])
def test_fit_a_plain_loop_and_lightning_take_the_same_steps(objective) -> None:
    new_model = new_classifier if objective else new_encoder
    check_loops(new_model, small, batches(labelled=objective is not None), objective)


@pytest.mark.parametrize("objective", [None, F.cross_entropy])
def test_a_killed_run_resumes_bit_identically(objective, tmp_path: Path) -> None:
    def new_model() -> nn.Module:
        encoder = new_encoder(dropout=0.1)
        return Classifier(encoder, 3) if objective else encoder

    check_resume(new_model, small, (samples(), torch.arange(24) % 3), tmp_path, objective)


@pytest.mark.parametrize("ragged", [False, True])
def test_two_processes_with_the_same_masks_take_the_steps_of_one(ragged: bool, tmp_path: Path) -> None:
    def masker(request: MaskRequest) -> Masks:
        """Without chance; with `ragged`, the more is hidden the larger the first pixel."""
        if not ragged:
            return half(request)
        hidden = 3 + (request.inputs[:, 0, 0, 0] > 0).long()[:, None] * 5
        mask = (torch.arange(16) < hidden)[None]
        return Masks.of(~mask, mask)

    def train(fabric: Fabric) -> dict[str, Tensor]:
        model, method = new_encoder().double(), small(masker)
        torch.manual_seed(0)
        coloss.fit(
            model,
            (samples().double(),),
            methods=[method],
            budget=Budget(steps=4),
            batch_size=8,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            fabric=fabric,
        )
        return weights(model) | {
            f"predictor.{name}": value for name, value in weights(method.predictor).items()
        }

    check_two_processes(train, tmp_path)


def test_another_method_sees_the_whole_batch_as_without_this_one() -> None:
    seen = []

    class Watcher(coloss.Method):
        def setup(self, state):
            state.tap("tokens", "transformer")

        def terms(self, state):
            seen.append((state.outputs, state.features["tokens"], state.batch.inputs))
            return {}

    step = TrainingStep(new_encoder(), None, [Watcher(), small(), Watcher()])
    inputs = samples()
    step(inputs)
    for outputs, tokens, batch in seen:
        assert torch.equal(outputs, step.model(inputs))
        assert tokens.shape == (24, 16, 8)
        assert batch is inputs


def test_it_composes_with_views_a_monitor_and_an_objective() -> None:
    monitor = EffectiveRankMonitor(every=2, min_scale=0.0, min_spread=0.0, min_rank_share=0.0)
    methods = [LeJEPA(views=2, projector=(8, 4), num_slices=4), small(), monitor]
    run = coloss.fit(new_encoder(), (samples(),), methods=methods, budget=Budget(steps=2), log_every=1)
    assert set(run.history[-1].terms) == {"invariance", "sigreg", "latent_prediction"}
    assert monitor.found
    second = small(weight=0.5)
    data = (samples(), torch.arange(24) % 3)
    run = coloss.fit(new_classifier(), data, F.cross_entropy, [second], budget=Budget(steps=2), log_every=1)
    assert set(run.history[-1].terms) == {"cross_entropy", "latent_prediction"}
    assert second.term_weights == {"latent_prediction": 0.5}


def test_micro_batches_add_up_to_the_large_batch() -> None:
    found = []
    for accumulate, size in ((1, 24), (3, 8)):
        method, model = small(half), new_encoder().double()
        coloss.fit(
            model,
            (samples().double(),),
            methods=[method],
            budget=Budget(steps=2),
            batch_size=size,
            accumulate=accumulate,
            optimizer=partial(torch.optim.SGD, lr=0.1),
        )
        assert method.target.updates == 2
        found.append(weights(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-12)


def test_each_set_of_targets_may_have_a_context_of_its_own() -> None:
    def growing(request: MaskRequest) -> Masks:
        """Tokens 0-3, then 0-7, are seen; 4-7, then 8-15, follow; the second sample has no second part."""
        order = torch.arange(16)
        seen = torch.stack([order < 4, order < 8])[:, None].expand(2, 2, 16)
        next_part = torch.stack([(order >= 4) & (order < 8), order >= 8])[:, None].repeat(1, 2, 1)
        next_part[1, 1] = False
        return Masks.of(seen, next_part)

    method, model = small(growing), new_encoder().double()
    inputs = samples(count=2).double()
    _, terms = one_step(method, model, inputs)
    tokens, targets = model.tokenizer(inputs), F.layer_norm(model.encode(inputs), (8,))
    total, count = 0.0, 0
    for sample, end, goal in ((0, 4, range(4, 8)), (1, 4, range(4, 8)), (0, 8, range(8, 16))):
        context = model.forward_tokens(tokens[[sample], :end])
        hidden = torch.tensor([list(goal)])
        predicted = method.predictor(context, torch.arange(end)[None], hidden)[0]
        total += (
            F.smooth_l1_loss(predicted, targets[sample, hidden[0]], reduction="none").mean(-1).sum().item()
        )
        count += len(goal)
    assert terms["latent_prediction"].item() == pytest.approx(total / count, rel=1e-10)


def test_padding_is_neither_seen_nor_predicted() -> None:
    torch.manual_seed(0)
    encoder = TokenEncoder(Words(20, 8, max_length=12), 8, depth=1, heads=2).double()
    ids = torch.randint(1, 20, (4, 6))
    padded = F.pad(ids, (0, 4))

    def masker(request: MaskRequest) -> Masks:
        hidden = torch.zeros(1, request.batch_size, request.num_tokens, dtype=torch.bool)
        hidden[..., 3:] = True
        return Masks.of(~hidden, hidden)

    values = [one_step(small(masker), encoder, part)[1]["latent_prediction"].item() for part in (ids, padded)]
    assert values[0] == pytest.approx(values[1], rel=1e-10)


def test_nothing_hidden_costs_nothing() -> None:
    step, terms = one_step(small(RandomTokens((1.0, 1.0))), new_encoder(), samples())
    step.backward(terms)
    assert terms["latent_prediction"] == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in step.trainable)


def test_a_masker_sees_inputs_tokens_progress_and_the_slow_copy() -> None:
    seen = []

    def masker(request: MaskRequest) -> Masks:
        seen.append(request)
        return half(request)

    method = small(masker)
    step, _ = one_step(method, new_encoder(), samples())
    request = seen[0]
    assert request.grid == (4, 4)
    assert request.encoder is method.target.module
    assert torch.equal(request.tokens, request.encoder.encode(request.inputs))
    assert not request.tokens.requires_grad
    assert request.generator is step.state.local_generator
    assert request.shared_generator is step.state.generator


def test_hooks_of_a_subclass() -> None:
    class Pooled(MaskedPrediction):
        """Predicts the mean of each set of hidden tokens, through a map of its own, with a second term."""

        def new_masker(self, encoder):
            return half

        def new_predictor(self, encoder):
            return MaskTokenPredictor(
                8, encoder.tokenizer.grid, width=8, depth=1, heads=2, output=nn.Linear(8, 3)
            )

        def form_targets(self, found):
            return super().form_targets(found)[..., :3]

        def extra_terms(self, predictions, targets, found, state):
            return {"size": predictions.square().mean()}

    method = Pooled(kind="mse", target_norm=None)
    method.term_weights = {**method.term_weights, "size": 0.1}
    run = coloss.fit(new_encoder(), (samples(),), methods=[method], budget=Budget(steps=2), log_every=1)
    assert set(run.history[-1].terms) == {"latent_prediction", "size"}


def test_the_meter_is_logged_and_falls_to_zero_when_all_samples_are_encoded_alike() -> None:
    run = coloss.fit(
        new_encoder(), (samples(),), methods=[small(meter_every=2)], budget=Budget(steps=4), log_every=2
    )
    assert all(point.metrics["target_std"] > 0 for point in run.history[:2])
    tokens = torch.randn(1, 5, 4)
    assert between_sample_std(tokens.expand(7, -1, -1)).item() == pytest.approx(0, abs=1e-6)
    assert between_sample_std(tokens) == 0
    assert between_sample_std(tokens[:, :0]) == 0
    many = torch.randn(4000, 2, 3, generator=torch.Generator().manual_seed(0))
    assert between_sample_std(many).item() == pytest.approx(1, abs=0.02)
    assert between_sample_std(many.bfloat16()).dtype == torch.float32


def test_bfloat16_training() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    run = coloss.fit(new_encoder(), (samples(),), methods=[small()], budget=Budget(steps=2), fabric=fabric)
    assert torch.tensor(list(run.history[-1].terms.values())).isfinite().all()
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())


def test_a_trained_predictor_beats_the_mean_of_the_targets() -> None:
    """The second half of a row repeats the first, so hidden columns can be told from visible ones."""
    rows = torch.randn(128, 2, generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    torch.manual_seed(0)
    encoder = token_encoder_for_shape((4,), dim=8, depth=1, heads=2)
    frozen = MaskedPrediction(
        half, momentum=1.0, kind="mse", target_norm=None, predictor_width=16, predictor_depth=1
    )
    run = coloss.fit(
        encoder,
        (rows,),
        methods=[frozen],
        budget=Budget(steps=60),
        batch_size=32,
        optimizer=partial(torch.optim.AdamW, lr=2e-2),
    )
    target = frozen.target.module
    with torch.no_grad():
        hidden = target.encode(rows)[:, 2:]
        variance = latent_prediction_loss(hidden.mean(0).expand_as(hidden), hidden, "mse").item()
    assert run.history[-1].terms["latent_prediction"] < 0.8 * variance


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MaskedPrediction(kind="huber"), "kind must be one of l1"),
        (lambda: MaskedPrediction(target_norm="batch"), 'target_norm must be "layer" or None'),
        (lambda: MaskedPrediction(momentum=1.5), r"momentum must be in \[0, 1\], or a schedule, got 1.5"),
        (lambda: MaskedPrediction(weight=-1), "weight must be >= 0, or a schedule, got -1"),
        (lambda: MaskedPrediction(ships="both"), "ships must be"),
        (lambda: MaskedPrediction(meter_every=0), "meter_every must be >= 1, got 0"),
        (lambda: MaskedPrediction(predictor_width=0), "predictor_width must be >= 1, or None, got 0"),
        (lambda: MaskedPrediction(predictor_depth=-1), "predictor_depth must be >= 0, got -1"),
        (lambda: MaskedPrediction(predictor_heads=0), "predictor_heads must be >= 1, got 0"),
        (
            lambda: MaskedPrediction(predictor_positions="rotary"),
            'predictor_positions must be "sinusoidal" or "learned", got \'rotary\'',
        ),
        (
            lambda: one_step(
                MaskedPrediction(predictor_width=6, predictor_heads=4), new_encoder(), samples()
            ),
            "the predictor cannot be built: dim must be a multiple of 4 for 2 axes, got 6",
        ),
        (lambda: find_token_encoder(MLP(4, (4,))), "coloss.nn.TokenEncoder, or hold one, got MLP"),
        (
            lambda: find_token_encoder(nn.ModuleList([new_encoder(), new_encoder()])),
            "set encoder to one of 0, 1",
        ),
        (
            lambda: find_token_encoder(new_classifier(), "trunk"),
            "encoder must name a module of the model, got 'trunk'",
        ),
        (
            lambda: find_token_encoder(new_classifier(), "head"),
            "must name a coloss.nn.TokenEncoder, got Linear",
        ),
        (
            lambda: coloss.fit(
                MLP(64, (4,)), (samples(),), methods=[MaskedPrediction()], budget=Budget(steps=1)
            ),
            "token_encoder_for_shape builds one for the shape of your data",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message, as_users_call: None) -> None:
    with pytest.raises(InputError, match=message):
        call()


class Watched(nn.Module):
    """An encoder, and how often it is asked for features of whole samples."""

    def __init__(self, stem):
        super().__init__()
        self.stem, self.encoder, self.passes = stem, token_encoder_for_shape((1, 8, 8), dim=16), 0

    def forward(self, inputs):
        self.passes += 1
        return self.encoder(self.stem(inputs))


@pytest.mark.parametrize(("stem", "passes"), [(nn.Identity(), 0), (nn.BatchNorm2d(1), 2)])
def test_the_runs_own_pass_is_left_out_unless_a_batch_norm_needs_it(stem, passes):
    model = Watched(stem)
    coloss.fit(
        model, (torch.randn(16, 1, 8, 8),), methods=[MaskedPrediction()], budget=Budget(steps=2), batch_size=8
    )
    assert model.passes == passes
