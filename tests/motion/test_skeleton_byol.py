"""Facts about BYOL on skeletons, the repulsion between models, and streams that vote."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from contract import check_loops, check_resume, check_two_processes, differing, weights
from lightning_fabric import Fabric
from tiny_skeletons import PARENTS, Flat, clips, encoder, shifted
from torch import Tensor, nn

import coloss
from coloss.data import Skeleton, skeleton_streams
from coloss.errors import InputError
from coloss.jepa import VICReg
from coloss.lab.claims import verify
from coloss.motion import (
    BYOL,
    SkeletonACL,
    SkeletonBYOL,
    StreamEncoder,
    StreamHeads,
    byol_loss,
    cross_model_loss,
)
from coloss.motion.skeleton_pretraining_trial import pretraining_task
from coloss.nn import SkeletonEncoder, projection_head
from coloss.train import Setting

SMALL = {"projector": (8, 4), "predictor": 8}
THREE = SMALL | {"parents": PARENTS, "neighbours": 2}


def test_equal_networks_and_views_cost_nothing() -> None:
    byol = BYOL(encoder().eval(), projection_head(4, (8, 4)).eval(), nn.Identity())
    out = byol(clips(), clips())
    assert abs(out.loss()) < 1e-5
    assert abs(cross_model_loss(*out)) < 1e-5


def test_no_gradient_reaches_the_targets() -> None:
    parts = [torch.randn(4, 3, requires_grad=True) for _ in range(4)]
    (byol_loss(parts[0], parts[3]) + cross_model_loss(*parts)).backward()
    assert parts[0].grad is not None
    assert parts[1].grad is not None
    assert parts[2].grad is None
    assert parts[3].grad is None
    byol = BYOL(encoder(), projection_head(4, (8, 4)), projection_head(4, (8, 4)))
    byol(*shifted(clips())).loss().backward()
    assert all(p.grad is None and not p.requires_grad for p in byol.target.parameters())
    assert all(p.grad is not None for p in byol.online.parameters())


def test_losses_by_hand_and_their_bounds() -> None:
    one, other = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert byol_loss(one, other) == 2
    assert byol_loss(one, -one) == 4
    assert byol_loss(one[:0], one[:0]) == 0
    # The predictions agree, and stand across (2) and against (4) what the slow network makes of their own views.
    assert cross_model_loss(one, one, other, -one) == 0 - (2 + 4) / 2
    assert cross_model_loss(one, -one, one, -one, weight=0.5) == 2
    assert byol_loss(one.half(), other.half()).dtype == torch.float32


def test_the_repulsion_alone_runs_away_from_the_average() -> None:
    """The trap: without `byol` beside it, D(p, z) grows to its bound."""
    p, z = nn.Parameter(torch.tensor([[1.0, 0.1], [0.1, 1.0]])), torch.eye(2)
    optimizer = torch.optim.SGD([p], lr=0.3)
    before = byol_loss(p, z).item()
    for _ in range(60):
        optimizer.zero_grad()
        cross_model_loss(p, p, z, z).backward()
        optimizer.step()
    assert byol_loss(p, z) > 3.5 > before


def test_streams_are_what_their_names_say() -> None:
    x = clips()
    found = skeleton_streams(x, PARENTS)
    chain = found["bone"][..., 1] + found["bone"][..., 2]
    torch.testing.assert_close(chain, x[..., 2] - x[..., 0])
    still = x[:, :, :1].expand_as(x)
    assert skeleton_streams(still, PARENTS)["motion"].abs().max() == 0
    model = StreamEncoder(encoder(), ("joint", "motion"), PARENTS).eval()
    apart = [model.encoders[name](found[name]) for name in ("joint", "motion")]
    torch.testing.assert_close(model(x), torch.cat(apart, 1))
    heads = StreamHeads(2, 4, (8, 3)).eval()
    torch.testing.assert_close(heads(model(x))[:, 1], heads.heads[1](apart[1]))


def test_who_stands_still_is_present_in_streams_of_motion() -> None:
    """The trap: in the motion of persons 0 means standing still, and not that nobody is there."""
    model = StreamEncoder(encoder(), ("motion",), PARENTS).eval()
    moving = clips(2)
    still = moving[:, :, :1].expand_as(moving)
    alone, none = model(moving[..., None]), torch.zeros_like(moving)
    resting = model.encoders["motion"](none, torch.ones(2, 1, dtype=torch.bool))
    assert resting.abs().max() > 0
    torch.testing.assert_close(model(torch.stack([moving, still], -1)), (alone + resting) / 2)
    torch.testing.assert_close(model(torch.stack([moving, none], -1)), alone)


def trained(method: SkeletonBYOL, steps: int = 2) -> coloss.Fit:
    torch.manual_seed(0)
    budget = coloss.Budget(steps=steps)
    return coloss.fit(encoder(), (clips(),), methods=[method], batch_size=12, budget=budget)


def test_without_repulsion_and_votes_it_is_byol_to_the_bit() -> None:
    three = SMALL | {"parents": PARENTS, "streams": ("joint", "motion", "bone")}
    plain = trained(SkeletonBYOL(**three))
    bare = trained(SkeletonACL(cross_model=0, votes=0, **three))
    assert not differing(weights(plain.model), weights(bare.model))
    assert sorted(bare.history[-1].terms) == ["byol"]
    whole = trained(SkeletonACL(**THREE))
    assert differing(weights(plain.model), weights(whole.model))


def test_votes_for_oneself_alone_are_byol() -> None:
    """With k = 1 and well separated clips every stream votes for the diagonal, and the loss is BYOL's."""
    method = SkeletonACL(cross_model=0, streams=("joint",), votes=1, neighbours=1, **SMALL)
    state = coloss.train.State(nn.Identity())
    z = torch.eye(4)[None, :, None].repeat(2, 1, 1, 1)
    p = z + 0.1
    found = method.stream_terms(p, z, state)["byol"]
    torch.testing.assert_close(found, 2 * byol_loss(p, z))
    assert state.take_logged() == {"positives": 1.0}
    twins = z.clone()
    twins[:, 1] = twins[:, 0]
    method.stream_terms(twins, twins, state)
    assert state.take_logged() == {"positives": 1.5}


