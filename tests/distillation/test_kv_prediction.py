"""A predicted cache: exact where the prediction is, the base untouched, and the path in use told apart from that of training."""

import copy
import math
from functools import partial

import pytest
import torch
from contract import check_resume, check_two_processes

import coloss
from coloss import Budget, Method
from coloss.data import IndexedDataset
from coloss.distillation import (
    KVCachePredictor,
    KVPredictedLM,
    continuation_loss,
    first_token_operations,
    kv_cache_loss,
    kv_prediction_terms,
    pruned_copy,
)
from coloss.nn import CausalLanguageModel, KeyValueCache, KeyValues, next_token_loss

IDS = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(1))
SHAPES = [
    {},
    {"key_value_heads": 2},
    {"positions": "learned"},
    {"normalize_keys": True, "key_value_heads": 1},
]


def language_model(dim=16, depth=4, seed=0, **options):
    torch.manual_seed(seed)
    return CausalLanguageModel(11, dim, depth, 4, **options).double()


def small_system(seed=0):
    base = language_model(key_value_heads=2, seed=seed)
    return KVPredictedLM(base, pruned_copy(base, [0, 2]))


@pytest.fixture(params=SHAPES, ids=["plain", "grouped", "learned", "normalised"])
def exact(request):
    """The base as its own auxiliary model, and maps that change nothing."""
    base = language_model(depth=3, **request.param)
    small = copy.deepcopy(base)
    predictor = KVCachePredictor.between(small, base, [0, 1, 2]).start_as_identity().double()
    return KVPredictedLM(base, small, predictor).eval()


def test_an_exact_prediction_gives_exactly_the_base(exact):
    base = exact.base
    logits, cache = exact.first_token(IDS)
    torch.testing.assert_close(logits, base(IDS)[:, -1])
    own = KeyValueCache()
    base(IDS, cache=own)
    for mine, true in zip(cache.layers, own.layers, strict=True):
        torch.testing.assert_close(mine, true)
    following = torch.randint(11, (2, 4))
    expected = base(torch.cat([IDS, following], 1))[:, 9:]
    torch.testing.assert_close(torch.cat([base(t, cache=cache) for t in following.split(1, 1)], 1), expected)
    assert torch.equal(exact.generate(IDS, 6), base.generate(IDS, 6))
    draws = [
        model.generate(IDS, 6, temperature=2.0, generator=torch.Generator().manual_seed(0))
        for model in (exact, base)
    ]
    assert torch.equal(*draws)
    torch.testing.assert_close(continuation_loss(exact, IDS, 4), continuation_loss(base, IDS, 4))


def test_an_exact_prediction_trains_on_the_plain_forward_pass(exact):
    outputs = exact(IDS)
    torch.testing.assert_close(outputs.base_logits, exact.base(IDS))
    torch.testing.assert_close(outputs.auxiliary_logits, exact.base(IDS))
    assert (
        kv_cache_loss(outputs.predicted, outputs.target)[0].item() < 1e-14
    )  # the order of sums is the processor's
    terms = kv_prediction_terms(outputs, IDS, z_weight=0.0)
    torch.testing.assert_close(terms["base_next_token"], next_token_loss(exact.base(IDS), IDS))


def test_keys_are_compared_after_the_base_norm_and_before_they_are_turned():
    base = language_model(depth=2, normalize_keys=True)
    for norm in base.key_norms:
        torch.nn.init.uniform_(norm.weight)
    model = KVPredictedLM(base, language_model(depth=1, normalize_keys=True))
    own, _ = base.key_values(IDS)
    for layer, target in enumerate(model(IDS).target):
        torch.testing.assert_close(target.keys, base.key_norms[layer](own[layer].keys))
    # A prediction that differs in scale alone is the same key to such a base.
    louder = [KeyValues(3 * keys, values) for keys, values in own]
    torch.testing.assert_close(base(IDS, given=louder), base(IDS))


def test_keys_are_predicted_unturned_so_that_maps_need_not_know_positions():
    base = language_model(depth=1)
    model = KVPredictedLM(base, copy.deepcopy(base))
    model.predictor.start_as_identity()
    # The same token at every place has the same key before it is turned: one bias could write them all.
    ids = torch.full((1, 6), 3)
    keys = model.auxiliary.key_values(ids)[0][0].keys
    torch.testing.assert_close(keys, keys[:, :, :1].expand_as(keys))
    assert not torch.allclose(base.used_keys(0, keys, torch.arange(6)[None]), keys)


def test_the_base_gets_no_gradient_and_its_loss_alone_reaches_auxiliary_and_maps():
    model = small_system().train()
    assert not model.base.training
    assert model.auxiliary.training
    before = copy.deepcopy(model.base.state_dict())
    kv_prediction_terms(model(IDS), IDS)["base_next_token"].backward()
    assert all(parameter.grad is None for parameter in model.base.parameters())
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "auxiliary.embedding.weight" in reached
    assert {
        f"predictor.{kind}.{layer}.weight" for kind in ("keys", "values") for layer in range(4)
    } <= reached
    run = coloss.fit(model, (IDS, IDS), kv_prediction_terms, budget=Budget(steps=2))
    assert all(torch.equal(before[name], value) for name, value in run.model.base.state_dict().items())


