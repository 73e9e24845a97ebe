r"""Turns a training set into a handful of synthetic images of each class on which fresh networks train well.

Alignment with smooth expert trajectories (AST): Shen, Yang, Lam, 2023, arXiv 2310.10541; base: matching training trajectories (MTT),
Cazenavette et al., 2022, arXiv 2203.11932. Experts train on real data and their parameters are kept after each epoch; a student
starts where an expert was and takes N steps on synthetic images x with a learned rate a, and x and a are moved so that the student
arrives where the expert arrived M epochs later:

    theta_{n+1} = theta_n - a * grad cross_entropy(f(theta_n; augment(x)), y)        unroll
    loss = |theta_N - expert_{s+M}|^2 / |expert_s - expert_{s+M}|^2                  trajectory_matching_loss

A stronger expert (momentum) helps only if its parameters change at an even pace; `step_lengths` shows the pace. Here it is made even
by a ramp on the loss (`loss_ramp`) and, if asked for, by `input_gradient_penalty`. On the student's side, each an option: points
between are matched, too (`intermediate`), K-means start, inner momentum, balanced inner loss, perturbed start.

    distill_dataset("mnist:10", "runs/mnist-10")                 experts, images, distilled.npz, what it is worth
    DistilledDataset.load("runs/mnist-10/distilled.npz")         images, labels, learned rate, statistics, source
    evaluate_distilled(path, splits, network)                    fresh networks of any architecture, final accuracy

On the command line `coloss run dataset-distillation --data mnist:10` does the first, and the same with `--data .../distilled.npz` judges
a file again. Accuracy is that of the last step, mean and interval over fresh networks: the published code reports the best test
accuracy of all epochs of one network, which is no estimate of anything.

Other departures: the learned rate is a logarithm (no negative rates), images are moved by Adam with a clipped gradient, K-means takes
as many clusters as images are asked for, and networks with batch norm or dropout are refused, since running statistics are not matched and a draw
is not the same when a step is computed again. The
balance factors, the ramp and the place of the learning rate's decay follow the published code.

When it helps: where a set of a few images must do the work of all, to be shown, sent, or trained on very often. When not: where
K-means centres do as well, and for one training, since making the set costs many. Measured on digits, one image a
class, 5 seeds: 93.2% of test images with smooth experts, 88.9% after training on the ten class means (difference +4.3 points, 95% interval
+3.2 to +5.5), 63.4% on ten random images, about 96% on all of them. Momentum experts without the ramp, at the lower learning rate that suits
them, give 93.1%: a calmer expert is what matters, the ramp is one way to it. MNIST and CIFAR-10 were run for a few steps only. Whether a run has converged is seen by "matching_loss" beside "matching_loss_at_rest", what a student
that does not move has; for images of 16 pixels a side or more it takes 1000 outer steps or more, on a CPU minutes to hours (`plan_for`).

Memory is that of N unrolled steps. `checkpoint=True` computes them again in the backward pass, with the same gradient; `truncate`
cuts the gradient. Matching is one process's work: it has no batch to divide. The rate is made for the network and the augmentation
it was learned with; another architecture may need another one.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from coloss.data import Splits, load
from coloss.distillation.distillation_networks import distillation_network
from coloss.distillation.distillation_plan import DistillationPlan
from coloss.distillation.distillation_recipe import distill_splits
from coloss.distillation.fresh_networks import evaluate_distilled, evaluate_references
from coloss.train.system import Claim, System
from coloss.train.task import Setting

SYSTEM = System(
    slug="dataset-distillation",
    title="AST: Efficient Dataset Distillation through Alignment with Smooth and High-Quality Expert Trajectories",
    paper="Shen, Yang, Lam, 2023, arXiv 2310.10541",
    family="distillation",
    acts_on=("batch", "loss", "optimizer"),
    api=(
        "coloss.distillation.distill_dataset",
        "coloss.distillation.DistillationPlan",
        "coloss.distillation.DistilledDataset",
        "coloss.distillation.evaluate_distilled",
        "coloss.distillation.train_on_distilled",
        "coloss.distillation.TrajectoryMatcher",
        "coloss.distillation.trajectory_matching_loss",
        "coloss.distillation.record_trajectory",
        "coloss.distillation.loss_ramp",
        "coloss.distillation.input_gradient_penalty",
        "coloss.distillation.step_lengths",
        "coloss.distillation.kmeans_representatives",
        "coloss.train.unroll",
        "coloss.train.FlatParameters",
    ),
    recipe="coloss.distillation.distill_dataset",
)

SMOOTH = DistillationPlan(networks=3, network_steps=200)
"""What a user gets for digits, judged by fewer networks; the other arm differs in what its name says."""

PLANS = {
    "smooth experts": SMOOTH,
    "momentum experts, own rate": replace(SMOOTH, ramp_epochs=0, expert_rate=0.01),
}

REFERENCES = {
    "class means": "means",
    "random real images": "random",
}


def _trial(setting: Setting) -> Mapping[str, Mapping[str, float]]:
    """Final test accuracy of fresh networks on each set of ten images, and for the distilled sets how strong and smooth their experts are."""
    splits = load("digits", seed=setting.seed)
    assert isinstance(splits, Splits)
    network = partial(distillation_network, splits.input_shape, splits.num_classes or 0)
    options: dict[str, Any] = {
        "networks": SMOOTH.networks,
        "steps": SMOOTH.network_steps,
        "seed": setting.seed,
    }
    if setting.smoke:
        options |= {"networks": 1, "steps": 3}
    found: dict[str, dict[str, float]] = {}
    for name, plan in PLANS.items():
        if setting.smoke:
            plan = replace(plan, experts=1, expert_epochs=3, max_start=2, outer_steps=2)
        distilled, numbers = distill_splits(splits, plan, network, seed=setting.seed, device="cpu")
        accuracy = evaluate_distilled(distilled, splits, network, **options).mean
        found[name] = {"accuracy": accuracy} | numbers
        if name == CLAIM.method:
            known = evaluate_references(
                distilled, splits, network, names=list(REFERENCES.values()), **options
            )
    for name, short in REFERENCES.items():
        found[name] = {"accuracy": known[short].mean, "learning_rate": known[short].learning_rate}
    return found


CLAIM = Claim(
    statement="Networks trained on ten synthetic digits, one of each class, matched to experts with momentum and a loss ramp, are more accurate "
    "on test images than networks trained as long on the ten class means.",
    metric="accuracy",
    baseline="class means",
    method="smooth experts",
    trial=_trial,
    tried="A first run with 100 outer steps was inconclusive: -1.9 points (-10.5 to +6.6) beside the class means, one of five seeds not "
    "converged (test accuracy 0.747; matching loss 0.92 where the others end at 0.65 to 0.70). The number of steps was then set to the "
    "recipe's default and card's 250, before any further run; the verdict of the run with 250 stands whatever it is. "
    "Class means were the strongest of the real-image sets of ten on validation data (seed 100: 0.88; K-means images 0.82, random ones 0.67), "
    "so they are the baseline. Every set of real images chooses its learning rate of five up to 1 by validation accuracy in each seed; in "
    "the first run there were four, up to 0.3. The rate of the experts was chosen by validation accuracy of the distilled set on seeds 100 "
    "and 101. With 100 outer steps, from 0.005, 0.01, 0.025, 0.05 and 0.1 (not all with each seed): ramp 0.025 (0.931, 0.890; at 0.01 0.893, "
    "0.887; at 0.05 0.740, 0.680), momentum without ramp 0.01 (0.923, 0.893; at 0.005 0.887, 0.881; at 0.025 0.779 with seed 100), plain SGD "
    "0.15 (0.925 with seed 100; at 0.4 0.668). With 250: ramp 0.025 (0.941, 0.909; at 0.05, the recipe's default until then, 0.915, 0.892), "
    "so 0.025 became the default. In the first run momentum experts without the ramp gave 0.688 at the rate of the smooth ones and 0.908 at "
    "their own, smooth experts 0.869: on this scale the ramp is a warm-up, and a lower rate does as well.",
)
