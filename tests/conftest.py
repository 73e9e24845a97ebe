"""What all tests share: fixed randomness, and a way round the shape checks of the test run."""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from hypothesis import settings

# The same examples in every run, without deadlines: what a loaded machine does must not decide what a test finds.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def as_users_call() -> Iterator[None]:
    """Without the shape and type checks of the test run, so that a function's own check answers."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
