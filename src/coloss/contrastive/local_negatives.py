"""Tells a user who compares samples within each process alone that the loss is then another one."""

import warnings

from coloss.ops import world_size


class LocalNegativesWarning(UserWarning):
    """Each process of a run compares its samples with its own alone."""


def warn_of_local_negatives(name: str, across_processes: bool) -> None:
    """Warn where a run of several processes compares samples within each of them alone.

    Args:
        name: of the method.
        across_processes: what the user chose.

    Examples:
        >>> warn_of_local_negatives("CLIP", across_processes=False)  # one process: nothing to say
    """
    if not across_processes and world_size() > 1:
        warnings.warn(
            f"{name} with across_processes=False compares each process's samples with its own alone: "
            f"1 / {world_size()} of the negatives that one process would have on the joined batch",
            LocalNegativesWarning,
            stacklevel=2,
        )
