"""`coloss compare`, `verify`, `run`, `report`, `bench`: the work."""

import inspect
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from coloss.cli.display import (
    output,
    plain_json,
    print_evidence,
    print_ranking,
    print_selection,
    progress_bar,
    ranking_json,
    status,
)
from coloss.cli.typed import stoppable, typed_command
from coloss.errors import InputError

Workers = Annotated[int, typer.Option(help="Processes to spread trials over, at least 1.")]
Ray = Annotated[
    str | None, typer.Option(help="Address of a Ray cluster (auto, local, ray://...), in place of processes.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def compare(
    task: Annotated[
        str,
        typer.Argument(
            help="A task, your CSV / parquet / npz / image folder / hf:NAME, a folder of queries, documents and judgements, "
            "or an experiment .yaml."
        ),
    ],
    methods: Annotated[
        str | None, typer.Option(help="Arms: cross-entropy,dhkd,trp or dhkd+trp or trp:energy=0.8:every=10")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Paired runs of each arm, at least 1. Default: 5.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Of each arm: 60s, 2m, 300steps, 20epochs. Default: the task's.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Column to predict, for tables.")] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="classification or regression, where the guess for your data is wrong; self-supervised to learn without labels; "
            "ranking or next-item for users and items; token-retrieval for captions and images."
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Arm to compare with. Default: the task's own objective.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Metric that decides. Default: the task's.")] = None,
    direction: Annotated[
        str | None, typer.Option(help="Whether the metric is better higher or lower. Default: by its name.")
    ] = None,
    reach: Annotated[
        float | None, typer.Option(help="Metric value; the time until it is reached is recorded.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Result folder; the same folder goes on where a stopped run ended.")
    ] = None,
    workers: Workers = 1,
    ray: Ray = None,
    model: Annotated[
        str | None, typer.Option(help="Import path of a callable (splits -> module) in place of the default.")
    ] = None,
    text_features: Annotated[
        str | None, typer.Option(help="tfidf, hashing, or import path of an encoder.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use so many samples of each part at most.")] = None,
    label_noise: Annotated[
        float | None,
        typer.Option(help="Make this share of training and validation labels wrong (classification): 0.4."),
    ] = None,
    noise_kind: Annotated[
        str | None,
        typer.Option(help="symmetric (any other class) or pairwise (the next). Default: symmetric."),
    ] = None,
    imbalance: Annotated[
        float | None,
        typer.Option(help="Thin classes until the rarest has this share of the most frequent: 0.05."),
    ] = None,
    imbalance_kind: Annotated[
        str | None, typer.Option(help="long-tailed or step. Default: long-tailed.")
    ] = None,
    logger: Annotated[str | None, typer.Option(help="Also log to csv, tensorboard or mlflow.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train each arm at the same budget over the same seeds, rank them, and write a report."""
    given: dict[str, Any] = {
        "task": task,
        "methods": methods,
        "seeds": seeds,
        "budget": budget,
        "target": target,
        "kind": kind,
        "baseline": baseline,
        "metric": metric,
        "direction": direction,
        "reach": reach,
        "model": model,
        "text_features": text_features,
        "limit": limit,
        "label_noise": label_noise,
        "noise_kind": noise_kind,
        "imbalance": imbalance,
        "imbalance_kind": imbalance_kind,
        "logger": logger,
        "out": str(out) if out is not None else None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if task.endswith((".yaml", ".yml")):
        from coloss.lab.experiment import read_experiment

        given = read_experiment(Path(task), given)
    comparison = _plan(given)
    folder = Path(given.get("out") or _default_folder(given["task"]))
    trials = len(comparison.arms) * len(comparison.record.seeds)
    if "seconds" in comparison.record.budget and workers > (os.cpu_count() or 1):
        typer.echo(
            f"coloss: note: {workers} workers share {os.cpu_count()} cores, so a budget in seconds buys each trial less training",
            err=True,
        )
    with stoppable(folder if "out" not in given else None):
        with progress_bar(trials) as report:
            result = comparison.run(folder, workers=workers, ray=ray, report=report)
        with status("writing the report"):
            from coloss.report import rank_arms, write_report

            page = write_report(folder)
            rows = rank_arms(result.record, result.trials)
    failures = list(result.failures.values())
    if as_json:
        found = {"report": str(page), "folder": str(folder), "failures": failures, "arms": ranking_json(rows)}
        plan = result.record.model_dump(
            include={"task", "title", "metric", "direction", "baseline", "seeds", "budget"}
        )
        typer.echo(json.dumps(plain_json(plan) | found, indent=1, allow_nan=False))
    else:
        console = output()
        print_ranking(console, result.record, rows)
        console.print(f"report: {page}", soft_wrap=True, markup=False)
    if failures:
        more = f" (and {len(failures) - 1} more of the trials)" if len(failures) > 1 else ""
        typer.echo(f"coloss: training diverged: {failures[0]}{more}", err=True)
        raise typer.Exit(1)


def _plan(given: dict[str, Any]) -> Any:
    """The comparison that was asked for; whatever is wrong with it is found here or in its rehearsal."""
    from coloss.lab.known_tasks import TaskKind, check_task
    from coloss.train.budget import Budget

    for name, choices in (
        ("kind", get_args(TaskKind)),
        ("direction", ("higher", "lower")),
        ("noise_kind", ("symmetric", "pairwise")),
        ("imbalance_kind", ("long-tailed", "step")),
    ):
        if given.get(name, choices[0]) not in choices:
            raise InputError(f"{name} must be {' or '.join(choices)}, got {given[name]!r}")
    check_task(given["task"])
    if not given.get("methods"):
        raise InputError("methods must name at least one arm, like --methods cross-entropy,dhkd")
    budget = Budget.parse(given["budget"]) if "budget" in given else None
    with status("starting"):
        from coloss.lab.arms import split_arms
        from coloss.lab.comparison import Comparison

        arms = given["methods"]
        options = {k: v for k, v in given.items() if k not in ("task", "methods", "budget", "out")}
        return Comparison(
            given["task"],
            split_arms(arms) if isinstance(arms, str) else arms,
            budget=budget,
            command=typed_command(),
            **options,
        )


def _default_folder(task: str) -> str:
    name = Path(task).stem.replace(":", "-") or "data"
    return str(Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")


def verify(
    slugs: Annotated[list[str], typer.Argument(help="Systems (coloss list).")],
    smoke: Annotated[bool, typer.Option(help="Run the same code in seconds, and write nothing.")] = False,
    seeds: Annotated[int | None, typer.Option(help="Paired runs, at least 5. Default: the claim's.")] = None,
    workers: Workers = 1,
    ray: Ray = None,
    out: Annotated[Path, typer.Option(help="Where unfinished measurements wait.")] = Path("runs/verify"),
    evidence: Annotated[
        Path | None, typer.Option(help="Folder of evidence files. Default: the project's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure papers' claims, and write evidence/SLUG.json."""
    from coloss.lab.catalog import find_entry
    from coloss.lab.evidence import evidence_folder

    for slug in slugs:
        if not find_entry(slug).has_claim:
            raise InputError(f"{slug} has no claim to verify yet")
    if seeds is not None and seeds < 5:
        raise InputError(f"seeds must be >= 5 for evidence, got {seeds} (use --smoke for a quick look)")
    measured = []
    with stoppable():
        for slug in slugs:
            found = _measure(
                slug, smoke=smoke, seeds=seeds, workers=workers, ray=ray, folder=out, evidence=evidence
            )
            measured.append(found)
            if not as_json:
                console = output()
                print_evidence(console, found, smoke)
                if not smoke:
                    place = evidence if evidence is not None else evidence_folder()
                    console.print(f"evidence: {place / slug}.json", soft_wrap=True, markup=False)
    if as_json:
        typer.echo(json.dumps(plain_json(measured), indent=1, allow_nan=False))


def _measure(slug: str, *, smoke: bool, seeds: int | None, **options: Any) -> dict[str, Any]:
    with status(f"starting {slug}"):
        from coloss.lab.claims import claim_arms
        from coloss.lab.claims import verify as measure
        from coloss.lab.trials import load_claim

        claim = load_claim(slug)
    count = seeds if seeds is not None else 2 if smoke else claim.seeds
    with progress_bar(len(claim_arms(claim)) * count) as report:
        return measure(slug, smoke=smoke, seeds=seeds, report=report, **options)


def run(
    slug: Annotated[str, typer.Argument(help="A complete system (coloss list).")],
    data: Annotated[
        str | None, typer.Option(help="Data set, file or folder. Default: the system's own example.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="60s, 2m, 300steps, 20epochs.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random, at least 0.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the trained model and its metrics.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, an option of the system (coloss show SLUG); repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a complete system end to end; the same --out folder goes on where a stopped run ended."""
    from coloss.lab.arms import read_options
    from coloss.lab.catalog import catalog, find_entry, import_name
    from coloss.train.budget import Budget

    entry = find_entry(slug)
    if entry.recipe is None:
        complete = ", ".join(e.slug for e in catalog() if e.recipe is not None) or "none yet"
        raise InputError(
            f"{slug} is no complete system (coloss run takes: {complete}); see: coloss show {slug}"
        )
    if seed < 0:
        raise InputError(f"seed must be >= 0, got {seed}")
    length = Budget.parse(budget) if budget is not None else None
    with status("starting"):
        recipe: Callable[..., Any] = import_name(entry.recipe)
    options = read_options(slug, recipe, settings or [])
    if data is None:
        default = inspect.signature(recipe).parameters["data"].default
        data = "digits" if default is inspect.Parameter.empty else default
    folder = out or Path("runs") / f"{slug}-{Path(data).stem}"
    with stoppable(), progress_bar(1) as report:
        metrics = recipe(
            data,
            folder,
            budget=length,
            seed=seed,
            progress=lambda share: report(slug, seed, min(share, 1.0)),
            **options,
        )
        report(slug, seed, 1.0)
    if as_json:
        found = {"folder": str(folder), "metrics": dict(metrics)}
        typer.echo(json.dumps(plain_json(found), indent=1, allow_nan=False))
        return
    console = output()
    width = max([24, *map(len, metrics)])
    for name, value in metrics.items():
        console.print(f"{name:{width}} {value:.4g}", soft_wrap=True, markup=False)
    console.print(f"model: {folder}", soft_wrap=True, markup=False)


def report(
    folder: Annotated[Path, typer.Argument(help="Result folder of coloss compare.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write the page. Default: FOLDER/report.html.")
    ] = None,
) -> None:
    """Write a self-contained HTML page from a result folder."""
    with status("writing the report"):
        from coloss.report import write_report

        page = write_report(folder, out)
    typer.echo(f"report: {page}")


def select(
    folder: Annotated[Path, typer.Argument(help="Result folder of coloss compare.")],
    by: Annotated[
        str, typer.Option(help="Metric that chooses among the arms; one that needs no labels, for instance.")
    ] = "embedding_rankme",
    direction: Annotated[
        Literal["higher", "lower"] | None,
        typer.Option(help="Whether it is better higher or lower. Default: by its name."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="What the choice is judged by. Default: the comparison's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose among the arms by a number without labels, and say what the choice costs beside the best."""
    with status("choosing"):
        from coloss.lab.selection import select_arm

        found = select_arm(folder, by, direction=direction, metric=metric)
    if as_json:
        typer.echo(json.dumps(plain_json(asdict(found)), indent=1, allow_nan=False))
    else:
        print_selection(output(), found)


def bench(
    name: Annotated[str | None, typer.Argument(help="Which benchmark. Default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Speed and memory beside peers, in one run."""
    from rich.console import Console

    from coloss.lab.benchmarks import run_benchmarks

    results = run_benchmarks(name, Console(stderr=as_json))
    if as_json:
        typer.echo(json.dumps(results, indent=1))
