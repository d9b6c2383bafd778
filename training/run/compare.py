"""Does weighting help? The same budget with uniform weights, a recipe's scorer and its two controls, on several seeds.

    difference[seed] = CE(arm, seed) - CE(uniform, seed)        nats, of one head, on held-out text

Runs of one seed have the same initial weights and see the same rows in the same order, so their difference is less
noisy than their levels. Every model is scored unweighted, on all held-out files and on the documented ones, which
are what the reference of the recipe `rho1` was made of.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.console import say, warn
from mtp_ce.training.data.python_source import is_documented
from mtp_ce.training.loop.interrupt import ignore_sigterm
from mtp_ce.training.loop.ranks import Ranks, join_ranks
from mtp_ce.training.loop.weighing import FrozenModels, build_weighing
from mtp_ce.training.metrics.head_scores import validation_metrics
from mtp_ce.training.run.fitting import fit
from mtp_ce.training.run.folder import RECIPE_FILE, make_folder
from mtp_ce.training.run.inputs import Inputs, find_device, read_inputs
from mtp_ce.training.run.stage_cache import folder_digest, stage_key
from mtp_ce.training.run.stages import STAGE_FILE, Stage, check_stages, run_stage, scoring_stages
from mtp_ce.training.tracking.composite import Tracking


def compare(recipe: Recipe, output: Path, seeds: int, out: Console | None = None) -> dict[str, Any]:
    """Train every arm on every seed, and write comparison.json, comparison.md and comparison.png.

    A training that was finished before, in this comparison or in one that was interrupted, is not done again.

    Args:
        recipe: names the scorer and the budget; its seed is the first one.
        output: folder to make; it must not exist.
        seeds: how many.
        out: where to say what happens; None means the terminal.

    Returns:
        What comparison.json holds.

    Raises:
        RecipeError: as `pipeline.train`, and where the scorer is uniform.
        StepRefusedError, KeyboardInterrupt: as `pipeline.train`.
    """
    transformers_logging.disable_progress_bar()
    with join_ranks(find_device(recipe.train.device, "train.device"), recipe.train) as ranks:
        return _compare(recipe, output, seeds, out or Console(), ranks)


def _compare(recipe: Recipe, output: Path, seeds: int, out: Console, ranks: Ranks) -> dict[str, Any]:
    arms = recipe.arms()
    inputs = read_inputs(recipe, out, ranks)
    check_stages(recipe, inputs)
    make_folder(output, recipe)
    say(out, f"output      {output}")
    found: dict[str, Any] = {
        "recipe": recipe.name,
        "scorers": {name: arm.scorer.model_dump() for name, arm in arms.items()},
        "steps": recipe.train.steps,
        "tokens_per_step": recipe.train.batch_size * inputs.row_length,
        "seeds": list(range(recipe.seed, recipe.seed + seeds)),
        "torch": torch.__version__.partition("+")[0],
        "results": {name: [] for name in arms},
    }
    with Tracking(recipe, output, partial(warn, out), on_error=ignore_sigterm) as tracking:
        tracking.artifact(output / RECIPE_FILE)
        models = scoring_stages(recipe, inputs, output, tracking)
        for seed in found["seeds"]:
            for name, arm in arms.items():
                own = arm.model_copy(update={"seed": seed})
                found["results"][name].append(_run(name, own, inputs, models, output, tracking))
        for path in _write(found, output):
            tracking.artifact(path)
    out.print(comparison_table(found), soft_wrap=True, highlight=False, markup=False)
    say(out, f"saved       {output}/comparison.json, comparison.md, comparison.png")
    return found


def _run(
    name: str, recipe: Recipe, inputs: Inputs, models: FrozenModels, output: Path, tracking: Tracking
) -> dict[str, float]:
    held_out = inputs.corpus.held_out
    documented = inputs.tokens.held_out.choose([i for i, text in enumerate(held_out) if is_documented(text)])

    def work(folder: Path, run: Tracking) -> dict[str, float]:
        weighing = build_weighing(recipe, models, inputs.device, inputs.ranks)
        trainer, results = fit(recipe, inputs, inputs.rows(inputs.tokens.train), weighing.weigh, folder, run)
        metrics = validation_metrics(results)
        if documented:
            curated = validation_metrics(trainer.validate(inputs.rows(documented)))
            metrics |= {f"documented/{metric.removeprefix('val/')}": value for metric, value in curated.items()}
        return metrics

    settings = recipe.model_dump(include={"seed", "model", "optimizer", "train", "scorer"})
    settings["row_length"] = inputs.row_length
    asked = [] if recipe.scored_by is None else models.folders()
    stage = Stage(
        kind="main",
        name=f"{name}-seed{recipe.seed}",
        what=f"{recipe.train.steps:,} steps",
        key=stage_key("main", settings, [*inputs.digests, *map(folder_digest, asked)]),
        recipe=recipe,
        work=work,
    )
    kept = run_stage(stage, inputs, output, tracking)
    results: dict[str, float] = json.loads((kept / STAGE_FILE).read_text(encoding="utf-8"))["results"]
    return results


def differences(found: dict[str, Any], arm: str, metric: str) -> list[float]:
    """Give an arm's metric minus that of uniform weights, seed by seed."""
    pairs = zip(found["results"][arm], found["results"]["uniform"], strict=True)
    return [ours[metric] - uniform[metric] for ours, uniform in pairs]


