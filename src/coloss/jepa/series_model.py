"""From raw series to features or logits: preparation, crops and network as one module that can be stored; and fine-tuning with few labels."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.jepa.masked_prediction import find_token_encoder
from coloss.jepa.series_preparation import SeriesPreparation
from coloss.metrics import crop_average, predict
from coloss.nn import Classifier, SignalPatches, TokenEncoder
from coloss.train.budget import Budget
from coloss.train.loop import fit
from coloss.train.method import Method
from coloss.train.schedules import cosine
from coloss.train.state import State


class SeriesCrops(Method):
    """Each sample of a batch cut to a window of its own, anew at every step; for series that are longer than a network takes.

    Put it before the methods that should see the windows.

    Args:
        size: steps of a window, >= 1. Series of that length stay as they are.

    Raises:
        InputError: for a size below 1, or, in a run, above the length of the series.

    Examples:
        >>> import coloss
        >>> from coloss.nn import token_encoder_for_shape
        >>> encoder = token_encoder_for_shape((1, 40), dim=8, depth=1, heads=2)
        >>> series, targets = torch.rand(16, 1, 100), torch.arange(16) % 2
        >>> run = coloss.fit(
        ...     Classifier(encoder, 2),
        ...     (series, targets),
        ...     F.cross_entropy,
        ...     [SeriesCrops(40)],
        ...     budget=Budget(epochs=1),
        ... )
        >>> run.steps
        1
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise InputError(f"size must be >= 1, got {size}")
        self.size = size

    def on_batch(self, state: State) -> None:
        series = state.batch.inputs
        steps = series.shape[-1]
        if steps < self.size:
            raise InputError(f"size must be at most the {steps} steps of the series, got {self.size}")
        if steps == self.size:
            return
        starts = torch.randint(steps - self.size + 1, (len(series), 1), generator=state.local_generator)
        places = (starts + torch.arange(self.size)).to(series.device)
        state.batch = replace(state.batch, inputs=series.take_along_dim(places[:, None], dim=2))


