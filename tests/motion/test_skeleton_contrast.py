"""Facts about contrast with a queue on skeletons, and about mixed clips in training."""

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
from coloss.data import Skeleton
from coloss.errors import InputError
from coloss.jepa import VICReg
from coloss.lab.claims import verify
from coloss.motion import SkeleMixCLR, SkeletonCLR
from coloss.motion.skeleton_pretraining_trial import pretraining_task
from coloss.nn import SkeletonEncoder
from coloss.train import Setting

SMALL = {"projector": (8, 4), "queue": 10}
MIX = SMALL | {"parts": [[0, 1], [2], [3]], "n_parts": (1, 2), "blocks": (1, 1)}


def trained(method: SkeletonCLR, steps: int = 2, model: nn.Module | None = None, **options) -> coloss.Fit:
    torch.manual_seed(0)
    budget = coloss.Budget(steps=steps)
    model = model if model is not None else encoder()
    return coloss.fit(model, (clips(),), methods=[method], batch_size=12, budget=budget, **options)


def test_without_mixes_it_is_skeleton_clr_to_the_bit() -> None:
    plain, bare = trained(SkeletonCLR(**SMALL)), trained(SkeleMixCLR(mixes=0, **SMALL))
    assert not differing(weights(plain.model), weights(bare.model))
    assert sorted(bare.history[-1].terms) == ["instance"]
    assert differing(weights(plain.model), weights(trained(SkeleMixCLR(**MIX)).model))


def test_the_queue_holds_the_newest_keys_with_their_clips() -> None:
    method = SkeletonCLR(**SMALL)
    trained(method)
    torch.testing.assert_close(method.queue().norm(dim=1), torch.ones(10))
    assert len(method.queue.row_ids().unique()) > 1
    assert method.queue.row_ids().min() >= 0


def test_the_first_step_has_no_negatives_and_the_copy_follows() -> None:
    still = SkeletonCLR(momentum=1.0, **SMALL)
    first = trained(still, steps=1, log_every=1)
    assert first.history[0].terms["instance"] == 0
    moved = SkeletonCLR(momentum=0.0, **SMALL)
    run = trained(moved)
    followed = moved.target.module[0]
    assert not differing(weights(run.model), weights(followed))


def test_ordinary_clips_alone_decide_what_batch_norm_keeps() -> None:
    """The trap: mixed clips are a batch of their own kind."""
    frozen = partial(torch.optim.SGD, lr=0.0)
    plain = trained(SkeletonCLR(view=shifted, **SMALL), optimizer=frozen)
    mixed = trained(SkeleMixCLR(view=shifted, **MIX), optimizer=frozen)
    assert not differing(weights(plain.model), weights(mixed.model))
    norms = [weights(run.methods[0].projector) for run in (plain, mixed)]
    assert not differing(*norms)


def test_every_loop_takes_the_same_steps() -> None:
    batches = [(part,) for part in clips().split(8)]
    check_loops(encoder, lambda: SkeleMixCLR(view=shifted, **MIX), batches, epochs=1)


def test_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    new = partial(SkeleMixCLR, mixes=2, per_clip=True, **MIX)
    check_resume(encoder, new, (clips(),), tmp_path, steps=3, kill_at=2, checkpoint_every=1)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """Keys of all processes enter the queue of each. (Mixes and views are drawn by each process for its own clips.)"""

    def train(fabric: Fabric) -> dict[str, Tensor]:
        method = SkeletonCLR(view=shifted, **(SMALL | {"queue": 16}))
        run = coloss.fit(
            Flat().double(),
            (clips().double(),),
            methods=[method],
            batch_size=8,
            budget=coloss.Budget(epochs=2),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            fabric=fabric,
        )
        rows = method.queue()[method.queue.row_ids().argsort(stable=True)]
        return dict(run.model.state_dict()) | {"rows": rows.sum(0)}

    check_two_processes(train, tmp_path)


def test_it_takes_the_views_of_a_method_before_it() -> None:
    views = partial(_three_views)
    methods = [VICReg(projector=(8, 4), view=views), SkeleMixCLR(**MIX)]
    run = coloss.fit(
        encoder(),
        (clips(),),
        methods=methods,
        batch_size=12,
        budget=coloss.Budget(steps=3),
        fabric=Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"),
    )
    terms = run.history[-1].terms
    assert {"instance", "mix", "invariance"} < set(terms)
    assert all(value == value and value > 0 for name, value in terms.items() if name != "variance")
    assert methods[1].queue.features.dtype == torch.float32


def _three_views(clips: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return torch.stack([clips, 0.9 * clips, 1.1 * clips])


def test_it_ships_the_encoder_alone() -> None:
    torch.manual_seed(0)
    names = set(encoder().state_dict())
    model = trained(SkeleMixCLR(**MIX)).model
    assert isinstance(model, SkeletonEncoder)
    assert set(model.state_dict()) == names


def test_the_lab_builds_it_with_the_parts_of_the_data() -> None:
    body = Skeleton(PARENTS, parts={"trunk": (0, 1), "arm": (2,), "leg": (3,)})
    budget = coloss.Budget(steps=1)
    task = pretraining_task(budget)
    setting = Setting(task, 0, SimpleNamespace(skeleton=body), budget)
    assert SkeleMixCLR.for_setting(setting, mixes=3).parts == body.parts
    with pytest.raises(InputError, match="parts must be given"):
        SkeleMixCLR.for_setting(Setting(task, 0, SimpleNamespace(skeleton=Skeleton(PARENTS)), budget))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SkeletonCLR(queries=0), "queries must be >= 1, got 0"),
        (lambda: SkeletonCLR(queue=0), "queue must be >= 1, got 0"),
        (lambda: SkeletonCLR(temperature=0.0), "temperature must be > 0, got 0.0"),
        (lambda: SkeletonCLR(momentum=-0.1), r"momentum must be in \[0, 1\], got -0.1"),
        (lambda: SkeleMixCLR(mixes=-1, **MIX), "mixes must be >= 0, got -1"),
        (lambda: SkeleMixCLR(), "parts must be given to be mixed, got none"),
        (lambda: SkeleMixCLR(weight=-1.0, **MIX), "weight must be >= 0, or a schedule, got -1.0"),
        (lambda: trained(SkeletonCLR(view=lambda x, generator: x[None], **SMALL)), "at least two views"),
        (lambda: trained(SkeleMixCLR(**MIX), model=Flat()), "must have maps.*Flat has not"),
        (
            lambda: trained(SkeleMixCLR(**(MIX | {"blocks": (5, 9)}))),
            r"clips cannot be mixed: blocks must be .* \[1, 2\]",
        ),
        (
            lambda: trained(SkeleMixCLR(**(MIX | {"blocks": (2, 2), "n_parts": (3, 3)}))),
            "must leave something of a clip outside",
        ),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_the_claim_runs() -> None:
    found = verify("skelemixclr", smoke=True, seeds=1)
    assert found["method"]["name"] == "SkeleMixCLR"
    assert {"trained with labels", "untrained encoder", "raw coordinates"} < set(found["arms"])
