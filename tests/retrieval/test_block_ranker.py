"""The ranker over blocks: packing, order of documents, early stop and decoding; its losses, and how they train."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.lab import verify
from coloss.retrieval import AttentionRanking, BlockBatch, BlockRanker, answer_loss
from coloss.retrieval.block_ranker_trial import DOCUMENTS, keyword_prompts, prompt_accuracies
from coloss.train import Budget, Method, State, TrainingStep

OPEN, CLOSE, ASK, VOCABULARY = 1, 2, 3, 24


def new_model(**options) -> BlockRanker:
    torch.manual_seed(3)
    return BlockRanker(VOCABULARY, **({"dim": 8, "depth": 2, "heads": 2} | options))


def new_prompts(count: int = 16, documents: int = 3, *, answered: bool = True) -> tuple[BlockBatch, Tensor]:
    """The query is the last word of one document, whose number is the answer."""
    generator = torch.Generator().manual_seed(1)
    queries, packed, answers, relevant = [], [], [], []
    for number in range(count):
        words = (10 + torch.randperm(14, generator=generator)[: 3 * documents]).view(documents, 3).tolist()
        target = number % documents
        queries.append([ASK, words[target][-1]])
        packed.append([[4 + j, *found[: 2 + (number + j) % 2], found[-1]] for j, found in enumerate(words)])
        answers.append([OPEN, 4 + target, CLOSE] if answered else [OPEN])
        relevant.append(target)
    prompts = BlockBatch.pack(queries, packed, queries, answers, max_block_length=8, pad_multiple=4)
    return prompts, F.one_hot(torch.tensor(relevant), documents)


def new_data() -> IndexedDataset:
    prompts, relevance = new_prompts()
    return IndexedDataset(tuple(prompts), relevance)


def test_packing_written_out():
    batch = BlockBatch.pack(
        [[9], [9, 8]], [[[5, 6, 7], [4]], [[3]]], [[9], [9]], [[1, 4, 2], [1, 2]], 8, pad_multiple=2
    )
    assert batch.ids.tolist() == [
        [[0, 0, 0, 9], [0, 5, 6, 7], [0, 0, 0, 4], [9, 1, 4, 2]],
        [[0, 0, 9, 8], [0, 0, 0, 3], [0, 0, 0, 0], [0, 9, 1, 2]],
    ]
    assert torch.equal(batch.valid, batch.ids > 0)
    assert (batch.labels[:, :-1] == -100).all()
    assert batch.labels[:, -1].tolist() == [[-100, 1, 4, 2], [-100, -100, 1, 2]]
    assert batch.signals.tolist() == [[0, 1], [1, 2]]


def test_packing_rounds_up_cuts_documents_and_keeps_the_padding_sign_as_a_word():
    batch = BlockBatch.pack([[9]], [[list(range(50)), [0, 7]]], [[9]], [[1]], max_block_length=20)
    assert batch.ids.shape == (1, 4, 32)
    assert batch.ids[0, 1, -20:].tolist() == list(range(20)) and batch.valid[0, 1].sum() == 20
    assert batch.valid[0, 2].sum() == 2  # validity is by length, whatever the ids
    none = BlockBatch.pack([[9]], [[]], [[9]], [[1]], max_block_length=4, pad_multiple=1)
    assert none.ids.tolist() == [[[0, 9], [9, 1]]]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            ([[9]], [[[5]], [[5]]], [[9]], [[1]], 8),
            "documents must hold one entry for each of 1 prompts, got 2",
        ),
        (([[9] * 9], [[[5]]], [[9]], [[1]], 8), "instruction must fit max_block_length = 8, got 9 ids"),
        (([[9]], [[[5]]], [[9] * 8], [[1]], 8), "query and answer must fit max_block_length = 8, got 9 ids"),
        (([[9]], [[[5]]], [[]], [[1]], 8), "query and answer must hold at least one id, got 0 and 1"),
        (([[9]], [[[5]]], [[9]], [[]], 8), "query and answer must hold at least one id, got 1 and 0"),
        (([[9]], [[[5]]], [[9]], [[1]], 0), "max_block_length and pad_multiple must be >= 1, got 0 and 16"),
    ],
)
def test_packing_refuses(parts, message):
    """The token before the answer must exist, or its attention would be that of padding."""
    with pytest.raises(ValueError, match=message):
        BlockBatch.pack(*parts)


def moved(prompts: BlockBatch, order: list[int]) -> BlockBatch:
    blocks = torch.tensor([0, *(1 + place for place in order), len(order) + 1])
    return BlockBatch(
        prompts.ids[:, blocks], prompts.valid[:, blocks], prompts.labels[:, blocks], prompts.signals
    )


def test_the_order_of_documents_means_nothing_to_block_attention():
    prompts, _ = new_prompts(6, documents=4)
    order = [2, 0, 3, 1]
    model = new_model().double()
    plain, shuffled = model(prompts), model(moved(prompts, order))
    torch.testing.assert_close(shuffled.document_scores, plain.document_scores[:, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(shuffled.logits, plain.logits, rtol=0, atol=1e-12)
    dense = new_model(attention="causal").double()
    difference = dense(moved(prompts, order)).document_scores - dense(prompts).document_scores[:, order]
    assert difference.abs().max() > 1e-4


def test_scores_do_not_depend_on_the_answer_nor_on_padding():
    """Training prompts and ranking prompts are scored alike; longer blocks and empty documents change nothing."""
    answered, _ = new_prompts(6)
    asked, _ = new_prompts(6, answered=False)
    model = new_model().double()
    scores = model.rank(asked)
    torch.testing.assert_close(model(answered).document_scores, scores, rtol=0, atol=1e-12)
    padded = (
        F.pad(asked.ids, (5, 0)),
        F.pad(asked.valid, (5, 0)),
        F.pad(asked.labels, (5, 0)),
        asked.signals + 5,
    )
    torch.testing.assert_close(model.rank(padded), scores, rtol=0, atol=1e-12)
    blank = torch.zeros_like(asked.ids[:, :1])
    more = [torch.cat([part[:, :2], blank.to(part), part[:, 2:]], dim=1) for part in asked[:3]]
    found = model((*more, asked.signals))
    torch.testing.assert_close(found.document_scores[:, [0, 2, 3]], scores, rtol=0, atol=1e-12)
    assert found.present.tolist() == [[True, False, True, True]] * 6 and not found.document_scores[:, 1].any()


@pytest.mark.parametrize("options", [{}, {"attention": "causal", "normalize": "max"}, {"rotary_share": 1.0}])
def test_ranking_stops_early_with_the_same_scores(options):
    prompts, _ = new_prompts(6)
    model = new_model(depth=3, ranking_layer=1, **options)
    model.transformer.blocks[2].register_forward_hook(lambda *given: pytest.fail("a later layer ran"))
    model.transformer.blocks[1].mlp.register_forward_hook(
        lambda *given: pytest.fail("the layer ran to its end")
    )
    scores = model.rank(prompts)
    model.transformer.blocks[1].mlp._forward_hooks.clear()
    model.transformer.blocks[2]._forward_hooks.clear()
    assert torch.equal(model(prompts).document_scores, scores)


def test_training_carries_gradient_to_the_layers_up_to_the_ranking_layer_alone():
    prompts, relevance = new_prompts(6)
    model = new_model(depth=3, ranking_layer=1)
    (model(prompts).document_scores * relevance).sum().backward()
    reached = {
        n.split(".")[2]
        for n, p in model.named_parameters()
        if "blocks" in n and p.grad is not None and p.grad.any()
    }
    assert reached == {"0", "1"} and model.embedding.weight.grad.any()


@pytest.mark.parametrize("attention", ["block", "causal"])
def test_decoding_with_a_cache_is_reading_all_again(attention):
    """Each next token is the likeliest after the prompt with the answer so far, read from the beginning."""
    model = new_model(attention=attention).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    queries, documents = [[9, 8], [7]], [[[5, 6, 7], [4]], [[3, 9], [12, 13, 14]]]
    prompts = BlockBatch.pack(queries, documents, queries, [[OPEN]] * 2, 16, pad_multiple=3)
    answers = model.decode(prompts, max_tokens=5)
    assert len(set(answers.flatten().tolist())) > 2
    for length in range(5):
        so_far = [[OPEN, *row[:length]] for row in answers.tolist()]
        # One more token, so that the logits after the last of them are part of the outputs.
        read = model(
            BlockBatch.pack(queries, documents, queries, [[*row, 0] for row in so_far], 16, pad_multiple=1)
        )
        assert torch.equal(read.logits[:, -1].argmax(1), answers[:, length])


def test_decoding_ends_with_the_end_sign():
    prompts, _ = new_prompts(3, answered=False)
    model = new_model()
    first = model.decode(prompts)[:, 0]
    found = model.decode(prompts, max_tokens=4, end_id=int(first[0]), padding_id=23)
    assert found.shape == (3, 4) and (found[first == first[0], 1:] == 23).all()


def test_a_later_position_of_the_last_block_does_not_touch_the_documents():
    """Trap: the offset only has to lie within what the positions cover; scores stay finite and orderless far out."""
    prompts, _ = new_prompts(4)
    for offset in (0, 64, 16384, 10**6):
        scores = new_model(query_offset=offset).rank(prompts)
        torch.testing.assert_close(scores.sum(1), torch.ones(4))


def test_the_answer_loss_is_the_mean_over_prompts_of_the_mean_over_their_answer():
    prompts = BlockBatch.pack([[9]] * 3, [[[5]]] * 3, [[9]] * 3, [[1, 4, 2], [1], [1, 2]], 8, pad_multiple=1)
    prompts.labels[1] = -100  # a prompt without answer counts for nothing
    outputs = new_model()(prompts)
    logp = outputs.logits.double().log_softmax(2)
    # Left padding puts answers at the end; the logits before a token predict it.
    first = -(logp[0, 0, 1] + logp[0, 1, 4] + logp[0, 2, 2]) / 3
    third = -(logp[2, 1, 1] + logp[2, 2, 2]) / 2
    assert answer_loss(outputs)["language_model"].item() == pytest.approx(
        ((first + third) / 2).item(), rel=1e-5
    )
    silent = outputs._replace(labels=torch.full_like(outputs.labels, -100))
    loss = answer_loss(silent)["language_model"]
    assert loss == 0 and not torch.autograd.grad(loss, outputs.logits)[0].any()


def test_both_terms_reach_the_model_with_the_published_weight():
    data = new_data().all()
    step = TrainingStep(new_model(), answer_loss, [AttentionRanking()])
    terms = step(data)
    shares = step.state.outputs.document_scores / 0.05
    expected = -(shares.log_softmax(1) * data.targets).sum(1).mean()
    torch.testing.assert_close(terms["attention_ranking"], expected)
    torch.testing.assert_close(step.combine(step.state, terms), terms["language_model"] + 0.1 * expected)
    logged = step.state.take_logged()["attention_accuracy"]
    assert logged == pytest.approx(data.targets.gather(1, shares.argmax(1, keepdim=True)).float().mean())


def test_the_ranking_loss_teaches_attention_to_find_the_document():
    prompts, relevance = new_prompts(24)
    data = IndexedDataset(tuple(prompts), relevance)

    def accuracy(model: BlockRanker) -> float:
        found = model.rank(prompts).argmax(1, keepdim=True)
        return relevance.gather(1, found).float().mean().item()

    before = accuracy(new_model())
    run = coloss.fit(
        new_model(), data, answer_loss, [AttentionRanking(weight=1.0)], budget=Budget(steps=30), batch_size=24,
        optimizer=lambda p: torch.optim.AdamW(p, lr=2e-2),
    )  # fmt: skip
    assert before < 0.5 and accuracy(run.model) > 0.8


class Scores(nn.Module):
    """Any model with scores of documents will do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor):
        scores = self.layer(inputs).softmax(1)

        class Found:
            document_scores = scores
            present = torch.tensor([[True, True, False]] * len(inputs))

        return Found()


