"""Divide a data set by class: some classes to learn from, others that are never seen in training."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from coloss.data.dataset import IndexedDataset, Splits
from coloss.errors import InputError, suggest_names


def unseen_class_split(
    splits: Splits,
    *,
    test: int | Sequence[str],
    validation: int | Sequence[str] = 0,
    by: str = "class",
    separator: str = "/",
    seed: int = 0,
) -> Splits:
    """The same samples divided by class, so that retrieval and few-shot learning are judged on classes nobody trained on.

    All samples are used: those that the given division had put elsewhere move with their class. Classes are numbered anew, those of the
    training part first, so a head or a table of proxies needs `num_classes` rows; numbers of the other parts follow and are never shared.
    Samples keep their ids.

    Args:
        splits: of a classification with class names, such as `load("omniglot")` or `load("cifar10")`.
        test: how many classes (or groups) the test part takes, drawn by seed, >= 1; or their names.
        validation: likewise for the validation part; 0 leaves it empty.
        by: `"class"`, or `"group"` to keep classes together whose names begin alike, up to the separator (the alphabets of omniglot).
        separator: ends the group's name within a class name.
        seed: of the draw, >= 0.

    Returns:
        Splits of new parts. `num_classes` counts the training classes, `class_names` has all of them in their new order.

    Raises:
        InputError: for splits without class names, unknown or repeated names, an unknown `by`, a number out of range, or where nothing
            is left to train on.

    Examples:
        >>> from coloss.data import load
        >>> splits = unseen_class_split(load("digits"), test=("8", "9"), validation=1)
        >>> splits.num_classes, splits.class_names[-2:], splits.test.targets.unique().tolist()
        (7, ('8', '9'), [8, 9])
    """
    if splits.kind != "classification" or splits.class_names is None:
        raise InputError(
            f"splits must be of a classification with class names, got {splits.name} ({splits.kind})"
        )
    if by not in ("class", "group"):
        raise InputError(f'by must be "class" or "group", got {by!r}')
    if seed < 0:
        raise InputError(f"seed must be >= 0, got {seed}")
    names = splits.class_names
    units = [name.split(separator)[0] if by == "group" else name for name in names]
    known = list(dict.fromkeys(units))
    drawn = [known[i] for i in torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))]
    chosen: dict[str, list[str]] = {}
    for part, wanted, least in (("test", test, 1), ("validation", validation, 0)):
        taken = {unit for units_of_part in chosen.values() for unit in units_of_part}
        named = test if part == "validation" and not isinstance(test, int) else ()
        later = validation if part == "test" and not isinstance(validation, int) else ()
        if isinstance(wanted, int):
            if wanted < least:
                raise InputError(f"{part} must be >= {least}, got {wanted}")
            free = [unit for unit in drawn if unit not in taken and unit not in (*named, *later)]
            chosen[part] = free[:wanted]
            enough = len(chosen[part]) == wanted
        else:
            for unit in wanted:
                if unit not in known:
                    raise InputError(f"{part} names no {by} {unit!r}{suggest_names(unit, known)}")
            if len(set(wanted)) != len(wanted) or taken & set(wanted):
                raise InputError(f"{part} must name each {by} once and in one part, got {list(wanted)}")
            chosen[part], enough = list(wanted), True
        left = len(known) - sum(len(part_units) for part_units in chosen.values())
        if not enough or left < 1:
            raise InputError(
                f"test and validation must leave a {by} to train on: there are {len(known)}, got {test} and {validation}"
            )
    part_of = {unit: part for part, units_of_part in chosen.items() for unit in units_of_part}
    order = [
        number
        for part in ("train", "validation", "test")
        for number, unit in enumerate(units)
        if part_of.get(unit, "train") == part
    ]
    renumbered = torch.empty(len(names), dtype=torch.int64)
    renumbered[torch.tensor(order)] = torch.arange(len(names))
    inputs, targets, ids = _joined(splits)
    targets = renumbered[targets]
    counts = {
        part: sum(part_of.get(unit, "train") == part for unit in units)
        for part in ("train", "validation", "test")
    }
    parts, first = {}, 0
    for part, count in counts.items():
        here = ((targets >= first) & (targets < first + count)).nonzero().flatten()
        parts[part] = IndexedDataset(inputs[here], targets[here], ids[here])
        first += count
    return replace(
        splits,
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        num_classes=counts["train"],
        class_names=tuple(names[number] for number in order),
        description=f"{counts['train']} classes to train on, {counts['validation']} for validation and {counts['test']} for the test, "
        + ("drawn by seed " + str(seed) if isinstance(test, int) else "by name"),
    )


def _joined(splits: Splits) -> tuple[Tensor, Tensor, Tensor]:
    parts = [splits.train.all(), splits.validation.all(), splits.test.all()]
    inputs, targets, ids = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets", "ids")
    )
    order = ids.argsort()
    return inputs[order], targets[order], ids[order]
