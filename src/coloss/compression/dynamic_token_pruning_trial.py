"""What is measured of token pruning: street scenes segmented by a small transformer whose confident patches stop early, beside others."""

import copy
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from coloss.compression.dynamic_token_pruning import DynamicTokenPruning
from coloss.compression.early_exit_models import (
    EarlyExitSegmenter,
    early_exit_cost,
    evaluate_segmenter,
    segmentation_loss,
)
from coloss.data import IndexedDataset, load_segmentation
from coloss.metrics import evaluation_mode, rank_correlation
from coloss.ops import select_confident_tokens
from coloss.train import Budget, Setting, cosine, fit

DIM, DEPTH, HEADS, PATCH, EXITS = 64, 6, 4, 5, (1, 3, 6)
"""Of the network, on images of 30 x 40 pixels: 48 patches."""

THRESHOLD, KEEP = 0.75, 5
SHALLOW = 4
STEPS, MORE_STEPS = 250, 80
RATE, LATER_RATE = 2e-3, 1.5e-3
BATCH, WEIGHT_DECAY = 8, 0.05


def street_scenes() -> tuple[IndexedDataset, IndexedDataset, IndexedDataset]:
    """CamVid at a third of its stored size: training images with their mirror images, validation and test images."""
    splits = load_segmentation("camvid", shrink=3)
    images, classes = splits.train.inputs, splits.train.targets
    assert isinstance(images, Tensor) and isinstance(classes, Tensor)
    train = IndexedDataset(torch.cat([images, images.flip(3)]), torch.cat([classes, classes.flip(2)]))
    return train, splits.validation, splits.test


def new_segmenter(depth: int = DEPTH, exits: tuple[int, ...] = EXITS) -> EarlyExitSegmenter:
    """The network of every arm, of some depth."""
    return EarlyExitSegmenter((30, 40), PATCH, 11, dim=DIM, depth=depth, heads=HEADS, exit_after=exits)


def trained(
    model: EarlyExitSegmenter, data: IndexedDataset, steps: int, rate: float, seed: int, **pruning: float
) -> EarlyExitSegmenter:
    """The same model, trained with losses at all its heads, on the CPU."""
    found = fit(
        model,
        data,
        segmentation_loss,
        [DynamicTokenPruning(**pruning)],  # type: ignore[arg-type]
        budget=Budget(steps=steps),
        batch_size=BATCH,
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=WEIGHT_DECAY),
        learning_rate_schedule=cosine(warmup=0.1),
        clip_norm=1.0,
        seed=seed,
    ).model.cpu()
    assert isinstance(found, EarlyExitSegmenter)
    return found


