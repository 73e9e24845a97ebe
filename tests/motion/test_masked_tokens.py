import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss import Budget, Method
from coloss.data import Batch
from coloss.motion import (
    PAPER_GENERATOR,
    SMALL_GENERATOR,
    MaskedTokenTraining,
    MaskedTokenTransformer,
    guided_logits,
    mask_tokens,
    masked_token_loss,
)

CODES, MASK = 7, 7


def new_model(causal: bool = True, **options: Any) -> MaskedTokenTransformer:
    sizes = {"dim": 16, "depth": 2, "heads": 2, "max_tokens": 9} | options
    return MaskedTokenTransformer(CODES, 4, causal=causal, **sizes)


def new_tokens(*shape: int) -> Tensor:
    return torch.randint(CODES, shape)


# The transformer


def test_a_causal_model_never_looks_ahead() -> None:
    # Fails on the released code, whose float mask is added to the scores and forbids nothing.
    model, tokens, condition = new_model().eval(), new_tokens(3, 9), torch.randn(3, 4)
    logits = model(tokens, condition)
    for place in range(9):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % CODES
        other = model(changed, condition)
        assert torch.equal(other[:, :place], logits[:, :place])
        assert (other[:, place:] != logits[:, place:]).any(-1).all()


def test_a_bidirectional_model_looks_everywhere() -> None:
    model, tokens = new_model(causal=False).eval(), new_tokens(2, 9)
    changed = tokens.clone()
    changed[:, -1] = MASK
    assert (model(changed) != model(tokens)).any(-1).all()


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_looked_at_by_nobody(causal: bool) -> None:
    # The released code computes its padding mask and never hands it on.
    model, tokens, condition = new_model(causal).eval(), new_tokens(2, 9), torch.randn(2, 4)
    tokens[1, 5:] = -1
    torch.testing.assert_close(model(tokens, condition)[1:, :5], model(tokens[1:, :5], condition[1:]))


@pytest.mark.parametrize("causal", [True, False])
def test_every_place_hears_the_condition(causal: bool) -> None:
    model, tokens = new_model(causal).eval(), new_tokens(2, 9)
    assert (model(tokens, torch.randn(2, 4)) != model(tokens, torch.randn(2, 4))).any(-1).all()


def test_no_condition_is_one_of_zeros_and_pairs_go_in_as_one() -> None:
    model, tokens, condition = new_model().eval(), new_tokens(2, 9), torch.randn(2, 4)
    assert torch.equal(model(tokens), model(tokens, torch.zeros(2, 4)))
    assert torch.equal(model((tokens, condition)), model(tokens, condition))


