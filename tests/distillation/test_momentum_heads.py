import copy

import pytest
import torch
import torch.nn.functional as F
from contract import SGD, check_loops, check_resume
from torch import nn

import coloss
from coloss import Budget, TrainingStep
from coloss.distillation import (
    ImageDecoder,
    LocalLearning,
    MomentumAuxHead,
    MomentumLocalLearning,
    block_weights,
    convolutional_head,
)
from coloss.distillation.momentum_heads import CLAIM, SYSTEM
from coloss.errors import InputError
from coloss.lab import find_entry, verify
from coloss.lab.catalog import import_name
from coloss.nn import MLP, Classifier, ConvNet, Transformer
from coloss.nn.resnet import PostactivationBlock


def moved(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1.0)
    return layer


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_the_average_in_closed_form(decay):
    layer = nn.Linear(3, 3).double()
    start = layer.weight.detach().clone()
    head = MomentumAuxHead(layer, nn.Identity(), decay)
    moved(layer)
    for _ in range(7):
        head.update()
    wanted = layer.weight + decay**7 * (start - layer.weight)
    torch.testing.assert_close(head.average.module.weight, wanted, rtol=0, atol=1e-12)
    assert torch.equal(head.free.weight, start)


def test_both_copies_begin_as_the_next_layer():
    """The authors' constructor draws all weights anew after the copies are made."""
    layer = PostactivationBlock(2, 4, 2, 2, 3)
    head = MomentumAuxHead(layer, nn.Identity())
    for other in (head.average.module, head.free):
        assert all(
            torch.equal(one, two) for one, two in zip(layer.parameters(), other.parameters(), strict=True)
        )


def test_the_gradient_passes_through_the_average_and_leaves_it_alone():
    layer = PostactivationBlock(2, 2, 1, 2, 3)
    head = MomentumAuxHead(layer, nn.Flatten(), learnable=None)
    x = torch.randn(4, 2, 4, 4, requires_grad=True)
    head(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in head.average.parameters())
    assert not any(parameter.requires_grad for parameter in head.average.parameters())
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_a_zero_free_copy_and_no_memory_are_the_next_layer_itself():
    layer = nn.Linear(3, 3)
    head = MomentumAuxHead(layer, nn.Linear(3, 2), decay=0.0)
    with torch.no_grad():
        for parameter in head.free.parameters():
            parameter.zero_()
    moved(layer)
    head.update()
    x = torch.randn(5, 3)
    assert torch.equal(head(x), head.head(layer(x)))


def test_the_average_normalises_by_batch_in_training_and_by_the_layers_statistics_after():
    layer = nn.Sequential(nn.BatchNorm1d(3))
    head = MomentumAuxHead(layer, nn.Identity(), learnable=None)
    x = 5 + torch.randn(50, 3)
    assert head(x).mean().abs() < 1e-5
    layer(x)
    head.update()
    assert torch.equal(head.average.module[0].running_mean, layer[0].running_mean)
    assert not head.eval().average.module.training
    torch.testing.assert_close(head(x), layer.eval()(x))


def test_affine_begins_as_the_average_alone():
    layer = nn.Conv2d(2, 3, 3)
    x = torch.randn(2, 2, 5, 5)
    head = MomentumAuxHead(layer, nn.Identity(), learnable="affine", width=3)
    assert torch.equal(head(x), layer(x)) and head.scale.shape == (3,)


def test_weights_go_linearly_from_block_to_block():
    assert block_weights(5, 5.0, 2.0) == pytest.approx([5.0, 4.0, 3.0, 2.0])
    assert block_weights(3, 5.0, 0.0) == [5.0, 0.0] and block_weights(1, 5.0, 0.0) == []
    # The published schedule, by resolution stage, is negative for few blocks.
    assert all(weight >= 0 for blocks in range(2, 20) for weight in block_weights(blocks, 5.0, 0.0))


def new_images(count=8):
    return torch.rand(count, 1, 8, 8), torch.randint(3, (count,))


def test_losses_worked_by_hand():
    inputs, targets = new_images()
    inputs = 2 * inputs - 1
    model = Classifier(ConvNet(1, (4, 4, 4), downsample=False), 3)
    method = MomentumLocalLearning(
        inputs[:2], task_weight=(0.5, 1.0), image_weight=(5.0, 0.0), image_range=(-1.0, 1.0)
    )
    step = TrainingStep(model, F.cross_entropy, [method])
    stages, heads = copy.deepcopy(model.backbone.stages), copy.deepcopy(method.heads)
    step(inputs, targets)
    assert [head.decoder is not None for head in method.heads] == [True, False]
    x = stages[0](inputs)
    seen = heads[0].free(x) + heads[0].average.module(x)
    pixels = F.binary_cross_entropy(torch.sigmoid(heads[0].decoder(seen)), (inputs + 1) / 2)
    wanted = 0.5 * F.cross_entropy(heads[0].head(seen), targets) + 5.0 * pixels
    torch.testing.assert_close(method.block_losses[0], wanted.detach())


