"""A language model that ships behind a cache of few bits."""

import pytest
import torch
from torch import nn

import coloss
from coloss.compression import CachedReader, QuantizedCache, cached_loss, compress_model, load_compressed
from coloss.nn import CausalLanguageModel, next_token_loss

IDS = torch.randint(9, (6, 33), generator=torch.Generator().manual_seed(1))
DATA = (IDS[:, :-1], IDS[:, 1:])
OPTIONS = {"bits": (16, 4, 2), "step": 8, "group": 8}


def model():
    return CausalLanguageModel(9, dim=32, depth=2, heads=2)


def reader(**options):
    torch.manual_seed(0)
    return CachedReader(model(), **(OPTIONS | options)).eval()


def test_training_is_that_of_the_plain_model_and_evaluation_that_of_the_cache():
    method = QuantizedCache(**OPTIONS)
    torch.manual_seed(0)
    shipped = coloss.fit(model(), DATA, next_token_loss, [method], budget=coloss.Budget(steps=2)).model.eval()
    torch.manual_seed(0)
    plain = coloss.fit(model(), DATA, next_token_loss, budget=coloss.Budget(steps=2)).model.eval()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), shipped.parameters(), strict=True))
    judged = cached_loss(plain, IDS, shipped.new_cache)
    assert next_token_loss(shipped(DATA[0]), DATA[1]).item() == pytest.approx(judged["loss"], rel=1e-5)
    found = method.report(shipped, DATA)
    assert (
        found["cache_bits"] == judged["cache_bits"] < 12 and 6 * found["cache_bytes"] == judged["cache_bytes"]
    )


def test_pieces_see_one_another_exactly():
    whole = reader(piece=32)
    torch.testing.assert_close(whole(DATA[0]), whole.model(DATA[0]))
    single = CachedReader(whole.model, **OPTIONS).eval()
    assert (single(DATA[0]) - whole(DATA[0])).abs().max() > 1e-4


def test_it_writes_through_its_cache():
    shipped, prompt = reader(bits=(16, 1)), IDS[:, :9]
    wanted = shipped.model.generate(prompt, 7, cache=shipped.new_cache())
    assert torch.equal(shipped.generate(prompt, 7), wanted)
    exact = reader(bits=(16,))
    assert torch.equal(exact.generate(prompt, 7), exact.model.generate(prompt, 7))
    first, again = (
        shipped.generate(prompt, 7, temperature=2.0, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(first, again)


@pytest.mark.parametrize("training", [True, False])
def test_padding_is_not_seen(training):
    shipped = reader(piece=5).train(training)
    valid = torch.arange(32).expand(6, 32) >= torch.tensor([[3]] + [[0]] * 5)
    other = DATA[0].clone()
    other[0, :3] = (other[0, :3] + 4) % 9
    found = [shipped(ids, valid)[valid] for ids in (DATA[0], other)]
    assert torch.equal(*found)
    exact = reader(bits=(16,), piece=5)
    torch.testing.assert_close(exact(DATA[0], valid)[valid], exact.model(DATA[0], valid)[valid])


def test_the_newest_are_kept_in_a_type():
    method = QuantizedCache(bits=(16, 4), step=8, group=8, kept=torch.float16)
    data = (IDS[:, :6], IDS[:, 1:7])  # less than a chunk
    assert method.report(CachedReader(model(), **method.options), data)["cache_bits"] == 16
    assert QuantizedCache(**OPTIONS).report(reader(), data)["cache_bits"] == 32


def test_the_report_is_that_of_evaluation():
    """Nothing that dropout leaves out is counted, and the model stays in its mode."""
    shipped = reader(bits=(16, 2))
    for part in shipped.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
    shipped.train()
    modes = []
    hook = shipped.model.register_forward_pre_hook(lambda part, _: modes.append(part.training))
    QuantizedCache(**OPTIONS).report(shipped, DATA)
    hook.remove()
    assert shipped.training and shipped.model.training and not any(modes)


def test_the_shipped_model_is_stored_and_loaded(tmp_path):
    shipped = CachedReader(model(), **OPTIONS).eval()
    path = compress_model(shipped).save(tmp_path / "reader.coloss")
    fresh = load_compressed(path).load_into(CachedReader(model(), **OPTIONS)).eval()
    assert torch.equal(fresh(DATA[0]), shipped(DATA[0]))


def test_bad_input_is_named():
    for lists in (1, 3):
        with pytest.raises(
            ValueError, match=f"bits must hold levels for the 2 layers of the model, got {lists} lists"
        ):
            reader(bits=[(16, 4)] * lists)
    with pytest.raises(ValueError, match="piece must be >= 1, got 0"):
        QuantizedCache(piece=0)
    with pytest.raises(ValueError, match="bits"):
        QuantizedCache(bits=(4, 16))
    with pytest.raises(ValueError, match="must be a CausalLanguageModel, which takes a cache, got Linear"):
        data = (torch.ones(4, 2), torch.ones(4, 2))
        coloss.fit(
            nn.Linear(2, 2), data, nn.functional.mse_loss, [QuantizedCache()], budget=coloss.Budget(steps=1)
        )