def test_any_attention_map_can_be_trained_and_absent_documents_do_not_count():
    inputs, relevance = torch.randn(6, 4), torch.tensor([[1, 0, 0]] * 6)
    step = TrainingStep(Scores(), None, [AttentionRanking(replace_objective=True, temperature=0.5)])
    found = step(inputs, relevance)
    shares = step.state.outputs.document_scores[:, :2] / 0.5
    torch.testing.assert_close(found["attention_ranking"], -shares.log_softmax(1)[:, 0].mean())


class Shrink(Method):
    """Another method of the same run."""

    def terms(self, state: State) -> dict[str, Tensor]:
        return {"scores": state.outputs.document_scores.square().mean()}


def test_beside_another_method_every_term_counts_and_the_model_ships_as_built():
    def go(*methods: Method) -> coloss.Fit:
        return coloss.fit(new_model(), new_data(), answer_loss, methods, budget=Budget(steps=3), batch_size=8)

    run = go(Shrink(), AttentionRanking())
    assert sorted(run.history[-1].terms) == ["attention_ranking", "language_model", "scores"]
    assert list(run.model.state_dict()) == list(new_model().state_dict())
    weights = [torch.cat([p.detach().flatten() for p in go(*methods).model.parameters()]) for methods in (
        (AttentionRanking(weight=0.0),), (), (AttentionRanking(),)
    )]  # fmt: skip
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_fit_a_plain_loop_and_lightning_take_the_same_steps():
    data = new_data()
    batches = [
        (part.inputs, part.targets) for part in (data.take(torch.arange(8)), data.take(torch.arange(8, 16)))
    ]
    check_loops(
        new_model, AttentionRanking, batches, lambda outputs, targets: answer_loss(outputs)["language_model"]
    )


