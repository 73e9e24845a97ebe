"""Views of pairs in one pass: equal to CLIP where they must be, heads that stay behind, and what every method promises."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import SGD, check_loops, check_resume, check_two_processes, weights
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.contrastive import (
    CaptionViews,
    ClipObjective,
    LocalNegativesWarning,
    MultiViewClip,
    TextAugment,
    WordAugment,
    clip_loss,
    image_text_task,
)
from coloss.data import Batch, IndexedDataset, WordVocabulary
from coloss.errors import InputError
from coloss.lab.claims import verify
from coloss.nn import MLP, DualEncoder, TokenEncoder, Words
from coloss.train import Budget, Method, Setting, State, TrainingStep
from coloss.train.schedules import value_at

EXTRAS = ("siamlip", "byolip", "barlip", "swalip")


def noisy(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return inputs + 0.1 * torch.randn(2, *inputs.shape, generator=generator)


def fixed(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Views that do not depend on the process that makes them."""
    return torch.stack([0.9 * inputs, 0.5 * inputs + 0.1])


def copies(inputs: Tensor, generator: torch.Generator | None = None, views: int = 2) -> Tensor:
    return inputs.repeat(views, *[1] * inputs.ndim)


def new_model(dropout: float = 0.0) -> DualEncoder:
    torch.manual_seed(3)
    texts = TokenEncoder(Words(12, 8, max_length=4), 8, depth=1, heads=2, dropout=dropout)
    return DualEncoder(MLP(6, (8,), 5, norm=None), nn.Sequential(texts, nn.Linear(8, 5)))


def new_data(dtype: torch.dtype = torch.float32) -> IndexedDataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(32, 6, generator=generator).to(dtype)
    return IndexedDataset((images, torch.randint(1, 12, (32, 4), generator=generator)))


def method(**options) -> MultiViewClip:
    defaults = {
        "image_view": noisy,
        "text_view": WordAugment(2),
        "projector": (8, 4),
        "extra_projector": (6, 4),
    }
    return MultiViewClip(**(defaults | options))


def train(model: nn.Module, *methods: Method, steps: int = 4, data: IndexedDataset | None = None, **options):
    data = new_data() if data is None else data
    return coloss.fit(
        model, data, methods=methods, budget=Budget(steps=steps), batch_size=8, optimizer=SGD, **options
    )


def test_without_strong_views_it_takes_the_steps_of_clip():
    plain, multi = new_model(), new_model()
    train(plain, objective=ClipObjective())
    run = train(multi, MultiViewClip(views=0))
    for one, other in zip(plain.state_dict().values(), multi.state_dict().values()):
        torch.testing.assert_close(one, other)
    assert sorted(run.history[-1].terms) == ["clip"]


