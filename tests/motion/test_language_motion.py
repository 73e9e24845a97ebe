from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss import Budget, Method, TrainingStep
from coloss.data import Batch, IndexedDataset
from coloss.motion import (
    LanguageMotionCondition,
    LanguageMotionModel,
    LanguageMotionPretraining,
    MotionVQVAE,
    contrastive_max_loss,
    encode_motions,
    read_motion_tokens,
)
from coloss.motion.language_motion import TERMS, _merged, _same_rows

CODES = 7


def new_model() -> LanguageMotionModel:
    return LanguageMotionModel(20, 3, max_tokens=4, dim=8, layers=2, heads=2, max_words=5, embedding_dim=6)


def new_data(rows: int = 12) -> IndexedDataset:
    codes = torch.randint(CODES, (rows, 4))
    codes[0, 2:] = -1
    words = torch.randint(1, 20, (rows, 5))
    words[-1, 3:] = 0
    return IndexedDataset(torch.randn(rows, 4, 3), extras={"codes": codes, "words": words})


def one_step(
    method: Method, model: nn.Module | None = None, **extras: Any
) -> tuple[TrainingStep, dict[str, Tensor]]:
    data = new_data()
    step = TrainingStep(model or new_model(), None, [method], total_steps=4)
    batch = Batch(data.inputs, ids=data.ids, extras={**data.extras, **extras})
    return step, step(batch)


class Smoothness(Method):
    """A second source of loss on the same run."""

    def terms(self, state: coloss.State) -> dict[str, Tensor]:
        return {"smoothness": sum((p.square().sum() for p in state.model.parameters()), torch.tensor(0.0))}


# Terms


def test_all_four_terms_reach_the_model_and_each_can_be_left_out() -> None:
    for losses in (TERMS, *((name,) for name in TERMS), ("contrastive", "captioning")):
        step, terms = one_step(LanguageMotionPretraining(CODES, losses=losses))
        assert set(terms) == set(losses)
        assert all(term.isfinite() and term > 0 for term in terms.values())
        step.backward(terms)
        assert all(p.grad is not None for p in step.trainable)


def test_the_contrastive_term_is_the_plain_function_on_the_projections() -> None:
    method = LanguageMotionPretraining(CODES, losses=["contrastive"], scale=5.0)
    step, terms = one_step(method)
    model, batch = step.model, step.state.batch
    words, valid = batch.extras["words"], batch.extras["codes"] >= 0
    h = model.motion_head(model.read_motion(batch.inputs, valid).queries)
    g = model.text_head(model.transformer.read_text(words)[:, 0])
    torch.testing.assert_close(
        terms["contrastive"], contrastive_max_loss(h, g, 5.0, groups=_same_rows(words))
    )


def test_the_scale_learns_from_the_contrastive_term_alone_and_stays_below_100() -> None:
    method = LanguageMotionPretraining(CODES)
    step, terms = one_step(method)
    for name, term in terms.items():
        (gradient,) = step.state.gradients(term, [method.log_scale])
        assert (gradient is not None and gradient.item() != 0) == (name == "contrastive")
    assert method.scale().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        method.log_scale.fill_(9.0)
    assert method.scale().item() == pytest.approx(100)


def test_a_scale_that_went_beyond_its_limit_can_come_back() -> None:
    method = LanguageMotionPretraining(CODES, losses=["contrastive"])
    step, _ = one_step(method)
    with torch.no_grad():
        method.log_scale.fill_(9.0)
    terms = step(step.state.batch)
    (gradient,) = step.state.gradients(terms["contrastive"], [method.log_scale])
    assert gradient is not None
    assert gradient.item() != 0
    assert method.log_scale.exp().item() == pytest.approx(100)


def test_padding_is_neither_memory_nor_target() -> None:
    method = LanguageMotionPretraining(CODES)
    step, terms = one_step(method)
    batch = step.state.batch
    step.state.generator.manual_seed(0)
    first = step(Batch(batch.inputs, extras=batch.extras))
    for filling in (100.0, torch.nan):
        motions = batch.inputs.clone()
        motions[0, 2:] = filling
        step.state.generator.manual_seed(0)
        again = step(Batch(motions, extras=batch.extras))
        for name in terms:
            torch.testing.assert_close(first[name], again[name])
    step.backward(again)
    assert all(p.grad.isfinite().all() for p in step.trainable if p.grad is not None)


