"""The decoder, the hard negatives and the match loss do what they say; the method keeps its promises; the emoji task and the claim."""

import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes
from torch import nn

import coloss
from coloss.data import Batch, IndexedDataset
from coloss.errors import InputError
from coloss.lab import verify
from coloss.nn import ImagePatches, TokenEncoder, Words
from coloss.retrieval import (
    CrossModalGranularity,
    GranularityDecoder,
    MatchHead,
    TokenDualEncoder,
    TokenTower,
    hard_negative_indices,
    match_loss,
    sdm_loss,
)
from coloss.retrieval.granularity_trial import captioned_emoji, judge_towers, token_towers
from coloss.train import Budget, Method, TrainingStep


def new_model(decoder=None):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        texts = TokenTower(TokenEncoder(Words(20, 8, max_length=4), 8, 1, 2, pool="none"), 8)
        images = TokenTower(TokenEncoder(ImagePatches(4, 2, 1, 8), 8, 1, 2, pool="none"), 8)
        return TokenDualEncoder(texts, images, decoder)


def pairs(count=24, identities=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 20, (count, 4), generator=generator)
    words[::3, 2:] = 0
    images = torch.rand(count, 1, 4, 4, generator=generator, dtype=dtype)
    return IndexedDataset(
        (words, images), extras={"identity": torch.arange(count) // 2} if identities else {}
    )


def method(**options):
    return CrossModalGranularity(**({"num_queries": 3, "depth": 1, "heads": 2, "temperature": 0.2} | options))


# Decoder and towers


def test_one_decoder_reads_token_lists_of_any_length_and_ignores_padding():
    decoder = GranularityDecoder(8, num_queries=3, depth=2, heads=2).double()
    tokens = torch.randn(2, 6, 8, dtype=torch.float64)
    padding = torch.tensor([[False] * 4 + [True] * 2] * 2)
    full = decoder(tokens[:, :4])
    torch.testing.assert_close(decoder(tokens, padding), full)
    changed = tokens.clone()
    changed[:, 4:] = 100.0
    torch.testing.assert_close(decoder(changed, padding), full)
    assert full.shape == (2, 3, 8) and (full[:, 0] - full[:, 1]).abs().max() > 1e-3


def test_the_order_of_tokens_does_not_matter_to_the_decoder():
    decoder, tokens = GranularityDecoder(8, 3, 1, 2).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(decoder(tokens), decoder(tokens[:, torch.randperm(5)]))


def test_blocks_of_the_decoder_begin_with_different_weights():
    first, second = GranularityDecoder(8, 3, 2, 2).blocks
    assert (first.linear1.weight - second.linear1.weight).abs().max() > 0.01


def test_a_text_of_padding_alone_is_finite():
    model = new_model(GranularityDecoder(8, 3, 1, 2))
    embedding = model.encode_query(torch.zeros(2, 4, dtype=torch.int64))
    embedding.sum().backward()
    assert embedding.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_inner_products_of_embeddings_are_means_of_both_cosines():
    model = new_model(GranularityDecoder(8, 3, 1, 2))
    queries, documents = model(pairs().inputs)
    parts = [model.parts(side) for side in (queries, documents)]
    for part in (*parts[0], *parts[1]):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(24))
    expected = sum(a @ b.T for a, b in zip(*parts)) / 2
    torch.testing.assert_close(queries @ documents.T, expected)
    assert new_model().encode_query(pairs().inputs[0]).shape == (24, 8)


def test_the_global_feature_is_the_mean_of_tokens_that_are_no_padding():
    tower = new_model().query_tower
    tokens = tower(torch.tensor([[3, 5, 0, 0]]))
    torch.testing.assert_close(tower.pooled(tokens), F.normalize(tokens.values[:, :2].mean(1), dim=1))
    tower.pool = "first"
    torch.testing.assert_close(tower.pooled(tokens), F.normalize(tokens.values[:, 0], dim=1))


def test_feature_maps_are_taken_as_tokens():
    tower = TokenTower(nn.Conv2d(1, 5, 3), 4, width=5)
    tokens = tower(torch.rand(2, 1, 6, 6))
    assert tokens.values.shape == (2, 16, 4) and tokens.padding is None


