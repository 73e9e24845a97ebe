"""Brings series of any origin to what an encoder learns from: gaps filled, drift removed, channels in one order and on one scale.

Weimann, Conrad, 2024, arXiv 2410.13867, preprocessing of electrocardiograms. With raw x of channel c, and mean and standard deviation
over all samples and steps of the training part:

    x   <- straight lines over missing steps;  optionally  <- high-pass filter
    out  = clip( (x - mean_c) / std_c, -5, 5 )

All in float32 or wider: a recording stored in half precision may have a deviation too small, or a sum too large, for its own type.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.ops import full_precision


def fill_gaps(series: Float[Tensor, "*samples steps"], empty: float = 0.0) -> Float[Tensor, "*samples steps"]:
    """Missing steps filled along straight lines between their neighbours in time; before the first and after the last, held.

        x[t] = x[a] + (t - a) / (b - a) * (x[b] - x[a])        a, b: nearest steps before and after t that are there

    Args:
        series: NaN or infinite where missing.
        empty: for a series without any value.

    Returns:
        The same shape, at least float32; finite, if `empty` is. Where nothing is missing the values are unchanged.

    Cost:
        O(values), without a loop over series.

    Examples:
        >>> nan = float("nan")
        >>> fill_gaps(torch.tensor([[nan, 1.0, nan, nan, 4.0, nan]]))
        tensor([[1., 1., 2., 3., 4., 4.]])
    """
    values = full_precision(series)
    steps = values.shape[-1]
    there = values.isfinite()
    if bool(there.all()):
        return values
    time = torch.arange(steps, device=values.device).expand_as(values)
    before = torch.where(there, time, -1).cummax(-1).values
    after = torch.where(there, time, steps).flip(-1).cummin(-1).values.flip(-1)
    first, last = torch.where(before < 0, after, before), torch.where(after == steps, before, after)
    known = values.masked_fill(~there, 0)
    lower, upper = (known.gather(-1, index.clamp(0, steps - 1)) for index in (first, last))
    share = (time - first).to(values.dtype) / (last - first).clamp(min=1)
    filled = torch.where(there, values, lower * (1 - share) + upper * share)
    return filled.masked_fill(~there.any(-1, keepdim=True), empty)


def remove_drift(
    series: Float[Tensor, "*samples steps"], cutoff: float, order: int = 4
) -> Float[Tensor, "*samples steps"]:
    """What is left of series without their slow part: a Butterworth high-pass filter, run forward and backward, so nothing is delayed.

    Some records wander by more than their signal (breathing, electrodes); encoders trained on such data may diverge.

    Args:
        series: without gaps (`fill_gaps`).
        cutoff: in cycles per step, in (0, 0.5): hertz divided by the sampling rate, 0.5 Hz at 500 Hz is 0.001.
        order: of the filter, >= 1.

    Returns:
        The same shape, at least float32.

    Raises:
        ValueError: for a value out of range.

    Source:
        Weimann, Conrad, 2024, arXiv 2410.13867 (fourth order, 0.5 Hz).

    Examples:
        >>> time = torch.arange(200.0)
        >>> signal = (time * 1.5).sin()
        >>> bool((remove_drift(signal + time, cutoff=0.02) - signal)[50:150].abs().max() < 0.1)
        True
    """
    if not 0 < cutoff < 0.5:
        raise ValueError(f"cutoff must be in (0, 0.5) cycles per step, got {cutoff}")
    if order < 1:
        raise ValueError(f"order must be >= 1, got {order}")
    from scipy.signal import butter, sosfiltfilt

    values = full_precision(series)
    sections = butter(order, 2 * cutoff, "highpass", output="sos")
    padding = min(3 * (2 * len(sections) + 1), values.shape[-1] - 1)
    found = sosfiltfilt(sections, values.detach().cpu().double().numpy(), axis=-1, padlen=padding)
    return torch.from_numpy(np.ascontiguousarray(found)).to(values)


def order_channels(
    series: Float[Tensor, "batch channels steps"], names: Sequence[str], wanted: Sequence[str]
) -> Float[Tensor, "batch wanted steps"]:
    """Channels in the order that an encoder knows them by, told by name; upper and lower case are one.

    Args:
        series: with channels in the order of `names`; further ones are left out.
        names: of its channels, such as "I", "II", "aVR".
        wanted: the order of the result.

    Raises:
        ValueError: if names do not fit the series, repeat, or one that is wanted is not there.

    Examples:
        >>> order_channels(torch.tensor([[[1.0], [2.0]]]), ["AVR", "I"], ["i", "aVR"]).flatten()
        tensor([2., 1.])
    """
    known = {name.lower(): place for place, name in enumerate(names)}
    if len(names) != series.shape[1] or len(known) != len(names):
        raise ValueError(
            f"names must be {series.shape[1]} different ones, one for each channel, got {', '.join(names) or 'none'}"
        )
    missing = [name for name in wanted if name.lower() not in known]
    if missing:
        raise ValueError(f"names must hold each wanted channel, got none for {', '.join(missing)}")
    return series[:, [known[name.lower()] for name in wanted]]


class SeriesPreparation(nn.Module):
    """Gaps filled, drift removed if asked for, each channel at mean 0 and deviation 1 of the training data, outliers cut off.

    A module, so that a stored encoder keeps the statistics that it learnt with.

    Args:
        channels: number of channels, >= 1.
        clip: largest absolute value of the result, > 0.
        high_pass: cutoff of `remove_drift` in cycles per step; None for no filter.

    Attributes:
        mean, std: (channels,), 0 and 1 until `measure`. The mean is float64, for series in double precision that lie far from zero.

    Returns:
        From `forward(series)`: float32, of the same shape and finite. A channel without any value becomes 0, its mean.

    Raises:
        ValueError: for a value out of range, or series of other channels.

    Examples:
        >>> series = torch.tensor([[[0.0, 2.0]], [[2.0, 4.0]]])
        >>> preparation = SeriesPreparation(1).measure(series)
        >>> preparation.mean.tolist(), preparation(torch.tensor([[[2.0, float("nan"), 200.0]]]))
        ([2.0], tensor([[[0., 5., 5.]]]))
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, *, clip: float = 5.0, high_pass: float | None = None) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be >= 1, got {channels}")
        if not clip > 0:
            raise ValueError(f"clip must be > 0, got {clip}")
        if high_pass is not None and not 0 < high_pass < 0.5:
            raise ValueError(f"high_pass must be in (0, 0.5) cycles per step, got {high_pass}")
        self.clip, self.high_pass = clip, high_pass
        self.register_buffer("mean", torch.zeros(channels, dtype=torch.float64))
        self.register_buffer("std", torch.ones(channels))

    @torch.no_grad()
    def measure(self, series: Float[Tensor, "batch channels steps"]) -> "SeriesPreparation":
        """Take mean and deviation of each channel from training data; a constant channel keeps its scale. Returns itself.

        Examples:
            >>> SeriesPreparation(1).measure(torch.tensor([[[3.0, 3.0]]])).std
            tensor([1.])
        """
        # Sums over many steps need more than float32, channel by channel to save memory.
        for number, channel in enumerate(self._filled(series).unbind(1)):
            values = channel[channel.isfinite()].double()
            if len(values) == 0:
                continue
            mean, deviation = values.mean(), values.std(correction=0)
            # The mean of equal values may miss them by a rounding, which is no deviation.
            constant = bool(deviation <= 1e-12 * mean.abs()) or float(deviation.float()) == 0
            self.mean[number] = mean
            self.std[number] = 1.0 if constant else deviation
        return self

    @torch.no_grad()
    def forward(self, series: Float[Tensor, "batch channels steps"]) -> Float[Tensor, "batch channels steps"]:
        values = self._filled(series)
        scaled = (values - self.mean.to(values.dtype)[:, None]) / self.std[:, None]
        return scaled.nan_to_num(0.0).clamp(-self.clip, self.clip).to(self.std.dtype)

    def _filled(self, series: Tensor) -> Tensor:
        if series.ndim != 3 or series.shape[1] != len(self.mean):
            raise ValueError(
                f"series must be (batch, {len(self.mean)} channels, steps), got shape {tuple(series.shape)}"
            )
        filled = fill_gaps(series, empty=float("nan"))
        return filled if self.high_pass is None else remove_drift(filled, self.high_pass)
