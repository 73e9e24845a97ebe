"""The V-cycle: where each stage starts, equal copies and how they part, FLOPs, and optimizer state through a map."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.distillation import (
    Stage,
    TransformerSizes,
    VCycle,
    causal_language_model_layout,
    coalesce,
    cycle_steps,
    grow,
    growing_map,
    map_optimizer_state,
    training_flops,
)
from coloss.errors import InputError
from coloss.nn import CausalLanguageModel, next_token_loss
from coloss.train import interpolate_states

LAYOUT = causal_language_model_layout()
LARGE = TransformerSizes(depth=4, heads=4, head_dim=2, hidden=16)
MIDDLE = LARGE.scaled(Fraction(1, 2), Fraction(1, 2))
SMALL = MIDDLE.scaled(Fraction(1, 2), Fraction(1, 2))
SIZES = [LARGE, MIDDLE, SMALL]


def new_model(level: int, seed: int = 0) -> CausalLanguageModel:
    sizes = SIZES[level]
    torch.manual_seed(seed)
    return CausalLanguageModel(
        7, dim=sizes.axes()["width"], depth=sizes.depth, heads=sizes.heads, mlp_ratio=2.0, context=6
    ).double()


def disturb(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_states(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-14)


def test_three_levels_go_down_and_up_and_blend_with_what_each_level_was_left_with() -> None:
    cycle = VCycle(
        new_model, LAYOUT, SIZES, (1, 2, 3, 4, 5), alpha=0.25, learning_rate_scales=[1.0, 2.0, 4.0]
    )
    begun: list[dict[str, Tensor]] = []
    ended: list[dict[str, Tensor]] = []
    met: list[tuple[int, int, int, float]] = []
    for stage in cycle:
        met.append((stage.number, stage.level, stage.steps, stage.learning_rate_scale))
        begun.append(state_of(stage.model))
        disturb(stage.model, stage.number)
        ended.append(state_of(stage.model))
    assert met == [(0, 0, 1, 1.0), (1, 1, 2, 2.0), (2, 2, 3, 4.0), (3, 1, 4, 2.0), (4, 0, 5, 1.0)]
    assert_states(begun[0], new_model(0).state_dict())
    assert_states(begun[1], coalesce(ended[0], LAYOUT, LARGE, MIDDLE))
    assert_states(begun[2], coalesce(ended[1], LAYOUT, MIDDLE, SMALL))
    assert_states(begun[3], interpolate_states(ended[1], grow(ended[2], LAYOUT, SMALL, MIDDLE), 0.25))
    assert_states(begun[4], interpolate_states(ended[0], grow(ended[3], LAYOUT, MIDDLE, LARGE), 0.25))


def test_a_cycle_goes_on_from_finished_stages() -> None:
    def trained(stages: list[Stage]) -> Tensor:
        return torch.cat([value.flatten() for value in stages[-1].model.state_dict().values()])

    def run(finished: list[dict[str, Tensor]], kept: list[dict[str, Tensor]]) -> list[Stage]:
        met = []
        for stage in VCycle(new_model, LAYOUT, SIZES[:2], (1, 2, 3)).stages(finished):
            disturb(stage.model, stage.number)
            kept.append(state_of(stage.model))
            met.append(stage)
        return met

    kept: list[dict[str, Tensor]] = []
    whole = run([], kept)
    rest = run(kept[:2], [])
    assert [stage.number for stage in rest] == [2]
    assert torch.equal(trained(whole), trained(rest))
    assert run(kept, []) == []


def test_the_bracketed_ends_of_the_blend() -> None:
    """alpha 0 forgets the small model, alpha 1 is the grown one; a stage of no steps is left out."""
    for alpha in (0.0, 1.0):
        first, last, small = {}, {}, {}
        for stage in VCycle(new_model, LAYOUT, SIZES[:2], (0, 2, 3), alpha=alpha):
            assert stage.number > 0
            if stage.level == 1:
                disturb(stage.model, 1)
                small = state_of(stage.model)
            else:
                last = state_of(stage.model)
        first = state_of(new_model(0))
        assert_states(last, grow(small, LAYOUT, MIDDLE, LARGE) if alpha else first)


def width_only(alpha: float) -> tuple[CausalLanguageModel, CausalLanguageModel]:
    """A trained-like small model and the large one after growth in width."""
    wide = MIDDLE.scaled(width=2)
    torch.manual_seed(3)
    small = new_model(1, seed=3)
    disturb(small, 5)
    large = CausalLanguageModel(7, dim=8, depth=2, heads=4, mlp_ratio=2.0, context=6).double()
    grown = grow(small.state_dict(), LAYOUT, MIDDLE, wide)
    large.load_state_dict(interpolate_states(large.state_dict(), grown, alpha))
    return small, large


def train(
    model: nn.Module, steps: int = 20, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
) -> None:
    generator = torch.Generator().manual_seed(0)
    own = optimizer(model.parameters(), lr=0.01)
    for _ in range(steps):
        ids = torch.randint(7, (4, 6), generator=generator)
        own.zero_grad()
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        own.step()


def test_the_loss_after_growth_in_width_is_the_small_models_loss() -> None:
    small, large = width_only(alpha=1.0)
    ids = torch.randint(7, (4, 6))
    first, second = (next_token_loss(model(ids), ids) for model in (small, large))
    torch.testing.assert_close(second, first, rtol=0, atol=1e-6)


def test_copies_stay_equal_in_training_unless_they_are_blended() -> None:
    distances, ranks = {}, {}
    for alpha in (1.0, 0.5):
        _, large = width_only(alpha)
        train(large)
        rows = large.transformer.blocks[0].mlp[0].weight.detach()
        distances[alpha] = float((rows[:8] - rows[8:]).abs().max())
        ranks[alpha] = int(torch.linalg.matrix_rank(rows, rtol=1e-6))
    assert distances[1.0] < 1e-10 and distances[0.5] > 1e-2
    assert ranks[0.5] > ranks[1.0]


def test_flops_are_those_of_the_matrix_products_whatever_kernel_attends() -> None:
    model = CausalLanguageModel(7, dim=8, depth=1, heads=2, mlp_ratio=2.0)
    ids = torch.zeros(3, 5, dtype=torch.int64)
    tokens = 15
    weights = 8 * 24 + 8 * 8 + 2 * 8 * 16 + 8 * 7
    attention = 2 * 5 * 8  # scores and mixing, for each token
    # Once forward, twice backward.
    assert training_flops(model, next_token_loss, ids, ids) == 3 * 2 * tokens * (weights + attention)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_steps_of_a_cycle_cost_what_the_budget_says() -> None:
    for budget, flops in ((100, (8.0, 1.0)), (37, (3.0, 1.0)), (1000, (7.3, 1.1))):
        steps = cycle_steps(budget, flops)
        spent = (steps[0] + steps[2]) * flops[0] + steps[1] * flops[1]
        assert budget * flops[0] - flops[0] < spent <= budget * flops[0]
    with pytest.raises(InputError, match="budget, warmup and small must leave steps for each stage"):
        cycle_steps(10, (1.0, 1.0), small=1.0)
    for warmup in (-0.5, 0.0, 1.0):
        with pytest.raises(InputError, match=r"warmup must be in \(0, 1\), got"):
            cycle_steps(100, (8.0, 1.0), warmup=warmup)
    with pytest.raises(InputError, match="small must be > 0 and finite, got inf"):
        cycle_steps(100, (8.0, 1.0), small=float("inf"))


def test_stages_without_steps_count_for_nothing_in_going_on() -> None:
    cycle = VCycle(new_model, LAYOUT, SIZES[:2], (0, 2, 3))
    whole = []
    for stage in cycle:
        disturb(stage.model, stage.number)
        whole.append(state_of(stage.model))
    (rest,) = cycle.stages(whole[:1])
    assert rest.number == 2
    disturb(rest.model, rest.number)
    assert_states(state_of(rest.model), whole[1])
    assert list(cycle.stages(whole)) == []


@pytest.mark.parametrize("kind", ["adam", "momentum"])
def test_optimizer_averages_of_the_grown_model_are_the_mapped_ones(kind: str) -> None:
    """Both gather averages at rate 0, where the grown model stays the grown one."""
    wide = MIDDLE.scaled(width=2)
    small, large = width_only(alpha=1.0)

    def optimizer(parameters: object, lr: float = 0.0) -> torch.optim.Optimizer:
        if kind == "adam":
            return torch.optim.Adam(parameters, lr=0.0, amsgrad=True)  # type: ignore[arg-type]
        return torch.optim.SGD(parameters, lr=0.0, momentum=0.9)  # type: ignore[arg-type]

    made: dict[str, torch.optim.Optimizer] = {}
    for name, model in (("small", small), ("large", large)):
        made[name] = optimizer(model.parameters())
        train(model, 3, lambda parameters, lr, own=made[name]: own)
    mapped = optimizer(large.parameters())
    map_optimizer_state(growing_map(LAYOUT, MIDDLE, wide), made["small"], small, mapped, large)
    for parameter in large.parameters():
        expected, found = made["large"].state[parameter], mapped.state[parameter]
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-12)
    back = optimizer(small.parameters())
    map_optimizer_state(growing_map(LAYOUT, MIDDLE, wide).reversed(), mapped, large, back, small)
    for parameter in small.parameters():
        for key, value in made["small"].state[parameter].items():
            torch.testing.assert_close(back.state[parameter][key], value, rtol=1e-9, atol=1e-12)


def test_other_optimizers_are_refused_and_unstepped_ones_carry_nothing() -> None:
    small, large = width_only(alpha=1.0)
    grow_wide = growing_map(LAYOUT, MIDDLE, MIDDLE.scaled(width=2))
    fresh, new = (torch.optim.Adam(model.parameters()) for model in (small, large))
    map_optimizer_state(grow_wide, fresh, small, new, large)
    assert not new.state
    rms = torch.optim.RMSprop(small.parameters())
    train(small, 1, lambda parameters, lr: rms)
    with pytest.raises(InputError, match="averages of gradients alone .Adam, SGD., got 'square_avg'"):
        map_optimizer_state(grow_wide, rms, small, new, large)
    train(small, 1, lambda parameters, lr: fresh)
    with pytest.raises(InputError, match="new_model must be what state_map gives"):
        map_optimizer_state(grow_wide, fresh, small, torch.optim.Adam(small.parameters()), small)


def test_each_parameter_keeps_its_own_steps_and_mixed_layers_the_largest() -> None:
    """Layer 0 and the embedding were frozen for a while; of two layers that become one the longer count stays."""
    small = new_model(1, seed=3)
    adam = torch.optim.Adam(small.parameters(), lr=0.0)
    train(small, 5, lambda parameters, lr: adam)
    frozen = [*small.transformer.blocks[0].parameters(), small.embedding.weight]
    for parameter in frozen:
        adam.state[parameter]["step"] = torch.tensor(2.0)
    large, halved = new_model(0), new_model(2)
    sizes = {0: LARGE, 2: SMALL}
    for model, state_map in (
        (large, growing_map(LAYOUT, MIDDLE, sizes[0])),
        (halved, growing_map(LAYOUT, sizes[2], MIDDLE).reversed()),
    ):
        new = torch.optim.Adam(model.parameters())
        map_optimizer_state(state_map, adam, small, new, model)
        steps = {name: float(new.state[p]["step"]) for name, p in model.named_parameters()}
        assert steps["embedding.weight"] == 2.0 and steps["transformer.norm.weight"] == 5.0
        found = [
            {value for name, value in steps.items() if f"blocks.{layer}." in name}
            for layer in range(model.depth)
        ]
        assert found == ([{2.0}, {5.0}, {2.0}, {5.0}] if model is large else [{5.0}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": SIZES[:1]}, "sizes must be of at least 2 levels, got 1"),
        ({"steps": (1, 2)}, r"steps must be 3 numbers >= 0, one for each stage of 2 levels, got \[1, 2\]"),
        ({"steps": (1, -2, 3)}, "steps must be 3 numbers"),
        ({"steps": (1, 2, 0)}, r"steps must be >= 1 for the last stage, got \[1, 2, 0\]"),
        ({"alpha": 1.1}, r"alpha must be in \[0, 1\], got 1.1"),
        ({"learning_rate_scales": [1.0]}, "learning_rate_scales must be 2 numbers > 0"),
        ({"sizes": SIZES[1::-1]}, "small must not be larger than large"),
    ],
)
def test_bad_cycles_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        VCycle(
            **({"new_model": new_model, "layout": LAYOUT, "sizes": SIZES[:2], "steps": (1, 2, 3)} | changes)
        )


def test_more_finished_stages_than_there_are_is_refused() -> None:
    cycle = VCycle(new_model, LAYOUT, SIZES[:2], (1, 2, 3))
    with pytest.raises(InputError, match="finished must be of at most 3 stages, got 4"):
        next(cycle.stages([{}] * 4))
    with pytest.raises(InputError, match="ended must be of 1 to 2 stages, got 0"):
        cycle.initial_state([])