# Hard negatives and the match loss


def by_hand(queries, documents, ids):
    scores = queries @ documents.T
    scores = scores.masked_fill(ids[:, None] == ids, -math.inf)
    return scores.argmax(1), scores.argmax(0)


def test_hard_negatives_are_the_most_similar_of_other_identities():
    queries, documents = torch.randn(2, 30, 5)
    ids = torch.arange(30) // 3
    for found, expected in zip(
        hard_negative_indices(queries, documents, ids), by_hand(queries, documents, ids)
    ):
        assert torch.equal(found, expected)


def test_without_the_identity_mask_the_hardest_negative_would_be_a_true_partner():
    queries = torch.eye(4)
    documents = torch.eye(4)[[0, 0, 2, 3]] + 0.1 * torch.eye(4)
    ids = torch.tensor([0, 0, 2, 3])
    assert hard_negative_indices(queries, documents, torch.arange(4))[0][0] == 1
    assert hard_negative_indices(queries, documents, ids)[0][0] not in (0, 1)


def test_with_one_identity_there_is_no_negative_and_the_loss_is_that_of_the_pairs():
    queries, documents = torch.randn(2, 4, 5)
    ids = torch.zeros(4, dtype=torch.int64)
    assert all((index == -1).all() for index in hard_negative_indices(queries, documents, ids))

    def head(a, b):
        return (a * b).sum(1)

    expected = F.softplus(-(queries * documents).sum(1)).mean()
    torch.testing.assert_close(match_loss(head, queries, documents, ids), expected)
    assert match_loss(head, queries[:0], documents[:0], ids[:0]).item() == 0


def test_the_match_loss_is_the_mean_over_pairs_and_negatives():
    queries, documents = torch.randn(2, 9, 5, dtype=torch.float64)
    ids, chosen = torch.arange(9) // 2, torch.randn(2, 9, 3, dtype=torch.float64)
    head = MatchHead(5).double()
    of_queries, of_documents = by_hand(*chosen, ids)
    logits = torch.cat(
        [head(queries, documents), head(queries, documents[of_queries]), head(queries[of_documents], documents)]
    ).detach().numpy()  # fmt: skip
    truth = np.repeat([1.0, 0.0, 0.0], 9)
    expected = np.mean(np.log1p(np.exp(-logits)) * truth + np.log1p(np.exp(logits)) * (1 - truth))
    found = match_loss(head, queries, documents, ids, similarity=tuple(chosen))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_the_head_learns_to_tell_pairs_from_hard_negatives():
    queries = F.normalize(torch.randn(40, 6), dim=1)
    documents, ids = F.normalize(queries + 0.3 * torch.randn(40, 6), dim=1), torch.arange(40)
    head = MatchHead(6, 32)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = match_loss(head, queries, documents, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# The method


def test_terms_are_the_plain_functions_on_both_parts():
    model = new_model()
    step = TrainingStep(model, None, [method(num_identities=12)])
    model.double()
    step.double()
    data = pairs(dtype=torch.float64)
    found = step(data.all())
    queries, documents = (model.parts(side) for side in step.state.outputs)
    ids, own = data.extras["identity"], step.state.methods[0]
    torch.testing.assert_close(found["sdm_global"], sdm_loss(queries[0], documents[0], ids, 0.2))
    torch.testing.assert_close(found["sdm_granularity"], sdm_loss(queries[1], documents[1], ids, 0.2))
    expected = match_loss(own.head, queries[1], documents[1], ids, similarity=step.state.outputs)
    torch.testing.assert_close(found["match"], expected)
    sides = [*queries, *documents]
    expected = sum(F.cross_entropy(own.classifier(side), ids) for side in sides) / 4
    torch.testing.assert_close(found["identity"], expected)


def test_what_is_left_out_adds_no_term():
    for options, names in (
        ({"granularity": False, "match": False}, {"sdm_global"}),
        ({"granularity": False}, {"sdm_global", "match"}),
        ({"match": False}, {"sdm_global", "sdm_granularity"}),
    ):
        step = TrainingStep(new_model(), None, [method(**options)])
        assert set(step(pairs().all())) == names
        assert (step.model.decoder is None) == (options.get("granularity") is False)


def test_only_what_counts_is_computed(monkeypatch):
    """Before the warm-up ends InfoNCE, afterwards the others; the rest are zeros, whose gradients are zeros and not missing."""
    step = TrainingStep(new_model(), None, [method(warm_up=0.5, num_identities=12)])
    own, calls = step.state.methods[0], []
    module = "coloss.retrieval.cross_modal_granularity"
    for name in ("sdm_loss", "match_loss", "info_nce_loss"):
        loss = getattr(sys.modules[module], name)
        monkeypatch.setattr(
            f"{module}.{name}",
            lambda *a, _loss=loss, _name=name, **k: (calls.append(_name), _loss(*a, **k))[1],
        )
    names = {"sdm_global", "sdm_granularity", "match", "identity", "warm_up"}
    for progress, called, counted in (
        (0.49, ["info_nce_loss"], {"warm_up"}),
        (0.5, ["sdm_loss", "sdm_loss", "match_loss"], names - {"warm_up"}),
    ):
        step.state.progress = progress
        calls.clear()
        step.zero_grad()
        terms = step(pairs().all())
        step.backward(terms)
        assert calls == called and set(terms) == names
        assert {name for name, term in terms.items() if term != 0} == counted
        assert all(parameter.grad is not None for parameter in step.parameters())
        waits = any(p.grad.any() for p in (*own.head.parameters(), *own.classifier.parameters()))
        assert waits == (progress == 0.5)


def test_captions_of_one_image_are_partners():
    """Two samples of one identity in a batch: told apart only where nobody says that they are one."""
    data = pairs()
    terms = [
        TrainingStep(new_model(), None, [method(match=False, granularity=False)])(
            Batch(data.inputs, extras=extras)
        )
        for extras in (dict(data.extras), {})
    ]
    queries, documents = new_model()(data.inputs)
    for found, ids in zip(terms, (data.extras["identity"], torch.arange(24))):
        torch.testing.assert_close(found["sdm_global"], sdm_loss(queries, documents, ids, 0.2))
    assert terms[0]["sdm_global"] < terms[1]["sdm_global"]


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.02)