def comparison_table(found: dict[str, Any]) -> str:
    """Lay a comparison out as a Markdown table: levels of uniform weights, differences of the other arms.

    Args:
        found: what comparison.json holds.
    """
    first = found["results"]["uniform"][0]
    sides = [side for side in ("val", "documented") if f"{side}/ce_head_0" in first]
    heads = sum(metric.startswith("val/ce_head_") for metric in first)
    arms = [arm for arm in found["results"] if arm != "uniform"]
    lines = [
        "| held-out files | head | uniform, CE in nats | " + " | ".join(f"{arm} - uniform" for arm in arms) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(arms),
    ]
    for side in sides:
        for h in range(heads):
            metric = f"{side}/ce_head_{h}"
            uniform = [result[metric] for result in found["results"]["uniform"]]
            cells = [_spread(uniform), *(_spread(differences(found, arm, metric), "+") for arm in arms)]
            where = "all" if side == "val" else side
            lines.append(f"| {where} | {h} | " + " | ".join(cells) + " |")
    lines += ["", f"Mean ± standard deviation over {len(found['seeds'])} seeds; {found['steps']:,} steps each."]
    return "\n".join(lines)


def draw_comparison(found: dict[str, Any], picture: Path) -> None:
    """Draw the differences to uniform weights, a point for each seed."""
    # matplotlib writes a font cache when it is first imported; a wrong recipe writes nothing.
    from mtp_ce.training.report.plot import COLOURS, open_figure

    first = found["results"]["uniform"][0]
    sides = [side for side in ("val", "documented") if f"{side}/ce_head_0" in first]
    heads = sum(metric.startswith("val/ce_head_") for metric in first)
    arms = [arm for arm in found["results"] if arm != "uniform"]
    figure = open_figure((4.6 * len(sides), 4.2))
    panels = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    for side, axes in zip(sides, panels, strict=True):
        for place, arm in enumerate(arms):
            x = [h + (place - (len(arms) - 1) / 2) * 0.22 for h in range(heads)]
            points = [differences(found, arm, f"{side}/ce_head_{h}") for h in range(heads)]
            for at, values in zip(x, points, strict=True):
                axes.plot([at] * len(values), values, "o", color=COLOURS[place], markersize=4, alpha=0.5)
            means = [statistics.fmean(values) for values in points]
            axes.plot(x, means, "_", color=COLOURS[place], markersize=16, markeredgewidth=2.5, label=arm)
        axes.axhline(0, color="black", linewidth=1)
        axes.set_xticks(range(heads), [f"head {h}" for h in range(heads)])
        axes.set_title(f"{'all' if side == 'val' else side} held-out files", loc="left")
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("CE minus that of uniform weights [nats]\nbelow 0: better")
    panels[-1].legend(frameon=False, title=f"bar: mean of {len(found['seeds'])} seeds")
    figure.savefig(picture)


def _write(found: dict[str, Any], output: Path) -> list[Path]:
    results, table, picture = (output / f"comparison.{suffix}" for suffix in ("json", "md", "png"))
    results.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    table.write_text(comparison_table(found) + "\n", encoding="utf-8")
    draw_comparison(found, picture)
    return [results, table, picture]


def _spread(values: list[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.3f}{spread}"
