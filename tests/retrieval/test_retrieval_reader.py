"""A network that looks documents up: which it reads, what apart means, and what a search leaves as it was."""

import pytest
import torch
from torch import nn

from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.nn import DualEncoder, TokenEncoder, Words
from coloss.retrieval import (
    DenseRetriever,
    LateInteractionRetriever,
    MeanReader,
    RetrievalReader,
    TokenTower,
    with_candidates,
)


def new_model(**options) -> RetrievalReader:
    torch.manual_seed(0)
    facts = torch.randn(30, 4)
    options = {"n_candidates": 8, "n_used": 3, **options}
    dropped = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
    return RetrievalReader(
        DenseRetriever(DualEncoder(dropped, dropped)), MeanReader(4, 4, 3), facts, **options
    )


def test_searching_is_reading_the_candidates_that_are_found():
    model = new_model().eval()
    queries = torch.randn(5, 4)
    candidates = model.search(queries)
    assert candidates.shape == (5, 8)
    torch.testing.assert_close(model(queries), model((queries, candidates)))
    # Only the three best count, in any order of the candidates.
    torch.testing.assert_close(model(queries), model((queries, candidates[:, :3].flip(1))))


def test_apart_is_the_mixture_of_single_readings():
    model = new_model(reading="apart", temperature=0.5).eval()
    queries = torch.randn(5, 4)
    candidates = model.search(queries)[:, :3]
    scores = model.retriever(queries, model.documents[candidates])
    single = torch.stack(
        [model.reader(queries, model.documents[candidates[:, k : k + 1]]).softmax(1) for k in range(3)], 1
    )
    expected = ((scores / 0.5).softmax(1).unsqueeze(2) * single).sum(1)
    torch.testing.assert_close(model(queries).exp(), expected)
    torch.testing.assert_close(model(queries).exp().sum(1), torch.ones(5))


def test_with_one_document_both_readings_agree():
    together, apart = (new_model(n_used=1, reading=reading).eval() for reading in ("together", "apart"))
    queries = torch.randn(5, 4)
    torch.testing.assert_close(together(queries).log_softmax(1), apart(queries))


def test_contents_are_what_is_read():
    facts = torch.randn(30, 4)
    contents = torch.randn(30, 7)
    retriever = DenseRetriever(DualEncoder(nn.Identity(), nn.Identity()))
    model = RetrievalReader(retriever, MeanReader(4, 7, 3), facts, contents, n_used=2).eval()
    queries = torch.randn(5, 4)
    candidates = model.search(queries, 2)
    torch.testing.assert_close(model(queries), model.reader(queries, contents[candidates]))


def test_a_search_is_without_dropout_and_leaves_no_trace():
    model = new_model().train()
    queries, state = torch.randn(5, 4), torch.get_rng_state()
    assert torch.equal(model.search(queries), model.search(queries))
    assert all(part.training for part in model.modules()) and torch.equal(state, torch.get_rng_state())


def test_a_kept_index_is_searched_until_it_is_dropped():
    model = new_model().eval()
    queries = torch.randn(5, 4)
    before = model.search(queries)
    model.keep_index()
    with torch.no_grad():
        model.documents.neg_()
    assert torch.equal(model.search(queries), before)
    model.drop_index()
    assert not torch.equal(model.search(queries), before)


def test_the_collection_moves_but_is_not_saved():
    model = new_model()
    assert not any("documents" in name or "contents" in name for name in model.state_dict())
    assert model.double().documents.dtype == torch.float64


def test_a_query_that_stands_in_the_collection_does_not_find_itself_nor_its_copies():
    """The leak by which a question would hand over its own answer."""
    model = new_model()
    facts = model.documents
    facts[20] = facts[0]
    own = torch.arange(30)
    own[20] = 0
    data = with_candidates(model, IndexedDataset(facts, torch.arange(30) % 3), exclude=(own, own))
    candidates = data.inputs[1]
    assert not (own[candidates] == own[:, None]).any()
    again = with_candidates(model, data, 5, exclude=(own, own))
    assert torch.equal(again.inputs[1], candidates[:, :5]) and torch.equal(again.ids, data.ids)


def test_bad_input_is_refused(as_users_call):
    for options, message in (
        ({"n_used": 0}, "n_used must be >= 1, got 0"),
        ({"n_used": 31}, "n_used must be at most the number of documents 30, got 31"),
        ({"n_candidates": 2}, "n_candidates must be >= n_used 3, got 2"),
        ({"reading": "aloud"}, 'reading must be "together" or "apart", got \'aloud\''),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"contents": torch.zeros(3, 2)}, "contents must hold 30 documents, got 3"),
    ):
        with pytest.raises(InputError, match=message):
            new_model(**options)
    model = new_model()
    queries = torch.randn(2, 4)
    with pytest.raises(InputError, match="candidates must be at least n_used 3 for each query, got 2"):
        model((queries, torch.zeros(2, 2, dtype=torch.int64)))


def late_model() -> RetrievalReader:
    tower = TokenTower(TokenEncoder(Words(50, 8, max_length=4), 8, 1, 2, pool="none"), dim=4)
    words = torch.randint(1, 50, (30, 4))
    return RetrievalReader(
        LateInteractionRetriever(tower, tower), nn.Identity(), words, n_candidates=8, n_used=3
    )


@pytest.mark.parametrize("build", [new_model, late_model])
def test_searches_for_more_than_can_be_found_are_refused(build):
    model = build()
    queries, ids = model.documents[:2], torch.arange(30).clamp(max=9)
    for k, own, fewest in ((0, [50, 0], 29), (10, [0, 9], 9), (-1, [50, 60], 30)):
        with pytest.raises(InputError, match=rf"k .* must be in \[1, {fewest}\], .* got {k}"):
            model.search(queries, k, (torch.tensor(own), ids))
    assert model.search(queries, 9, (torch.tensor([9, 50]), ids)).shape == (2, 9)
    with pytest.raises(
        InputError, match=r"k \(n_candidates unless it is given\) must be in \[1, 0\], .* got 8"
    ):
        model.search(queries, exclude=(torch.zeros(2), torch.zeros(30)))
    assert model.search(queries, 100).shape == (2, 30)


def test_readings_in_half_precision_are_mixed_in_full():
    """Fractions of bfloat16 would be off by some 1e-3 each."""
    model = new_model(reading="apart").eval()

    class Half(nn.Module):
        def forward(self, queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.bfloat16).expand(len(queries), -1)

    model.reader = Half()
    expected = torch.tensor([0.0, 1.0, 2.0]).log_softmax(0).expand(2, 3)
    torch.testing.assert_close(model(torch.randn(2, 4)), expected, atol=1e-6, rtol=0)


def test_a_kept_index_moves_with_the_module():
    model = new_model().eval()
    model.keep_index()
    before = model.search(model.documents)
    model.double()
    assert model.index[0].dtype == torch.float64
    assert torch.equal(model.search(model.documents), before)
    assert model.to("meta").index[0].device.type == "meta"
