"""Default networks and augmentations: no sample sees another, and gradients pass."""

import pytest
import torch

from coloss.distillation import distillation_network, instance_norm_network
from coloss.distillation.distillation_networks import named_augmentation
from coloss.errors import InputError


def test_networks_hold_no_batch_norm_and_views_pass_gradients() -> None:
    conv = distillation_network((3, 16, 16), 5)
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    torch.testing.assert_close(conv(x)[:1], conv(x[:1]), rtol=1e-4, atol=1e-4)  # no sample sees another
    for name in ("shifted", "mirrored"):
        view = named_augmentation(name)
        assert view is not None
        one, other = (view(x, torch.Generator().manual_seed(0)) for _ in range(2))
        assert torch.equal(one, other)
        assert torch.autograd.grad(one.sum(), x)[0].abs().sum() > 0
    with pytest.raises(InputError, match="did you mean 'mirrored'"):
        named_augmentation("miror")
    with pytest.raises(ValueError, match="size must be at least 8 for depth 3, got "):
        instance_norm_network(3, 5, (4, 16))
