"""Windows, splits that do not leak, and a classifier that bears missing numbers."""

import pytest
import torch
from contract import check_loops, check_resume
from torch import nn

from coloss.data import MotionClips
from coloss.data.skeleton import SKELETONS, Skeleton
from coloss.errors import InputError
from coloss.lab.claims import verify
from coloss.motion import (
    FeatureScaler,
    KernelPenalty,
    WindowClassifier,
    carry_forward,
    chained,
    cut_windows,
    group_window_split,
    hide_joints,
    known_repetitions,
    labelled_windows,
    random_window_split,
    resample_rate,
)
from coloss.motion.exercise_data import axis_factors, in_one_unit
from coloss.motion.exercise_trial import persons_apart


def test_no_group_is_on_two_sides_and_all_windows_are_kept():
    groups = torch.arange(60) // 3
    for seed in range(5):
        split = group_window_split(groups, generator=torch.Generator().manual_seed(seed))
        parts = [set(groups[part].tolist()) for part in split]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
        assert sorted(torch.cat(list(split)).tolist()) == list(range(60))
        assert all(parts)
    names = [f"person {k // 20}" for k in range(60)]
    assert {len(part) for part in group_window_split(names)} == {20}
    leaking = random_window_split(60, generator=torch.Generator().manual_seed(0))
    assert set(groups[leaking.train].tolist()) & set(groups[leaking.test].tolist())


def test_split_draws_by_its_generator_alone():
    groups = list(range(30))
    first, second = (
        group_window_split(groups, generator=torch.Generator().manual_seed(3)).test.tolist() for _ in range(2)
    )
    assert first == second
    with pytest.raises(InputError, match="groups must be at least 3 to split, got 2"):
        group_window_split([0, 1, 1])
    with pytest.raises(InputError, match=r"test must be in \(0, 1\), got 1.5"):
        group_window_split(groups, test=1.5)
    with pytest.raises(InputError, match="windows must be at least 3"):
        random_window_split(2)


def test_windows_cover_a_recording():
    for frames in (1, 15, 16, 17, 40):
        windows = cut_windows(torch.arange(float(frames)), 16, 8)
        assert windows[-1, -1] == frames - 1  # ends with the recording
        seen = windows[~windows.isnan()]
        assert set(seen.tolist()) == set(map(float, range(frames)))
        assert (windows.diff(dim=1)[~windows.diff(dim=1).isnan()] == 1).all()
    constant = cut_windows(torch.full((40, 3), 2.5), 16, 8)
    assert (constant == 2.5).all()


def test_another_rate_is_the_same_motion():
    times = torch.arange(31) / 30
    slow = resample_rate(torch.sin(times), 30, 15)
    torch.testing.assert_close(slow, torch.sin(torch.arange(16) / 15))
    gap = torch.tensor([0.0, torch.nan, 2, 3])
    assert resample_rate(gap, 10, 10).isnan().tolist() == [False, True, False, False]
    assert resample_rate(gap, 10, 20).isnan().tolist() == [False, True, True, True, False, False, False]
    with pytest.raises(ValueError, match="new_rate must be > 0"):
        resample_rate(gap, 10, 0)


def test_missing_numbers_take_the_last_one_and_do_not_enter_the_statistics():
    generator = torch.Generator().manual_seed(0)
    windows = 3 + 2 * torch.randn(50, 8, 3, generator=generator)
    hidden = windows.masked_fill(torch.rand(windows.shape, generator=generator) < 0.3, torch.nan)
    hidden[..., 2] = torch.nan  # never there
    scaler = FeatureScaler(3).fit(hidden)
    rows = hidden[..., :2].flatten(0, 1)
    for column in range(2):
        there = rows[:, column][~rows[:, column].isnan()]
        torch.testing.assert_close(scaler.mean[column], there.mean())
        torch.testing.assert_close(scaler.scale[column], there.std(correction=0))
    assert scaler.mean[2] == 0 and scaler.scale[2] == 1
    scaled = scaler(hidden)
    assert scaled.isfinite().all() and (scaled[..., 2] == 0).all()
    endless = hidden.masked_fill(hidden.isnan(), torch.inf)
    assert torch.equal(FeatureScaler(3).fit(endless)(endless), scaled)
    first = hidden[:, 0, 0].isnan()
    assert (scaled[first, 0, 0] == 0).all()  # nothing seen yet: the mean
    filled = carry_forward(hidden)
    gone = hidden[:, 1:, 0].isnan() & ~filled[:, :-1, 0].isnan()
    assert torch.equal(filled[:, 1:, 0][gone], filled[:, :-1, 0][gone])


def test_constant_features_do_not_divide_by_nothing():
    scaler = FeatureScaler(1).fit(torch.full((4, 5, 1), 7.0))
    assert (scaler(torch.full((1, 5, 1), 7.0)) == 0).all()
    with pytest.raises(ValueError, match="windows must have 1 features, got 2"):
        scaler.fit(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="all are missing"):
        scaler.fit(torch.full((1, 2, 1), torch.nan))