def test_copies_with_shared_heads_and_no_smoothing_take_the_steps_of_clip():
    plain, multi = new_model(), new_model()
    train(plain, MultiViewClip(views=0))
    same = {"image_view": copies, "text_view": copies, "separate_heads": False, "label_smoothing": 0.0}
    run = train(multi, method(**same))
    for one, other in zip(plain.state_dict().values(), multi.state_dict().values()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    terms = run.history[-1].terms
    assert terms["clip"] == pytest.approx(terms["strong_clip"], rel=1e-5)


def test_terms_are_those_of_the_formula():
    model, data = new_model(), new_data()
    multi = method(image_view=fixed, text_view=copies)
    step = TrainingStep(model, methods=[multi])
    terms = step(Batch(data.inputs, ids=data.ids))
    images, words = data.inputs
    z = model.encode_query(images), model.encode_document(words)
    torch.testing.assert_close(terms["clip"], clip_loss(*z, 1 / 0.07))
    hidden = model.query_encoder.layers[:-1](fixed(images).flatten(0, 1))
    h = F.normalize(multi.image_head(hidden), dim=1).chunk(2)
    g = F.normalize(multi.text_head(model.document_encoder[0](words.repeat(2, 1))), dim=1).chunk(2)
    expected = sum(clip_loss(h[a], g[b], 10.0, label_smoothing=0.1) for a in (0, 1) for b in (0, 1)) / 4
    torch.testing.assert_close(terms["strong_clip"], expected)
    total = step.combine(step.state, terms)
    torch.testing.assert_close(total, terms["clip"] / 3 + 2 * terms["strong_clip"] / 3)


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_other_objectives_join_with_their_own_heads(extra):
    smoothing = 0.0 if extra == "swalip" else 0.1
    multi = method(extra=extra, label_smoothing=smoothing)
    model = new_model()
    keys = set(model.state_dict())
    run = train(model, multi)
    assert sorted(run.history[-1].terms) == sorted(["clip", "strong_clip", extra])
    assert set(run.model.state_dict()) == keys
    assert value_at(multi.term_weights[extra], 0.0) == (0.2 if extra == "swalip" else 1.0)
    assert multi.extra_heads.image_projector[0].weight.grad is None
    images, texts = run.model.eval()(new_data().inputs)
    assert images.isfinite().all()
    assert texts.isfinite().all()


def test_byol_targets_follow_slowly_and_take_no_gradient():
    multi = method(extra="byolip", momentum=0.9)
    model = new_model()
    step = TrainingStep(model, methods=[multi])
    start = weights(multi.average.module["model"])
    assert not {id(p) for p in multi.average.parameters()} & {id(p) for p in step.trainable}
    optimizer = SGD(step.trainable)
    step.backward(step(Batch(new_data().inputs)))
    optimizer.step()
    step.after_step()
    name = "query_encoder.layers.0.weight"
    moved = multi.average.module["model"].state_dict()[name]
    torch.testing.assert_close(moved, 0.9 * start[name] + 0.1 * model.state_dict()[name])


def test_both_heads_give_a_model_for_zero_shot_use():
    run = train(new_model(), method())
    strong = run.methods[0].strong_model(run.model)
    inputs = new_data().inputs
    images, texts = strong(inputs)
    assert images.shape == texts.shape == (32, 4)
    hidden = run.model.query_encoder.layers[:-1].eval()(inputs[0])
    torch.testing.assert_close(images, F.normalize(run.methods[0].image_head.eval()(hidden), dim=1))
    assert run.model(inputs)[0].shape == (32, 5)
    for options in ({"views": 0}, {"separate_heads": False}):
        with pytest.raises(InputError, match="strong_model needs a method that was trained with views >= 1"):
            train(new_model(), method(**options)).methods[0].strong_model(new_model())


def test_strong_text_is_dropped_and_weak_text_is_not():
    model = new_model()
    multi = method(image_view=copies, text_view=copies, text_dropout=0.5, text_drop_path=0.3)
    step = TrainingStep(model, methods=[multi])
    data = new_data()
    terms = step(Batch(data.inputs))
    texts = step.state.outputs[1].unflatten(0, (3, 32))
    assert not torch.allclose(texts[0], texts[1])
    assert not torch.allclose(texts[1], texts[2])
    plain = TrainingStep(new_model(), methods=[method(image_view=copies, text_view=copies)])
    expected = plain(Batch(data.inputs))
    torch.testing.assert_close(terms["clip"], expected["clip"])
    assert not torch.isclose(terms["strong_clip"], expected["strong_clip"])
    shipped = step.finish().eval()
    torch.testing.assert_close(shipped(data.inputs)[1], new_model().eval()(data.inputs)[1])


def test_captions_are_found_by_sample_id():
    vocabulary = WordVocabulary([f"word{i}" for i in range(9)], max_words=4)
    captions = [f"the word{i % 9}" for i in range(32)]
    views = CaptionViews(captions, vocabulary, TextAugment(stop=1.0, share=0.0))
    model = new_model()
    step = TrainingStep(model, methods=[method(text_view=views)])
    step.start(Batch(new_data().inputs, ids=torch.arange(32).flip(0)))
    words = step.state.batch.inputs[1][32:64]
    assert words[:, 0].tolist() == [3 + i % 9 for i in range(31, -1, -1)]
    assert step.state.batch.ids.tolist() == list(range(31, -1, -1)) * 3
    with pytest.raises(InputError, match="CaptionViews needs sample ids in the batch"):
        step.start(Batch(new_data().inputs))


def test_fit_a_plain_loop_and_lightning_take_the_same_steps():
    images, words = new_data().inputs
    batches = list(zip(zip(images.split(8), words.split(8)), torch.randint(3, (32,)).split(8)))
    check_loops(
        new_model,
        partial(method, extra="barlip", weak_view=lambda x, generator: noisy(x, generator)[:1]),
        batches,
    )


@pytest.mark.parametrize("extra", [None, "byolip"])
def test_a_killed_run_resumes_bit_identically(tmp_path: Path, extra):
    check_resume(new_model, lambda: method(extra=extra, text_dropout=0.1, momentum=0.9), new_data(), tmp_path)


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_two_processes_take_the_steps_of_one(tmp_path: Path, extra):
    def work(fabric: Fabric) -> dict[str, Tensor]:
        multi = method(
            image_view=fixed, text_view=copies, extra=extra, label_smoothing=0.0 if extra == "swalip" else 0.1
        ).double()
        run = train(new_model().double(), multi, data=new_data(torch.float64), fabric=fabric)
        return dict(run.model.state_dict()) | {"scale": multi.scale.log_scale.detach()}

    check_two_processes(work, tmp_path)


def test_local_negatives_are_warned_of(tmp_path: Path):
    from contract import run_processes

    def work(fabric: Fabric) -> dict[str, Tensor]:
        with pytest.warns(LocalNegativesWarning, match="MultiViewClip with across_processes=False compares"):
            TrainingStep(new_model(), methods=[method(across_processes=False)])
        return {}

    run_processes(work, tmp_path)


def test_it_composes_with_another_method_and_with_accumulation():
    class Decorrelation(Method):
        def terms(self, state: State) -> dict[str, Tensor]:
            assert len(state.outputs[0]) == len(state.batch.ids) == 24
            return {"decorrelation": state.outputs[0].mean(0).square().sum()}

    run = train(new_model(), method(), Decorrelation())
    assert sorted(run.history[-1].terms) == ["clip", "decorrelation", "strong_clip"]
    same = {"image_view": fixed, "text_view": copies}
    whole = coloss.fit(
        new_model(),
        new_data(),
        methods=[method(**same)],
        budget=Budget(steps=2),
        batch_size=16,
        optimizer=SGD,
    )
    parts = coloss.fit(
        new_model(),
        new_data(),
        methods=[method(**same)],
        budget=Budget(steps=2),
        batch_size=8,
        accumulate=2,
        optimizer=SGD,
    )
    for one, other in zip(whole.model.state_dict().values(), parts.model.state_dict().values()):
        torch.testing.assert_close(one, other)


def test_half_precision_ends_finite():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    run = train(new_model(), method(extra="swalip", label_smoothing=0.0), fabric=fabric)
    assert all(value.isfinite().all() for value in run.model.state_dict().values())
    assert all(abs(term) < 100 for term in run.history[-1].terms.values())


def test_bad_options_are_named(as_users_call):
    for options, message in (
        ({"views": -1}, "views must be >= 0, got -1"),
        ({"projector": ()}, r"projector must hold widths >= 1, at least one, got \[\]"),
        ({"extra": "simlip"}, "extra must be one of siamlip, byolip, barlip, swalip or None, got 'simlip'"),
        (
            {"extra": "swalip"},
            "swalip needs views=2 and label_smoothing=0, got views=2 and label_smoothing=0.1",
        ),
        ({"extra_weight": -1.0}, "extra_weight must be >= 0 and finite, got -1.0"),
        ({"text_dropout": 1.0}, r"text_dropout must be in \[0, 1\), got 1.0"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"reduction": "mean"}, 'reduction must be "avg" or "sum"'),
    ):
        with pytest.raises(InputError, match=message):
            method(**options)