def test_gradients_are_right():
    base = language_model(dim=8, depth=2, key_value_heads=1)
    model = KVPredictedLM(base, language_model(dim=8, depth=1, seed=1))
    weight = model.predictor.keys[1].weight

    def total(value):
        weight_before = weight.data
        weight.data = value.detach()
        outputs = torch.func.functional_call(model, {"predictor.keys.1.weight": value}, (IDS[:1, :4],))
        weight.data = weight_before
        terms = kv_prediction_terms(outputs, IDS[:1, 1:5])
        return terms["base_next_token"] + terms["auxiliary_next_token"]

    assert torch.autograd.gradcheck(total, (weight.detach().clone().requires_grad_(),))


def test_in_use_the_last_token_of_the_prompt_has_the_base_own_key():
    model = small_system().eval()
    first, _ = model.first_token(IDS)
    assert not torch.allclose(first, model(IDS).base_logits[:, -1])
    cache = model.prefill(IDS)
    assert len(cache) == 8
    outputs = model(IDS[:, :-1])
    for layer, (keys, values) in enumerate(cache.layers):
        torch.testing.assert_close(values, outputs.predicted[layer].values)
        torch.testing.assert_close(
            keys, model.base.used_keys(layer, outputs.predicted[layer].keys, torch.arange(8)[None])
        )


def test_after_the_prompt_the_auxiliary_model_is_not_called_again(monkeypatch):
    model, calls = small_system().eval(), []
    read = model.auxiliary.key_values
    monkeypatch.setattr(model.auxiliary, "key_values", lambda *a, **k: calls.append(a) or read(*a, **k))
    monkeypatch.setattr(model.auxiliary, "forward", None)
    model.generate(IDS, 5)
    assert len(calls) == 1
    model.generate(IDS[:, :1], 5)
    assert len(calls) == 1


def test_a_prompt_of_one_token_is_read_by_the_base_alone():
    model = small_system().eval()
    torch.testing.assert_close(model.first_token(IDS[:, :1])[0], model.base(IDS[:, :1])[:, -1])


def test_prompts_of_unequal_length_in_one_batch():
    model = small_system().eval()
    short = IDS[:1, 4:]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)
    both = torch.cat([padded, IDS[1:]])
    valid = torch.arange(9)[None] >= torch.tensor([[4], [0]])
    logits, _ = model.first_token(both, valid)
    torch.testing.assert_close(logits[:1], model.first_token(short)[0])
    torch.testing.assert_close(logits[1:], model.first_token(IDS[1:])[0])
    assert torch.equal(model.generate(both, 4, valid=valid)[:1], model.generate(short, 4))
    single = torch.arange(9)[None] >= torch.tensor([[8], [0]])  # a prompt of one token beside a long one
    torch.testing.assert_close(model.first_token(both, single)[0][:1], model.first_token(short[:, -1:])[0])


def test_padding_leaves_the_terms_alone():
    model = small_system()
    ids, targets = IDS[:, :-1], IDS[:, 1:]
    pad = torch.zeros(2, 3, dtype=torch.long)
    valid = torch.cat([pad.bool(), torch.ones_like(ids, dtype=torch.bool)], 1)
    padded = kv_prediction_terms(model(torch.cat([pad, ids], 1), valid), torch.cat([pad - 100, targets], 1))
    for name, value in kv_prediction_terms(model(ids), targets).items():
        torch.testing.assert_close(padded[name], value)


def test_padding_goes_through_fit_beside_the_ids():
    ids, targets = IDS.repeat(4, 1), IDS.roll(-1, 1).repeat(4, 1)
    valid = torch.arange(9)[None].expand(8, 9) >= torch.arange(8)[:, None] % 4
    targets = targets.where(valid, -100)

    def trained(padding):
        """What is written where padding is must not matter."""
        run = coloss.fit(
            small_system(),
            IndexedDataset((ids.where(valid, padding), valid), targets),
            kv_prediction_terms,
            budget=Budget(steps=3),
            batch_size=4,
        )
        return run.model.state_dict()

    first, second = trained(0), trained(7)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value)


def test_the_z_loss_is_the_mean_square_of_the_normaliser():
    model, targets = small_system(), IDS.clone()
    targets[:, :3] = -100
    plain, more = (kv_prediction_terms(model(IDS), targets, z_weight=z) for z in (0.0, 0.5))
    expected = 0.5 * model(IDS).base_logits.exp().sum(2).log()[:, 3:].square().mean()
    torch.testing.assert_close(more["base_next_token"] - plain["base_next_token"], expected)
    torch.testing.assert_close(more["cache"], plain["cache"])


