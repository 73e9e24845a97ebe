"""The two terms of people on an interpolator: what they are, what they reach, recipe and claim."""

import json
import math
from functools import partial

import pytest
import torch
from contract import SGD, Killed, differing, weights

import coloss
from coloss import Budget
from coloss.data import IndexedDataset, MotionClips, Skeleton, save_motion
from coloss.errors import InputError
from coloss.lab.claims import verify
from coloss.motion import (
    FigureNetwork,
    FrameInterpolator,
    HumanAwareLoss,
    MaskNetwork,
    figure_training,
    frame_interpolation_recipe,
    frame_interpolation_trial,
    heatmap_mse_loss,
    load_frame_interpolator,
    reconstruction_loss,
    save_picture_rows,
    slow_motion,
    soft_dice_focal_loss,
    train_frame_interpolator,
)
from coloss.motion.figure_sequences import motion_parts
from coloss.motion.sports_slomo import CLAIM
from coloss.train import TrainingStep


def new_model():
    torch.manual_seed(0)
    return FrameInterpolator(4)


def new_method(**options):
    torch.manual_seed(1)
    return HumanAwareLoss(
        FigureNetwork(3, 4), MaskNetwork(1, 4), keypoint_weight=1.0, mask_weight=0.1, **options
    )


def data(samples=8):
    first, last, truth = torch.rand(3, samples, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    return IndexedDataset((first, last, torch.full((samples,), 0.5)), truth)


def test_the_terms_are_those_of_heatmaps_and_masks_and_gradients_reach_the_model_alone():
    method, model = new_method(), new_model()
    batch = data().take(torch.arange(4))
    step = TrainingStep(model, reconstruction_loss, [method])
    terms = step(batch.inputs, batch.targets)
    made = model(batch.inputs)
    keypoints, masks = (method.losses[name].network for name in ("keypoints", "masks"))
    torch.testing.assert_close(
        terms["keypoints"], heatmap_mse_loss(keypoints(made), keypoints(batch.targets))
    )
    torch.testing.assert_close(
        terms["masks"],
        soft_dice_focal_loss(masks(made), masks(batch.targets).sigmoid(), match="class"),
    )
    step.backward(terms)
    assert all(p.grad is None for net in (keypoints, masks) for p in net.parameters())
    assert model.head.weight.grad.abs().sum() > 0


def test_each_term_may_be_used_alone_and_zero_weights_are_plain_training():
    assert set(HumanAwareLoss(FigureNetwork(3, 4)).losses) == {"keypoints"}
    assert set(HumanAwareLoss(masks=MaskNetwork(1, 4), match="iou").losses) == {"masks"}
    zero = HumanAwareLoss(FigureNetwork(3, 4), MaskNetwork(1, 4), keypoint_weight=0.0, mask_weight=0.0)
    found = [
        coloss.fit(new_model(), data(), reconstruction_loss, methods, budget=Budget(steps=2), batch_size=4)
        for methods in ([], [zero], [new_method()])
    ]
    assert not differing(weights(found[0].model), weights(found[1].model))
    assert differing(weights(found[0].model), weights(found[2].model))


def test_it_composes_with_itself_under_another_name():
    extra = coloss.train.FrozenTaskTerms({"again": new_method().losses["masks"]})
    run = coloss.fit(
        new_model(), data(), reconstruction_loss, [new_method(), extra], budget=Budget(steps=1), optimizer=SGD
    )
    terms = run.history[-1].terms
    assert terms["again"] == pytest.approx(terms["masks"])


def test_bad_input_is_named():
    with pytest.raises(InputError, match="keypoints or masks must be given, got neither"):
        HumanAwareLoss()
    with pytest.raises(InputError, match='match must be "class" or "iou", got \'order\''):
        HumanAwareLoss(FigureNetwork(3), match="order")
    with pytest.raises(InputError, match="the weight of keypoints must be >= 0"):
        HumanAwareLoss(FigureNetwork(3), keypoint_weight=-0.1)


# The recipe


@pytest.fixture
def walk(tmp_path, monkeypatch):
    """A file of motion of one's own, of another skeleton than the data sets', and a recipe that hardly looks."""
    for name, value in {"_PICTURES": 8, "_PAIRS": 8, "_JUDGED": 4}.items():
        monkeypatch.setattr(frame_interpolation_recipe, name, value)
    body = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 1.3, 0]]).numpy()
    path = torch.linspace(0, 3, 12).numpy()[:, None, None] * torch.tensor([1.0, 0, 0]).numpy()
    clips = MotionClips.from_list([body + path] * 10, Skeleton((-1, 0, 1), ("hips", "neck", "head")), fps=15)
    save_motion(tmp_path / "walk.npz", clips)
    return tmp_path / "walk.npz"