def test_bad_runs_are_named(as_users_call):
    shared = DualEncoder(*[MLP(6, (8,), 5)] * 2)
    flat = DualEncoder(MLP(6, (8,), 5), MLP(4, (8,), 5))
    pair = IndexedDataset((torch.rand(8, 6), torch.rand(8, 6)))
    for model, data, options, message in (
        (MLP(6, (8,), 5), new_data(), {}, "the model must be a coloss.nn.DualEncoder, got MLP"),
        (shared, pair, {}, "heads on features need two encoders, got one that serves both sides"),
        (flat, new_data(), {"text_dropout": 0.1}, "act on coloss.nn.TransformerBlock, MLP has none"),
        (
            new_model(),
            IndexedDataset(torch.rand(8, 6)),
            {},
            r"inputs must be a pair \(images, texts\), got Tensor",
        ),
        (
            new_model(),
            new_data(),
            {"image_view": partial(copies, views=3)},
            r"image_view must give shape \(2, 8, 6\)",
        ),
        (
            new_model(),
            new_data(),
            {"text_view": WordAugment(1)},
            r"text_view must give shape \(2, 8, 4\), got \(1, 8, 4\)",
        ),
        (new_model(), new_data(), {"image_tap": "query_encoder.9"}, "query_encoder.9"),
    ):
        with pytest.raises(InputError, match=message):
            train(model, method(**options), data=data)


def test_the_lab_builds_it_with_the_stop_words_of_the_captions():
    setting = Setting.of(image_text_task(Budget(steps=2), size=8, limit=40, batch_size=20), seed=0)
    multi = MultiViewClip.for_setting(setting, views=3)
    words = {setting.splits.vocabulary.words[number] for number in multi.text_view.stop_ids.tolist()}
    assert {"of", "the", "with"} <= words
    run = setting.fit(setting.new_model(), None, [multi])
    assert sorted(run.history[-1].terms) == ["clip", "strong_clip"]


def test_the_claim_runs():
    found = verify("clip-baselines", smoke=True, seeds=1)
    names = {
        "clip",
        "clip, whole crops",
        "heads alone",
        "heads and image views",
        "recipe",
        "recipe, own heads",
    }
    assert set(found["arms"]) == names
    assert found["metric"] == "class_map"
