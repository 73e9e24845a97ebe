"""The tasks known by name, and whether a text is one, a file, or neither. Nothing here imports torch."""

from pathlib import Path
from typing import Literal

from coloss.data.catalog import DATASETS, RETRIEVAL_VIEWS, SUPERVISED_KINDS
from coloss.errors import InputError, UnknownNameError, suggest_names

TaskKind = Literal[
    "classification", "regression", "self-supervised", "ranking", "next-item", "token-retrieval"
]
"""The kinds that can be asked for, where data of one's own allow more than one."""

HALVES = "digits-halves"
"""Images cut in two: which bottom half belongs to which top half."""

IMAGE_TEXT = "openmoji-pairs"
"""Drawings and their captions: each finds the other."""

TOKEN_TOWERS = "openmoji-tokens"
"""Captions that find drawings, by two towers that keep their tokens."""

MOTION_SETS = ("bandai", "hdm05", "msr-action3d", "sfinge-hands")
"""Clips of skeletons with labels."""

SELF_SUPERVISED = "-ssl"
"""Ending of the tasks that train an encoder without labels."""

RETRIEVAL = "-retrieval"
"""Ending of the tasks that see a data set as queries and documents."""

NEXT_ITEM = "-next"
"""Ending of the tasks that predict which item a user chooses next; without it the task is to rank shown items."""


def task_names() -> list[str]:
    """Names that `find_task` answers to: each supervised data set, `NAME-ssl` for classifications, `NAME-retrieval` for texts that can be
    searched, `NAME` and `NAME-next` for interactions of users with items, `NAME` and `NAME-ssl` for clips of motion, running texts, `digits-halves`, `openmoji-pairs`, `openmoji-tokens`.

    Examples:
        >>> {"digits", "digits-ssl", "digits-halves", "openmoji-pairs", "diabetes"} <= set(task_names())
        True
    """
    return sorted(
        [HALVES, IMAGE_TEXT, TOKEN_TOWERS, *(name for dataset in DATASETS for name in tasks_of(dataset))]
    )


def tasks_of(dataset: str) -> list[str]:
    """Names of the tasks that a data set gives by itself.

    Examples:
        >>> tasks_of("digits"), tasks_of("diabetes"), tasks_of("camvid")
        (['digits', 'digits-ssl'], ['diabetes'], [])
        >>> tasks_of("amazon-video-games")
        ['amazon-video-games', 'amazon-video-games-next']
        >>> tasks_of("banking77")
        ['banking77', 'banking77-ssl', 'banking77-retrieval']
    """
    kind = DATASETS[dataset].kind
    if kind == "recommendation":
        return [dataset, dataset + NEXT_ITEM]
    if kind == "language":
        return [dataset]
    if kind == "motion":
        return [dataset, dataset + SELF_SUPERVISED] if dataset in MOTION_SETS else []
    if kind not in SUPERVISED_KINDS:
        return []
    endings = [
        "",
        *[SELF_SUPERVISED] * (kind == "classification"),
        *[RETRIEVAL] * (dataset in RETRIEVAL_VIEWS),
    ]
    return [dataset + ending for ending in endings]


def is_file(text: str) -> bool:
    """Tell whether a text stands for a file or folder that exists; neither a name of a task nor what cannot be a path is taken for one.

    Examples:
        >>> is_file("digits"), is_file("."), is_file("~nobody-of-this-name/rows.csv")
        (False, True, False)
    """
    if text in task_names() or text.startswith("hf:"):
        return False
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError):  # a name too long, a home of nobody
        return False


def check_task(text: str) -> None:
    """Refuse what is neither a task, nor `hf:...`, nor a file or folder that exists.

    Raises:
        InputError: naming what comes close.

    Examples:
        >>> check_task("abalon")
        Traceback (most recent call last):
        ...
        coloss.errors.UnknownNameError: no task named 'abalon'; did you mean 'abalone'? (coloss data lists them; a path works too)
    """
    known = task_names()
    if text in known or text.startswith("hf:") or is_file(text):
        return
    if text in DATASETS:
        raise InputError(
            f"{text!r} is no task by itself, its kind is {DATASETS[text].kind}; see: coloss data {text}"
        )
    looks_like_file = "/" in text or "\\" in text or Path(text).suffix
    what = f"no file or folder {text!r}" if looks_like_file else f"no task named {text!r}"
    raise UnknownNameError(f"{what}{suggest_names(text, known)} (coloss data lists them; a path works too)")