def test_the_network_is_the_published_one():
    model = WindowClassifier(22, 4)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert shapes["first.weight_ih_l0"] == (4 * 91, 22) and shapes["second.weight_ih_l0_reverse"] == (
        4 * 91,
        182,
    )
    assert shapes["classifier.weight"] == (4, 182)
    bias = model.first.bias_ih_l0 + model.first.bias_hh_l0
    assert (bias[91:182] == 1).all() and (bias[:91] == 0).all() and (bias[182:] == 0).all()
    gate = model.first.weight_hh_l0[:91]
    torch.testing.assert_close(gate @ gate.T, torch.eye(91), atol=1e-4, rtol=0)
    by_hand = sum(
        value.square().sum()
        for name, value in model.named_parameters()
        if "weight_ih" in name or name == "classifier.weight"
    )
    torch.testing.assert_close(model.kernel_penalty(), by_hand)


def test_both_directions_end_in_the_features():
    model = WindowClassifier(3, 2, hidden=5).eval()
    windows = torch.randn(2, 9, 3)
    states, _ = model.first(model.scaler(windows))
    both, _ = model.second(states)
    torch.testing.assert_close(model.features(windows), torch.cat([both[:, -1, :5], both[:, 0, 5:]], -1))


def test_bad_windows_and_sizes():
    with pytest.raises(ValueError, match="hidden must be >= 1, got 0"):
        WindowClassifier(3, 2, hidden=0)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        WindowClassifier(3, 2, dropout=1.0)
    for shape in ((2, 9, 4), (2, 0, 3)):
        with pytest.raises(ValueError, match=r"windows must be \(windows, frames, 3\)"):
            WindowClassifier(3, 2, hidden=2)(torch.zeros(shape))
    with pytest.raises(ValueError, match="weight must be >= 0"):
        KernelPenalty(-1.0)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 5, 3, generator=generator), torch.randint(2, (24,), generator=generator)


def new_model() -> WindowClassifier:
    torch.manual_seed(0)
    return WindowClassifier(3, 2, hidden=3, dropout=0.0)


def test_the_penalty_in_every_loop():
    inputs, targets = data()
    batches = [(inputs[k : k + 8], targets[k : k + 8]) for k in (0, 8)]
    check_loops(new_model, lambda: KernelPenalty(0.1), batches, nn.functional.cross_entropy, epochs=1)


def test_a_killed_run_goes_on(tmp_path):
    check_resume(new_model, KernelPenalty, data(), tmp_path, nn.functional.cross_entropy, steps=6, kill_at=4)


def clips(split=(0, 0, 0, 0, 0, 0, 2, 2), persons=None) -> MotionClips:
    labels = {"exercise": [0, 1] * 4}
    if persons is not None:
        labels["person"] = persons
    recordings = [torch.randn(20, 2, 3).numpy() for _ in range(8)]
    return MotionClips.from_list(recordings, Skeleton((-1, 0)), 15, labels=labels, split=list(split))


def test_validation_is_drawn_by_person():
    found = labelled_windows(clips(persons=[0, 0, 1, 1, 2, 2, 3, 3]), window=8, stride=4)
    by_part = [set(found.groups[found.split == part].tolist()) for part in range(3)]
    assert by_part[2] == {3} and by_part[1] and not by_part[0] & by_part[1]
    alone = labelled_windows(clips(), window=8, stride=4)
    by_part = [set(alone.recordings[alone.split == part].tolist()) for part in range(3)]
    assert by_part[2] == {6, 7} and by_part[1] and not by_part[0] & by_part[1]
    takes = clips()
    takes.labels["recording"] = torch.tensor([0, 1, 2, 0, 1, 2, 3, 3]).numpy()  # cut into two clips each
    cut = labelled_windows(takes, window=8, stride=4)
    by_part = [set(cut.groups[cut.split == part].tolist()) for part in range(3)]
    assert by_part[1] and not by_part[0] & by_part[1] and by_part[2] == {3}
    with pytest.raises(InputError, match="must have a training part"):
        labelled_windows(clips(split=[0] * 8))


def test_no_pair_of_action_and_style_is_on_two_sides_of_bandai():
    takes = [(action, style) for action in range(3) for style in range(7) for _ in range(3)]
    own = MotionClips.from_list(
        [torch.randn(9, 2, 3).numpy() for _ in takes],
        Skeleton((-1, 0)),
        15,
        labels={
            "action": [action for action, _ in takes],
            "style": [style for _, style in takes],
            "part": [2] * len(takes),
        },
        split=[0, 1, 2] * 21,  # as stored: other takes of the same pairs
        source="bandai",
    )
    found = labelled_windows(own, window=8, stride=4, generator=torch.Generator().manual_seed(0))
    by_part = [set(found.groups[found.split == part].tolist()) for part in range(3)]
    assert [len(groups) for groups in by_part] == [11, 4, 6]
    assert not by_part[0] & by_part[1] and not (by_part[0] | by_part[1]) & by_part[2]


