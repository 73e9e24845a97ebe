"""Linear CKA: a plain twin, its invariances and limits."""

import numpy as np
import pytest
import torch

from coloss.metrics import linear_cka


def test_cka_against_a_plain_twin_and_its_limits():
    generator = torch.Generator().manual_seed(0)
    for rows, left, right in ((30, 4, 7), (6, 9, 20)):
        x, y = torch.randn(rows, left, generator=generator), torch.randn(rows, right, generator=generator)
        centred = [(part - part.mean(0)).double().numpy() for part in (x, y)]
        cross = np.linalg.norm(centred[0].T @ centred[1]) ** 2
        plain = cross / np.prod([np.linalg.norm(part.T @ part) for part in centred])
        assert linear_cka(x, y).item() == pytest.approx(plain, rel=1e-6)
        turn = torch.linalg.qr(torch.randn(left, left, generator=generator))[0]
        assert linear_cka(x, 1e-20 * (x @ turn) + 1e-19).item() == pytest.approx(1, abs=1e-4)
    assert linear_cka(x, torch.full((6, 3), 0.1)).isnan(), "features that do not vary"
    assert linear_cka(x[:1], y[:1]).isnan()
    assert linear_cka(x.bfloat16(), x.bfloat16()).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="same samples, got 6 and 5"):
        linear_cka(x, y[:5])