@pytest.mark.parametrize("sizes", [PAPER_GENERATOR, SMALL_GENERATOR])
def test_the_sizes_for_paper_and_cpu_are_arguments(sizes: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = MaskedTokenTransformer(512, 768, **sizes)
    assert len(model.transformer.blocks) == sizes["depth"]
    assert model.transformer.blocks[0].mlp[0].out_features == 2 * sizes["dim"]


# Masks


def test_shares_of_chosen_tokens_are_as_published() -> None:
    tokens = torch.randint(1000, (400, 60))
    found = mask_tokens(tokens, 1000, generator=torch.Generator().manual_seed(0))
    chosen = found.chosen
    hidden = (found.tokens == 1000)[chosen].float().mean().item()
    kept = (found.tokens == tokens)[chosen].float().mean().item()
    assert torch.equal(found.tokens[~chosen], tokens[~chosen])
    assert hidden == pytest.approx(0.792, abs=0.01)
    assert kept == pytest.approx(0.108, abs=0.01)
    # The mean of cos(pi u / 2) over u in (0, 1) is 2 / pi.
    shares = chosen.float().mean(1)
    assert shares.mean().item() == pytest.approx(2 / math.pi, abs=0.04)
    assert (shares < 0.2).any() and (shares > 0.95).any()
    # Every place is as likely as any other.
    assert chosen.float().mean(0).sub(2 / math.pi).abs().max() < 0.12


def test_padding_is_never_chosen_and_a_token_always_is() -> None:
    tokens = torch.full((200, 8), -1)
    tokens[:, :3] = new_tokens(200, 3)
    found = mask_tokens(tokens, CODES)
    assert (found.tokens[:, 3:] == -1).all()
    assert not found.chosen[:, 3:].any()
    assert found.chosen.any(1).all()
    assert found.tokens[:, :3].min() >= 0 and found.tokens.max() <= MASK


def test_masks_are_functions_of_the_generator() -> None:
    tokens = new_tokens(5, 9)
    first, second = (mask_tokens(tokens, CODES, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)


def test_the_loss_counts_chosen_places_alone() -> None:
    logits, tokens = torch.randn(3, 5, CODES), new_tokens(3, 5)
    chosen = torch.rand(3, 5) < 0.5
    expected = F.cross_entropy(logits[chosen], tokens[chosen])
    torch.testing.assert_close(masked_token_loss(logits, tokens, chosen), expected)
    wild = torch.where(chosen[..., None], logits, torch.nan).requires_grad_()
    loss = masked_token_loss(wild, tokens, chosen)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected)
    assert wild.grad is not None and wild.grad[~chosen].abs().max() == 0
    assert masked_token_loss(logits, tokens, torch.zeros(3, 5).bool()) == 0
    assert masked_token_loss(logits.half(), tokens, chosen).dtype == torch.float32


# In fit


class Small(Method):
    """A second source of loss on the same run."""

    def terms(self, state: coloss.State) -> dict[str, Tensor]:
        return {"small": state.outputs.square().mean()}


def test_the_term_is_the_loss_of_what_was_hidden() -> None:
    model, tokens, condition = new_model(), new_tokens(6, 9), torch.randn(6, 4)
    method = MaskedTokenTraining(CODES, condition_dropout=1.0)
    step = coloss.TrainingStep(model, None, [method, Small()])
    batch = Batch(tokens, condition)
    terms = step(batch)
    assert batch.inputs is tokens, "the caller's batch stays as it was"
    hidden, given = step.state.batch.inputs
    assert (given == 0).all()
    torch.testing.assert_close(
        terms["masked_tokens"], masked_token_loss(model(hidden), tokens, method.chosen)
    )
    assert sorted(terms) == ["masked_tokens", "small"]
    step.backward(terms)
    step.finish()
    assert method.truth is None and not method.state_dict()


def test_a_condition_module_is_trained_along() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, batch: Batch) -> Tensor:
            return self.layer(batch.extras["text"])

    text = Text()
    before = text.layer.weight.detach().clone()
    batches = [{"inputs": new_tokens(8, 9), "text": torch.randn(8, 3)}]
    coloss.fit(
        new_model(), batches, None, [MaskedTokenTraining(CODES, condition=text)], budget=Budget(steps=2)
    )
    assert not torch.equal(before, text.layer.weight)