def test_operations_are_those_of_the_formula():
    base = language_model(dim=16, depth=4, key_value_heads=2).float()
    model = KVPredictedLM(base, pruned_copy(base, [0, 2]))
    tokens, dim, width = 20, 16, 8
    key_value, mix, network = 2 * dim * width, dim * dim, 8 * dim * dim
    project = dim * dim + key_value

    def attention(queries, keys):
        return 2 * queries * keys * dim

    small = (tokens - 1) * (project + mix + network + key_value) + attention(tokens - 1, tokens - 1)
    maps = (tokens - 1) * 4 * 2 * width * width
    decode = 4 * (project + mix + network + attention(1, tokens)) + dim * 11
    assert first_token_operations(model, tokens) == 2 * (small + maps + decode)
    whole = tokens * (3 * (project + mix + network) + key_value) + 3 * attention(tokens, tokens)
    last = dim * dim + mix + network + attention(1, tokens) + dim * 11
    assert first_token_operations(base, tokens) == 2 * (whole + last)


def test_half_precision_gives_finite_terms_near_the_exact_ones():
    model = small_system()
    exact = kv_prediction_terms(model(IDS), IDS)
    half = kv_prediction_terms(model.bfloat16()(IDS), IDS)
    for name, value in half.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact[name], rtol=0.05, atol=0)


def test_a_base_of_half_precision_beside_an_auxiliary_model_in_full():
    base = language_model(key_value_heads=2)
    exact = KVPredictedLM(copy.deepcopy(base), pruned_copy(base, [0, 2]))
    model = KVPredictedLM(copy.deepcopy(base).bfloat16(), pruned_copy(base, [0, 2]).float())
    model.predictor.load_state_dict(exact.predictor.state_dict())
    assert model.predictor.keys[0].weight.dtype == torch.float32
    expected = kv_prediction_terms(exact(IDS), IDS)
    for name, value in kv_prediction_terms(model(IDS), IDS).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0.05, atol=0)
    cache = model.prefill(IDS)
    assert {part.dtype for layer in cache.layers for part in layer} == {torch.bfloat16}
    assert model.generate(IDS, 3).shape == (2, 3)


class Counting(Method):
    """Another method beside the objective: adds a term on the auxiliary model's weights."""

    def terms(self, state):
        return {"decay": state.model.auxiliary.embedding.weight.square().mean()}


def test_a_killed_run_goes_on_bit_for_bit_beside_another_method(tmp_path):
    ids = torch.randint(11, (24, 7), generator=torch.Generator().manual_seed(3))
    check_resume(
        small_system, Counting, (ids[:, :-1], ids[:, 1:]), tmp_path, kv_prediction_terms, steps=6, kill_at=4
    )


def test_two_processes_take_the_steps_of_one(tmp_path):
    ids = torch.randint(11, (16, 7), generator=torch.Generator().manual_seed(3))

    def train(fabric):
        run = coloss.fit(
            small_system(),
            (ids[:, :-1], ids[:, 1:]),
            kv_prediction_terms,
            budget=Budget(steps=2),
            batch_size=8,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            fabric=fabric,
        )
        return dict(run.model.state_dict())

    check_two_processes(train, tmp_path)


def test_training_brings_the_prediction_to_the_base():
    """A base that copies its prompt: with predicted keys and values it does, too."""
    ids = torch.randint(11, (64, 6), generator=torch.Generator().manual_seed(0))
    model = small_system().float()
    first = kv_prediction_terms(model(ids), ids)["cache"].item()
    run = coloss.fit(
        model,
        (ids, ids),
        kv_prediction_terms,
        budget=Budget(steps=40),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )
    assert kv_prediction_terms(run.model(ids), ids)["cache"].item() < 0.5 * first


def test_bad_parts_and_calls_are_refused():
    base = language_model()
    with pytest.raises(ValueError, match="auxiliary must have the base's vocabulary of 11 tokens, got 7"):
        KVPredictedLM(base, CausalLanguageModel(7, 16, 2, 4).double())
    with pytest.raises(ValueError, match="auxiliary must share no parameter with the base"):
        KVPredictedLM(base, base)
    with pytest.raises(ValueError, match="layer_map must name layers 0 to 1"):
        KVPredictedLM(
            base, pruned_copy(base, [0, 2]), KVCachePredictor([16] * 4, [16] * 4, [4] * 4, [0, 1, 2, 3])
        )
    with pytest.raises(ValueError, match="predictor must have maps of sizes"):
        KVPredictedLM(
            base, pruned_copy(base, [0, 2]), KVCachePredictor([8] * 2, [16] * 4, [4] * 4, [0, 0, 1, 1])
        )
    model = small_system()
    with pytest.raises(
        ValueError, match=r"ids must have at least one token for each prompt, got shape \(2, 0\)"
    ):
        model.prefill(IDS[:, :0])
    with pytest.raises(ValueError, match="valid must be True for the last token of each prompt"):
        model.prefill(IDS, torch.arange(9)[None].expand(2, 9) < 8)
    for prompt in (0, 9):
        with pytest.raises(ValueError, match=f"prompt must be from 1 to 8 tokens, got {prompt}"):
            continuation_loss(model, IDS, prompt)
    with pytest.raises(ValueError, match="tokens must be >= 1, got 0"):
        first_token_operations(model, 0)
    for z_weight in (-1.0, math.nan):
        with pytest.raises(ValueError, match="z_weight must be >= 0 and finite"):
            kv_prediction_terms(model(IDS), IDS, z_weight=z_weight)
