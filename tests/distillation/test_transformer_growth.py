"""Growing and shrinking transformers: equal functions, exact reversal, other people's names, traps of the published code."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.distillation import (
    TransformerLayout,
    TransformerSizes,
    bert_layout,
    causal_language_model_layout,
    coalesce,
    encoder_layout,
    gpt2_layout,
    grow,
    prune_layers,
)
from coloss.distillation.transformer_growth import coalescing_map, growing_map
from coloss.errors import InputError
from coloss.nn import CausalLanguageModel

HALF = Fraction(1, 2)
SMALL = TransformerSizes(depth=2, heads=2, head_dim=4, hidden=12)


def randomise(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Also norms and biases, whose initial 1 and 0 hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.4 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if value.is_floating_point()
        else value
        for name, value in state.items()
    }


def language_model(sizes: TransformerSizes, **options: object) -> CausalLanguageModel:
    return CausalLanguageModel(
        11,
        dim=sizes.axes()["width"],
        depth=sizes.depth,
        heads=sizes.heads,
        key_value_heads=sizes.key_value_heads,
        mlp_ratio=sizes.hidden / sizes.axes()["width"],
        context=8,
        **options,  # type: ignore[arg-type]
    ).double()


@pytest.mark.parametrize("pairing", ["offset", "adjacent"])
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize(
    ("tied", "options", "shared"),
    [
        (True, {"positions": "learned"}, None),
        (True, {"normalize_keys": True}, 2),
        (False, {}, None),
    ],
)
def test_a_wider_language_model_computes_the_same_and_shrinks_back(
    pairing: str, factor: int, tied: bool, options: dict, shared: int | None
) -> None:
    layout = causal_language_model_layout(tied=tied)
    sizes = TransformerSizes(depth=2, heads=4, head_dim=4, hidden=24, key_value_heads=shared)
    small = language_model(sizes, tied=tied, **options)
    small.load_state_dict(randomise(small.state_dict()))
    assert TransformerSizes.of_state(small.state_dict(), layout, head_dim=4).scaled() == sizes.scaled()
    wide = sizes.scaled(width=factor)
    large = language_model(wide, tied=tied, **options)
    grown = grow(small.state_dict(), layout, sizes, wide, width_pairing=pairing)
    large.load_state_dict(grown)
    ids = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(large(ids), small(ids), rtol=0, atol=1e-12)
    back = coalesce(grown, layout, wide, sizes, width_pairing=pairing)
    for name, value in small.state_dict().items():
        torch.testing.assert_close(back[name], value, rtol=0, atol=0 if factor == 2 else 1e-15)


def test_the_published_factor_on_a_tied_embedding_changes_a_pre_norm_model() -> None:
    """Halved tables instead of a divided last norm: the stream is halved, what the blocks add to it is not."""
    small = language_model(SMALL)
    small.load_state_dict(randomise(small.state_dict()))
    wide = SMALL.scaled(width=2)
    grown = grow(small.state_dict(), causal_language_model_layout(), SMALL, wide)
    for name in grown:
        if name.startswith("transformer.norm"):
            grown[name] = grown[name] * 2
        if name == "embedding.weight":
            grown[name] = grown[name] / 2
    large = language_model(wide)
    large.load_state_dict(grown)
    ids = torch.arange(8)[None]
    assert (large(ids) - small(ids)).abs().mean() > 0.01


def test_depth_shrinks_back_exactly_but_growing_it_changes_the_function() -> None:
    layout = causal_language_model_layout()
    small = language_model(SMALL)
    small.load_state_dict(randomise(small.state_dict()))
    deep = SMALL.scaled(depth=2)
    for pairing, parents in (("offset", [0, 1, 0, 1]), ("adjacent", [0, 0, 1, 1])):
        grown = grow(small.state_dict(), layout, SMALL, deep, depth_pairing=pairing)
        for layer, parent in enumerate(parents):
            name = "transformer.blocks.{}.mlp.0.weight"
            assert grown[name.format(layer)] is small.state_dict()[name.format(parent)] or torch.equal(
                grown[name.format(layer)], small.state_dict()[name.format(parent)]
            )
        back = coalesce(grown, layout, deep, SMALL, depth_pairing=pairing)
        assert all(torch.equal(back[name], value) for name, value in small.state_dict().items())
        large = language_model(deep)
        large.load_state_dict(grown)
        assert not torch.allclose(large(torch.arange(8)[None]), small(torch.arange(8)[None]), atol=1e-3)


def test_shrinking_averages_rows_and_sums_columns() -> None:
    """By hand: one head of one feature from two, hidden units 0 and 1 from pairs with their offset."""
    layout = TransformerLayout(
        {
            "{layer}.up": ("hidden", "width:read"),
            "{layer}.qkv": ("heads+key_value_heads+key_value_heads", None),
        }
    )
    large = TransformerSizes(depth=1, heads=2, head_dim=1, hidden=4)
    small = large.scaled(width=HALF)
    up = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    qkv = torch.tensor([[1.0], [3.0], [10.0], [30.0], [100.0], [300.0]])
    found = coalescing_map(layout, large, small)({"0.up": up, "0.qkv": qkv})
    assert found["0.up"].tolist() == [[(3 + 11) / 2], [(7 + 15) / 2]]
    assert found["0.qkv"].flatten().tolist() == [2.0, 20.0, 200.0]


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_encoders_compute_the_same(norm_first: bool) -> None:
    """Post-norm and pre-norm, with an embedding and an untied head of the user's own."""

    def build(width: int, heads: int, hidden: int) -> nn.ModuleDict:
        layer = nn.TransformerEncoderLayer(width, heads, hidden, 0.0, batch_first=True, norm_first=norm_first)
        encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        return nn.ModuleDict(
            {"words": nn.Embedding(7, width), "encoder": encoder, "head": nn.Linear(width, 3)}
        ).double()

    layout = encoder_layout().extended(
        {"words.weight": (None, "width"), "head.weight": (None, "width:read"), "head.bias": (None,)}
    )
    small, large = build(8, 2, 12), build(16, 4, 24)
    small.load_state_dict(randomise(small.state_dict()))
    sizes = TransformerSizes.of_state(small.state_dict(), layout, head_dim=4)
    assert sizes == TransformerSizes(2, 2, 4, 12, 8, 2)
    large.load_state_dict(grow(small.state_dict(), layout, sizes, sizes.scaled(width=2)))
    ids = torch.randint(7, (2, 5))
    first, second = (model["head"](model["encoder"](model["words"](ids))) for model in (small, large))
    torch.testing.assert_close(second, first, rtol=0, atol=1e-12)


