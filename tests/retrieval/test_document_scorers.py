"""Scores of documents: MaxSim by hand, padding, and searches that find exactly the best of the whole collection."""

import pytest
import torch
from torch import Tensor, nn

from coloss.nn import DualEncoder, TokenEncoder, Words
from coloss.retrieval import DenseRetriever, LateInteractionRetriever, TokenTower, late_interaction_scores


def by_loops(queries: Tensor, documents: Tensor, query_padding: Tensor, document_padding: Tensor) -> Tensor:
    found = torch.zeros(documents.shape[:2], dtype=queries.dtype)
    for b in range(documents.shape[0]):
        for k in range(documents.shape[1]):
            kept = documents[b, k][~document_padding[b, k]]
            for token in queries[b][~query_padding[b]]:
                found[b, k] += max((float(token @ other) for other in kept), default=0.0)
    return found


def test_maxsim_token_by_token():
    queries, documents = torch.randn(3, 5, 4).double(), torch.randn(3, 6, 7, 4).double()
    query_padding, document_padding = torch.rand(3, 5) < 0.3, torch.rand(3, 6, 7) < 0.4
    document_padding[0, 0] = True  # nothing in it
    found = late_interaction_scores(queries, documents, query_padding, document_padding)
    torch.testing.assert_close(found, by_loops(queries, documents, query_padding, document_padding))
    assert found[0, 0] == 0.0
    none = torch.zeros(3, 5, dtype=torch.bool), torch.zeros(3, 6, 7, dtype=torch.bool)
    torch.testing.assert_close(
        late_interaction_scores(queries, documents), by_loops(queries, documents, *none)
    )


def test_padding_never_wins_though_all_real_tokens_are_opposed():
    """Padding of zeros would give 0, more than the -3 of the one real token."""
    query = torch.tensor([[[1.0]]])
    documents = torch.tensor([[[[-3.0], [0.0]]]])
    padding = torch.tensor([[[False, True]]])
    assert late_interaction_scores(query, documents, None, padding).item() == -3.0


def test_maxsim_gradients_are_exact_and_padding_gets_none():
    queries = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    documents = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    padding = torch.rand(2, 3, 4) < 0.4
    padding[0, 1] = True
    assert torch.autograd.gradcheck(
        lambda q, d: late_interaction_scores(q, d, None, padding), (queries, documents)
    )
    slopes = torch.autograd.grad(late_interaction_scores(queries, documents, None, padding).sum(), documents)[
        0
    ]
    assert not slopes[padding].any() and slopes.isfinite().all()


def test_shared_candidates_half_precision_and_no_tokens():
    queries, documents = torch.randn(3, 5, 4), torch.randn(1, 6, 7, 4)
    torch.testing.assert_close(
        late_interaction_scores(queries, documents),
        late_interaction_scores(queries, documents.expand(3, -1, -1, -1)),
    )
    half = late_interaction_scores(queries.bfloat16(), documents.bfloat16())
    assert half.dtype == torch.float32
    assert late_interaction_scores(queries[:, :0], documents).tolist() == [[0.0] * 6] * 3
    assert late_interaction_scores(queries, documents[:, :, :0]).tolist() == [[0.0] * 6] * 3


def dense() -> tuple[nn.Module, Tensor, Tensor]:
    return (
        DenseRetriever(DualEncoder(nn.Linear(5, 4), nn.Linear(5, 4))),
        torch.randn(9, 5),
        torch.randn(700, 5),
    )


def late() -> tuple[nn.Module, Tensor, Tensor]:
    tower = TokenTower(TokenEncoder(Words(50, 8, max_length=6), 8, 1, 2, pool="none"), dim=4)
    words = torch.randint(1, 50, (709, 6)) * (torch.arange(6) < torch.randint(1, 7, (709, 1)))
    return LateInteractionRetriever(tower, tower).eval(), words[:9], words[9:]


@pytest.mark.parametrize("build", [dense, late])
def test_a_search_finds_the_best_of_all_documents(build):
    retriever, queries, documents = build()
    with torch.no_grad():
        scores = retriever(queries, documents.expand(9, *documents.shape))
    found = retriever.search(queries, retriever.encode_documents(documents), 10)
    torch.testing.assert_close(scores.gather(1, found), scores.topk(10).values)
    own = torch.arange(9)
    numbers = torch.arange(700) % 9  # 78 documents share each number
    left = retriever.search(queries, retriever.encode_documents(documents), 10, (own, numbers))
    assert not (numbers[left] == own[:, None]).any()
    kept = scores.masked_fill(numbers == own[:, None], -1e9)
    torch.testing.assert_close(scores.gather(1, left), kept.topk(10).values)


@pytest.mark.parametrize("build", [dense, late])
def test_many_queries_are_searched_for_in_parts(build, monkeypatch: pytest.MonkeyPatch):
    retriever, queries, documents = build()
    index, own, numbers = retriever.encode_documents(documents), torch.arange(9), torch.arange(700) % 9
    whole = retriever.search(queries, index, 10), retriever.search(queries, index, 10, (own, numbers))
    sizes = []
    tower = retriever.encoder.query_encoder if build is dense else retriever.query_tower
    tower.register_forward_hook(lambda module, inputs, outputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr("coloss.retrieval.document_scorers.ENCODED_AT_ONCE", 4)
    parts = retriever.search(queries, index, 10), retriever.search(queries, index, 10, (own, numbers))
    assert sizes == [4, 4, 1, 4, 4, 1]
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("build", [dense, late])
def test_no_queries_have_no_scores(build):
    retriever, queries, documents = build()
    assert retriever(queries[:0], documents[:0, None].expand(0, 3, *documents.shape[1:])).shape == (0, 3)
    assert retriever.search(queries[:0], retriever.encode_documents(documents), 10).shape == (0, 10)


def test_bad_input_is_refused(as_users_call):
    with pytest.raises(TypeError, match="encoder must have a method encode_query, got Linear"):
        DenseRetriever(nn.Linear(2, 2))
    queries, documents = torch.zeros(2, 3, 4), torch.zeros(2, 5, 6, 4)
    for bad in (torch.zeros(3, 5, 6, 4), torch.zeros(2, 5, 6, 3)):
        with pytest.raises(ValueError, match=r"documents must be \(batch, candidates, tokens, dim\)"):
            late_interaction_scores(queries, bad)
    with pytest.raises(ValueError, match=r"document_padding must have shape \(2, 5, 6\), got \(2, 5\)"):
        late_interaction_scores(queries, documents, None, torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"query_padding must have shape \(2, 3\), got \(2,\)"):
        late_interaction_scores(queries, documents, torch.zeros(2, dtype=torch.bool))
