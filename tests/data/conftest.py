from collections.abc import Callable

import pytest

from coloss.data import DATASETS, locate
from coloss.errors import DataNotFoundError


@pytest.fixture
def needs() -> Callable[[str], str]:
    """Skips the test, with the loader's own message, if the file of a data set is not on this machine."""

    def check(name: str) -> str:
        if DATASETS[name].file is not None:
            try:
                locate(name)
            except DataNotFoundError as error:
                pytest.skip(str(error))
        return name

    return check