def test_a_killed_recipe_goes_on_and_what_it_stored_is_used_again(walk, tmp_path, monkeypatch):
    for width in ("KEYPOINT_WIDTH", "MASK_WIDTH", "INTERPOLATOR_WIDTH"):
        monkeypatch.setattr(figure_training, width, 4)
    for width in ("JUDGE_WIDTH", "INTERPOLATOR_WIDTH"):
        monkeypatch.setattr(frame_interpolation_recipe, width, 4)
    train = partial(train_frame_interpolator, walk, size=16, budget=Budget(steps=20))
    whole = train(tmp_path / "whole")
    made = frame_interpolation_recipe.train_interpolator

    def killed(*args, **options):
        if options.get("methods"):
            raise Killed
        return made(*args, **options)

    # In the last stage, whose weights are matched again.
    monkeypatch.setattr(frame_interpolation_recipe, "train_interpolator", killed)
    with pytest.raises(Killed):
        train(tmp_path / "killed")
    monkeypatch.setattr(frame_interpolation_recipe, "train_interpolator", made)
    shares = []
    assert train(tmp_path / "killed", progress=shares.append) == whole
    assert shares == sorted(shares)
    assert json.loads((tmp_path / "whole" / "metrics.json").read_text()) == whole
    assert all(math.isfinite(value) for value in whole.values())
    assert (tmp_path / "whole" / "pictures.png").stat().st_size > 0
    one, other = (load_frame_interpolator(tmp_path / name) for name in ("whole", "killed"))
    assert not differing(weights(one), weights(other))
    assert differing(weights(one), weights(load_frame_interpolator(tmp_path / "whole", "base")))
    assert slow_motion(one, torch.rand(2, 3, 16, 16), 2).shape == (3, 3, 16, 16)
    with pytest.raises(InputError, match="choose another folder"):
        train(tmp_path / "whole", seed=1)


def test_what_cannot_work_is_refused(walk, tmp_path):
    for options, message in (
        ({"size": 8}, "size must be >= 16 pixels, got 8"),
        ({"gap": 1}, "gap must be >= 2"),
        ({"ratio": 0.0}, "ratio must be > 0 and finite, got 0.0"),
        ({"gap": 99}, "clips must have one of 100 frames or more"),
    ):
        with pytest.raises(InputError, match=message):
            train_frame_interpolator(walk, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match='name must be "model" or "base"'):
        load_frame_interpolator(tmp_path, "judge")
    with pytest.raises(InputError, match="columns must hold pictures of one size"):
        save_picture_rows([], tmp_path / "none.png")
    with pytest.raises(InputError, match="titles must be 1 or none, got 2"):
        save_picture_rows([torch.zeros(1, 3, 4, 4)], tmp_path / "none.png", ("a", "b"))


# The claim


@pytest.fixture
def few_clips(walk, monkeypatch):
    """Not the recorded motion, and nothing kept of it for other tests."""
    frame_interpolation_trial.trained_networks.cache_clear()
    monkeypatch.setattr(frame_interpolation_trial, "bandai_parts", lambda: motion_parts(walk))
    yield
    frame_interpolation_trial.trained_networks.cache_clear()


def test_the_claim_gives_both_arms_as_much_compute_and_each_its_settings():
    arms = frame_interpolation_trial.ARMS
    assert arms["reconstruction"].steps == 2 * arms["keypoints and masks"].steps
    assert {CLAIM.baseline, CLAIM.method} <= set(arms)


def test_the_claim_runs_and_its_judge_is_a_network_apart(few_clips, monkeypatch):
    few = {name: frame_interpolation_trial.ARMS[name] for name in ("reconstruction", "keypoints and masks")}
    monkeypatch.setattr(
        frame_interpolation_trial, "_random_features", lambda *_: pytest.fail("no arm has it")
    )
    monkeypatch.setattr(frame_interpolation_trial, "ARMS", few)
    arms = verify("sportsslomo", smoke=True, seeds=1)["arms"]
    for name, arm in arms.items():
        if name != "true pictures":
            assert {"joint_error", "psnr", "ssim", "interpolation_error"} <= set(arm["metrics"])
        assert all(math.isfinite(metric["mean"]) for metric in arm["metrics"].values())
    assert set(frame_interpolation_trial.ARMS) < set(arms)
    networks = frame_interpolation_trial.trained_networks(smoke=True)
    assert networks.judge.head.weight.shape != networks.keypoints.head.weight.shape
