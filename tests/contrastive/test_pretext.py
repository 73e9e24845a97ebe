"""Turned copies and shuffled tiles are what they say, permutations lie far apart, and the questions disturb nothing but the gradient."""

from functools import partial
from itertools import permutations as all_orders
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.contrastive import (
    JigsawHead,
    JigsawPretext,
    NTXent,
    RotationPretext,
    jigsaw_permutations,
    rotated_copies,
    shuffled_tiles,
)
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.nn import MLP, Classifier, ConvNet
from coloss.train import Budget


def new_model(outputs: int = 5) -> nn.Module:
    torch.manual_seed(3)
    return MLP(36, (8,), outputs, norm=None)


def new_data(dtype: torch.dtype = torch.float32) -> IndexedDataset:
    images = torch.rand(32, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    return IndexedDataset(images.to(dtype), torch.arange(32) % 3)


def as_it_is(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return inputs.unsqueeze(0)


def noisy(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return inputs + 0.1 * torch.randn(2, *inputs.shape, generator=generator)


def jigsaw(**options) -> JigsawPretext:
    return JigsawPretext(**({"permutations": 5, "grid": 2, "hidden": (6, 7)} | options))


def rotation(**options) -> RotationPretext:
    return RotationPretext(**({"hidden": (6,), "view": noisy} | options))


def test_turned_copies_are_numpys_and_the_first_are_the_images():
    images = torch.rand(3, 2, 5, 5)
    copies, turns = rotated_copies(images)
    assert torch.equal(copies[turns == 0], images)
    for row, (copy, turn) in enumerate(zip(copies, turns.tolist())):
        np.testing.assert_array_equal(copy, np.rot90(images[row % 3].numpy(), turn, (1, 2)))
    assert rotated_copies(images[:0])[0].shape == (0, 2, 5, 5)


def test_permutations_lie_far_apart():
    chosen = jigsaw_permutations()
    assert chosen.shape == (35, 9) and torch.equal(chosen.sort(1).values, torch.arange(9).expand(35, 9))
    distances = (chosen.unsqueeze(1) != chosen).sum(2) + 9 * torch.eye(35, dtype=torch.int64)
    assert (distances[:9, :9] == 9).all()
    assert distances.min() >= 7
    apart = (torch.rand(35, 9).argsort(1).unsqueeze(1) != torch.rand(35, 9).argsort(1)).sum(2)
    assert distances.min() > apart.min()


def test_permutations_are_chosen_greedily():
    orders = list(all_orders(range(4)))
    chosen = [orders[0]]
    while len(chosen) < 24:
        rest = [order for order in orders if order not in chosen]
        distances = [[sum(a != b for a, b in zip(order, other)) for other in chosen] for order in rest]
        chosen.append(rest[max(range(len(rest)), key=lambda i: (min(distances[i]), sum(distances[i]), -i))])
    assert jigsaw_permutations(24, 4).tolist() == [list(order) for order in chosen]


def test_a_generator_decides_the_permutations():
    one, same, other = (
        jigsaw_permutations(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert (one.unsqueeze(1) != one).sum(2).fill_diagonal_(4)[:4, :4].eq(4).all()


@pytest.mark.parametrize(("side", "grid"), [(9, 3), (11, 3), (8, 2)])
def test_tiles_come_whole_and_in_the_order_that_is_told(side, grid):
    tile = side // grid
    numbers = torch.arange(grid**2).reshape(grid, grid).float()
    image = torch.full((side, side), -1.0)
    image[: grid * tile, : grid * tile] = numbers.repeat_interleave(tile, 0).repeat_interleave(tile, 1)
    orders = jigsaw_permutations(7 if grid == 3 else 4, grid**2)
    tiles, order = shuffled_tiles(image.expand(20, 1, side, side), orders)
    assert tiles.shape == (20, grid**2, 1, side, side) and len(order.unique()) > 1
    # Every enlarged tile holds its own number alone: nothing of a neighbour, nothing of what was cut off.
    alone = orders[order].float()[:, :, None, None, None].expand_as(tiles)
    torch.testing.assert_close(tiles, alone, rtol=0, atol=1e-5)
    assert shuffled_tiles(image.expand(0, 1, side, side), orders)[0].shape == (0, grid**2, 1, side, side)


def test_the_jigsaw_head_treats_tiles_alike_and_images_apart():
    head = JigsawHead(4, 6, tiles=4, hidden=(3, 5), dropout=0.0)
    features = torch.randn(3, 4, 4)
    logits = head(features.flatten(0, 1))
    assert logits.shape == (3, 6)
    torch.testing.assert_close(head(features.flip(0).flatten(0, 1)), logits.flip(0))
    assert head.shared.layers[0].weight.shape == (3, 4) and head.joint.layers[0].weight.shape == (5, 4 * 3)


@pytest.mark.parametrize("encoder", [lambda: ConvNet(1, (4, 7)), lambda: MLP(36, (6,), 11)])
def test_heads_have_the_width_of_the_encoder(encoder):
    for method in (rotation(), jigsaw()):
        model = encoder()
        coloss.fit(model, new_data(), methods=[method], budget=Budget(steps=1))
        head = method.head if isinstance(method, RotationPretext) else method.head.shared
        assert head.in_features == model.out_features


class Listening(RotationPretext):
    """Keeps what it asked about."""

    def ask(self, images, state):
        inputs, answers = super().ask(images, state)
        self.asked = images, inputs
        return inputs, answers


def test_it_asks_about_images_or_about_views_where_they_were_made_before():
    data = new_data()
    first, second = Listening(view=noisy), Listening(view=noisy)
    second.question, second.term_weights = "again", {}
    fits = {"view": noisy, "projector": (4,)}
    coloss.fit(
        new_model(),
        data,
        methods=[first, NTXent(**fits), second],
        budget=Budget(steps=1),
        batch_size=32,
    )
    images, inputs = first.asked
    assert torch.equal(images.flatten(1).sort(0).values, data.inputs.flatten(1).sort(0).values)
    assert 0.05 < (inputs - rotated_copies(images)[0]).std() < 0.2
    views, inputs = second.asked
    assert 0.05 < (views - images).std() < 0.2
    assert torch.equal(inputs, rotated_copies(views)[0])


def test_the_question_leaves_no_trace_but_its_gradient():
    torch.manual_seed(0)
    plain = ConvNet(1, (4,))
    asked = ConvNet(1, (4,))
    asked.load_state_dict(plain.state_dict())
    seen = []

    class Reader(coloss.Method):
        def terms(self, state):
            seen.append(state.outputs)
            return {"size": state.outputs.square().mean()}

    for model, methods in ((plain, [Reader()]), (asked, [rotation(), Reader()])):
        coloss.fit(
            model,
            new_data(),
            methods=methods,
            budget=Budget(steps=1),
            optimizer=partial(torch.optim.SGD, lr=0.0),
        )
    assert torch.equal(*seen)
    for name, value in plain.state_dict().items():
        assert torch.equal(asked.state_dict()[name], value), name


def test_a_question_can_be_learnt():
    images = torch.zeros(64, 1, 6, 6)
    images[:, :, :2] = torch.rand(64, 1, 2, 6)
    run = coloss.fit(
        MLP(36, (16,)),
        (images,),
        methods=[rotation(view=as_it_is, dropout=0.0, weight=1.0)],
        budget=Budget(steps=60),
        optimizer=partial(torch.optim.AdamW, lr=0.02),
    )
    assert run.history[-1].metrics["rotation_accuracy"] > 0.95
    assert run.history[-1].terms["rotation"] < 0.2


def test_a_weight_of_zero_asks_nothing():
    class Silent(RotationPretext):
        def ask(self, images, state):
            raise AssertionError("asked")

    method = Silent(lambda progress: 0.0)
    run = coloss.fit(
        Classifier(new_model(), 3), new_data(), F.cross_entropy, [method], budget=Budget(steps=2)
    )
    assert run.history[-1].terms["rotation"] == 0


@pytest.mark.parametrize("question", [rotation, jigsaw])
def test_half_precision(question):
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.launch()
    run = coloss.fit(
        ConvNet(1, (4,)), new_data(), methods=[question()], budget=Budget(steps=2), fabric=fabric
    )
    assert all(np.isfinite(list(run.history[-1].terms.values())))


def test_bad_input_is_named(as_users_call):
    for build, message in (
        (lambda: RotationPretext(-1.0), "weight must be >= 0 and finite, or a schedule, got -1.0"),
        (lambda: RotationPretext(hidden=()), r"hidden must hold widths >= 1, at least one, got \[\]"),
        (lambda: RotationPretext(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: JigsawPretext(grid=4), "grid must be 2 or 3, got 4"),
        (lambda: JigsawPretext(grid=2, permutations=25), r"permutations must be in \[2, 24\], got 25"),
        (lambda: JigsawPretext(grid=2, permutations=4, hidden=(5,)), r"hidden must hold 2 widths, got \[5\]"),
        (lambda: jigsaw_permutations(2, 10), r"tiles must be in \[2, 9\], got 10"),
        (lambda: jigsaw_permutations(7, 3), r"count must be in \[1, 3! = 6\], got 7"),
        (lambda: rotated_copies(torch.zeros(1, 1, 2, 3)), "images must be square to be turned"),
        (lambda: shuffled_tiles(torch.zeros(1, 1, 1, 6), torch.arange(4)[None]), "got 1 x 6"),
        (
            lambda: shuffled_tiles(torch.zeros(1, 1, 6, 6), torch.arange(5)[None]),
            "square number of tiles, got 5",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    for model, inputs, method, message in (
        (MLP(36, (4,)), torch.rand(4, 36), rotation(), r"rotation needs images .* of floats, got \(4, 36\)"),
        (
            MLP(30, (4,)),
            torch.rand(4, 1, 5, 6),
            rotation(),
            "rotation does not fit these images: images must be",
        ),
        (
            MLP(36, (4,)),
            torch.rand(4, 1, 1, 36),
            jigsaw(),
            "jigsaw does not fit these images: images must be",
        ),
        (
            nn.Sequential(nn.Flatten(), nn.ReLU()),
            torch.rand(4, 1, 6, 6),
            rotation(),
            "Sequential does not declare",
        ),
    ):
        with pytest.raises(InputError, match=message):
            coloss.fit(model, (inputs,), methods=[method], budget=Budget(steps=1))


@pytest.mark.parametrize("question", [rotation, jigsaw])
def test_fit_a_plain_loop_and_lightning_take_the_same_steps(question):
    batches = list(zip(new_data().inputs.split(8), new_data().targets.split(8)))
    check_loops(
        lambda: Classifier(new_model(), 3), partial(question, dropout=0.0), batches, F.cross_entropy, epochs=1
    )


@pytest.mark.parametrize("question", [rotation, jigsaw])
def test_a_killed_run_resumes_bit_identically(tmp_path: Path, question):
    check_resume(new_model, question, new_data(), tmp_path)


def test_two_processes_take_the_steps_of_one(tmp_path: Path):
    def train(fabric: Fabric) -> dict[str, Tensor]:
        run = coloss.fit(
            new_model().double(),
            new_data(torch.float64),
            methods=[rotation(view=as_it_is, dropout=0.0)],
            budget=Budget(steps=4),
            batch_size=8,
            fabric=fabric,
        )
        return dict(run.model.state_dict())

    check_two_processes(train, tmp_path)
