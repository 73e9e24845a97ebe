import torch

from coloss.compression.tensor_forms import as_tensor, restored_bytes, store_bytes


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_the_smallest_form_is_taken_where_several_help():
    pruned = bf16(1024, 128)
    pruned[256:] = 0
    mask = torch.full((256, 256), float("-inf")).triu(1)
    for tensor, most in (
        (torch.zeros(300, 300), 400),
        (mask, 2000),
        (torch.arange(2048).repeat(16).float(), 4000),
        (pruned, 60_000),
    ):
        content = tensor.reshape(-1).view(torch.uint8)
        stored = store_bytes(content, {4: "F32", 2: "BF16"}[tensor.element_size()], tuple(tensor.shape))
        assert stored.kind == "deflated" and stored.nbytes < most, (stored.kind, stored.nbytes)
        assert torch.equal(restored_bytes(stored), content)
    weight = bf16(200, 100)
    assert store_bytes(weight.reshape(-1).view(torch.uint8), "BF16", (200, 100)).kind == "dfloat11"
    assert as_tensor(torch.zeros(3, dtype=torch.uint8), "F4", (6,)) is None
