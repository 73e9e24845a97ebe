from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes, weights
from lightning_fabric import Fabric
from torch import Tensor

import coloss
from coloss import Budget, Method
from coloss.data import IndexedDataset
from coloss.motion import (
    PAPER_TOKENIZER,
    SMALL_TOKENIZER,
    MotionReconstruction,
    MotionTokenizerTraining,
    MotionVQVAE,
    motion_tokenizer_loss,
    motion_tokenizer_terms,
    token_mask,
)

NUMBERS, JOINTS = 9, (4, 7)


def new_model(**options: Any) -> MotionVQVAE:
    return MotionVQVAE(NUMBERS, 6, 1, codes=5, code_dim=3, **options)


def new_clips(count: int = 16, frames: int = 8) -> Tensor:
    return torch.randn(count, frames, NUMBERS)


def test_the_published_sizes_turn_196_frames_into_49_tokens() -> None:
    with torch.device("meta"):
        model = MotionVQVAE(263, **PAPER_TOKENIZER)
    assert model.frames_per_token == 4
    assert 196 // model.frames_per_token == 49
    assert model.quantizer.codes.shape == (512, 512)
    dilations = [layer.dilation[0] for layer in model.modules() if isinstance(layer, torch.nn.Conv1d)]
    assert dilations == [1, 1, 9, 1, 3, 1, 1, 1, 1, 9, 1, 3, 1, 1, 1, 1, 1] + [9, 1, 3, 1, 1, 1, 1] * 2 + [
        1,
        1,
    ]


def test_the_small_sizes_turn_64_frames_into_16_tokens() -> None:
    model = MotionVQVAE(131, **SMALL_TOKENIZER).eval()
    found = model(torch.randn(2, 64, 131))
    assert found.features.shape == (2, 64, 131)
    assert found.tokens.shape == (2, 16)
    assert found.valid.all()


@pytest.mark.parametrize("levels", [1, 2])
def test_tokens_decode_to_the_reconstruction(levels: int) -> None:
    model, clips = new_model(levels=levels), new_clips()
    model(clips)
    model.eval()
    found = model(clips)
    tokens = model.tokens(clips)
    assert torch.equal(tokens, found.tokens)
    torch.testing.assert_close(model.decode(tokens), found.features)
    assert tokens.ndim == (2 if levels == 1 else 3)


@pytest.mark.parametrize("filling", [7.0, torch.nan])
def test_a_padded_clip_has_the_tokens_losses_and_gradients_it_has_alone(filling: float) -> None:
    # The released code encodes the zeros that fill up a clip, and takes their codes for targets.
    clips, lengths = new_clips(2, 16), torch.tensor([16, 8])
    clips[1, 8:] = filling
    model = new_model()
    model(clips[:1])
    model.eval()
    found, alone = model(clips, lengths), model(clips[1:, :8])
    assert torch.equal(found.tokens[1, :2], alone.tokens[0])
    assert found.tokens[1, 2:].tolist() == [-1, -1]
    torch.testing.assert_close(found.features[1, :8], alone.features[0])
    assert (found.features[1, 8:] == 0).all()
    torch.testing.assert_close(model.decode(found.tokens), found.features)

    first = model(clips[:1])
    values = [motion_tokenizer_terms(found, clips, JOINTS)]
    values += [
        motion_tokenizer_terms(x, clip, JOINTS) for x, clip in ((first, clips[:1]), (alone, clips[1:, :8]))
    ]
    for name in values[0]:
        expected = (16 * values[1][name] + 8 * values[2][name]) / 24
        torch.testing.assert_close(values[0][name], expected)
    motion_tokenizer_loss(found, clips, JOINTS).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_frames_after_the_last_whole_token_are_filling() -> None:
    model, clips = new_model().eval(), new_clips(1, 8)
    changed = clips.clone()
    changed[:, 4:] = 100.0
    lengths = torch.tensor([7])
    assert torch.equal(model(clips, lengths).features, model(changed, lengths).features)
    assert token_mask(lengths, 2, 4, clips).tolist() == [[True, False]]


def test_the_loss_is_that_of_the_paper() -> None:
    clips, decoded = new_clips(3), new_clips(3) * 2
    commitment = torch.tensor(0.7)
    found = MotionReconstruction(
        decoded, torch.zeros(3, 2, dtype=torch.int64), commitment, torch.tensor(1.0), torch.ones(3, 8).bool()
    )
    expected = (
        F.smooth_l1_loss(decoded, clips)
        + 0.5 * F.smooth_l1_loss(decoded[..., 4:7], clips[..., 4:7])
        + 0.02 * commitment
    )
    torch.testing.assert_close(motion_tokenizer_loss(found, clips, JOINTS), expected)
    assert sorted(motion_tokenizer_terms(found, clips, None)) == ["commitment", "reconstruction"]


def test_tokens_may_be_asked_for_in_training_without_a_change() -> None:
    model, clips = new_model(), new_clips()
    model(clips)
    before = weights(model)
    model.tokens(clips)
    assert model.quantizer.training
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


# In fit


class Smoothness(Method):
    """A second source of loss on the same run."""

    def terms(self, state: coloss.State) -> dict[str, Tensor]:
        return {"smoothness": state.outputs.features.diff(dim=1).square().mean()}


