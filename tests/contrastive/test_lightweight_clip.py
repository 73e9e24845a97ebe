"""The method adds its three terms to any pair of encoders with tokens, is CLIP when all is off, and keeps every method's promises."""

from functools import partial
from pathlib import Path

import pytest
import torch
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss import TrainingStep
from coloss.contrastive import LightweightCLIP, clip_loss, soft_target_clip_loss, softened_targets
from coloss.contrastive.shared_captions import caption_model, captioned_digits
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.lab.claims import verify
from coloss.lab.tasks import find_task
from coloss.nn import MLP, Classifier, ConvNet, DualEncoder, ImagePatches, TokenEncoder, Words
from coloss.train import Budget, Setting

OFF = {"token_weight": 0.0, "masked_weight": 0.0}


class Texts(nn.Module):
    """A text tower that holds its encoder deeper inside."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = TokenEncoder(Words(12, 8, max_length=4), 8, 1, 2, registers=1)
        self.out_features = 8

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(ids)


def new_model() -> DualEncoder:
    torch.manual_seed(3)
    return DualEncoder(TokenEncoder(ImagePatches(4, 2, 1, dim=8), 8, 1, 2), Texts())


def new_data(count: int = 32, dtype: torch.dtype = torch.float32) -> IndexedDataset:
    draw = torch.Generator().manual_seed(1)
    words = torch.randint(3, 12, (count, 4), generator=draw)
    words[::3, 2:] = 0
    return IndexedDataset((torch.randn(count, 1, 4, 4, generator=draw).to(dtype), words))


def small(**options) -> LightweightCLIP:
    return LightweightCLIP(**({"token_dim": 6, "candidates": 4, "mask_probability": 0.5} | options))


def one_step(method: LightweightCLIP, model: nn.Module | None = None, progress: float = 0.5) -> TrainingStep:
    step = TrainingStep(model or new_model(), None, [method])
    step.state.progress = progress
    step.state.generator.manual_seed(0)
    return step


def test_with_everything_off_it_is_clip():
    step = one_step(small(highest=0.0, **OFF))
    terms = step(new_data().all())
    assert set(terms) == {"instance"}
    torch.testing.assert_close(terms["instance"], clip_loss(*step.state.outputs, 1 / 0.07))
    assert {name for name, _ in step.methods[0].named_parameters()} == {"scale.log_scale"}


@pytest.mark.parametrize("weights", ["text", "similarity", "uniform"])
def test_the_instance_term_is_clip_with_targets_softened_by_progress(weights):
    step = one_step(small(weights=weights, **OFF), progress=0.5)
    found = step(new_data().all())["instance"]
    images, texts = step.state.outputs
    if weights == "uniform":
        expected = clip_loss(images, texts, 1 / 0.07, label_smoothing=0.1 * 32 / 31)
    else:
        there, back = (
            ((texts, texts), (texts, texts)) if weights == "text" else ((images, texts), (texts, images))
        )
        expected = soft_target_clip_loss(
            images, texts, softened_targets(*there, 0.1), softened_targets(*back, 0.1), 0.07
        )
    torch.testing.assert_close(found, expected)


def test_all_three_terms_reach_the_encoders_and_their_own_heads():
    method = small()
    step = one_step(method)
    terms = step(new_data().all())
    assert sorted(terms) == ["instance", "masked_words", "token"]
    towers = [step.model.query_encoder.transformer.blocks[0], step.model.document_encoder.encoder]
    for name, heads in (
        ("token", [method.image_projection, method.word_projection]),
        ("masked_words", [method.masked_lm.bias, method.masked_lm.fusions[0].out]),
    ):
        for part in [towers[1], *heads]:
            parameters = [part] if isinstance(part, Tensor) else [next(part.parameters())]
            assert step.state.gradients(terms[name], parameters)[0].abs().sum() > 0
    assert step.state.gradients(terms["token"], [next(towers[0].parameters())])[0].abs().sum() > 0
    assert step.state.gradients(terms["instance"], [method.image_projection.weight]) == [None]


def test_the_masked_pass_leaves_no_trace_in_what_other_methods_read():
    class Reads(coloss.Method):
        def setup(self, state):
            state.tap("words", "document_encoder.encoder.transformer")

        def terms(self, state):
            self.seen = state.features["words"], state.outputs
            return {}

    reads, model = Reads(), new_model()
    step = TrainingStep(model, None, [small(), reads])
    batch = new_data().all()
    step(batch)
    torch.testing.assert_close(
        reads.seen[0], model.document_encoder.encoder.encode(batch.inputs[1], with_prefix=True)
    )
    torch.testing.assert_close(reads.seen[1], model(batch.inputs))


def test_words_of_padding_take_no_part_in_the_token_term():
    values = []
    for filler in (0.0, 5.0):
        model = new_model()
        with torch.no_grad():
            model.document_encoder.encoder.tokenizer.embedding.weight[0] = filler
        torch.manual_seed(0)
        values.append(one_step(small(masked_weight=0.0), model)(new_data().all())["token"].item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_convolutions_give_patches_and_paths_may_be_named():
    splits = captioned_digits(0, False)
    batch = splits.train.subset(torch.arange(16)).all()
    for paths in (
        {},
        {"image_tokens": "query_encoder.backbone.stages.0", "text_encoder": "document_encoder.backbone"},
    ):
        torch.manual_seed(0)
        if paths:
            with pytest.raises(InputError, match="must declare out_features"):
                one_step(small(**paths), caption_model(splits))
            paths["image_tokens"] = "query_encoder.backbone.stages"
        found = one_step(small(**paths), caption_model(splits))(batch)
        assert all(term.isfinite() for term in found.values())


def test_bad_input_is_named(as_users_call):
    for options, message in (
        ({"highest": 0.5}, "got 0.5"),
        ({"shape": "steps"}, "got 'steps'"),
        ({"weights": "images"}, 'weights must be "similarity", "text" or "uniform", got \'images\''),
        ({"token_weight": -1.0}, "token_weight must be >= 0 and finite, got -1.0"),
        ({"candidates": 1}, "candidates must be >= 2, got 1"),
        ({"solver": "greedy"}, "got 'greedy'"),
        ({"target_temperature": 0.0}, "target_temperature must be > 0 and finite, got 0.0"),
        ({"mask_probability": 1.5}, r"mask_probability must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be > 0"),
    ):
        with pytest.raises(InputError, match=message):
            LightweightCLIP(**options)
    perceptrons = DualEncoder(MLP(16, [8]), MLP(4, [8]))
    for model, options, message in (
        (Classifier(MLP(4, [5]), 3), {}, "the model must be a DualEncoder"),
        (perceptrons, {}, "the image tower holds no ConvNet or TokenEncoder"),
        (DualEncoder(ConvNet(1, (8,)), MLP(4, [8])), {}, "the text tower holds no TokenEncoder over Words"),
        (
            new_model(),
            {"image_tokens": "nowhere"},
            "image_tokens must name a module of the model, got 'nowhere'",
        ),
        (new_model(), {"text_encoder": "query_encoder"}, "must be a TokenEncoder over Words"),
        (new_model(), {"layers": (4,)}, "layers must be different ones of 0 .. 0"),
    ):
        with pytest.raises(InputError, match=message):
            one_step(small(**options), model)
    with pytest.raises(InputError, match="the model must give the embeddings of images and of texts"):
        one_step(small(**OFF), nn.Linear(4, 3))(torch.randn(2, 4))


def test_the_lab_builds_it_with_tokens_only_where_there_are_any():
    setting = Setting.of(find_task("digits-halves", limit=20), 0)
    assert set(LightweightCLIP.for_setting(setting, highest=0.1).term_weights) == {"instance"}


def test_the_model_ships_as_it_was_built():
    model = new_model()
    names, batch = set(model.state_dict()), new_data().all()
    run = coloss.fit(model, new_data(), methods=[small()], budget=Budget(steps=4), batch_size=8)
    assert set(run.model.state_dict()) == names
    assert not any(module._forward_hooks for module in run.model.modules())
    assert len(run.model(batch.inputs)) == 2


def test_fit_a_plain_loop_and_lightning_take_the_same_steps():
    batches = [((images, words),) for images, words in zip(*(part.split(8) for part in new_data().inputs))]
    check_loops(new_model, small, [(pair, torch.zeros(8)) for (pair,) in batches], None)


def test_a_killed_run_resumes_bit_identically(tmp_path: Path):
    check_resume(new_model, small, new_data(), tmp_path)


def test_two_processes_take_the_steps_of_one(tmp_path: Path):
    def train(fabric: Fabric) -> dict[str, Tensor]:
        run = coloss.fit(
            new_model().double(),
            new_data(dtype=torch.float64),
            methods=[small()],
            budget=Budget(steps=4),
            batch_size=8,
            fabric=fabric,
        )
        return dict(run.model.state_dict())

    check_two_processes(train, tmp_path, atol=1e-7)


def test_mixed_precision_and_another_method_beside_it_stay_finite():
    class Smoothness(coloss.Method):
        def terms(self, state: coloss.State) -> dict[str, Tensor]:
            return {"smoothness": sum(part.float().square().mean() for part in state.outputs)}

    run = coloss.fit(
        new_model(),
        new_data(),
        methods=[small(solver="sinkhorn"), Smoothness()],
        budget=Budget(steps=4),
        batch_size=8,
        accumulate=2,
        fabric=Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"),
    )
    assert sorted(run.history[-1].terms) == ["instance", "masked_words", "smoothness", "token"]
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


def test_training_finds_the_captions_of_images():
    kinds = torch.arange(8)
    pictures = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    data = IndexedDataset((pictures, kinds[:, None] + torch.tensor([3, 4])))
    coloss.fit(
        model := new_model(),
        data,
        methods=[small(**OFF)],
        budget=Budget(steps=50),
        batch_size=8,
        optimizer=partial(torch.optim.Adam, lr=3e-3),
    )
    images, texts = model.eval()(data.inputs)
    assert (images @ texts.T).argmax(1).tolist() == kinds.tolist()


def test_the_claim_runs():
    found = verify("lightweight-clip", smoke=True, seeds=1)
    assert {"hard, shared", "softened by text, shared", "hard, unique", "softened by text, unique"} <= set(
        found["arms"]
    )
    assert found["metric"] == "class_map"
