"""Series without labels: what is prepared, hidden and predicted, every kind of run, and the recipe from file to stored encoder."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.data import BlockMask1d, MaskRequest, Masks, RandomTokens, sample_block_mask_1d
from coloss.errors import InputError
from coloss.jepa import (
    EffectiveRankMonitor,
    SeriesCrops,
    SeriesModel,
    SeriesPrediction,
    SeriesPreparation,
    few_label_probes,
    fill_gaps,
    fine_tune_series,
    load_series_encoder,
    new_series_encoder,
    order_channels,
    pretrain_series,
    read_series,
    remove_drift,
    train_series_encoder,
)
from coloss.jepa.series_prediction import default_patch_size
from coloss.lab.claims import verify
from coloss.nn import Classifier, token_encoder_for_shape
from coloss.ops import latent_prediction_loss
from coloss.train import Budget, State, TrainingStep
from coloss.train.checkpoint import checkpoints

NAN = float("nan")


def new_encoder(channels: int = 2, steps: int = 24, **options):
    torch.manual_seed(0)
    options = {"dim": 8, "depth": 1, "heads": 2, "patch_size": 2, "registers": 1} | options
    return token_encoder_for_shape((channels, steps), **options)


def small(**options) -> SeriesPrediction:
    return SeriesPrediction(**({"predictor_heads": 2, "momentum": 0.5} | options))


def series(count: int = 24, channels: int = 2, steps: int = 24) -> Tensor:
    return torch.randn(count, channels, steps, generator=torch.Generator().manual_seed(1))


def batches(labelled: bool) -> list[tuple[Tensor, ...]]:
    inputs, targets = series(), torch.arange(24) % 3
    return list(zip(inputs.split(8), targets.split(8))) if labelled else [(part,) for part in inputs.split(8)]


# Masks and loss


@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 12), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_blocks_hide_exactly_what_is_not_kept_and_are_long_enough(n, keep, min_block, seed) -> None:
    keep = min(keep, n)
    hidden = sample_block_mask_1d(n, keep, min_block, torch.Generator().manual_seed(seed))
    assert int(hidden.sum()) == n - keep
    runs = "".join("x" if value else " " for value in hidden.tolist()).split()
    assert all(len(run) >= min(min_block, n - keep) for run in runs)


def test_a_batch_shares_its_share_of_visible_tokens_and_not_their_places() -> None:
    encoder = new_encoder(steps=400)
    masker = small().new_masker(encoder)
    assert isinstance(masker, BlockMask1d)
    assert masker.min_block == 10
    assert small(min_block=4).new_masker(encoder).min_block == 4
    masks = masker(MaskRequest(6, (200,), torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)))
    assert (
        torch.cat([masks.context, masks.targets], 2).sort().values.equal(torch.arange(200).expand(1, 6, -1))
    )
    assert 40 <= masks.context.shape[2] <= 80
    assert not torch.equal(masks.context[0, 0], masks.context[0, 1])


def test_nothing_hidden_costs_nothing_and_is_no_nan() -> None:
    step = TrainingStep(new_encoder(), None, [small(keep=(1.0, 1.0))])
    terms = step(series())
    assert terms["latent_prediction"] == 0
    step.backward(terms)


def test_the_loss_is_the_mean_absolute_difference_to_plain_targets() -> None:
    def half(request: MaskRequest) -> Masks:
        context = torch.arange(6).expand(1, request.batch_size, -1)
        return Masks(context, context + 6)

    method, model, inputs = small(masker=half), new_encoder().double(), series(5).double()
    terms = TrainingStep(model, None, [method])(inputs)
    context = model.forward_tokens(model.tokenizer(inputs), torch.arange(6))
    rows = torch.arange(6).expand(5, -1)
    predicted = method.predictor(context, rows, rows + 6)
    expected = (predicted - model.encode(inputs)[:, 6:]).abs().mean()
    assert terms["latent_prediction"].item() == pytest.approx(expected.item(), rel=1e-10)


def test_l1_is_zero_for_equal_tensors_and_its_gradient_is_sign_over_count() -> None:
    target = series(3)
    assert latent_prediction_loss(target, target, "l1") == 0
    prediction = (target + torch.randn_like(target)).requires_grad_()
    latent_prediction_loss(prediction, target, "l1").backward()
    torch.testing.assert_close(prediction.grad, (prediction - target).sign().detach() / target.numel())


def test_all_tokens_kept_equals_no_mask_with_a_register_in_front() -> None:
    encoder, inputs = new_encoder(depth=2).double(), series(3).double()
    kept = encoder.forward_tokens(encoder.tokenizer(inputs), torch.arange(12))
    torch.testing.assert_close(kept, encoder.encode(inputs), rtol=0, atol=1e-12)


def test_the_predictor_does_not_mind_the_order_of_the_context() -> None:
    method, model = small(), new_encoder().double()
    TrainingStep(model, None, [method])(series(4).double())
    context, places, hidden = (
        torch.randn(2, 5, 8).double(),
        torch.arange(5).expand(2, -1),
        torch.tensor([[7, 9]] * 2),
    )
    order = torch.tensor([3, 0, 4, 1, 2])
    one = method.predictor(context, places, hidden)
    torch.testing.assert_close(
        method.predictor(context[:, order], places[:, order], hidden), one, rtol=0, atol=1e-12
    )


# The slow copy


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_slow_copy_moves_once_for_each_optimizer_step(accumulate: int) -> None:
    method = small()
    data = (series(),)
    run = coloss.fit(
        new_encoder(), data, methods=[method], budget=Budget(steps=4), batch_size=4, accumulate=accumulate
    )
    assert run.steps == 4
    assert method.target.updates == 4


def test_looking_at_the_model_does_not_move_the_slow_copy() -> None:
    method, model = small(momentum=0.0), new_encoder()
    step = TrainingStep(model, None, [method])
    before = weights(method.target)
    for _ in range(3):
        step(series())
    with torch.no_grad():
        model(series())
    assert all(torch.equal(value, before[name]) for name, value in weights(method.target).items())
    assert all(p.grad is None and not p.requires_grad for p in method.target.parameters())


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_limits_of_the_momentum(momentum: float) -> None:
    method, model = small(momentum=momentum), new_encoder()
    start = weights(model)
    run = train_series_encoder(model, series(), method=method, budget=Budget(steps=3), batch_size=8)
    slow, predicted = weights(method.target.module), weights(run.model)
    assert all(torch.equal(slow[name], predicted[name]) for name in slow)  # it ships
    assert all(torch.equal(slow[name], start[name]) for name in slow) == (momentum == 1.0)


# Every kind of run


@pytest.mark.parametrize("objective", [None, F.cross_entropy])
def test_fit_a_plain_loop_and_lightning_take_the_same_steps(objective) -> None:
    def new_model() -> nn.Module:
        return Classifier(new_encoder(), 3) if objective else new_encoder()

    check_loops(new_model, small, batches(objective is not None), objective)


def test_a_killed_run_resumes_bit_identically_with_crops(tmp_path: Path) -> None:
    def crops_first() -> SeriesPrediction:
        return small(masker=RandomTokens((0.3, 0.5)))

    check_resume(new_encoder, crops_first, (series(), torch.arange(24) % 3), tmp_path)


def test_two_processes_with_the_same_masks_take_the_steps_of_one(tmp_path: Path) -> None:
    def half(request: MaskRequest) -> Masks:
        context = torch.arange(6).expand(1, request.batch_size, -1)
        return Masks(context, context + 6)

    def train(fabric: Fabric) -> dict[str, Tensor]:
        model = new_encoder().double()
        torch.manual_seed(0)
        coloss.fit(
            model, (series().double(),), methods=[small(masker=half)], budget=Budget(steps=3), batch_size=8,
            optimizer=partial(torch.optim.SGD, lr=0.1), fabric=fabric,
        )  # fmt: skip
        return weights(model)

    check_two_processes(train, tmp_path)


def test_it_composes_with_crops_a_monitor_and_an_objective() -> None:
    monitor = EffectiveRankMonitor(every=2, min_scale=0.0, min_spread=0.0, min_rank_share=0.0)
    data = (series(steps=40), torch.arange(24) % 3)
    model = Classifier(new_encoder(), 3)
    run = coloss.fit(
        model, data, F.cross_entropy, [SeriesCrops(24), small(weight=0.5), monitor], budget=Budget(steps=2), log_every=1
    )  # fmt: skip
    assert set(run.history[-1].terms) == {"cross_entropy", "latent_prediction"}
    assert run.history[-1].metrics.keys() >= {"rank"} or monitor.found
    assert run.model(data[0][..., :24]).shape == (24, 3)


def test_bfloat16_training() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    run = coloss.fit(new_encoder(), (series(),), methods=[small()], budget=Budget(steps=2), fabric=fabric)
    assert torch.tensor(list(run.history[-1].terms.values())).isfinite().all()


def test_crops_are_windows_of_each_series_and_differ() -> None:
    state = State(new_encoder())
    state.local_generator.manual_seed(0)
    clock = torch.arange(100.0).expand(16, 2, -1)
    state.batch = coloss.data.Batch(clock)
    SeriesCrops(24).on_batch(state)
    crops = state.batch.inputs
    assert crops.shape == (16, 2, 24)
    assert torch.equal(crops.diff(dim=2), torch.ones(16, 2, 23))
    assert torch.equal(crops[:, 0], crops[:, 1])
    assert len(crops[:, 0, 0].unique()) > 8
    SeriesCrops(24).on_batch(state)
    assert state.batch.inputs is crops
    with pytest.raises(InputError, match="size must be at most the 24 steps of the series, got 25"):
        SeriesCrops(25).on_batch(state)


# Preparation


@given(st.integers(0, 1000), st.integers(1, 12), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_gaps_are_filled_as_numpy_interpolates(seed: int, steps: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((2, 3, steps))
    values[rng.random(values.shape) < share] = np.nan
    expected = values.copy()
    for row in expected.reshape(-1, steps):
        known = np.isfinite(row)
        row[:] = np.interp(np.arange(steps), np.flatnonzero(known), row[known]) if known.any() else 7.0
    found = fill_gaps(torch.from_numpy(values), empty=7.0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_infinite_steps_are_gaps_and_whole_series_are_left_alone() -> None:
    assert fill_gaps(torch.tensor([1.0, float("inf"), 3.0])).tolist() == [1, 2, 3]
    whole = series()
    assert torch.equal(fill_gaps(whole), whole)
    assert fill_gaps(torch.tensor([NAN, 1.0], dtype=torch.float16)).dtype == torch.float32


def test_each_channel_is_scaled_by_its_training_statistics_and_clipped() -> None:
    train = series(200, 2, 30) * torch.tensor([[3.0], [0.01]]) + torch.tensor([[10.0], [-5.0]])
    preparation = SeriesPreparation(2, clip=2.0).measure(train)
    found = preparation(train)
    expected = ((train - train.mean((0, 2))[:, None]) / train.std((0, 2), correction=0)[:, None]).clamp(-2, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    assert found.abs().max() == 2


def test_a_missing_channel_becomes_its_mean_and_a_constant_one_keeps_its_scale() -> None:
    train = torch.stack([series(20, 1)[:, 0] + 4, torch.full((20, 24), 0.1), torch.full((20, 24), NAN)], 1)
    preparation = SeriesPreparation(3).measure(train)
    assert preparation.std[1:].tolist() == [1, 1]
    gone = train[:2].clone()
    gone[:, 0] = NAN
    assert preparation(gone).abs().max() < 1e-6


def test_double_precision_far_from_zero_is_centred_and_an_older_file_still_loads() -> None:
    """Years counted in days, say: float32 knows 1e8 to within 4."""
    train = 1e8 + 1.7 + series(200, 1).double()
    preparation = SeriesPreparation(1).measure(train)
    found = preparation(train)
    assert found.dtype == torch.float32
    expected = (train - train.mean()) / train.std(correction=0)
    torch.testing.assert_close(found, expected.clamp(-5, 5).float(), rtol=0, atol=1e-5)
    older = {"mean": torch.tensor([0.3]), "std": torch.tensor([2.0])}
    preparation.load_state_dict(older)
    assert torch.equal(preparation(series(2, 1)), (series(2, 1) - older["mean"]) / older["std"])


def test_half_precision_with_a_tiny_deviation_is_scaled_in_float32() -> None:
    """In half precision the sum of squares, and 1 / deviation, leave its range."""
    stored = (series(50, 1) * 2e-5).half()
    preparation = SeriesPreparation(1).measure(stored)
    found = preparation(stored)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert found.std().item() == pytest.approx(1, rel=1e-2)
    large = SeriesPreparation(1).measure(
        torch.full((4, 1, 50), 6e4).half() * (1 + 0.05 * torch.arange(4).view(-1, 1, 1) / 9).half()
    )
    assert torch.isfinite(large.mean).all()
    assert 1e3 > large.std.item() > 100


def test_drift_is_removed_and_the_signal_is_not_delayed() -> None:
    time = torch.arange(400, dtype=torch.float64)
    fast, slow = (0.6 * time).sin(), 20 * (0.004 * time).sin()
    found = remove_drift((fast + slow)[None], cutoff=0.02)[0]
    assert (found - fast)[60:340].abs().max() < 0.05
    wandering = SeriesPreparation(1, high_pass=0.02).measure((fast + slow).float()[None, None])
    assert wandering.std.item() == pytest.approx(fast.std().item(), rel=0.1)
    short = remove_drift(torch.randn(2, 3), cutoff=0.1)  # shorter than the filter's padding
    assert short.isfinite().all()


def test_channels_are_matched_by_name_whatever_their_case() -> None:
    leads = torch.arange(3.0)[None, :, None]
    assert order_channels(leads, ["AVR", "II", "v1"], ["V1", "aVR"]).flatten().tolist() == [2, 0]
    with pytest.raises(ValueError, match="names must hold each wanted channel, got none for aVL"):
        order_channels(leads, ["aVR", "II", "V1"], ["aVL"])
    with pytest.raises(ValueError, match="names must be 3 different ones"):
        order_channels(leads, ["II", "ii", "V1"], ["II"])


# A model of raw series


def test_shorter_series_are_encoded_at_the_positions_of_their_beginning() -> None:
    encoder, inputs = new_encoder(), series(3)
    model = SeriesModel(SeriesPreparation(2), encoder, crop=24).eval()
    expected = encoder.forward_tokens(encoder.tokenizer(inputs)[:, :5]).mean(1)
    torch.testing.assert_close(model(inputs[..., :10]), expected, rtol=0, atol=1e-6)
    assert model(inputs[..., :11]).isfinite().all()


def test_longer_series_are_averaged_over_crops_half_a_crop_apart() -> None:
    encoder, inputs = new_encoder(), series(3, steps=40)
    model = SeriesModel(SeriesPreparation(2), encoder, crop=24).eval()
    expected = torch.stack([encoder(inputs[..., start : start + 24]) for start in (0, 12, 16)]).mean(0)
    torch.testing.assert_close(model(inputs), expected, rtol=0, atol=1e-6)
    tokens = model.tokens(inputs)
    assert tokens.shape == (3, 2 * 13, 8)
    torch.testing.assert_close(
        tokens[:, 13:], encoder.encode(inputs[..., 12:36], with_prefix=True), rtol=0, atol=1e-6
    )


def test_the_model_takes_gaps_half_precision_and_other_units() -> None:
    raw = 300 * series(20) + 50
    model = SeriesModel(SeriesPreparation(2).measure(raw), new_encoder(), crop=24).eval()
    broken = raw.half()
    broken[:, 0, 3:9] = NAN
    assert model(broken).isfinite().all()
    torch.testing.assert_close(model(raw), model.network(model.preparation(raw)), rtol=0, atol=1e-6)


def test_fine_tuning_learns_a_few_labels_and_leaves_the_encoder_alone() -> None:
    inputs, targets = series(24), torch.arange(24) % 2
    inputs[:, 0] += 3 * targets[:, None]
    model = SeriesModel(SeriesPreparation(2).measure(inputs), new_encoder(), crop=24)
    before = weights(model)
    classifier = fine_tune_series(model, inputs, targets, budget=Budget(steps=40), learning_rate=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert (classifier(inputs).argmax(1) == targets).double().mean() > 0.9
    with pytest.raises(ValueError, match="around a TokenEncoder, got one around Classifier"):
        fine_tune_series(classifier, inputs, targets)


def test_fine_tuning_refuses_fewer_classes_than_targets_hold() -> None:
    model = SeriesModel(SeriesPreparation(2), new_encoder(), crop=24)
    with pytest.raises(ValueError, match=r"classes must be > the largest target 3, got 3"):
        fine_tune_series(model, series(8), torch.arange(8) % 4, classes=3)


def test_what_is_fine_tuned_on_an_accelerator_comes_back_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device "meta" stands for the accelerator that `fit` leaves a network on."""
    import coloss.jepa.series_model as room

    def fit_there(network, *given, **more):
        return SimpleNamespace(model=network.to("meta"))

    def moved(self: SeriesModel, device: torch.device) -> SeriesModel:
        seen.append(device)
        return self

    seen: list[torch.device] = []
    monkeypatch.setattr(room, "fit", fit_there)
    monkeypatch.setattr(SeriesModel, "to", moved)
    model = SeriesModel(SeriesPreparation(2), new_encoder(), crop=24)
    fine_tune_series(model, series(8), torch.arange(8) % 2)
    assert seen == [torch.device("cpu")]


