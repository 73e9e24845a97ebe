"""Facts about learning codes and tables together, and about the method in every loop."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from contract import SGD, check_loops, check_resume, check_two_processes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import coloss
from coloss.compression import (
    CodeSearch,
    LearnedCodebooks,
    compress_model,
    compress_with_codebooks,
    kmeans_codebook,
    learn_codebook,
    load_compressed,
)
from coloss.compression.code_search import CodeLogits
from coloss.compression.codebook_learning import _Learner
from coloss.compression.layer_reconstruction import OutputMoments
from coloss.distillation import LogitDistillation
from coloss.errors import InputError
from coloss.lab.claims import verify
from coloss.lab.tasks import find_task
from coloss.nn import CausalLanguageModel
from coloss.train import Budget, Setting, fit

GRADIENTS = ("soft", "proximal", "ste_nearest")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer_and_inputs(dtype=torch.float32):
    """Inputs of a few directions, so that rounding errors can cancel."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(24, 12).to(dtype)
    return layer, (randn(200, 6) @ randn(6, 24, seed=1) + 0.1 * randn(200, 24, seed=2)).to(dtype)


def new_model():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
        )


INPUTS = randn(32, 5, seed=3)
DATA = (INPUTS, torch.arange(32) % 3)
few = partial(LearnedCodebooks, calibration=INPUTS, bits=2, groups=2, steps=5)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_learning_lowers_the_output_error_and_reports_it_truly(gradient):
    layer, inputs = layer_and_inputs()
    before = layer.weight.clone()
    rate = 0.05 if gradient == "ste_nearest" else 0.2
    found = learn_codebook(layer, inputs, groups=2, search=CodeSearch(gradient, steps=50, code_rate=rate))
    assert torch.equal(layer.weight, before)
    assert found.error < 0.7 * found.table_error
    assert found.table_error < found.kmeans_error
    linear = layer(inputs) - layer.bias
    weight = found.codebook.dequantize()
    true = (inputs @ weight.T - linear).square().sum() / linear.square().sum()
    assert found.error == pytest.approx(true.item(), rel=1e-3)
    apart = (found.codebook.row_codes().long() - kmeans_codebook(before, 2, 2).row_codes().long()).abs()
    assert found.changed == pytest.approx((apart > 0).float().mean().item())
    assert found.jump == pytest.approx(apart[apart > 0].float().mean().item())
    # Sorted, and exactly what a file holds.
    assert (found.codebook.table.diff(dim=1) >= 0).all()
    assert torch.equal(found.codebook.stored().restore(), weight)


