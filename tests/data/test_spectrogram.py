import math

import numpy as np
import pytest
import torch

from coloss.data import log_mel_spectrogram, mel_filters


def test_neighbouring_filters_add_up_to_one_between_their_centres() -> None:
    total = mel_filters(bands=6, bins=501, rate=8000.0).sum(0)
    mel = [2595 * math.log10(1 + 4000 / 700) * edge / 7 for edge in range(8)]
    centres = [700 * (10 ** (value / 2595) - 1) for value in mel]
    frequencies = torch.linspace(0, 4000, 501)
    inside = (frequencies >= centres[1]) & (frequencies <= centres[6])
    assert torch.allclose(total[inside], torch.ones(()), atol=1e-5)


def test_energy_is_that_of_a_plain_fourier_transform() -> None:
    waveform = np.random.default_rng(0).normal(size=512).astype(np.float32)
    spectrogram = log_mel_spectrogram(torch.from_numpy(waveform)[None], 8000.0, bands=5, window=64, hop=32)
    frame = 7
    piece = waveform[frame * 32 - 32 : frame * 32 + 32] * np.hanning(65)[:64]
    energy = mel_filters(5, 33, 8000.0).double().numpy() @ np.abs(np.fft.rfft(piece)) ** 2
    assert np.allclose(spectrogram[0, 0, :, frame].numpy(), 10 * np.log10(energy), atol=1e-3)


def test_ten_times_the_amplitude_is_twenty_decibels() -> None:
    sound = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    difference = log_mel_spectrogram(10 * sound, 8000.0) - log_mel_spectrogram(sound, 8000.0)
    assert torch.allclose(difference, torch.full_like(difference, 20.0), atol=1e-2)


def test_silence_is_finite_and_flat() -> None:
    assert (log_mel_spectrogram(torch.zeros(1, 1000), 8000.0) == -100).all()


def test_range_is_eighty_decibels() -> None:
    sound = torch.zeros(1, 4000)
    sound[0, :500] = 1.0
    spectrogram = log_mel_spectrogram(sound, 8000.0)
    assert spectrogram.max() - spectrogram.min() == 80


@pytest.mark.parametrize("arguments", [{"bands": 0}, {"window": 1}, {"hop": 0}])
def test_refuses_bad_arguments(arguments: dict) -> None:
    with pytest.raises(ValueError, match=">="):
        log_mel_spectrogram(torch.zeros(1, 100), 8000.0, **arguments)