def test_few_label_probes_scale_features_and_average_over_draws() -> None:
    torch.manual_seed(0)
    features, targets = torch.randn(60, 3), torch.arange(60) % 2
    features[:, 0] = 0.01 * (2 * targets - 1) + 0.001 * features[:, 0]
    features[:, 1:] = 100  # what all share says nothing, and would drown a cosine
    assert few_label_probes(features, targets, features, targets) == {"linear_probe": 1.0, "knn": 1.0}
    noise = torch.randn(60, 3)
    one, many = (few_label_probes(noise, targets, noise, targets, draws=n)["knn"] for n in (1, 4))
    assert one != many


def test_patches_grow_with_the_square_root_of_the_length() -> None:
    assert [default_patch_size(steps) for steps in (4, 140, 560)] == [2, 5, 10]


# From file to stored encoder


@pytest.fixture
def waves(tmp_path: Path) -> Path:
    """Two kinds of waves in two channels of half precision, with gaps, in a file of one's own."""
    rng = np.random.default_rng(0)
    time, kinds = np.linspace(0, 6.28, 41), np.arange(60) % 2
    x = np.stack([np.sin(time * (1 + 2 * kind)) for kind in kinds])[:, None].repeat(2, 1)
    x = (x + 0.3 * rng.standard_normal(x.shape)).astype(np.float16)
    x[::3, 0, 5:9] = np.nan
    path = tmp_path / "waves.npz"
    np.savez(path, x=x, y=kinds, channels=["I", "aVR"])
    return path


