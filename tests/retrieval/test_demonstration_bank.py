"""The search for examples: exact, and never the item itself nor a copy of it under another id."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.retrieval import DemonstrationBank, content_keys


def _case(seed=0, items=30, queries=7, dimensions=4):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(items, dimensions, generator=generator)
    return base, torch.randn(queries, dimensions, generator=generator), generator


@given(seed=st.integers(0, 10**6), k=st.integers(1, 12), by_id=st.booleans(), by_content=st.booleans())
@settings(max_examples=25, deadline=None)
def test_search_equals_sorting_all_that_may_be_shown(seed, k, by_id, by_content):
    base, queries, generator = _case(seed, items=10)
    ids = torch.randperm(100, generator=generator)[:10]
    content = torch.randint(4, (10,), generator=generator)
    asked, copied = torch.randint(100, (7,), generator=generator), torch.randint(5, (7,), generator=generator)
    asked[:3] = ids[:3]
    bank = DemonstrationBank(base, base, ids=ids, content=content, metric="inner")
    found = bank.search(
        queries, k, exclude_ids=asked if by_id else None, exclude_content=copied if by_content else None
    )
    assert found.scores.shape == found.positions.shape == (7, k)
    scores = queries.double() @ base.double().T
    for row in range(7):
        allowed = [
            place
            for place in range(10)
            if not (by_id and ids[place] == asked[row]) and not (by_content and content[place] == copied[row])
        ]
        best = sorted(allowed, key=lambda place: -scores[row, place].item())[:k]
        best += [-1] * (k - len(best))
        assert found.positions[row].tolist() == best
        expected = [scores[row, place].item() if place >= 0 else -math.inf for place in best]
        assert found.scores[row].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_item_itself_and_its_copies_are_out_of_reach():
    texts = ["Is my card lost?", "is  my card LOST?", "Why is it late?", "Where is it?"]
    base = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    leak = DemonstrationBank(base, (base, labels), content=content_keys(texts))
    query = base[:1]
    # By nothing: itself. By id: its copy, with the same answer. By both: neither.
    assert leak.search(query, 1).positions.tolist() == [[0]]
    assert leak.search(query, 1, exclude_ids=leak.ids[:1]).positions.tolist() == [[1]]
    found = leak.search(query, 4, exclude_ids=leak.ids[:1], exclude_content=leak.content[:1])
    assert found.positions.tolist() == [[2, 3, -1, -1]]
    assert 0 not in leak.take(found.positions)[1][found.positions >= 0]
    # An edited query still has its id, a copied one its content.
    edited = content_keys(["Is my card gone?"])
    assert leak.search(query, 1, exclude_ids=leak.ids[:1], exclude_content=edited).positions.tolist() == [[1]]


@pytest.mark.parametrize("random", [False, True])
def test_a_bank_of_copies_shows_nothing(random):
    base = torch.ones(5, 2)
    bank = DemonstrationBank(base, torch.arange(5), content=torch.zeros(5, dtype=torch.int64))
    twin = torch.zeros(3, dtype=torch.int64)
    found = (
        bank.draw(3, 4, exclude_content=twin)
        if random
        else bank.search(base[:3], 4, exclude_ids=bank.ids[:3], exclude_content=twin)
    )
    assert (found.positions == -1).all() and (found.scores == -math.inf).all()
    assert (bank.take(found.positions) == 0).all()


def test_random_examples_are_distinct_allowed_and_evenly_drawn():
    bank = DemonstrationBank(torch.eye(6), torch.arange(6), content=torch.tensor([0, 0, 1, 2, 3, 4]))
    found = bank.draw(
        3000,
        2,
        exclude_ids=torch.full((3000,), 5),
        exclude_content=torch.zeros(3000, dtype=torch.int64),
        generator=torch.Generator().manual_seed(0),
    ).positions
    assert (found[:, 0] != found[:, 1]).all()
    shares = found.flatten().bincount(minlength=6) / found.numel()
    torch.testing.assert_close(shares, torch.tensor([0, 0, 1, 1, 1, 0]) / 3, atol=0.03, rtol=0)
    again = bank.draw(4, 9, generator=torch.Generator().manual_seed(1)).positions
    assert torch.equal(again, bank.draw(4, 9, generator=torch.Generator().manual_seed(1)).positions)
    assert (again[:, 6:] == -1).all() and (again[:, :6].sort(1).values == torch.arange(6)).all()


def test_ties_go_to_the_first_and_an_empty_bank_is_empty():
    bank = DemonstrationBank(torch.ones(4, 2), torch.arange(4), content=torch.arange(4))
    assert bank.search(torch.ones(1, 2), 3).positions.tolist() == [[0, 1, 2]]
    empty = DemonstrationBank(torch.zeros(0, 2), (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)))
    found = empty.search(torch.ones(2, 2), 3)
    assert (found.positions == -1).all()
    assert empty.take(found.positions)[0].shape == (2, 3, 3)
    assert (empty.draw(2, 3).positions == -1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_float32(dtype):
    base, queries, _ = _case()
    bank = DemonstrationBank(base.to(dtype), base)
    found = bank.search(queries.to(dtype), 3)
    assert found.scores.dtype == torch.float32
    wide = DemonstrationBank(base.to(dtype).float(), base).search(queries.to(dtype).float(), 3)
    assert torch.equal(found.positions, wide.positions)


def test_euclidean_scores_fall_with_distance():
    bank = DemonstrationBank(torch.tensor([[0.0], [3.0]]), torch.arange(2), metric="euclidean")
    found = bank.search(torch.tensor([[2.0]]), 2)
    assert found.positions.tolist() == [[1, 0]] and found.scores.tolist() == [[-1.0, -2.0]]


def test_bank_is_saved_and_moved_with_a_model():
    base, queries, _ = _case()
    bank = DemonstrationBank(base, (base, torch.arange(30)), ids=torch.arange(100, 130))
    other = DemonstrationBank(torch.zeros(30, 4), (torch.zeros(30, 4), torch.zeros(30, dtype=torch.int64)))
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.search(queries, 3).positions, bank.search(queries, 3).positions)
    assert torch.equal(other.payload[1], torch.arange(30)) and torch.equal(other.ids, bank.ids)
    assert not list(bank.parameters())


def test_embeddings_keep_no_graph():
    base = torch.randn(3, 2, requires_grad=True)
    bank = DemonstrationBank(base, base)
    assert not bank.embeddings.requires_grad and not bank.payload.requires_grad


def test_content_keys_know_equal_contents():
    keys = content_keys(["A  b", "a B ", "a c", "\uff41 b"])
    assert keys[0] == keys[1] == keys[3] != keys[2]
    rows = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0]])
    numbers = content_keys(rows)
    assert numbers[0] == numbers[1] != numbers[2]
    assert torch.equal(content_keys(rows.view(3, 1, 2)), numbers)
    assert content_keys([]).shape == (0,)
    assert content_keys(rows.bfloat16())[0] == content_keys(rows.bfloat16())[1]
    # Fixed for all machines: stored keys stay valid.
    assert content_keys(["coloss"]).item() == int.from_bytes(
        __import__("hashlib").blake2b(b"coloss", digest_size=8).digest(), "little", signed=True
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"payload": torch.zeros(2)}, "payload must have a row for each of the 3 embeddings, got 2"),
        ({"payload": ["a"]}, "payload must have a row for each of the 3 embeddings, got 1"),
        ({"metric": "dot"}, 'metric must be "cosine", "inner" or "euclidean", got \'dot\''),
        ({"embeddings": torch.full((3, 2), math.nan)}, "embeddings must be finite"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "ids must be distinct, got 2 repeats"),
        ({"ids": torch.arange(2)}, r"ids must have shape \(3,\), got \(2,\)"),
        ({"content": torch.arange(4)}, r"content must have shape \(3,\), got \(4,\)"),
    ],
)
def test_bad_banks(options, message):
    given_options = {"embeddings": torch.zeros(3, 2), "payload": torch.zeros(3, 1)} | options
    bank = DemonstrationBank.__new__(DemonstrationBank)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(DemonstrationBank.__init__)(bank, **given_options)


def test_bad_searches():
    bank = DemonstrationBank(torch.zeros(3, 2), torch.zeros(3))
    search, draw = inspect.unwrap(DemonstrationBank.search), inspect.unwrap(DemonstrationBank.draw)
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        search(bank, torch.zeros(1, 2), 0)
    with pytest.raises(ValueError, match=r"exclude_ids must have shape \(1,\), got \(2,\)"):
        search(bank, torch.zeros(1, 2), 1, exclude_ids=torch.arange(2))
    with pytest.raises(ValueError, match=r"exclude_content must have shape \(4,\), got \(2,\)"):
        draw(bank, 4, 1, exclude_content=torch.arange(2))
