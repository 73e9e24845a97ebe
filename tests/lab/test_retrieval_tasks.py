"""Retrieval tasks by name and by folder: what they load, how they are judged, and what they refuse."""

import json

import pytest
import torch
from contract import run_processes

from coloss import Budget, Comparison
from coloss.errors import InputError
from coloss.lab import find_task
from coloss.lab.retrieval_tasks import contrastive_loss, shared_projection, two_towers
from coloss.metrics import evaluate_dual_encoder, retrieval_metrics_from_embeddings
from coloss.nn import DualEncoder
from coloss.ops import info_nce_loss

WORDS = ["fox", "hen", "cow", "dog", "cat", "owl", "bee", "ant", "elk", "eel", "emu", "yak"]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "animals"
    (path / "qrels").mkdir(parents=True)
    texts = {"corpus": "all about the {}", "queries": "where is a {}"}
    for name, text in texts.items():
        rows = [{"_id": str(i), "text": text.format(word)} for i, word in enumerate(WORDS)]
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for part, rows in (("train", range(8)), ("test", range(8, 12))):
        lines = [f"{i}\t{i}\t2\n{i}\t{(i + 1) % 12}\t1" for i in rows]
        (path / "qrels" / f"{part}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]))
    return path


def test_a_folder_of_ones_own_is_a_task(folder, tmp_path):
    task = find_task(str(folder))
    assert (task.kind, task.title, task.metric) == ("retrieval", "retrieval on animals", "mrr")
    comparison = Comparison(str(folder), ["info-nce", "mw-loss"], seeds=1, budget=Budget(steps=3))
    result = comparison.run(tmp_path / "run")
    assert not result.failures
    wanted = {"recall@10", "ndcg@10", "mrr", "map", "r_precision", "pooled_auc"}
    assert wanted <= set(result.trials[0].metrics) and result.trials[0].metrics["queries"] == 4
    assert result.record.options["data"]
    splits = task.load(0)
    assert task.load(0) is splits and len(splits.test_queries) == 4


def test_options_that_do_not_fit_are_refused(folder):
    for name in (str(folder), "banking77-retrieval", "cranfield"):
        for options in ({"target": "text"}, {"kind": "classification"}, {"label_noise": 0.2}):
            with pytest.raises(
                InputError, match="holds queries and documents: leave target, kind, label noise"
            ):
                find_task(name, **options)
    (folder / "queries.jsonl").unlink()
    with pytest.raises(InputError, match="animals has no file of queries: queries.jsonl"):
        find_task(str(folder))


def test_titles_say_what_there_is_to_find(needs):
    needs("banking77")
    title = find_task("banking77-retrieval", limit=20).title
    assert title == "retrieval on banking77: find the intent that a question asks for"


def test_the_model_begins_near_the_text_vectors(needs):
    needs("cranfield")
    splits = find_task("cranfield", limit=40).load(0)
    torch.manual_seed(0)
    untrained = evaluate_dual_encoder(shared_projection(splits), splits)
    judged = splits.test_judgements
    plain = retrieval_metrics_from_embeddings(splits.test_queries, splits.documents, judged.pairs)
    apart = evaluate_dual_encoder(two_towers(splits), splits)
    assert untrained["mrr"] > 0.6 * plain["mrr"] and apart["mrr"] < 0.3 * plain["mrr"]
    model = shared_projection(splits)
    assert isinstance(model, DualEncoder) and model.query_encoder is model.document_encoder


def test_info_nce_takes_no_answer_for_a_negative():
    torch.manual_seed(0)
    queries, documents = torch.randn(4, 6), torch.randn(4, 6)
    query, document = torch.tensor([0, 0, 1, 2]), torch.tensor([5, 6, 7, 7])
    found = contrastive_loss((queries, documents), (query, document))
    # Rows 0 and 1 share the query, rows 2 and 3 the document: each is left out for the other.
    ignore = torch.zeros(4, 4, dtype=torch.bool)
    ignore[0, 1] = ignore[1, 0] = ignore[2, 3] = ignore[3, 2] = True
    scores = (queries @ documents.T / 0.05).masked_fill(ignore, -torch.inf)
    own = torch.arange(4)
    expected = (
        torch.nn.functional.cross_entropy(scores, own) + torch.nn.functional.cross_entropy(scores.T, own)
    ) / 2
    torch.testing.assert_close(found, expected)
    everything = contrastive_loss((queries, documents))
    torch.testing.assert_close(everything, info_nce_loss(queries, documents, 0.05, symmetric=True))
    assert not torch.allclose(everything, found)


def test_ids_find_answers_and_negatives_of_all_processes(tmp_path):
    """Each process has the loss of the joined batch, and its rows' gradients, which averaging divides by the processes."""
    generator = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(2, 6, 8, generator=generator, dtype=torch.float64)
    ids = torch.tensor([0, 0, 1, 2, 1, 3]), torch.tensor([5, 6, 7, 7, 8, 5])

    def work(fabric):
        mine = slice(fabric.global_rank, None, fabric.world_size)
        rows = [part[mine].clone().requires_grad_() for part in (queries, documents)]
        loss = contrastive_loss(tuple(rows), tuple(part[mine] for part in ids))
        loss.backward()
        return {
            "loss": loss.detach(),
            **{f"{i}": row.grad / fabric.world_size for i, row in enumerate(rows)},
        }

    (alone,) = run_processes(work, tmp_path, 1)
    for rank, found in enumerate(run_processes(work, tmp_path, 2)):
        torch.testing.assert_close(found["loss"], alone["loss"])
        for side in ("0", "1"):
            torch.testing.assert_close(found[side], alone[side][rank::2])
