"""What `test_compiled` runs in a process of its own, where no type checks stand between the compiler and the losses.

Prints, for each loss, the largest differences in value and gradient between the compiled and the plain function, as JSON.
"""

import json
import sys

import torch
import torch.nn.functional as F

from coloss import ops

SAMPLES = 40

LOSSES = {
    "info_nce": lambda x, y: ops.info_nce_loss(x, y, symmetric=True, ids=torch.arange(SAMPLES) // 2),
    "supervised": lambda x, y: ops.supervised_contrastive_loss(x, torch.arange(SAMPLES) // 2),
    "hard_info_nce": lambda x, y: ops.hard_info_nce_loss(x, y, 3, ids=torch.arange(SAMPLES) // 2),
    "hard_supervised": lambda x, y: ops.hard_supervised_contrastive_loss(x, torch.arange(SAMPLES) // 2, 3),
    "soft": lambda x, y: ops.soft_contrastive_loss(x, y, torch.eye(SAMPLES).double()),
    "decoupled": lambda x, y: ops.decoupled_softmax_loss(x, y, torch.arange(SAMPLES).expand(2, -1)),
    "sigmoid": lambda x, y: ops.sigmoid_pair_loss(x, y, torch.tensor(0.1), torch.tensor(-3.0)),
    "pair_margin": lambda x, y: ops.pair_margin_loss(x, torch.arange(SAMPLES) // 2),
    "triplet": lambda x, y: ops.triplet_margin_loss(x, torch.arange(SAMPLES) // 2, mining="semi-hard"),
    "pairwise_logistic": lambda x, y: ops.pairwise_logistic_loss(x[:, 0], y[:, 1], 0.1),
}

if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    x, y = (
        F.normalize(torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)).requires_grad_()
        for _ in range(2)
    )
    found = {}
    for name, loss in LOSSES.items():
        plain = loss(x, y)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y)
        (expected,), (got,) = torch.autograd.grad(plain, x), torch.autograd.grad(compiled, x)
        found[name] = [abs(plain - compiled).item(), (expected - got).abs().max().item()]
    sys.stdout.write(json.dumps(found))
