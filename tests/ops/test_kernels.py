"""Facts about the Triton kernels: they give what the tiles of PyTorch give in double precision.

Without a GPU they are interpreted on the CPU, which shows what they compute but neither that a GPU runs them nor how fast. Both kinds of
test are skipped where Triton is not installed, as it is not with CPU builds of PyTorch.
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from coloss.ops import (
    epps_pulley,
    info_nce_loss,
    kernels,
    pair_margin_loss,
    random_directions,
    score_tiles,
    sigmoid_pair_loss,
    sliced_statistic,
    streaming,
    supervised_contrastive_loss,
)
from coloss.ops.score_tiles import Mask, Softmax, Tiles

# Triton decides when it is first imported whether it compiles or interprets.
with pytest.MonkeyPatch.context() as _environment:
    if not torch.cuda.is_available() and "triton" not in sys.modules:
        _environment.setenv("TRITON_INTERPRET", "1")
    from coloss.ops.kernels import compiler, scores, slices

NO_INTERPRETER = "Triton is not installed, or imported before without TRITON_INTERPRET=1, or there is a GPU"
NO_GPU = "there is no CUDA device, or Triton is not installed"


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not compiler.INTERPRETED, reason=NO_INTERPRETER)),
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available() or not compiler.INSTALLED or compiler.INTERPRETED, reason=NO_GPU
            ),
        ),
    ],
    ids=["interpreter", "gpu"],
)
def device(request, monkeypatch):
    """Where kernels run: all float32 tensors there go through them, also where so few scores would be kept."""
    monkeypatch.setattr(kernels, "_device_is_served", lambda device: True)
    monkeypatch.setattr(streaming, "_KEPT_ON_CPU", 0)
    monkeypatch.setattr(streaming, "_KEPT_ON_ACCELERATOR", 0)
    if compiler.INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return torch.device(request.param)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that have been launched."""
    names = set()

    def spy(owner, name):
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (names.add(name), inner(*args))[1])

    for owner, name in [(scores, "_row_logsumexps"), (scores, "_slopes"), (slices.KernelWalk, "put_slopes")]:
        spy(owner, name)
    return names


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def groups(count: int, kinds: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(kinds, (count,), generator=torch.Generator().manual_seed(seed))


def on(device: torch.device, mask: Mask) -> Mask:
    moved = {
        name: None if part is None else part.to(device)
        for name, part in vars(mask).items()
        if "groups" in name
    }
    return replace(mask, **moved)


def near(got: torch.Tensor, exact: torch.Tensor, tolerance: float = 2e-6) -> None:
    """Equal relative to the largest value; infinities in the same places."""
    got, finite = got.double().cpu(), exact.isfinite()
    assert got.shape == exact.shape
    assert torch.equal(got[~finite], exact[~finite])
    scale = exact[finite].abs().max().item() if finite.any() else 0.0
    torch.testing.assert_close(got[finite], exact[finite], rtol=0, atol=tolerance * max(scale, 1e-30))


def same_with_gradients(loss, device, *leaves, tolerance=2e-6):
    """Value and gradients by kernels, and by tiles in double precision on the CPU."""
    results = []
    for copies in ([leaf.to(device) for leaf in leaves], [leaf.double() for leaf in leaves]):
        copies = [copy.detach().requires_grad_() for copy in copies]
        value = loss(*copies)
        results.append([value.detach(), *torch.autograd.grad(value.sum(), copies)])
    for got, exact in zip(*results):
        near(got, exact, tolerance)


MASKS = {
    "none": Mask(),
    "diagonal": Mask(diagonal=3),
    "below": Mask(diagonal=-2),
    "unequal": Mask(row_groups=groups(70, 3), column_groups=groups(37, 2)),
    "equal": Mask(1, groups(70, 3), groups(37, 2), same=True),
    # Rows of group 2 meet no column.
    "all": Mask(row_groups=groups(70, 3) // 2 * 2, column_groups=groups(37, 1), same=True),
}


@pytest.mark.parametrize("dim", [3, 130])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_blocks_are_those_of_the_tiles(device, mask, dim):
    x, y, for_rows, for_columns = (
        randn(70, dim) / dim**0.5,
        2 * randn(37, dim, seed=1),
        randn(70),
        randn(37, seed=1),
    )
    here = Tiles(x.to(device), y.to(device), on(device, mask))
    exact = Tiles(x.double(), y.double(), mask)
    rows, columns, kept = kernels.logsumexps(here, columns=True)
    exact_rows, exact_columns, _ = score_tiles.logsumexps(exact, columns=True)
    assert kept is None
    near(rows, exact_rows)
    near(columns, exact_columns)
    for both in (True, False):
        slopes, exact_slopes = (
            (torch.ones_like(tiles.x), torch.ones_like(tiles.columns)) for tiles in (here, exact)
        )
        sides = [Softmax(rows, for_rows.to(device)), Softmax(columns, for_columns.to(device))]
        exact_sides = [Softmax(exact_rows, for_rows.double()), Softmax(exact_columns, for_columns.double())]
        kernels.add_softmax_slopes(here, sides[0], sides[1] if both else None, slopes[0], slopes[1])
        score_tiles.add_softmax_slopes(exact, exact_sides[0], exact_sides[1] if both else None, *exact_slopes)
        near(slopes[0], exact_slopes[0])
        near(slopes[1], exact_slopes[1])


@pytest.mark.parametrize("function", streaming.MARGIN_FUNCTIONS)
@pytest.mark.parametrize("mask", [MASKS["none"], MASKS["equal"]], ids=["none", "equal"])
def test_margin_sums_are_those_of_the_tiles(device, mask, function):
    x, y = randn(70, 20), randn(37, 20, seed=1)
    for mutual in (False, True):
        results = []
        for tiles in (
            Tiles(x.to(device), y.to(device), on(device, mask)),
            Tiles(x.double(), y.double(), mask),
        ):
            slopes = torch.ones_like(tiles.x), torch.ones_like(tiles.columns)
            results.append([*kernels.margin_sum(tiles, function, *slopes, mutual), *slopes])
        for got, exact in zip(*results):
            near(got, exact)


@pytest.mark.parametrize("shift", [-12.0, 0.0, 90.0])
def test_softplus_keeps_small_terms_and_large_ones(device, shift):
    """Negative pairs of a sigmoid loss start at softplus(-10) = 4.5e-5, where log(1 + e^s) loses three digits."""
    x = torch.cat([randn(9, 3), torch.ones(9, 1)], 1)
    y = torch.cat([randn(5, 3, seed=1), torch.full((5, 1), shift)], 1)
    same_with_gradients(lambda a, b: streaming.streaming_margin_sum(a, b)[0], device, x, y)


@pytest.mark.parametrize("temperature", [1e-3, 0.07, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_info_nce_at_any_temperature(device, launched, dtype, temperature):
    """Gradients of a score of 1000 are those of one that float32 has rounded by 3e-5."""
    q, k = (F.normalize(randn(count, 9, seed=count)).to(dtype) for count in (66, 70))

    def loss(a, b):
        ids = groups(70, 20).to(a.device)
        return info_nce_loss(a, b, temperature, symmetric=True, ids=ids)

    coarse = {torch.float32: 0.0, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]  # the gradient's own type
    same_with_gradients(loss, device, q, k, tolerance=2e-6 + 2e-7 / temperature + coarse)
    assert launched == {"_row_logsumexps", "_slopes"}


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: supervised_contrastive_loss(z, groups(len(z), 4).to(z.device), 0.2),
        lambda z: sigmoid_pair_loss(z, z.flip(0)),
        lambda z: pair_margin_loss(z, groups(len(z), 4).to(z.device)),
    ],
    ids=["supervised", "sigmoid", "margin"],
)
@pytest.mark.parametrize("count", [2, 67])
def test_losses_of_samples_among_themselves(device, launched, loss, count):
    same_with_gradients(loss, device, F.normalize(randn(count, 5)), tolerance=5e-6)
    assert "_slopes" in launched


def test_results_are_the_same_each_time(device):
    x = randn(70, 20).to(device).requires_grad_()
    first, second = (torch.autograd.grad(info_nce_loss(x, x.flip(0), symmetric=True), x)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(1, 1), (33, 3), (2, 600, 2)])
@pytest.mark.parametrize(("t_max", "knots"), [(3.0, 17), (1.0, 2), (4.0, 30)])
def test_epps_pulley_is_that_of_the_tiles(device, launched, shape, t_max, knots):
    statistic = lambda x: epps_pulley(x, t_max, knots)
    same_with_gradients(statistic, device, 3 * randn(*shape), tolerance=1e-5)
    assert "put_slopes" in launched


def test_sliced_statistics_reach_embeddings_and_directions(device, launched):
    directions = random_directions(4, 7, torch.Generator().manual_seed(0))
    statistic = lambda x, d: sliced_statistic(x, d, chunk_size=3)
    same_with_gradients(statistic, device, randn(2, 50, 4), directions, tolerance=1e-5)
    assert "put_slopes" in launched


def test_no_samples_many_samples_and_large_angles(device):
    same_with_gradients(epps_pulley, device, randn(slices._SPAN + 700, 1), tolerance=1e-5)
    assert torch.equal(epps_pulley(torch.zeros(0, 2, device=device)).cpu(), torch.zeros(2))
    same_with_gradients(epps_pulley, device, 1000 * randn(40, 2), tolerance=2e-4)


def test_tiles_take_what_kernels_do_not(monkeypatch):
    monkeypatch.setattr(kernels, "_device_is_served", lambda device: True)
    monkeypatch.setattr(kernels, "_triton_is_installed", lambda: True)
    x, wide = torch.zeros(3, 2), torch.zeros(3, kernels.MOST_DIMENSIONS + 1)
    pairs, none = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(0, 2)
    assert kernels.takes(Tiles(x))
    assert kernels.takes(Tiles(x, x, MASKS["diagonal"]))
    refused = [Tiles(x.double()), Tiles(wide), Tiles(x, none), Tiles(none), Tiles(x, side=2)]
    refused += [Tiles(x, x, Mask(ignore=torch.zeros(3, 3, dtype=torch.bool))), Tiles(x, x, Mask(pairs=pairs))]
    assert not any(kernels.takes(tiles) for tiles in refused)
    assert type(kernels.frequency_walk(x, 3, 0.1, kernels.MOST_FREQUENCIES + 1)).__name__ == "FrequencyWalk"
    monkeypatch.setattr(kernels, "_triton_is_installed", lambda: False)
    assert not kernels.takes(Tiles(x))


def test_a_cpu_never_loads_a_kernel():
    program = """
import sys, torch
from coloss.ops import epps_pulley, info_nce_loss
x = torch.eye(3, requires_grad=True)
(info_nce_loss(x, x, 1.0) + epps_pulley(x).sum()).backward()
print([name for name in sys.modules if name.startswith("coloss.ops.kernels.")])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