def test_training_lowers_the_reconstruction_error_with_another_method() -> None:
    clips = torch.randn(4, 1, NUMBERS).repeat_interleave(8, 0).expand(-1, 4, -1).contiguous()
    run = coloss.fit(
        new_model(),
        (clips,),
        None,
        [MotionTokenizerTraining(JOINTS), Smoothness()],
        combine={"smoothness": 0.01},
        budget=Budget(steps=6),
        batch_size=32,
        log_every=1,
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-2),
    )
    terms = [point.terms["reconstruction"] for point in run.history]
    assert terms[-1] < terms[0]
    assert sorted(run.history[-1].terms) == ["commitment", "joints", "reconstruction", "smoothness"]
    assert 1 <= run.history[-1].metrics["perplexity"] <= 5


def test_the_terms_have_the_weights_of_the_paper() -> None:
    method = MotionTokenizerTraining(JOINTS)
    step = coloss.TrainingStep(new_model(), None, [method])
    clips = new_clips()
    terms = step(clips)
    total = step.combine(step.state, terms)
    torch.testing.assert_close(total, motion_tokenizer_loss(step.state.outputs, clips, JOINTS))


def test_fit_a_plain_loop_and_lightning_train_alike() -> None:
    batches = [((new_clips(2), torch.tensor([8, 4])),)]
    check_loops(new_model, lambda: MotionTokenizerTraining(JOINTS), batches, epochs=1)


def test_a_killed_run_resumes_to_the_bit(tmp_path: Path) -> None:
    data = IndexedDataset((new_clips(24), torch.tensor([8, 4, 5] * 8)))
    check_resume(
        lambda: MotionVQVAE(NUMBERS, 4, 1, codes=5, code_dim=3, levels=2, dropout=0.1),
        lambda: MotionTokenizerTraining(JOINTS),
        data,
        tmp_path,
        steps=3,
        kill_at=2,
        checkpoint_every=1,
    )


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    # How `fit` deals a batch out and joins gradients is shown elsewhere.
    clips, lengths = new_clips(4).double(), torch.tensor([8, 4, 8, 4])

    def train(fabric: Fabric) -> dict[str, Tensor]:
        model = new_model().double()
        share = slice(fabric.global_rank, None, fabric.world_size)
        terms = motion_tokenizer_terms(model(clips[share], lengths[share]), clips[share], JOINTS)
        gradients = torch.autograd.grad(sum(terms.values()), list(model.parameters()))
        found = torch.cat([*(term.detach()[None] for term in terms.values()), *map(torch.flatten, gradients)])
        if fabric.world_size > 1:
            torch.distributed.all_reduce(found)
        return {"terms and gradients": found / fabric.world_size, "codes": model.quantizer.codes}

    check_two_processes(train, tmp_path)


def test_mixed_precision_stays_finite_and_keeps_the_codes_in_float32() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    run = coloss.fit(
        new_model(),
        (new_clips(),),
        None,
        [MotionTokenizerTraining(JOINTS)],
        budget=Budget(steps=1),
        fabric=fabric,
    )
    assert run.model.quantizer.codes.dtype == torch.float32
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_dim": 0}, "in_dim must be >= 1, got 0"),
        ({"depth": -1}, "depth must be >= 0, got -1"),
        ({"levels": 0}, "levels must be >= 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_sizes_are_named(options: dict[str, Any], message: str, as_users_call: None) -> None:
    with pytest.raises(ValueError, match=message):
        MotionVQVAE(**({"in_dim": 9, "width": 4} | options))


def test_bad_calls_are_named(as_users_call: None) -> None:
    model = new_model()
    with pytest.raises(ValueError, match="features must have 9 numbers a frame, got 8"):
        model(torch.randn(1, 8, 8))
    with pytest.raises(ValueError, match="features must have a multiple of 4 frames, got 10"):
        model(torch.randn(1, 10, 9))
    with pytest.raises(ValueError, match="features must have a multiple of 4 frames, got 0"):
        model(torch.randn(1, 0, 9))
    with pytest.raises(ValueError, match=r"lengths must be in \[4, 8\], got 3 to 8"):
        model(torch.randn(2, 8, 9), torch.tensor([8, 3]))
    for read in (model, model.encode, model.tokens):
        with pytest.raises(ValueError, match=r"lengths must have shape \(2,\), got \(1,\)"):
            read(torch.randn(2, 8, 9), torch.tensor([8]))
    with pytest.raises(ValueError, match=r"indices must be in \[-1, 5\), got 5 to 5"):
        model.decode(torch.tensor([[5]]))
    with pytest.raises(ValueError, match=r"joints must lie within the 9 numbers of a frame, got \(4, 10\)"):
        motion_tokenizer_loss(model(new_clips(1)), new_clips(1), (4, 10))
    with pytest.raises(ValueError, match="joint_weight must be >= 0, got -1"):
        MotionTokenizerTraining(joint_weight=-1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_frame_that_is_not_finite_is_no_token(value: float, as_users_call: None) -> None:
    model, clips = new_model().eval(), new_clips(3)
    clips[1, 6, 2] = value
    with pytest.raises(ValueError, match="features must be finite within lengths, got .* in clip 1"):
        model.tokens(clips)
    with pytest.raises(ValueError, match="features must be finite within lengths, got .* in clip 1"):
        model(clips, torch.tensor([4, 8, 8]))
    assert (model.tokens(clips, torch.tensor([8, 4, 8])) >= 0).sum(1).tolist() == [2, 1, 2]
