"""DSeq-JEPA: sources of saliency, sequences of masks, what reaches a prediction, and every kind of run."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes, weights
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.data import MaskRequest, MultiBlock2d
from coloss.errors import InputError
from coloss.jepa import (
    DSeqJEPA,
    GivenSaliency,
    MaskedPrediction,
    QuerySaliency,
    SalientSequence,
    SparseJEPA,
    VarianceSaliency,
    saliency_map,
    salient_region_trial,
)
from coloss.lab.claims import verify
from coloss.nn import Classifier, token_encoder_for_shape
from coloss.ops import indices_to_mask
from coloss.train import Budget, State, TrainingStep


def new_encoder(**options) -> nn.Module:
    torch.manual_seed(0)
    given = {"dim": 8, "depth": 1, "heads": 2, "registers": 1}
    return token_encoder_for_shape((1, 8, 8), **(given | options))


def new_classifier() -> nn.Module:
    return Classifier(new_encoder(), 3)


def samples(count: int = 24) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def mean_of_patches(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 2)[:, 0]


def small(**options) -> DSeqJEPA:
    given = {"probability": 1.0, "min_area": 0.1, "predictor_depth": 1, "predictor_heads": 2}
    return DSeqJEPA(**(given | options))


def oracle(**options) -> DSeqJEPA:
    return small(**({"saliency": GivenSaliency(mean_of_patches)} | options))


def one_step(method: MaskedPrediction, model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    state = State(model)
    state.generator.manual_seed(0)
    state.local_generator.manual_seed(1)
    torch.manual_seed(2)
    step = TrainingStep(model, None, [method], state=state)
    terms = step(inputs)
    step.backward(terms)
    return terms


def quarters(images: Tensor) -> Tensor:
    """Four salient corners of falling worth, of 4 of the 64 patches each, whatever the images are."""
    saliency = torch.zeros(len(images), 8, 8)
    for rank, (row, column) in enumerate([(0, 0), (0, 6), (6, 0), (6, 6)]):
        saliency[:, row : row + 2, column : column + 2] = 10.0 - rank
    return saliency


def prediction_of(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, and masks of what is seen and predicted, of five regions of 16 x 16 images; with registers, in two blocks."""
    seen = []

    class Watched(DSeqJEPA):
        def extra_terms(self, predictions, targets, found, state):
            masks = found.masks
            seen.append((predictions, masks.context, masks.context_valid, masks.targets, masks.target_valid))
            return {}

    torch.manual_seed(0)
    encoder = token_encoder_for_shape(
        (1, 16, 16), dim=8, depth=2, heads=2, patch_size=2, registers=1
    ).double()
    method = Watched(
        saliency=GivenSaliency(quarters),
        min_area=0.05,
        probability=1.0,
        predictor_depth=2,
        predictor_heads=2,
    )
    one_step(method, encoder, images)
    predictions, context, context_valid, targets, target_valid = seen[0]
    shown = indices_to_mask(context, 64, context_valid)
    hidden = indices_to_mask(targets, 64, target_valid)
    return torch.where(target_valid[..., None], predictions, 0), shown, hidden


def test_changed_pixels_reach_the_predictions_of_steps_that_see_them_and_no_others() -> None:
    """Neither what is predicted nor what is neither seen nor predicted does; in the released code both do."""
    images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    plain, shown, _ = prediction_of(images)
    assert shown.sum(-1)[:, 0].tolist() == [4, 8, 12, 16]
    for corner, (row, column) in enumerate([(0, 0), (0, 12), (12, 0), (12, 12)]):
        changed = images.clone()
        changed[:, :, row : row + 4, column : column + 4] += 2
        moved = (prediction_of(changed)[0] - plain).abs().amax((1, 2, 3)) > 1e-7
        assert moved.tolist() == [step >= corner for step in range(4)]
    changed = images.clone()
    changed[:, :, 6:10, 6:10] += 2  # background, predicted last and never seen
    torch.testing.assert_close(prediction_of(changed)[0], plain, rtol=0, atol=1e-10)


def test_samples_are_not_scrambled() -> None:
    """Each sample's loss is the one it has alone, and its masks are where its own saliency is."""
    images = samples(6).double()
    masker = SalientSequence(GivenSaliency(mean_of_patches), 3, 0.1)
    together = masker(MaskRequest(6, (4, 4), inputs=images))
    for number in range(6):
        alone = masker(MaskRequest(1, (4, 4), inputs=images[[number]]))
        for name in ("context", "target"):
            indices = "targets" if name == "target" else name
            masks = [
                indices_to_mask(getattr(m, indices), 16, getattr(m, f"{name}_valid"))
                for m in (alone, together)
            ]
            assert torch.equal(masks[0][:, 0], masks[1][:, number])

    def loss(part: Tensor) -> float:
        return one_step(oracle(n_regions=2), new_encoder().double(), part)["latent_prediction"].item()

    hidden = [
        int(
            SalientSequence(GivenSaliency(mean_of_patches), 2, 0.1)(
                MaskRequest(1, (4, 4), inputs=i)
            ).target_valid.sum()
        )
        for i in images.split(1)
    ]
    weighted = sum(count * loss(image) for count, image in zip(hidden, images.split(1)))
    assert loss(images) == pytest.approx(weighted / sum(hidden), rel=1e-9)


