"""Sound as a picture of energy over frequency and time."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def mel_filters(bands: int, bins: int, rate: float) -> Float[Tensor, "bands bins"]:
    """Triangular filters, evenly spaced on the mel scale from 0 to half the sampling rate.

    mel(f) = 2595 log10(1 + f / 700). Filter b rises from the centre of filter b - 1 to its own and falls to the next; heights are 1.

    Args:
        bands: number of filters, >= 1.
        bins: number of frequencies of the spectrum, from 0 to rate / 2, >= 2.
        rate: samples per second, > 0.

    Source: Stevens, Volkmann, Newman, A scale for the measurement of the psychological magnitude pitch, 1937 (formula of O'Shaughnessy, 1987).

    Examples:
        >>> mel_filters(bands=4, bins=65, rate=8000.0).shape
        torch.Size([4, 65])
    """
    if bands < 1 or bins < 2 or rate <= 0:
        raise ValueError(f"bands must be >= 1, bins >= 2 and rate > 0, got {bands}, {bins}, {rate}")
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, bins, dtype=torch.float64)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequencies - left) / (centre - left), (right - frequencies) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0).float()


def log_mel_spectrogram(
    waveforms: Float[Tensor, "batch samples"],
    rate: float,
    *,
    bands: int = 40,
    window: int = 256,
    hop: int = 128,
) -> Float[Tensor, "batch 1 bands frames"]:
    """Logarithm of the energy in each mel band and short window of time.

    S = 10 log10(max(M |STFT(x)|^2, 1e-10)) decibels, with a Hann window and M from `mel_filters`; 80 dB below the loudest point of
    a recording is the floor.

    Args:
        waveforms: (batch, samples), in [-1, 1].
        rate: samples per second, > 0.
        bands: mel bands, >= 1.
        window: samples in a window, >= 2.
        hop: samples from one window to the next, >= 1.

    Returns:
        (batch, 1, bands, 1 + samples // hop), decibels.

    Examples:
        >>> tone = torch.sin(2 * torch.pi * 1000 * torch.arange(8000) / 8000)
        >>> spectrogram = log_mel_spectrogram(tone[None], rate=8000.0)
        >>> spectrogram.shape
        torch.Size([1, 1, 40, 63])
        >>> int(spectrogram[0, 0, :, 30].argmax())  # the band around 1,000 Hz of 40 up to 4,000 Hz
        18
    """
    if window < 2 or hop < 1:
        raise ValueError(f"window must be >= 2 and hop >= 1, got {window} and {hop}")
    hann = torch.hann_window(window, device=waveforms.device, dtype=waveforms.dtype)
    spectrum = torch.stft(waveforms, window, hop, window=hann, return_complex=True, pad_mode="constant")
    filters = mel_filters(bands, window // 2 + 1, rate).to(spectrum.real)
    energy = filters @ (spectrum.real.square() + spectrum.imag.square())
    decibels = 10 * energy.clamp(min=1e-10).log10()
    return torch.maximum(decibels, decibels.amax(dim=(1, 2), keepdim=True) - 80).unsqueeze(1)
