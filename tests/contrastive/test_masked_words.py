"""Words are masked as often as they should be, the image starts without influence, and after training it helps to guess."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_two_processes
from lightning_fabric import Fabric
from torch import Tensor

from coloss.contrastive import FusedMaskedLM, ImageFusion, mask_tokens
from coloss.nn import ImagePatches, TokenEncoder, Words
from coloss.ops import rank, world_size


def new_encoder(depth: int = 3, **options) -> TokenEncoder:
    torch.manual_seed(2)
    return TokenEncoder(Words(20, 8, max_length=6), 8, depth, heads=2, **options)


def test_shares_of_masked_exchanged_and_kept_words():
    ids = torch.randint(3, 1000, (400, 100))
    hidden, targets = mask_tokens(ids, 1000, generator=torch.Generator().manual_seed(0))
    chosen = targets != -100
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(targets[chosen], ids[chosen])
    assert torch.equal(hidden[~chosen], ids[~chosen])
    assert (hidden[chosen] == 2).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (hidden[chosen] == ids[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert int(hidden.min()) >= 2


def test_padding_unknown_and_mask_are_never_chosen():
    ids = torch.tensor([[0, 1, 2, 5, 0]])
    hidden, targets = mask_tokens(ids, 6, probability=1.0)
    assert targets.tolist() == [[-100, -100, -100, 5, -100]]
    assert torch.equal(hidden[targets == -100], ids[targets == -100])
    assert ids.tolist() == [[0, 1, 2, 5, 0]]


def test_the_same_generator_masks_the_same_words():
    ids = torch.randint(3, 20, (8, 6))
    first, second = (mask_tokens(ids, 20, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("options", [{}, {"registers": 2}, {"pool": "cls"}])
@pytest.mark.parametrize("tied", [True, False])
def test_at_first_the_image_changes_nothing(options, tied):
    encoder = new_encoder(**options)
    model = FusedMaskedLM(encoder, image_dim=5, tied=tied)
    hidden, targets = mask_tokens(torch.randint(3, 20, (4, 6)), 20, probability=0.5)
    unfused = model(hidden, None, targets)
    assert torch.equal(model(hidden, torch.randn(4, 9, 5), targets), unfused)
    weight = encoder.tokenizer.embedding.weight if tied else model.untied.weight
    logits = F.linear(encoder.encode(hidden), weight, model.bias)
    torch.testing.assert_close(
        unfused, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    )
    assert not any(block._forward_hooks for block in encoder.transformer.blocks)


def test_the_image_enters_after_each_third_or_where_it_is_told_to():
    assert [FusedMaskedLM(new_encoder(depth), 5).layers for depth in (1, 2, 3, 6, 12)] == [
        (0,),
        (0, 1),
        (0, 1, 2),
        (1, 3, 5),
        (3, 7, 11),
    ]
    model = FusedMaskedLM(new_encoder(), 5, layers=(2, 0))
    for fusion in model.fusions:
        torch.nn.init.normal_(fusion.out.weight)
    ids, stages = torch.randint(3, 20, (4, 6)), [torch.randn(4, 9, 5), torch.randn(4, 3, 5)]
    encoder = model.text_encoder
    tokens = encoder.tokenizer(ids)
    tokens = model.fusions[1](encoder.transformer.blocks[0](tokens), stages[1])
    tokens = model.fusions[0](encoder.transformer.blocks[2](encoder.transformer.blocks[1](tokens)), stages[0])
    torch.testing.assert_close(model.encode(ids, stages), encoder.transformer.norm(tokens))


def test_the_encoder_is_not_the_module_s_own():
    encoder = new_encoder()
    model = FusedMaskedLM(encoder, 5)
    own = {id(p) for p in encoder.parameters()}
    assert not own & {id(p) for p in model.parameters()}
    hidden, targets = mask_tokens(torch.randint(3, 20, (4, 6)), 20, probability=0.5)
    model(hidden, torch.randn(4, 9, 5), targets).backward()
    assert encoder.tokenizer.embedding.weight.grad is not None


def test_no_masked_word_costs_nothing_and_reaches_every_parameter():
    model = FusedMaskedLM(new_encoder(), 5)
    ids = torch.randint(3, 20, (4, 6))
    loss = model(ids, torch.randn(4, 9, 5), torch.full_like(ids, -100))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and bool((p.grad == 0).all()) for p in model.parameters())


def test_half_precision_costs_a_finite_float32_loss():
    encoder = new_encoder().bfloat16()
    model = FusedMaskedLM(encoder, 5).bfloat16()
    hidden, targets = mask_tokens(torch.randint(3, 20, (4, 6)), 20, probability=0.5)
    loss = model(hidden, torch.randn(4, 9, 5).bfloat16(), targets)
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_a_trained_fusion_guesses_better_with_the_image_than_with_another():
    torch.manual_seed(0)
    encoder = new_encoder(depth=1)
    model = FusedMaskedLM(encoder, image_dim=20)
    optimizer = torch.optim.Adam([*model.parameters(), *encoder.parameters()], lr=1e-2)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.randint(3, 20, (64, 4))
        return *mask_tokens(ids, 20, probability=0.3), F.one_hot(ids, 20).float()

    for _ in range(80):
        hidden, targets, image = batch()
        optimizer.zero_grad()
        model(hidden, image, targets).backward()
        optimizer.step()
    hidden, targets, image = batch()
    with torch.no_grad():
        assert model(hidden, image, targets) < model(hidden, image.roll(1, 0), targets) - 0.3


def test_bad_input_is_named(as_users_call):
    ids = torch.randint(3, 20, (4, 6))
    for call, message in (
        (lambda: mask_tokens(ids, 20, probability=2.0), r"probability must be in \[0, 1\], got 2.0"),
        (lambda: mask_tokens(ids, 3), "vocabulary_size must be > 3, got 3"),
        (lambda: FusedMaskedLM(new_encoder(causal=True), 5), "text_encoder must not be causal"),
        (
            lambda: FusedMaskedLM(new_encoder(), 5, layers=(3,)),
            r"layers must be different ones of 0 .. 2, got \[3\]",
        ),
        (lambda: FusedMaskedLM(new_encoder(), 5).encode(ids, [ids]), "one for each of 3 layers, got 1"),
        (lambda: ImageFusion(8, 5, heads=3), "heads must divide dim 8, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="text_encoder must be over Words, got ImagePatches"):
        FusedMaskedLM(TokenEncoder(ImagePatches(8, 4, 1, dim=8), 8, 1, 2), 5)


def test_two_processes_average_over_all_their_words(tmp_path: Path):
    ids = torch.randint(3, 20, (8, 6))
    hidden, targets = mask_tokens(ids, 20, probability=0.4)

    def work(fabric: Fabric) -> dict[str, Tensor]:
        model = FusedMaskedLM(new_encoder().double(), 5).double()
        own = slice(None) if world_size() == 1 else (slice(0, 2), slice(2, 8))[rank()]
        return {"loss": model(hidden[own], None, targets[own])}

    check_two_processes(work, tmp_path)