def test_a_batch_of_one_and_a_batch_of_one_text_work() -> None:
    method = LanguageMotionPretraining(CODES)
    step = TrainingStep(new_model(), None, [method])
    data = new_data(1)
    terms = step(Batch(data.inputs, extras=data.extras))
    assert terms["contrastive"].item() == pytest.approx(0, abs=1e-6)
    assert all(term.isfinite() for term in terms.values())
    _, terms = one_step(method, groups=torch.zeros(12, dtype=torch.int64))
    assert terms["contrastive"].item() == pytest.approx(0, abs=1e-6)
    assert terms["matching"].isfinite()


def test_one_caption_of_each_clip_is_drawn_from_those_it_has() -> None:
    words = torch.arange(1, 19).view(1, 3, 6)[:, :, :5].expand(12, -1, -1).clone()
    counts = torch.tensor([1, 2, 3] * 4)
    method = LanguageMotionPretraining(CODES, losses=["captioning"])
    extras = {**new_data().extras, "words": words, "caption_counts": counts}
    step = TrainingStep(new_model(), None, [method])
    seen = [set() for _ in range(12)]  # type: ignore[var-annotated]
    for _ in range(12):
        step(Batch(torch.randn(12, 4, 3), extras=extras))
        for row, first in enumerate(step.state.batch.extras["words"][:, 0].tolist()):
            seen[row].add(first)
    assert seen == [{1}, {1, 7}, {1, 7, 13}] * 4