def test_a_killed_run_resumes_bit_identically(tmp_path: Path):
    check_resume(new_model, AttentionRanking, new_data(), tmp_path, answer_loss)


def test_accumulated_micro_batches_are_one_large_batch():
    """Trap: the scale of summed losses under accumulation; here answers of different lengths, and means."""
    queries = [[ASK, 10 + i] for i in range(8)]
    answers = [[OPEN, 4, CLOSE] if i % 3 else [OPEN, 4, 5, 6, CLOSE] for i in range(8)]
    prompts = BlockBatch.pack(
        queries, [[[10 + i], [4, 5]] for i in range(8)], queries, answers, 8, pad_multiple=8
    )
    data = IndexedDataset(tuple(prompts), torch.tensor([[1, 0]] * 8))

    def go(size: int, accumulate: int) -> nn.Module:
        return coloss.fit(
            new_model().double(), data, answer_loss, [AttentionRanking()], budget=Budget(steps=1), batch_size=size,
            accumulate=accumulate, optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        ).model  # fmt: skip

    for one, other in zip(go(8, 1).parameters(), go(4, 2).parameters()):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_two_processes_take_the_steps_of_one(tmp_path: Path):
    def train(fabric: Fabric) -> dict[str, Tensor]:
        run = coloss.fit(
            new_model().double(), new_data(), answer_loss, [AttentionRanking()], budget=Budget(steps=4), batch_size=8,
            fabric=fabric,
        )  # fmt: skip
        return dict(run.model.state_dict())

    check_two_processes(train, tmp_path)