def gpt2_state(sizes: TransformerSizes) -> dict[str, Tensor]:
    width, hidden = sizes.axes()["width"], sizes.hidden
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (9, width), "wpe.weight": (6, width)}
    for layer in range(sizes.depth):
        for name, shape in {
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "attn.c_attn.weight": (width, 3 * width),
            "attn.c_attn.bias": (3 * width,),
            "attn.c_proj.weight": (width, width),
            "attn.c_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
            "mlp.c_fc.weight": (width, hidden),
            "mlp.c_fc.bias": (hidden,),
            "mlp.c_proj.weight": (hidden, width),
            "mlp.c_proj.bias": (width,),
        }.items():
            shapes[f"h.{layer}.{name}"] = shape
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    state = randomise({f"transformer.{name}": torch.zeros(shape) for name, shape in shapes.items()})
    state |= {
        f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 6, 6).bool().tril()
        for layer in range(sizes.depth)
    }
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def attention(queries: Tensor, keys: Tensor, values: Tensor, heads: int, causal: bool) -> Tensor:
    parts = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (queries, keys, values)]
    return F.scaled_dot_product_attention(*parts, is_causal=causal).transpose(1, 2).flatten(2)


def norm(state: dict[str, Tensor], name: str, tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def gpt2(state: dict[str, Tensor], heads: int, ids: Tensor) -> Tensor:
    def conv(name: str, tokens: Tensor) -> Tensor:
        return tokens @ state[f"{name}.weight"] + state[f"{name}.bias"]

    tokens = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][: ids.shape[1]]
    for layer in range(2):
        block = f"transformer.h.{layer}"
        mixed = attention(
            *conv(f"{block}.attn.c_attn", norm(state, f"{block}.ln_1", tokens)).chunk(3, -1), heads, True
        )
        tokens = tokens + conv(f"{block}.attn.c_proj", mixed)
        hidden = F.gelu(conv(f"{block}.mlp.c_fc", norm(state, f"{block}.ln_2", tokens)), approximate="tanh")
        tokens = tokens + conv(f"{block}.mlp.c_proj", hidden)
    return norm(state, "transformer.ln_f", tokens) @ state["lm_head.weight"].T


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_names_whose_layers_are_stored_inputs_first(tied: bool) -> None:
    state = gpt2_state(SMALL)
    if not tied:
        state["lm_head.weight"] = torch.randn(9, 8, dtype=torch.float64)
    grown = grow(state, gpt2_layout(tied=tied), SMALL, SMALL.scaled(width=2))
    ids = torch.tensor([[1, 4, 2, 8]])
    torch.testing.assert_close(gpt2(grown, 4, ids), gpt2(state, 2, ids), rtol=0, atol=1e-12)
    assert torch.equal(grown["lm_head.weight"], grown["transformer.wte.weight"]) == tied
    assert grown["transformer.h.1.attn.bias"].dtype == torch.bool
    deep = grow(state, gpt2_layout(tied=tied), SMALL, SMALL.scaled(width=2, depth=2))
    back = coalesce(deep, gpt2_layout(tied=tied), SMALL.scaled(width=2, depth=2), SMALL)
    assert all(torch.equal(back[name], value) for name, value in state.items())


