"""One of two processes of `test_batch_norm.py`: `python sync_batch_norm_process.py RANK FOLDER`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from coloss.nn import SyncBatchNorm1d


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    given = load_file(folder / "given.safetensors")
    results = {}
    for case in ("rows", "series", "ragged", "half"):
        norm = SyncBatchNorm1d(3, momentum=None if case == "rows" else 0.3).double()
        with torch.no_grad():
            norm.weight.copy_(given["weight"])
            norm.bias.copy_(given["bias"])
        start, stop = given[f"{case}.bounds"].tolist()[rank : rank + 2]
        inputs = given[case][start:stop]
        if case == "half":
            norm = norm.float()
            inputs = inputs.bfloat16()
        inputs = inputs.clone().requires_grad_()
        for _ in range(2):
            outputs = norm(inputs)
        # The factor 2 undoes the average over processes below: the loss is a sum over all rows.
        loss = 2 * (outputs * given[f"{case}.direction"][start:stop].to(outputs)).sum()
        loss.backward()
        for parameter in norm.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        results |= {
            f"{case}.outputs": outputs.detach(),
            f"{case}.input_gradient": inputs.grad / 2,
            f"{case}.weight_gradient": norm.weight.grad,
            f"{case}.bias_gradient": norm.bias.grad,
            f"{case}.running_mean": norm.running_mean,
            f"{case}.running_var": norm.running_var,
            f"{case}.evaluated": norm.eval()(inputs.detach()),
        }
    single = SyncBatchNorm1d(3)
    try:
        single(torch.ones(1 - rank, 3))
        results["single_value_refused"] = torch.tensor(0)
    except ValueError:
        results["single_value_refused"] = torch.tensor(1)
    results["plain_is_used_elsewhere"] = torch.tensor(isinstance(single, nn.BatchNorm1d))
    save_file(results, folder / f"result{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