def random_exit(
    generator: torch.Generator, numbers: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """A rule that lets random tokens go.

    Args:
        generator: of the draws, on the CPU.
        numbers: how many of each image, at the stages in turn, (stages, batch); by default as many of each as the confident ones among
            its tokens, so that only which ones they are is left to chance.
    """
    turns = None if numbers is None else cycle(numbers)

    def select(probabilities: Tensor, active: Tensor) -> Tensor:
        if turns is None:
            number = select_confident_tokens(probabilities, active, THRESHOLD, KEEP).sum(1)
        else:
            number = next(turns).to(active.device)
        drawn = torch.rand(active.shape, generator=generator).to(active.device)
        order = drawn.masked_fill(~active, 2.0).argsort(1).argsort(1)
        return (order < number[:, None]) & active

    return select


def leaving(model: EarlyExitSegmenter, images: Tensor) -> Tensor:
    """How many tokens of each image leave at each stage but the last: (stages, images)."""
    with evaluation_mode(model):
        counts = model.stages(images).active_counts
    return torch.stack([counts[layers - 1] - counts[layers] for layers in EXITS[:-1]])


def early_exit_against_others(setting: Setting) -> dict[str, dict[str, float]]:
    """What each arm is worth on the test images: mean IoU, cost, latency, and whether hard patches are those that go on.

    All arms but the shallower network begin from one network of six blocks, trained with losses at its heads and all tokens, and are trained
    on for the same steps: with all tokens ("unpruned"), with confident tokens left out, five of each class spared or none, and with random
    tokens left out: in training as many of each image as are confident to the network itself, in testing as many of each image as early exit
    leaves out. The shallower network, of about as many multiply-adds for an image, is trained by itself for as many steps as the others in all.

    Args:
        setting: seed, and whether it is a smoke run.
    """
    seed = setting.seed
    train, _, test = street_scenes()
    steps, more = STEPS, MORE_STEPS
    if setting.smoke:
        train, test, steps, more = train.subset(torch.arange(8)), test.subset(torch.arange(4)), 1, 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = trained(new_segmenter(), train, steps, RATE, seed, threshold=1.0, prune_from=1.0)

        def further(
            rule: Callable[[Tensor, Tensor], Tensor] | None = None, **pruning: float
        ) -> EarlyExitSegmenter:
            model = copy.deepcopy(base)
            model.early_exit.select = rule
            return trained(model, train, more, LATER_RATE, seed, prune_from=0.0, **pruning)

        unpruned = further(threshold=1.0)
        early = further(threshold=THRESHOLD, keep_per_class=KEEP)
        bare = further(threshold=THRESHOLD, keep_per_class=0)
        generator = torch.Generator().manual_seed(seed)
        rand = further(random_exit(generator), threshold=1.0)
        rand.early_exit.select = random_exit(generator, leaving(early, _images(test)))
        torch.manual_seed(seed)
        shallow = trained(
            new_segmenter(SHALLOW, (SHALLOW,)), train, steps + more, RATE, seed, threshold=1.0, prune_from=1.0
        )
    whole = early_exit_cost(unpruned, _images(test))["multiply_adds"]
    return {
        name: judged(model, test, whole)
        for name, model in {
            "early exit": early,
            "random exit": rand,
            "early exit, no token of a class spared": bare,
            "unpruned": unpruned,
            f"{SHALLOW} blocks": shallow,
        }.items()
    }


def judged(model: EarlyExitSegmenter, data: IndexedDataset, whole: float) -> dict[str, float]:
    """Metrics of one arm; all images in one batch, for a rule that knows how many tokens each of them loses."""
    images, targets = _images(data), data.targets
    assert isinstance(targets, Tensor)
    with evaluation_mode(model):
        outputs = model.stages(images)
    cost = model.early_exit.multiply_adds(outputs.active_counts, DIM).mean().item()
    found = evaluate_segmenter(model, data, batch_size=len(data))
    found |= {"multiply_adds_share": cost / whole, "milliseconds": milliseconds(model, images)}
    if len(outputs.stages) > 1 and (outputs.exit_stages < len(outputs.stages) - 1).any():
        border = boundary_patches(targets)
        stayed = outputs.active_counts.sum(0) / outputs.active_counts[0].sum() * len(images)
        last = (outputs.exit_stages == len(outputs.stages) - 1).float()
        if (
            model.early_exit.select is None
        ):  # a rule that copies another's numbers has the other's correlation
            found["boundary_correlation"] = rank_correlation(border.float().mean(1).numpy(), stayed.numpy())
        found |= {
            "boundary_stays": last[border].mean().item(),
            "interior_stays": last[~border].mean().item(),
        }
    return found


def boundary_patches(targets: Tensor) -> Tensor:
    """Whether a patch holds more than one labelled class: (images, patches)."""
    patches = (
        targets.unflatten(1, (-1, PATCH)).unflatten(3, (-1, PATCH)).transpose(2, 3).flatten(3).flatten(1, 2)
    )
    highest = patches.amax(2)
    lowest = patches.masked_fill(patches < 0, 99).amin(2)
    return (lowest < highest) & (highest >= 0)


def milliseconds(model: EarlyExitSegmenter, images: Tensor, count: int = 30) -> float:
    """Median wall time of one image by itself; NaN for a rule that must see all images at once."""
    if model.early_exit.select is not None:
        return float("nan")
    taken = []
    with evaluation_mode(model):
        for image in images[: count + 3].split(1):
            start = time.perf_counter()
            model(image)
            taken.append(time.perf_counter() - start)
    return 1000 * sorted(taken[3:])[len(taken[3:]) // 2]


def _images(data: IndexedDataset) -> Tensor:
    assert isinstance(data.inputs, Tensor)
    return data.inputs