def test_the_loss_is_that_of_the_definition() -> None:
    method, model, images = oracle(n_regions=3), new_encoder().double(), samples(3).double()
    found = one_step(method, model, images)["latent_prediction"].item()
    regions = method.sequence.regions(MaskRequest(3, (4, 4), inputs=images))
    targets, tokens = F.layer_norm(model.encode(images), (8,)), model.tokenizer(images)
    total, count = 0.0, 0
    for image in range(3):
        for step in (1, 2):
            seen = regions[image, :step].any(0).nonzero().T
            hidden = regions[image, step].nonzero().T
            if seen.numel() and hidden.numel():
                context = model.forward_tokens(tokens[[image]], seen)
                predicted = method.predictor(context, seen, hidden)[0]
                loss = F.smooth_l1_loss(predicted, targets[image, hidden[0]], reduction="none").mean(-1)
                total, count = total + loss.sum().item(), count + loss.numel()
    assert count > 16
    assert found == pytest.approx(total / count, rel=1e-9)


def test_no_sequential_step_is_i_jepa_bit_for_bit() -> None:
    found = []
    options = {"predictor_depth": 1, "predictor_heads": 2}
    for method in (DSeqJEPA(probability=0.0, **options), MaskedPrediction(MultiBlock2d(), **options)):
        model = new_encoder()
        coloss.fit(model, (samples(),), methods=[method], budget=Budget(steps=4), batch_size=8)
        found.append(weights(model))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_probability_rises_and_the_number_of_predicted_regions_is_logged() -> None:
    method = oracle(probability=lambda progress: float(progress >= 0.5))
    run = coloss.fit(
        new_encoder(), (samples(),), methods=[method], budget=Budget(steps=4), batch_size=24, log_every=1
    )
    logged = ["predicted_regions" in point.metrics for point in run.history]
    assert logged == [False, False, True, True]
    assert 1 <= run.history[-1].metrics["predicted_regions"] <= 4


def test_constant_saliency_skips_the_loss() -> None:
    method = small(saliency=GivenSaliency(lambda images: torch.zeros(len(images), 4, 4)))
    model = new_encoder()
    assert one_step(method, model, samples())["latent_prediction"] == 0
    for parameter in (*model.parameters(), *method.predictor.parameters()):
        assert parameter.grad is None or (parameter.grad == 0).all()

    def half_constant(images: Tensor) -> Tensor:
        saliency = mean_of_patches(images)
        saliency[::2] = 0.0
        return saliency

    images = samples().double()
    some = one_step(small(saliency=GivenSaliency(half_constant)), new_encoder().double(), images)
    others = one_step(oracle(), new_encoder().double(), images[1::2])
    torch.testing.assert_close(some["latent_prediction"], others["latent_prediction"])


@pytest.mark.parametrize("options", [{"registers": 2}, {"registers": 0, "pool": "cls"}])
def test_a_query_is_the_first_learned_token(options) -> None:
    encoder = new_encoder(**options, depth=3)
    images = samples(4)
    tokens = encoder.encode(images)
    request = MaskRequest(4, (4, 4), tokens=tokens, inputs=images, encoder=encoder)
    expected = saliency_map(tokens, encoder.prefix[:1][None]).detach()
    torch.testing.assert_close(QuerySaliency()(request), expected)
    torch.testing.assert_close(QuerySaliency(block=2)(request), expected)
    whole = encoder.encode(images, with_prefix=True)
    torch.testing.assert_close(
        QuerySaliency(contextual=True)(request), saliency_map(whole[:, encoder.num_prefix :], whole[:, :1])
    )
    earlier = encoder.tokenizer(images)
    earlier = torch.cat([encoder.prefix.expand(4, -1, -1), earlier], 1)
    for block in encoder.transformer.blocks[:2]:
        earlier = block(earlier)
    earlier = encoder.transformer.norm(earlier)[:, encoder.num_prefix :]
    torch.testing.assert_close(
        QuerySaliency(block=1)(request), saliency_map(earlier, encoder.prefix[:1][None])
    )
    assert not encoder.transformer.blocks[1]._forward_hooks


def test_variance_is_that_of_each_patch() -> None:
    images = samples(2)
    found = VarianceSaliency()(MaskRequest(2, (4, 4), inputs=images, encoder=new_encoder()))
    patches = images.unfold(2, 2, 2).unfold(3, 2, 2).reshape(2, 16, 4)
    torch.testing.assert_close(found, patches.var(-1, correction=0))


