import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coloss.nn import LocalBlocks


def new_network() -> LocalBlocks:
    blocks = [nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh()) for _ in range(3)]
    return LocalBlocks(
        [*blocks, nn.Linear(5, 3)], [nn.Linear(5, 3) for _ in blocks], F.cross_entropy
    ).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))


def test_backward_by_blocks_leaves_the_gradients_of_the_summed_losses():
    network, other = new_network(), new_network()
    other.load_state_dict(network.state_dict())
    inputs, targets = batch()
    output, losses = network.local_backward(inputs, targets)
    summed = other.losses(inputs, targets)
    torch.stack(summed).sum().backward()
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=1e-12)
    assert torch.equal(torch.stack(losses), torch.stack(summed).detach())
    assert not output.requires_grad and not any(loss.requires_grad for loss in losses)
    assert network.blocks[0][1].num_batches_tracked == 1


def test_no_loss_reaches_another_block():
    network = new_network()
    for number, loss in enumerate(network.losses(*batch())):
        for other, block in enumerate(network.blocks):
            reached = torch.autograd.grad(
                loss, list(block.parameters()), retain_graph=True, allow_unused=True
            )
            assert all((gradient is not None) == (other == number) for gradient in reached)


def test_one_block_is_backpropagation():
    block = nn.Linear(5, 3).double()
    inputs, targets = batch()
    F.cross_entropy(block(inputs), targets).backward()
    wanted = block.weight.grad.clone()
    block.zero_grad()
    LocalBlocks([block], [], F.cross_entropy).local_backward(inputs, targets)
    assert torch.equal(block.weight.grad, wanted)


def test_the_exported_network_has_the_same_output_and_no_heads():
    network = new_network().eval()
    inputs, _ = batch()
    exported = network.export()
    assert torch.equal(exported(inputs), network(inputs))
    assert sum(p.numel() for p in exported.parameters()) == sum(
        p.numel() for p in network.blocks.parameters()
    )


def test_bad_input():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="blocks must hold at least one module, got none"):
        LocalBlocks([], [], F.mse_loss)
    with pytest.raises(ValueError, match="one for each block but the last, 1, got 2"):
        LocalBlocks([layer, nn.Linear(2, 2)], [layer, layer], F.mse_loss)
    with pytest.raises(ValueError, match="must not share parameters, but block 1"):
        LocalBlocks([layer, layer], [nn.Identity()], F.mse_loss)
    with pytest.raises(
        ValueError, match="heads must not share parameters with other blocks, but head 1 does"
    ):
        LocalBlocks([layer, nn.Linear(2, 2), nn.Linear(2, 2)], [layer, layer], F.mse_loss)
