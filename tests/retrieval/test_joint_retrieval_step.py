"""One step of retriever and reader: which loss reaches whom, what is scored in which mode, and what the marginal is."""

import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from coloss.nn import DualEncoder
from coloss.retrieval import (
    DenseRetriever,
    JointRetrievalStep,
    MeanReader,
    ReaderLoss,
    best_documents,
    reader_agreement,
    reader_ranked_loss,
)
from coloss.retrieval.marginal import marginal_nll


def new_parts(dropout: float = 0.0) -> tuple[DenseRetriever, ReaderLoss]:
    torch.manual_seed(1)
    tower = nn.Linear(6, 4)
    return DenseRetriever(DualEncoder(tower, tower)), ReaderLoss(
        MeanReader(6, 6, 3, hidden=(8,), dropout=dropout)
    )


def new_batch(candidates: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(5, 6, generator=generator),
        torch.randn(5, candidates, 6, generator=generator),
        torch.randint(3, (5,), generator=generator),
    )


def reached(loss: Tensor, module: nn.Module) -> bool:
    found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
    return any(gradient is not None and bool(gradient.any()) for gradient in found)


@pytest.mark.parametrize("kind", ["pairwise", "listwise"])
def test_each_loss_reaches_one_of_the_two(kind: str):
    """Unit check 2."""
    retriever, reader = new_parts()
    losses = JointRetrievalStep(retriever, reader, 6, 3, kind=kind)(*new_batch())
    assert reached(losses["rank_loss"], retriever) and not losses["rank_loss"].isnan()
    assert not reached(losses["rank_loss"], reader)
    assert reached(losses["reader_loss"], reader) and not reached(losses["reader_loss"], retriever)
    torch.testing.assert_close(losses["loss"], losses["reader_loss"] + losses["rank_loss"])


def test_the_marginal_reaches_both():
    retriever, reader = new_parts()
    losses = JointRetrievalStep(retriever, reader, 6, 3, kind="marginal")(*new_batch())
    assert reached(losses["loss"], retriever) and reached(losses["loss"], reader)
    assert losses["rank_loss"] == 0.0 and losses["loss"] == losses["reader_loss"]


def alone(reader: nn.Module, queries: Tensor, documents: Tensor, targets: Tensor) -> Tensor:
    """Losses (batch, documents) with each document alone, one by one."""
    return torch.stack(
        [reader(queries, documents[:, j : j + 1], targets) for j in range(documents.shape[1])], 1
    )


@pytest.mark.parametrize("kind", ["pairwise", "listwise", "marginal"])
def test_with_all_candidates_drawn_it_is_its_parts(kind: str):
    retriever, reader = new_parts()
    queries, documents, targets = new_batch(7)
    options = {"kind": kind, "temperature": 0.3, "weight": 2.0}
    found = JointRetrievalStep(retriever, reader, 7, 3, **options)(queries, documents, targets)
    scores, costs = retriever(queries, documents), alone(reader, queries, documents, targets)
    torch.testing.assert_close(found["agreement"], reader_agreement(scores, costs).mean())
    if kind == "marginal":
        torch.testing.assert_close(
            found["loss"], -torch.logsumexp((scores / 0.3).log_softmax(1) - costs, 1).mean()
        )
        return
    torch.testing.assert_close(
        found["rank_loss"], reader_ranked_loss(scores, costs, kind=kind, temperature=0.3)
    )
    rows = torch.arange(5)[:, None]
    together = reader(queries, documents[rows, best_documents(scores, 3)], targets).mean()
    torch.testing.assert_close(found["reader_loss"], together)
    torch.testing.assert_close(found["loss"], together + 2 * found["rank_loss"])


def test_the_reader_is_scored_in_evaluation_mode_and_trained_in_its_own():
    """Trap: dropout in the scoring pass puts noise into the order."""
    retriever, reader = new_parts(dropout=0.9)
    step = JointRetrievalStep(retriever, reader, 10, 3).train()
    first, second = step(*new_batch()), step(*new_batch())
    assert first["rank_loss"].item() == pytest.approx(second["rank_loss"].item(), rel=1e-5)
    assert first["agreement"] == second["agreement"]
    assert first["reader_loss"] != second["reader_loss"]
    assert all(module.training for module in reader.modules())
    reader.reader.network.eval()  # a part that is frozen stays so
    step(*new_batch())
    assert not any(module.training for module in reader.reader.network.modules()) and reader.training