class SeriesModel(nn.Module):
    """Raw series in, of any length and with gaps: prepares them, and averages what a network makes of crops of the length it learnt on.

    Args:
        preparation: a `SeriesPreparation` with the statistics of the training data.
        network: a `TokenEncoder` on signal patches, or a network that holds one, such as a `Classifier` around it.
        crop: steps of a crop, a multiple of the patch; crops lie half a crop apart.
        channels: their names in the order that the network knows, where they have names: `order_channels(series, names,
            model.channels)` brings series of another order to it.

    Returns:
        From `forward(series)`: the network's output, features or logits. Series shorter than a crop have crops of as many whole patches as
        fit them.

    Raises:
        ValueError: for series of other channels, or shorter than a patch.

    Source:
        Weimann, Conrad, 2024, arXiv 2410.13867 (test on overlapping crops).

    Examples:
        >>> from coloss.nn import token_encoder_for_shape
        >>> encoder = token_encoder_for_shape((2, 40), dim=8, depth=1, heads=2, patch_size=5)
        >>> model = SeriesModel(SeriesPreparation(2), encoder, crop=40)
        >>> (
        ...     model(torch.rand(3, 2, 40)).shape,
        ...     model(torch.rand(3, 2, 97)).shape,
        ...     model(torch.rand(3, 2, 17)).shape,
        ... )
        (torch.Size([3, 8]), torch.Size([3, 8]), torch.Size([3, 8]))
    """

    def __init__(
        self,
        preparation: SeriesPreparation,
        network: nn.Module,
        crop: int,
        channels: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        patch = _patch_size(network)
        if crop < patch or crop % patch:
            raise ValueError(f"crop must be a multiple of the patch of {patch} steps, got {crop}")
        self.preparation, self.network, self.crop = preparation, network, crop
        self.channels = None if channels is None else tuple(channels)

    def forward(self, series: Float[Tensor, "batch channels steps"]) -> Float[Tensor, "batch outputs"]:
        size, stride = self._crops(series)
        return crop_average(self.network, self.preparation(series), size, stride)

    def tokens(self, series: Float[Tensor, "batch channels steps"]) -> Float[Tensor, "batch tokens dim"]:
        """What the token encoder makes of every crop, its registers in front of each, for `coloss.metrics.attentive_probe`.

        A rest at the end that does not fill a crop half a crop further is left out.

        Examples:
            >>> from coloss.nn import token_encoder_for_shape
            >>> encoder = token_encoder_for_shape((1, 40), dim=8, depth=1, heads=2, patch_size=5, registers=1)
            >>> SeriesModel(SeriesPreparation(1), encoder, crop=40).tokens(torch.rand(3, 1, 60)).shape
            torch.Size([3, 18, 8])
        """
        size, stride = self._crops(series)
        windows = self.preparation(series).unfold(2, size, stride).transpose(1, 2)
        encoded = find_token_encoder(self.network).encode(windows.flatten(0, 1), with_prefix=True)
        return encoded.unflatten(0, (len(series), -1)).flatten(1, 2)

    def _crops(self, series: Tensor) -> tuple[int, int]:
        """Size and stride: whole patches, no more than the series has."""
        patch = _patch_size(self.network)
        size = min(self.crop, series.shape[-1] // patch * patch)
        if size == 0:
            raise ValueError(
                f"series must have at least the {patch} steps of a patch, got {series.shape[-1]}"
            )
        return size, max(size // 2, 1)


def fine_tune_series(
    model: SeriesModel,
    series: Float[Tensor, "samples channels steps"],
    targets: Int[Tensor, " samples"],
    *,
    classes: int | None = None,
    budget: Budget | None = None,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
) -> SeriesModel:
    """A classifier of raw series, from a pretrained encoder and a few labels; the encoder that is given stays as it was.

    A linear layer on the mean over tokens is trained together with a copy of the encoder, on random crops, by AdamW without weight
    decay and a cosine learning rate. From an untrained encoder it is plain supervised training.

    Args:
        model: a `SeriesModel` around a `TokenEncoder`.
        series: raw.
        targets: class numbers from 0.
        classes: number of classes, more than the largest target; None for what targets hold.
        budget: None for 150 steps.
        learning_rate: at the start, > 0.
        batch_size: series in a step.
        seed: of the linear layer, crops and order.

    Returns:
        Raw series to logits, in evaluation mode, on the device of `model`.

    Raises:
        ValueError: for a model around something else, a learning rate out of range, or targets that are not below `classes`.

    Source:
        Weimann, Conrad, 2024, arXiv 2410.13867, direct fine-tuning; there with a register in place of the mean.

    Examples:
        >>> from coloss.nn import token_encoder_for_shape
        >>> encoder = token_encoder_for_shape((1, 20), dim=8, depth=1, heads=2)
        >>> pretrained = SeriesModel(SeriesPreparation(1), encoder, crop=20)
        >>> classifier = fine_tune_series(
        ...     pretrained, torch.randn(12, 1, 20), torch.arange(12) % 3, budget=Budget(steps=2)
        ... )
        >>> classifier(torch.randn(5, 1, 20)).shape
        torch.Size([5, 3])
    """
    if not isinstance(model.network, TokenEncoder):
        raise ValueError(
            f"model must be around a TokenEncoder, got one around {type(model.network).__name__}"
        )
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be > 0, got {learning_rate}")
    largest = int(targets.max())
    if classes is not None and classes <= largest:
        raise ValueError(f"classes must be > the largest target {largest}, got {classes}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Classifier(copy.deepcopy(model.network), largest + 1 if classes is None else classes)
    prepared, _ = predict(model.preparation, series)
    size, _ = model._crops(series)
    device = next(model.network.parameters()).device
    run = fit(
        network,
        IndexedDataset(prepared, targets),
        F.cross_entropy,
        [SeriesCrops(size)],
        budget=budget or Budget(steps=150),
        batch_size=min(batch_size, len(series)),
        optimizer=partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.0),
        learning_rate_schedule=cosine(warmup=0.1),
        seed=seed,
    )
    tuned = SeriesModel(copy.deepcopy(model.preparation), run.model, model.crop, model.channels)
    return tuned.to(device).eval()


def _patch_size(network: nn.Module) -> int:
    tokenizer = find_token_encoder(network).tokenizer
    if not isinstance(tokenizer, SignalPatches):
        raise ValueError(f"network must read signal patches, got {type(tokenizer).__name__}")
    return tokenizer.patch_size
