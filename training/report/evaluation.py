"""An evaluation as a table on the terminal, as JSON and as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from mtp_ce.training.console import number, say
from mtp_ce.training.metrics.acceptance import AcceptanceResult
from mtp_ce.training.metrics.evaluation import Evaluation


def results_table(evaluation: Evaluation) -> Table:
    """Return an evaluation as a table, one row per head, beside the unigram entropy."""
    title = f"held-out text: {evaluation.heads[0].rows:,} tokens; cross entropies in nats"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    before, decoding = evaluation.before, evaluation.decoding
    columns = ["head", *(["before"] if before else []), "CE", "unigram", "perplexity", "top-1", "top-5"]
    for column in (*columns, "agree", *(["accepted"] if decoding else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for h, result in enumerate(evaluation.heads):
        table.add_row(
            f"{h} (+{h + 1})",
            *([number(before[h].ce, ".3f")] if before else []),
            number(result.ce, ".3f"),
            number(evaluation.unigram, ".3f"),
            number(result.perplexity, ",.1f"),
            number(result.top1, ".1%"),
            number(result.top5, ".1%"),
            "" if h == 0 or (result.agrees is None and result.rows) else number(result.agrees, ".1%"),
            *(["" if h == 0 else number(decoding.kept[h - 1], ".1%")] if decoding else []),
        )
    return table


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Print the table, the meaning of its columns, and the results of decoding."""
    console.print(results_table(evaluation))
    lines = ["unigram: cross entropy of the held-out tokens under the training tokens' frequencies, add-one smoothed"]
    if evaluation.tokens_per_forward:
        lines.append(
            "agree: positions where heads 1..h match head 0's later argmax, on held-out text; "
            f"decoding at these rates gives {evaluation.tokens_per_forward:.2f} tokens per forward"
        )
    if decoding := evaluation.decoding:
        speculation = decoding.speculation
        lines += [
            "accepted: decoding rounds in which the drafts of heads 1..h were accepted",
            f"decoding: {decoding.prompts} prompts of up to {decoding.prompt_tokens} tokens, "
            f"{speculation.tokens:,} new tokens: {speculation.tokens_per_forward:.2f} tokens per forward "
            f"(acceptance length {speculation.acceptance_length:.2f}), {decoding.speedup:.2f} times the speed of plain "
            f"generate; identical text for {decoding.identical} of {decoding.prompts} prompts",
        ]
    for line in lines:
        say(console, line)
    if evaluation.acceptance:
        console.print(acceptance_table(evaluation.acceptance))
        say(
            console,
            "accepted: drafts whose 1st, 2nd, ... token was accepted; length: mean tokens per draft, the model's own "
            "included; as vLLM counts them at temperature 0",
        )


def acceptance_table(acceptance: AcceptanceResult) -> Table:
    """Return what a serving engine counts as a table, one row per domain and one for all."""
    K = acceptance.draft_tokens
    title = f"in a serving engine, num_speculative_tokens={K}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    table.add_column("prompts", overflow="fold")
    for column in ("tokens", "drafts"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("accepted", justify="right", overflow="fold")
    table.add_column("length", justify="right", no_wrap=True)
    rows = {name: counts for name, counts in acceptance.domains.items() if name}
    for name, counts in (*rows.items(), ("all", acceptance.total)):
        accepted = " ".join(f"{count:,}" for count in counts.accepted)
        prompts, length = f"{counts.prompts:,} {name}", number(counts.mean_length, ".2f")
        table.add_row(prompts, f"{counts.tokens:,}", f"{counts.drafts:,}", accepted, length)
    return table


def write_evaluation(evaluation: Evaluation, folder: Path, title: str) -> list[Path]:
    """Write evaluation.json and evaluation.png, and return the two paths."""
    # matplotlib writes a font cache on first import; a dry run writes nothing.
    from mtp_ce.training.report.plot import draw_evaluation

    table, picture = folder / "evaluation.json", folder / "evaluation.png"
    table.write_text(json.dumps(evaluation.as_json(), indent=2) + "\n", encoding="utf-8")
    draw_evaluation(evaluation, picture, title)
    return [table, picture]