def test_the_best_documents_are_read_last():
    seen = []

    def black_box(queries: Tensor, documents: Tensor, targets: Tensor) -> Tensor:
        seen.append(documents)
        return documents.sum((1, 2)) * weight

    weight = torch.ones((), requires_grad=True)
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.3]])
    documents = torch.arange(4.0).view(1, 4, 1)
    step = JointRetrievalStep(lambda queries, found: scores, black_box, 2, 3)
    step(torch.zeros(1, 1), documents, torch.zeros(1))
    assert seen[0].shape == (2, 1, 1)  # each alone
    assert seen[1].flatten().tolist() == [3.0, 2.0, 1.0]


def test_any_black_box_will_do_and_only_its_order_matters():
    retriever, _ = new_parts()
    queries, documents, targets = new_batch()
    gradients = []
    for scale in (1.0, 1e4):
        step = JointRetrievalStep(retriever, lambda q, d, t, s=scale: s * (d.sum((1, 2)) - t).abs(), 10, 1)
        loss = step(queries, documents, targets)["rank_loss"]
        gradients.append(torch.autograd.grad(loss, retriever.encoder.query_encoder.weight)[0])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_tokens_are_averaged_for_the_order_and_summed_in_the_marginal():
    torch.manual_seed(0)
    scores = torch.randn(2, 4, requires_grad=True)
    costs = torch.rand(2, 4, 3)  # of three tokens, of which the first answer has two
    mask = torch.tensor([[True, True, False], [True, True, True]])
    documents = torch.arange(4).expand(2, 4)

    def read(queries: Tensor, found: Tensor, targets: Tensor) -> Tensor:
        values = costs[queries.long(), found[:, -1].long()]
        return values.masked_fill(~mask[queries.long()], math.nan)

    def go(**options) -> dict[str, Tensor]:
        step = JointRetrievalStep(lambda queries, found: scores, read, 4, 1, **options)
        return step(torch.arange(2), documents, torch.zeros(2), token_mask=mask)

    means = torch.stack([costs[0, :, :2].mean(1), costs[1].mean(1)])
    found = go()
    torch.testing.assert_close(found["rank_loss"], reader_ranked_loss(scores, means))
    best = scores.argmax(1)
    torch.testing.assert_close(found["reader_loss"], means[torch.arange(2), best].mean())
    for level in ("token", "sequence"):
        expected = marginal_nll(scores, -costs, mask, level)
        found = go(kind="marginal", level=level)
        torch.testing.assert_close(found["loss"], expected)
        torch.testing.assert_close(found["agreement"], reader_agreement(scores, means).mean())


def test_losses_in_half_precision_are_averaged_in_full():
    """In bfloat16 both means would round to 1, and the pair would be a tie."""
    costs = torch.ones(1, 2, 4, dtype=torch.bfloat16)
    costs[0, 0, 0] += 2**-7
    scores = torch.tensor([[-3.0, 3.0]], requires_grad=True)

    def read(queries: Tensor, found: Tensor, targets: Tensor) -> Tensor:
        return costs[queries.long(), found[:, -1].long()]

    step = JointRetrievalStep(lambda queries, found: scores, read, 2, 1)
    for mask in (None, torch.ones(1, 4, dtype=torch.bool)):
        found = step(torch.arange(1), torch.arange(2).expand(1, 2), torch.zeros(1), token_mask=mask)
        assert found["agreement"] == 1.0 and found["reader_loss"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["pairwise", "listwise", "marginal"])
def test_an_answer_without_a_token_teaches_nothing(kind: str):
    torch.manual_seed(0)
    scores = torch.randn(3, 4, requires_grad=True)
    costs = torch.rand(3, 4, 2)
    mask = torch.tensor([[True, True], [False, False], [True, False]])

    def read(queries: Tensor, found: Tensor, targets: Tensor) -> Tensor:
        return costs[queries.long(), found[:, -1].long()]

    def go(rows: list[int]) -> dict[str, Tensor]:
        step = JointRetrievalStep(lambda queries, found: scores[rows], read, 4, 1, kind=kind)
        return step(
            torch.tensor(rows),
            torch.arange(4).expand(len(rows), 4),
            torch.zeros(len(rows)),
            token_mask=mask[rows],
        )

    found, without = go([0, 1, 2]), go([0, 2])
    torch.testing.assert_close(found["reader_loss"], without["reader_loss"])
    torch.testing.assert_close(found["agreement"], without["agreement"])
    assert not torch.autograd.grad(found["loss"], scores)[0][1].any()
    nothing = go([1])
    assert nothing["loss"] == 0.0 and nothing["agreement"].isnan()


