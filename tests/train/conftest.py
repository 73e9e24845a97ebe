import pytest
import torch
from torch import nn


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(130, 6, generator=generator)
    return inputs, (inputs[:, 0] + 0.3 * torch.randn(130, generator=generator) > 0).long()


@pytest.fixture
def new_model():
    def build():
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))

    return build
