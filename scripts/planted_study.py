"""Reruns the study of planted noise in docs/weights.md: its results file, tables and picture.

python scripts/planted_study.py

Comparisons of the recipe `planted` on five seeds, one for each kind of noise; what each arm learned of tokens that the
reference predicts well or badly; the tries that followed from first results; and SmolLM2, which goes on learning where
noise is planted. A finished training is reused from the stage cache, so the same command continues a study that was
stopped.
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
from torch import Tensor

from mtp_ce.next_token import NextToken
from mtp_ce.scorers.weights import Scorer, TokenWeights, WeightStatistics
from mtp_ce.training.config.recipe import load_recipe
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.config.scorers.controls import ControlConfig
from mtp_ce.training.data.rows import Batch
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
from mtp_ce.training.run.inputs import read_inputs
from mtp_ce.training.run.stage_cache import StageKind, cached_stage
from mtp_ce.training.run.stages import STAGE_FILE

DOCS = Path(__file__).resolve().parents[1] / "docs"


class Study(NamedTuple):
    """One comparison."""

    recipe: str
    overrides: Sequence[str] = ()
    seeds: int = 5
    only: Sequence[str] | None = None  # of the recipe's arms; None: all
    others: Mapping[str, Sequence[str]] | None = None  # overrides of further arms by name
    quarters: bool = False


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
_FEW = ("uniform", "rho1_excess", "random_matched")

STUDIES = {
    "documents": Study("planted", quarters=True),
    "spans": Study("planted", ["data.noise.kind=spans"], quarters=True),
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
        quarters=True,
    ),
    "SmolLM2, detached": Study("smollm2", _SMOLLM2, seeds=2, only=_FEW),
    "SmolLM2, joint": Study(
        "smollm2",
        [*_SMOLLM2, "model.mtp.trunk=joint", "optimizer.lr=5e-5", "optimizer.heads_lr=2e-3"],
        seeds=2,
        only=_FEW,
    ),
}

# Held-out rows of the diagnostic.
ROWS = 96


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
        if study.quarters:
            found["quarters"] = quarters(recipe, found, output)
    return found


def quarters(recipe: Recipe, comparison: dict[str, Any], output: Path) -> dict[str, list[list[float]]]:
    """Return head 0's cross entropy on held-out tokens, in quarters by that of the reference, nats.

    Args:
        recipe: of the comparison.
        comparison: its results.
        output: its folder.

    Returns:
        By arm, for each seed, the means of the four quarters, from the tokens that the reference predicts best to those
        that it predicts worst; of the reference itself, one list.
    """
    inputs = read_inputs(recipe, Console(quiet=True))
    rows = inputs.rows(inputs.tokens.held_out)

    def token_ce(kind: StageKind, stage: str) -> Tensor:
        key = json.loads((output / stage / STAGE_FILE).read_text(encoding="utf-8"))["key"]
        folder = cached_stage(kind, key)
        assert folder is not None
        model = load_checkpoint(stage, folder / "model").eval()
        return torch.cat([_next_token_ce(model.causal, rows.batch(r)) for r in torch.arange(ROWS).split(16)])

    reference = token_ce("reference", "reference")
    quarter = torch.bucketize(reference, torch.quantile(reference, torch.tensor([0.25, 0.5, 0.75])))

    def means(ce: Tensor) -> list[float]:
        return [round(float(ce[quarter == q].mean()), 4) for q in range(4)]

    found = {"reference": [means(reference)]}
    for arm in comparison["results"]:
        found[arm] = [means(token_ce("main", f"{arm}-seed{seed}")) for seed in comparison["seeds"]]
    return found


@torch.no_grad()
def _next_token_ce(model: Any, batch: Batch) -> Tensor:
    """Return the cross entropies of the tokens that are predicted, [tokens], in nats."""
    current = NextToken.of(model, batch.input_ids, batch.position_ids)
    ce = current.token_ce(batch.labels, document_ids=batch.document_ids)
    return ce[ce.isfinite()]


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
        if "quarters" in comparison:
            lines += [_quarters(comparison["quarters"]), ""]
    return "\n".join(lines[:-1])


def summary(found: dict[str, Any]) -> str:
    """Format the differences of head 0 of the arms that most studies have, a line for each study."""
    arms = ("rho1_excess", "rho1_excess-sequence", "random_matched", "planted_truth", FILTERED)
    titles = ["head 0, CE minus that of uniform weights", *arms]
    lines = [f"| {' | '.join(titles)} |", "| --- |" + " ---: |" * len(arms)]
    for name, comparison in found.items():
        # A detached trunk's head 0 is not trained.
        if name not in ("tries", "SmolLM2, detached"):
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


def _quarters(found: dict[str, list[list[float]]]) -> str:
    titles = ["head 0, tokens that the reference predicts", "best", "well", "badly", "worst"]
    lines = [f"| {' | '.join(titles)} |", "| --- |" + " ---: |" * 4]
    for arm, seeds in found.items():
        values = [statistics.fmean(column) for column in zip(*seeds, strict=True)]
        if arm in ("reference", "uniform"):
            cells = [arm, *(f"{value:.2f}" for value in values)]
        else:
            base = [statistics.fmean(column) for column in zip(*found["uniform"], strict=True)]
            cells = [f"{arm} - uniform", *(f"{x - y:+.3f}" for x, y in zip(values, base, strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
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