JUDGED = {"feature_std", "rankme", "linear_probe", "knn", "attentive_probe"}


def test_a_file_becomes_an_encoder_that_can_be_loaded_and_used(waves: Path, tmp_path: Path) -> None:
    shares, folder = [], tmp_path / "out"
    metrics = pretrain_series(
        str(waves), folder, budget=Budget(steps=4), progress=shares.append, dim=8, depth=1
    )
    assert set(metrics) == {
        *JUDGED, *(f"untrained_{name}" for name in JUDGED), "fine_tuned", "supervised", "raw_linear_probe", "raw_knn",
    }  # fmt: skip
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert json.loads((folder / "run.json").read_text())["channels"] == ["I", "aVR"]
    assert shares
    model, data = load_series_encoder(folder), read_series(waves)
    assert not model.training
    assert model(data.test).isfinite().all()
    assert model(torch.randn(2, 2, 30)).shape == (2, 8)
    start = new_series_encoder(2, 39, 3, dim=8, depth=1, seed=0)
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), model.network.parameters()))
    expected = few_label_probes(model(data.train), data.train_targets, model(data.test), data.test_targets)
    assert metrics["linear_probe"] == expected["linear_probe"]
    with pytest.raises(
        ValueError, match=r"series must be \(batch, 2 channels, steps\), got shape \(4, 3, 41\)"
    ):
        model(torch.zeros(4, 3, 41))