def test_half_precision_trains():
    data = new_data().all()
    model = new_model().bfloat16()
    terms = TrainingStep(model, answer_loss, [AttentionRanking()])(data)
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = new_model()(data.inputs)
    torch.testing.assert_close(
        found.document_scores, new_model()(data.inputs).document_scores, atol=0.02, rtol=0
    )


def test_the_trial_asks_for_the_article_that_holds_the_words():
    prompts = keyword_prompts(train=12, test=5)
    assert keyword_prompts(train=12, test=5).train.inputs[0].equal(prompts.train.inputs[0])
    train = BlockBatch(*prompts.train.inputs)
    for batch, relevant in ((train, prompts.train.targets.argmax(1)), (prompts.test, prompts.test_relevant)):
        for ids, target in zip(batch.ids, relevant):
            words = set(ids[0][ids[0] > 0].tolist()[1:])
            shared = [len(words & set(document.tolist())) for document in ids[1:-1]]
            assert len(words) == 3 and len(shared) == DOCUMENTS and shared[target] == 3
            assert words < set(ids[-1].tolist())
    answers = train.labels[:, -1, -2]
    assert torch.equal(answers - prompts.first_number, prompts.train.targets.argmax(1))
    assert int(train.ids.max()) < prompts.vocabulary_size and (prompts.test.labels[:, -1] >= 0).sum() == 5
    perfect = BlockRanker(prompts.vocabulary_size, 8, 1, 2)
    perfect.rank = lambda batch: F.one_hot(prompts.test_relevant, DOCUMENTS).float()  # type: ignore[method-assign]
    assert prompt_accuracies(perfect, prompts)["attention_accuracy"] == 1.0