def test_tables_alone_are_the_least_squares_solution():
    layer, inputs = layer_and_inputs(torch.float64)
    found = learn_codebook(layer, inputs, groups=2, search=CodeSearch(steps=0))
    start = kmeans_codebook(layer.weight, 2, 2)
    # One column for each entry of the tables: what the output is if that entry is 1 and the others are 0.
    codes, group = start.row_codes().long(), start.group_of_row()
    columns = [inputs @ ((codes == k) & (group == g)[:, None]).double().T for g in range(2) for k in range(4)]
    target = (layer(inputs) - layer.bias).detach().flatten()
    best = torch.linalg.lstsq(torch.stack([c.flatten() for c in columns], 1), target).solution
    torch.testing.assert_close(found.codebook.table.double(), best.view(2, 4), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("gradient", ["soft", "proximal"])
def test_one_neighbour_on_either_side_is_nearly_as_good_as_all(gradient):
    layer, inputs = layer_and_inputs()
    errors = [
        learn_codebook(layer, inputs, bits=3, search=CodeSearch(gradient, steps=25, neighbours=neighbours))
        for neighbours in (None, 1)
    ]
    assert errors[1].error < 1.5 * errors[0].error < 0.75 * errors[0].kmeans_error


def test_dead_codewords_are_seeded_anew_and_tables_stay_sorted():
    layer, inputs = layer_and_inputs()
    start = kmeans_codebook(layer.weight, 2)
    learner = _Learner(
        start, layer.weight.detach(), OutputMoments.of(layer, inputs, layer(inputs)), CodeSearch()
    )
    codes = learner.first.clamp(max=1)
    revived, table = learner._rounded(codes, learner.table)
    assert revived.unique().tolist() == [0, 1, 2, 3]
    assert (table.diff(dim=1) >= 0).all()
    assert learner._error(revived, table) < learner._error(codes, learner._solved(codes, learner.table))


def test_a_revived_codeword_splits_a_cluster_by_what_its_rows_are_over_their_scale():
    """Cut by the weights themselves, only wide rows would get it, though narrow ones use the table alike."""
    values = randn(1, 64).expand(4, 64)
    rows = values * torch.tensor([1.0, 0.0625, 1.0, 0.0625])[:, None]
    start = kmeans_codebook(rows, 2, 2, scale_per_group=True)
    learner = _Learner(start, rows, OutputMoments.empty(nn.Linear(64, 4)), CodeSearch())
    revived = learner._revived(learner.first.clamp(max=2), learner.table)
    assert revived.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(revived[0], revived[1])


class Largest(TorchDispatchMode):
    """Most entries of any tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.most = max(self.most, made.numel())
        return made


def test_reviving_takes_no_number_for_each_weight_and_codeword():
    layer, _ = layer_and_inputs()
    learner = _Learner(
        kmeans_codebook(layer.weight, 8), layer.weight.detach(), OutputMoments.empty(layer), CodeSearch()
    )
    with Largest() as seen:
        learner._revived(learner.first.clamp(max=250), learner.table)
    assert seen.most <= layer.weight.numel()


def test_logits_follow_codewords_that_change_places():
    rows, table = torch.tensor([[0.1, 1.2, 3.3]]), torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    order = torch.tensor([[1, 0, 2, 3]])
    for neighbours in (None, 1):
        search = CodeSearch(neighbours=neighbours)
        logits = CodeLogits(torch.tensor([[0, 1, 3]]), rows, table, torch.ones(1, 1), search)
        mean = logits.reorder(order, logits.values.clone())
        assert logits.codes(table[:, order[0]]).tolist() == [[1, 0, 3]]
        if neighbours is None:
            torch.testing.assert_close(logits.values, -(rows[:, :, None] - table[0, order[0]]).square())
            assert torch.equal(mean, logits.values)


def test_the_leading_codeword_moves_to_the_middle_of_those_with_logits():
    """By hand: slots stand for codes 0, 1, 2, the last leads; of codes 1, 2, 3 the third is new, one gap from the leader."""
    table = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    logits = CodeLogits(
        torch.tensor([[1]]), torch.ones(1, 1), table, torch.ones(1, 1), CodeSearch(neighbours=1)
    )
    logits.values = torch.tensor([[[-4.0, -1.0, 5.0]]])
    mean = logits.recentre(table, torch.tensor([[[0.1, 0.2, 0.3]]]))
    assert logits.codes(table).tolist() == [[2]]
    assert logits.values.tolist() == [[[-1.0, 5.0, 4.0]]]
    torch.testing.assert_close(mean, torch.tensor([[[0.2, 0.3, 0.0]]]))
    # At the end of the table there is nothing beyond.
    logits.values = torch.tensor([[[-1.0, 5.0, 6.0]]])
    logits.recentre(table, mean)
    assert logits.values.tolist() == [[[5.0, 6.0, -torch.inf]]]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv2d(4, 6, 3, padding=1, groups=2), (20, 4, 5, 5)), (nn.Conv1d(6, 6, 3, groups=6), (20, 6, 9))],
)
def test_convolutions_with_channel_groups_are_learned_and_their_error_is_true(layer, shape, scaled):
    layer, inputs = copy.deepcopy(layer).requires_grad_(False), randn(*shape)
    found = learn_codebook(layer, inputs, groups=2, scale_per_group=scaled, search=CodeSearch(steps=20))
    coarse = copy.deepcopy(layer)
    coarse.weight.copy_(found.codebook.dequantize())
    bias = layer.bias.view(-1, *[1] * (layer.weight.ndim - 2))
    true = (coarse(inputs) - layer(inputs)).square().sum() / (layer(inputs) - bias).square().sum()
    assert found.error == pytest.approx(true.item(), rel=1e-3)
    assert found.error < found.kmeans_error


def test_a_shared_table_with_scales_is_learned_too():
    layer, inputs = layer_and_inputs()
    layer.weight.data[::2] *= 5
    found = learn_codebook(layer, inputs, groups=3, scale_per_group=True, search=CodeSearch(steps=40))
    assert found.codebook.table.shape == (1, 4)
    assert found.error < 0.7 * found.kmeans_error


@pytest.mark.parametrize(
    ("weight", "inputs"),
    [
        (torch.zeros(3, 4), randn(6, 4)),
        (randn(3, 4), torch.zeros(6, 4)),
        (torch.full((3, 4), 0.3), randn(6, 4)),
        (randn(1, 1), randn(1, 1)),
    ],
)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_degenerate_layers_are_finite(weight, inputs, gradient):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data.copy_(weight)
    found = learn_codebook(layer, inputs, groups=2, search=CodeSearch(gradient, steps=10))
    assert found.codebook.dequantize().isfinite().all()
    # float16 has 11 bits.
    assert found.error <= 1e-6
    assert (
        len(inputs) == 1
        or weight.unique().numel() > 4
        or torch.allclose(found.codebook.dequantize(), weight, rtol=1e-3)
    )


def test_under_autocast_and_in_half_precision():
    layer, inputs = layer_and_inputs()
    search = CodeSearch(steps=5)
    targets = layer(inputs).detach()
    for given in (targets, None):
        plain = learn_codebook(layer, inputs, given, search=search)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = learn_codebook(layer, inputs, given, search=search)
        assert torch.equal(plain.codebook.dequantize(), mixed.codebook.dequantize())
        assert mixed.error == plain.error
    found = learn_codebook(layer.bfloat16(), inputs.bfloat16(), search=search)
    assert found.codebook.dequantize().dtype == torch.bfloat16
    assert found.error < found.kmeans_error


def test_a_model_of_ones_own_goes_through_a_file(tmp_path):
    model = new_model().eval()
    model[1].running_mean.uniform_(-1, 1)
    before = copy.deepcopy(model)
    found = compress_with_codebooks(model, INPUTS, layers=["0", "3"], search=CodeSearch(steps=3))
    changed = [n for n, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[n])]
    assert changed == ["0.weight", "3.weight"]
    assert list(found) == ["0", "3"]
    given = {f"{path}.weight": learned.codebook.stored() for path, learned in found.items()}
    path = compress_model(model, given).save(tmp_path / "m")
    assert torch.equal(load_compressed(path).load_into(new_model().eval())(INPUTS), model(INPUTS))


def test_reordered_neurons_store_no_groups_and_compute_the_same():
    plain, ordered = new_model().double().eval(), new_model().double().eval()
    for model in (plain, ordered):
        model[1].running_mean.copy_(torch.linspace(-1, 1, 12))
    options = {"layers": ["0", "3"], "search": CodeSearch(steps=3), "groups": 3}
    first = compress_with_codebooks(plain, INPUTS.double(), **options)
    second = compress_with_codebooks(
        ordered, INPUTS.double(), reorder={"0": ["1", "2", "3"], "3": ["5"]}, **options
    )
    torch.testing.assert_close(ordered(INPUTS.double()), plain(INPUTS.double()), rtol=0, atol=1e-9)
    for path, ids in (("0", 3), ("3", 2)):
        assert second[path].codebook.stored().kind == "codebook"
        assert torch.equal(second[path].codebook.dequantize(), ordered.get_submodule(path).weight)
        # Two bits for each row, in whole bytes.
        assert first[path].codebook.nbits() - second[path].codebook.nbits() == 8 * ids


def test_a_compressed_depthwise_convolution_between_moves_along(tmp_path):
    def new():
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6)),
            nn.Conv2d(6, 2, 2),
        ).eval()

    torch.manual_seed(0)
    model, inputs = new(), randn(16, 1, 4, 4)
    found = compress_with_codebooks(
        model, inputs, layers=["0", "1.1"], groups=3, search=CodeSearch(steps=0), reorder={"0": ["1", "2"]}
    )
    for path, learned in found.items():
        assert torch.equal(learned.codebook.dequantize(), model.get_submodule(path).weight)
    given = {f"{path}.weight": learned.codebook.stored() for path, learned in found.items()}
    path = compress_model(model, given).save(tmp_path / "m")
    assert torch.equal(load_compressed(path).load_into(new())(inputs), model(inputs))


@pytest.mark.parametrize(
    ("name", "message"), [("weight", "weight must be finite"), ("bias", "targets of a layer must be finite")]
)
def test_a_layer_that_cannot_be_compressed_leaves_those_before_it_as_they_were(name, message):
    model = new_model()
    getattr(model[3], name).data.view(-1)[0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        compress_with_codebooks(model, INPUTS, layers=["0", "3"], search=CodeSearch(steps=1))
    assert torch.equal(model[0].weight, before["0.weight"])


# The method


def test_the_same_in_fit_a_plain_loop_and_lightning():
    batches = [(INPUTS[:16], DATA[1][:16]), (INPUTS[16:], DATA[1][16:])]
    model = check_loops(new_model, few, batches, F.cross_entropy)
    assert len(model[3].weight.unique()) <= 8


def test_kill_and_resume(tmp_path):
    check_resume(new_model, few, DATA, tmp_path, F.cross_entropy)


def _train(fabric):
    model = new_model().double()
    model[1] = nn.Identity()
    inputs = INPUTS.double()
    run = fit(
        model,
        (inputs, DATA[1]),
        F.cross_entropy,
        [few(calibration=inputs)],
        budget=Budget(steps=3),
        batch_size=16,
        optimizer=SGD,
        fabric=fabric,
    )
    return dict(run.model.state_dict())


def test_two_processes_equal_one(tmp_path):
    check_two_processes(_train, tmp_path)


def test_the_finished_model_is_plain_and_its_file_is_as_small_as_promised(tmp_path):
    """Together with distillation, in one run."""
    method, watched = few(layers=["0", "3"]), []

    class Watch(coloss.Method):
        def finish(self, state):
            state.model.eval()
            watched.append(state.model(INPUTS).detach())

    teacher = nn.Linear(5, 3)
    run = fit(
        new_model(),
        DATA,
        F.cross_entropy,
        [LogitDistillation(teacher), method, Watch()],
        budget=Budget(steps=5),
        optimizer=SGD,
    )
    assert not any(type(part).__module__.startswith("coloss") for part in run.model.modules())
    assert torch.equal(run.model.eval()(INPUTS), watched[0])
    given = method.stored_weights(run.model)
    compressed = compress_model(run.model, given)
    restored = load_compressed(compressed.save(tmp_path / "m")).load_into(new_model().eval())
    assert torch.equal(restored(INPUTS), watched[0])
    weights = 5 * 12 + 12 * 8
    report = method.report(run.model, None)
    assert report["code_bits_per_weight"] * weights == 8 * sum(stored.nbytes for stored in given.values())
    assert report["calibration_output_error"] <= report["kmeans_calibration_output_error"]


def test_on_a_language_model():
    torch.manual_seed(0)
    model = CausalLanguageModel(11, dim=16, depth=1, heads=2)
    ids = torch.randint(11, (8, 6))
    method = LearnedCodebooks(calibration=ids, layers="transformer.blocks", steps=4)
    run = fit(
        model,
        (ids, ids),
        lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()),
        [method],
        budget=Budget(steps=2),
    )
    assert len(method.codebooks) >= 3
    for path, learned in method.codebooks.items():
        assert torch.equal(run.model.get_submodule(path).weight, learned.codebook.dequantize())
        assert learned.error < learned.kmeans_error


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CodeSearch("hard"), "gradient must be one of soft, ste_nearest, proximal, got 'hard'"),
        (lambda: CodeSearch(steps=-1), "steps must be >= 0, got -1"),
        (lambda: CodeSearch(code_rate=float("nan")), "code_rate must be finite and >= 0, got nan"),
        (lambda: CodeSearch("ste_nearest", neighbours=1), "neighbours must be >= 1, and go with logits"),
        (lambda: few(bits=9), r"bits must be in 1\.\.8, got 9"),
        (lambda: compress_with_codebooks(new_model(), INPUTS, bits=9), r"bits must be in 1\.\.8, got 9"),
        (lambda: learn_codebook(nn.ReLU(), INPUTS), "linear layer or a convolution, got ReLU"),
        (
            lambda: learn_codebook(nn.Linear(3, 2), OutputMoments.empty(nn.Linear(4, 2))),
            r"inputs\) \(1, 2, 3\), got \(1, 2, 4\)",
        ),
        (lambda: few().stored_weights(new_model()), "there after the run"),
        (
            lambda: learn_codebook(nn.Linear(2, 2), torch.ones(0, 2)),
            "inputs must hold at least one sample, got none",
        ),
        (
            lambda: compress_with_codebooks(new_model(), INPUTS, reorder={"7": ["5"]}),
            "reorder must name layers that are compressed, got 7",
        ),
        (
            lambda: compress_with_codebooks(new_model(), INPUTS, layers="0", reorder={"0": ["1", "9"]}),
            r"reorder must name the modules that follow 0, got \['1', '9'\]",
        ),
        (
            lambda: compress_with_codebooks(new_model(), INPUTS, layers="0", reorder={"0": ["1", "5"]}),
            "next_layer must read the 12 outputs of layer, got 8 inputs",
        ),
        (
            lambda: fit(new_model(), DATA, F.cross_entropy, [few(layers="9")], budget=Budget(steps=1)),
            "layers must be paths of the model, got '9'",
        ),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_sharded_weights_are_refused():
    model = new_model()
    model[3].weight.placements = ()
    with pytest.raises(InputError, match="the weight of 3 is sharded"):
        fit(model, DATA, F.cross_entropy, [few()], budget=Budget(steps=1))


def test_the_lab_builds_it():
    setting = Setting.of(find_task("digits"), 0, Budget(steps=1), smoke=True)
    method = LearnedCodebooks.for_setting(setting, bits=3)
    assert (method.bits, sum(len(batch) for batch in method.calibration), method.search.steps) == (3, 512, 3)


def test_the_claim_can_be_measured():
    found = verify("jlcm", smoke=True, seeds=1)
    assert found["method"]["name"] == "learned, proximal"
    assert found["baseline"]["name"] == "learned, soft"
