"""Reruns the study of planted noise in docs/weights.md: its results file, tables and picture.

python scripts/planted_study.py

Comparisons of the recipe `planted` on five seeds, one for each kind of noise; the gradients of a step under the weights
of each arm; the tries that followed from first results; and SmolLM2, which goes on learning where noise is planted. A
finished training is reused from the stage cache, so the same command continues a study that was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor, nn

from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.scorers.weights import Scorer, TokenWeights, WeightStatistics
from mtp_ce.training.config.recipe import load_recipe
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.config.scorers.controls import ControlConfig
from mtp_ce.training.data.rows import PackedRows, rows_of_step
from mtp_ce.training.loop.weighing import Weighing, build_weighing
from mtp_ce.training.report.comparison import (
    CLEAN,
    FILTERED,
    WEIGHT_SHARE,
    arms_table,
    differences,
    draw_arms,
    draw_course,
    spread,
)
from mtp_ce.training.report.plot import open_figure
from mtp_ce.training.run.compare import compare
from mtp_ce.training.run.evaluate import load_checkpoint
from mtp_ce.training.run.filtering import best_predicted
from mtp_ce.training.run.inputs import read_inputs
from mtp_ce.training.run.stages import scoring_stages
from mtp_ce.training.tracking.composite import Tracking

DOCS = Path(__file__).resolve().parents[1] / "docs"


class Study(NamedTuple):
    """One comparison."""

    recipe: str
    overrides: Sequence[str] = ()
    seeds: int = 5
    only: Sequence[str] | None = None  # of the recipe's arms; None: all
    others: Mapping[str, Sequence[str]] | None = None  # overrides of further arms by name
    gradients: bool = False


# More arms for documents of noise: overrides, and what was expected before they were run.
TRIES = {
    "T=0.35": (["scorer.temperature=0.35"], "less weight on noise, a smaller clean sample: loses to T=0.7"),
    "T=2": (["scorer.temperature=2.0"], "a larger sample, but more weight on noise: loses to T=0.7"),
    "w_max=10": (["scorer.w_max=10", "scorer.eps=0"], "acts like a lower temperature: no gain"),
    "top_fraction=0.3": (
        ["scorer.mode=topk", "scorer.top_fraction=0.3"],
        "half the tokens of 0.6, with less noise among them: loses to topk of 0.6",
    ),
    "uniform to rho1": (
        ["scorer={name: 'planted_study:Annealed', of: {name: rho1_excess, scope: batch}, end: weighted}"],
        "word frequencies are learned first, and noise has them: gains over rho1 from the start",
    ),
    "rho1 to uniform": (
        ["scorer={name: 'planted_study:Annealed', of: {name: rho1_excess, scope: batch}, end: uniform}"],
        "ends on noise: loses to constant weights",
    ),
}

# SmolLM2 and a reference from it, tuned on clean text.
_SMOLLM2 = (
    *("data.noise={kind: documents}", "data.sequence_length=64", "model.mtp.horizon=2"),
    *("train.batch_size=4", "train.steps=24", "train.log_every=4", "validation.decoding.prompts=0"),
    "scorer={name: rho1_excess, scope: batch}",
    "reference={documents: all, train: {steps: 60, batch_size: 4, log_every: 10}, optimizer: {lr: 5.0e-5}}",
)
_FEW = ("uniform", "rho1_excess", "random_matched", "filtered")

STUDIES = {
    "documents": Study("planted", gradients=True),
    "spans": Study("planted", ["data.noise.kind=spans"]),
    # A tenth of the documents to train on, so that the copies of one document meet within a training.
    "duplicates": Study("planted", ["data.noise.kind=duplicates", "data.holdout_fraction=0.9", "data.noise.seed=3"]),
    "tries": Study(
        "planted",
        seeds=3,
        only=("uniform", "rho1_excess", "rho1_excess-topk"),
        others={name: overrides for name, (overrides, _) in TRIES.items()},
    ),
    "no noise": Study(
        "planted",
        ["data.noise=null"],
        seeds=3,
        only=("uniform", "rho1_excess"),
        others={"rho1_excess-topk": ["scorer.mode=topk"], "rho1_excess-sequence": ["scorer.scope=sequence"]},
    ),
    "SmolLM2, detached": Study("smollm2", _SMOLLM2, seeds=2, only=_FEW),
    "SmolLM2, joint": Study(
        "smollm2",
        [*_SMOLLM2, "model.mtp.trunk=joint", "optimizer.lr=5e-5", "optimizer.heads_lr=2e-3"],
        seeds=2,
        only=_FEW,
    ),
}

# Batches of the gradient of all clean tokens, and of single steps that are compared with it.
BATCHES = 32


class Annealed(ControlConfig):
    """Weights between uniform ones and those of another scorer, linear in the number of steps."""

    name: str = Field(description="planted_study:Annealed")
    end: Literal["weighted", "uniform"] = Field(description="weights of the last step")
    steps: int = Field(default=200, gt=0, description="steps from one end to the other")

    def build(self, models: Mapping[str, Any], seed: int) -> AnnealedWeights:
        """Build the other scorer."""
        return AnnealedWeights(self.of.build(models, seed), self.end, self.steps)


class AnnealedWeights:
    """w = 1 + a (w_of - 1), where a goes from 0 to 1 or back with the number of batches that were weighted."""

    def __init__(self, of: Scorer, end: str, steps: int) -> None:
        self.of, self.end, self.steps = of, end, steps
        self.step = 0

    def run(self, input_ids: Tensor, labels: Tensor, *arguments: Any, **context: Any) -> TokenWeights:
        """Compute the weights of one batch, [B, S]."""
        weights, found = self.of.run(input_ids, labels, *arguments, **context)
        done = min(1.0, self.step / self.steps)
        self.step += 1
        a = done if self.end == "weighted" else 1 - done
        supervised = labels != -100
        weights = supervised * (1 + a * (weights - 1))
        return TokenWeights(weights, replace(WeightStatistics.of(weights, supervised), neutral=found.neutral))


def main() -> None:
    """Run the study and write it to docs/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    # Trainings this small use one core better than two.
    with ProcessPoolExecutor(min(len(STUDIES), os.cpu_count() or 1), get_context("spawn")) as pool:
        found = dict(zip(STUDIES, pool.map(run, STUDIES), strict=True))
    write(found)


