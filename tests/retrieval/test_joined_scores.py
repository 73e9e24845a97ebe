import pytest
import torch

from coloss.data import Batch
from coloss.errors import InputError
from coloss.retrieval import joined_scores


def relevance(extras, queries=3, documents=4):
    outputs = torch.randn(queries, 2), torch.randn(documents, 2)
    return joined_scores(outputs, Batch(None, extras=extras)).relevance.int().tolist()


def test_the_diagonal_answers_if_the_batch_says_nothing():
    assert relevance({}) == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]


def test_a_copy_of_the_own_document_answers_too():
    assert relevance({"document": torch.tensor([7, 8, 9, 8])}) == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]]


def test_documents_of_the_same_query_answer_each_other():
    assert relevance({"query": torch.tensor([0, 5, 0])}) == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0]]


def test_further_documents_belong_to_no_query_even_to_one_numbered_zero():
    assert [row[3] for row in relevance({"query": torch.tensor([0, 1, 2])})] == [0, 0, 0]


def test_both_kinds_of_ids_count_together():
    extras = {"document": torch.tensor([7, 8, 9, 8]), "query": torch.tensor([3, 4, 3])}
    assert relevance(extras) == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]]


def test_a_given_relevance_replaces_ids_and_a_mask_leaves_pairs_out():
    given = torch.tensor([[0.0, 2.0], [1.0, -1.0]])
    ignore = torch.tensor([[1, 0], [0, 0]])
    extras = {"relevance": given, "document": torch.tensor([1, 1]), "ignore": ignore}
    found = joined_scores((torch.eye(2), torch.eye(2)), Batch(None, extras=extras))
    assert found.relevance.tolist() == [[False, True], [True, False]]
    assert found.ignore.tolist() == [[True, False], [False, False]]


def test_scores_are_products_in_full_precision():
    queries, documents = torch.randn(3, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = joined_scores((queries, documents), Batch(None)).scores
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, queries.float() @ documents.float().T)


@pytest.mark.parametrize(
    "outputs, extras, message",
    [
        (torch.zeros(2, 3), {}, r"must return \(query embeddings, document embeddings\), got Tensor"),
        ((torch.zeros(2, 3), None), {}, "must return"),
        ((torch.zeros(3, 2), torch.zeros(2, 2)), {}, "a document for each query, got 2 for 3"),
        (
            (torch.zeros(2, 2),) * 2,
            {"document": torch.arange(3)},
            r"'document'\] must have shape \(2,\), got \(3,\)",
        ),
        (
            (torch.zeros(2, 2),) * 2,
            {"document": torch.ones(2)},
            r"'document'\] must hold whole numbers, got torch.float32",
        ),
        ((torch.zeros(2, 2),) * 2, {"query": [0, 1]}, r"'query'\] must have shape \(2,\), got list"),
        ((torch.zeros(2, 2),) * 2, {"relevance": torch.eye(3)}, r"'relevance'\] must have shape \(2, 2\)"),
        ((torch.zeros(2, 2),) * 2, {"ignore": torch.eye(3)}, r"'ignore'\] must have shape \(2, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(outputs, extras, message):
    with pytest.raises(InputError, match=message):
        joined_scores(outputs, Batch(None, extras=extras))
