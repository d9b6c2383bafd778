"""What messages and pages advise exists: keys with values that are valid, options of commands, packages.

Commands of pages and of --help are run by tests/test_commands.py. Here every literal of the sources and every page is
searched for the rest.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from mtp_ce.training.cli import evaluate, export, train
from mtp_ce.training.config.explain import _known_keys
from mtp_ce.training.config.recipe import load_evaluation, load_recipe, shipped_recipes
from mtp_ce.training.config.schema import EvaluationRecipe, Recipe
from mtp_ce.training.errors import RecipeError

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path
    for folder in ("training", "mtp_ce")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(part.is_symlink() for part in path.parents)
]
KEYS = {*_known_keys(Recipe), *_known_keys(EvaluationRecipe)}
GROUPS = "data|model|scorer|reference|critic|optimizer|train|validation|checkpoint|tracking"

# Stands for the expressions of an f-string.
HOLE = "{}"

SETTING = re.compile(rf"(?<![\w./{{}}-])((?:{GROUPS}|\{{\}})(?:\.(?:[a-z_]+|\{{\}}))+|seed)=('[^']*'|[^\s,;`\")|]+)")
NAMED = re.compile(rf"(?<![\w./\[{{(-])((?:{GROUPS})(?:\.[a-z_]+)+)(?![\w(/=.]*[\w(/=])")
# Not the variables of a style sheet, --ink: and var(--ink).
OPTION = re.compile(r"(?<![\w(-])--([a-z][a-z_-]+)(?![\w:])")
PACKAGE = re.compile(r"pip install (?:--no-deps )?('[^']+'|[\w\[\].{}-]+)")

# Words in the place of a value that the reader has to choose.
CHOSEN = {"FOLDER", "N", "..."}

# Names that begin as a key does and are none.
NO_KEYS = {
    "model.safetensors": "a file", "model.layers": "tensors", "model.mtp_layers": "tensors",
    "model.embed_tokens": "tensors", "train.sbatch": "a file",
    "train.arrow": "a file",
    "data.json": "a file", "tracking.md": "a page", "data.md": "a page", "model.base_model": "an attribute",
}  # fmt: skip

# Options of other programs.
FOREIGN_OPTIONS = {
    "no-deps", "backend-store-uri", "host", "port", "speculative-config", "hf-overrides", "standalone", "model-path",
    "speculative-algorithm", "speculative-draft-model-path", "speculative-num-steps", "speculative-eagle-topk",
    "speculative-num-draft-tokens",
    "nproc-per-node", "no-python",
    "rdzv-backend", "rdzv-endpoint", "rdzv-id", "max-restarts", "nnodes", "group", "benchmark-only", "cpu",
    "full", "results", "shutdown-timeout", "multi_gpu", "num_processes", "num_machines", "mixed_precision",
    "dynamo_backend", "no_python", "no-enable-prefix-caching", "attention-backend",
}  # fmt: skip

# Advice without a key: the words after "give", and what they say as settings, over a recipe. None: the words are
# checked by the test that is named.
GIVE = {
    "give trunk joint": ("tiny", ["model.mtp.trunk=joint"]),
    "give trunk detached, or targets text": ("smollm2", ["model.mtp.trunk=detached", "model.mtp.targets=text"]),
    "give kind pretrained, or another mtp.kind": ("smollm2", ["model.mtp.kind=native"]),
    "give kind sequential": ("tiny", ["model.mtp.kind=sequential", "model.mtp.shared=true"]),
    "give packed": ("tiny", ["data.packing=packed"]),
    "give scope 'sequence'": ("rho1", ["scorer.scope=sequence"]),
    "give false": ("tiny", ["train.activation_checkpointing=false"]),
    "give train to train one": ("rho1", ["reference.train.steps=40"]),
    "give a multiple": ("tiny", ["train.batch_size=4"]),
    "give 1": ("tiny", ["train.tensor_parallel=1"]),
    "give a number that divides it": ("tiny", ["train.tensor_parallel=2"]),
    "give arms of the recipe": None,  # tests/training/run/test_compare.py
    "give the folder, and data.suffix": ("tiny", ["data.corpus=my/texts", "data.suffix=.txt"]),
    "give .jsonl, .json, .csv or .parquet files": ("tiny", ["data.corpus=my/a.jsonl"]),
    "give one, an s3:// address or a hub": ("smollm2", ["model.source=s3://bucket/model"]),
    "give one, a glob, an": ("tiny", ["data.corpus=my/*.jsonl"]),
    "give one of them, and": ("tiny", ["train.steps=null", "train.max_tokens=1000000"]),
    "give {}=auto or cpu": ("tiny", ["train.device=auto"]),
    "give one, or null": ("tiny", ["checkpoint.every=null"]),
    "give each its own": ("tiny", ["checkpoint.upload=s3://bucket/a"]),
    "give a 'prompt' instead": None,  # tests/training/data/test_prompts.py
    "give {}=... again": None,  # tests/training/test_addresses.py
    "give that": None,  # tests/training/data/test_input_faults.py: a file instead of a named pipe
    "give a folder on this machine": None,  # tests/training/cli/test_cli.py
    "give a file on this machine": None,  # tests/training/cli/test_eval.py
    "give another model": None,  # tests/training/loop/test_scoring.py
    "give the s3:// address of a run directory": None,  # tests/training/run/test_resume.py
    "give logits as wide as": None,  # tests/mtp_ce/loss/test_labels.py
    "give sharp weights": None,  # no advice
    "give meaningless scores": None,  # no advice
    "give them up": None,  # no advice
}  # fmt: skip


def literals(path: Path) -> Iterator[str]:
    """Every text of a file, joined as it is when it runs, with holes for the expressions of f-strings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(value) for value in node.values}
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def texts() -> Iterator[tuple[str, str]]:
    """Name and text of every literal and every page."""
    for path in SOURCES:
        for literal in literals(path):
            yield path.relative_to(ROOT).as_posix(), literal
    for page in PAGES:
        for paragraph in page.read_text(encoding="utf-8").split("\n"):
            yield page.name, paragraph