def test_fit_a_plain_loop_and_lightning_take_the_same_steps():
    words, images = pairs(16).inputs
    batches = [((words[i : i + 8], images[i : i + 8]), torch.zeros(8)) for i in (0, 8)]
    model = check_loops(new_model, method, batches, optimizer=_sgd)
    assert isinstance(model, TokenDualEncoder) and isinstance(model.decoder, GranularityDecoder)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    check_resume(
        new_model,
        lambda: method(num_identities=12),
        pairs(),
        tmp_path,
        steps=6,
        kill_at=4,
        checkpoint_every=2,
    )


def _two_process_run(fabric):
    run = coloss.fit(
        new_model().double(),
        pairs(dtype=torch.float64),
        methods=[method(num_identities=12, warm_up=0.5)],
        budget=Budget(epochs=2),
        batch_size=12,
        optimizer=partial(torch.optim.SGD, lr=0.05),
        fabric=fabric,
    )
    return dict(run.model.state_dict())


def test_two_processes_take_the_steps_of_one(tmp_path):
    check_two_processes(_two_process_run, tmp_path, atol=1e-9)


def test_trains_beside_another_method_and_ships_without_its_heads():
    class Size(Method):
        def terms(self, state):
            return {"size": state.outputs[0].square().mean()}

    run = coloss.fit(
        new_model(), pairs(), methods=[method(num_identities=12), Size()], budget=Budget(steps=25), batch_size=24,
        optimizer=partial(torch.optim.Adam, lr=5e-3),
    )  # fmt: skip
    first, last = run.history[0].terms, run.history[-1].terms
    assert set(last) == {"sdm_global", "sdm_granularity", "match", "identity", "size"}
    assert last["sdm_granularity"] < first["sdm_granularity"]
    names = {name.split(".")[0] for name in run.model.state_dict()}
    assert names == {"query_tower", "document_tower", "decoder"}


