"""Peak memory is that of the stretch alone, whatever garbage was there before."""

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

from coloss.train import Budget, Method, fit
from coloss.train.cost import PeakMemory

SIZE = 60_000_000 // 4


class Cycle:
    """Memory that only the garbage collector frees."""

    def __init__(self):
        self.itself = self
        self.tensor = torch.ones(SIZE)


def test_garbage_from_before_hides_nothing():
    gc.unfreeze()  # objects that another test left frozen would have garbage collected, not kept
    gc.disable()  # or it may be collected before the measurement begins
    try:
        reference = weakref.ref(Cycle())
        with PeakMemory(torch.device("cpu")) as memory:
            gc.collect()
            assert reference() is not None
            tensor = torch.ones(SIZE)
            assert 55 < memory.megabytes() < 80
    finally:
        gc.enable()
    gc.collect()
    assert reference() is None
    assert len(tensor) == SIZE


def test_what_others_froze_stays_frozen():
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        reference = weakref.ref(Cycle())
        with PeakMemory(torch.device("cpu")) as memory:
            assert reference() is None
            tensor = torch.ones(SIZE)
            assert 55 < memory.megabytes() < 80
        assert (
            gc.get_freeze_count() > before / 2
        )  # some of them go by themselves, when nobody refers to them any more
        assert len(tensor) == SIZE
    finally:
        gc.unfreeze()


def test_nothing_stays_frozen_after_a_run(data, new_model):
    class Break(Method):
        def on_step(self, state):
            assert gc.get_freeze_count() > 0
            if state.step == 2:
                raise KeyError("broken")

    fit(new_model(), data, F.cross_entropy, [Break()], budget=Budget(steps=1))
    assert gc.get_freeze_count() == 0
    with pytest.raises(KeyError, match="broken"):
        fit(new_model(), data, F.cross_entropy, [Break()], budget=Budget(steps=3))
    assert gc.get_freeze_count() == 0