def test_it_ships_the_encoder_alone_or_one_for_each_stream() -> None:
    single = trained(SkeletonBYOL(**SMALL)).model
    assert isinstance(single, SkeletonEncoder)
    several = trained(SkeletonACL(**THREE)).model
    assert isinstance(several, StreamEncoder)
    assert several(clips()).shape == (24, 12)
    names = {name.split(".")[0] for name in several.state_dict()}
    assert names == {"encoders"}


def test_embeddings_do_not_collapse() -> None:
    """In units of 1 / sqrt(d), so that 1 is spread evenly."""
    run = trained(SkeletonACL(**THREE), steps=6)
    assert run.history[-1].metrics["embedding_std"] > 0.5
    assert run.history[-1].metrics["own_distance"] > 0


def test_every_loop_takes_the_same_steps() -> None:
    batches = [(part,) for part in clips().split(8)]
    check_loops(encoder, lambda: SkeletonBYOL(view=shifted, **SMALL), batches, epochs=1)


def test_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    new = partial(SkeletonACL, streams=("joint", "bone"), **THREE)
    check_resume(encoder, new, (clips(),), tmp_path, steps=3, kill_at=2, checkpoint_every=1)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    def train(fabric: Fabric) -> dict[str, Tensor]:
        run = coloss.fit(
            Flat().double(),
            (clips().double(),),
            methods=[SkeletonACL(view=shifted, streams=("joint", "bone"), **THREE)],
            batch_size=8,
            budget=coloss.Budget(epochs=1),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            fabric=fabric,
        )
        return dict(run.model.state_dict())

    check_two_processes(train, tmp_path)


def test_it_composes_with_another_method_on_the_same_views() -> None:
    run = coloss.fit(
        encoder(),
        (clips(),),
        methods=[SkeletonBYOL(**SMALL), VICReg(projector=(8, 4))],
        batch_size=12,
        budget=coloss.Budget(steps=2),
        fabric=Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"),
    )
    terms = run.history[-1].terms
    assert set(terms) == {"byol", "invariance", "variance", "covariance"}
    assert all(value == value for value in terms.values())


def test_the_lab_builds_it_with_the_skeleton_of_the_data() -> None:
    budget = coloss.Budget(steps=1)
    splits = SimpleNamespace(skeleton=Skeleton(PARENTS))
    setting = Setting(pretraining_task(budget), 0, splits, budget)
    assert SkeletonACL.for_setting(setting, cross_model=0.3).parents == PARENTS
    bare = Setting(pretraining_task(budget), 0, None, budget)
    assert SkeletonBYOL.for_setting(bare).parents is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SkeletonBYOL(momentum=1.5), r"momentum must be in \[0, 1\], got 1.5"),
        (lambda: SkeletonBYOL(predictor=0), "predictor must be >= 1, got 0"),
        (lambda: SkeletonBYOL(streams=("bone",)), "need the parents of the joints, got none"),
        (lambda: SkeletonBYOL(streams=("bones",)), "streams must be distinct ones of joint, bone"),
        (lambda: SkeletonACL(cross_model=-1, **THREE), "cross_model must be >= 0, or a schedule, got -1"),
        (lambda: SkeletonACL(votes=4, **THREE), r"votes must be in \[0, 3\].*got 4"),
        (lambda: SkeletonACL(**(THREE | {"neighbours": 0})), "neighbours must be >= 1, got 0"),
        (lambda: SkeletonACL(votes_from=1.0, **THREE), r"votes_from must be in \[0, 1\), got 1.0"),
        (lambda: trained(SkeletonBYOL(view=lambda x, generator: x[None], **SMALL)), "two views, got 1"),
        (
            lambda: coloss.fit(
                encoder(),
                (clips(), torch.zeros(24).long()),
                nn.functional.cross_entropy,
                [SkeletonBYOL()],
                budget=coloss.Budget(steps=1),
            ),
            "without labels: leave the objective out",
        ),
        (lambda: StreamEncoder(nn.Identity(), ("joint",), PARENTS), "does not declare the width"),
        (lambda: StreamHeads(0, 4, (2,)), "streams must be >= 1, got 0"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises((ValueError, InputError), match=message):
        call()


def test_the_claim_runs() -> None:
    found = verify("skeleton-acl", smoke=True, seeds=1)
    assert found["method"]["name"] == "BYOL + repulsion + votes"
    assert {"trained with labels", "untrained encoder", "raw coordinates"} < set(found["arms"])