def test_joined_micro_batches_take_the_step_of_the_whole_batch():
    def trained(parts):
        return coloss.fit(
            new_model(), pairs(), methods=[method()], budget=Budget(steps=1), optimizer=_sgd, batch_size=24 // parts,
            accumulate=parts,
        ).model  # fmt: skip

    whole, parts = trained(1), trained(3)
    for first, second in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


def test_mixed_precision_keeps_losses_in_float32():
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    run = coloss.fit(
        new_model(),
        pairs(),
        methods=[method(num_identities=12)],
        budget=Budget(steps=2),
        log_every=1,
        fabric=fabric,
    )
    assert all(math.isfinite(value) for value in run.history[-1].terms.values())


def test_what_cannot_work_is_refused():
    with pytest.raises(InputError, match="temperature must be > 0 and finite, got 0.0"):
        CrossModalGranularity(temperature=0.0)
    with pytest.raises(InputError, match="num_identities must be >= 1, got 0"):
        CrossModalGranularity(num_identities=0)
    with pytest.raises(InputError, match="the model must be a TokenDualEncoder, got Linear"):
        TrainingStep(nn.Linear(2, 2), None, [method()])
    with pytest.raises(InputError, match="granularity=False needs a model without decoder"):
        TrainingStep(new_model(GranularityDecoder(8, 3, 1, 2)), None, [method(granularity=False)])
    with pytest.raises(
        InputError, match='num_identities needs batch.extras\\["identity"\\], and the batch has none'
    ):
        TrainingStep(new_model(), None, [method(num_identities=3)])(pairs(identities=False).all())
    with pytest.raises(InputError, match=r"identities must be in \[0, num_identities = 3\), got 0 to 11"):
        TrainingStep(new_model(), None, [method(num_identities=3)])(pairs().all())
    with pytest.raises(InputError, match="must hold one whole number for each of 24 pairs, got \\(24, 2\\)"):
        TrainingStep(new_model(), None, [method()])(
            Batch(pairs().inputs, extras={"identity": torch.zeros(24, 2)})
        )
    for sizes, message in (
        ({"dim": 0}, "dim must be >= 1, got 0"),
        ({"dim": 9, "heads": 2}, "heads must divide dim 9, got 2"),
        ({"dim": 8, "num_queries": 0}, "num_queries must be >= 1, got 0"),
        ({"dim": 8, "dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ):
        with pytest.raises(InputError, match=message):
            GranularityDecoder(**sizes)
    with pytest.raises(InputError, match="Conv2d does not declare out_features: give width"):
        TokenTower(nn.Conv2d(1, 5, 3), 4)
    with pytest.raises(InputError, match="an encoder must give tokens"):
        TokenTower(nn.Linear(3, 5), 4)(torch.rand(2, 3))


# The emoji task


def test_emoji_have_a_fine_and_mostly_a_coarse_caption_of_one_identity():
    emoji = captioned_emoji(limit=60)
    identity = emoji.train.extras["identity"]
    assert emoji.num_identities == 60 and identity.unique().numel() == 60
    assert set(identity.bincount().tolist()) <= {1, 2} and len(emoji.train) > 90
    first, second = (identity == 7).nonzero().flatten().tolist()
    words, images = emoji.train.inputs
    assert torch.equal(images[first], images[second]) and not torch.equal(words[first], words[second])
    assert images[:, :, 0, 0].mean() < 0.05  # drawings on nothing
    found = judge_towers(token_towers(emoji), emoji)
    assert set(found) == {"mrr", "recall@10", "msd", "mrr_fine", "mrr_coarse"}
    assert all(math.isfinite(value) for value in found.values())


def test_the_claim_runs():
    found = verify("cfam", smoke=True, seeds=1)
    assert found["metric"] == "mrr" and set(found["arms"]) == {
        "info-nce",
        "sdm",
        "cfam",
        "sdm, temperature 0.02",
    }
    for arm in found["arms"].values():
        assert {"mrr", "msd", "mrr_fine", "mrr_coarse"} <= set(arm["metrics"])
