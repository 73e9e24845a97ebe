"""ScatSimCLR is NT-Xent and a question; without the question it is NT-Xent to the last bit."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes, differing, weights
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.contrastive import JigsawPretext, NTXent, RotationPretext, ScatSimCLR, ScatteringEncoder
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.lab.arms import build_arm, parse_arm
from coloss.lab.claims import verify
from coloss.lab.tasks import find_task
from coloss.nn import MLP, Classifier
from coloss.train import Budget, Setting


def noisy(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return inputs + 0.1 * torch.randn(2, *inputs.shape, generator=generator)


def fixed(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Views that do not depend on the process that makes them."""
    return torch.stack([inputs, 0.5 * inputs + 0.1])


def new_model() -> nn.Module:
    torch.manual_seed(3)
    return MLP(36, (8,), 5, norm=None)


def new_data(dtype: torch.dtype = torch.float32) -> IndexedDataset:
    return IndexedDataset(torch.rand(32, 1, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype))


def method(**options) -> ScatSimCLR:
    return ScatSimCLR(**({"view": noisy, "projector": (8, 4), "hidden": (6, 7), "dropout": 0.0} | options))


def trained(method: coloss.Method) -> dict[str, Tensor]:
    torch.manual_seed(0)
    run = coloss.fit(new_model(), new_data(), methods=[method], budget=Budget(steps=5), batch_size=8)
    return weights(run.model)


def test_without_weight_on_the_question_every_step_is_that_of_nt_xent():
    plain = trained(NTXent(view=noisy, projector=(8, 4)))
    assert not differing(plain, trained(method(pretext_weight=0.0)))
    assert differing(plain, trained(method()))


@pytest.mark.parametrize(("name", "kind"), [("rotation", RotationPretext), ("jigsaw", JigsawPretext)])
def test_it_is_the_sum_of_its_parts(name, kind):
    whole = method(pretext=name, pretext_weight=0.3)
    assert isinstance(whole.pretext, kind)
    assert whole.term_weights == {"nt_xent": 1.0, name: 0.3}
    run = coloss.fit(new_model(), new_data(), methods=[whole], budget=Budget(steps=2), batch_size=8)
    assert sorted(run.history[-1].terms) == sorted(["nt_xent", name])
    assert sorted(run.model.state_dict()) == sorted(new_model().state_dict())


def test_it_trains_a_scattering_encoder_and_a_classifier_beside_its_objective():
    torch.manual_seed(0)
    encoder = ScatteringEncoder(1, 1, 4, blocks=((4, 1),), stem=4, pool=1)
    before = weights(encoder)
    coloss.fit(encoder, new_data(), methods=[method()], budget=Budget(steps=2))
    assert differing(before, weights(encoder))
    data = IndexedDataset(new_data().inputs, torch.arange(32) % 3)
    run = coloss.fit(
        Classifier(new_model(), 3), data, F.cross_entropy, [method()], budget=Budget(steps=2), batch_size=8
    )
    assert sorted(run.history[-1].terms) == ["cross_entropy", "nt_xent", "rotation"]


def test_the_lab_builds_it_from_what_people_type():
    task = find_task("digits-ssl", limit=40)
    arm = build_arm(parse_arm("scatsimclr:pretext=jigsaw:hidden=[8,9]:temperature=0.2", task))
    setting = Setting.of(task, 0, Budget(steps=2))
    (built,) = arm.methods(setting)
    assert built.temperature == 0.2 and built.pretext.hidden == (8, 9)
    run = setting.fit(setting.new_model(), methods=[built])
    assert set(run.history[-1].terms) == {"nt_xent", "jigsaw"}


def test_bad_input_is_named(as_users_call):
    with pytest.raises(InputError, match='pretext must be "rotation" or "jigsaw", got \'colour\''):
        ScatSimCLR(pretext="colour")
    with pytest.raises(InputError, match="weight must be >= 0 and finite, or a schedule, got -0.3"):
        ScatSimCLR(pretext_weight=-0.3)


def test_fit_a_plain_loop_and_lightning_take_the_same_steps():
    check_loops(new_model, method, [(images,) for images in new_data().inputs.split(8)], epochs=1)


def test_a_killed_run_resumes_bit_identically(tmp_path: Path):
    check_resume(new_model, lambda: method(dropout=0.5), new_data(), tmp_path)


def test_two_processes_take_the_steps_of_one(tmp_path: Path):
    def train(fabric: Fabric) -> dict[str, Tensor]:
        run = coloss.fit(
            new_model().double(),
            new_data(torch.float64),
            methods=[method(view=fixed)],
            budget=Budget(steps=4),
            batch_size=8,
            fabric=fabric,
        )
        return dict(run.model.state_dict())

    check_two_processes(train, tmp_path)


def test_the_claim_runs():
    found = verify("scatsimclr", smoke=True, seeds=1)
    assert set(found["arms"]) == {"pixels", "scattering", "first order only", "random convolutions"}
    assert all(
        0 <= value <= 1 for arm in found["arms"].values() for value in arm["metrics"]["accuracy"]["values"]
    )