def test_documents_may_be_nests_and_some_may_be_missing():
    queries, documents, targets = new_batch(6)
    ignore = torch.zeros(5, 6, dtype=torch.bool)
    ignore[:, 4:] = True
    seen = []

    def retriever(query: dict, found: dict) -> Tensor:
        return torch.einsum("bd,bkd->bk", query["x"], found["x"])

    def reader(query: dict, found: dict, answers: Tensor) -> Tensor:
        seen.append(found["number"])
        return (query["x"] * found["x"].mean(1)).sum(1) + answers

    step = JointRetrievalStep(retriever, reader, 4, 4)
    numbers = torch.arange(6).expand(5, 6)
    step({"x": queries.requires_grad_()}, {"x": documents, "number": numbers}, targets, ignore=ignore)
    assert all((number < 4).all() for number in seen)


def test_the_generator_decides_what_is_tried():
    retriever, reader = new_parts()
    step = JointRetrievalStep(retriever, reader, 3, 2)
    go = lambda seed: step(*new_batch(), generator=torch.Generator().manual_seed(seed))["rank_loss"].item()  # noqa: E731
    assert go(1) == go(1) and len({go(seed) for seed in range(5)}) > 1


def test_bad_options_and_input_are_refused(as_users_call):
    retriever, reader = new_parts()
    for options, message in (
        ({"kind": "both"}, 'kind must be "pairwise", "listwise" or "marginal", got \'both\''),
        ({"n_sampled": 1}, "n_sampled must be >= 2, got 1"),
        ({"n_used": 0}, "n_used must be >= 1, got 0"),
        ({"weight": -1.0}, "weight must be >= 0 and finite, got -1.0"),
        ({"level": "word"}, 'level must be "token" or "sequence", got \'word\''),
        ({"kind": "marginal", "temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"margin": -1.0}, "margin must be >= 0"),
        ({"rescale": "z"}, "rescale must be"),
    ):
        with pytest.raises(ValueError, match=message):
            JointRetrievalStep(retriever, reader, **options)
    # Trap: more documents to draw than candidates.
    with pytest.raises(ValueError, match=r"n must be in \[0, 8\], .* got 10"):
        JointRetrievalStep(retriever, reader)(*new_batch(8))
    with pytest.raises(ValueError, match=r"n must be in \[0, 8\], the fewest documents of a query, got 9"):
        JointRetrievalStep(retriever, reader, 4, 9)(*new_batch(8))
    with pytest.raises(
        ValueError, match=r"reader_loss must give \(20,\) losses, or \(rows, tokens\), got \(\)"
    ):
        JointRetrievalStep(retriever, lambda q, d, t: d.mean(), 4, 2)(*new_batch())
    with pytest.raises(
        ValueError, match=r"reader_loss must give \(rows, 3\) losses for token_mask, got \(20,\)"
    ):
        JointRetrievalStep(retriever, reader, 4, 2)(
            *new_batch(), token_mask=torch.ones(5, 3, dtype=torch.bool)
        )


@pytest.mark.parametrize("kind", ["pairwise", "listwise", "marginal"])
def test_on_digits_the_retriever_learns_what_helps_the_reader(kind: str):
    """The card's fast check: labelled digits as documents, a reader that learns the label from them."""
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    x = x.float() / 16 - 0.3
    labelled = torch.cat([x, torch.eye(10)[y]], 1)
    torch.manual_seed(0)
    tower = nn.Linear(64, 8, bias=False)
    retriever = DenseRetriever(DualEncoder(_Front(tower), _Front(tower)))
    # The reader sees labels alone, so only documents of the right label help.
    reader = ReaderLoss(_Labels())
    step = JointRetrievalStep(retriever, reader, 8, 3, kind=kind, temperature=0.1)
    optimizer = torch.optim.AdamW(step.parameters(), lr=3e-2)
    agreements = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        queries = torch.randint(400, (24,), generator=generator)
        candidates = 400 + torch.randint(1000, (24, 12), generator=generator)
        losses = step(labelled[queries], labelled[candidates], y[queries], generator=generator)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        agreements.append(losses["agreement"].item())
    before, after = sum(agreements[:5]) / 5, sum(agreements[-5:]) / 5
    assert before < 0.2 and after > 0.35


class _Front(nn.Module):
    """The retriever may not look at the label."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.out_features = 8

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x[:, :64])


class _Labels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(10, 10)

    def forward(self, queries: Tensor, documents: Tensor) -> Tensor:
        return self.network(documents[:, :, 64:].mean(1))
