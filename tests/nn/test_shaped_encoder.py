"""An encoder for the shape of the data."""

import pytest
import torch

from coloss.nn import TableColumns, token_encoder_for_shape


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((1, 8, 8), (4, 4)),
        ((3, 32, 32), (8, 8)),
        ((1, 28, 20), (7, 5)),
        ((2, 140), (35,)),
        ((1, 30), (15,)),
        ((7,), (7,)),
    ],
)
def test_it_takes_the_smallest_patches_that_make_64_tokens_at_most(shape, grid) -> None:
    encoder = token_encoder_for_shape(shape, dim=8, depth=1, heads=2)
    assert encoder.tokenizer.grid == grid
    assert encoder(torch.rand(2, *shape)).shape == (2, 8)


def test_patches_categories_and_the_encoders_options_are_passed_on() -> None:
    assert token_encoder_for_shape((1, 8, 8), patch_size=4).tokenizer.grid == (2, 2)
    encoder = token_encoder_for_shape((3,), categorical_cardinalities=[4], registers=2, pool="none", dim=8)
    assert isinstance(encoder.tokenizer, TableColumns)
    assert encoder.tokenizer.numeric == 2
    assert encoder.num_prefix == 2
    assert encoder(torch.tensor([[0.5, 1.5, 3.0]])).shape == (1, 3, 8)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 31), {}, r"divisible into 2 to 64 patches, got \(31,\): give patch_size"),
        ((1, 2, 3, 4), {}, r"shape must be \(columns,\), .* got \(1, 2, 3, 4\)"),
        ((), {}, r"got \(\)"),
        ((1, 8, 8), {"categorical_cardinalities": [3]}, "categorical_cardinalities must be empty"),
        ((1, 8, 8), {"patch_size": 3}, "patch_size must divide"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        token_encoder_for_shape(shape, **options)
