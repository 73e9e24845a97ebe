"""What the tests of `coloss.jepa` share."""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def as_users_call() -> Iterator[None]:
    """Without the shape and type checks of the test run, so that a function's own check answers."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
