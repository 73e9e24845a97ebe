"""Retrieval of handwritten characters of alphabets that nobody trained on: where losses of metric learning are compared.

Omniglot, averaged down to 14x14 pixels; four of its eight alphabets, drawn by seed, are for training, the characters of the other four are
searched for one another. Two convolutions and a linear layer give 64 dimensions; a batch holds 4 drawings of each of 16 characters.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from coloss.contrastive.pair_mixing import utilization
from coloss.data import IndexedDataset, Loader, MPerClassSampler, Splits, load, unseen_class_split
from coloss.metrics import extract_features, self_retrieval_metrics
from coloss.train import Budget, Method, Setting, cosine, fit

STEPS = 200


def omniglot_by_alphabet(seed: int, test: int = 4) -> Splits:
    """Omniglot at 14x14 pixels, some alphabets drawn for the test and the others for training.

    Args:
        seed: of the draw.
        test: alphabets for the test, in [1, 7].

    Raises:
        DataNotFoundError: if the file of omniglot is not there.
    """
    whole = load("omniglot", seed=seed)
    assert isinstance(whole, Splits)
    splits = unseen_class_split(whole, test=test, by="group", seed=seed)
    for part in (splits.train, splits.test):
        assert isinstance(part.inputs, torch.Tensor)
        part.inputs = F.avg_pool2d(part.inputs, 2)
    splits.input_shape = (1, 14, 14)
    return splits


def character_encoder(seed: int, channels: int = 32, dim: int = 64) -> nn.Module:
    """Two convolutions and a linear layer, with initial weights drawn by seed.

    Examples:
        >>> character_encoder(0)(torch.zeros(5, 1, 14, 14)).shape
        torch.Size([5, 64])
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, channels // 2, 3, padding=1),
            nn.BatchNorm2d(channels // 2),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(channels * 49, dim),
        )


def compare_on_unseen_alphabets(
    setting: Setting, arms: Mapping[str, Callable[[], Sequence[Method]]]
) -> dict[str, dict[str, float]]:
    """Every arm trained from the same weights on the same batches, and searched on the unseen characters.

    Args:
        setting: its seed draws alphabets, weights and batches.
        arms: name -> fresh methods, which supply the loss; none leaves the network untrained.

    Returns:
        Arm -> `recall@1`, `map@r` (cosine similarity, the query itself left out) and `utilization` (see `coloss.contrastive.utilization`).
    """
    splits = omniglot_by_alphabet(setting.seed)
    assert isinstance(splits.train.targets, torch.Tensor)
    found = {}
    for name, methods in arms.items():
        model, chosen = character_encoder(setting.seed), list(methods())
        if chosen:
            sampler = MPerClassSampler(splits.train.targets, classes_per_batch=16, samples_per_class=4)
            fit(
                model,
                Loader(splits.train, None, sampler=sampler, seed=setting.seed),
                methods=chosen,
                budget=Budget(steps=3 if setting.smoke else STEPS),
                optimizer=partial(torch.optim.AdamW, lr=2e-3),
                learning_rate_schedule=cosine(warmup=0.05),
                log_every=1000,
                seed=setting.seed,
            )
        found[name] = _judge(model.eval(), splits.train, splits.test)
    return found


def _judge(model: nn.Module, train: IndexedDataset, test: IndexedDataset) -> dict[str, float]:
    unseen, targets = extract_features(model, test)
    seen, _ = extract_features(model, train)
    metrics = self_retrieval_metrics(unseen, targets, ks=(1,))
    return {
        "recall@1": metrics["recall@1"],
        "map@r": metrics["map@r"],
        "utilization": utilization(unseen, seen),
    }