def test_texts_are_the_same_by_their_words_or_by_their_group() -> None:
    words = torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6], [7, 8]])
    found = _merged(_same_rows(words), torch.tensor([0, 1, 2, 1, 2]))
    same = found[:, None] == found
    assert same.int().tolist() == [
        [1, 0, 1, 0, 1],
        [0, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
        [0, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ]


def test_a_frozen_tokenizer_reads_the_batch_as_the_encoded_data_have_it() -> None:
    tokenizer = MotionVQVAE(5, 8, 1, codes=CODES, code_dim=3)
    features, lengths = torch.randn(12, 16, 5), torch.tensor([16, 8] * 6)
    data = IndexedDataset((features, lengths), extras={"words": torch.randint(1, 20, (12, 5))})
    encoded = encode_motions(tokenizer, data, chunk=5)
    assert tokenizer.training
    whole = read_motion_tokens(tokenizer.eval(), features, lengths)
    torch.testing.assert_close(encoded.inputs, whole.vectors)
    assert torch.equal(encoded.extras["codes"], whole.codes)
    model = new_model()
    step = TrainingStep(
        model, None, [LanguageMotionPretraining(CODES, tokenizer=tokenizer, losses=["contrastive"])]
    )
    raw = step(Batch(data.inputs, extras=data.extras))
    step = TrainingStep(model, None, [LanguageMotionPretraining(CODES, losses=["contrastive"])])
    torch.testing.assert_close(raw, step(Batch(encoded.inputs, extras=encoded.extras)))
    assert all(not p.requires_grad for p in tokenizer.parameters())


# The model


def test_embeddings_are_unit_vectors_of_the_mean_query_and_of_the_class_token() -> None:
    model = new_model()
    data = new_data()
    motion, text = model(data.inputs), model.embed_text(data.extras["words"])
    torch.testing.assert_close(motion.norm(dim=1), torch.ones(12))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(12))
    mean = model.motion_head(model.read_motion(data.inputs).queries).mean(1)
    torch.testing.assert_close(motion, mean / mean.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("by_queries", [True, False])
def test_a_condition_trains_its_own_layers_and_leaves_the_model_as_it_is(by_queries: bool) -> None:
    model = new_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    condition = LanguageMotionCondition(model, 9, by_queries=by_queries).train()
    assert not model.training
    optimizer = torch.optim.SGD([p for p in condition.parameters() if p.requires_grad], lr=0.1)
    condition(new_data().extras["words"]).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    if condition.text_memory is not None:
        assert not torch.equal(condition.text_memory.weight, model.text_memory.weight)


# In runs


def test_fit_a_plain_loop_and_lightning_take_the_same_steps(as_users_call: None) -> None:
    data = new_data()

    def batches() -> list[Any]:
        return [{"inputs": data.inputs, "targets": None, **data.extras}] * 2

    check_loops(new_model, lambda: LanguageMotionPretraining(CODES), batches(), None, epochs=1)  # type: ignore[arg-type]


def test_a_killed_run_goes_on_to_the_same_end(tmp_path: Path, as_users_call: None) -> None:
    data = new_data()
    check_resume(
        new_model,
        lambda: LanguageMotionPretraining(CODES),
        data,
        tmp_path,
        steps=4,
        kill_at=3,
        checkpoint_every=2,
        batch_size=6,
    )


def test_two_processes_take_the_steps_of_one(tmp_path: Path, as_users_call: None) -> None:
    data = new_data(16)
    captions = torch.randint(1, 20, (16, 2, 5))
    groups = torch.arange(16) % 6

    def train(fabric: Fabric) -> dict[str, Tensor]:
        torch.manual_seed(0)
        method = LanguageMotionPretraining(CODES)
        rows = IndexedDataset(
            data.inputs.double(), extras={"codes": data.extras["codes"], "words": captions, "groups": groups}
        )
        run = coloss.fit(
            new_model().double(),
            rows,
            None,
            [method],
            budget=Budget(steps=2),
            batch_size=8,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            fabric=fabric,
        )
        return {**run.model.state_dict(), "log_scale": method.log_scale.double()}

    check_two_processes(train, tmp_path, atol=1e-7)


def test_it_runs_beside_another_method_and_ships_the_model_alone() -> None:
    run = coloss.fit(
        new_model(),
        new_data(),
        None,
        [LanguageMotionPretraining(CODES), Smoothness()],
        budget=Budget(steps=2),
        batch_size=6,
    )
    assert set(run.history[-1].terms) == {*TERMS, "smoothness"}
    assert set(run.model.state_dict()) == set(new_model().state_dict())


def test_bfloat16_trains() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    run = coloss.fit(
        new_model(),
        new_data(),
        None,
        [LanguageMotionPretraining(CODES)],
        budget=Budget(steps=2),
        fabric=fabric,
    )
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


def test_bad_input_is_named(as_users_call: None) -> None:
    for options, message in (
        ({"num_codes": 0}, "num_codes must be >= 1, got 0"),
        ({"losses": ["contrast"]}, "losses must be of contrastive, .*, got 'contrast'"),
        ({"losses": []}, "losses must name at least one"),
        ({"scale": 101.0}, r"scale must be in \(0, 100\], got 101"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            LanguageMotionPretraining(**({"num_codes": CODES} | options))
    with pytest.raises(ValueError, match="the model must be a LanguageMotionModel, got Linear"):
        TrainingStep(nn.Linear(3, 3), None, [LanguageMotionPretraining(CODES)])
    with pytest.raises(ValueError, match="must have the extra 'codes'"):
        one_step(LanguageMotionPretraining(CODES), codes=None)
    with pytest.raises(ValueError, match="must have the extra 'words'"):
        one_step(LanguageMotionPretraining(CODES), words=torch.ones(3, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="codes must have 12 rows of at most 4 tokens"):
        model = LanguageMotionModel(20, 3, max_tokens=6, num_queries=4, dim=8, layers=1, heads=2, max_words=5)
        step = TrainingStep(model, None, [LanguageMotionPretraining(CODES)])
        extras = new_data().extras | {"codes": torch.zeros(12, 6, dtype=torch.int64)}
        step(Batch(torch.randn(12, 6, 3), extras=extras))
    with pytest.raises(ValueError, match=r"accumulate|accumulated"):
        coloss.fit(
            new_model(),
            new_data(),
            None,
            [LanguageMotionPretraining(CODES)],
            budget=Budget(steps=1),
            batch_size=4,
            accumulate=2,
        )
    with pytest.raises(ValueError, match="motion_dim must be >= 1, got 0"):
        LanguageMotionModel(20, 0)
    with pytest.raises(ValueError, match=r"tokens must be at most 4 of width 3, got \(5, 3\)"):
        new_model().embed_motion(torch.randn(1, 5, 3))
    with pytest.raises(ValueError, match="dim must be >= 1, got 0"):
        LanguageMotionCondition(new_model(), 0)