def bert_state(sizes: TransformerSizes) -> dict[str, Tensor]:
    width, hidden = sizes.axes()["width"], sizes.hidden
    shapes: dict[str, tuple[int, ...]] = {"cls.predictions.bias": (9,)}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def layer_norm(name: str) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    for name, rows in (("word", 9), ("position", 6), ("token_type", 2)):
        shapes[f"bert.embeddings.{name}_embeddings.weight"] = (rows, width)
    layer_norm("bert.embeddings.LayerNorm")
    for layer in range(sizes.depth):
        block = f"bert.encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            linear(f"{block}.attention.self.{name}", width, width)
        linear(f"{block}.attention.output.dense", width, width)
        layer_norm(f"{block}.attention.output.LayerNorm")
        linear(f"{block}.intermediate.dense", hidden, width)
        linear(f"{block}.output.dense", width, hidden)
        layer_norm(f"{block}.output.LayerNorm")
    linear("bert.pooler.dense", width, width)
    linear("cls.predictions.transform.dense", width, width)
    layer_norm("cls.predictions.transform.LayerNorm")
    linear("cls.seq_relationship", 2, width)
    state = randomise({name: torch.zeros(shape) for name, shape in shapes.items()})
    return state | {
        "bert.embeddings.position_ids": torch.arange(6)[None],
        "cls.predictions.decoder.weight": state["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": state["cls.predictions.bias"],
    }


def bert(state: dict[str, Tensor], heads: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    def linear(name: str, tokens: Tensor) -> Tensor:
        return F.linear(tokens, state[f"{name}.weight"], state[f"{name}.bias"])

    tables = [
        state[f"bert.embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    ]
    tokens = norm(
        state, "bert.embeddings.LayerNorm", tables[0][ids] + tables[1][: ids.shape[1]] + tables[2][0]
    )
    for layer in range(2):
        block = f"bert.encoder.layer.{layer}"
        parts = [linear(f"{block}.attention.self.{name}", tokens) for name in ("query", "key", "value")]
        mixed = linear(f"{block}.attention.output.dense", attention(*parts, heads, False))
        tokens = norm(state, f"{block}.attention.output.LayerNorm", tokens + mixed)
        hidden = linear(f"{block}.output.dense", F.gelu(linear(f"{block}.intermediate.dense", tokens)))
        tokens = norm(state, f"{block}.output.LayerNorm", tokens + hidden)
    pooled = linear("cls.seq_relationship", linear("bert.pooler.dense", tokens[:, 0]).tanh())
    words = norm(
        state,
        "cls.predictions.transform.LayerNorm",
        F.gelu(linear("cls.predictions.transform.dense", tokens)),
    )
    return linear("cls.predictions.decoder", words), pooled


def test_bert_names_with_both_heads_of_pretraining() -> None:
    state = bert_state(SMALL)
    wide = SMALL.scaled(width=2)
    grown = grow(state, bert_layout(), SMALL, wide, width_pairing="adjacent")
    ids = torch.tensor([[1, 4, 2, 8]])
    for found, expected in zip(bert(grown, 4, ids), bert(state, 2, ids)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    back = coalesce(grown, bert_layout(), wide, SMALL, width_pairing="adjacent")
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert TransformerSizes.of_state(state, bert_layout(), head_dim=4).axes() == SMALL.axes()


def test_heads_and_hidden_units_alone_may_have_any_number_of_copies() -> None:
    layout = causal_language_model_layout()
    sizes = TransformerSizes(depth=1, heads=2, head_dim=4, hidden=8, width=8)
    large = TransformerSizes(depth=1, heads=3, head_dim=4, hidden=12, width=8)
    state = randomise(language_model(SMALL.scaled(depth=HALF)).state_dict())
    state = {name: value for name, value in state.items()}
    state["transformer.blocks.0.mlp.0.weight"] = state["transformer.blocks.0.mlp.0.weight"][:8]
    state["transformer.blocks.0.mlp.0.bias"] = state["transformer.blocks.0.mlp.0.bias"][:8]
    state["transformer.blocks.0.mlp.3.weight"] = state["transformer.blocks.0.mlp.3.weight"][:, :8]
    grown = grow(state, layout, sizes, large)
    assert grown["transformer.blocks.0.attention.output.weight"].shape == (8, 12)

    def block(weights: dict[str, Tensor], heads: int, tokens: Tensor) -> Tensor:
        name = "transformer.blocks.0."
        fused = F.linear(
            tokens,
            weights[name + "attention.query_key_value.weight"],
            weights[name + "attention.query_key_value.bias"],
        )
        mixed = attention(*fused.chunk(3, -1), heads, True)
        tokens = F.linear(
            mixed, weights[name + "attention.output.weight"], weights[name + "attention.output.bias"]
        )
        hidden = F.gelu(F.linear(tokens, weights[name + "mlp.0.weight"], weights[name + "mlp.0.bias"]))
        return F.linear(hidden, weights[name + "mlp.3.weight"], weights[name + "mlp.3.bias"])

    tokens = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(block(grown, 3, tokens), block(state, 2, tokens), rtol=0, atol=1e-12)


def test_explicit_groups_take_the_place_of_a_pairing() -> None:
    layout = causal_language_model_layout()
    large = SMALL.scaled(width=2, depth=2)
    groups = {"width": [[0, 2], [1, 3]], "depth": [[0, 3], [1, 2]]}
    shrink = coalescing_map(layout, large, SMALL, groups=groups)
    assert shrink.stacks["layer"].made.tolist() == [[0.5, 0, 0, 0.5], [0, 0.5, 0.5, 0]]
    offset = coalescing_map(layout, large, SMALL)
    assert torch.equal(
        shrink.rules["embedding.weight"][1].maps[0].made,
        torch.tensor([[0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5]]).double(),
    )
    assert torch.equal(
        shrink.rules["embedding.weight"][1].maps[0]._in_blocks(1).made,
        offset.rules["embedding.weight"][1].maps[0]._in_blocks(1).made,
    )


def test_groups_that_cut_heads_apart_are_refused_and_whole_ones_are_not() -> None:
    layout, large = causal_language_model_layout(), SMALL.scaled(width=2)
    cut = [[0, 4], [1, 13], [2, 6], [3, 7], [8, 12], [9, 5], [10, 14], [11, 15]]
    with pytest.raises(InputError, match="move heads of 4 features whole and in order, got head 1 cut apart"):
        coalescing_map(layout, large, SMALL, groups={"heads": cut, "key_value_heads": cut})
    whole = [[feature, 12 + feature] for feature in range(4)] + [
        [4 + feature, 8 + feature] for feature in range(4)
    ]
    with pytest.raises(InputError, match="got head 0 cut apart"):
        turned = [whole[place] for place in (1, 0, 2, 3, 4, 5, 6, 7)]
        coalescing_map(layout, large, SMALL, groups={"heads": turned, "key_value_heads": turned})
    units, features = (
        coalescing_map(layout, large, SMALL, groups={"heads": groups}) for groups in ([[0, 3], [1, 2]], whole)
    )
    state = randomise(language_model(large).state_dict())
    for name, value in units(state).items():
        torch.testing.assert_close(features(state)[name], value)


def test_groups_of_heads_alone_are_for_their_keys_and_values_too() -> None:
    layout, wide = causal_language_model_layout(), SMALL.scaled(width=2)
    groups = {"heads": [[0, 3], [1, 2]]}
    small, large = language_model(SMALL), language_model(wide)
    small.load_state_dict(randomise(small.state_dict()))
    large.load_state_dict(grow(small.state_dict(), layout, SMALL, wide, groups=groups))
    ids = torch.arange(8)[None]
    torch.testing.assert_close(large(ids), small(ids), rtol=0, atol=1e-12)


def test_unequal_copies_of_the_stream_change_the_function() -> None:
    layout = causal_language_model_layout()
    small = language_model(SMALL)
    small.load_state_dict(randomise(small.state_dict()))
    ids = torch.arange(8)[None]
    for factor, copies in ((Fraction(3, 2), {1, 2}), (3, {3})):
        sizes = SMALL.scaled(width=factor)
        growing = growing_map(layout, SMALL, sizes)
        assert growing.rules["embedding.weight"][1].maps[0].copies == copies
        large = language_model(sizes)
        large.load_state_dict(growing(small.state_dict()))
        assert torch.allclose(large(ids), small(ids), rtol=0, atol=1e-10) == (len(copies) == 1)


def test_fused_layers_that_contradict_other_ones_are_refused() -> None:
    fused = TransformerLayout(
        {
            "qkv": ("heads+key_value_heads+key_value_heads", "width:read"),
            "out": ("width", "heads:read"),
            "up": ("hidden", "width:read"),
        }
    )
    state = {"qkv": torch.zeros(17, 8), "out": torch.zeros(8, 8), "up": torch.zeros(12, 8)}
    with pytest.raises(
        InputError, match=r"'qkv' must hold heads\+key_value_heads\+.* of heads 8, got 17 features"
    ):
        fused.axis_sizes(state)
    with pytest.raises(InputError, match="got 8 features"):
        fused.axis_sizes(state | {"qkv": torch.zeros(8, 8)})
    assert fused.axis_sizes(state | {"qkv": torch.zeros(16, 8)})["key_value_heads"] == 4
    plain = TransformerLayout(
        {"qkv": ("heads+heads+heads", None), "out": ("width", "heads:read"), "up": ("hidden", "width:read")}
    )
    with pytest.raises(InputError, match=r"'qkv' must hold heads\+heads\+heads of heads 8, got 27 features"):
        plain.axis_sizes(state | {"qkv": torch.zeros(27, 3)})


def test_pruning_keeps_layers_and_everything_else() -> None:
    model = language_model(SMALL.scaled(depth=2), normalize_keys=True)
    state = prune_layers(model.state_dict(), causal_language_model_layout(), [3, 0])
    pruned = language_model(SMALL, normalize_keys=True)
    pruned.load_state_dict(state)
    model.transformer.blocks = nn.ModuleList([model.transformer.blocks[3], model.transformer.blocks[0]])
    model.query_norms = nn.ModuleList([model.query_norms[3], model.query_norms[0]])
    model.key_norms = nn.ModuleList([model.key_norms[3], model.key_norms[0]])
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids), pruned(ids))
    with pytest.raises(InputError, match=r"kept must name units in \[0, 4\), got \[4\]"):
        prune_layers(language_model(SMALL.scaled(depth=2)).state_dict(), causal_language_model_layout(), [4])


def test_gradients_of_the_grown_model_are_the_mapped_ones() -> None:
    layout = causal_language_model_layout()
    sizes = TransformerSizes(depth=2, heads=4, head_dim=4, hidden=24, key_value_heads=2)
    small, large = language_model(sizes), language_model(sizes.scaled(width=2))
    small.load_state_dict(randomise(small.state_dict()))
    large.load_state_dict(grow(small.state_dict(), layout, sizes, sizes.scaled(width=2)))
    ids = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(2))
    for model in (small, large):
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    mapped = growing_map(layout, sizes, sizes.scaled(width=2)).of_gradients()(
        {name: parameter.grad for name, parameter in small.named_parameters()}
    )
    for name, parameter in large.named_parameters():
        torch.testing.assert_close(mapped[name], parameter.grad, rtol=0, atol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    layout, wide = causal_language_model_layout(), SMALL.scaled(width=2)
    state = language_model(SMALL).state_dict()
    with pytest.raises(InputError, match="no rule of the layout fits the tensor 'output.weight'"):
        grow(language_model(SMALL, tied=False).state_dict(), layout, SMALL, wide)
    with pytest.raises(InputError, match="the layout needs 'output.weight'"):
        grow(state, causal_language_model_layout(tied=False), SMALL, wide)
    with pytest.raises(InputError, match="small must not be larger than large, got depth 2 for 1"):
        grow(state, layout, SMALL, SMALL.scaled(depth=HALF))
    with pytest.raises(InputError, match="heads of 4 features as large has, got 2"):
        coalescing_map(layout, SMALL, TransformerSizes(2, 2, 2, 12))
    with pytest.raises(InputError, match=r"must have the shape \(any, 16\), got \(11, 8\)"):
        coalesce(state, layout, wide, SMALL)
    with pytest.raises(InputError, match='the pairing of width must be "offset" or "adjacent", got \'odd\''):
        coalescing_map(layout, wide, SMALL, width_pairing="odd")
    with pytest.raises(InputError, match="groups must be for width"):
        coalescing_map(layout, wide, SMALL, groups={"length": [[0]]})
    with pytest.raises(
        InputError, match="groups of width must make 8 features from 16, got 2 groups of 3 units"
    ):
        coalescing_map(layout, wide, SMALL, groups={"width": [[0], [1, 2]]})
    with pytest.raises(InputError, match="head_dim must divide the 8 features of the heads, got 3"):
        TransformerSizes.of_state(state, layout, head_dim=3)
    with pytest.raises(InputError, match="head_dim must be >= 1, got 0"):
        TransformerSizes.of_state(state, layout, head_dim=0)
    with pytest.raises(InputError, match="width and depth must leave heads whole and >= 1, got inf"):
        SMALL.scaled(width=math.inf)
    with pytest.raises(InputError, match="width and depth must leave heads whole and >= 1, got 0.5"):
        SMALL.scaled(width=Fraction(1, 4))
    with pytest.raises(InputError, match="depth must be >= 1, got 0"):
        TransformerSizes(0, 1, 1, 1)
    with pytest.raises(InputError, match="key_value_heads must divide heads 4, got 3"):
        TransformerSizes(1, 4, 4, 4, key_value_heads=3)
    with pytest.raises(InputError, match="dimensions of 'a' must be of width"):
        TransformerLayout({"a": ("length",)})
    shared = TransformerSizes(1, 4, 2, 8, key_value_heads=2)
    with pytest.raises(InputError, match="has other keys than its parent"):
        coalescing_map(
            layout, shared.scaled(width=2), shared, groups={"heads": [[0, 7], [1, 6], [2, 5], [3, 4]]}
        )


def test_half_precision_weights_grow_and_shrink_without_loss() -> None:
    state = {name: value.to(torch.bfloat16) for name, value in language_model(SMALL).state_dict().items()}
    wide = SMALL.scaled(width=2, depth=2)
    grown = grow(state, causal_language_model_layout(), SMALL, wide)
    assert all(value.dtype == torch.bfloat16 for value in grown.values())
    back = coalesce(grown, causal_language_model_layout(), wide, SMALL)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert math.isfinite(sum(value.float().sum().item() for value in grown.values()))
