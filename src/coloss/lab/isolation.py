"""What keeps a trial apart from everything around it: its randomness and its threads."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from threadpoolctl import threadpool_limits


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Draw all global randomness from a seed and compute on one thread; both are as they were afterwards.

    Sums come out the same on any number of cores that way, in PyTorch and in the libraries under NumPy and scikit-learn.

    Examples:
        >>> with reproducible(3):
        ...     first = torch.rand(1), np.random.rand()
        >>> with reproducible(3):
        ...     first == (torch.rand(1), np.random.rand())
        True
    """
    threads = torch.get_num_threads()
    plain, array = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with threadpool_limits(1), torch.random.fork_rng():
            torch.set_num_threads(1)
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(plain)
        np.random.set_state(array)  # noqa: NPY002