TEXTS = list(texts())


def is_key(name: str) -> bool:
    pattern = re.compile(re.escape(name).replace(re.escape(HOLE), r"[\w.]+"))
    return any(pattern.fullmatch(key) for key in KEYS)


def loads(settings: list[str]) -> bool:
    """Whether some recipe takes the settings."""
    for name in shipped_recipes():
        try:
            load_recipe(name, settings)
        except RecipeError:
            continue
        return True
    try:
        load_evaluation(None, settings)
    except RecipeError:
        return False
    return True


def wrong_settings(text: str) -> list[str]:
    """What a text sets that does not exist, or has no such value."""
    # A dot at the end belongs to the sentence.
    found = [(key, value if value in CHOSEN else value.strip("'").rstrip(".")) for key, value in SETTING.findall(text)]
    if wrong := [key for key, _ in found if not is_key(key) and key.partition("=")[0] not in NO_KEYS]:
        return wrong
    concrete = [(key, value) for key, value in found if HOLE not in key and value not in CHOSEN]
    # Together, as a command takes them, or each by itself. Most texts set nothing, and a recipe takes time to load.
    if not concrete or loads([f"{key}={value.replace(HOLE, '1')}" for key, value in concrete]):
        return []
    return [f"{key}={value}" for key, value in concrete if HOLE not in value and not loads([f"{key}={value}"])]


def test_every_setting_that_a_text_names_is_one():
    wrong = {(where, setting) for where, text in TEXTS for setting in wrong_settings(text)}
    assert not wrong
    assert sum(len(SETTING.findall(text)) for _, text in TEXTS) > 60


def test_every_key_that_a_message_or_a_page_names_is_one():
    named = {(where, name) for where, text in TEXTS if not where.startswith("mtp_ce") for name in NAMED.findall(text)}
    unknown = {(where, name) for where, name in named if not is_key(name) and name not in NO_KEYS}
    assert not unknown
    assert len(named) > 60


def test_every_option_that_a_text_names_is_one():
    known = {
        option.lstrip("-")
        for command in (train, evaluate, export)
        for action in command._parser()._actions
        for option in action.option_strings
    }
    for example in (ROOT / "examples").glob("*.py"):
        known |= set(re.findall(r'add_argument\("--([\w-]+)"', example.read_text(encoding="utf-8")))
    options = {(where, option) for where, text in TEXTS for option in OPTION.findall(text)}
    assert {(where, option) for where, option in options if option not in known | FOREIGN_OPTIONS} == set()
    assert {"resume", "output", "dry-run", "version"} <= known


def test_every_package_that_a_text_has_installed_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    known = " ".join(chain(*extras.values(), *project["dependency-groups"].values()))
    for where, text in TEXTS:
        for package in PACKAGE.findall(text):
            name, _, extra = package.strip("'").rstrip(".").partition("[")
            if name in (HOLE, ".", "uv"):
                continue
            assert name == "mtp_ce" or re.search(rf"\b{re.escape(name)}\b", known), (where, package)
            assert not extra or extra.rstrip("]") in extras, (where, package)


@pytest.mark.parametrize("words", [words for words, example in GIVE.items() if example])
def test_advice_in_words_is_valid(words):
    recipe, settings = GIVE[words]
    assert load_recipe(recipe, settings)


def test_all_advice_is_checked():
    """By its settings, its keys, or its line in the table; and every line of the table is some text's."""
    advice = [
        (where, text[match.start() :])
        for where, text in TEXTS
        if where.endswith(".py")
        for match in re.finditer(r"\bgive ", text)
    ]
    assert len(advice) > 30
    unknown = [
        (where, text[:80])
        for where, text in advice
        if not SETTING.search(text)
        and not NAMED.search(text)
        and not re.match(r"give \{\}\.[a-z]+", text)
        and not any(text.startswith(words) for words in GIVE)
    ]
    assert not unknown
    assert not [words for words in GIVE if not any(words in text for _, text in TEXTS)]


def test_a_wrong_setting_would_be_found():
    assert wrong_settings("give model.kindd=pretrained") == ["model.kindd"]
    assert wrong_settings("give data.packing=pakced") == ["data.packing=pakced"]
    assert wrong_settings("give {}.tokenizer={}, or model.mtp.{}=3") == []
    assert wrong_settings("model.kind=pretrained model.source={}") == []
