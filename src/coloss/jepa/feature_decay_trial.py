"""What NC1 of a network becomes without the weight decay of its features, and without that of its last layer: the trial behind a claim."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from coloss.data import IndexedDataset, Splits, load
from coloss.jepa.collapse_layers import collapse_report
from coloss.nn import MLP, Classifier
from coloss.train import Budget, Setting, cosine, fit

DECAY = 1e-3
DECAYS = {
    "both decays": (DECAY, DECAY),
    "no feature decay": (0.0, DECAY),
    "no last-layer decay": (DECAY, 0.0),
}
DEPTHS = ("backbone.layers.1", "backbone.layers.3", "backbone.layers.5")


def one_hot_squared_error_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance of outputs to one-hot targets, averaged over samples: the loss of the theory.

    Examples:
        >>> one_hot_squared_error_loss(torch.zeros(2, 3), torch.tensor([0, 2])).item()
        0.5
    """
    wanted = nn.functional.one_hot(targets, outputs.shape[1]).to(outputs)
    return (outputs - wanted).square().sum(1).mean() / 2


def _two_decays(
    model: Classifier, features: float, last: float
) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """SGD with one weight decay for the layers that make the features, and one for the last."""
    head = {id(parameter) for parameter in model.head.parameters()}

    def build(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in parameters if id(p) not in head], "weight_decay": features},
            {"params": [p for p in parameters if id(p) in head], "weight_decay": last},
        ]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    return build


def _balanced_digits(seed: int) -> tuple[IndexedDataset, IndexedDataset]:
    """150 images of each digit to train on, the other 297 to test."""
    splits = load("digits", seed=seed)
    assert isinstance(splits, Splits)
    parts = [part.all() for part in (splits.train, splits.validation, splits.test)]
    inputs, targets = (torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets"))
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    rows = [order[targets[order] == digit] for digit in range(10)]
    everything = IndexedDataset(inputs, targets)
    train, test = torch.cat([row[:150] for row in rows]), torch.cat([row[150:] for row in rows])
    return everything.subset(train), everything.subset(test)


def drop_one_decay(setting: Setting) -> dict[str, dict[str, float]]:
    """Train with both decays, and with either left out; NC1 of each, and how far that is from both."""
    train, test = _balanced_digits(setting.seed)
    found: dict[str, dict[str, float]] = {}
    for name, decays in DECAYS.items():
        torch.manual_seed(setting.seed)
        model = Classifier(MLP(64, (128, 128, 64), norm=None), 10)
        fit(
            model,
            train,
            one_hot_squared_error_loss,
            budget=Budget(steps=20) if setting.smoke else Budget(epochs=150),
            batch_size=128,
            optimizer=_two_decays(model, *decays),
            learning_rate_schedule=cosine(),
            seed=setting.seed,
        )
        seen = collapse_report(model, train, DEPTHS, test=test)
        unseen = collapse_report(model, test, DEPTHS)
        last = DEPTHS[-1]
        found[name] = {
            "nc1": unseen[last]["nc1"],
            "nc1_train": seen[last]["nc1"],
            "nc2_train": seen[last]["nc2"],
            "nc4_train": seen[last]["nc4"],
            "nc4_test": seen[last]["nc4_test"],
            **{f"nc1_train_layer_{depth}": seen[path]["nc1"] for depth, path in enumerate(DEPTHS, 1)},
        }
        with torch.no_grad():
            for part, data in (("train", train.all()), ("test", test.all())):
                right = model(data.inputs).argmax(1) == data.targets
                found[name][f"accuracy_{part}"] = float(right.float().mean())
    both = found["both decays"]
    for values in found.values():
        values["nc1_shift"] = abs(math.log(values["nc1"] / both["nc1"]))
        values["nc1_shift_train"] = abs(math.log(values["nc1_train"] / both["nc1_train"]))
    return found
