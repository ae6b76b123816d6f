"""Train the same model with several objectives: held-out figures, time and memory side by side.

    benchmark.py train examples/configs/items_food.yaml --folder runs/table
    benchmark.py train CONFIG.yaml --methods exact,published --seeds 3 --set max_steps=500

Each objective is trained as the configuration says, with the objective's own defaults, and tested
exactly. What is finished is not trained again and what was stopped goes on, so the same command
completes a table over several sittings. In the folder, one named as the configuration holds the
runs of each seed with their curves and comparison.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from sce_lm.benchmarks import report
from sce_lm.benchmarks.methods import Method, choose
from sce_lm.training import comparison
from sce_lm.training.config import TrainConfig, parse_config

METHODS = [
    Method("exact", "exact", {"name": "exact"}),
    Method("published", "published SCE", {"name": "sce", "published": True}),
    Method("corrected", "corrected SCE", {"name": "sce"}),
    Method("gbce", "gBCE", {"name": "gbce"}),
    Method("sampled", "sampled softmax", {"name": "sampled_softmax"}),
    Method("xir", "XIR", {"name": "xir"}),
]
COSTS = {"steps": ".0f", "training_seconds": ",.0f", "loss_seconds": ".3f", "peak_mib": ",.0f"}
"""Columns beside the held-out figures, and their format."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="+", type=Path, help="configurations of scripts/train.py")
    parser.add_argument("--methods", help=f"of {','.join(m.name for m in METHODS)}; default: all")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, seeds counted up")
    parser.add_argument("--folder", type=Path, default=Path("runs/table"), help="of the runs")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a change to every configuration; may be repeated",
    )


def run(arguments: argparse.Namespace) -> None:
    methods = choose(METHODS, arguments.methods)
    changes = [f"--{change}" for change in arguments.set]
    found: dict[str, Any] = {"machine": report.machine(arguments.device, arguments.threads)}
    for path in arguments.configs:
        config = parse_config([str(path), *changes])
        table = measure(config, methods, arguments.seeds, arguments.folder / path.stem)
        found[path.stem] = table
        report.print_heading(found["machine"], f"{path.stem}: {json.dumps(table['measured'])}")
        _print(table, path.stem)
        report.write_json(arguments.json, found)
    if arguments.plot:
        report.draw(
            arguments.plot, [_panel(found[path.stem], path.stem) for path in arguments.configs]
        )


def measure(config: TrainConfig, methods: list[Method], seeds: int, folder: Path) -> dict[str, Any]:
    """Train every method with every seed.

    Args:
        config: its objective, seed and output folder are replaced.
        methods: objectives.
        seeds: runs of each.
        folder: of the runs.

    Returns:
        JSON-ready: ``rows``, one a method, with the means over seeds of its test figures and of
        ``COSTS``, and ``seeds``, the figures of each; ``baselines``; ``measured``, the sizes at
        which loss and memory were taken; and the ``protocol`` where the figures have one.
    """
    asked = {m.label: _trained(m) for m in methods}
    compared = comparison.compare(config, asked, folder / f"seed-{config.seed}")
    summaries = [compared.summaries]
    for seed in range(config.seed + 1, config.seed + seeds):
        changed = dataclasses.replace(config, seed=seed)
        summaries.append(comparison.train_methods(changed, asked, folder / f"seed-{seed}")[0])
    rows = []
    for method in methods:
        of_seeds = [
            {
                **_numbers(of_seed[method.label]["test"]),
                "steps": of_seed[method.label]["steps"],
                "training_seconds": of_seed[method.label]["training_seconds"],
            }
            for of_seed in summaries
        ]
        cost = compared.costs[method.label]
        means = {name: statistics.mean(s[name] for s in of_seeds) for name in of_seeds[0]}
        rows.append(
            {
                "method": method.label,
                **means,
                "loss_seconds": cost.seconds,
                "peak_mib": cost.peak_mib,
                "seeds": of_seeds,
            }
        )
    return {
        "rows": rows,
        "baselines": [
            {"method": name, **_numbers(figures)} for name, figures in compared.baselines.items()
        ],
        "measured": compared.measured,
        "protocol": next(iter(compared.summaries.values()))["test"].get("protocol"),
    }


def _trained(method: Method) -> comparison.Method:
    options = dict(method.specification)
    return comparison.Method(options.pop("name"), options)


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if isinstance(value, float)}


def _print(table: dict[str, Any], title: str) -> None:
    first = table["rows"][0]
    names = [n for n in first if isinstance(first[n], float) and n not in COSTS]
    forms = dict.fromkeys(names, ".4f") | COSTS
    report.print_table(
        title,
        ["method", *forms],
        [[r["method"], *report.figures(r, forms)] for r in (*table["rows"], *table["baselines"])],
    )
    if table["protocol"]:
        report.print_line("; ".join(f"{k}: {v}" for k, v in table["protocol"].items()))


def _panel(table: dict[str, Any], title: str) -> report.Panel:
    first = table["rows"][0]
    figure = next(n for n in first if isinstance(first[n], float))
    return report.Panel(
        title,
        "seconds of training",
        f"test {figure}",
        {r["method"]: [(r["training_seconds"], r[figure], r["method"])] for r in table["rows"]},
    )
