"""The measurement behind the claim of `mist`: estimators on fresh sets of a family and a map that training did not see."""

from coloss.jepa.mutual_information import SupervisedMI
from coloss.jepa.mutual_information_bounds import InfoNCE
from coloss.jepa.mutual_information_data import TRAINING_FAMILIES, TRAINING_MAPS, MIMetaDataset
from coloss.jepa.mutual_information_estimators import KSG, GaussianMI, MIEstimator
from coloss.jepa.mutual_information_report import (
    KSG_NEIGHBOURS,
    interval_coverage,
    judge_estimator,
    mean_squared_error,
)
from coloss.train.task import Setting

NEW_FAMILY, NEW_MAP = "additive-uniform", "spiral"
SAMPLES = (50, 200)
SHARE = 16


def measure_estimators(setting: Setting) -> dict[str, dict[str, float]]:
    """Errors of every arm on the same sets of one seed, and coverage where an arm gives intervals.

    `squared_error` is the mean over three kinds of sets: the new family, the new map on normal families, and the two together. A variational bound
    is trained anew for each set, so it is judged on every sixteenth only, and `squared_error_sixteenth` is what compares it with the others.
    """
    arms: dict[str, MIEstimator] = {
        "KSG": KSG(KSG_NEIGHBOURS),
        "KSG, k = 5": KSG(5),
        "KSG, rank-Gaussianised": KSG(KSG_NEIGHBOURS, gaussianise=True),
        "Gaussian": GaussianMI(),
        "Gaussian copula": GaussianMI(correct=True, gaussianise=True),
        "mist": SupervisedMI.pretrained(),
    }
    sets = held_out_sets(setting.seed, batches=1 if setting.smoke else 12)
    found = {name: _judged(estimator, sets) for name, estimator in arms.items()}
    bound = InfoNCE(steps=5 if setting.smoke else 200)
    held_out = [some for kind, some in sets.items() if kind != "seen"]
    errors = [mean_squared_error(judge_estimator(bound, some, every=SHARE)) for some in held_out]
    return {**found, "InfoNCE": {"squared_error_sixteenth": sum(errors) / len(errors)}}


def held_out_sets(seed: int, batches: int = 12) -> dict[str, MIMetaDataset]:
    """Sets to judge on, by kind; none of their random numbers were used in training."""
    normal = [name for name in TRAINING_FAMILIES if name.startswith("normal")]
    kinds = {
        "new_family": ([NEW_FAMILY], ["base"], (1, 4)),
        # The spiral leaves a single coordinate as it is.
        "new_map": (normal, [NEW_MAP], (2, 4)),
        "both_new": ([NEW_FAMILY], [NEW_MAP], (2, 4)),
        "seen": (TRAINING_FAMILIES, TRAINING_MAPS, (1, 4)),
    }
    return {
        kind: MIMetaDataset(
            families,
            maps,
            samples=SAMPLES,
            dims=dims,
            batch_size=4,
            batches=batches,
            independent=0.0,
            seed=2_000_000 + 10 * seed + place,
        )
        for place, (kind, (families, maps, dims)) in enumerate(kinds.items())
    }


def _judged(estimator: MIEstimator, sets: dict[str, MIMetaDataset]) -> dict[str, float]:
    levels = (0.05, 0.95) if isinstance(estimator, SupervisedMI) else None
    found = {kind: judge_estimator(estimator, some, levels) for kind, some in sets.items()}
    held_out = [kind for kind in sets if kind != "seen"]

    def over_kinds(step: int) -> float:
        return sum(mean_squared_error(found[kind][::step]) for kind in held_out) / len(held_out)

    everywhere = [judged for kind in held_out for judged in found[kind]]
    cuts = {
        "two_columns": [judged for judged in found["new_family"] if judged.dim_x == judged.dim_y == 1],
        "below_1_nat": [judged for judged in everywhere if judged.information < 1],
        "from_1_nat": [judged for judged in everywhere if judged.information >= 1],
        "below_100_samples": [judged for judged in everywhere if judged.samples < 100],
        "from_100_samples": [judged for judged in everywhere if judged.samples >= 100],
    }
    metrics = {"squared_error": over_kinds(1), "squared_error_sixteenth": over_kinds(SHARE)}
    metrics |= {f"squared_error_{kind}": mean_squared_error(some) for kind, some in (found | cuts).items()}
    if levels is not None:
        metrics |= {f"coverage_{kind}": interval_coverage(some) for kind, some in found.items()}
        metrics["coverage_held_out"] = interval_coverage(everywhere)
        metrics["interval_width"] = sum(judged.high - judged.low for judged in everywhere) / len(everywhere)
    return metrics