def test_bad_options_and_models_are_refused(as_users_call: None):
    for options, message in (
        ({"depth": 0}, "depth must be >= 1, got 0"),
        ({"ranking_layer": 2}, r"ranking_layer must be in \[-2, 2\), got 2"),
        ({"attention": "full"}, 'attention must be "block" or "causal", got \'full\''),
        ({"rotary_share": 0.0}, r"rotary_share must be in \(0, 1\], got 0.0"),
        ({"dim": 6}, r"dim must be a multiple of twice the heads \(2\), got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            new_model(**options)
    with pytest.raises(ValueError, match="max_tokens must be >= 1, got 0"):
        new_model().decode(new_prompts(2)[0], 0)
    for options, message in (
        ({"weight": -1.0}, "weight must be >= 0 and finite, or a schedule, got -1.0"),
        ({"weight": math.nan}, "weight must be >= 0 and finite, or a schedule, got nan"),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
    ):
        with pytest.raises(InputError, match=message):
            AttentionRanking(**options)
    with pytest.raises(InputError, match="the model must give document_scores and present.*got Tensor"):
        TrainingStep(nn.Linear(2, 2), None, [AttentionRanking()])(torch.zeros(1, 2), torch.zeros(1, 2))
    prompts, relevance = new_prompts(4)
    for targets, found in ((relevance[:, :2], r"got \(4, 2\)"), (None, "got NoneType")):
        with pytest.raises(
            InputError, match=rf"targets must be the relevance \(4, 3\) of the documents, {found}"
        ):
            TrainingStep(new_model(), answer_loss, [AttentionRanking()])(tuple(prompts), targets)


def test_the_claim_runs():
    found = verify("blockrank", smoke=True, seeds=1)
    assert (
        found["method"]["name"] == "block attention and ranking loss"
        and found["metric"] == "attention_accuracy"
    )
    assert set(found["arms"]["block attention"]["metrics"]) == {
        "attention_accuracy",
        "decode_accuracy",
        "top_share",
    }


def test_a_batch_without_prompts_is_ranked():
    empty = BlockBatch.pack([], [], [], [], 8)
    for attention in ("block", "causal"):
        model = BlockRanker(10, dim=16, depth=2, heads=2, attention=attention)
        assert model.rank(empty).shape == model(empty).document_scores.shape == (0, 0)
        assert model.decode(empty).shape == (0, 1)
        assert answer_loss(model(empty))["language_model"] == 0


def test_test_prompts_come_to_the_device_of_the_model():
    """A parameter on "meta" stands for a ranker that training left on an accelerator."""

    class Reached(Exception):
        pass

    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, device="meta"))

        def rank(self, inputs: BlockBatch) -> Tensor:
            raise Reached({part.device.type for part in inputs})

    with pytest.raises(Reached, match="{'meta'}"):
        prompt_accuracies(Elsewhere(), keyword_prompts(train=12, test=5))
