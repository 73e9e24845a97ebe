import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from coloss.compression import (
    compress_checkpoint,
    compress_module_,
    decompress_module_,
    open_compressed,
)
from coloss.compression.coded_layers import Scratch, is_block, is_coded
from coloss.errors import InputError
from coloss.nn import CausalLanguageModel

BLOCK_WEIGHTS = 128 * (3 * 128 + 128 + 2 * 512)


def language_model(**options) -> CausalLanguageModel:
    torch.manual_seed(0)
    model = CausalLanguageModel(300, dim=128, depth=3, heads=4, context=64, **options)
    return model.bfloat16().eval().requires_grad_(False)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.up = nn.ConvTranspose2d(64, 32, 4, stride=2)
        self.head = nn.Linear(32, 700)

    def forward(self, images):
        return self.head(self.up(self.body(self.stem(images))).mean((2, 3)))


def convolutions() -> Convolutions:
    torch.manual_seed(0)
    return Convolutions().bfloat16().eval().requires_grad_(False)


IDS = torch.arange(40).view(2, 20)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.view(torch.int16), second.view(torch.int16))


@pytest.mark.parametrize(
    ("blocks", "units"),
    [(None, 12), ("transformer.blocks", 3), (["transformer.blocks.0", "transformer.blocks.2"], 6)],
)
def test_a_language_model_gives_the_same_bits(blocks, units):
    plain, coded = language_model(), language_model()
    memory = compress_module_(coded, "transformer", blocks=blocks)
    for last_only in (False, True):
        assert same_bits(coded(IDS, last_only=last_only), plain(IDS, last_only=last_only))
    assert torch.equal(coded.generate(IDS, 4), plain.generate(IDS, 4))
    assert memory.plain_bytes == 2 * 3 * BLOCK_WEIGHTS and memory.ratio < 0.68
    largest = BLOCK_WEIGHTS if blocks else 128 * 512
    assert memory.scratch_bytes == 2 * largest
    assert len(memory.units) == units


def test_convolutions_give_the_same_bits():
    plain, coded = convolutions(), convolutions()
    memory = compress_module_(coded)
    images = torch.randn(2, 3, 9, 9).bfloat16()
    assert same_bits(coded(images), plain(images))
    # The stem has 1,728 weights: too few to code.
    assert set(memory.units) == {"body.0", "up", "head"}
    assert type(coded.stem) is nn.Conv2d and isinstance(coded.up, nn.ConvTranspose2d)


def test_what_stays_in_memory_is_the_codes_and_one_unit():
    model = language_model()
    whole = sum(p.nbytes for p in model.parameters())
    memory = compress_module_(model, "transformer.blocks", blocks="transformer.blocks")
    scratch = Scratch.on(torch.device("cpu"))
    low = scratch.buffer.data_ptr()
    model(IDS)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert held == memory.other_bytes == whole - memory.plain_bytes
    assert memory.other_bytes + memory.coded_bytes + memory.scratch_bytes < whole
    assert all("weight" not in part.__dict__ for part in model.modules() if is_coded(part))
    places = []
    for block in model.transformer.blocks:
        with block._unit.decoded():
            places.append(block.mlp[0].weight.data_ptr())
    # The weights of all blocks come to the same place, in the one buffer.
    assert (
        scratch.buffer.data_ptr() == low
        and len(set(places)) == 1
        and low <= places[0] < low + scratch.buffer.nbytes
    )


def test_decoding_allocates_nothing_of_the_size_of_a_unit():
    import tracemalloc

    layer = nn.Linear(2048, 512, bias=False).bfloat16().eval().requires_grad_(False)
    compress_module_(layer)
    inputs = torch.ones(1, 2048).bfloat16()
    layer(inputs)
    tracemalloc.start()
    before = Scratch.on(torch.device("cpu")).buffer.data_ptr()
    layer(inputs)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert Scratch.on(torch.device("cpu")).buffer.data_ptr() == before
    pytest.importorskip("numba")
    assert peak < 2048 * 512 // 4


def test_a_weight_read_outside_of_its_forward_is_an_error_that_says_why():
    model = language_model()
    assert model.output is None
    compress_module_(model, blocks="transformer.blocks")
    with pytest.raises(
        AttributeError, match=r"the weight of embedding is coded.*keep it plain with keep=\[...\]"
    ):
        model(IDS)  # the embedding is the output layer, too
    layer = model.transformer.blocks[1].mlp[0]
    with pytest.raises(AttributeError, match="while the forward of transformer.blocks.1 runs"):
        layer.weight.sum()
    assert not hasattr(layer, "weight") and layer.bias.shape == (512,)
    with pytest.raises(AttributeError, match="no attribute 'wait'"):
        _ = layer.wait
    kept = language_model()
    memory = compress_module_(kept, blocks="transformer.blocks", keep="embedding")
    assert same_bits(kept(IDS), language_model()(IDS))
    assert set(memory.units) == {f"transformer.blocks.{n}" for n in range(3)}