def test_only_a_block_and_its_head_learn_from_its_loss():
    inputs, targets = new_images()
    model = Classifier(ConvNet(1, (4, 4, 8)), 3)
    method = MomentumLocalLearning(inputs[:2], image_weight=(1.0, 1.0))
    step = TrainingStep(model, F.cross_entropy, [method], combine={"cross_entropy": 0.0})
    step.backward(step(inputs, targets))
    optimized = {id(parameter) for parameter in step.trainable}
    for number, head in enumerate(method.heads):
        assert not any(id(parameter) in optimized for parameter in head.average.parameters())
        assert all(parameter.grad is not None for parameter in head.decoder.parameters())
        assert model.backbone.stages[number][0].weight.grad.any()
    assert not model.backbone.stages[2][0].weight.grad.any()  # the next layer itself never learns from it


def test_the_average_follows_after_each_step_and_everything_is_gone_at_the_end():
    data = new_images(16)
    model = Classifier(ConvNet(1, (4, 4)), 3)
    names = list(model.state_dict())
    method = MomentumLocalLearning(data[0][:2], decay=0.0)
    run = coloss.fit(
        model, data, F.cross_entropy, [method], budget=Budget(steps=3), batch_size=8, optimizer=SGD
    )
    assert int(method.heads[0].average.updates) == 3
    assert torch.equal(method.heads[0].average.module[0].weight, model.backbone.stages[1][0].weight)
    assert run.model is model and list(model.state_dict()) == names
    assert not any(module._forward_hooks for module in model.modules())


def test_tokens_and_arguments():
    tokens = torch.randn(4, 5, 8)
    method = MomentumLocalLearning(tokens[:1], learnable="affine")
    step = TrainingStep(Transformer(8, 3, 2), F.mse_loss, [method])
    step.backward(step(tokens, tokens))
    assert method.heads[0].scale.grad.shape == (8,)


def test_a_head_that_takes_arguments_gets_those_of_the_layer():
    class Head(nn.Linear):
        takes_arguments = True
        seen: tuple = ()

        def forward(self, x, *args, **kwargs):
            self.seen = (len(args), sorted(kwargs))
            return super().forward(x)

    tokens, found = torch.randn(2, 5, 8), []
    for kind in (LocalLearning, MomentumLocalLearning):
        method = kind(tokens[:1], head=lambda layers, index: Head(8, 8))
        TrainingStep(Transformer(8, 3, 2), F.mse_loss, [method])(tokens, tokens)
        found += [part.seen for part in method.heads[0].modules() if isinstance(part, Head)]
    assert found[0] == found[1] != ()


def test_runs_alike_everywhere_and_resumes(tmp_path):
    batches = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(2)]
    new_method = lambda: MomentumLocalLearning(batches[0][0][:2], decay=0.5, loss=F.cross_entropy)  # noqa: E731
    check_loops(lambda: MLP(6, [6] * 3, 3), new_method, batches, F.cross_entropy)
    data = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    check_resume(
        lambda: MLP(6, [6] * 3, 3),
        new_method,
        data,
        tmp_path,
        F.cross_entropy,
        steps=5,
        kill_at=3,
        checkpoint_every=2,
    )


def test_decoder_and_convolutional_head():
    maps = torch.randn(2, 8, 4, 4)
    assert ImageDecoder(8, (3, 9, 7))(maps).shape == (2, 3, 9, 7)
    assert convolutional_head(8, 5, 0, None)(maps).shape == (2, 5)
    assert sum(isinstance(part, nn.Conv2d) for part in convolutional_head(8, 5)) == 2
    with pytest.raises(ValueError, match="convolutions must be >= 0, got -1"):
        convolutional_head(8, 5, -1)


def test_bad_input():
    example = torch.zeros(2, 6)
    with pytest.raises(InputError, match=r"decay must be in \[0, 1\], got 2"):
        MomentumLocalLearning(example, decay=2.0)
    with pytest.raises(InputError, match='learnable must be "layer" where momentum=False'):
        MomentumLocalLearning(example, momentum=False, learnable=None)
    with pytest.raises(InputError, match="image_weight must be two finite numbers >= 0"):
        MomentumLocalLearning(example, image_weight=(-1.0, 0.0))
    with pytest.raises(InputError, match="image_range must be two rising numbers"):
        MomentumLocalLearning(example, image_range=(1.0, 0.0))
    with pytest.raises(InputError, match="image_weight needs images"):
        TrainingStep(
            MLP(6, [6, 6], 3), F.cross_entropy, [MomentumLocalLearning(example, image_weight=(1.0, 1.0))]
        )
    inputs, targets = new_images()
    step = TrainingStep(
        Classifier(ConvNet(1, (4, 4)), 3),
        F.cross_entropy,
        [MomentumLocalLearning(inputs[:2], image_weight=(1.0, 1.0))],
    )
    with pytest.raises(
        InputError, match=r"image_range must hold all inputs, got \(0.0, 1.0\) and inputs from"
    ):
        step(inputs - 3, targets)
    with pytest.raises(ValueError, match="num_blocks must be >= 1, got 0"):
        block_weights(0, 1.0, 1.0)


def test_the_catalog_entry_names_what_exists():
    entry = find_entry("man")
    assert entry.has_claim and import_name(entry.method) is MomentumLocalLearning
    assert [import_name(path).__name__ for path in SYSTEM.api] == [path.split(".")[-1] for path in SYSTEM.api]


def test_the_claim_runs():
    found = verify("man", smoke=True, seeds=1)
    assert {CLAIM.baseline, CLAIM.method, "trainable copy only"} == set(found["arms"])
    assert found["arms"]["man"]["metrics"]["saved_bytes_share_depth_16"]["mean"] < 0.65
