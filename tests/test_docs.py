"""The documentation says what was measured, and names what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mtp_ce.training.cli import _main
from mtp_ce.training.compare import comparison_table
from mtp_ce.training.schema import Recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_table_of_the_comparison_is_that_of_its_results_file():
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- comparison:begin -->\n")[2].partition("\n<!-- comparison:end -->")[0]
    found = json.loads((ROOT / "docs" / "comparison.json").read_text(encoding="utf-8"))
    assert shown == comparison_table(found)
    assert len(found["seeds"]) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_the_tables_of_smollm2_are_those_of_its_results_file():
    """One row per head for each trunk mode: cross entropies, top-1, top-5, agrees, kept."""
    page = (ROOT / "docs" / "heads.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- smollm2:begin -->\n")[2].partition("<!-- smollm2:end -->")[0]
    rows = [line.strip("|").split("|") for line in shown.splitlines() if line.startswith("|")][2:]
    found = json.loads((ROOT / "docs" / "smollm2.json").read_text(encoding="utf-8"))
    expected = []
    for mode, run in found.items():
        for h, (before, head) in enumerate(zip(run["before"], run["heads"], strict=True)):
            kept = "" if h == 0 else f"{run['decoding']['kept'][h - 1]:.1%}"
            agrees = "" if h == 0 else f"{head['agrees']:.1%}"
            numbers = [f"{before['ce']:.2f}", f"{head['ce']:.2f}", f"{head['top1']:.1%}", f"{head['top5']:.1%}"]
            expected.append([mode, str(h), *numbers, agrees, kept])
    assert [[cell.strip() for cell in row] for row in rows] == expected
    for run in found.values():
        assert f"{run['decoding']['tokens_per_forward']:.2f} tokens per forward" in shown
        assert run["decoding"]["identical"] == run["decoding"]["prompts"]


def commands() -> list[str]:
    """Every `train-mtp` line of the documentation, but those that need S3, which test_storage_settings.py runs."""
    lines = [line for page in PAGES if page.name != "s3.md" for line in page.read_text(encoding="utf-8").splitlines()]
    found = [re.sub(r"\s+#.*", "", line) for line in lines if re.match(r"(pip install uv && uv run )?train-mtp", line)]
    return [command.removeprefix("pip install uv && uv run ") for command in found]


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_documentation_is_a_valid_recipe(command, capsys):
    import shlex

    words = shlex.split(command)[1:]
    assert _main([*words, "--print-config"]) == 0
    assert "sequence_length" in capsys.readouterr().out


def test_the_page_of_weights_names_every_scorer():
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    schema = json.dumps(Recipe.model_json_schema())
    for name in ("uniform", "rho1_excess", "critic_delta", "shuffled", "random_matched"):
        assert f"`{name}`" in page
        assert f'"{name}"' in schema