def test_an_array_without_classes_is_pretrained_and_metered(tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", series(30, 1, 50)[:, 0].numpy())
    metrics = pretrain_series(
        str(tmp_path / "few.npy"), tmp_path / "out", budget=Budget(steps=2), crop=30, patch_size=5
    )
    assert set(metrics) == {"feature_std", "rankme", "untrained_feature_std", "untrained_rankme"}
    assert load_series_encoder(tmp_path / "out")(series(2, 1, 64)).shape == (2, 32)


def test_one_test_series_has_no_spread_and_gets_no_meters(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", x_train=series(8, 1).numpy(), x_test=series(1, 1).numpy())
    assert pretrain_series(str(tmp_path / "few.npz"), tmp_path / "out", budget=Budget(steps=2), dim=8) == {}


def test_a_stopped_recipe_goes_on_to_the_same_end(tmp_path: Path, monkeypatch) -> None:
    class Killed(Exception):
        pass

    import coloss.jepa.series_prediction as room

    np.save(tmp_path / "few.npy", series(40).numpy())
    few = str(tmp_path / "few.npy")
    options = {"budget": Budget(steps=6), "dim": 8, "depth": 1}
    whole = pretrain_series(few, tmp_path / "whole", **options)
    monkeypatch.setattr(room, "fit", lambda *a, **b: coloss.fit(*a, **{**b, "checkpoint_every": 2}))
    with monkeypatch.context() as killing:
        plain = SeriesPrediction.on_step

        def stop(self, state):
            plain(self, state)
            if state.step == 3:
                raise Killed

        killing.setattr(SeriesPrediction, "on_step", stop)
        with pytest.raises(Killed):
            pretrain_series(few, tmp_path / "stopped", **options)
    assert [path.name for path in checkpoints(tmp_path / "stopped" / "checkpoints")] == ["step-00000002"]
    assert pretrain_series(few, tmp_path / "stopped", **options) == whole
    with pytest.raises(InputError, match="with seed 0 and other settings: choose another folder"):
        pretrain_series(few, tmp_path / "stopped", budget=Budget(steps=6))


def test_sets_of_the_catalog_and_named_parts(tmp_path: Path) -> None:
    beats = read_series("ecg5000")
    assert (beats.train.shape, beats.test.shape, beats.classes) == ((349, 1, 140), (151, 1, 140), 5)
    vowels = read_series("japanese-vowels")
    assert vowels.train.shape[1:] == (12, 29)
    assert vowels.train.isnan().any()
    assert fill_gaps(vowels.train).isfinite().all()
    x, y = series(10).numpy(), np.arange(10) % 2
    np.savez(
        tmp_path / "parts.npz",
        x_train=x[:4],
        x_val=x[4:6],
        x_test=x[6:],
        y_train=y[:4],
        y_val=y[4:6],
        y_test=y[6:],
    )
    found = read_series(tmp_path / "parts.npz")
    assert torch.equal(found.train, series(10)[:6])
    assert found.test_targets.tolist() == [0, 1, 0, 1]
    many = read_series(tmp_path / "parts.npz", seed=3)
    assert torch.equal(many.test, found.test)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: SeriesPrediction(keep=(0.0, 0.5)), "keep"),
        (lambda path: SeriesPrediction(min_block=0), "min_block must be >= 1, got 0"),
        (lambda path: SeriesCrops(0), "size must be >= 1, got 0"),
        (lambda path: SeriesPreparation(0), "channels must be >= 1, got 0"),
        (lambda path: SeriesPreparation(1, clip=0), "clip must be > 0, got 0"),
        (lambda path: SeriesPreparation(1, high_pass=0.5), r"high_pass must be in \(0, 0.5\)"),
        (lambda path: remove_drift(series(), 0.7), r"cutoff must be in \(0, 0.5\) cycles per step, got 0.7"),
        (lambda path: remove_drift(series(), 0.1, order=0), "order must be >= 1, got 0"),
        (lambda path: SeriesModel(SeriesPreparation(2), new_encoder(), 13), "crop must be a multiple of the patch of 2 steps, got 13"),
        (lambda path: SeriesModel(SeriesPreparation(2), new_encoder(), 24)(series(2, 2, 1)), "at least the 2 steps of a patch, got 1"),
        (lambda path: few_label_probes(series(4)[:, 0], torch.arange(4), series(4)[:, 0], torch.arange(4), draws=0), "draws must be >= 1"),
        (lambda path: pretrain_series("italy-power-demand", path, patch_size=20), r"patch_size must be in \[1, 12\]"),
        (lambda path: pretrain_series("italy-power-demand", path, crop=7, patch_size=3), "crop must be a multiple of the patch of 3 steps"),
        (lambda path: pretrain_series("italy-power-demand", path, high_pass=2.0), "high_pass must be in"),
        (lambda path: pretrain_series("italy-power-demand", path, labels_per_class=0), "labels_per_class must be >= 1"),
        (lambda path: pretrain_series("ecg500", path), "did you mean 'ecg5000'"),
        (lambda path: read_series("iris"), "a classification set of series, or an array file, got 'iris'"),
        (lambda path: read_series("etth1"), "got 'etth1' \\(forecasting\\)"),
        (lambda path: read_series(path / "gone.npy"), "there is no file or folder"),
        (lambda path: read_series(path / "x.csv"), "ending in .npy or .npz"),
        (lambda path: load_series_encoder(path / "nowhere"), "holds no encoder that can be read"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, message, tmp_path: Path, as_users_call: None) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": np.zeros(3)}, "must hold x, or x_train and x_test; it holds z"),
        (
            {"x": np.zeros((9, 2, 3, 4))},
            r"numbers \(samples, channels, steps\), got float64 of shape \(9, 2, 3, 4\)",
        ),
        ({"x": np.array([["a", "b"]] * 9)}, "must be numbers"),
        ({"x": np.zeros((9, 4)), "y": np.arange(8) % 2}, "must hold 9 classes, one for each series, got 8"),
        ({"x": np.zeros((40, 4)), "y": np.linspace(0, 1, 40)}, "got a regression target: leave y out"),
        ({"x": np.zeros((9, 4)), "channels": ["a", "b"]}, "must name each of 1 channels, got 2"),
        ({"x_train": np.zeros((9, 4)), "x_test": np.zeros((9, 5))}, "must have series of one shape"),
        (
            {"x_train": np.zeros((9, 4)), "x_test": np.zeros((9, 4)), "y_train": np.zeros(9)},
            "y for each of its parts",
        ),
        ({"x": np.zeros((1, 4))}, "must hold series to learn from and to test on"),
    ],
)
def test_files_that_hold_no_series_are_refused(arrays, message, tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(InputError, match=message):
        read_series(tmp_path / "own.npz")


def test_a_model_without_tokens_is_refused(as_users_call: None) -> None:
    with pytest.raises(InputError, match="token_encoder_for_shape builds one"):
        coloss.fit(coloss.nn.MLP(48, (4,)), (series(),), methods=[SeriesPrediction()], budget=Budget(steps=1))


def test_claim_runs() -> None:
    found = verify("ecg-jepa", smoke=True, seeds=1)
    assert set(found["arms"]) == {"raw series", "untrained", "block masks", "i.i.d. masks", "supervised"}
    metrics = set(found["arms"]["block masks"]["metrics"])
    assert {"linear_probe", "knn", "fine_tuned", "feature_std", "target_std_last"} <= metrics
    assert found["metric"] == "linear_probe"