def test_training_and_gradients_are_refused_in_one_line():
    model = language_model()
    with pytest.raises(InputError, match="module must be in evaluation mode.*call eval()"):
        compress_module_(model.train())
    model.eval().transformer.blocks[0].mlp[0].weight.requires_grad_(True)
    with pytest.raises(InputError, match=r"weight of transformer.blocks.0.mlp.0 must not require gradients"):
        compress_module_(model)
    layer = nn.Linear(200, 100).bfloat16().eval().requires_grad_(False)
    compress_module_(layer)
    inputs = torch.randn(2, 200).bfloat16().requires_grad_(True)
    with pytest.raises(InputError, match="through which no gradients flow: run it under torch.no_grad()"):
        layer(inputs)
    with torch.no_grad():
        layer(inputs)
    with pytest.raises(
        InputError, match="cannot be trained: call eval() first".replace("(", r"\(").replace(")", r"\)")
    ):
        layer.train()(inputs.detach())


def test_gradients_that_slip_through_a_block_meet_an_error_not_a_wrong_weight():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(200, 100)

        def forward(self, x):
            return F.linear(x, self.inner.weight)

    block = Reads().bfloat16().eval().requires_grad_(False)
    compress_module_(block, blocks="")
    inputs = torch.randn(2, 200).bfloat16().requires_grad_(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        block(inputs).sum().backward()


def test_the_state_dict_is_the_plain_one_and_loads_both_ways():
    plain, coded = language_model(), language_model()
    compress_module_(coded, "transformer", blocks="transformer.blocks")
    state = coded.state_dict()
    assert set(state) == set(plain.state_dict())
    assert all(same_bits(state[name], value) for name, value in plain.state_dict().items())
    torch.manual_seed(5)
    other = CausalLanguageModel(300, dim=128, depth=3, heads=4, context=64).bfloat16().eval()
    other.load_state_dict(state)
    with torch.no_grad():
        assert same_bits(other(IDS), plain(IDS))
    # And into a coded model, which codes other weights anew.
    changed = {name: value * 2 for name, value in state.items()}
    coded.load_state_dict(changed)
    other.load_state_dict(changed)
    with torch.no_grad():
        assert same_bits(coded(IDS), other(IDS))
    with pytest.raises(RuntimeError, match="Missing key.*transformer.blocks.0.mlp.0.weight"):
        coded.load_state_dict({k: v for k, v in state.items() if k != "transformer.blocks.0.mlp.0.weight"})
    with pytest.raises(RuntimeError, match="size mismatch for transformer.blocks.0.mlp.0.weight"):
        coded.load_state_dict(state | {"transformer.blocks.0.mlp.0.weight": torch.zeros(2, 2)})


def test_undone_it_is_what_it_was():
    plain, coded = language_model(), language_model()
    compress_module_(coded, "transformer", blocks="transformer.blocks")
    assert any(is_block(part) for part in coded.modules())
    decompress_module_(coded)
    assert [type(part) for part in coded.modules()] == [type(part) for part in plain.modules()]
    assert list(coded.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in coded.named_buffers()] == [name for name, _ in plain.named_buffers()]
    assert all(same_bits(*pair) for pair in zip(coded.parameters(), plain.parameters(), strict=True))
    assert same_bits(coded(IDS), plain(IDS))
    with pytest.raises(InputError, match="CausalLanguageModel has no coded layers"):
        decompress_module_(coded)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        self.head = nn.Linear(64, 300, bias=False)
        self.head.weight = self.embed.weight
        self.body = nn.Linear(64, 64)

    def forward(self, ids):
        return self.head(self.embed(ids))


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied().bfloat16().eval().requires_grad_(False)


def test_tied_weights_are_coded_once_and_stay_tied(tmp_path):
    plain, model = tied(), tied()
    memory = compress_module_(model)
    assert memory.plain_bytes == 2 * 300 * 64
    assert model.embed._coded is model.head._coded
    assert same_bits(model(IDS), plain(IDS))
    state = model.state_dict()
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()
    other = copy.deepcopy(model)
    assert other.embed._coded is other.head._coded
    decompress_module_(model)
    assert model.embed.weight is model.head.weight
    # Where one of the two is kept, the plain weight is there anyway.
    kept = tied()
    with pytest.raises(InputError, match="has no layer that coding makes smaller"):
        compress_module_(kept, ["embed", "head"], keep="head")
    for names in (["embed.weight", "body.weight", "body.bias"], [*plain.state_dict()]):
        path = tmp_path / f"{len(names)}.safetensors"
        save_file({name: plain.state_dict()[name].clone() for name in names}, path)
        with torch.device("meta"):
            opened = Tied()
            opened.head.weight = opened.embed.weight
        memory = open_compressed(compress_checkpoint(path).path, opened)
        assert memory.plain_bytes == 2 * 300 * 64
        assert same_bits(opened(IDS), plain(IDS))


def test_copies_and_other_models_live_beside_it():
    first, second, plain = language_model(), convolutions(), language_model()
    compress_module_(first, "transformer", blocks="transformer.blocks")
    compress_module_(second)
    other = copy.deepcopy(first)
    images = torch.randn(1, 3, 9, 9).bfloat16()
    expected = convolutions()(images)
    for _ in range(2):
        assert same_bits(first(IDS), plain(IDS)) and same_bits(second(images), expected)
    layer = other.transformer.blocks[0].mlp[0]
    assert layer._unit is other.transformer.blocks[0]._unit is not first.transformer.blocks[0]._unit
    assert layer._coded.stored is first.transformer.blocks[0].mlp[0]._coded.stored
    del first
    assert same_bits(other(IDS), plain(IDS))
    decompress_module_(other)
    assert same_bits(other(IDS), plain(IDS))


def test_units_inside_units_and_a_layer_inside_itself():
    class Nested(nn.Module):
        """Its second layer runs within the first one's block; `again` calls a layer from within its own forward."""

        def __init__(self) -> None:
            super().__init__()
            self.block = nn.ModuleDict({"a": nn.Linear(128, 128), "b": nn.Linear(128, 128)})
            self.outside = nn.Linear(128, 128)

        def forward(self, x):
            return self.block["b"](self.outside(self.block["a"](x)))

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Nested()
            self.again = nn.Linear(128, 128)

        def forward(self, x):
            return self.again(self.again(self.inner(x)))

    torch.manual_seed(0)
    plain = Root().bfloat16().eval().requires_grad_(False)
    coded = copy.deepcopy(plain)
    compress_module_(coded)
    # A unit in another one's forward: its weights must not overwrite those.
    first = coded.inner.block["a"]
    first.register_forward_pre_hook(lambda layer, inputs: (coded.inner.outside(inputs[0]) * 0 + inputs[0],))
    x = torch.randn(3, 128).bfloat16()
    assert same_bits(coded(x), plain(x))
    with coded.again._unit.decoded():
        before = coded.again.weight.clone()
        with torch.inference_mode():
            inside = coded.inner(x)  # other units within this one
        with coded.again._unit.decoded():
            assert same_bits(coded.again(x), plain.again(x))
        assert same_bits(coded.again.weight, before) and same_bits(inside, plain.inner(x))
    assert not hasattr(coded.again, "weight")


def test_an_exception_in_a_forward_leaves_it_clean():
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(200, 100)
            self.error: BaseException | None = None

        def forward(self, x):
            x = self.layer(x)
            if self.error is not None:
                raise self.error
            return x

    torch.manual_seed(0)
    model = Fails().bfloat16().eval().requires_grad_(False)
    x = torch.randn(2, 200).bfloat16()
    expected = model(x)
    compress_module_(model, blocks="")
    for error in (ValueError("broken"), KeyboardInterrupt()):
        model.error = error
        with pytest.raises(type(error)):
            model(x)
        assert not hasattr(model.layer, "weight")
        assert Scratch.on(torch.device("cpu"))._used == 0
        model.error = None
        assert same_bits(model(x), expected)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x[:, :5])
    assert same_bits(model(x), expected)