@pytest.mark.parametrize("saliency", ["query", "variance", GivenSaliency(mean_of_patches)])
def test_every_source_trains_and_leaves_nothing_behind(saliency) -> None:
    model = new_encoder()
    names = model.state_dict().keys()
    method = small(saliency=saliency)
    run = coloss.fit(model, (samples(),), methods=[method], budget=Budget(steps=3), batch_size=12)
    assert run.model.state_dict().keys() == names
    assert torch.tensor(list(run.history[-1].terms.values())).isfinite().all()
    regions = method.salient_regions(samples(5))
    assert regions.shape == (5, 5, 16)
    assert (regions.sum(1) == 1).all()


def test_without_a_choice_the_query_serves_where_there_is_one() -> None:
    for registers, source in ((1, QuerySaliency), (0, VarianceSaliency)):
        method = small()
        one_step(method, new_encoder(registers=registers), samples())
        assert isinstance(method.sequence.saliency, source)


@pytest.mark.parametrize("objective", [None, F.cross_entropy])
def test_fit_a_plain_loop_and_lightning_take_the_same_steps(objective) -> None:
    batches = list(zip(samples().split(8), (torch.arange(24) % 3).split(8)))
    check_loops(
        new_classifier if objective else new_encoder,
        lambda: small(probability=0.5),
        batches if objective else [batch[:1] for batch in batches],
        objective,
    )


def test_a_killed_run_resumes_bit_identically(tmp_path: Path) -> None:
    check_resume(new_encoder, lambda: small(probability=0.5), (samples(),), tmp_path)


@pytest.mark.parametrize("saliency", ["query", GivenSaliency(mean_of_patches)])
def test_two_processes_take_the_steps_of_one(saliency, tmp_path: Path) -> None:
    def train(fabric: Fabric) -> dict[str, Tensor]:
        model = new_encoder().double()
        torch.manual_seed(0)
        coloss.fit(
            model,
            (samples().double(),),
            methods=[small(saliency=saliency)],
            budget=Budget(steps=3),
            batch_size=8,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            fabric=fabric,
        )
        return weights(model)

    check_two_processes(train, tmp_path)


def test_bfloat16_and_another_method_with_an_objective() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    method = small()
    data = (samples(), torch.arange(24) % 3)
    run = coloss.fit(
        new_classifier(),
        data,
        F.cross_entropy,
        [method, coloss.Method()],
        budget=Budget(steps=2),
        fabric=fabric,
        log_every=1,
    )
    assert set(run.history[-1].terms) == {"cross_entropy", "latent_prediction"}
    assert torch.tensor(list(run.history[-1].terms.values())).isfinite().all()


def test_its_masks_serve_another_predictor() -> None:
    masker = SalientSequence(QuerySaliency(), 3, 0.1)
    run = coloss.fit(
        new_encoder(),
        (samples(),),
        methods=[SparseJEPA(masker, groups=2, predictor_heads=2)],
        budget=Budget(steps=2),
        log_every=1,
    )
    assert run.history[-1].terms["latent_prediction"] > 0


def request(**options) -> MaskRequest:
    return MaskRequest(2, (4, 4), **({"inputs": samples(2)} | options))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DSeqJEPA(saliency="gradient"), 'saliency must be "query", "variance" or a function'),
        (lambda: DSeqJEPA(probability=1.5), r"probability must be in \[0, 1\], or a schedule, got 1.5"),
        (lambda: DSeqJEPA(n_regions=1), "n_regions must be >= 2, got 1"),
        (lambda: DSeqJEPA(min_area=-0.1), r"min_area must be in \[0, 1\], got -0.1"),
        (lambda: QuerySaliency(block=-1), "block must be >= 0, got -1"),
        (
            lambda: one_step(small(saliency="query"), new_encoder(registers=0), samples()),
            "registers >= 1 or pool='cls'",
        ),
        (
            lambda: one_step(small(), token_encoder_for_shape((8,), dim=8, registers=1), torch.ones(4, 8)),
            "the encoder must cut images into patches",
        ),
        (lambda: QuerySaliency()(request(encoder=new_encoder(registers=0))), "needs a TokenEncoder with"),
        (
            lambda: QuerySaliency(block=4)(request(encoder=new_encoder())),
            "below the encoder's 1 blocks, got 4",
        ),
        (lambda: VarianceSaliency()(request()), "needs image patches, got NoneType"),
        (
            lambda: SalientSequence(GivenSaliency(lambda images: images[:, 0]))(request()),
            "one value for each of 2 x 16 tokens",
        ),
        (
            lambda: SalientSequence(QuerySaliency())(MaskRequest(2, (16,))),
            r"grid must be \(rows, columns\) for salient regions",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message, as_users_call: None) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_the_claim_runs(read_by_predict_alone) -> None:
    read_by_predict_alone(salient_region_trial)
    found = verify("dseq-jepa", smoke=True, seeds=1)
    assert "overlap" in found["arms"]["dseq-jepa"]["metrics"]
