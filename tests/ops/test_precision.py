"""Facts about the precision in which losses are computed."""

import pytest
import torch

from coloss.ops import accumulation_dtype, full_precision, without_autocast


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_and_its_gradient_comes_back_half(dtype):
    x = torch.ones(3, dtype=dtype, requires_grad=True)
    wide = full_precision(x)
    wide.sum().backward()
    assert wide.dtype == torch.float32
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_is_not_copied(dtype):
    x = torch.ones(3, dtype=dtype)
    assert full_precision(x) is x


def test_products_keep_their_precision_inside_autocast():
    x = torch.full((1, 1), 1.001)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast(x.device):
            assert (x @ x).item() == pytest.approx(1.001**2, rel=1e-6)
    with without_autocast(torch.device("meta")):  # a device that knows no autocast
        assert (x @ x).dtype == torch.float32


def test_sums_are_accumulated_in_float64_where_the_device_has_it():
    assert accumulation_dtype(torch.device("cpu")) == torch.float64
    assert accumulation_dtype(torch.device("mps")) == torch.float32