def test_threads_take_turns():
    model, plain = language_model(), language_model()
    compress_module_(model, "transformer")
    batches = [torch.randint(300, (1, 10), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        for _ in range(3):
            found[number] = model(batches[number])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(found[n], plain(batches[n])) for n in range(4))


def test_other_types_and_devices():
    layer = nn.Linear(200, 100).bfloat16().eval().requires_grad_(False)
    compress_module_(layer)
    assert layer.to("cpu", torch.bfloat16) is layer
    for change in (layer.half, layer.float, lambda: layer.to(torch.float64)):
        with pytest.raises(InputError, match="has a coded bfloat16 weight, which has no other type"):
            change()
    assert "weight coded in" in repr(layer)
    with pytest.raises(InputError, match="the weight of 0 must be bfloat16, got torch.float32"):
        compress_module_(nn.Sequential(nn.Linear(200, 100)).eval().requires_grad_(False), "0")
    with pytest.raises(InputError, match="Sequential has no bfloat16 layer to code: call bfloat16()"):
        compress_module_(nn.Sequential(nn.Linear(200, 100)).eval().requires_grad_(False))


def test_bad_paths_are_named():
    model = language_model()
    with pytest.raises(InputError, match="layers must be paths of the model, got 'transformr'"):
        compress_module_(model, "transformr")
    with pytest.raises(
        InputError, match="blocks must be paths of the model, got 'transformer.block'; did you mean"
    ):
        compress_module_(model, blocks="transformer.block")
    with pytest.raises(InputError, match="blocks must lie beside one another, got 'transformer.blocks.0'"):
        compress_module_(model, blocks=["transformer", "transformer.blocks.0"])
    with pytest.raises(InputError, match="blocks must hold layers to code, got 'transformer.norm'"):
        compress_module_(model, blocks="transformer.norm")
    compress_module_(model, "transformer.blocks.0")
    with pytest.raises(InputError, match="module has coded layers already"):
        compress_module_(model)
    with pytest.raises(InputError, match="has no layer that coding makes smaller"):
        compress_module_(nn.Linear(10, 10).bfloat16().eval().requires_grad_(False))
