"""What the tests of `coloss.jepa` share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch

from coloss.nn import TokenEncoder


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def read_by_predict_alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """Makes token encoders of a trial refuse `encode` outside `fit` and `predict`, which alone bring inputs to an encoder's device.

    It stands for an accelerator, on which `fit` leaves an encoder.
    """
    inside: list[str] = []

    @contextmanager
    def entered(name: str) -> Iterator[None]:
        inside.append(name)
        try:
            yield
        finally:
            inside.pop()

    def refuse(trial: ModuleType) -> None:
        def guarded(name: str) -> Callable[..., Any]:
            original = getattr(trial, name)

            def call(*given: Any, **more: Any) -> Any:
                with entered(name):
                    return original(*given, **more)

            return call

        encode = TokenEncoder.encode

        def encode_inside(self: TokenEncoder, *given: Any, **more: Any) -> Any:
            assert inside, "encode was called on inputs that nothing brought to the encoder's device"
            return encode(self, *given, **more)

        for name in ("fit", "predict", "_unexplained"):
            if name != "_unexplained" or hasattr(trial, name):
                monkeypatch.setattr(trial, name, guarded(name))
        monkeypatch.setattr(TokenEncoder, "encode", encode_inside)

    return refuse
