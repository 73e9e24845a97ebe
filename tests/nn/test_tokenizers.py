import pytest
import torch
import torch.nn.functional as F

from coloss.nn import ImagePatches, SignalPatches, TableColumns, Words

NAN = float("nan")


def test_image_patches_are_a_convolution_with_stride():
    tokenizer = ImagePatches((6, 8), (3, 2), in_channels=2, dim=5, positions=None)
    images = torch.randn(4, 2, 6, 8)
    kernel = tokenizer.projection.weight.reshape(5, 2, 3, 2)
    expected = F.conv2d(images, kernel, tokenizer.projection.bias, stride=(3, 2)).flatten(2).transpose(1, 2)
    assert tokenizer.grid == (2, 4)
    assert tokenizer.num_tokens == 8
    assert torch.allclose(tokenizer(images), expected, atol=1e-6)


def test_image_patches_list_the_pixels_of_each_patch():
    images = torch.arange(16.0).reshape(1, 1, 4, 4)
    patches = ImagePatches(4, 2, in_channels=1, dim=4).patches(images)
    assert patches[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_signal_patches_are_a_convolution_with_stride():
    tokenizer = SignalPatches(20, 4, channels=3, dim=5, positions=None)
    series = torch.randn(2, 3, 20)
    kernel = tokenizer.projection.weight.reshape(5, 3, 4)
    expected = F.conv1d(series, kernel, tokenizer.projection.bias, stride=4).transpose(1, 2)
    assert torch.allclose(tokenizer(series), expected, atol=1e-6)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_shorter_series_give_the_first_tokens(positions):
    tokenizer = SignalPatches(20, 4, channels=1, dim=6, positions=positions)
    series = torch.randn(2, 1, 20)
    assert torch.allclose(tokenizer(series[:, :, :12]), tokenizer(series)[:, :3], atol=1e-6)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", None])
@pytest.mark.parametrize("patch", [2, 16])
def test_projection_begins_at_the_scale_of_the_positions(positions, patch):
    tokenizer = SignalPatches(160, patch, channels=4, dim=64, positions=positions)
    scale = tokenizer.projection(torch.randn(500, 4 * patch)).std().item()
    assert scale == pytest.approx(1.0 if positions == "sinusoidal" else 0.02, rel=0.2)


def test_table_tokens_worked_by_hand():
    tokenizer = TableColumns(1, [2, 3], dim=4)
    row = torch.tensor([[2.0, 1.0, 0.0]])
    expected = (
        torch.stack([2 * tokenizer.weight[0], tokenizer.categories[1], tokenizer.categories[2 + 0]])
        + tokenizer.bias
    )
    assert torch.equal(tokenizer(row)[0], expected)


@pytest.mark.parametrize("code", [NAN, -1.0, 3.0])
def test_missing_and_unseen_values_take_the_missing_vector(code):
    tokenizer = TableColumns(1, [3], dim=4)
    tokens = tokenizer(torch.tensor([[NAN, code]]))[0]
    assert torch.equal(tokens, tokenizer.missing + tokenizer.bias)


def test_missing_values_leave_gradients_finite_and_others_alone():
    tokenizer = TableColumns(2, [3], dim=4)
    tokenizer(torch.tensor([[NAN, 1.5, NAN]])).sum().backward()
    assert torch.equal(tokenizer.weight.grad[0], torch.zeros(4))
    assert torch.equal(tokenizer.weight.grad[1], torch.full((4,), 1.5))
    assert torch.equal(tokenizer.missing.grad, torch.tensor([[1.0], [0.0], [1.0]]).expand(3, 4))
    assert torch.equal(tokenizer.categories.grad, torch.zeros(3, 4))


@pytest.mark.parametrize(("numeric", "cardinalities"), [(3, []), (0, [4, 2])])
def test_tables_of_one_kind_have_no_empty_parameters(numeric, cardinalities):
    tokenizer = TableColumns(numeric, cardinalities, dim=4)
    assert tokenizer(torch.zeros(2, tokenizer.num_tokens)).shape == (2, tokenizer.num_tokens, 4)
    assert all(parameter.numel() for parameter in tokenizer.parameters())


def test_table_leaves_its_input_untouched():
    rows = torch.tensor([[NAN, 7.0]])
    TableColumns(1, [2], dim=4)(rows)
    assert rows[0, 0].isnan()
    assert rows[0, 1] == 7


def test_words_are_embeddings_plus_positions():
    tokenizer = Words(10, 4, max_length=5)
    ids = torch.tensor([[3, 9], [0, 3]])
    expected = tokenizer.embedding.weight[ids] + tokenizer.positions.table[:2]
    assert torch.equal(tokenizer(ids), expected)


def test_words_report_padding_by_id():
    ids = torch.tensor([[7, 3, 7]])
    assert Words(10, 4, 5, padding_id=7).padding(ids).tolist() == [[True, False, True]]
    assert Words(10, 4, 5, padding_id=None).padding(ids) is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ImagePatches(8, 3, 1, 4), r"patch_size must divide image_size \(8, 8\), got \(3, 3\)"),
        (lambda: ImagePatches(8, 2, 1, 6, positions="sinusoidal"), "dim must be a multiple of 4"),
        (lambda: SignalPatches(10, 4, 1, 4), "patch_size must divide length 10, got 4"),
        (lambda: TableColumns(0, [], 4), "at least one column"),
        (lambda: TableColumns(1, [3, 0], 4), "categorical_cardinalities must be >= 1"),
        (lambda: Words(10, 4, 5, padding_id=10), "padding_id must be in 0 .. 9 or None, got 10"),
        (lambda: Words(10, 0, 5), "dim must be >= 1, got 0"),
        (lambda: Words(10, 4, 0), "at least one token along each axis"),
    ],
)
def test_refuses_impossible_sizes(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("tokenizer", "inputs", "message"),
    [
        (ImagePatches(8, 2, 1, 4), torch.rand(2, 1, 8, 6), r"\(batch, 1, 8, 8\), got \(2, 1, 8, 6\)"),
        (SignalPatches(8, 2, 1, 4), torch.rand(2, 3, 8), "must have 1 channels, got 3"),
        (SignalPatches(8, 2, 1, 4), torch.rand(2, 1, 10), "a multiple of 2 steps up to 8, got 10"),
        (SignalPatches(8, 2, 1, 4), torch.rand(2, 1, 5), "a multiple of 2 steps up to 8, got 5"),
        (TableColumns(2, [3], 4), torch.rand(2, 2), "rows must have 3 columns, got 2"),
        (Words(10, 4, 5), torch.ones(2, 6, dtype=torch.long), "at most 5 ids, got 6"),
    ],
)
def test_refuses_inputs_of_another_shape(tokenizer, inputs, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(inputs)