def test_five_seeds_are_five_splits_by_person():
    persons = torch.tensor([7, 3, 3, 9, 1, 1, 4, 7])
    tested = []
    for seed in range(12):
        split = persons_apart(persons, seed)
        who = [set(persons[part].tolist()) for part in split]
        assert [len(part) for part in who] == [2, 1, 2] and set().union(*who) == {1, 3, 4, 7, 9}
        assert sorted(torch.cat(list(split)).tolist()) == list(range(8))
        tested.append(frozenset(who[2]))
    assert len(set(tested[:10])) == 10 and tested[10:] == tested[:2]
    assert all(sum(person in pair for pair in tested[:5]) == 2 for person in (1, 3, 4, 7, 9))
    with pytest.raises(ValueError, match="at least five, got 4"):
        persons_apart(torch.arange(4), 0)


def test_screen_units_become_one_unit_by_the_training_part_alone():
    generator = torch.Generator().manual_seed(0)
    body = [torch.randn(20, 4, 3, generator=generator) for _ in range(3)]
    skeleton = Skeleton((-1, 0, 1, 1))
    screen = torch.tensor([2.0, 1.0, 9.0])
    own = MotionClips.from_list(
        [(joints * screen).numpy() for joints in body], skeleton, 15, units="screen", split=[0, 0, 2]
    )
    factors = axis_factors(own)
    assert factors == pytest.approx([1.0, 1.0, 2 / 9], rel=0.15)  # across and up are pixels both
    own.clip(2)[:] *= 50  # a giant in the test part
    assert axis_factors(own) == factors
    joints = in_one_unit(own, factors).clip(0)
    assert joints == pytest.approx((body[0] * screen).numpy() * factors)
    assert axis_factors(MotionClips.from_list([own.clip(0)], skeleton, 15)) == (1.0, 1.0, 1.0)


def test_hidden_joints():
    joints = torch.zeros(400, 10, 6, 3)
    hidden = hide_joints(joints, 0.3, torch.Generator().manual_seed(0)).isnan()
    assert torch.equal(hidden.any(-1), hidden.all(-1))  # whole joints, never single coordinates
    assert abs(hidden.float().mean() - 0.3) < 0.02
    assert 0.12 < hidden.all(1)[..., 0].float().mean() < 0.2  # half of them for the whole window
    assert not hide_joints(joints, 0.0).isnan().any() and hide_joints(joints, 1.0).isnan().any()
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
        hide_joints(joints, 1.5)


def test_chains_count_their_links():
    recordings = [torch.full((10, 1), 1.0), torch.full((12, 1), 2.0)]
    session, count = chained(recordings, [1, 2], generator=torch.Generator().manual_seed(0), speeds=(1, 1))
    ones, twos = (int((session == value).sum()) for value in (1, 2))
    assert ones % 10 == 0 and twos % 12 == 0 and count == ones // 10 + 2 * (twos // 12)
    with pytest.raises(InputError, match="recordings must each have a count"):
        chained([], [])


def test_known_repetitions_by_label_name_and_foot():
    own = MotionClips.from_list(
        [torch.zeros(5, 2, 3).numpy()] * 2,
        Skeleton((-1, 0)),
        15,
        labels={"exercise": [0, 0], "repetitions": [4, 7]},
    )
    assert known_repetitions(own).tolist() == [4, 7]
    skeleton = SKELETONS["bandai"]
    still = torch.zeros(40, skeleton.num_joints, 3)
    walked = still.clone()
    phase = torch.linspace(0, 4 * torch.pi, 40)
    walked[:, 15:17, 0] = torch.cumsum(0.3 * (1 - torch.cos(phase)), 0)[:, None]
    walked[:, 15:17, 1] = 0.2 * (1 - torch.cos(phase))[:, None] ** 2
    found = MotionClips.from_list(
        [walked.numpy(), still.numpy(), still.numpy()],
        skeleton,
        15,
        labels={"action": [0, 1, 2]},
        label_names={"action": ("walk", "squat2Reps", "bow")},
    )
    assert known_repetitions(found).tolist() == [2, 2, -1]
    found.joints[10:16, 15:17] = torch.nan  # while the foot is seen to walk on
    assert known_repetitions(found).tolist() == [2, 2, -1]
    found.joints[:40, 15] = torch.nan
    assert known_repetitions(found).tolist() == [-1, 2, -1]


def test_the_claim_runs():
    found = verify("fitness-bilstm", smoke=True, seeds=1)
    assert found["metric"] == "moved_accuracy" and "invariant features, random windows" in found["arms"]
    metrics = found["arms"]["invariant features"]["metrics"]
    # The very same windows for another camera: invariant features cannot tell.
    assert metrics["accuracy"]["mean"] == pytest.approx(metrics["moved_accuracy"]["mean"], abs=0.01)