def run(name: str) -> dict[str, Any]:
    """Run one comparison, or find its trainings in the stage cache."""
    torch.set_num_threads(1)
    study = STUDIES[name]
    same = ["tracking.kind=none", "train.device=cpu", *study.overrides]
    recipe = load_recipe(study.recipe, same)
    others = {name: load_recipe(study.recipe, [*same, *own]) for name, own in (study.others or {}).items()}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "comparison"
        found = compare(recipe, output, study.seeds, others=others, only=study.only)
        if study.gradients:
            trained = output / f"uniform-seed{recipe.seed}" / "model"
            found["gradients"] = gradients(recipe, trained, Path(folder) / "gradients")
    return found


def gradients(recipe: Recipe, trained: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Compare the gradient of a step under each arm's weights with that of many clean tokens.

    Args:
        recipe: of the comparison.
        trained: the model of its first arm, whose gradients are taken.
        folder: to create, for stages.

    Returns:
        By arm: `cosine` of the angle between the two, mean over `BATCHES` steps; `alignment`, the cosine of the mean
        of the steps; and the mean `norm` of a step.
    """
    out = Console(quiet=True)
    inputs = read_inputs(recipe, out)
    folder.mkdir()
    with Tracking(recipe, folder, lambda _: None) as tracking:
        models = scoring_stages(recipe, inputs, folder, tracking)
    model = load_checkpoint(str(trained), trained).train()
    recipes = recipe.arms()
    rows = {name: inputs.rows(inputs.tokens.train) for name in recipes}
    recipes[FILTERED] = recipes["uniform"]
    assert recipe.data.noise
    rows[FILTERED] = inputs.rows(best_predicted(recipe, inputs, models, 1 - recipe.data.noise.share))
    clean = inputs.clean.rows(inputs.clean.tokens.train)
    uniform = build_weighing(recipes["uniform"], models, inputs.device)
    # Steps far from those of the clean gradient: another seed.
    target = torch.stack(_steps(model, clean, uniform, recipe, seed=1_000_001)).mean(0)
    found = {}
    for name, arm in recipes.items():
        weighing = build_weighing(arm, models, inputs.device)
        steps = torch.stack(_steps(model, rows[name], weighing, recipe, seed=1_000_002))
        cosines = nn.functional.cosine_similarity(steps, target[None])
        found[name] = {
            "cosine": float(cosines.mean()),
            "alignment": float(nn.functional.cosine_similarity(steps.mean(0), target, dim=0)),
            "norm": float(steps.norm(dim=1).mean()),
        }
    return found


def _steps(model: MTPWrapper, rows: PackedRows, weighing: Weighing, recipe: Recipe, seed: int) -> list[Tensor]:
    """Return the gradients [parameters] of the first steps of a training, all at one state of the model."""
    found = []
    for step in range(BATCHES):
        batch = rows.batch(rows_of_step(step, recipe.train.batch_size, len(rows), seed))
        model.zero_grad(set_to_none=True)
        model(
            batch.input_ids,
            position_ids=batch.position_ids,
            labels=batch.labels,
            document_ids=batch.document_ids,
            token_weights=lambda current, batch=batch: weighing.weigh(batch, current).weights,
        ).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return found


def tables(found: dict[str, Any]) -> str:
    """Format the results as they stand in docs/weights.md."""
    lines = []
    for name, comparison in found.items():
        note = (
            f"{name}: mean ± standard deviation over {len(comparison['seeds'])} seeds; {comparison['steps']} steps of "
            f"{comparison['tokens_per_step']:,} tokens."
        )
        table = _tries(comparison) if name == "tries" else arms_table(comparison)
        lines += [note, "", table, ""]
        if "gradients" in comparison:
            lines += ["Gradients of uniform weights' model:", "", _gradients(comparison["gradients"]), ""]
    return "\n".join(lines[:-1])


def summary(found: dict[str, Any]) -> str:
    """Format the differences of head 0 of the arms that most studies have, a line for each study."""
    arms = ("rho1_excess", "rho1_excess-sequence", "random_matched", "planted_truth", FILTERED)
    titles = ["head 0, CE minus that of uniform weights", *arms]
    lines = [f"| {' | '.join(titles)} |", "| --- |" + " ---: |" * len(arms)]
    for name, comparison in found.items():
        if name != "tries":
            here = [arm for arm in arms if arm in comparison["results"]]
            cells = {arm: spread(differences(comparison, arm, "val/ce_head_0"), "+") for arm in here}
            lines.append(f"| {name} | {' | '.join(cells.get(arm, '') for arm in arms)} |")
    return "\n".join(lines)


def _tries(comparison: dict[str, Any]) -> str:
    lines = ["| try | expected | head 0, nats | weight on noise | clean sample |", "| --- | --- | ---: | ---: | ---: |"]
    for name in TRIES:
        share, clean = (
            f"{statistics.fmean(result[metric] for result in comparison['results'][name]):.3f}"
            for metric in (WEIGHT_SHARE, CLEAN)
        )
        change = spread(differences(comparison, name, "val/ce_head_0"), "+")
        lines.append(f"| {name} | {TRIES[name][1]} | {change} | {share} | {clean} |")
    return "\n".join(lines)


def _gradients(found: dict[str, dict[str, float]]) -> str:
    lines = ["| gradient of | cosine, one step | cosine, mean step | norm |", "| --- | ---: | ---: | ---: |"]
    for name, one in found.items():
        norm = one["norm"] / found["uniform"]["norm"]
        lines.append(f"| {name} | {one['cosine']:.3f} | {one['alignment']:.3f} | {norm:.2f} |")
    return "\n".join(lines)


def write(found: dict[str, Any]) -> None:
    """Write planted.json, planted.png and the tables of weights.md."""
    (DOCS / "planted.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shown = {name: one for name, one in found.items() if STUDIES[name].only is None}
    arms = [len(one["results"]) for one in shown.values()]
    figure = open_figure((10, 0.8 * len(shown) + 0.26 * sum(arms)))
    panels = figure.subplots(len(shown), 2, squeeze=False, width_ratios=(1.2, 1), height_ratios=arms)
    for (left, right), (name, comparison) in zip(panels, shown.items(), strict=True):
        draw_arms(comparison, left)
        draw_course(comparison, right)
        left.set_title(f"data.noise.kind: {name}", loc="left")
    figure.savefig(DOCS / "planted.png")
    page = DOCS / "weights.md"
    text = page.read_text(encoding="utf-8")
    for name, table in (("planted", tables(found)), ("summary", summary(found))):
        before, rest = text.split(f"<!-- {name}:begin -->\n")
        after = rest.split(f"\n<!-- {name}:end -->")[1]
        text = f"{before}<!-- {name}:begin -->\n{table}\n<!-- {name}:end -->{after}"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