def test_a_sequence_is_learnt_by_heart_and_generated_by_its_condition() -> None:
    conditions, tokens = 3 * torch.eye(4)[:2], torch.tensor([[1, 1], [3, 3]])
    run = coloss.fit(
        new_model(depth=1),
        (tokens.repeat(16, 1), conditions.repeat(16, 1)),
        None,
        [MaskedTokenTraining(CODES)],
        budget=Budget(steps=12),
        batch_size=32,
        optimizer=lambda p: torch.optim.AdamW(p, lr=2e-2),
    )
    found = run.model.generate(
        conditions, 2, steps=2, guidance=2.0, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(found, tokens)
    assert run.history[-1].metrics["masked_accuracy"] > 0.8


def test_fit_a_plain_loop_and_lightning_train_alike() -> None:
    batches = [(new_tokens(6, 9), torch.randn(6, 4)) for _ in range(2)]
    check_loops(new_model, lambda: MaskedTokenTraining(CODES), batches, epochs=1)


def test_a_killed_run_resumes_to_the_bit(tmp_path: Path) -> None:
    check_resume(
        lambda: new_model(dropout=0.1, depth=1),
        lambda: MaskedTokenTraining(CODES),
        (new_tokens(24, 9), torch.randn(24, 4)),
        tmp_path,
        steps=3,
        kill_at=2,
        checkpoint_every=1,
    )


def test_the_loss_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    logits, tokens = torch.randn(6, 5, CODES).double(), new_tokens(6, 5)
    # Unequal numbers of places: the mean of means would be another.
    chosen = torch.rand(6, 5) < torch.tensor([0.9, 0.1] * 3)[:, None]

    def train(fabric: Fabric) -> dict[str, Tensor]:
        share = slice(fabric.global_rank, None, fabric.world_size)
        inputs = logits.clone().requires_grad_()
        loss = masked_token_loss(inputs[share], tokens[share], chosen[share])
        (gradient,) = torch.autograd.grad(loss, inputs)
        found = torch.cat([loss.detach()[None], gradient.flatten()])
        if fabric.world_size > 1:
            torch.distributed.all_reduce(found)
        return {"loss and gradient": found / fabric.world_size}

    check_two_processes(train, tmp_path)


def test_a_batch_of_padding_alone_costs_nothing_and_has_an_accuracy() -> None:
    step = coloss.TrainingStep(new_model(), None, [MaskedTokenTraining(CODES)])
    assert step(Batch(torch.full((2, 3), -1), torch.randn(2, 4)))["masked_tokens"] == 0
    assert step.state.logged["masked_accuracy"] == [0.0, 1]


def test_half_models_take_float_conditions() -> None:
    model = new_model().bfloat16().eval()
    assert model(new_tokens(2, 9), torch.randn(2, 4)).isfinite().all()


def test_a_scale_of_one_generates_from_conditional_logits_alone() -> None:
    model, condition = new_model().eval(), torch.randn(3, 4)
    calls = []
    model.condition.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0]))
    model.generate(condition, 9, steps=3, guidance=1.0)
    assert len(calls) == 3
    assert all(torch.equal(given, condition) for given in calls)
    logits = torch.randn(2, 9, CODES)
    assert guided_logits(logits, logits * math.inf, 1.0) is logits


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 0}, "num_codes must be >= 1, got 0"),
        ({"condition_dim": 0}, "condition_dim must be >= 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
        ({"heads": 3}, "heads must divide dim 16, got 3"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be >= 1 / 16, one over dim, got 0.0"),
    ],
)
def test_bad_sizes_are_named(options: dict[str, Any], message: str, as_users_call: None) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedTokenTransformer(
            **({"num_codes": 4, "condition_dim": 4, "dim": 16, "heads": 2, "depth": 1} | options)
        )


def test_bad_calls_are_named(as_users_call: None) -> None:
    model = new_model()
    with pytest.raises(ValueError, match="tokens must be at most 9, got 10"):
        model(new_tokens(1, 10))
    with pytest.raises(ValueError, match=r"tokens must be in \[-1, 7\], got 0 to 8"):
        model(torch.tensor([[0, 8]]))
    with pytest.raises(ValueError, match=r"condition must have shape \(1, 4\), got \(2, 4\)"):
        model(new_tokens(1, 9), torch.randn(2, 4))
    with pytest.raises(ValueError, match="random_share and kept_share must be >= 0 and at most 1 together"):
        MaskedTokenTraining(CODES, random_share=0.9, kept_share=0.2)
    with pytest.raises(ValueError, match="num_codes must be >= 1, got 0"):
        MaskedTokenTraining(0)
    with pytest.raises(ValueError, match=r"condition_dropout must be in \[0, 1\], got 2"):
        MaskedTokenTraining(CODES, condition_dropout=2)
    with pytest.raises(ValueError, match="targets must be condition vectors .* got torch.int64"):
        coloss.fit(
            model,
            (new_tokens(4, 9), torch.arange(4)),
            None,
            [MaskedTokenTraining(CODES)],
            budget=Budget(steps=1),
        )


class Wrapped(nn.Module):
    """A generator that does not say how many codes it has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        return self.model(inputs)


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped])
@pytest.mark.parametrize("codes", [5, 20])
def test_a_number_of_codes_other_than_the_models_is_refused(wrap: Any, codes: int) -> None:
    # With 5 for a model of 7 codes, code 5 would be the mask token, and the model's own never seen in training.
    step = coloss.TrainingStep(
        wrap(new_model()), None, [MaskedTokenTraining(codes, random_share=0.0, kept_share=1.0)]
    )
    with pytest.raises(ValueError, match=rf"num_codes must be the model's 7, got {codes}"):
        step(Batch(torch.randint(5, (4, 9)), torch.randn(4, 4)))


def test_tokens_that_are_no_codes_are_refused() -> None:
    step = coloss.TrainingStep(Wrapped(new_model()), None, [MaskedTokenTraining(5)])
    with pytest.raises(ValueError, match=r"tokens must be in \[-1, 5\), got -1 to 6"):
        step(Batch(torch.tensor([[6, -1]]), torch.randn(1, 4)))
